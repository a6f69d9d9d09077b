"""Fixed point for a sum modulo a power of two: what each site adds, and what the sum says.

A site with values v in [-V, V] and a whole weight w in 1..W adds, for every value, q = round(w v / s) with the step s = W V / L, rounded at random to
one of its two neighbours so that its mean is w v / s; then w itself, and 1. L is the number of levels.

**Theorem (no wrap).** |w v| <= W V, so |w v / s| <= L, and since L is whole its roundings are too: |q| <= L. Also w <= W. The sum over at most n
sites then lies in [-n max(L, W), n max(L, W)], and n max(L, W) < 2**(8 B - 1) is what `num_bytes` B is the smallest solution of. So the sum modulo
2**(8 B), read as a signed number, is the sum. Values beyond V are clipped to it first.

**Theorem (error).** A rounding moves a value by less than a step, so the sum over m sites differs from the sum of w v by less than m s (and
L 2**-51 of a step each, from float64), and the weighted mean by less than m s / sum of w; each rounding has mean zero, but for 2**-32 of a step, and
variance at most s**2 / 4. The sum of the weights and the number of sites are exact. The count tells a sum that was unmasked wrongly from a right
one, but for one in 2**(8 B).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError, ProtocolError
from shared.secure_sum.masks import Words, stream_words

LEAST_LEVELS = 2**24  # a step of a sixteen-millionth of the largest product
MOST_LEVELS = 2**52  # whole numbers that float64 has, with room to round
MOST_BYTES = 8
EXTRA_WORDS = 2  # weight and count
BLOCK = 2**16  # values encoded at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPoint:
    """The encoding of a sum over at most `num_sites` sites, of values in [-max_value, max_value] under weights of 1 to `max_weight`."""

    num_sites: int
    max_value: float
    max_weight: int
    levels: int

    @classmethod
    def finest(cls, *, num_sites: int, max_value: float, max_weight: int, least_levels: int = LEAST_LEVELS) -> "FixedPoint":
        """The encoding with the fewest bytes a value for at least `least_levels`, and then with the most levels that these bytes hold.

        Raises:
            ConfigurationError: a bound is not positive and finite, or no 8 bytes hold the sum.

        >>> FixedPoint.finest(num_sites=50, max_value=1.0, max_weight=1000).num_bytes
        4
        """
        if not (0 < max_value < math.inf and max_weight >= 1 and num_sites >= 1 and 1 <= least_levels <= MOST_LEVELS):
            raise ConfigurationError(
                "secure sum: expected a positive, finite largest value, a largest weight of at least 1 and 1 to 2**52 levels, got others"
            )
        largest = num_sites * max(least_levels, max_weight)
        num_bytes = _bytes_for(largest)
        if num_bytes > MOST_BYTES:
            raise ConfigurationError(f"secure sum: expected a sum below 2**63, got one of up to {largest}", "lower the largest weight")
        levels = min(((1 << 8 * num_bytes - 1) - 1) // num_sites, MOST_LEVELS)
        return cls(num_sites=num_sites, max_value=float(max_value), max_weight=max_weight, levels=levels)

    @property
    def num_bytes(self) -> int:
        """Bytes of a value on the wire, B: the sum is modulo 2**(8 B)."""
        return _bytes_for(self.num_sites * max(self.levels, self.max_weight))

    @property
    def step(self) -> float:
        """Of weight x value."""
        return self.max_weight * self.max_value / self.levels

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the words that are added: the least that hold B bytes; what lies above wraps away."""
        return np.dtype("<u4") if self.num_bytes <= 4 else np.dtype("<u8")

    def largest_error(self, num_summed: int) -> float:
        """A bound that no |decoded sum - sum of weight x value|, values within the range, reaches."""
        return num_summed * self.step * (1 + self.levels * 2.0**-51)

    def encode(self, values: NDArray[np.floating] | NDArray[np.int64], weight: int, *, key: bytes) -> Words:
        """`(num_values + 2,)` words: values times weight, weight, 1.

        Args:
            values: `(num_values,)`; clipped to the range.
            key: 32 secret bytes for the roundings, of this vector only.

        Whole numbers (int64), of an encoding whose step is 1, are taken as they are; that is for noise that is to be in the sum to the last bit.

        Raises:
            ProtocolError: a value is not finite, a whole one beyond the range, or the weight not 1 to `max_weight`.
        """
        if not 1 <= weight <= self.max_weight:
            raise ProtocolError(f"weight: expected 1 to {self.max_weight}, got {weight}")
        signed = np.empty(len(values) + EXTRA_WORDS, dtype=self.dtype.str.replace("u", "i"))
        if np.issubdtype(values.dtype, np.integer):
            assert self.step == 1.0 and weight == 1
            if int(np.abs(values).max(initial=0)) > self.levels:
                raise ProtocolError("update: expected whole numbers within the range of the sum, got larger ones")
            signed[:-EXTRA_WORDS], signed[-EXTRA_WORDS:] = values, (weight, 1)
            return signed.view(self.dtype)
        draws = stream_words(key, len(values))
        for start in range(0, len(values), BLOCK):
            part = slice(start, min(start + BLOCK, len(values)))
            signed[part] = self._round(values[part].astype(np.float64), weight, draws[part])
        signed[-EXTRA_WORDS:] = weight, 1
        return signed.view(self.dtype)

    def _round(self, values: NDArray[np.float64], weight: int, draws: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Up where the draw is below the fraction in 2**32ths, down elsewhere; a whole number stays."""
        scaled = values
        if not np.isfinite(scaled).all():
            raise ProtocolError("update: expected finite values, got NaN or infinity")
        np.clip(scaled, -self.max_value, self.max_value, out=scaled)
        scaled /= self.max_value
        scaled *= self.levels * (weight / self.max_weight)  # at most levels: both factors are at most 1
        whole = np.floor(scaled)
        scaled -= whole
        scaled *= 2.0**32
        whole += draws < scaled
        return whole

    def decode(self, words: Words, *, num_summed: int) -> tuple[NDArray[np.float64], int]:
        """The sum of weight x value, `(num_values,)`, and the sum of the weights, of the sum of so many sites' words.

        Raises:
            ProtocolError: no sum of so many sites comes to these words: it was not unmasked rightly, or a site did not follow the protocol.
        """
        signed = self._signed(words)
        values, weight, count = signed[:-EXTRA_WORDS], int(signed[-2]), int(signed[-1])
        largest = num_summed * self.levels
        within = len(values) == 0 or (values.min() >= -largest and values.max() <= largest)
        if count != num_summed or not num_summed <= weight <= num_summed * self.max_weight or not within:
            raise ProtocolError(f"secure sum: expected a sum over {num_summed} sites, got words that are none")
        return values.astype(np.float64) * self.step, weight

    def _signed(self, words: Words) -> NDArray[np.signedinteger]:
        """Words modulo 2**(8 B), as signed numbers."""
        spare = 8 * (self.dtype.itemsize - self.num_bytes)
        shifted: Words = words << self.dtype.type(spare)
        signed: NDArray[np.signedinteger] = shifted.view(self.dtype.str.replace("u", "i")) >> spare
        return signed

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """The lowest B bytes of each word, `(B n,)`."""
        columns = words.view(np.uint8).reshape(-1, self.dtype.itemsize)
        return np.ascontiguousarray(columns[:, : self.num_bytes]).reshape(-1)

    def unpack(self, payload: NDArray[np.uint8], num_values: int) -> Words:
        """The words that `pack` took the bytes from, modulo 2**(8 B).

        Raises:
            ProtocolError: another type or length than an input of so many values has.
        """
        expected = (num_values + EXTRA_WORDS) * self.num_bytes
        if payload.dtype != np.uint8 or payload.shape != (expected,):
            raise ProtocolError(f"masked input: expected ({expected},) uint8, got {payload.shape} {payload.dtype}")
        columns = np.zeros((num_values + EXTRA_WORDS, self.dtype.itemsize), dtype=np.uint8)
        columns[:, : self.num_bytes] = payload.reshape(-1, self.num_bytes)
        return columns.reshape(-1).view(self.dtype)


def _bytes_for(largest: int) -> int:
    """The fewest whole bytes B with `largest` < 2**(8 B - 1)."""
    return -(-(largest.bit_length() + 1) // 8)
