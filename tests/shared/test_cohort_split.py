"""A cohort selects, splits and prints by patient: the split is a keyed hash of the id alone, and no patient is ever printed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cohort import TEST_FRACTION, Cohort, held_out_patients, patient_hash

KEY = b"k" * 32


def make_cohort(records_each: list[int], *, seed: int = 0) -> Cohort:
    """Patients with so many records each, in mixed order; a record's input is its own number."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(len(records_each)), records_each)).astype(np.int64)
    num = len(owner)
    return Cohort(
        inputs=(np.arange(num, dtype=np.float32)[:, None], np.arange(num)[:, None] * 10),
        labels=(np.arange(num) % 2).astype(np.float32),
        patient_of_record=owner,
        patient_ids=tuple(f"patient-{index}" for index in range(len(records_each))),
        attributes={"site": np.array([f"site-{index % 3}" for index in range(len(records_each))])},
        published_test=np.arange(len(records_each)) % 4 == 0,
    )


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=30)


@given(sizes, st.randoms(use_true_random=False))
def test_selecting_keeps_each_patients_records_together(records_each: list[int], random: object) -> None:
    cohort = make_cohort(records_each)
    mask = np.array([random.random() < 0.5 for _ in records_each])  # type: ignore[attr-defined]
    part = cohort.select(mask)
    assert part.patient_ids == tuple(name for name, keep in zip(cohort.patient_ids, mask, strict=True) if keep)
    wanted = np.flatnonzero(mask[cohort.patient_of_record])
    assert np.array_equal(part.inputs[0][:, 0], wanted) and np.array_equal(part.inputs[1][:, 0], wanted * 10)
    assert np.array_equal(part.labels, wanted % 2)
    owners = [part.patient_ids[index] for index in part.patient_of_record]
    assert owners == [cohort.patient_ids[index] for index in cohort.patient_of_record[wanted]]
    assert part.published_test is not None and np.array_equal(part.published_test, cohort.published_test[mask])  # type: ignore[index]
    assert np.array_equal(part.attributes["site"], cohort.attributes["site"][mask])
    by_index = cohort.select(np.flatnonzero(mask)[::-1].copy())
    assert by_index.patient_ids == part.patient_ids and np.array_equal(by_index.inputs[0], part.inputs[0])


@given(sizes)
def test_every_patient_weighs_one(records_each: list[int]) -> None:
    cohort = make_cohort(records_each)
    assert np.bincount(cohort.patient_of_record, weights=cohort.record_weights()) == pytest.approx(np.ones(len(records_each)))
    first = [np.flatnonzero(cohort.patient_of_record == index)[0] for index in range(len(records_each))]
    assert np.array_equal(cohort.label_of_patient(), cohort.labels[first])


def test_a_cohort_prints_no_patient() -> None:
    cohort = make_cohort([1, 2, 3])
    assert repr(cohort) == str(cohort) == f"{cohort}" == "Cohort(3 patients, 6 records)"
    assert repr(dataclasses.replace(cohort, synthetic=True)) == "Cohort(3 patients, 6 records, synthetic)"


@given(st.permutations(list(range(25))), st.integers(1, 5))
def test_the_split_depends_on_key_and_identifier_alone(order: list[int], folds: int) -> None:
    cohort = dataclasses.replace(make_cohort([1] * 25), published_test=None)
    moved = dataclasses.replace(cohort, patient_ids=tuple(cohort.patient_ids[index] for index in order))
    for fold in range(1, folds + 1):
        before = dict(zip(cohort.patient_ids, held_out_patients(cohort, KEY, fold=fold, folds=folds), strict=True))
        after = dict(zip(moved.patient_ids, held_out_patients(moved, KEY, fold=fold, folds=folds), strict=True))
        assert before == after
        smaller = moved.select(np.arange(10))
        assert dict(zip(smaller.patient_ids, held_out_patients(smaller, KEY, fold=fold, folds=folds), strict=True)).items() <= before.items()


@given(st.integers(2, 10))
def test_folds_test_every_patient_exactly_once(folds: int) -> None:
    cohort = make_cohort([1] * 60)
    tested = np.sum([held_out_patients(cohort, KEY, fold=fold, folds=folds) for fold in range(1, folds + 1)], axis=0)
    assert np.array_equal(tested, np.ones(60))


def test_shares_are_as_declared() -> None:
    """Binomial with 6,000 patients: five standard deviations, a false alarm in 2 million for each count; fixed keys."""
    cohort = dataclasses.replace(make_cohort([1] * 6000), published_test=None)
    for key in (KEY, b"another key"):
        assert held_out_patients(cohort, key).mean() == pytest.approx(TEST_FRACTION, abs=5 * (0.3 * 0.7 / 6000) ** 0.5)
        for fold in range(1, 5):
            assert held_out_patients(cohort, key, fold=fold, folds=4).mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 6000) ** 0.5)
    agreement = (held_out_patients(cohort, KEY) == held_out_patients(cohort, b"another key")).mean()
    assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=5 * 0.5 / 6000**0.5)  # another key is another split


def test_a_published_split_is_taken_where_there_is_one_fold() -> None:
    cohort = make_cohort([1] * 12)
    assert np.array_equal(held_out_patients(cohort, KEY), cohort.published_test)
    assert not np.array_equal(held_out_patients(cohort, KEY, fold=1, folds=2), cohort.published_test)


def test_patient_hashes_are_keyed() -> None:
    assert patient_hash(KEY, "a") == patient_hash(KEY, "a") and len(patient_hash(KEY, "a")) == 32
    assert len({patient_hash(KEY, "a"), patient_hash(KEY, "b"), patient_hash(b"", "a")}) == 3


@given(st.lists(st.integers(0, 11), min_size=1, max_size=60), st.integers(0, 1000))
def test_dividing_a_cohort_is_selecting_each_part(owner: list[int], seed: int) -> None:
    """Parts share no patient, may be empty, and need not hold everybody; patients may have several records or none."""
    rng = np.random.default_rng(seed)
    cohort = Cohort(
        inputs=(rng.normal(size=(len(owner), 3)),),
        labels=rng.integers(0, 2, len(owner)),
        patient_of_record=np.array(owner),
        patient_ids=tuple(f"p{index}" for index in range(12)),
        attributes={"ward": np.array([f"w{index % 3}" for index in range(12)])},
        published_test=rng.random(12) < 0.5,
    )
    order = rng.permutation(12)
    parts = {"a": order[:4], "b": order[4:4], "c": order[4:10]}
    for name, part in cohort.divide(parts).items():
        expected = cohort.select(parts[name])
        assert part.patient_ids == expected.patient_ids
        assert np.array_equal(part.patient_of_record, expected.patient_of_record)
        assert np.array_equal(part.inputs[0], expected.inputs[0]) and np.array_equal(part.labels, expected.labels)
        assert np.array_equal(part.attributes["ward"], expected.attributes["ward"])
        assert np.array_equal(part.published_test, expected.published_test)
