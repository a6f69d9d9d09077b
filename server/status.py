"""What the coordinator says of itself: `/status.json`, from which its page and `wardround study list|watch|show` are drawn.

Nothing in here is a patient's: names of sites, declared sizes, states, times, metrics pooled over the sites, epsilon spent, and the coordinator's
own words.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError

from shared.errors import ConfigurationError, DeadlineMissedError, StorageError, WardroundError, fixed_sentence
from shared.files import storage_errors
from shared.results import Interval, Record, Result, RoundRecord, SiteRound, Status

if TYPE_CHECKING:  # a run's folder brings torch with it; what only looks on need not wait for that
    from server.run_folder import RunFolder
    from shared.study import Study

STATUS_VERSION = 1
MOST_FAULTS = 50
NO_FAULT: frozenset[Status] = frozenset({"ok", "not asked", "at work"})
LATE = fixed_sentence(DeadlineMissedError)
NOT_THERE = "is waited for: not connected yet, or busy"

SiteState = Literal["online", "offline", "never seen", "revoked", "expired", "awaiting approval"]
StudyState = Literal["queued", "waiting for sites", "running", "completed", "failed", "stopped", "interrupted"]


class Part(Record):
    """Base of the parts: it becomes JSON, so neither NaN nor infinity."""

    model_config = ConfigDict(allow_inf_nan=False)


class SiteStatus(Part):
    """A site of the federation. `declared_size` is in patients; `expires` is when the roster's approval ends."""

    name: str
    state: SiteState
    last_contact: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    declared_size: int | None = Field(default=None, ge=0)


class HistoryPoint(Part):
    """The primary metric over all sites after `round` rounds of training, and its 95 % interval; None where it is not determined."""

    round: int
    value: float | None
    low: float | None = None
    high: float | None = None


class StudySite(Part):
    """A site in a study: its answer in the last round, and the epsilon spent on this study so far."""

    name: str
    status: Status
    reason: str | None = None
    epsilon: float | None = None


class Fault(Part):
    """A site that was asked in a round and gave no usable answer."""

    round: int
    site: str
    status: Status
    reason: str | None = None


class Failure(Part):
    """Why a study ended: the error's stable code, what happened, what to do."""

    code: str
    what: str
    remedy: str = ""

    @classmethod
    def of(cls, error: WardroundError) -> "Failure":
        """The same words as the command line's."""
        return cls(code=error.code, what=error.what, remedy=error.remedy)


class StudyStatus(Part):
    """One run of a study.

    Attributes:
        round: rounds completed, counted over all folds as `rounds` is.
        fold: the fold that `history` and `sites` speak of, the last one begun.
        metric: name of the primary metric; None before the first value.
        seconds_per_round: mean over the completed rounds.
        epsilon_asked: the whole study's budget at each site; None where the study asks for none, or for a noise multiplier.
        faults: newest first, at most `MOST_FAULTS`.
    """

    run: str
    study: str
    task: str
    state: StudyState
    round: int = 0
    rounds: int
    fold: int = 1
    folds: int = 1
    submitted: AwareDatetime
    metric: str | None = None
    history: tuple[HistoryPoint, ...] = ()
    seconds_per_round: float | None = None
    epsilon_asked: float | None = None
    sites: tuple[StudySite, ...] = ()
    faults: tuple[Fault, ...] = ()
    error: Failure | None = None


class AuditHead(Part):
    """The coordinator's audit log: the hash of its last row, and how many rows there are."""

    head: str = Field(pattern=r"^[0-9a-f]*$")
    rows: int = Field(ge=0)


class CoordinatorStatus(Part):
    """Everything at one moment. `generation` is the roster's, `quorum` the fewest sites a study may go on with, `warnings` are sentences."""

    schema_version: int = STATUS_VERSION
    federation: str
    wardround: str  # version
    time: AwareDatetime
    started: AwareDatetime
    generation: int
    quorum: int
    sites: tuple[SiteStatus, ...] = ()
    studies: tuple[StudyStatus, ...] = ()
    audit: AuditHead
    warnings: tuple[str, ...] = ()


def study_status(folder: "RunFolder", state: StudyState, *, submitted: AwareDatetime, error: Failure | None = None) -> StudyStatus:
    """What the files of a run's folder say of it, together with what the coordinator knows: state, time of submission, why it ended.

    It never raises for a folder that is damaged: that is said as the study's error, so that one bad file hides no other study.
    """
    try:
        study, records, result = _read(folder)
    except (StorageError, ConfigurationError) as damage:
        name = folder.path.name
        return StudyStatus(
            run=name, study=name.rsplit("-", 2)[0], task="unknown", state=state, rounds=0, submitted=submitted, error=error or Failure.of(damage)
        )
    metric = _primary_metric(records, result)
    fold = records[-1].fold if records else 1
    waiting = waiting_status(study, state, run=folder.path.name, submitted=submitted, error=error)
    return waiting.model_copy(
        update={
            "round": len(records),
            "fold": fold,
            "metric": metric,
            "history": _history([record for record in records if record.fold == fold], result, metric),
            "seconds_per_round": _mean([record.seconds for record in records]),
            "sites": _sites(records, folds=study.evaluation.folds),
            "faults": _faults(records, folds=study.evaluation.folds),
        }
    )


def waiting_status(study: "Study", state: StudyState, *, run: str, submitted: AwareDatetime, error: Failure | None = None) -> StudyStatus:
    """A study that has no folder yet: queued, or ended before it began."""
    return StudyStatus(
        run=run,
        study=study.name,
        task=study.task,
        state=state,
        rounds=study.rounds.count * study.evaluation.folds,
        folds=study.evaluation.folds,
        submitted=submitted,
        epsilon_asked=study.privacy.epsilon if study.private else None,
        error=error,
    )


def _read(folder: "RunFolder") -> "tuple[Study, list[RoundRecord], Result | None]":
    """Study, complete rounds, and the result where the run has ended; milliseconds for hundreds of rounds, so nothing is kept between calls."""
    with storage_errors(folder.path, "read", remedy="check its permissions"):
        return folder.study, folder.rounds(), _result(folder.path / "result.json")


def _result(path: Path) -> Result | None:
    try:
        return Result.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise StorageError(f"{path}: expected a result of ours, got a damaged file", "restore the file, or run the study again") from None


def _primary_metric(records: Sequence[RoundRecord], result: Result | None) -> str | None:
    """A round's record carries the primary metric and no other."""
    if result is not None:
        return result.primary_metric
    return next((name for record in reversed(records) for name in record.metrics), None)


def _history(records: Sequence[RoundRecord], result: Result | None, metric: str | None) -> tuple[HistoryPoint, ...]:
    """By rounds of training: a record speaks of the model before its round, so the final model's value comes from the result.

    The model before the first round is random, and its value would only stretch the axis; it is left out, as in the report.
    """
    if metric is None:
        return ()
    points = [
        _point(record.evaluated_round, record.metrics.get(metric), record.metrics_ci95.get(metric)) for record in records if record.evaluated_round
    ]
    final = _final_point(records, result, metric)
    return tuple(points) if final is None else (*(point for point in points if point.round != final.round), final)


def _final_point(records: Sequence[RoundRecord], result: Result | None, metric: str) -> HistoryPoint | None:
    if result is None or not records:
        return None
    last = records[-1]
    if result.folds:
        value, interval = result.folds[last.fold - 1].get(metric) if last.fold <= len(result.folds) else None, None
    else:
        value, interval = result.metrics.get("federated", {}).get(metric), result.metrics_ci95.get("federated", {}).get(metric)
    return None if value is None else _point(last.round, value, interval)


def _point(number: int, value: float | None, interval: Interval) -> HistoryPoint:
    low, high = interval or (None, None)
    known = _finite(low) is not None and _finite(high) is not None
    return HistoryPoint(round=number, value=_finite(value), low=low if known else None, high=high if known else None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean(seconds: Sequence[float]) -> float | None:
    known = [value for value in seconds if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def told_reason(site: SiteRound, *, folds: int) -> str | None:
    """Why a site gave no usable answer in a round. One that has not joined the study yet was late for nothing: it is waited for.

    With several folds a record does not tell the two apart, and says of both that they were late.
    """
    joined = site.num_test is not None or site.epsilon is not None or folds > 1
    return site.reason if joined or (site.status, site.reason) != ("missing", LATE) else NOT_THERE


def _sites(records: Sequence[RoundRecord], *, folds: int) -> tuple[StudySite, ...]:
    """The last round's sites; a site's epsilon is the last that was told of it, also before the round of a resumed run."""
    if not records:
        return ()
    epsilons = {site.name: _finite(site.epsilon) for record in records for site in record.sites if site.epsilon is not None}
    return tuple(
        StudySite(name=site.name, status=site.status, reason=told_reason(site, folds=folds), epsilon=epsilons.get(site.name))
        for site in records[-1].sites
    )


def _faults(records: Sequence[RoundRecord], *, folds: int) -> tuple[Fault, ...]:
    found = (
        Fault(round=record.round, site=site.name, status=site.status, reason=told_reason(site, folds=folds))
        for record in reversed(records)
        for site in record.sites
        if site.status not in NO_FAULT
    )
    return tuple(fault for fault, _ in zip(found, range(MOST_FAULTS), strict=False))
