"""The in-process engine for many sites: a round's training in blocks of sites, everything else one site after another.

A block is begun (every site agrees and is charged), trained, and ended (charges lowered to the steps taken), and its replies go to the
coordinator in one piece. Which sites share a block depends on the sites, the study and the block's size alone, not on the number of processes.
"""

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp

from client.site import BegunRound, Site
from server.blocks import Block
from shared.errors import WardroundError, describe_exception
from shared.messages import MAX_REASON, Refused, Trained, TrainTask, decode, decode_parameters
from shared.models import Parameters, arrays_digest
from shared.study import Study
from shared.task import Task
from simulations.blocks.patients import Patients
from simulations.blocks.trainer import BlockTrainer, Outcome, make_trainer
from simulations.blocks.training import steps_of
from simulations.blocks.workers import Slot
from simulations.in_process import FIRST_SITE_NODE_ID, InProcessGrid

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """Others that train blocks: `blocks.workers.Pool` on this machine, `blocks.ray_workers.RayWorkers` on a cluster."""

    def ready(self) -> bool:
        """Whether all have started; until then somebody else trains."""

    @property
    def slots(self) -> list[Slot]:
        """Where blocks can be under way."""

    def receive(self, received: Parameters) -> None:
        """These are the parameters of the round to come."""

    def submit(self, slot: Slot, round_number: int, fold: int, sites: list[int]) -> None:
        """Have this block trained."""

    def wait(self) -> tuple[Slot, Outcome | None]:
        """A block that is done, or None where it could not be trained."""

    def close(self) -> None:
        """End them."""


class MakeWorkers(Protocol):
    """Starts workers for the patients of one fold."""

    def __call__(self, task: Task, study: Study, patients: Patients, *, block_size: int, stacked: bool) -> Workers:
        """The workers."""


Answered = Block | list[str]  # what a block's sites answer; or, where they could not be trained at once, who they are


class BlockEngine(InProcessGrid):
    """Carries messages as `InProcessGrid` does, and trains the sites of a round in blocks.

    Args:
        sites: virtual ones, all with seeded noise or none.
        block_size: sites that are trained at once, at most.
        stacked: the sites of a block are trained at once; else one after another, which only several processes make sooner.
        make_workers: others that train, from when they are ready; None: this process does all the time.
        device: where this process trains blocks at once.
    """

    def __init__(
        self, client_app: ClientApp, sites: Mapping[str, Site], task: Task, study: Study, *, block_size: int, stacked: bool = True,
        make_workers: MakeWorkers | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(client_app, sites)
        self._names = dict(enumerate(sites, start=FIRST_SITE_NODE_ID))
        self._numbers = {name: number for number, name in enumerate(sites)}
        self._sites = sites
        self._task = task
        self._study = study
        self._block_size = min(block_size, len(sites))
        self._stacked = stacked
        self._make_workers = make_workers
        self._device = device
        self._fold = 0
        self._steps: dict[str, int] = {}
        self._trainer: BlockTrainer | None = None  # here; None once there are workers
        self._workers: Workers | None = None

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()
        self._trainer = self._workers = None

    def send_in_blocks(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message | Block]:
        """The replies to these messages; training comes in blocks. After `timeout` seconds no further block is begun, and none waited for."""
        waiting = list(messages)
        if not waiting or waiting[0].metadata.message_type != MessageType.TRAIN:
            yield from self.send_and_receive(waiting, timeout=timeout)
            return
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        task = decode(waiting[0].content, TrainTask)  # all of a round share one record
        self._make_trainers(task.fold)
        by_name = {self._names[message.metadata.dst_node_id]: message for message in waiting}
        names = sorted(by_name, key=lambda name: (-self._steps[name], name))
        received = decode_parameters(waiting[0].content, self._sites[names[0]].template)
        blocks = deque(names[start : start + self._block_size] for start in range(0, len(names), self._block_size))
        for block in itertools.chain(self._here(task, received, blocks, deadline), self._in_workers(task, received, blocks, deadline)):
            if isinstance(block, Block):
                yield from [block] if time.monotonic() < deadline else []
                continue
            logger.warning("a block of %d sites could not be trained at once; they are trained one after another", len(block))
            yield from self.send_and_receive([by_name[name] for name in block], timeout=None if timeout is None else deadline - time.monotonic())

    def _answer(self, message: Message) -> Message:
        """A site has its patients by itself only while it answers alone: thousands of sites would hold them twice."""
        reply = super()._answer(message)
        self._sites[self._names[message.metadata.dst_node_id]].forget_parts()
        return reply

    def _make_trainers(self, fold: int) -> None:
        if self._fold == fold:
            return
        self.close()
        patients = Patients.of(self._sites, self._study, fold)
        counts = {name: patients.training.num_records(number) for name, number in self._numbers.items()}
        self._steps = {name: steps_of(self._study, counts[name], site.settings.declared_size) for name, site in self._sites.items()}
        self._fold = fold
        if self._make_workers is not None:
            self._workers = self._make_workers(self._task, self._study, patients, block_size=self._block_size, stacked=self._stacked)
        if not self._ready():
            self._trainer = make_trainer(self._task, self._study, patients, block_size=self._block_size, stacked=self._stacked, device=self._device)

    def _ready(self) -> bool:
        return self._workers is not None and self._workers.ready()

    def _here(self, task: TrainTask, received: Parameters, blocks: deque[list[str]], deadline: float) -> Iterator[Answered]:
        """Train here where there are no workers, or until all have started: that takes them seconds."""
        digest = arrays_digest(received)
        while blocks and time.monotonic() < deadline:
            if self._trainer is None or self._ready():
                self._trainer = None
                return
            names = blocks.popleft()
            begun, refused = self._begin(task, digest, names)
            try:
                outcome = self._trainer.train(task.round, task.fold, [self._numbers[name] for name in begun], received)
            except Exception as error:  # of one site's patients: alone, only that site fails
                logger.debug("%s", type(error).__name__, exc_info=True)
                yield names
            else:
                yield self._end(begun, refused, outcome, received)

    def _in_workers(self, task: TrainTask, received: Parameters, blocks: deque[list[str]], deadline: float) -> Iterator[Answered]:
        """Every worker holds up to two blocks, so that it trains one while another is begun or read here."""
        if self._workers is None or self._trainer is not None:
            return
        workers = self._workers
        digest, free = arrays_digest(received), deque(workers.slots)
        workers.receive(received)
        under_way: dict[Slot, tuple[dict[str, BegunRound], dict[str, Refused]]] = {}
        while blocks or under_way:
            while blocks and free and time.monotonic() < deadline:
                slot, (begun, refused) = free.popleft(), self._begin(task, digest, blocks.popleft())
                under_way[slot] = (begun, refused)
                workers.submit(slot, task.round, task.fold, [self._numbers[name] for name in begun])
            if not under_way or time.monotonic() >= deadline:
                return
            slot, outcome = workers.wait()
            begun, refused = under_way.pop(slot)
            yield self._end(begun, refused, outcome, received) if outcome is not None else [*begun, *refused]
            free.append(slot)  # only now: its arrays were read

    def _begin(self, task: TrainTask, digest: str, names: list[str]) -> tuple[dict[str, BegunRound], dict[str, Refused]]:
        """Who agrees, and is charged, and who refuses."""
        begun: dict[str, BegunRound] = {}
        refused: dict[str, Refused] = {}
        with self._journal_held():
            for name in names:
                try:
                    begun[name] = self._sites[name].begin_round(task, digest)
                except WardroundError as error:
                    code, reason = describe_exception(error)
                    refused[name] = Refused(name=name, code=code, reason=reason[:MAX_REASON])
        return begun, refused

    def _end(self, begun: Mapping[str, BegunRound], refused: Mapping[str, Refused], outcome: Outcome, received: Parameters) -> Block:
        """What the coordinator is told: the charges are lowered to the steps taken first."""
        with self._journal_held():
            trained = [
                self._sites[name].end_round(round_, steps=steps, update=digest)
                for (name, round_), steps, digest in zip(begun.items(), outcome.steps.tolist(), outcome.digests, strict=True)
            ]
        sums = [{name: value[row] for name, value in outcome.sums.items()} or None for row in range(len(begun))]
        replies: list[Trained | Refused] = [*trained, *refused.values()]
        return Block(
            node_ids=tuple(FIRST_SITE_NODE_ID + self._numbers[name] for name in (*begun, *refused)), replies=tuple(replies),
            shapes={name: value.shape for name, value in received.items()}, updates=outcome.updates, statistics=(*sums, *(None for _ in refused)),
        )  # fmt: skip

    def _journal_held(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the charges of many sites are written together."""
        journal = next(iter(self._sites.values())).settings.journal
        return contextlib.nullcontext() if journal is None else journal.held()
