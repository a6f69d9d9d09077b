"""Randomness depends on what is drawn for, never on the order of calls."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shared.seeding import derive, derive_key, generator

steps = st.one_of(st.text(max_size=10), st.integers(-(2**40), 2**40))
paths = st.lists(steps, max_size=5).map(tuple)
seeds = st.integers(0, 2**63 - 1)


@given(seeds, paths, seeds, paths)
def test_distinct_paths_have_distinct_keys(seed: int, path: tuple[str | int, ...], other_seed: int, other: tuple[str | int, ...]) -> None:
    same = (seed, path) == (other_seed, other)
    assert (derive_key(seed, *path) == derive_key(other_seed, *other)) == same
    assert len(derive_key(seed, *path)) == 32 and 0 <= derive(seed, *path) < 2**63


def test_paths_cannot_be_confused_by_concatenation_or_type() -> None:
    alike = [(7, "a", "b"), (7, "ab"), (7, "a,b"), (7, 'a","b'), (7, "1"), (7, 1), (7, 11), (7, 1, 1), (71,), (7, ""), (7,)]
    assert len({derive_key(*path) for path in alike}) == len(alike)


def test_seeds_beyond_32_bits_count() -> None:
    """torch's CPU generator takes 5 and 5 + 2**32 for the same."""
    assert generator(5).random() != generator(5 + 2**32).random()


def test_a_stream_does_not_depend_on_other_calls() -> None:
    alone = generator(7, "round", 3, "site").random(5)
    first, second = generator(7, "round", 3, "site"), generator(7, "round", 4, "site")
    mixed = [(first.random(), second.random())[0] for _ in range(5)]
    assert np.array_equal(alone, mixed)


def test_streams_of_neighbouring_paths_are_uniform_and_uncorrelated() -> None:
    """False-alarm rate below 1e-6 each, and the seeds are fixed."""
    rows = np.array([generator(7, "site", index).random(2000) for index in range(20)])
    assert stats.kstest(rows.ravel(), "uniform").pvalue > 1e-6
    correlation = np.corrcoef(rows) - np.eye(20)
    assert np.abs(correlation).max() < 6 / np.sqrt(2000)
