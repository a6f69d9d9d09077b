"""The coordinator's run of a study: enrol, then round by round train, aggregate, evaluate, checkpoint, until the last round of the last fold.

Who takes part is `server.enrolment`'s, what is asked and believed `server.asking`'s, in which order `server.rounds`' and `server.secure_rounds`'.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from server.arrivals import ClockedGrid
from server.asking import Asking, arrays_of
from server.enrolment import Enrolment, Membership
from server.evaluation import add_statistics, count_tested, evaluate
from server.quorum import LATE, hold_quorum, reasons_of
from server.rounds import BufferedRounds, RoundOutcome, train_in_turn, train_together
from server.run_folder import Checkpoint, RunFolder
from server.secure_rounds import SecureRounds
from server.strategies.answers import Answer, config_of
from server.strategies.dp_fedavg import SiteNoise
from server.strategies.strategy import FederatedStrategy
from server.witness import Witness
from shared.messages import Enrolled, Statistics, encode, from_array_record, to_array_record
from shared.models import Parameters, initial_parameters
from shared.personal import personal_names
from shared.results import RoundRecord, SitePrivacy, SiteRound
from shared.schedule import learning_rate_at
from shared.site_level import plan_site_level
from shared.strategy_options import Cyclic, FedBuff
from shared.study import Study
from shared.task import Task, architecture_hash

logger = logging.getLogger(__name__)

START = "start"  # the model that a run starts with, where it is not the seed's


def model_header(study: Study, task: Task) -> dict[str, str]:
    """What a model's file says of itself; `personal` names what stays at the sites, and is in the file as it was before training."""
    model = task.model()
    header = {"study": study.name, "study_hash": study.fingerprint(), "task": task.name, "architecture": architecture_hash(model)}
    personal = personal_names(study.strategy, model)
    return {**header, **({"personal": "\n".join(sorted(personal))} if personal else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """The final model of a fold and what the sites' test patients say of it."""

    fold: int
    parameters: Parameters
    statistics: dict[str, Statistics]  # by site


@dataclass(slots=True, kw_only=True)
class History:
    """What a run has come to."""

    enrolled: dict[str, Enrolled] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    privacy: dict[str, SitePrivacy] = field(default_factory=dict)
    folds: list[FoldResult] = field(default_factory=list)


class Coordinator:
    """Runs one study over whatever grid carries its messages, into a run's folder.

    Args:
        observe: called with every round's record as soon as it is on disk.
        witness: remembers the sites' ledgers from run to run; None where the sites are virtual.
        membership: of a deployment: enrolment then waits for its sites, up to the deadline, and one that comes later joins at the next round.
    """

    def __init__(
        self,
        study: Study,
        task: Task,
        folder: RunFolder,
        *,
        observe: Callable[[RoundRecord], None] = lambda record: None,
        witness: Witness | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._enrolment = Enrolment(study, task, run=folder.name, witness=witness, membership=membership)
        self._study = study
        self._task = task
        self._folder = folder
        self._observe = observe
        model = task.model()
        self._architecture = architecture_hash(model)
        trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.site_level = plan_site_level(study)
        self._strategy = FederatedStrategy(
            study.strategy, seed=study.seed, trainable=trainable, statistics=task.statistics, noised_statistics=study.noised_statistics,
            personal=personal_names(study.strategy, model), local_steps=study.training.local_steps,
            learning_rate=lambda number: learning_rate_at(study.training, number, study.rounds.count), site_noise=self._site_noise(trainable),
        )  # fmt: skip
        self._epsilons: dict[str, float] = {}  # by site, as last told
        self._asking = Asking(study=study, task=task, folder=folder, strategy=self._strategy, enrolment=self._enrolment)
        self._buffered = BufferedRounds(self._asking)
        self._secure = None if study.secure_aggregation is None else SecureRounds(self._asking)
        self.history = History(enrolled=self._enrolment.enrolled, refused=self._enrolment.refused)

    def _site_noise(self, trainable: frozenset[str]) -> SiteNoise | None:
        """Seeded in a simulation alone: where hospitals are real, by a witness or by membership, its key is the operating system's, whatever a study says.

        Frozen parameters and buffers, which no site moves but in a task's `refine`, are left as they are, without noise.
        """
        plan, study = self.site_level, self._study
        if plan is None:
            return None
        released = trainable if self._task.refine is None else frozenset(self._task.model().state_dict())
        return SiteNoise(
            max_norm=plan.max_norm, noise_multiplier=plan.noise_multiplier, released=released,
            seed=study.seed if not self._enrolment.real and study.privacy.noise_source == "seeded" else None,
        )  # fmt: skip

    def run(self, grid: Grid) -> History:
        """The whole study, from the last checkpoint in the run's folder where there is one.

        Raises:
            QuorumLostError, BudgetExhaustedError, PolicyRefusedError, DataError: too few sites can or will take part.
            StorageError: the run's folder cannot be written.
        """
        self._enrolment.begin(grid)
        self._strategy.set_members(self._enrolment.members())
        start = self._resume()
        self._reopen_folds(grid, start.fold)
        for record in self._folder.rounds():
            self._epsilons |= {site.name: site.epsilon for site in record.sites if site.epsilon is not None}
            self._asking.note_not_counted(record)
        first, waiting = start.fold, [start]
        del start  # it is as large as the model: what runs the fold lets go of it
        for fold in range(first, self._study.evaluation.folds + 1):
            self._run_fold(grid, waiting.pop() if waiting else self._first_checkpoint(fold))
        return self.history

    def _first_checkpoint(self, fold: int) -> Checkpoint:
        return Checkpoint(fold=fold, round_number=0, parameters=self.first_parameters(), state={})

    def first_parameters(self) -> Parameters:
        """What the first round sends: from the study's seed, or what `server.warm_start` put into the run's folder."""
        if self._folder.start.started_from is not None:
            return self._folder.read_model(START, self._architecture)
        return initial_parameters(self._task.model(), self._study.seed)

    def _resume(self) -> Checkpoint:
        checkpoint = self._folder.read_checkpoint()
        if checkpoint is None:
            self._folder.keep_rounds([])
            return self._first_checkpoint(1)
        done = [record for record in self._folder.rounds() if (record.fold, record.round) <= (checkpoint.fold, checkpoint.round_number)]
        self._folder.keep_rounds(done)
        return checkpoint

    def _reopen_folds(self, grid: Grid, before: int) -> None:
        """The folds that an earlier, interrupted execution finished: their models are read back and evaluated again."""
        for fold in range(1, before):
            self._strategy.fold = fold
            parameters = self._folder.read_model(f"fold-{fold}", self._architecture)
            self.history.folds.append(FoldResult(fold=fold, parameters=parameters, statistics=self._close_fold(grid, fold, parameters)))

    def _run_fold(self, grid: Grid, start: Checkpoint) -> None:
        fold, first, arrays = start.fold, start.round_number + 1, to_array_record(start.parameters)
        self._strategy.fold = fold
        self._strategy.state = self._buffered.take(start.state, start.parameters)
        del start
        for number in range(first, self._study.rounds.count + 1):
            arrays = self._run_round(grid, fold, number, arrays)
        parameters = from_array_record(arrays)
        name = "final" if self._study.evaluation.folds == 1 else f"fold-{fold}"
        self._folder.write_model(name, parameters, model_header(self._study, self._task))
        statistics = self._close_fold(grid, fold, parameters)
        self.history.folds.append(FoldResult(fold=fold, parameters=parameters, statistics=statistics))

    def _run_round(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> ArrayRecord:
        if self._enrolment.welcome(grid):
            self._strategy.set_members(self._enrolment.members())
        started, clock = time.monotonic(), _clock_of(grid)
        answers, updated = self._train(grid, fold, number, arrays)
        self._take_privacy(answers)
        line = self._round_record(fold, number, answers, time.monotonic() - started)
        if clock is not None:
            line = line.model_copy(update={"virtual_seconds": ((_clock_of(grid) or 0) - clock) / 1e9})
        self._folder.append_round(line)
        self._asking.note_not_counted(line)
        state = self._buffered.with_work(self._strategy.state, grid)
        self._folder.write_checkpoint(Checkpoint(fold=fold, round_number=number, parameters=from_array_record(updated), state=state))
        self._observe(line)
        return updated

    def _train(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> RoundOutcome:
        """One round, in the order that the study's strategy asks for."""
        if self._secure is not None:
            return self._secure.train(grid, fold, number, arrays)
        if isinstance(self._study.strategy, FedBuff):
            return self._buffered.train(grid, fold, number, arrays)
        train = train_in_turn if isinstance(self._study.strategy, Cyclic) else train_together
        return train(self._asking, grid, fold, number, arrays)

    def _take_privacy(self, answers: dict[str, Answer]) -> None:
        told = {name: answer.privacy for name, answer in answers.items() if answer.privacy is not None}
        self.history.privacy.update(told)
        self._epsilons.update({name: privacy.epsilon for name, privacy in told.items()})
        self._enrolment.remember({name: answer.ledger_head for name, answer in answers.items()})

    def _round_record(self, fold: int, number: int, answers: dict[str, Answer], seconds: float) -> RoundRecord:
        refused = {
            name: Answer(name=name, status="missing" if reason == LATE else "refused", reason=reason) for name, reason in self.history.refused.items()
        }
        everyone = {**{name: Answer(name=name, status="not asked") for name in self.history.enrolled}, **refused, **answers}
        total = add_statistics(answer.statistics for _, answer in sorted(answers.items()) if not answer.staleness)  # else of an older model
        evaluation = evaluate(
            self._task,
            total,
            resamples=self._study.evaluation.bootstrap,
            seed=self._study.seed,
            path=("round", fold, number),
            only=self._task.primary_metric,
        )
        return RoundRecord(
            round=number,
            fold=fold,
            evaluated_round=number - 1,
            sites=tuple(self._site_round(name, answer) for name, answer in sorted(everyone.items())),
            metrics=evaluation.metrics,
            metrics_ci95=evaluation.ci95,
            seconds=seconds,
            site_level_epsilon=None if self.site_level is None else self.site_level.epsilon_after((fold - 1) * self._study.rounds.count + number),
        )

    def _site_round(self, name: str, answer: Answer) -> SiteRound:
        metrics = None
        if answer.statistics is not None:
            metrics = evaluate(self._task, answer.statistics, resamples=0, seed=0, path=()).metrics
        return SiteRound(
            name=name,
            status=answer.status,
            reason=answer.reason,
            num_test=self._num_test(name, answer),
            metrics=metrics,
            epsilon=self._epsilons.get(name),
            staleness=answer.staleness,
        )

    def _num_test(self, name: str, answer: Answer) -> int | None:
        """As declared; with cross-validation each fold tests others, so what the released counts say."""
        if self._study.evaluation.folds > 1:
            return count_tested(self._task, answer.statistics or {})
        enrolled = self.history.enrolled.get(name)
        return enrolled.declared_num_test if enrolled else None

    def _close_fold(self, grid: Grid, fold: int, parameters: Parameters) -> dict[str, Statistics]:
        if isinstance(self._study.strategy, FedBuff):
            self._buffered.dismiss(grid)
        content = self._asking.evaluate_task(fold)
        record = encode(content, parameters=parameters)
        messages = self._strategy.configure_evaluate(content.round, arrays_of(record), config_of(record), grid)
        answers = self._asking.collect(grid, self._asking.addressed(messages))
        self._take_privacy(answers)
        for name, reason in sorted(reasons_of(answers).items()):
            logger.warning("closing evaluation of fold %d: %s: %s", fold, name, reason)
        if all(answer.status != "ok" for answer in answers.values()):
            hold_quorum(self._study, 0, reasons_of(answers), what=f"closing evaluation of fold {fold}")
        return {name: answer.statistics for name, answer in sorted(answers.items()) if answer.statistics is not None}


def _clock_of(grid: Grid) -> int | None:
    """Nanoseconds, where the grid has a clock of its own."""
    return grid.virtual_nanoseconds if isinstance(grid, ClockedGrid) else None
