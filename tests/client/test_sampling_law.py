"""Who is in a batch: every unit independently with the sample rate, one record of each; nothing else is Poisson sampling.

Seeds are fixed; the false-alarm rate is what a fresh seed would have.
"""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from client.local_training import round_batches
from client.noise import KeyedStream
from client.sampling import PatientIndex, poisson_sample, sample_units, shuffled_batches, whole_patients
from shared.cohort import Cohort
from shared.plan import SitePlan
from shared.study import Study


def cohort_of(owner: list[int], num_patients: int) -> Cohort:
    return Cohort(
        inputs=(np.zeros((len(owner), 1), dtype=np.float32),),
        labels=np.zeros(len(owner), dtype=np.float32),
        patient_of_record=np.array(owner, dtype=np.int64),
        patient_ids=tuple(map(str, range(num_patients))),
    )


def stream(seed: int) -> KeyedStream:
    return KeyedStream(seed.to_bytes(32, "big"))


@pytest.mark.parametrize(("num_units", "rate"), [(30, 0.13), (8, 0.5), (200, 0.01)])
def test_batch_sizes_are_binomial(num_units: int, rate: float) -> None:
    """Chi-square over 20,000 batches, cells of at least ten expected; false-alarm rate 1e-4."""
    draws = stream(1)
    observed = np.bincount([len(poisson_sample(num_units, rate, draws)) for _ in range(20_000)], minlength=num_units + 1)
    expected = stats.binom.pmf(np.arange(num_units + 1), num_units, rate) * 20_000
    common = expected >= 10
    rare = 20_000 - expected[common].sum()
    wanted, seen = expected[common], observed[common]
    if rare > 1:
        wanted, seen = np.append(wanted, rare), np.append(seen, observed[~common].sum())
    assert seen.sum() >= 19_990
    assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-4


def test_units_are_drawn_independently_with_equal_rate() -> None:
    """12 units, 30,000 batches: each frequency within five standard errors and no pair correlated beyond 5 / sqrt(n): 1 in 25,000."""
    draws = stream(2)
    member = np.zeros((30_000, 12))
    for row in member:
        row[poisson_sample(12, 0.2, draws)] = 1
    assert np.abs(member.mean(axis=0) - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 30_000)
    assert np.abs(np.corrcoef(member.T) - np.eye(12)).max() < 5 / np.sqrt(30_000)
    batch = member.sum(axis=1)
    assert abs(np.corrcoef(batch[:-1], batch[1:])[0, 1]) < 5 / np.sqrt(30_000)  # nor do steps depend on each other


def test_the_ends_of_the_rate() -> None:
    draws = stream(3)
    assert poisson_sample(50, 1.0, draws).tolist() == list(range(50))
    assert poisson_sample(0, 0.5, draws).tolist() == []
    assert any(len(poisson_sample(20, 0.05, draws)) == 0 for _ in range(100))  # empty batches happen, and must


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(0, 1000))
def test_one_record_of_each_sampled_patient_and_never_anothers(owner: list[int], seed: int) -> None:
    """Patients without a record (dropped by a loader) give none; a record of someone else in their place would count twice."""
    cohort = cohort_of(owner, 8)
    draws, index = stream(seed), PatientIndex(cohort)
    sampled = poisson_sample(8, 0.7, draws)
    there = [patient for patient in sampled if patient in owner]
    assert np.array_equal(cohort.patient_of_record[index.one_record_each(sampled, draws)], there)
    everything = index.all_records(sampled)
    assert [records.tolist() for records in everything] == [np.flatnonzero(np.array(owner) == patient).tolist() for patient in there]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 10))
def test_physical_batches_hold_whole_patients(sizes: list[int], most_records: int) -> None:
    patients = [np.full(size, number) for number, size in enumerate(sizes)]
    groups = list(whole_patients(patients, most_records))
    assert [patient[0] for group in groups for patient in group] == list(range(len(sizes)))  # each once, in order, whole
    assert all(len(group) == 1 or sum(map(len, group)) <= most_records for group in groups)
    for group, following in itertools.pairwise(groups):
        assert sum(map(len, group)) + len(following[0]) > most_records  # none smaller than need be


def test_a_draw_of_one_is_still_the_patients_own_record() -> None:
    """The largest uniform is 1: it must neither leave a unit out at rate 1 nor reach the next patient's record."""

    class Ones(KeyedStream):
        def uniforms(self, count: int) -> np.ndarray:
            return np.ones(count)

        def words(self, count: int) -> np.ndarray:
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    index, ones = PatientIndex(cohort_of([0, 1, 0, 2], 3)), Ones(bytes(32))
    assert index.one_record_each(np.arange(3), ones).tolist() == [2, 1, 3]
    assert poisson_sample(4, 1.0, ones).tolist() == [0, 1, 2, 3]


def test_every_record_of_a_patient_is_as_likely() -> None:
    """Patients with 1 to 5 records in mixed order; chi-square over 20,000 draws each, false-alarm rate 1e-4 in all."""
    owner = np.random.default_rng(4).permutation(np.repeat(np.arange(5), np.arange(1, 6))).tolist()
    index, draws = PatientIndex(cohort_of(owner, 5)), stream(5)
    seen = np.bincount(np.concatenate([index.one_record_each(np.arange(5), draws) for _ in range(20_000)]), minlength=15)
    for patient in range(5):
        own = seen[np.array(owner) == patient]
        assert own.sum() == 20_000 and (own > 0).all()
        assert patient == 0 or stats.chisquare(own).pvalue > 2e-5


@pytest.mark.parametrize(("unit", "per_patient"), [("patient", "one"), ("patient", "all"), ("record", "one")])
def test_a_batch_follows_the_plans_unit_and_rate(
    unit: str, per_patient: str, make_plan: Callable[..., SitePlan], make_patients: Callable[..., Cohort]
) -> None:
    """Mean number of units over 4,000 batches within five standard errors of rate x units, whatever the declared size says."""
    cohort = make_patients(25, most_records=4)
    plan, index, draws = make_plan(unit=unit, sample_rate=0.3, declared_size=1000), PatientIndex(cohort), stream(6)
    units = cohort.num_patients if unit == "patient" else cohort.num_records
    batches = [sample_units(cohort, index, plan, per_patient, draws) for _ in range(4000)]
    assert np.mean([len(batch) for batch in batches]) == pytest.approx(0.3 * units, abs=5 * np.sqrt(units * 0.21 / 4000))
    records = [np.concatenate([*batch, []]).astype(int) if isinstance(batch, list) else batch for batch in batches]
    assert all(len(np.unique(batch)) == len(batch) for batch in records)
    assert np.unique(np.concatenate(records)).size == cohort.num_records  # every record is reachable
    if unit == "patient" and per_patient == "one":
        assert all(len(np.unique(cohort.patient_of_record[batch])) == len(batch) for batch in records)
    if per_patient == "all":
        counts = np.bincount(cohort.patient_of_record)
        for batch in records[:100]:
            owners, seen = np.unique(cohort.patient_of_record[batch], return_counts=True)
            assert np.array_equal(seen, counts[owners])


def test_global_seeds_do_not_matter(make_patients: Callable[..., Cohort]) -> None:
    first = poisson_sample(1000, 0.3, stream(7))
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)  # what somebody else may have done
        torch.manual_seed(seed)
        assert np.array_equal(poisson_sample(1000, 0.3, stream(7)), first)
    assert not np.array_equal(poisson_sample(1000, 0.3, stream(8)), first)


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 100))
def test_a_pass_without_privacy_sees_every_record_once(num_records: int, batch_size: int, seed: int) -> None:
    batches = shuffled_batches(num_records, batch_size, np.random.default_rng(seed))
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(num_records))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_of_a_round(make_study: Callable[..., Study]) -> None:
    plain = make_study(privacy={"unit": "none"}, training={"local_epochs": 3, "batch_size": 10})
    assert [len(batch) for batch in round_batches(25, plain, np.random.default_rng(0))] == [10, 10, 5] * 3
    stepped = plain.replace(training={"local_steps": 4})
    batches = round_batches(25, stepped, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [10, 10, 5, 10]
    assert round_batches(0, stepped, np.random.default_rng(0)) == []
