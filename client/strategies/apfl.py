"""APFL: Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning", algorithm 1: a site's model is the mixture alpha v + (1 - alpha) w of
one of its own and the shared one, all three trained in step; alpha follows its own gradient (equation 9), once a round.

Privacy. A step makes two releases, the gradient of w and the gradient of the mixture; both are charged, so a study's budget is for twice the steps.
alpha moves by the (noised) change of the mixture: post-processing.
"""

import contextlib
import copy

import numpy as np
import torch
from torch import nn

from client.local_training import torch_keyed
from client.local_update import Learner, difference
from client.noise import subkey
from client.refinement import refined
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters, get_parameters, set_parameters
from shared.strategy_options import Apfl as Options

ALPHA = "alpha"


class Apfl:
    """w <- w - eta grad f(w); v <- v - eta grad_v f(alpha v + (1 - alpha) w), that is -eta alpha grad f at the mixture."""

    keeps = True

    def __init__(self, options: Options) -> None:
        self._options = options

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The mixture of the site's own model and the received one."""
        return _mixture(kept.get("personal") or received, received, self._alpha(kept))

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        alpha, shared, mixed = self._alpha(kept), learner.model, copy.deepcopy(learner.model)
        own = dict(kept.get("personal") or received)
        set_parameters(shared, received)
        set_parameters(mixed, self.judged(kept, received))
        slope = 0.0  # of the loss along alpha, times the learning rate: - <v - w, change of the mixture>
        with torch_keyed(subkey(learner.key, b"torch")), contextlib.ExitStack() as both:
            of_shared = both.enter_context(contextlib.closing(learner.train_stepwise(shared, purpose="")))
            of_mixed = both.enter_context(contextlib.closing(learner.train_stepwise(mixed, purpose="personal")))
            before, common = get_parameters(mixed), received
            for _ in zip(of_shared, of_mixed, strict=True):
                after = get_parameters(mixed)
                change = difference(after, before)
                slope -= sum(float(np.vdot(own[name] - common[name], value)) for name, value in change.items())
                own, common = {name: np.asarray(own[name] + alpha * value) for name, value in change.items()}, get_parameters(shared)
                before = _mixture(own, common, alpha)
                _load(mixed, before)
        if self._options.adaptive_alpha:
            alpha = min(1.0, max(0.0, alpha - slope))
        trained = refined(learner.local.task, get_parameters(shared), key=subkey(learner.key, b"refine"))
        return Made(update=difference(trained, received), kept={"personal": own, "mixture": {ALPHA: np.array([alpha])}})

    def _alpha(self, kept: Kept) -> float:
        return float(kept["mixture"][ALPHA][0]) if "mixture" in kept else self._options.alpha


def _mixture(own: Parameters, shared: Parameters, alpha: float) -> Parameters:
    return {name: np.asarray(alpha * own[name] + (1 - alpha) * value, dtype=value.dtype) for name, value in shared.items()}


def _load(model: nn.Module, parameters: Parameters) -> None:
    """In place, between two steps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(parameters[name]))
