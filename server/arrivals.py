"""A grid that hands answers over as they come, for strategies that do not wait for everybody: who is still at work when a round ends works on.

And what a checkpoint keeps of the questions that are open when it is written, so that a resumed run can ask them again with the models that they
were asked with: as many models as rounds have sites still at work.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import Message

from server.strategies.server_optimizer import State
from shared.messages import PARAMETERS, from_array_record
from shared.models import Parameters

OPEN, MODEL = "at work", "model of round "  # parts of a checkpoint's state
NOT_BEGUN: Mapping[int, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """A question that has no answer yet, and for how long, in nanoseconds of the grid's clock."""

    message: Message
    nanoseconds: int


@runtime_checkable
class ArrivalGrid(Protocol):
    """A grid whose answers may be taken one at a time, and between two of them others asked."""

    def ask(self, messages: Iterable[Message], *, seconds: float, begun: Mapping[int, int] = NOT_BEGUN) -> None:
        """Ask these sites; each has so many seconds from now on. A node has one open question at a time.

        Args:
            begun: by node, for how many nanoseconds it has been at work already: of a run that is resumed, where the grid keeps a clock of its own.
        """

    def arrivals(self) -> Iterator[Message]:
        """The answers as they come, until no question is open. It may be left at any moment, and called again: no answer is lost."""

    def at_work(self) -> dict[int, AtWork]:
        """The open questions, by node. One that was not answered in time is open no more."""

    def dismiss(self) -> None:
        """No question is open any more, and no answer to one is handed over."""


@runtime_checkable
class ClockedGrid(Protocol):
    """A grid that keeps a clock of its own, where sites take time that nobody waits for."""

    @property
    def virtual_nanoseconds(self) -> int:
        """What has passed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenQuestion:
    """A site's training that a checkpoint found under way: which round's, and for how long."""

    name: str
    round_number: int
    nanoseconds: int


def with_open_questions(state: State, open_questions: Mapping[str, tuple[int, AtWork]]) -> State:
    """The state, with what it takes to ask these sites again.

    Args:
        open_questions: by site, the round in which it was asked, and the question.
    """
    if not open_questions:
        return state
    found = {name: np.array([number, work.nanoseconds], dtype=np.float64) for name, (number, work) in sorted(open_questions.items())}
    models = {f"{MODEL}{number}": dict(from_array_record(work.message.content.array_records[PARAMETERS])) for number, work in open_questions.values()}
    return {**state, OPEN: found, **models}  # type: ignore[dict-item]  # models in their own types


def take_open_questions(state: State, order: Iterable[str]) -> tuple[State, list[OpenQuestion], dict[int, Parameters]]:
    """The state without them; the questions by round, and each round's model, its parameters in this order."""
    names = list(order)
    kept = {part: arrays for part, arrays in state.items() if part != OPEN and not part.startswith(MODEL)}
    models: dict[int, Parameters] = {
        int(part.removeprefix(MODEL)): {name: arrays[name] for name in names} for part, arrays in state.items() if part.startswith(MODEL)
    }
    questions = [
        OpenQuestion(name=name, round_number=int(number), nanoseconds=int(nanoseconds))
        for name, (number, nanoseconds) in sorted(state.get(OPEN, {}).items())
    ]
    return kept, sorted(questions, key=lambda question: question.round_number), models
