"""Exact samples of the discrete Gaussian, by integer arithmetic alone (Canonne, Kamath and Steinke 2020, algorithms 1 to 3).

N_Z(0, sigma^2) gives each integer x with probability proportional to exp(-x^2 / (2 sigma^2)). From uniform random bits the law is exact: no
floating point decides anything, so there are no low bits that could tell what a rounded Gaussian was added to (Mironov 2012). How long a
draw takes depends on the draw, as in the paper; nobody should be shown the time of a single one.
"""

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

RandomBytes = Callable[[int], bytes]  # n -> n bytes, uniform and independent of all before

KEY_BYTES = 32
BLOCK_BYTES = 4096  # of keystream, made at once


def keyed_bytes(key: bytes) -> RandomBytes:
    """The ChaCha20 keystream of a 32-byte key. One key is one stream: use it for one release and nothing else."""
    assert len(key) == KEY_BYTES
    keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    block, used = b"", 0

    def take(count: int) -> bytes:
        nonlocal block, used
        if used + count > len(block):
            block, used = block[used:] + keystream.update(bytes(max(count, BLOCK_BYTES))), 0
        used += count
        return block[used - count : used]

    return take


def sample_uniform(below: int, random_bytes: RandomBytes) -> int:
    """An integer uniform on {0, ..., below - 1}: as many bits as `below - 1` has, again until they fit."""
    bits = (below - 1).bit_length()
    count = (bits + 7) // 8
    while True:
        value = int.from_bytes(random_bytes(count), "big") >> (8 * count - bits)
        if value < below:
            return value


def sample_bernoulli(numerator: int, denominator: int, random_bytes: RandomBytes) -> bool:
    """True with probability numerator / denominator, which is in [0, 1]."""
    return sample_uniform(denominator, random_bytes) < numerator


def sample_bernoulli_exp(numerator: int, denominator: int, random_bytes: RandomBytes) -> bool:
    """True with probability exp(-gamma), gamma = numerator / denominator >= 0 (algorithm 1)."""
    whole, rest = divmod(numerator, denominator)
    return all(_bernoulli_exp_to_one(1, 1, random_bytes) for _ in range(whole)) and _bernoulli_exp_to_one(rest, denominator, random_bytes)


def _bernoulli_exp_to_one(numerator: int, denominator: int, random_bytes: RandomBytes) -> bool:
    """Algorithm 1 for gamma in [0, 1]: the first failure of Bernoulli(gamma / k), k = 1, 2, ..., comes at an odd k with probability exp(-gamma)."""
    k = 1
    while sample_bernoulli(numerator, denominator * k, random_bytes):
        k += 1
    return k % 2 == 1


def sample_discrete_laplace(t: int, random_bytes: RandomBytes) -> int:
    """An integer y with probability proportional to exp(-|y| / t) (algorithm 2 with s = 1)."""
    while True:
        u = sample_uniform(t, random_bytes)
        if not sample_bernoulli_exp(u, t, random_bytes):
            continue
        v = 0
        while sample_bernoulli_exp(1, 1, random_bytes):
            v += 1
        y = u + t * v
        negative = sample_bernoulli(1, 2, random_bytes)
        if not (negative and y == 0):  # else zero would come twice as often
            return -y if negative else y


def sample_discrete_gaussian(sigma_squared: Fraction | int, random_bytes: RandomBytes) -> int:
    """An integer y with probability proportional to exp(-y^2 / (2 sigma_squared)) (algorithm 3).

    Args:
        sigma_squared: above 0; exact. The variance of the result is at most this, and all but equal to it from 1 on.

    >>> sample_discrete_gaussian(Fraction(9, 4), keyed_bytes(bytes(32))) == sample_discrete_gaussian(Fraction(9, 4), keyed_bytes(bytes(32)))
    True
    """
    n, d = sigma_squared.numerator, sigma_squared.denominator
    assert n > 0
    t = isqrt(n // d) + 1  # floor(sigma) + 1
    while True:
        y = sample_discrete_laplace(t, random_bytes)
        # gamma = (|y| - sigma^2 / t)^2 / (2 sigma^2), over the common denominator 2 n d t^2
        if sample_bernoulli_exp((abs(y) * d * t - n) ** 2, 2 * n * d * t * t, random_bytes):
            return y
