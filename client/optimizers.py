"""The local optimizer and its learning rate. Momentum, weight decay and the proximal term see only the (noised) gradient and the
parameters, so under differential privacy they are post-processing."""

import math
from collections.abc import Iterable

import torch

from shared.study import FedProx, Study, Training


def learning_rate_at(training: Training, round_number: int, num_rounds: int) -> float:
    """The learning rate of a round, counted from 1: linear warm-up, then constant, linear or cosine decay to zero after the last round."""
    if round_number <= training.warmup_rounds:
        return training.learning_rate * round_number / (training.warmup_rounds + 1)
    progress = (round_number - 1 - training.warmup_rounds) / max(num_rounds - training.warmup_rounds, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[training.schedule]
    return training.learning_rate * factor


def local_optimizer(study: Study, parameters: Iterable[torch.nn.Parameter], round_number: int) -> torch.optim.Optimizer:
    """A fresh optimizer for one round at one site."""
    training = study.training
    rate = learning_rate_at(training, round_number, study.rounds.count)
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=training.weight_decay)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=training.weight_decay)


class ProximalTerm:
    """FedProx (Li et al. 2020, equation 2): adds mu (w - w_received) to the gradient, after clipping and noise where there are any."""

    def __init__(self, study: Study, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._mu = study.strategy.proximal_mu if isinstance(study.strategy, FedProx) else 0.0
        self._anchors = [(parameter, parameter.detach().clone()) for parameter in parameters] if self._mu else []

    def add_to_gradients(self) -> None:
        """Call after the gradient is final and before the optimizer's step."""
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:  # None: a frozen parameter, which does not move
                parameter.grad += self._mu * (parameter.detach() - anchor)
