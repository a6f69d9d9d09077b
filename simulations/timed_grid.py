"""A grid with a virtual clock: sites of different speed, and nobody who waits for them.

A site takes the same time for every training; what the others of a simulation do in the meantime is another matter. The clock is of whole
nanoseconds, so that a run resumed on another moment of it finds the very same order of arrivals.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.arrivals import NOT_BEGUN, AtWork
from server.blocks import Block, BlockGrid
from shared.seeding import generator
from shared.strategy_options import FedBuff
from shared.study import Study
from simulations.in_process import FIRST_SITE_NODE_ID
from simulations.outer_grid import OuterGrid

NANOSECONDS = 1_000_000_000


def seconds_of_training(study: Study, name: str) -> float:
    """Virtual seconds that a site takes for a training: log-normal with median 1 and `federation.slowness` as sigma; of (seed, name) alone."""
    return float(np.exp((study.federation.slowness or 0.0) * generator(study.seed, "slowness", name).standard_normal()))


def with_clock(grid: Grid, study: Study, names: Sequence[str], *, virtual: bool = True) -> Grid:
    """The grid, whose nodes are these sites in this order, with a clock; the grid itself where the study has no use for one.

    Args:
        virtual: False where the sites are real: then all take alike.
    """
    if not isinstance(study.strategy, FedBuff) and not (virtual and study.federation.slowness):
        return grid
    seconds = {node_id: seconds_of_training(study, name) if virtual else 1.0 for node_id, name in enumerate(names, start=FIRST_SITE_NODE_ID)}
    return TimedGrid(grid, seconds, deadline_seconds=study.rounds.deadline_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Working:
    """A site at work; all on the clock, in nanoseconds. Who is late, or never answers, is due at the deadline."""

    message: Message
    begun: int
    done: int
    deadline: int
    silent: bool = False

    @property
    def due(self) -> int:
        return self.deadline if self.silent else min(self.done, self.deadline)


class TimedGrid(OuterGrid):
    """Carries messages as the grid in it does; trainings take virtual time, and nothing else does.

    A question that is asked with `ask` reaches its site when its answer is due, so no more than one answer is ever kept; a site whose question is
    dismissed has not begun. Whoever takes longer than the deadline has worked in vain.

    Args:
        seconds: of a training, by node.
        deadline_seconds: of the study, on this clock, for those that are asked together; `ask` says its own.
    """

    def __init__(self, grid: Grid, seconds: Mapping[int, float], *, deadline_seconds: float) -> None:
        super().__init__(grid)
        self._takes = {node_id: _nanoseconds(value) for node_id, value in seconds.items()}
        self._deadline = _nanoseconds(deadline_seconds)
        self._working: dict[int, _Working] = {}
        self._now = 0

    @property
    def virtual_nanoseconds(self) -> int:
        """What has passed on the clock."""
        return self._now

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies to these messages; all that are asked begin together, and the slowest, or the deadline, ends it."""
        yield from self._grid.send_and_receive(self._pass_time(list(messages)), timeout=timeout)

    def send_in_blocks(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message | Block]:
        """As `send_and_receive`, with blocks among the replies where the grid within gives some."""
        ask = self._grid.send_in_blocks if isinstance(self._grid, BlockGrid) else self._grid.send_and_receive
        yield from ask(self._pass_time(list(messages)), timeout=timeout)

    def _pass_time(self, messages: list[Message]) -> list[Message]:
        """Let the time pass that these take together; those that are answered in time."""
        takes = [self._takes_for(message) for message in messages]
        self._now += min(max(takes, default=0), self._deadline)
        for message, nanoseconds in zip(messages, takes, strict=True):
            if nanoseconds > self._deadline:
                self._work_in_vain(message)
        return [message for message, nanoseconds in zip(messages, takes, strict=True) if nanoseconds <= self._deadline]

    def _takes_for(self, message: Message) -> int:
        return self._takes[message.metadata.dst_node_id] if message.metadata.message_type == MessageType.TRAIN else 0

    def _work_in_vain(self, message: Message) -> None:
        for _ in self._grid.send_and_receive([message]):
            pass

    def ask(self, messages: Iterable[Message], *, seconds: float, begun: Mapping[int, int] = NOT_BEGUN) -> None:
        """Ask these sites; see `server.arrivals`."""
        for message in messages:
            node_id = message.metadata.dst_node_id
            assert node_id not in self._working
            since = self._now - begun.get(node_id, 0)
            self._working[node_id] = _Working(
                message=message, begun=since, done=since + self._takes_for(message), deadline=since + _nanoseconds(seconds)
            )  # fmt: skip

    def arrivals(self) -> Iterator[Message]:
        """The answers in the order in which sites are done, those of the same moment by node; the clock jumps from one to the next."""
        while self._working:
            node_id, work = min(self._working.items(), key=lambda item: (item[1].due, item[0]))
            self._now = max(self._now, work.due)
            if work.silent or work.done > work.deadline:
                del self._working[node_id]
                if not work.silent:
                    self._work_in_vain(work.message)
                continue
            replies = list(self._grid.send_and_receive([work.message]))
            if replies:
                del self._working[node_id]
            else:
                self._working[node_id] = replace(work, silent=True)
            yield from replies

    def at_work(self) -> dict[int, AtWork]:
        """The open questions, by node."""
        return {node_id: AtWork(message=work.message, nanoseconds=self._now - work.begun) for node_id, work in self._working.items()}

    def dismiss(self) -> None:
        """Nobody is at work any more."""
        self._working.clear()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
