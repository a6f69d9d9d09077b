"""What the coordinator learns from the sites' statistics: pooled metrics, per-site metrics with their n, intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.messages import Statistics
from shared.metrics import Metric, bootstrap_interval, finish_metrics, noise_interval
from shared.results import Interval, MetricValues
from shared.seeding import Step, generator
from shared.task import Task

MOST_NOISE_DRAWS = 200


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
