"""Noised statistics: what one patient can move, how much noise there is, what it costs, and that the metrics survive it.

Every test of a distribution has fixed keys; the false-alarm rate is what a fresh key would have.
"""

import dataclasses
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.evaluation_noise import (
    bounded_statistics,
    grid_of,
    grid_sensitivity,
    merge,
    merged_shape,
    noise_statistics,
    noised_epsilon,
    spread,
)
from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.metrics import BINARY_METRICS, SCORE_HISTOGRAM, FloatArray, Metric, Statistic, confusion_metrics, error_metrics, finish_metrics
from shared.privacy import MIN_NOISE_MULTIPLIER, PrivacyEvent, epsilon_of, evaluation_noise_multiplier, renyi_divergence
from shared.seeding import derive_key

LOW, HIGH = -20.0, 60.0
METRICS = {"binary": BINARY_METRICS, "classes": confusion_metrics(4), "number": error_metrics(LOW, HIGH)}
STATISTICS = {kind: metrics[0].statistic for kind, metrics in METRICS.items()}
records = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def key(*path: str | int) -> bytes:
    return derive_key(5, "test of noised statistics", *path)


def patients(kind: str, records_each: list[int], seed: int) -> Cohort:
    """Records of these patients in any order; their inputs are predictions of every sort."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(len(records_each)), records_each)).astype(np.int64)
    num = len(owner)
    labels: NDArray[np.generic]
    if kind == "binary":
        predictions = rng.choice([0.0, 1e-30, 0.03, 0.3, 0.4999, 0.5, 0.7, 0.99, 1.0, math.nan, math.inf], num)
        labels = rng.integers(0, 2, num).astype(np.float32)
    elif kind == "classes":
        predictions, labels = rng.choice([0.1, 5.0, -3.0, math.nan], (num, 4)), rng.integers(0, 4, num)
    else:
        predictions = rng.choice([LOW, HIGH, 1e30, -math.inf, math.nan, 3.0], num)
        labels = rng.choice([LOW, HIGH, LOW - 30, HIGH + 30, 1.7], num).astype(np.float32)
    names = tuple(f"p{index}" for index in range(len(records_each)))
    return Cohort(inputs=(predictions,), labels=labels, patient_of_record=owner, patient_ids=names)


def predict(cohort: Cohort) -> FloatArray:
    return np.asarray(cohort.inputs[0], dtype=np.float64)


def bounded(statistic: Statistic, cohort: Cohort) -> FloatArray:
    return bounded_statistics({"s": statistic}, cohort, predict)["s"]


def summed(statistic: Statistic, cohort: Cohort) -> FloatArray:
    return statistic.summarise(predict(cohort), cohort)


# What one patient can move --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(STATISTICS))
@given(records_each=records, seed=st.integers(0, 10**6))
def test_one_patient_moves_what_is_noised_by_at_most_its_sensitivity(kind: str, records_each: list[int], seed: int) -> None:
    """On the grid, entries that share a draw merged, all records of the patient added or removed: for every statistic we have."""
    cohort, statistic = patients(kind, records_each, seed), STATISTICS[kind]
    for how, limit in ((bounded, statistic.sensitivity / grid_of(statistic)), (summed, grid_sensitivity(statistic))):
        whole, *neighbours = (
            np.rint(merge(how(statistic, cohort.select(np.arange(cohort.num_patients) != patient)), statistic.noised_widths) / grid_of(statistic))
            for patient in range(-1, cohort.num_patients)
        )
        assert all(np.linalg.norm(whole - neighbour) <= limit * (1 + 1e-12) for neighbour in neighbours)


@pytest.mark.parametrize("kind", list(STATISTICS))
@given(records_each=records, seed=st.integers(0, 10**6))
def test_patient_by_patient_is_the_same_sum(kind: str, records_each: list[int], seed: int) -> None:
    cohort, statistic = patients(kind, records_each, seed), STATISTICS[kind]
    found = bounded(statistic, cohort)
    assert found.shape == statistic.shape and found.dtype == np.float64
    merged = merge(found, statistic.noised_widths)
    assert merged == pytest.approx(merge(summed(statistic, cohort), statistic.noised_widths), abs=2 * cohort.num_patients * grid_of(statistic))
    assert np.array_equal(merged / grid_of(statistic), np.rint(merged / grid_of(statistic)))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3), st.sampled_from([1e-9, 0.3, 1.0, 7.0, 1e9]))
def test_no_statistic_can_break_its_declared_sensitivity(part: list[float], sensitivity: float) -> None:
    """Whatever a task's own `summarise` gives."""
    liar = Statistic(name="liar", shape=(3,), summarise=lambda predictions, cohort: np.array(part), sensitivity=sensitivity, is_counts=False)
    moved = bounded(liar, patients("binary", [2], 1))
    assert np.isfinite(moved).all() and np.linalg.norm(moved / sensitivity) <= 1 + 1e-12


def test_a_patients_part_does_not_depend_on_the_others() -> None:
    """Not even for a model that looks across its batch."""

    def ranks(cohort: Cohort) -> FloatArray:
        return np.argsort(predict(cohort)).astype(np.float64)

    cohort, statistic = patients("number", [1, 3, 2, 7], 4), {"s": STATISTICS["number"]}
    whole = bounded_statistics(statistic, cohort, ranks)["s"]
    parts = [bounded_statistics(statistic, cohort.select(np.array([patient])), ranks)["s"] for patient in range(4)]
    assert np.array_equal(whole, np.sum(parts, axis=0))
    together = STATISTICS["number"].summarise(ranks(cohort), cohort)
    assert not np.allclose(whole, together, atol=1e-3)


def test_nobody_is_zeros_and_a_patient_without_records_adds_nothing() -> None:
    cohort, statistic = patients("classes", [2, 1], 3), STATISTICS["classes"]
    assert not bounded(statistic, cohort.select(np.zeros(2, dtype=bool))).any()
    more = dataclasses.replace(cohort, patient_ids=(*cohort.patient_ids, "without records"))
    assert np.array_equal(bounded(statistic, cohort), bounded(statistic, more))


def test_merged_entries_are_shared_out_and_merged_again_exactly() -> None:
    widths = SCORE_HISTOGRAM.noised_widths
    steps = np.random.default_rng(1).integers(-(2**40), 2**40, size=merged_shape(SCORE_HISTOGRAM)).astype(np.float64)
    assert spread(steps, widths).shape == SCORE_HISTOGRAM.shape and np.array_equal(merge(spread(steps, widths), widths), steps)
    half = np.zeros(SCORE_HISTOGRAM.shape)
    half[:, : half.shape[1] // 2] = 1
    edges = merge(half, widths)
    assert set(np.unique(edges / np.array(widths))) == {0.0, 1.0}  # no group reaches over the threshold
    for widths in ((4, 4, 2), (16, 3, 13), (8, -8, 32)):
        with pytest.raises(ConfigurationError, match="powers of two"):
            Statistic(name="s", shape=(2, 32), summarise=lambda predictions, cohort: np.zeros(32), noised_widths=widths)
    for sensitivity in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="sensitivity"):
            Statistic(name="s", shape=(2,), summarise=lambda predictions, cohort: np.zeros(2), sensitivity=sensitivity)


# How much noise there is ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_noise_has_the_standard_deviation_of_its_event() -> None:
    """Each of k statistics sqrt(k) times its sensitivity times the noise multiplier; 4 % is 5 standard errors or more."""
    declared = {statistic.name: statistic for statistic in STATISTICS.values()}
    zeros = {name: np.zeros(statistic.shape) for name, statistic in declared.items()}
    for chosen, repeats in ((list(declared), 400), (["errors"], 2000)):
        draws: dict[str, list[FloatArray]] = {name: [] for name in chosen}
        for index in range(repeats):
            noised = noise_statistics({name: zeros[name] for name in chosen}, declared, noise_multiplier=3.0, key=key("std", len(chosen), index))
            for name, value in noised.items():
                draws[name].append(merge(value, declared[name].noised_widths))
        for name, values in draws.items():
            expected = 3.0 * math.sqrt(len(chosen)) * declared[name].sensitivity
            assert np.std(values) == pytest.approx(expected, rel=0.1 if np.size(values) < 5000 else 0.04)
            assert abs(np.mean(values)) < 5 * expected / math.sqrt(np.size(values))


def test_the_release_is_on_its_grid_and_a_function_of_its_key() -> None:
    declared = {"errors": STATISTICS["number"]}
    sums = bounded_statistics(declared, patients("number", [1, 2, 3], 2), predict)
    first, again, other = (noise_statistics(sums, declared, noise_multiplier=1.0, key=key("grid", index))["errors"] for index in (1, 1, 2))
    assert np.array_equal(first, again) and not np.isclose(first, other).any()
    assert np.array_equal(first / grid_of(declared["errors"]), np.rint(first / grid_of(declared["errors"])))
    assert first.dtype == np.float64 and noise_statistics({}, declared, noise_multiplier=1.0, key=key("none")) == {}
    large = {"errors": np.full(5, 2.0**60)}  # beyond 2**53 steps: still numbers
    assert np.isfinite(noise_statistics(large, declared, noise_multiplier=1e6, key=key("large"))["errors"]).all()


@given(st.floats(1e-30, 1e30))
def test_the_grid_is_a_power_of_two_far_below_the_sensitivity(sensitivity: float) -> None:
    statistic = Statistic(name="s", shape=(1000,), summarise=lambda predictions, cohort: np.zeros(1000), sensitivity=sensitivity)
    assert math.frexp(grid_of(statistic))[0] == 0.5
    assert 2**20 <= sensitivity / grid_of(statistic) < 2**21
    assert 1 < grid_sensitivity(statistic) * grid_of(statistic) / sensitivity < 1.0001


# What it costs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.001, 0.05, 0.5, 1.0, 3.0, 10.0, 20.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("releases", [1, 7])
def test_the_noise_keeps_the_budget_and_hardly_less(epsilon: float, delta: float, releases: int) -> None:
    """Oracle: dp-accounting's Renyi accountant, whose conversion to epsilon is the same proposition."""
    noise = evaluation_noise_multiplier(epsilon, delta, releases)
    assert noised_epsilon(noise, delta=delta, releases=releases) <= epsilon * (1 + 1e-12)
    assert noised_epsilon(noise * 0.999, delta=delta, releases=releases) > epsilon
    orders = [1 + math.exp(step / 200) for step in range(-800, 3200)]
    accountant = RdpAccountant(orders=orders)
    accountant.compose(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(noise), releases))
    assert accountant.get_epsilon(delta) <= epsilon * (1 + 1e-4)
    fewer = RdpAccountant(orders=orders)
    fewer.compose(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(noise * 0.999), releases))
    assert fewer.get_epsilon(delta) > epsilon


def test_renyi_is_no_less_than_the_continuous_gaussians_own_epsilon() -> None:
    for noise in (0.7, 2.0, 9.0):
        event = PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)
        assert epsilon_of([event], 1e-5) < noised_epsilon(noise, delta=1e-5) < 1.35 * epsilon_of([event], 1e-5)
        assert renyi_divergence(event, 8.0) == pytest.approx(8.0 / (2 * noise**2))  # what a ledger charges for it


def test_extremes_of_the_budget() -> None:
    assert evaluation_noise_multiplier(100.0, 1e-2) == MIN_NOISE_MULTIPLIER  # the least noise that an event may have
    with pytest.raises(ConfigurationError, match="evaluation_epsilon"):
        evaluation_noise_multiplier(1e-9, 1e-9)


def test_two_neighbours_are_as_near_as_promised() -> None:
    """The Renyi divergence of a release in one dimension, summed over its law: at most alpha Delta^2 / (2 sigma^2), for a shift of Delta."""
    for sigma, shift in ((0.4, 1), (1.3, 1), (2.0, 3)):
        reach = math.ceil(12 * sigma) + shift  # beyond, less than 1e-30 of the law
        support = np.arange(-reach, reach + 1)
        law = np.exp(-(support**2) / (2 * sigma**2))
        moved = np.exp(-((support - shift) ** 2) / (2 * sigma**2))
        law, moved = law / law.sum(), moved / moved.sum()
        for order in (1.5, 2.0, 4.0):
            divergence = math.log((law**order * moved ** (1 - order)).sum()) / (order - 1)
            assert divergence <= order * shift**2 / (2 * sigma**2) * (1 + 1e-9)


# Metrics of noised sums -----------------------------------------------------------------------------------------------------------


def in_range(metrics: tuple[Metric, ...], total: FloatArray) -> bool:
    values = finish_metrics(metrics, {metrics[0].statistic.name: total})
    by_name = {metric.name: metric for metric in metrics}
    return all(value is None or (math.isfinite(value) and by_name[name].low <= value <= by_name[name].high) for name, value in values.items())


@pytest.mark.parametrize("kind", list(METRICS))
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 0.3, 4.0, 60.0, 1e12]), num=st.integers(0, 40))
def test_metrics_of_noised_sums_are_none_or_in_their_range(kind: str, seed: int, scale: float, num: int) -> None:
    """Noise far above the counts included; warnings are errors here."""
    rng = np.random.default_rng(seed)
    statistic = STATISTICS[kind]
    exact = summed(statistic, patients(kind, [1] * num, seed))
    noise = np.rint(rng.normal(scale=scale, size=merged_shape(statistic)) / grid_of(statistic)) * grid_of(statistic)
    assert in_range(METRICS[kind], exact + spread(noise, statistic.noised_widths))
    assert in_range(METRICS[kind], -np.abs(noise.sum() + 1) * np.ones(statistic.shape))


@pytest.mark.parametrize("kind", list(METRICS))
@given(data=st.data())
def test_metrics_of_any_finite_sums_are_none_or_in_their_range(kind: str, data: st.DataObject) -> None:
    """As a site may send them: anything up to the largest that is taken."""
    entries = data.draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e-12, -1e-12, 0.5, 1e12, -1e12, 3.25]), min_size=1, max_size=30))
    total = np.resize(np.array(entries), STATISTICS[kind].shape)
    assert in_range(METRICS[kind], total)


def test_a_metric_of_a_tasks_own_may_fail_on_noise_and_is_none() -> None:
    def root(total: FloatArray) -> float:
        return math.sqrt(total[0])

    statistic = Statistic(name="s", shape=(1,), summarise=lambda predictions, cohort: np.zeros(1))
    for finish in (root, lambda total: float(np.sqrt(total[0])), lambda total: float(total[0]) / 0.0, lambda total: float(np.exp(-1e6 * total[0]))):
        assert finish_metrics([Metric(name="m", statistic=statistic, finish=finish)], {"s": np.array([-2.0])}) == {"m": None}


def test_a_class_that_noise_has_wiped_out_determines_no_auroc() -> None:
    total = np.zeros(SCORE_HISTOGRAM.shape)
    total[0, 5], total[1, 300], total[1, 20] = 30.0, 2.0, -2.5
    values = finish_metrics(BINARY_METRICS, {"score_histogram": total})
    assert values["auroc"] is None and values["auprc"] is None and values["accuracy"] == 1.0  # (30 + 2) / 29.5, at the end of its range


@pytest.mark.slow
def test_many_patients_drown_the_noise() -> None:
    """20,000 patients at epsilon 1: metrics within 0.01 of those of the merged histogram, which are within 0.01 of the exact ones."""
    rng = np.random.default_rng(3)
    num = 20_000
    labels = (rng.random(num) < 0.4).astype(np.float32)
    scores = 1 / (1 + np.exp(-(rng.normal(size=num) * 1.5 + 2 * labels - 1)))
    names = tuple(str(index) for index in range(num))
    cohort = Cohort(inputs=(scores,), labels=labels, patient_of_record=np.arange(num), patient_ids=names)
    declared = {"score_histogram": SCORE_HISTOGRAM}
    exact = finish_metrics(BINARY_METRICS, {"score_histogram": SCORE_HISTOGRAM.summarise(scores, cohort)})
    sums = bounded_statistics(declared, cohort, predict)
    merged = finish_metrics(BINARY_METRICS, sums)
    noise_multiplier = evaluation_noise_multiplier(1.0, 1e-5)
    assert all(abs(merged[name] - exact[name]) < 0.01 for name in exact)
    for index in range(5):
        noised = finish_metrics(BINARY_METRICS, noise_statistics(sums, declared, noise_multiplier=noise_multiplier, key=key("many", index)))
        assert all(abs(noised[name] - merged[name]) < (0.03 if name == "auprc" else 0.01) for name in exact)
        assert noised["auroc"] != merged["auroc"]
