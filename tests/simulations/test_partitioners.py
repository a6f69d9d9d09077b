"""Every patient at exactly one site, every minimum held or refused with a number that works, for every seed and skew."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cohort import Cohort
from shared.errors import PartitionError
from shared.study import Federation
from simulations.partitioners import Partition, draw_shares, largest_remainder, partition_cohort

KINDS = ("iid", "dirichlet", "quantity", "shards")


def cohort_of(labels: np.ndarray, *, records: int = 1, **attributes: np.ndarray) -> Cohort:
    """A cohort with these labels of patients, each with `records` records, shuffled."""
    patient_of_record = np.random.default_rng(0).permutation(np.repeat(np.arange(len(labels)), records))
    return Cohort(
        inputs=(patient_of_record[:, None].astype(np.float32),),
        labels=labels[patient_of_record],
        patient_of_record=patient_of_record,
        patient_ids=tuple(f"p{index}" for index in range(len(labels))),
        attributes=attributes,
    )


def labels_of(num_patients: int, num_classes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, num_patients - num_classes)])).astype(np.int64)


def check_partition(partition: Partition, num_patients: int, federation: Federation) -> None:
    everyone = np.concatenate(list(partition.values()))
    assert np.array_equal(np.sort(everyone), np.arange(num_patients))
    assert all(part.dtype == np.int64 and np.array_equal(part, np.sort(part)) for part in partition.values())
    assert min(len(part) for part in partition.values()) >= federation.min_patients


@st.composite
def federations(draw: st.DrawFn) -> Federation:
    return Federation(
        sites=draw(st.integers(1, 25)),
        partition=draw(st.sampled_from(KINDS)),
        alpha=10.0 ** draw(st.floats(-3, 3)),
        shards_per_site=draw(st.integers(1, 9)),
        min_patients=draw(st.integers(2, 12)),
        min_per_class=draw(st.integers(0, 4)),
    )


@pytest.mark.slow
@settings(max_examples=150)
@given(federation=federations(), num_patients=st.integers(5, 250), num_classes=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
def test_every_partition_is_whole_holds_its_minima_or_says_what_would_work(
    federation: Federation, num_patients: int, num_classes: int, seed: int
) -> None:
    labels = labels_of(num_patients, num_classes, seed % 1000)
    cohort = cohort_of(labels)
    try:
        partition = partition_cohort(cohort, federation, seed=seed)
    except PartitionError as error:
        suggestion = re.search(r"at most (\d+) sites would work", error.remedy)
        if suggestion is None:
            assert "more patients" in error.remedy or "min_per_class = 0" in error.remedy
            return
        works = int(suggestion[1])
        assert 1 <= works < (federation.sites or 0)
        fewer = Federation(**{**federation.model_dump(), "sites": works})
        check_partition(partition_cohort(cohort, fewer, seed=seed), num_patients, fewer)
        return
    assert len(partition) == federation.sites
    check_partition(partition, num_patients, federation)
    if federation.partition == "dirichlet":
        for part in partition.values():
            assert np.bincount(labels[part], minlength=num_classes).min() >= federation.min_per_class
    again = partition_cohort(cohort, federation, seed=seed)
    assert list(again) == list(partition) and all(np.array_equal(again[name], part) for name, part in partition.items())


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_is_another_partition(kind: str) -> None:
    cohort = cohort_of(labels_of(200, 3, 0))
    federation = Federation(sites=4, partition=kind)
    first, second = (partition_cohort(cohort, federation, seed=seed) for seed in (1, 2))
    assert any(not np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e-3, 1e3, 1e12, 1e308])
@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_extreme_concentrations_end_and_are_whole(kind: str, alpha: float) -> None:
    federation = Federation(sites=7, partition=kind, alpha=alpha, min_patients=3)
    partition = partition_cohort(cohort_of(labels_of(300, 3, 1)), federation, seed=5)
    check_partition(partition, 300, federation)
    sizes = sorted(len(part) for part in partition.values())
    if alpha >= 1e3:
        assert sizes[-1] - sizes[0] <= 25
    if alpha <= 1e-3 and kind == "quantity":
        assert sizes[-1] >= 270


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = labels_of(2000, 2, 3)

    def spread(alpha: float) -> float:
        partition = partition_cohort(cohort_of(labels), Federation(sites=8, partition="dirichlet", alpha=alpha), seed=1)
        return float(np.std([labels[part].mean() for part in partition.values()]))

    assert spread(0.1) > 5 * spread(1000)


def test_shards_give_a_site_few_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    partition = partition_cohort(cohort_of(labels), Federation(sites=10, partition="shards", shards_per_site=2), seed=1)
    assert max(len(np.unique(labels[part])) for part in partition.values()) <= 4  # a shard of 50 holds one class, at most two
    assert {len(part) for part in partition.values()} == {100}


def test_numbers_are_skewed_by_quantile() -> None:
    numbers = np.random.default_rng(0).normal(size=400).astype(np.float32)
    partition = partition_cohort(cohort_of(numbers), Federation(sites=4, partition="dirichlet", alpha=0.05), seed=2)
    check_partition(partition, 400, Federation(sites=4))
    assert np.std([numbers[part].mean() for part in partition.values()]) > 0.3


def test_labels_that_are_tensors_are_refused_by_label_and_taken_otherwise() -> None:
    masks = np.zeros((40, 3, 3), np.float32)
    with pytest.raises(PartitionError, match="one value"):
        partition_cohort(cohort_of(masks), Federation(sites=2, partition="dirichlet"), seed=1)
    check_partition(partition_cohort(cohort_of(masks), Federation(sites=2, partition="iid"), seed=1), 40, Federation(sites=2))


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_a_patient_stay_together(kind: str) -> None:
    labels = labels_of(120, 2, 4)
    cohort = cohort_of(labels, records=3)
    partition = partition_cohort(cohort, Federation(sites=5, partition=kind), seed=3)
    check_partition(partition, 120, Federation(sites=5))
    seen: set[str] = set()
    for part in partition.values():
        site = cohort.select(part)
        assert site.num_records == 3 * site.num_patients
        original = {int(name[1:]) for name in site.patient_ids}
        assert set(site.inputs[0][:, 0].astype(int)) == original
        assert not seen & set(site.patient_ids)
        seen |= set(site.patient_ids)
    assert len(seen) == 120


@pytest.mark.parametrize("kind", KINDS)
def test_more_sites_than_patients_is_refused_by_number(kind: str) -> None:
    with pytest.raises(PartitionError, match="got 30 patients in all") as caught:
        partition_cohort(cohort_of(labels_of(30, 2, 0)), Federation(sites=31, partition=kind, min_patients=2), seed=1)
    assert re.search(r"at most \d+ sites would work", caught.value.remedy)


def test_too_few_patients_for_one_site_says_so() -> None:
    with pytest.raises(PartitionError, match="give more patients"):
        partition_cohort(cohort_of(labels_of(5, 2, 0)), Federation(sites=1), seed=1)


def test_columns_and_natural_sites_are_taken_as_they_are() -> None:
    wards = np.array((["north"] * 20 + ["south"] * 15 + ["Ost"] * 12), dtype=np.str_)
    cohort = cohort_of(labels_of(47, 2, 0), ward=wards, site=wards[::-1])
    by_column = partition_cohort(cohort, Federation(partition="column", column="ward"), seed=1)
    assert {name: len(part) for name, part in by_column.items()} == {"north": 20, "south": 15, "Ost": 12}
    assert all((wards[part] == name).all() for name, part in by_column.items())
    natural = partition_cohort(cohort, Federation(partition="natural"), seed=1)
    assert all((wards[::-1][part] == name).all() for name, part in natural.items())
    check_partition(natural, 47, Federation(partition="natural"))


def test_columns_that_are_absent_or_too_small_are_named() -> None:
    wards = np.array(["north"] * 20 + ["south"] * 3, dtype=np.str_)
    cohort = cohort_of(labels_of(23, 2, 0), ward=wards)
    with pytest.raises(PartitionError, match="'age', got attributes: ward"):
        partition_cohort(cohort, Federation(partition="column", column="age"), seed=1)
    with pytest.raises(PartitionError, match="data that name their hospitals"):
        partition_cohort(cohort, Federation(partition="natural"), seed=1)
    with pytest.raises(PartitionError, match="got fewer at south"):
        partition_cohort(cohort, Federation(partition="column", column="ward"), seed=1)


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda values: sum(values) > 0),
    total=st.integers(0, 10_000),
)
def test_largest_remainder_adds_up_and_is_within_one(shares: list[float], total: int) -> None:
    normal = np.array(shares) / np.sum(shares)
    counts = largest_remainder(normal, total)
    assert counts.sum() == total
    assert (np.abs(counts - normal * total) < 1 + 1e-6).all()


@given(exponent=st.floats(-308, 308), num_sites=st.integers(1, 50), seed=st.integers(0, 1000))
def test_shares_are_never_nan_and_add_up_to_one(exponent: float, num_sites: int, seed: int) -> None:
    shares = draw_shares(10.0**exponent, num_sites, np.random.default_rng(seed))
    assert np.isfinite(shares).all() and (shares >= 0).all()
    assert shares.sum() == pytest.approx(1)


@pytest.mark.slow
def test_many_sites_are_divided_quickly_enough_to_be_a_unit_test() -> None:
    labels = labels_of(20_000, 2, 0)
    partition = partition_cohort(cohort_of(labels), Federation(sites=1000, partition="dirichlet", alpha=0.1), seed=1)
    check_partition(partition, 20_000, Federation(sites=1000))
    assert next(iter(partition)) == "site-0001" and list(partition) == sorted(partition)
