"""A submitted study as it goes on: what its run folder newly says, as events. Only files are read, and no torch is needed."""

import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from server.status import Failure, StudySite, StudyState, told_reason
from shared.config import Settings
from shared.errors import DeadlineMissedError, WardroundError
from shared.files import storage_errors
from shared.kit import STATE
from shared.results import Interval, MetricValues, Record, RoundRecord
from shared.study import Study
from shared.supervision import read_instance
from wardround.deployed_runs import FINISHED, LOG, ROUNDS, DeployedRun, complete_lines, parse_round

POLL_SECONDS = 0.3
OWN_ENDING = "server.deployed_run"  # logs as an error what the end says anyway


class StateChanged(Record):
    """How far the study is, at the beginning and whenever it changes, but for its end."""

    event: Literal["state"] = "state"
    run: str
    state: StudyState


class RoundDone(Record):
    """A complete round, once the model that it made was evaluated: with the next round's message, or at the end.

    Attributes:
        value: the primary metric over all sites; None where no statistics came.
        epsilon: the most that a site has spent on this study so far.
        seconds: of all rounds so far.
    """

    event: Literal["round"] = "round"
    run: str
    round: int
    rounds: int
    fold: int
    folds: int
    usable: int
    asked: int
    metric: str | None = None
    value: float | None = None
    ci95: Interval = None
    epsilon: float | None = None
    epsilon_asked: float | None = None
    seconds: float
    sites: tuple[StudySite, ...]


class Noted(Record):
    """What the study's process wrote into its log: who is waited for, who refused, what went wrong."""

    event: Literal["note"] = "note"
    run: str
    level: str
    text: str


class CoordinatorSeen(Record):
    """Whether a coordinator serves the kit: without one nothing goes on."""

    event: Literal["coordinator"] = "coordinator"
    running: bool


class StudyEnded(Record):
    """The end. `metrics` are the final model's over all sites, `epsilon` what each site has spent; a stopped or failed study may have neither."""

    event: Literal["end"] = "end"
    run: str
    state: StudyState
    error: Failure | None = None
    exit_code: int
    rounds_completed: int
    metric: str | None = None
    value: float | None = None
    ci95: Interval = None
    metrics: MetricValues = Field(default_factory=dict)
    epsilon: dict[str, float] = Field(default_factory=dict)


Event = StateChanged | RoundDone | Noted | CoordinatorSeen | StudyEnded


class _LogLine(Settings):
    """A line of log.jsonl."""

    time: str
    level: str
    logger: str
    message: str = Field(max_length=100_000)

    def is_before(self, moment: datetime | None) -> bool:
        """Whether it was written before `moment`; never where either time is unknown."""
        try:
            return moment is not None and datetime.fromisoformat(self.time) < moment
        except (ValueError, TypeError):  # no time, or none with a zone
            return False


def exit_code_of(state: StudyState, error: Failure | None) -> int:
    """The exit code that a study's outcome stands for: 0 completed, else the first digit of the error's code, or 1.

    >>> exit_code_of("failed", Failure(code="E800", what="too few sites"))
    8
    """
    if state == "completed":
        return 0
    return max(1, int(error.code[1])) if error is not None and error.code[1:2].isdigit() else 1


class RunWatch:
    """What is new in a run's folder, call by call. A resumed run may take back its last round; the round is told again when it is done again."""

    def __init__(self, run: DeployedRun) -> None:
        self._path = run.path
        self._study: Study = run.study
        self._state: StudyState | None = None
        self._seconds: list[float] = []  # of the rounds told or pending
        self._pending: RoundRecord | None = None  # not yet evaluated
        self._log_offset = 0

    def poll(self) -> list[Event]:
        """The events since the last call; with `StudyEnded` as the last of all, once.

        Raises:
            StorageError: a file of the run is damaged or gone.
        """
        if self._state in FINISHED:
            return []
        run = DeployedRun.read(self._path)  # before the rest: when it says that the study has ended, the rest is complete
        changed = run.state != self._state
        self._state = run.state
        ended = run.state in FINISHED
        events: list[Event] = [StateChanged(run=run.name, state=run.state)] if changed and not ended else []
        return [*events, *self._notes(run.submission.resumed), *self._rounds(), *(self._end(run) if ended else ())]

    def _notes(self, resumed: datetime | None) -> list[Event]:
        lines, self._log_offset = _new_lines(self._path / LOG, self._log_offset)
        found = []
        for line in lines:
            try:
                entry = _LogLine.model_validate_json(line)
            except ValidationError:  # a line torn by a kill, to which the next was appended
                continue
            if not (entry.logger == OWN_ENDING and entry.level == "error") and not entry.is_before(resumed):
                found.append(Noted(run=self._path.name, level=entry.level, text=entry.message))
        return list(found)

    def _rounds(self) -> list[Event]:
        with storage_errors(self._path, "read", remedy="check its permissions"):
            path = self._path / ROUNDS
            lines = complete_lines(path.read_bytes()) if path.exists() else []
        if len(lines) < len(self._seconds):  # taken back to the last checkpoint
            del self._seconds[len(lines) :]
            self._pending = None
        events: list[Event] = []
        for line in lines[len(self._seconds) :]:
            record = parse_round(line, self._path)
            if self._pending is not None:
                same_fold = record.fold == self._pending.fold
                events.append(self._done(self._pending, record.metrics if same_fold else {}, record.metrics_ci95 if same_fold else {}))
            self._pending = record
            self._seconds.append(record.seconds)
        return events

    def _end(self, run: DeployedRun) -> list[Event]:
        result, error = run.result(), run.submission.error
        metrics = {} if result is None else result.metrics.get("federated", {})
        intervals = {} if result is None else result.metrics_ci95.get("federated", {})
        metric = None if result is None else result.primary_metric
        events: list[Event] = []
        if self._pending is not None:
            of_fold = result.folds[self._pending.fold - 1] if result is not None and len(result.folds) >= self._pending.fold else None
            events.append(
                self._done(self._pending, metrics, intervals, metric) if of_fold is None else self._done(self._pending, of_fold, {}, metric)
            )
            self._pending = None
        value = metrics.get(metric) if metric is not None else None
        end = StudyEnded(
            run=run.name, state=run.state, error=error, exit_code=exit_code_of(run.state, error), rounds_completed=len(self._seconds),
            metric=metric, value=value, ci95=None if value is None or metric is None else intervals.get(metric), metrics=metrics,
            epsilon={} if result is None else {name: site.epsilon for name, site in sorted(result.privacy.sites.items())},
        )  # fmt: skip
        return [*events, end]

    def _done(self, record: RoundRecord, metrics: MetricValues, intervals: dict[str, Interval], metric: str | None = None) -> RoundDone:
        name = metric if metric in metrics else next(iter(metrics), None)  # a round's record carries the primary metric and no other
        spent = [site.epsilon for site in record.sites if site.epsilon is not None]
        asked = [site for site in record.sites if site.status != "not asked"]
        return RoundDone(
            run=self._path.name, round=record.round, rounds=self._study.rounds.count, fold=record.fold, folds=self._study.evaluation.folds,
            usable=sum(site.status == "ok" for site in asked), asked=len(asked), metric=name, value=None if name is None else metrics[name],
            ci95=None if name is None else intervals.get(name), epsilon=max(spent, default=None),
            epsilon_asked=self._study.privacy.epsilon if self._study.private else None, seconds=math.fsum(self._seconds), sites=tuple(
                StudySite(name=site.name, status=site.status, reason=told_reason(site, folds=self._study.evaluation.folds), epsilon=site.epsilon)
                for site in record.sites
            ),
        )  # fmt: skip


def watch(
    kit: Path,
    run: DeployedRun,
    *,
    timeout_seconds: float | None = None,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """The events of a run until it has ended; those that lie back come at once.

    Raises:
        DeadlineMissedError: it has not ended within `timeout_seconds`; it goes on all the same.
        StorageError: a file of the run is damaged or gone.
    """
    deadline = math.inf if timeout_seconds is None else clock() + timeout_seconds
    watcher = RunWatch(run)
    running: bool | None = None
    while True:
        events = watcher.poll()
        yield from events
        if events and isinstance(events[-1], StudyEnded):
            return
        found = read_instance(kit / STATE) is not None
        if found != running and not (found and running is None):  # that one runs is worth a word only after it did not
            yield CoordinatorSeen(running=found)
        running = found
        if clock() >= deadline:
            raise DeadlineMissedError(
                f"{run.name}: expected its end within {timeout_seconds:g} s, and it is still {DeployedRun.read(run.path).state}",
                f"it goes on; watch it again: wardround study watch {run.name} --coordinator {kit}",
            )
        pause(min(POLL_SECONDS, max(0.0, deadline - clock())))


def outcome_error(end: StudyEnded) -> WardroundError | None:
    """What kept the study from being completed, as the command line tells an error; None where nothing did."""
    if not end.exit_code:
        return None
    if end.error is None:
        return WardroundError(f"{end.run}: the study was {end.state}")
    error = WardroundError(end.error.what, end.error.remedy)
    error.code = end.error.code
    return error


def _new_lines(path: Path, offset: int) -> tuple[list[bytes], int]:
    """The complete lines after `offset`, and the offset after them; from the beginning where the file has become shorter."""
    with storage_errors(path, "read", remedy="check its permissions"):
        try:
            with open(path, "rb") as file:
                start = offset if offset <= file.seek(0, 2) else 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return [], 0
    return complete_lines(content), start + content.rfind(b"\n") + 1
