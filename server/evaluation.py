"""What the coordinator learns from the sites' statistics: pooled metrics, per-site metrics with their n, intervals."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import ProtocolError
from shared.messages import Statistics
from shared.metrics import Metric, bootstrap_interval, finish_metrics, noise_interval
from shared.privacy import SOLVE_MARGIN, evaluation_noise_multiplier
from shared.results import Interval, MetricValues
from shared.seeding import Step, generator
from shared.study import Study
from shared.task import Task

MOST_NOISE_DRAWS = 200
LEEWAY, FEW = 2, 10  # times and plus: sizes are declared in round numbers, a keyed hash draws the test patients, and rounded counts may be doubled


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics finished from one sum, with 95 % intervals where the statistic counts patients, or carries noise of known size."""

    metrics: MetricValues
    ci95: dict[str, Interval]


def add_statistics(parts: Iterable[Statistics | None]) -> Statistics:
    """The sum over sites, name by name; a site that released nothing adds nothing."""
    total: Statistics = {}
    for part in parts:
        for name, value in (part or {}).items():
            total[name] = total[name] + value if name in total else np.array(value)
    return total


def count_tested(task: Task, total: Statistics) -> int | None:
    """Test patients in `total`; None where it holds no statistic that counts patients."""
    counts = [total[metric.statistic.name] for metric in task.metrics if metric.statistic.is_counts and metric.statistic.name in total]
    return round(float(counts[0].sum())) if counts else None


def planned_noise_std(study: Study, task: Task, *, num_sites: int = 1) -> dict[str, float]:
    """Standard deviation of each draw of noise in each statistic summed over sites, of a study that plans it; empty for another.

    A site that its policy holds to more adds a little more.
    """
    if not study.noised_statistics:
        return {}
    epsilon, delta = study.privacy.evaluation_epsilon, study.privacy.delta
    assert epsilon is not None and delta is not None
    statistics = {metric.statistic.name: metric.statistic for metric in task.metrics}
    each = evaluation_noise_multiplier(epsilon * SOLVE_MARGIN, delta) * math.sqrt(len(statistics) * num_sites)
    return {name: each * statistic.sensitivity for name, statistic in statistics.items()}


def check_statistics(task: Task, statistics: Statistics, *, declared: int, noise: Mapping[str, float]) -> None:
    """Return where one site's statistics could be of its patients; else one site's claim would outweigh all others in a pooled metric.

    The theorem: each patient adds at most the statistic's declared `sensitivity`, and counts one where it counts patients, so a sum over n
    patients has at most n times that (`Statistic.could_be`, which also says how far noise may move it). n is what the site declared, with
    leeway: at most `LEEWAY` x declared + `FEW`. So a lie weighs at most as much as that.

    Args:
        declared: test patients, as the site declared them.
        noise: standard deviation of each draw by name, as the plan fixed it; empty where statistics are exact.

    Raises:
        ProtocolError: a statistic is larger than its declaration allows, negative where exact, not finite, or contradicts itself.
    """
    most = LEEWAY * max(0, declared) + FEW
    for statistic in {metric.statistic.name: metric.statistic for metric in task.metrics}.values():
        if statistic.name in statistics and not statistic.could_be(
            statistics[statistic.name], patients=most, noise_std=noise.get(statistic.name, 0.0)
        ):
            raise ProtocolError(f"statistic {statistic.name}: expected a sum over at most {most} test patients ({declared} declared), got another")


def evaluate(
    task: Task,
    total: Statistics,
    *,
    resamples: int,
    seed: int,
    path: tuple[Step, ...],
    only: str | None = None,
    noise_std: Mapping[str, float] | None = None,
) -> Evaluation:
    """Every metric of `total`; intervals for all metrics, or for `only` one.

    Args:
        resamples: of the bootstrap; 0 for no interval.
        path: what is evaluated, so that the bootstrap's draws depend on that alone.
        noise_std: of the noise in each statistic of `total`; intervals are then of that noise alone, for patients cannot be resampled.
    """
    chosen = [metric for metric in task.metrics if metric.statistic.name in total and only in (None, metric.name)]
    if noise_std is None:
        ci95: dict[str, Interval] = {metric.name: _interval(metric, total, resamples, seed, path) for metric in chosen}
    else:
        ci95 = {metric.name: _noise_interval(metric, total, resamples, seed, path, noise_std) for metric in chosen}
    return Evaluation(metrics=finish_metrics(task.metrics, total), ci95=ci95)


def _interval(metric: Metric, total: Statistics, resamples: int, seed: int, path: tuple[Step, ...]) -> Interval:
    if resamples == 0:
        return None
    rng = generator(seed, "bootstrap", *path)
    return bootstrap_interval(metric, total[metric.statistic.name], resamples=resamples, rng=rng)


def _noise_interval(metric: Metric, total: Statistics, resamples: int, seed: int, path: tuple[Step, ...], noise_std: Mapping[str, float]) -> Interval:
    name = metric.statistic.name
    rng = generator(seed, "noise interval", *path, metric.name)
    return noise_interval(metric, total[name], std=noise_std[name], draws=min(resamples, MOST_NOISE_DRAWS), rng=rng)
