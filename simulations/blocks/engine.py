"""The in-process engine for many sites at once: a round's training in blocks of sites, everything else one site after another.

A block is begun (every site agrees and is charged), trained, and ended (charges lowered to the steps taken), and its replies go to the
coordinator in one piece. Which sites share a block depends on the sites, the study and the block's size alone.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.local_training import LocalRound
from client.releases import arrays_digest
from client.sampling import PatientIndex
from client.site import BegunRound, Site, predictions_of
from server.blocks import Block
from shared.cohort import Cohort
from shared.errors import WardroundError, describe_exception
from shared.messages import MAX_REASON, Refused, Statistics, Trained, TrainTask, decode, decode_parameters
from shared.models import Parameters, set_parameters
from shared.study import Study
from shared.task import Task
from simulations.blocks.stacked import StackedModel
from simulations.blocks.training import Records, SiteWork, flat_updates, steps_of, train_block
from simulations.in_process import FIRST_SITE_NODE_ID, InProcessGrid

logger = logging.getLogger(__name__)


class FoldData:
    """All sites' patients of one fold, their records one after another."""

    def __init__(self, sites: Mapping[str, Site], study: Study, fold: int) -> None:
        self.training, self.test = {}, {}
        for name, site in sites.items():
            self.training[name], self.test[name] = site.parts(study, fold)
        self.indices = {name: PatientIndex(part) for name, part in self.training.items()}
        self.records = Records(
            inputs=_joined(self.training.values()), labels=torch.from_numpy(np.concatenate([p.labels for p in self.training.values()]))
        )
        starts = np.cumsum([0, *[part.num_records for part in self.training.values()]])
        declared = {name: site.settings.declared_size for name, site in sites.items()}
        self.steps = {name: steps_of(study, part.num_records, declared[name]) for name, part in self.training.items()}
        self.starts = {name: int(start) for name, start in zip(self.training, starts, strict=False)}


def _joined(cohorts: Iterable[Cohort]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*(cohort.inputs for cohort in cohorts), strict=True))


class BlockEngine(InProcessGrid):
    """Carries messages as `InProcessGrid` does, and trains the sites of a round in blocks.

    Args:
        sites: virtual ones, all with seeded noise or none.
        block_size: sites that are trained at once, at most.
    """

    def __init__(self, client_app: ClientApp, sites: Mapping[str, Site], task: Task, study: Study, *, block_size: int) -> None:
        super().__init__(client_app, sites)
        self._names = dict(enumerate(sites, start=FIRST_SITE_NODE_ID))
        self._sites = sites
        self._task = task
        self._study = study
        self._model = task.model()
        self._stacked = StackedModel(self._model, min(block_size, len(sites)))
        self._fold: tuple[int, FoldData] | None = None

    def send_in_blocks(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message | Block]:
        """The replies to these messages; training comes in blocks. After `timeout` seconds no further block is begun."""
        waiting = list(messages)
        if not waiting or waiting[0].metadata.message_type != MessageType.TRAIN:
            yield from self.send_and_receive(waiting, timeout=timeout)
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        task = decode(waiting[0].content, TrainTask)  # all of a round share one record
        data = self._data_of(task.fold)
        names = sorted((self._names[message.metadata.dst_node_id] for message in waiting), key=lambda name: (-data.steps[name], name))
        received = decode_parameters(waiting[0].content, self._sites[names[0]].template)
        size = len(self._stacked.flat)
        for start in range(0, len(names), size):
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield self._answer_block(task, received, names[start : start + size], data)

    def _data_of(self, fold: int) -> FoldData:
        if self._fold is None or self._fold[0] != fold:
            self._fold = (fold, FoldData(self._sites, self._study, fold))
        return self._fold[1]

    def _answer_block(self, task: TrainTask, received: Parameters, names: list[str], data: FoldData) -> Block:
        begun: dict[str, BegunRound] = {}
        refused: dict[str, Refused] = {}
        digest = arrays_digest(received)
        with self._journal_held():
            for name in names:
                try:
                    begun[name] = self._sites[name].begin_round(task, digest)
                except WardroundError as error:
                    code, reason = describe_exception(error)
                    refused[name] = Refused(name=name, code=code, reason=reason[:MAX_REASON])
        statistics = self._evaluate(received, list(begun), data)
        works = [
            SiteWork(
                name=name, plan=round_.admission.plan, part=data.training[name], index=data.indices[name], start=data.starts[name], key=round_.key
            )
            for name, round_ in begun.items()
        ]  # fmt: skip
        local = LocalRound(study=self._study, task=self._task, round_number=task.round)
        steps = train_block(self._stacked, received, works, data.records, local)
        updates = flat_updates(self._stacked, received, len(works))
        with self._journal_held():
            ended = {
                name: self._sites[name].end_round(round_, _named(row, received), steps=int(taken))
                for (name, round_), row, taken in zip(begun.items(), updates, steps, strict=True)
            }
        return self._block([*begun, *refused], {**ended, **refused}, received, updates, statistics)

    def _journal_held(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the charges of many sites are written together."""
        journal = next(iter(self._sites.values())).settings.journal
        return contextlib.nullcontext() if journal is None else journal.held()

    def _block(
        self, names: list[str], replies: Mapping[str, Trained | Refused], received: Parameters, updates: NDArray[np.floating],
        statistics: Mapping[str, Statistics],
    ) -> Block:  # fmt: skip
        nodes = {name: node for node, name in self._names.items()}
        return Block(
            node_ids=tuple(nodes[name] for name in names), replies=tuple(replies[name] for name in names),
            shapes={name: value.shape for name, value in received.items()}, updates=updates,
            statistics=tuple(statistics.get(name) for name in names),
        )  # fmt: skip

    def _evaluate(self, received: Parameters, names: list[str], data: FoldData) -> dict[str, Statistics]:
        """Every site's statistics of the parameters received: one pass over the test records of all of them."""
        if self._study.noised_statistics:
            return {}
        parts = {name: data.test[name] for name in names}
        shapes = {metric.statistic.name: metric.statistic for metric in self._task.metrics}
        tested = [part for part in parts.values() if part.num_records]
        predictions = np.empty(0)
        if tested:
            set_parameters(self._model, received)
            predictions = predictions_of(self._task, self._model, _together(tested))
        statistics, start = {}, 0
        for name, part in parts.items():
            own = predictions[start : start + part.num_records]
            start += part.num_records
            statistics[name] = {
                key: np.asarray(statistic.summarise(own, part), dtype=np.float64) if part.num_records else np.zeros(statistic.shape)
                for key, statistic in shapes.items()
            }
        return statistics


def _named(row: NDArray[np.floating], received: Parameters) -> Parameters:
    """A flat update as named arrays, which are views of it."""
    named, start = {}, 0
    for name, value in received.items():
        named[name] = row[start : start + value.size].reshape(value.shape)
        start += value.size
    return named


def _together(parts: list[Cohort]) -> Cohort:
    """The records of several cohorts, for a model that looks at each alone."""
    inputs = tuple(np.concatenate(arrays) for arrays in zip(*(part.inputs for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts])
    return Cohort(inputs=inputs, labels=labels, patient_of_record=np.zeros(len(labels), dtype=np.int64), patient_ids=("all",))
