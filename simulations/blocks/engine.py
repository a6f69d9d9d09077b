"""The in-process engine for many sites: a round's training in blocks of sites, everything else one site after another.

A block is begun (every site agrees and is charged), trained, and ended (charges lowered to the steps taken), and its replies go to the
coordinator in one piece. Under secure aggregation every site of a block then masks its own update, and its reply is a message as in a deployment.
Which sites share a block depends on the sites, the study and the block's size alone, not on the number of processes.
"""

import contextlib
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from client.app import refusal
from client.local_work import request_with_share
from client.site import BegunRound, Site
from server.blocks import Block
from shared.distributed_noise import POINTS
from shared.errors import WardroundError, describe_exception
from shared.messages import MAX_REASON, Content, Refused, Statistics, Trained, TrainTask, decode, decode_parameters, encode
from shared.models import Parameters, arrays_digest
from shared.secure_sum.messages import SecureTrainTask
from shared.study import Study
from shared.task import Task
from simulations.blocks.patients import Patients
from simulations.blocks.trainer import BlockTrainer, Job, Outcome, make_trainer
from simulations.blocks.training import named, steps_of
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

    def submit(self, slot: Slot, job: Job) -> None:
        """Have this block trained."""

    def wait(self) -> tuple[Slot, Outcome | None]:
        """A block that is done, or None where it could not be trained."""

    def close(self) -> None:
        """End them."""


class MakeWorkers(Protocol):
    """Starts workers for the patients of one fold."""

    def __call__(self, task: Task, study: Study, patients: Patients, *, block_size: int, stacked: bool) -> Workers:
        """The workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the sites of a round are asked: all the same, but for what is their own in a secure sum, or is told to them alone.

    Attributes:
        task: of one of them, for what is the same in all.
        tasks, messages: by site.
        secure: by site, where updates leave under masks.
        digest: of what was received, with a share of noise of this standard deviation where there is one.
    """

    task: TrainTask
    tasks: Mapping[str, TrainTask]
    received: Parameters
    messages: Mapping[str, Message]
    secure: Mapping[str, SecureTrainTask]
    digest: Callable[[float | None], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """The sites of a block that agreed, and are charged, those that refused, and the share of noise that each of the first will add."""

    rounds: Mapping[str, BegunRound]
    refused: Mapping[str, Refused]
    share_std: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A block that was trained and paid for; `trained` is in the order of the outcome's rows, which are read before anything else is trained."""

    trained: list[Trained]
    refused: Mapping[str, Refused]
    outcome: Outcome

    def statistics(self, row: int) -> Statistics | None:
        """Of the site in this row."""
        return {name: value[row] for name, value in self.outcome.sums.items()} or None


Answered = _Ended | list[str]  # a block; or, where its sites could not be trained at once, who they are


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
        asked = self._asked(waiting)
        self._make_trainers(asked.task.fold)
        names = sorted(asked.messages, key=lambda name: (-self._steps[name], name))
        blocks = deque(names[start : start + self._block_size] for start in range(0, len(names), self._block_size))
        for block in itertools.chain(self._here(asked, blocks, deadline), self._in_workers(asked, blocks, deadline)):
            if isinstance(block, _Ended):
                for reply in self._masked(asked, block) if asked.secure else [self._in_one_piece(asked, block)]:
                    yield from [reply] if time.monotonic() < deadline else []
                continue
            logger.warning("a block of %d sites could not be trained at once; they are trained one after another", len(block))
            alone = [asked.messages[name] for name in block]
            yield from self.send_and_receive(alone, timeout=None if timeout is None else deadline - time.monotonic())

    def _asked(self, messages: list[Message]) -> _Asked:
        """What these messages ask; they share one record of parameters."""
        by_name = {self._names[message.metadata.dst_node_id]: message for message in messages}
        contents: dict[str, Content] = {name: decode(message.content, TrainTask, SecureTrainTask) for name, message in by_name.items()}
        secure = {name: content for name, content in contents.items() if isinstance(content, SecureTrainTask)}
        told = {name: content.train if isinstance(content, SecureTrainTask) else content for name, content in contents.items()}
        tasks = {name: content for name, content in told.items() if isinstance(content, TrainTask)}
        assert len(tasks) == len(messages) and len(secure) in (0, len(messages))
        received = decode_parameters(messages[0].content, self._sites[next(iter(by_name))].template)
        digest = functools.cache(lambda share_std: arrays_digest(received if share_std is None else request_with_share(received, share_std)))
        return _Asked(task=next(iter(tasks.values())), tasks=tasks, received=received, messages=by_name, secure=secure, digest=digest)

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

    def _here(self, asked: _Asked, blocks: deque[list[str]], deadline: float) -> Iterator[Answered]:
        """Train here where there are no workers, or until all have started: that takes them seconds."""
        while blocks and time.monotonic() < deadline:
            if self._trainer is None or self._ready():
                self._trainer = None
                return
            names = blocks.popleft()
            begun = self._begin(asked, names)
            try:
                outcome = self._trainer.train(self._job(asked, begun), asked.received)
            except Exception as error:  # of one site's patients: alone, only that site fails
                logger.debug("%s", type(error).__name__, exc_info=True)
                yield names
            else:
                yield self._end(begun, outcome)

    def _in_workers(self, asked: _Asked, blocks: deque[list[str]], deadline: float) -> Iterator[Answered]:
        """Every worker holds up to two blocks, so that it trains one while another is begun or read here."""
        if self._workers is None or self._trainer is not None:
            return
        workers = self._workers
        free = deque(workers.slots)
        workers.receive(asked.received)
        under_way: dict[Slot, _Begun] = {}
        while blocks or under_way:
            while blocks and free and time.monotonic() < deadline:
                slot, begun = free.popleft(), self._begin(asked, blocks.popleft())
                under_way[slot] = begun
                workers.submit(slot, self._job(asked, begun))
            if not under_way or time.monotonic() >= deadline:
                return
            slot, outcome = workers.wait()
            begun = under_way.pop(slot)
            yield self._end(begun, outcome) if outcome is not None else [*begun.rounds, *begun.refused]
            free.append(slot)  # only now: its arrays were read

    def _begin(self, asked: _Asked, names: list[str]) -> _Begun:
        """Who agrees, and is charged, and who refuses."""
        begun: dict[str, BegunRound] = {}
        refused: dict[str, Refused] = {}
        shares = set[float | None]()
        with self._journal_held():
            for name in names:
                site = self._sites[name]
                try:
                    share_std = site.check_sum(asked.secure[name]) if asked.secure else None
                    begun[name] = site.begin_round(asked.tasks[name], asked.digest(share_std))
                    shares.add(share_std)
                except WardroundError as error:
                    code, reason = describe_exception(error)
                    refused[name] = Refused(name=name, code=code, reason=reason[:MAX_REASON])
        assert len(shares) <= 1, "the sites of a sum share one setting"
        return _Begun(rounds=begun, refused=refused, share_std=next(iter(shares), None))

    def _job(self, asked: _Asked, begun: _Begun) -> Job:
        sites = tuple(self._numbers[name] for name in begun.rounds)
        return Job(round_number=asked.task.round, fold=asked.task.fold, sites=sites, share_std=begun.share_std)

    def _end(self, begun: _Begun, outcome: Outcome) -> _Ended:
        """The charges are lowered to the steps taken, before anything is told."""
        with self._journal_held():
            trained = [
                self._sites[name].end_round(round_, steps=steps, update=digest)
                for (name, round_), steps, digest in zip(begun.rounds.items(), outcome.steps.tolist(), outcome.digests, strict=True)
            ]
        return _Ended(trained=trained, refused=begun.refused, outcome=outcome)

    def _in_one_piece(self, asked: _Asked, ended: _Ended) -> Block:
        """What the coordinator is told of updates in the clear."""
        replies: list[Trained | Refused] = [*ended.trained, *ended.refused.values()]
        statistics = [ended.statistics(row) for row in range(len(ended.trained))]
        return Block(
            node_ids=tuple(FIRST_SITE_NODE_ID + self._numbers[reply.name] for reply in replies), replies=tuple(replies),
            shapes={name: value.shape for name, value in asked.received.items()}, updates=ended.outcome.updates,
            statistics=(*statistics, *(None for _ in ended.refused)),
        )  # fmt: skip

    def _masked(self, asked: _Asked, ended: _Ended) -> Iterator[Message]:
        """What each site tells of its update, which it masks itself; as `client.app` answers."""
        for row, trained in enumerate(ended.trained):
            update, name = ended.outcome.updates[row], trained.name
            arrays = {POINTS: update} if self._study.distributed_noise else named(update, asked.received)
            try:
                secured, payload = self._sites[name].mask(asked.secure[name], trained, arrays, model=asked.digest(None))
                content = encode(secured, masked=payload, statistics=ended.statistics(row))
            except Exception as error:  # the border of the site: nothing of an exception may pass it but a code
                content = refusal(name, error)
            yield self._reply(asked.messages[name], content)
        for name, told in ended.refused.items():
            yield self._reply(asked.messages[name], encode(told))

    def _reply(self, message: Message, content: RecordDict) -> Message:
        self._post(message)
        return Message(content, reply_to=message)

    def _journal_held(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the charges of many sites are written together."""
        journal = next(iter(self._sites.values())).settings.journal
        return contextlib.nullcontext() if journal is None else journal.held()
