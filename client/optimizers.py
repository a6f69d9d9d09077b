"""The local optimizer, and what is added to gradients. Momentum, weight decay and these terms see only the (noised) gradient, parameters, and
what was received or released before, so under differential privacy they are post-processing."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from shared.models import Parameters
from shared.schedule import learning_rate_at
from shared.strategy_options import FedProx
from shared.study import Study


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


class GradientTerm(Protocol):
    """Something that a strategy adds to the gradients of a model, after clipping and noise where there are any."""

    def add_to_gradients(self) -> None:
        """Call after the gradient is final and before the optimizer's step. A parameter without a gradient, which does not move, gets none."""


class ProximalTerm:
    """FedProx (Li et al. 2020, equation 2): adds mu (w - anchor) to the gradient.

    Args:
        anchored: parameters, each with its anchor.
    """

    def __init__(self, mu: float, anchored: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._mu = mu
        self._anchored = list(anchored) if mu else []

    @classmethod
    def of_study(cls, study: Study, parameters: Iterable[torch.Tensor]) -> "ProximalTerm":
        """The pull of FedProx to where the parameters are now; none of another strategy."""
        mu = study.strategy.proximal_mu if isinstance(study.strategy, FedProx) else 0.0
        return cls(mu, ((parameter, parameter.detach().clone()) for parameter in parameters) if mu else ())

    @classmethod
    def to(cls, anchor: Parameters, model: nn.Module, mu: float) -> "ProximalTerm":
        """The pull of a model's parameters to those of `anchor`."""
        return cls(mu, ((parameter, torch.from_numpy(np.array(anchor[name]))) for name, parameter in model.named_parameters()))

    def add_to_gradients(self) -> None:
        """See `GradientTerm`."""
        for parameter, anchor in self._anchored:
            if parameter.grad is not None:
                parameter.grad += self._mu * (parameter.detach() - anchor)


class Correction:
    """Adds arrays to the gradients of the parameters of these names, the same at every step: a control variate, a linear term."""

    def __init__(self, model: nn.Module, added: Mapping[str, NDArray[np.floating]]) -> None:
        self._added = [(parameter, torch.from_numpy(np.array(added[name]))) for name, parameter in model.named_parameters() if name in added]

    def add_to_gradients(self) -> None:
        """See `GradientTerm`."""
        for parameter, added in self._added:
            if parameter.grad is not None:
                parameter.grad += added.to(parameter.dtype)
