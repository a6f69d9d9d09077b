"""The models of the benchmark, in plain torch, so that they can be imported in every side's environment."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

FEATURES, CHANNELS, WIDTH, HIDDEN = 30, 12, 32, (64, 32)


def tabular(hidden: Sequence[int] = HIDDEN) -> nn.Module:
    """An MLP with tanh; 30-64-32-2 has 4,130 parameters."""
    layers: list[nn.Module] = []
    widths = (FEATURES, *hidden)
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 2))


def image() -> nn.Module:
    """The convolutional net of Opacus' MNIST example, 28x28 to 10 classes, 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Sequence48(nn.Module):
    """An LSTM 12-32 over `(N, 48, 12)`, and a linear layer from its last state to two classes."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(steps)
        return self.head(outputs[:, -1])


def sequence() -> nn.Module:
    """With torch's LSTM."""
    return Sequence48(nn.LSTM(CHANNELS, WIDTH, batch_first=True))


def private_sequence() -> nn.Module:
    """With Opacus' LSTM, whose state has the names of torch's beside its own."""
    from opacus.layers import DPLSTM

    return Sequence48(DPLSTM(CHANNELS, WIDTH, batch_first=True))


def build(workload: str, *, private: bool) -> nn.Module:
    """A workload's model as a user of PyTorch, or of Opacus, writes it."""
    return {"tabular": tabular, "image": image, "sequence": private_sequence if private else sequence}[workload]()
