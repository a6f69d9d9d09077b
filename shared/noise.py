"""Gaussian noise that holds in floating point: ChaCha20 keystream, 53-bit uniforms, Box-Muller in float64, and one grid for sum and noise.

In a deployment the key comes from the operating system and is forgotten, and the stream is ChaCha20. A simulation derives the key from (seed,
round, who, fold), its result says so, and draws are made in float32 of 32 bits each (`SimulatedNoise`), a fourth of the cost: noise from a
seed protects nobody, whatever draws it. One key is one stream: two steps never share noise, and two keys never do. torch's own CPU generator has
32-bit seeds and is not used.

Added in floating point, the low bits of a noised sum tell what was in it (Mironov 2012). So the sum is rounded to a public grid first, the
noise is rounded to the same grid, and the two add without error, as whole numbers below 2**53. A rounded sum plus rounded noise is the
rounding of (rounded sum + noise), hence post-processing of a Gaussian mechanism on the rounded sum, whose sensitivity `NoiseGrid` states.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

KEY_BYTES = 32
ROUNDING_SHARE = 2.0**-12
ARITHMETIC_SHARE = 2.0**-12
_ZEROS = memoryview(bytes(65_536))  # a slice of bytes would be a copy


def subkey(key: bytes, purpose: bytes) -> bytes:
    """A key of its own for each purpose: keyed BLAKE2b."""
    return hashlib.blake2b(purpose, key=key, digest_size=32).digest()


class KeyedStream:
    """A stream of independent uniforms, determined by a 32-byte key: the keystream of ChaCha20 (RFC 8439)."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniforms(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """`(count,)` in (0, 1]: the middles of 2**53 equal intervals, rounded to float64, so never 0 and at least 2**-54."""
        words = self.words(count)
        words >>= np.uint64(11)
        uniform = words.astype(np.float64)
        uniform += 0.5
        uniform *= 2.0**-53
        return uniform

    def words(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """`(count,)` independent 64-bit words."""
        words = np.empty(count, dtype="<u8")
        self.fill(words)
        return words

    def fill(self, words: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> None:
        """The next words of the stream, in place of those in a contiguous array."""
        self.fill_bytes(memoryview(words.view(np.uint8)))  # type: ignore[arg-type]  # a buffer, though numpy's types do not say so

    def fill_bytes(self, into: memoryview) -> None:
        """The next bytes of the stream, in place of those in a buffer."""
        for start in range(0, len(into), len(_ZEROS)):
            part = into[start : start + len(_ZEROS)]
            self._keystream.update_into(_ZEROS[: len(part)], part)


class Noise(Protocol):
    """A stream of independent Gaussian draws."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """A float64 tensor of `shape` with independent N(0, std^2) entries."""


class GaussianNoise:
    """A stream of independent N(0, 1) draws, determined by a 32-byte key."""

    def __init__(self, key: bytes) -> None:
        self._stream = KeyedStream(key)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """A float64 tensor of `shape` with independent N(0, std^2) entries (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        uniform = self._stream.uniforms(3 * half)
        fine = uniform[:half] + (uniform[half : 2 * half] - 0.5) * 2.0**-53  # a second word below the first: 106 bits, so the tail goes on to 12.2
        radius = torch.from_numpy(std * np.sqrt(-2.0 * np.log(fine)))
        angle = torch.from_numpy(uniform[2 * half :]).mul_(2.0 * math.pi)
        draws = torch.empty(2 * half, dtype=torch.float64)
        torch.cos(angle, out=draws[:half]).mul_(radius)
        torch.sin(angle, out=draws[half:]).mul_(radius)
        return draws[:count].reshape(shape)


class SimulatedNoise:
    """A stream of independent N(0, 1) draws in float32, determined by a key: for simulations, whose noise protects nobody.

    32 bits of the keystream a draw, Box-Muller in float32: draws beyond 6.66 do not occur.
    """

    def __init__(self, key: bytes) -> None:
        self._stream = KeyedStream(key)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """A float64 tensor of `shape` with independent N(0, std^2) entries."""
        count = math.prod(shape)
        words = self._stream.words((count + 1) // 2)
        bits = torch.from_numpy(words.view(np.int32))[None]
        return standard_normals(bits, torch.empty(1, len(bits[0])))[0, :count].to(torch.float64).mul_(std).reshape(shape)

    def fill_bytes(self, into: memoryview) -> None:
        """The next bytes of the stream, of which `standard_normals` makes a draw of four."""
        self._stream.fill_bytes(into)


def standard_normals(bits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, `(S, 2n)` float32, filled with N(0, 1) draws made of as many random 32-bit integers, row by row (Box and Muller 1958).

    Args:
        bits: `(S, 2n)` int32: radii in the first half of a row, angles in the second.
    """
    half = bits.shape[1] // 2
    radius = bits[:, :half].to(torch.float32).abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle = bits[:, half:].to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
    torch.mul(torch.cos(angle), radius, out=out[:, :half])
    torch.mul(angle.sin_(), radius, out=out[:, half:])
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseGrid:
    """Where sums are released: whole multiples of `spacing`. It follows from two public numbers, C and the number d of parameters.

    Attributes:
        spacing: g, a power of two, at most C 2**-12 / sqrt(d); so a patient's share of a sum, at most C, is many grid points wide.
        sensitivity: how far one unit moves a rounded sum in L2, at most: C, plus g sqrt(d) for the two roundings, plus C 2**-12 for what
            is computed in floating point before them (see `client.private_training`, `server.strategies.dp_fedavg`).

    >>> NoiseGrid.of(1.0, 10_000)
    NoiseGrid(spacing=1.9073486328125e-06, sensitivity=1.0004348754882812)
    """

    spacing: float
    sensitivity: float

    @classmethod
    def of(cls, max_grad_norm: float, num_parameters: int, *, share: float = ROUNDING_SHARE) -> "NoiseGrid":
        """The grid for a sum over units of vectors with `num_parameters` entries, each clipped to `max_grad_norm`; `share`: how fine it is."""
        root = math.sqrt(max(num_parameters, 1))
        _, exponent = math.frexp(share * max_grad_norm / root)
        spacing = 2.0 ** (exponent - 1)
        return cls(spacing=spacing, sensitivity=max_grad_norm * (1 + ARITHMETIC_SHARE) + spacing * root)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest grid points, float64."""
        return self._points(values).mul_(self.spacing)

    def _points(self, values: torch.Tensor) -> torch.Tensor:
        return (values / self.spacing).round_()

    def release(self, total: torch.Tensor, noise: Noise, noise_multiplier: float) -> torch.Tensor:
        """`total` (float64) rounded, plus noise of standard deviation noise_multiplier x sensitivity, rounded; the addition is exact."""
        std = noise_multiplier * self.sensitivity / self.spacing
        assert 13 * std < 2**52  # no draw passes 12.3 standard deviations
        return self._points(total).add_(noise.normal(total.shape, std).round_()).mul_(self.spacing)
