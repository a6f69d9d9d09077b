"""Sum and noise on one grid: exact addition, a stated sensitivity, enough noise, and no bit that tells what was in the sum."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from client.noise import GaussianNoise, NoiseGrid
from shared.privacy import PrivacyEvent, epsilon_of
from shared.seeding import derive_key

CLIPS = st.floats(1e-6, 1e6)
SIZES = st.integers(1, 10**8)
TRIALS = 200_000
DELTA = 1e-5


def key(index: int) -> bytes:
    return derive_key(12, "test of the grid", index)


@given(CLIPS, SIZES)
def test_the_grid_is_fine_and_follows_from_public_numbers(clip: float, size: int) -> None:
    grid = NoiseGrid.of(clip, size)
    assert math.frexp(grid.spacing)[0] == 0.5  # a power of two
    rounding = grid.spacing * math.sqrt(size)
    assert clip * 2**-13.001 < rounding <= clip * 2**-12
    assert clip * (1 + 1e-9) + rounding <= grid.sensitivity <= clip * (1 + 2**-11)
    assert NoiseGrid.of(clip, size) == grid


@given(CLIPS, st.integers(1, 300), st.integers(0, 10**6))
def test_rounding_moves_neighbours_apart_by_no_more_than_is_claimed(clip: float, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = NoiseGrid.of(clip, size)
    without = torch.from_numpy(rng.normal(size=size) * clip * 10)
    unit = rng.normal(size=size)
    with_unit = without + torch.from_numpy(unit / np.linalg.norm(unit) * clip)
    assert float(torch.linalg.vector_norm(grid.round(with_unit) - grid.round(without))) <= grid.sensitivity


@given(CLIPS, st.floats(0.3, 1e6), st.integers(1, 300), st.integers(0, 10**6))
def test_a_release_is_the_rounded_sum_plus_the_rounded_noise_exactly(clip: float, multiplier: float, size: int, seed: int) -> None:
    grid = NoiseGrid.of(clip, size)
    total = torch.from_numpy(np.random.default_rng(seed).normal(size=size) * clip * 100)
    release = grid.release(total, GaussianNoise(key(seed)), multiplier)
    noise = GaussianNoise(key(seed)).normal((size,), multiplier * grid.sensitivity / grid.spacing).round()
    points = [int(value) for value in release / grid.spacing]
    assert points == [int(a) + int(b) for a, b in zip(torch.round(total / grid.spacing), noise, strict=True)]  # Python's whole numbers
    assert all(point * grid.spacing == value for point, value in zip(points, release.tolist(), strict=True))  # multiples of the grid


@pytest.mark.parametrize(("clip", "multiplier", "size"), [(1.0, 1.0, 100_000), (1e-6, 0.5, 99_999), (300.0, 20.0, 100_000)])
def test_the_noise_has_the_standard_deviation_asked_for(clip: float, multiplier: float, size: int) -> None:
    """100,000 draws know it to 0.22 %, so 3 % is 13 standard errors; the normal law by Kolmogorov-Smirnov at 1e-4."""
    total = torch.zeros(size, dtype=torch.float64)
    noise = NoiseGrid.of(clip, size).release(total, GaussianNoise(key(1)), multiplier).numpy()
    assert noise.std() == pytest.approx(multiplier * clip, rel=0.03)
    assert abs(noise.mean()) < 5 * multiplier * clip / math.sqrt(size)
    assert stats.kstest(noise / (multiplier * NoiseGrid.of(clip, size).sensitivity), "norm").pvalue > 1e-4


Release = Callable[[float, int], np.ndarray]


def naive(total: float, seed: int) -> np.ndarray:
    """Independent releases of a sum in float32 with torch's noise of standard deviation 1, as is common."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.full((TRIALS,), total) + torch.normal(0.0, 1.0, size=(TRIALS,), generator=generator)).numpy().astype(np.float64)


def ours(total: float, seed: int) -> np.ndarray:
    """The same with ours, as the optimizer makes a gradient of it: on the grid of one parameter, then float32."""
    release = NoiseGrid.of(1.0, 1).release(torch.full((TRIALS,), total, dtype=torch.float64), GaussianNoise(key(seed)), 1.0)
    return release.to(torch.float32).numpy().astype(np.float64)


def epsilon_at_least(release: Release, bit: int) -> float:
    """A lower bound on epsilon at DELTA: from "no multiple of 2**-bit", neighbours with sums 0 and C = 1.

    Clopper and Pearson's bounds at 1e-6 for each of two probabilities, in both directions.
    """
    hits = [int((np.mod(release(total, seed) * 2.0**bit, 1.0) != 0).sum()) for seed, total in enumerate((0.0, 1.0))]
    low = [float(stats.beta.ppf(1e-6, count, TRIALS - count + 1)) if count else 0.0 for count in hits]
    high = [float(stats.beta.ppf(1 - 1e-6, count + 1, TRIALS - count)) if count < TRIALS else 1.0 for count in hits]
    gains = [(low[0] - DELTA) / high[1], (low[1] - DELTA) / high[0], (1 - high[0] - DELTA) / (1 - low[1]), (1 - high[1] - DELTA) / (1 - low[0])]
    return math.log(max(*gains, 1.0))


@pytest.mark.slow
def test_one_bit_tells_patients_apart_in_naive_noise_and_not_in_ours() -> None:
    """The claim at noise multiplier 1, every patient in every step, is 4.38; false-alarm rate below 2e-4 over all bits."""
    claim = epsilon_of([PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1)], DELTA)
    assert claim == pytest.approx(4.38, abs=0.01)
    assert epsilon_at_least(naive, 24) > 8 > claim
    assert max(epsilon_at_least(ours, bit) for bit in range(30)) < 0.2
    assert epsilon_at_least(ours, 12) == 0.0  # the spacing is 2**-12: every release is on it


def test_the_value_itself_still_tells_what_it_may() -> None:
    """The attack can see at all: "above 1/2" tells sums 0 and C apart, up to about epsilon 0.8, in naive noise and in ours."""
    for release in (naive, ours):
        above = [float((release(total, seed) > 0.5).mean()) for seed, total in enumerate((0.0, 1.0))]
        assert math.log(above[1] / above[0]) == pytest.approx(math.log(stats.norm.cdf(0.5) / stats.norm.cdf(-0.5)), abs=0.03)
