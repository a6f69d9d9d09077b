"""A loop over the sites with Opacus' engine, made at every site and round, as its users do.

Opacus takes the sample rate from the number of batches, 1/7 here where a batch of 32 among 200 would be 0.16; steps and noise multiplier are the same.
"""

import functools
import warnings

import torch
from opacus import PrivacyEngine
from side import Setting, one_by_one, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", module=r"opacus|torch")


def train_site(model: nn.Module, data: TensorDataset, setting: Setting) -> None:
    """One expected epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    loader = DataLoader(data, batch_size=setting.batch_size)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=setting.noise_multiplier, max_grad_norm=setting.max_grad_norm
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(inputs), labels).backward()
        optimizer.step()
    private.to_standard_module()


if __name__ == "__main__":
    run("opacus_loop", functools.partial(one_by_one, train_site))
