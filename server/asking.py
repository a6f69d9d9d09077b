"""The questions of a run's rounds, whatever their order, and what is believed of the answers."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.blocks import Block, BlockGrid
from server.enrolment import Enrolment
from server.evaluation import check_statistics, planned_noise_std
from server.own_words import tell
from server.quorum import LATE, hold_quorum, hold_rule, reasons_of
from server.run_folder import RunFolder
from server.strategies.answers import Answer
from server.strategies.strategy import FederatedStrategy
from shared.errors import ProtocolError
from shared.messages import MAX_REASON, PARAMETERS, EvaluateTask, NotCounted, TrainTask
from shared.results import RoundRecord
from shared.study import Study
from shared.task import Task

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # with on_missing = "wait": how often a missing site is asked again before the deadline


@dataclass(slots=True, kw_only=True)
class Asking:
    """Asks the sites of one run.

    Attributes:
        not_counted: by site, where the last update that was asked for did not count.
    """

    study: Study
    task: Task
    folder: RunFolder
    strategy: FederatedStrategy
    enrolment: Enrolment
    not_counted: dict[str, NotCounted] = field(default_factory=dict)
    _noise: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._noise = planned_noise_std(self.study, self.task)

    def train_task(self, fold: int, number: int) -> TrainTask:
        """To train in this round."""
        return TrainTask(run=self.folder.name, study_hash=self.study.fingerprint(), round=number, fold=fold, heads=self.enrolment.heads())

    def evaluate_task(self, fold: int) -> EvaluateTask:
        """To evaluate the model of this fold."""
        number = self.study.rounds.count
        return EvaluateTask(run=self.folder.name, study_hash=self.study.fingerprint(), round=number, fold=fold, heads=self.enrolment.heads())

    def addressed(self, messages: list[Message]) -> list[Message]:
        """These messages; a site whose last update did not count is told so in its own."""
        return tell(messages, {self.enrolment.nodes[name]: told for name, told in self.not_counted.items() if name in self.enrolment.nodes})

    def note_not_counted(self, record: RoundRecord) -> None:
        """Which sites' last updates did not count by the coordinator's own judgement, from the rounds on disk alone: a resumed run asks alike."""
        for site in record.sites:
            if site.status in ("failed", "missing") and site.reason is not None:
                self.not_counted[site.name] = NotCounted(fold=record.fold, round=record.round, reason=site.reason[:MAX_REASON])
            elif site.status not in ("not asked", "at work"):
                self.not_counted.pop(site.name, None)

    def collect(self, grid: Grid, messages: list[Message]) -> dict[str, Answer]:
        """The answers of all asked sites; those without one are "missing". With on_missing = "wait" they are asked again until the deadline."""
        assert self.strategy.round is not None
        current = self.strategy.round
        deadline = time.monotonic() + self.study.rounds.deadline_seconds
        attempts = MAX_ATTEMPTS if self.study.rounds.on_missing == "wait" else 1
        for _ in range(attempts):
            answered = {current.asked[name].node_id for name, answer in current.answers.items() if answer.status != "failed"}
            unanswered = [message for message in messages if message.metadata.dst_node_id not in answered]
            remaining = deadline - time.monotonic()
            if not unanswered or remaining <= 0:
                break
            for name in [name for name, answer in current.answers.items() if answer.status == "failed"]:
                del current.answers[name]
            self.strategy.take_replies(in_blocks(grid)(unanswered, timeout=remaining))
        late = Answer(name="", status="missing", reason=LATE)
        return {name: self.believed(name, current.answers.get(name, late)) for name in current.asked}

    def believed(self, name: str, answer: Answer) -> Answer:
        """The answer, without its statistics where they could not be those of the patients that this site declared."""
        if answer.statistics is None:
            return answer
        try:
            check_statistics(self.task, answer.statistics, declared=self.enrolment.declared_num_test(name), noise=self._noise)
        except ProtocolError as error:
            logger.warning("site %s: %s %s; left out of the metrics", name, error.code, error.what)
            return replace(answer, statistics=None, reason=f"{error.code} {error.what}")
        return answer

    def hold_round(self, number: int, answers: dict[str, Answer]) -> None:
        """Return where the round counts.

        Raises:
            the error of the sites' own refusals where all refused alike, else QuorumLostError: too few answers are usable.
        """
        num_usable = sum(answer.status == "ok" for answer in answers.values())
        hold_quorum(self.study, num_usable, reasons_of(answers), what=f"round {number}")
        hold_rule(self.study, num_usable, what=f"round {number}")


def arrays_of(record: RecordDict) -> ArrayRecord:
    """The parameters of a task."""
    arrays = record[PARAMETERS]
    assert isinstance(arrays, ArrayRecord)
    return arrays


def in_blocks(grid: Grid) -> Callable[..., Iterable[Message | Block]]:
    """How many sites are asked at once."""
    return grid.send_in_blocks if isinstance(grid, BlockGrid) else grid.send_and_receive
