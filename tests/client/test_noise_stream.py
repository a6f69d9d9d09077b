"""The noise is Gaussian with the standard deviation asked for, and no two keys or draws share any of it.

Every test of a distribution has fixed keys; the false-alarm rate is what a fresh key would have.
"""

import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from client.noise import GaussianNoise, KeyedStream
from client.private_training import Randomness
from shared.seeding import derive_key


def key(index: int) -> bytes:
    return derive_key(11, "test of noise", index)


def draws(index: int, count: int, std: float = 1.0) -> np.ndarray:
    return GaussianNoise(key(index)).normal((count,), std).numpy()


@pytest.mark.parametrize("std", [1e-8, 0.37, 1.0, 4.3e6])
def test_standard_deviation_and_mean(std: float) -> None:
    """100,000 draws: the standard deviation is known to 0.22 %, so 3 % is 13 standard errors; the mean within 5 (1 in 2 million)."""
    values = draws(1, 100_000, std)
    assert values.std() == pytest.approx(std, rel=0.03)
    assert abs(values.mean()) < 5 * std / np.sqrt(100_000)


@pytest.mark.parametrize("shape", [(100_000,), (101, 991)])
def test_normality(shape: tuple[int, ...]) -> None:
    """Kolmogorov-Smirnov and the fourth moment; false-alarm rate 1e-4 and 6e-7."""
    values = GaussianNoise(key(2)).normal(shape, 2.5).numpy().ravel() / 2.5
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(stats.kurtosis(values)) < 5 * np.sqrt(24 / values.size)
    assert abs(stats.skew(values)) < 5 * np.sqrt(6 / values.size)


def test_the_two_halves_of_box_and_muller_are_independent() -> None:
    """Values, squares and magnitudes of cosine and sine halves: correlations within 5 / sqrt(n), 1 in 2 million each."""
    values = draws(3, 100_000)
    first, second = values[:50_000], values[50_000:]
    for transform in (np.asarray, np.square, np.abs):
        assert abs(np.corrcoef(transform(first), transform(second))[0, 1]) < 5 / np.sqrt(50_000)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(100_000)


def test_no_correlation_between_keys() -> None:
    """Twenty keys, 190 pairs, 5 / sqrt(n): a false alarm in 9,000."""
    rows = np.array([draws(index, 4000) for index in range(20)])
    assert np.abs(np.corrcoef(rows) - np.eye(20)).max() < 5 / np.sqrt(4000)


def test_a_key_is_one_stream() -> None:
    assert np.array_equal(draws(1, 999), draws(1, 999))
    assert not np.array_equal(draws(1, 999), draws(2, 999))
    noise = GaussianNoise(key(1))
    steps = [noise.normal((500,), 1.0).numpy() for _ in range(4)]
    assert len({step.tobytes() for step in steps}) == 4  # no step repeats another's noise
    assert abs(np.corrcoef(steps) - np.eye(4)).max() < 6 / np.sqrt(500)
    assert np.array_equal(steps[0], draws(1, 500))


def test_keys_that_differ_in_one_bit_share_nothing() -> None:
    near = bytes([key(1)[0] ^ 1]) + key(1)[1:]
    other = GaussianNoise(near).normal((4000,), 1.0).numpy()
    assert abs(np.corrcoef(draws(1, 4000), other)[0, 1]) < 5 / np.sqrt(4000)


def test_noise_of_steps_rounds_and_sites_is_unrelated_whatever_the_global_seeds() -> None:
    """Two sites, three rounds, three steps: 18 rows, 153 pairs, 5 / sqrt(n): a false alarm in 11,000. Global seeds the same for all."""
    rows = []
    for site in ("north", "south"):
        for number in range(3):
            random.seed(0)
            np.random.seed(0)  # what somebody else may have done
            torch.manual_seed(0)
            randomness = Randomness.from_key(derive_key(5, site, number))
            rows += [randomness.noise.normal((4000,), 1.0).numpy() for _ in range(3)]
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 5 / np.sqrt(4000)


def test_sampling_and_noise_of_one_key_are_unrelated() -> None:
    randomness = Randomness.from_key(key(1))
    sampling, noise, same = randomness.sampling.uniforms(4000), randomness.noise.normal((4000,), 1.0).numpy(), KeyedStream(key(1)).uniforms(4000)
    assert np.abs(np.corrcoef([sampling, noise, same]) - np.eye(3)).max() < 5 / np.sqrt(4000)
    again = Randomness.from_key(key(1))
    assert np.array_equal(again.sampling.uniforms(4000), sampling) and np.array_equal(again.noise.normal((4000,), 1.0).numpy(), noise)


def test_uniforms_have_53_bits_and_are_never_zero() -> None:
    """With 24 or 32 bits no draw passes 5.8 or 6.7 standard deviations; with 53 the tail reaches 8.6."""
    values = KeyedStream(key(4)).uniforms(100_000)
    assert values.min() > 0 and values.max() <= 1
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert len(np.unique(values)) == 100_000  # 32 bits would collide with probability 0.69
    low_bits = (values * 2**53).astype(np.uint64) & np.uint64(2**20 - 1)
    assert stats.kstest(low_bits / 2**20, "uniform").pvalue > 1e-4
    assert np.sqrt(-2 * np.log(2.0**-54)) > 8.6
    assert np.isfinite(draws(4, 10)).all()


def test_the_tail_goes_on_to_twelve() -> None:
    """It ends at sqrt(-2 log 2**-107) = 12.2, where no delta looks; torch's own float32 noise ends at 5.768."""

    class Smallest(KeyedStream):
        def uniforms(self, count: int) -> np.ndarray:
            return np.where(np.arange(count) < 2 * count // 3, 2.0**-54, 1.0)

    noise = GaussianNoise(key(5))
    noise._stream = Smallest(key(5))
    assert noise.normal((2,), 1.0)[0].item() == pytest.approx(np.sqrt(2 * 107 * np.log(2)), abs=1e-3)


@pytest.mark.parametrize("zeros", [24, 32, 53])
def test_the_tail_beyond_what_24_bit_noise_can_give_has_its_law(zeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of words that begin with `zeros` zeros, one in 2**zeros, come radii that torch's float32 noise never has: r**2 / 2 is there ln(2**zeros) plus Exp(1)."""
    words, count = KeyedStream.words, 20_000

    def beginning_with_zeros(stream: KeyedStream, wanted: int) -> np.ndarray:
        drawn = words(stream, wanted)
        drawn[:count] >>= np.uint64(zeros)
        return drawn

    monkeypatch.setattr(KeyedStream, "words", beginning_with_zeros)
    draws = GaussianNoise(key(5)).normal((2, count), 1.0)
    beyond = (draws.square().sum(dim=0) / 2 - zeros * np.log(2)).numpy()
    assert beyond.min() > -1e-9
    assert stats.kstest(beyond, stats.expon.cdf).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 3), (5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    values = GaussianNoise(key(6)).normal(shape, 1.0)
    assert values.shape == torch.Size(shape) and values.dtype == torch.float64 and torch.isfinite(values).all()


@pytest.mark.parametrize("count", [0, 1, 8191, 8192, 8193, 20_000])
def test_the_stream_is_that_of_chacha20_in_pieces_of_any_size(count: int) -> None:
    reference = Cipher(algorithms.ChaCha20(key(8), bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    expected = ((np.frombuffer(reference, dtype="<u8") >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    whole, pieces = KeyedStream(key(8)), KeyedStream(key(8))
    assert np.array_equal(whole.uniforms(count), expected)
    assert np.array_equal(np.concatenate([pieces.uniforms(count // 3), pieces.uniforms(count - count // 3)]), expected)


def test_torchs_generator_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    first = draws(7, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert np.array_equal(draws(7, 10), first)


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError):
        GaussianNoise(b"short")
