"""Sampling of sites: a function of (seed, fold, round), with the right size and without favourites."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sampler import sample_sites

NAMES = [f"site-{index}" for index in range(10)]


@given(
    names=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=20, unique=True),
    fraction=st.floats(min_value=0.001, max_value=1.0),
    seed=st.integers(0, 2**63 - 1),
    number=st.integers(1, 1000),
    data=st.data(),
)
def test_the_sample_is_a_function_of_its_arguments_whatever_the_order_of_names(
    names: list[str], fraction: float, seed: int, number: int, data: st.DataObject
) -> None:
    chosen = sample_sites(names, fraction=fraction, seed=seed, fold=1, round_number=number)
    assert chosen == sample_sites(data.draw(st.permutations(names)), fraction=fraction, seed=seed, fold=1, round_number=number)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(names)
    assert len(chosen) == max(1, math.ceil(fraction * len(names) - 1e-9))


@pytest.mark.parametrize(("fraction", "count"), [(0.3, 3), (0.31, 4), (0.7, 7), (1.0, 10), (0.01, 1), (0.1, 1)])
def test_the_count_is_not_moved_by_floating_point(fraction: float, count: int) -> None:
    assert len(sample_sites(NAMES, fraction=fraction, seed=1, fold=1, round_number=1)) == count


def test_seed_fold_and_round_each_change_the_sample() -> None:
    def samples(**fixed: int) -> list[tuple[str, ...]]:
        paths = [
            {"seed": 1, "fold": 1, "round_number": 1, **fixed, key: value}
            for key in {"seed", "fold", "round_number"} - set(fixed)
            for value in range(1, 21)
        ]
        return [tuple(sample_sites(NAMES, fraction=0.5, **path)) for path in paths]

    for key in ("seed", "fold", "round_number"):
        others = {"seed": 1, "fold": 1, "round_number": 1}
        del others[key]
        assert len(set(samples(**others))) > 10, key


def test_every_site_is_asked_about_as_often_as_every_other() -> None:
    """Chi-square over 2,000 rounds of 4 in 10 sites: the statistic is below 27.9 (0.1 % of a chi-square with 9 degrees of freedom; sampling
    without replacement makes it smaller still)."""
    counts = dict.fromkeys(NAMES, 0)
    for number in range(1, 2001):
        for name in sample_sites(NAMES, fraction=0.4, seed=5, fold=1, round_number=number):
            counts[name] += 1
    observed = np.array(list(counts.values()))
    assert observed.sum() == 8000
    assert ((observed - 800) ** 2 / 800).sum() < 27.9
    assert observed.min() > 0
