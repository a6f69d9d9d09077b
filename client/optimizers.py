"""The local optimizer and its learning rate. Momentum, weight decay and the proximal term see only the (noised) gradient and the
parameters, so under differential privacy they are post-processing."""

import math
from collections.abc import Iterable

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from shared.study import FedProx, Study, Training


def learning_rate_at(training: Training, round_number: int, num_rounds: int) -> float:
    """The learning rate of a round, counted from 1: linear warm-up, then constant, linear or cosine decay to zero after the last round."""
    if round_number <= training.warmup_rounds:
        return training.learning_rate * round_number / (training.warmup_rounds + 1)
    progress = (round_number - 1 - training.warmup_rounds) / max(num_rounds - training.warmup_rounds, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[training.schedule]
    return training.learning_rate * factor


class LocalOptimizer:
    """A fresh optimizer for one round at one site: SGD, Adam or AdamW, by torch's own functions.

    torch's classes around them import its compiler, a second and 70 MB in every process, only to tell it that there is nothing to compile.

    Args:
        parameters: to be changed in place; those without a gradient stay as they are.
    """

    def __init__(self, study: Study, parameters: Iterable[torch.Tensor], round_number: int) -> None:
        self.parameters = list(parameters)
        self.rate = learning_rate_at(study.training, round_number, study.rounds.count)
        self._training = study.training
        self._momenta: dict[int, torch.Tensor | None] = {}  # by place among the parameters, as all state
        self._moments: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # first and second moment, and steps taken

    def zero_grad(self) -> None:
        """No parameter has a gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter by its gradient."""
        moved = {place: parameter for place, parameter in enumerate(self.parameters) if parameter.grad is not None}
        gradients = [parameter.grad for parameter in moved.values() if parameter.grad is not None]
        (self._step_sgd if self._training.optimizer == "sgd" else self._step_adam)(moved, gradients)

    def _step_sgd(self, moved: dict[int, torch.Tensor], gradients: list[torch.Tensor]) -> None:
        momenta = [self._momenta.get(place) for place in moved]
        sgd(
            list(moved.values()), gradients, momenta, weight_decay=self._training.weight_decay, momentum=self._training.momentum, lr=self.rate,
            dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        self._momenta |= zip(moved, momenta, strict=True)

    def _step_adam(self, moved: dict[int, torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for place, parameter in moved.items():
            if place not in self._moments:
                self._moments[place] = torch.zeros_like(parameter), torch.zeros_like(parameter), torch.tensor(0.0)
        first, second, steps = zip(*(self._moments[place] for place in moved), strict=True) if moved else ((), (), ())
        adam(
            list(moved.values()), gradients, list(first), list(second), [], list(steps), amsgrad=False, beta1=0.9, beta2=0.999, lr=self.rate,
            weight_decay=self._training.weight_decay, eps=1e-8, maximize=False, decoupled_weight_decay=self._training.optimizer == "adamw",
        )  # fmt: skip


class ProximalTerm:
    """FedProx (Li et al. 2020, equation 2): adds mu (w - w_received) to the gradient, after clipping and noise where there are any."""

    def __init__(self, study: Study, parameters: Iterable[torch.Tensor]) -> None:
        self._mu = study.strategy.proximal_mu if isinstance(study.strategy, FedProx) else 0.0
        self._anchors = [(parameter, parameter.detach().clone()) for parameter in parameters] if self._mu else []

    def add_to_gradients(self) -> None:
        """Call after the gradient is final and before the optimizer's step."""
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:  # None: a frozen parameter, which does not move
                parameter.grad += self._mu * (parameter.detach() - anchor)
