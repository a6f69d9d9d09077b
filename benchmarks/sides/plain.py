"""A PyTorch loop with a DataLoader at every site, without privacy."""

import functools

import torch
from side import Setting, one_by_one, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train_site(model: nn.Module, data: TensorDataset, setting: Setting) -> None:
    """One epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    for inputs, labels in DataLoader(data, batch_size=setting.batch_size, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


if __name__ == "__main__":
    run("plain", functools.partial(one_by_one, train_site))
