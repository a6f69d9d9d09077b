"""Sums over sites, and what is finished from them."""

import os

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.evaluation_noise import merge, noise_statistics, spread
from server.evaluation import FEW, LEEWAY, add_statistics, check_statistics, count_tested, evaluate, planned_noise_std
from shared.cohort import Cohort
from shared.errors import ProtocolError
from shared.metrics import BINARY_METRICS, NUM_BINS, SCORE_HISTOGRAM, Metric, auroc, bin_of_score, error_metrics, noise_interval
from shared.privacy import SOLVE_MARGIN, evaluation_noise_multiplier
from shared.study import Study
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


@pytest.mark.slow
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


# What a site claims ---------------------------------------------------------------------------------------------------------------------

ERRORS = error_metrics(0, 10)[0].statistic


def error_sums(num_patients: int, seed: int = 1) -> np.ndarray:
    """Of predictions and labels of which some are at the very ends of the range."""
    rng = np.random.default_rng(seed)
    predicted, label = (rng.choice([0.0, 10.0, rng.uniform(-5, 15)], num_patients) for _ in range(2))
    patients = np.arange(num_patients)
    cohort = Cohort(inputs=(label,), labels=label, patient_of_record=patients, patient_ids=tuple(map(str, patients)))
    return ERRORS.summarise(predicted, cohort)


@pytest.mark.parametrize("num_patients", [0, 1, 3, 60, 5000])
def test_what_patients_add_up_to_is_believed(num_patients: int) -> None:
    for seed in range(20):
        assert SCORE_HISTOGRAM.could_be(histogram(seed, num_patients), patients=num_patients)
        assert ERRORS.could_be(error_sums(num_patients, seed), patients=num_patients)


LIES = {
    "a thousandfold": lambda sums: sums * 1000,
    "one patient too many": lambda sums: sums * (61 / 60),
    "a negative part": lambda sums: sums - np.eye(*np.atleast_2d(sums).shape)[0].reshape(sums.shape[-1:]) * 61,
    "not a number": lambda sums: np.where(np.arange(sums.size).reshape(sums.shape) == 1, np.nan, sums),
    "infinite": lambda sums: np.where(np.arange(sums.size).reshape(sums.shape) == 1, np.inf, sums),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_patients_add_up_to_is_not_believed(lie: str) -> None:
    assert not SCORE_HISTOGRAM.could_be(LIES[lie](histogram(1)), patients=60)
    assert not ERRORS.could_be(LIES[lie](np.full(5, 60.0)), patients=60)


@pytest.mark.parametrize(
    "sums",
    [[10, 11, 5, 5, 3], [10, 5, 6, 5, 3], [10, 5, 3, 11, 3], [10, 5, 3, 5, 6], [10, 5, 2, 5, 3], [10, 5, 3, 9, 7], [0, 1, 1, 0, 0]],
    ids=["error above count", "square above error", "label above count", "square above label", "square too small", "label's too small", "of nobody"],
)
def test_parts_that_contradict_each_other_are_not_believed(sums: list[float]) -> None:
    assert ERRORS.could_be(np.array([10, 5, 3, 5, 3.0]), patients=60)
    assert not ERRORS.could_be(np.array(sums, dtype=np.float64), patients=60)


def noised_study() -> Study:
    return Study.from_table({
        "name": "n", "task": "tiny", "seed": 1, "rounds": {"count": 1}, "training": {"learning_rate": 0.1, "batch_size": 8},
        "privacy": {"epsilon": 2.0, "delta": 1e-3, "max_grad_norm": 1.0, "evaluation_epsilon": 1.0},
    })  # fmt: skip


def test_noise_of_the_plan_is_believed_and_a_claim_beyond_it_is_not(task: Task) -> None:
    study = noised_study()
    noise = planned_noise_std(study, task)
    multiplier = evaluation_noise_multiplier(1.0 * SOLVE_MARGIN, 1e-3)
    for _ in range(50):
        drawn = noise_statistics(
            {"score_histogram": np.zeros((2, NUM_BINS))}, {"score_histogram": SCORE_HISTOGRAM}, noise_multiplier=2 * multiplier, key=os.urandom(32)
        )
        check_statistics(task, drawn, declared=0, noise=noise)  # a site whose own limit asks for twice the noise: six standard deviations
    reach = LEEWAY * 20 + FEW + 12 * noise["score_histogram"] * SCORE_HISTOGRAM.num_draws**0.5
    boast = np.zeros((2, NUM_BINS))
    boast[1, 400] = reach * 0.99
    check_statistics(task, {"score_histogram": boast}, declared=20, noise=noise)
    with pytest.raises(ProtocolError, match="20 declared"):
        check_statistics(task, {"score_histogram": boast * 1.02}, declared=20, noise=noise)


def test_a_declaration_in_round_numbers_leaves_room_and_not_more(task: Task) -> None:
    check_statistics(task, {"score_histogram": histogram(1, LEEWAY * 50 + FEW)}, declared=50, noise={})
    for declared, claimed in ((50, LEEWAY * 50 + FEW + 1), (0, FEW + 1), (-5, FEW + 1)):
        with pytest.raises(ProtocolError, match=rf"score_histogram: expected a sum over at most .* \({declared} declared\)"):
            check_statistics(task, {"score_histogram": histogram(1, claimed)}, declared=declared, noise={})
