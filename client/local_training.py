"""One round of training at a site without privacy: shuffled passes, or a number of steps, over the training records."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from client.noise import KeyedStream
from client.optimizers import GradientTerm, LocalOptimizer, ProximalTerm
from client.sampling import shuffled_batches
from shared.cohort import Cohort, IntArray
from shared.study import Study
from shared.task import Task

_STATE_WORDS = 624  # of the Mersenne twister, each in 8 bytes of torch's state
_UNUSED_STATE = torch.Generator().manual_seed(0).get_state()  # of a generator from which nothing was drawn yet
_STATE_OFFSET = 24  # bytes: seed, how many words are left, whether seeded, next word


@contextlib.contextmanager
def torch_keyed(key: bytes) -> Iterator[None]:
    """Dropout and the like draw from torch's own generator: inside, its whole state is drawn from `key` (32 bytes); restored after.

    Not only its seed, which has 32 bits and could be tried through: who knew the masks of dropout could tell more than noise hides. Never
    used for privacy noise itself.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.set_state(_state_from(key))
    try:
        yield
    finally:
        generator.set_state(before)


def keyed_generator(key: bytes) -> torch.Generator:
    """A generator that draws what torch's own draws inside `torch_keyed(key)`."""
    generator = torch.Generator()
    generator.set_state(_state_from(key))
    return generator


def _state_from(key: bytes) -> torch.Tensor:
    words = KeyedStream(key).words(_STATE_WORDS) >> np.uint64(32)
    state = _UNUSED_STATE.clone()
    state[_STATE_OFFSET : _STATE_OFFSET + 8 * _STATE_WORDS] = torch.from_numpy(words.view(np.uint8))
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRound:
    """What one round at one site is about: the study, the task and which round it is.

    Attributes:
        still_wanted: called before every step; raises where the work is stale.
        terms: what the strategy adds to the gradients, besides FedProx' pull.
        steps: to take, in place of those that the study's round has.
    """

    study: Study
    task: Task
    round_number: int
    still_wanted: Callable[[], None] = lambda: None
    terms: tuple[GradientTerm, ...] = ()
    steps: int | None = None


def train_round(model: nn.Module, cohort: Cohort, local: LocalRound, *, rng: np.random.Generator) -> int:
    """Train `model` in place on every record of `cohort`; the number of steps taken comes back. No promise about privacy."""
    return sum(1 for _ in training_steps(model, cohort, local, rng=rng))


def training_steps(model: nn.Module, cohort: Cohort, local: LocalRound, *, rng: np.random.Generator) -> Iterator[None]:
    """What `train_round` does, a step at a time."""
    batches = round_batches(cohort.num_records, local.study, rng, steps=local.steps)
    optimizer = LocalOptimizer(local.study, model.parameters(), local.round_number)
    terms = (ProximalTerm.of_study(local.study, optimizer.parameters), *local.terms)
    model.train()
    for batch in batches:
        local.still_wanted()
        optimizer.zero_grad()
        record_losses(model, cohort, batch, local.task).mean().backward()  # type: ignore[no-untyped-call]  # torch
        for term in terms:
            term.add_to_gradients()
        optimizer.step()
        yield


def round_batches(num_records: int, study: Study, rng: np.random.Generator, *, steps: int | None = None) -> list[IntArray]:
    """The batches of a round: `local_epochs` passes, or the first `steps` (or `local_steps`) batches of as many passes as that needs."""
    training = study.training
    steps = training.local_steps if steps is None else steps
    if steps is None:
        return [batch for _ in range(training.local_epochs) for batch in shuffled_batches(num_records, training.batch_size, rng)]
    batches: list[IntArray] = []
    while num_records and len(batches) < steps:
        batches += shuffled_batches(num_records, training.batch_size, rng)
    return batches[:steps]


def record_losses(model: nn.Module, cohort: Cohort, records: IntArray, task: Task) -> torch.Tensor:
    """The loss of each of these records, `(len(records),)`."""
    outputs = model(*(torch.from_numpy(values[records]) for values in cohort.inputs))
    return task.loss(outputs, torch.from_numpy(cohort.labels[records]))
