"""Series over rounds, from rounds.jsonl and the final numbers of result.json."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.results import Interval, RoundRecord
from shared.strategy_options import FedBuff
from wardround.report.run_files import RunFiles
from wardround.report.wording import finite, finite_interval

Sample = tuple[int, float | None, Interval]  # rounds of training, value (None: not determined), its 95 % interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A value by round, in order of rounds."""

    name: str
    points: tuple[Sample, ...]
    is_fold: bool = False

    def values(self) -> list[float]:
        """The values that there are."""
        return [value for _, value, _ in self.points if value is not None]

    def last_value(self) -> float | None:
        """The last value that there is."""
        return next((value for _, value, _ in reversed(self.points) if value is not None), None)

    def last_x(self) -> int:
        """The last round, 0 without any."""
        return self.points[-1][0] if self.points else 0


def fold_curves(run: RunFiles) -> list[Curve]:
    """The primary metric over all sites by model round: one curve, or one a fold of a cross-validation.

    A round's record speaks of the model before it, so the last point is the final model's and comes from result.json. Of fedbuff a round that nobody
    judged, for all were at work on older models, is left out; with others it is a gap.
    """
    by_fold: dict[int, list[RoundRecord]] = {1: []}
    buffered, metric = isinstance(run.study.strategy, FedBuff), run.result.primary_metric
    for record in run.rounds:
        of_fold = by_fold.setdefault(record.fold, [])
        if buffered and finite(record.metrics.get(metric)) is None:
            continue
        if record.evaluated_round > 0:  # before the first round the model is random, and its value would only stretch the axis
            of_fold.append(record)
    several = len(by_fold) > 1 or run.study.evaluation.folds > 1
    return [
        Curve(name=f"Fold {fold}" if several else "All sites together", points=_fold_points(run, fold, records, several=several), is_fold=several)
        for fold, records in sorted(by_fold.items())
    ]


def _fold_points(run: RunFiles, fold: int, records: list[RoundRecord], *, several: bool) -> tuple[Sample, ...]:
    metric = run.result.primary_metric
    points = [(r.evaluated_round, finite(r.metrics.get(metric)), finite_interval(r.metrics_ci95.get(metric))) for r in records]
    if several:
        if fold <= len(run.result.folds):
            last = max((record.round for record in records), default=run.study.rounds.count)
            points.append((last, finite(run.result.folds[fold - 1].get(metric)), None))
    else:
        interval = finite_interval(run.result.metrics_ci95.get("federated", {}).get(metric))
        points.append((run.result.rounds_completed, finite(run.result.metrics.get("federated", {}).get(metric)), interval))
    return _in_order(points)


def site_curves(run: RunFiles) -> list[Curve]:
    """The primary metric of each site by the round of the model that it judged, on its own test patients; empty for a cross-validation.

    A round in which a site was not asked, or was still at work, is left out; one that it missed is a gap.
    """
    if run.study.evaluation.folds > 1:
        return []
    metric = run.result.primary_metric
    points: dict[str, list[Sample]] = {site.name: [] for site in run.result.sites}
    for record in run.rounds:
        for site in record.sites:
            at = record.evaluated_round - (site.staleness or 0)
            if at > 0 and site.status not in ("not asked", "at work"):
                points.setdefault(site.name, []).append((at, finite((site.metrics or {}).get(metric)), None))
    for name, values in run.result.per_site.items():
        points.setdefault(name, []).append((run.result.rounds_completed, finite(values.get(metric)), None))
    curves = [Curve(name=name, points=_in_order(samples)) for name, samples in points.items()]
    return [curve for curve in curves if curve.values()]


def epsilon_by_round(run: RunFiles) -> list[Curve]:
    """Epsilon spent by each site after each round, counted over all folds; it begins at 0."""
    points: dict[str, list[Sample]] = {}
    for index, record in enumerate(run.rounds, start=1):
        for site in record.sites:
            if site.epsilon is not None:
                points.setdefault(site.name, [(0, 0.0, None)]).append((index, finite(site.epsilon), None))
    return [Curve(name=name, points=tuple(samples)) for name, samples in points.items()]


def _in_order(points: Iterable[Sample]) -> tuple[Sample, ...]:
    """By round; of two values for one round the known one, else the later one, stays."""
    by_round: dict[int, Sample] = {}
    for point in points:
        if point[1] is not None or point[0] not in by_round:
            by_round[point[0]] = point
    return tuple(by_round[at] for at in sorted(by_round))
