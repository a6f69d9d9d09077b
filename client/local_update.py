"""One training of a model at a site, whichever promise it makes: from the parameters that it starts with to those that it may release."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from client.local_training import LocalRound, torch_keyed, train_round, training_steps
from client.noise import subkey
from client.optimizers import GradientTerm
from client.private_training import Randomness, private_training_steps, train_round_private
from client.refinement import refined
from client.releases import Arrays
from shared.cohort import Cohort
from shared.models import Parameters, get_parameters, set_parameters
from shared.plan import SitePlan
from shared.seeding import generator_of


@dataclass(slots=True, kw_only=True)
class Learner:
    """All that trainings of one round at one site have in common.

    Attributes:
        model: to work with; every training loads its parameters into it.
        key: of all the round's randomness; a training draws from a key of its own, by its `purpose`.
        simulated: the key follows from a simulation's seed, and noise protects nobody.
        steps: taken so far. Under privacy each is one release of `client.private_training`, whichever model it trains, and all are charged.
    """

    model: nn.Module
    train_part: Cohort
    local: LocalRound
    plan: SitePlan
    key: bytes
    simulated: bool
    steps: int = 0

    def train(
        self, start: Parameters, *, purpose: str = "", terms: Sequence[GradientTerm] = (), only: frozenset[str] | None = None,
        steps: int | None = None,
    ) -> Parameters:  # fmt: skip
        """The parameters after a training that starts with `start`.

        Args:
            purpose: another for each training of a round.
            terms: that a strategy adds to the gradients of `model`.
            only: names of the parameters that are trained; None: all that can be.
            steps: to take, in place of a round's.
        """
        key = self._key(purpose)
        local = dataclasses.replace(self.local, terms=tuple(terms), steps=steps)
        set_parameters(self.model, start)
        with torch_keyed(subkey(key, b"torch")), _trainable(self.model, only):
            if self.plan.private:
                self.steps += train_round_private(self.model, self.train_part, local, plan=self.plan, randomness=self._randomness(key))
            else:
                self.steps += train_round(self.model, self.train_part, local, rng=generator_of(key))
        return refined(self.local.task, get_parameters(self.model), key=subkey(key, b"refine"))

    def train_stepwise(self, model: nn.Module, *, purpose: str) -> Generator[None]:
        """Train `model` in place, a step at a time: for strategies that train two models together. Draw from it inside `torch_keyed`."""
        key = self._key(purpose)
        if self.plan.private:
            steps = private_training_steps(model, self.train_part, self.local, plan=self.plan, randomness=self._randomness(key))
        else:
            steps = training_steps(model, self.train_part, self.local, rng=generator_of(key))
        for _ in steps:
            self.steps += 1
            yield

    def _key(self, purpose: str) -> bytes:
        return subkey(self.key, purpose.encode()) if purpose else self.key

    def _randomness(self, key: bytes) -> Randomness:
        return Randomness.simulated(key) if self.simulated else Randomness.from_key(key)


def local_update(
    model: nn.Module, train_part: Cohort, parameters: Parameters, local: LocalRound, *, plan: SitePlan, key: bytes, simulated: bool
) -> tuple[Arrays, int]:
    """Trained minus received, and the steps that it took: a round of FedAvg or FedProx at one site. The arguments are those of `Learner`."""
    learner = Learner(model=model, train_part=train_part, local=local, plan=plan, key=key, simulated=simulated)
    return difference(learner.train(parameters), parameters), learner.steps


def difference(trained: Parameters, received: Parameters) -> Arrays:
    """The update: trained minus received, of what was received."""
    return {name: np.asarray(trained[name] - value) for name, value in received.items()}


@contextlib.contextmanager
def _trainable(model: nn.Module, only: frozenset[str] | None) -> Iterator[None]:
    """Within it no other parameter requires a gradient than `only` these; all as it was after."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name] and (only is None or name in only))
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
