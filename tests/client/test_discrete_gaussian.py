"""The sampler is exact: its law is compared with the probabilities of the paper's definitions, at every size of variance.

Every test of a distribution has fixed keys; the false-alarm rate is what a fresh key would have.
"""

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from client.discrete_gaussian import (
    BLOCK_BYTES,
    RandomBytes,
    keyed_bytes,
    sample_bernoulli,
    sample_bernoulli_exp,
    sample_discrete_gaussian,
    sample_discrete_laplace,
    sample_uniform,
)
from shared.seeding import derive_key

FALSE_ALARM = 1e-5  # of each chi-square test
VARIANCES = [
    Fraction(1, 40),
    Fraction(1, 7),
    Fraction(1, 2),
    Fraction(1),
    Fraction(5, 3),
    Fraction(4),
    Fraction(22, 7),
    Fraction(101, 2),
    Fraction(3000),
]


def source(index: int) -> RandomBytes:
    return keyed_bytes(derive_key(3, "test of the discrete Gaussian", index))


def chi_square(draws: list[int], log_weight: Callable[[int], float], reach: int) -> float:
    """p-value of the draws under probabilities proportional to exp(log_weight) on the integers; cells below 10 expected are put together."""
    support = range(-reach, reach + 1)
    weights = [math.exp(log_weight(x)) for x in support]
    whole = math.fsum(weights)
    expected = {x: len(draws) * weight / whole for x, weight in zip(support, weights, strict=True)}
    counts, large = Counter(draws), [x for x in support if expected[x] >= 10]
    seen, due = [counts[x] for x in large], [expected[x] for x in large]
    rest_due = len(draws) - math.fsum(due)
    if rest_due < 10:  # the rarest large cell takes the rest in
        seen[0], due[0] = seen[0] + len(draws) - sum(seen), due[0] + rest_due
    else:
        seen, due = [*seen, len(draws) - sum(seen)], [*due, rest_due]
    statistic = math.fsum((a - b) ** 2 / b for a, b in zip(seen, due, strict=True))
    return float(stats.chi2.sf(statistic, len(due) - 1)) if len(due) > 1 else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_law_is_the_discrete_gaussian(variance: Fraction) -> None:
    """20,000 draws against exp(-x^2 / 2 sigma^2); chi-square, false-alarm rate 1e-5 each."""
    random_bytes = source(VARIANCES.index(variance))
    draws = [sample_discrete_gaussian(variance, random_bytes) for _ in range(20_000)]
    assert all(type(draw) is int for draw in draws)
    reach = math.ceil(12 * math.sqrt(variance)) + 3
    assert chi_square(draws, lambda x: -x * x / (2 * float(variance)), reach) > FALSE_ALARM


@pytest.mark.parametrize("t", [1, 2, 5, 40])
def test_the_proposal_is_the_discrete_laplace(t: int) -> None:
    """Algorithm 2; chi-square, false-alarm rate 1e-5 each."""
    random_bytes = source(100 + t)
    draws = [sample_discrete_laplace(t, random_bytes) for _ in range(20_000)]
    assert chi_square(draws, lambda x: -abs(x) / t, 40 * t) > FALSE_ALARM


@pytest.mark.parametrize("gamma", [Fraction(0), Fraction(1, 10**9), Fraction(1, 3), Fraction(1), Fraction(7, 5), Fraction(5, 2), Fraction(4)])
def test_coins_of_probability_exp_minus_gamma(gamma: Fraction) -> None:
    """Algorithm 1: binomial test of 40,000 throws, false-alarm rate 1e-5 each."""
    random_bytes = source(200 + gamma.numerator)
    heads = sum(sample_bernoulli_exp(gamma.numerator, gamma.denominator, random_bytes) for _ in range(40_000))
    assert stats.binomtest(heads, 40_000, math.exp(-gamma)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("below", [1, 2, 3, 7, 256, 257])
def test_uniform_integers(below: int) -> None:
    """Chi-square of 20,000 draws, false-alarm rate 1e-5 each; every value and no other."""
    random_bytes = source(300 + below)
    counts = np.bincount([sample_uniform(below, random_bytes) for _ in range(20_000)], minlength=below)
    assert len(counts) == below and counts.min() > 0
    assert below == 1 or stats.chisquare(counts).pvalue > FALSE_ALARM


def test_large_integers_use_all_of_their_range() -> None:
    random_bytes, below = source(400), 3 * 2**120
    draws = [sample_uniform(below, random_bytes) for _ in range(2000)]
    assert max(draws) < below and stats.kstest([draw / below for draw in draws], "uniform").pvalue > FALSE_ALARM
    assert not any(sample_bernoulli(0, below, random_bytes) for _ in range(50))
    assert all(sample_bernoulli(below, below, random_bytes) for _ in range(50))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [3, 10**6, 10**12])
def test_symmetry_and_standard_deviation(sigma: int) -> None:
    """20,000 draws: standard deviation within 3 % (6 standard errors), signs and mean within 5 (1 in 2 million each)."""
    random_bytes = source(500 + len(str(sigma)))
    draws = np.array([sample_discrete_gaussian(sigma**2, random_bytes) for _ in range(20_000)], dtype=np.float64) / sigma
    assert draws.std() == pytest.approx(1, rel=0.03)
    assert abs(draws.mean()) < 5 / math.sqrt(20_000)
    assert abs((draws > 0).sum() - (draws < 0).sum()) < 5 * math.sqrt(20_000)
    if sigma > 3:
        assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM


def test_a_key_is_one_stream() -> None:
    def draws(index: int) -> list[int]:
        random_bytes = source(index)
        return [sample_discrete_gaussian(50, random_bytes) for _ in range(500)]

    assert draws(1) == draws(1) != draws(2)
    whole, pieces = source(7)(3 * BLOCK_BYTES), source(7)
    cut = b"".join(pieces(length) for length in (1, 0, 13, BLOCK_BYTES - 14, BLOCK_BYTES + 1, 5))
    assert whole.startswith(cut) and len(cut) == 2 * BLOCK_BYTES + 6


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vector 1: zero key, zero nonce, block 0."""
    assert keyed_bytes(bytes(32))(16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_a_draw_takes_few_random_bytes() -> None:
    """What a draw costs is the number of its trials; the mean over 2,000 draws has a standard error of a few per cent."""
    random_bytes, taken = source(8), 0

    def counted(number: int) -> bytes:
        nonlocal taken
        taken += number
        return random_bytes(number)

    for _ in range(2000):
        sample_discrete_gaussian((5 * 2**20) ** 2, counted)
    assert taken < 2000 * 80  # 62 in the mean
