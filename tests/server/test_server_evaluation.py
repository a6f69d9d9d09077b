"""Sums over sites, and what is finished from them."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.evaluation_noise import merge, spread
from server.evaluation import add_statistics, count_tested, evaluate
from shared.metrics import BINARY_METRICS, NUM_BINS, SCORE_HISTOGRAM, Metric, auroc, bin_of_score, error_metrics, noise_interval
from shared.task import Task


def histogram(seed: int, num_patients: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = np.zeros((2, NUM_BINS))
    np.add.at(counts, (rng.integers(0, 2, num_patients), rng.integers(0, NUM_BINS, num_patients)), 1.0)
    return counts


def test_sites_are_added_name_by_name_and_nothing_is_written_to() -> None:
    first, second = {"a": np.ones(3)}, {"a": np.full(3, 2.0), "b": np.ones(1)}
    assert {name: value.tolist() for name, value in add_statistics([first, None, second, {}]).items()} == {"a": [3, 3, 3], "b": [1]}
    assert (first["a"].tolist(), second["a"].tolist()) == ([1, 1, 1], [2, 2, 2])
    assert add_statistics([]) == {}
    total = add_statistics([first])
    total["a"] += 1
    assert first["a"].tolist() == [1, 1, 1]


def test_pooled_auroc_is_of_all_patients_and_not_the_mean_of_sites(task: Task) -> None:
    sites = [{"score_histogram": histogram(1, 30)}, {"score_histogram": histogram(2, 200)}]
    pooled = evaluate(task, add_statistics(sites), resamples=0, seed=1, path=()).metrics["auroc"]
    total = sites[0]["score_histogram"] + sites[1]["score_histogram"]
    scores = np.repeat(np.tile(np.arange(NUM_BINS), 2), total.ravel().astype(int))
    labels = np.repeat([0, 1], total.sum(axis=1).astype(int))
    assert pooled == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    mean = np.mean([evaluate(task, site, resamples=0, seed=1, path=()).metrics["auroc"] for site in sites])
    assert pooled != pytest.approx(mean, abs=1e-6)


def test_intervals_hold_the_value_and_depend_on_what_is_evaluated_alone(task: Task) -> None:
    total = {"score_histogram": histogram(3, 300)}
    first = evaluate(task, total, resamples=200, seed=1, path=("final", "federated"))
    assert first == evaluate(task, total, resamples=200, seed=1, path=("final", "federated"))
    assert first.ci95 != evaluate(task, total, resamples=200, seed=1, path=("final", "pooled")).ci95
    assert first.ci95 != evaluate(task, total, resamples=200, seed=2, path=("final", "federated")).ci95
    assert set(first.ci95) == {metric.name for metric in BINARY_METRICS}
    low, high = first.ci95["auroc"]
    assert low < first.metrics["auroc"] < high
    only = evaluate(task, total, resamples=200, seed=1, path=("final", "federated"), only="auroc")
    assert list(only.ci95) == ["auroc"] and only.metrics == first.metrics


def test_without_statistics_there_is_nothing_to_say(task: Task) -> None:
    nothing = evaluate(task, {}, resamples=100, seed=1, path=())
    assert (nothing.metrics, nothing.ci95) == ({}, {})
    empty = evaluate(task, {"score_histogram": np.zeros((2, NUM_BINS))}, resamples=100, seed=1, path=())
    assert set(empty.metrics.values()) == {None} and set(empty.ci95.values()) == {None}


def test_patients_are_counted_where_the_statistic_counts_them(task: Task) -> None:
    from dataclasses import replace

    assert count_tested(task, {"score_histogram": histogram(1, 77)}) == 77
    assert count_tested(task, {}) is None
    numbers = replace(task, metrics=error_metrics(0.0, 1.0), primary_metric="mae")
    assert count_tested(numbers, {"errors": np.ones(5)}) is None


def test_the_noises_interval_covers_the_exact_metric_and_grows_with_the_noise() -> None:
    """Over 60 noised sums of 4,000 patients, about 95 % are promised; fewer than 80 % has a false-alarm rate below 1e-5."""
    metric = Metric(name="auroc", statistic=SCORE_HISTOGRAM, finish=auroc, low=0.0, high=1.0)
    rng = np.random.default_rng(3)
    labels = rng.random(4000) < 0.4
    scores = 1 / (1 + np.exp(-(rng.normal(size=4000) + 1.2 * labels)))
    total = np.zeros(SCORE_HISTOGRAM.shape)
    np.add.at(total, (labels.astype(int), bin_of_score(scores)), 1.0)
    widths = SCORE_HISTOGRAM.noised_widths
    merged = spread(merge(total, widths), widths)
    exact, reaches = metric.of(merged), {}
    assert exact is not None
    for std in (4.0, 16.0):
        covered, wide = 0, []
        for _ in range(60):
            noised = merged + spread(rng.normal(scale=std, size=(2, len(widths))), widths)
            interval = noise_interval(metric, noised, std=std, draws=100, rng=rng)
            assert interval is not None
            covered += interval[0] <= exact <= interval[1]
            wide.append(interval[1] - interval[0])
        assert covered >= 48
        reaches[std] = float(np.median(wide))
    assert 3 < reaches[16.0] / reaches[4.0] < 5


def test_noise_that_drowns_a_metric_is_the_whole_range() -> None:
    metric = Metric(name="auroc", statistic=SCORE_HISTOGRAM, finish=auroc, low=0.0, high=1.0)
    total = np.zeros(SCORE_HISTOGRAM.shape)
    total[0, 100], total[1, 400] = 3, 3
    low, high = noise_interval(metric, total, std=500.0, draws=100, rng=np.random.default_rng(1)) or (0.5, 0.5)
    assert low == 0.0 and high == 1.0
    assert noise_interval(metric, -total, std=1.0, draws=100, rng=np.random.default_rng(1)) is None
