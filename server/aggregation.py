"""An exact weighted mean: the sum of integers does not depend on the order in which updates arrive.

Each product weight x value (exact in float64 for float32 values and weights below 2**29) is written in fixed point as two integers,
coarse x 2**-20 + fine x 2**-70, and both are added as int64. Memory is O(parameters), whatever the number of sites.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from shared.errors import ProtocolError

COARSE = 2.0**20
FINE = 2.0**70
FINE_PER_COARSE = 2**50
MAX_WEIGHT = 10_000_000  # patients; a larger claim counts as this many
MAX_PRODUCT = 2.0**31  # of weight x |value|
MAX_SUM = 2.0**42  # of the updates' largest weight x |value| together, so that the coarse sum stays below 2**62
MAX_UPDATES = 2**12  # carries are moved up after this many
BLOCK = 2**20  # values computed on at a time

FloatArrays = dict[str, NDArray[np.float64]]


class ExactMean:
    """A running weighted mean of named arrays."""

    def __init__(self) -> None:
        self._coarse: dict[str, NDArray[np.int64]] = {}
        self._fine: dict[str, NDArray[np.int64]] = {}
        self._weight = 0
        self._since_carry = 0
        self._largest_sum = 0.0

    @property
    def total_weight(self) -> int:
        """Sum of the weights added."""
        return self._weight

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int) -> None:
        """Add one update.

        Args:
            update: finite arrays; the same names and shapes at every call.
            weight: 1 to `MAX_WEIGHT`.

        Raises:
            ProtocolError: a value is so large that the sum could overflow; nothing was added.
        """
        if not 1 <= weight <= MAX_WEIGHT:
            raise ProtocolError(f"weight: expected 1 to {MAX_WEIGHT}, got {weight}")
        largest = float(np.max([_largest(value) * weight for value in update.values()], initial=0.0))  # NaN where a value is none
        if not largest < MAX_PRODUCT:
            name = next(name for name, value in update.items() if not _largest(value) * weight < MAX_PRODUCT)
            raise ProtocolError(f"update {name}: expected values below {MAX_PRODUCT / weight:.3g}, got larger ones")
        if self._largest_sum + largest >= MAX_SUM:
            raise ProtocolError("update: expected a sum that cannot overflow, got too many large updates")
        self._largest_sum += largest
        for name, value in update.items():
            if name not in self._coarse:
                self._coarse[name], self._fine[name] = np.zeros(value.shape, np.int64), np.zeros(value.shape, np.int64)
            _add_product(self._coarse[name].reshape(-1), self._fine[name].reshape(-1), value.reshape(-1), weight)
        self._weight += weight
        self._since_carry += 1
        if self._since_carry >= MAX_UPDATES:
            self._carry()

    def mean(self) -> FloatArrays:
        """The weighted mean of all that was added; at least one update must have been."""
        assert self._weight > 0
        self._carry()
        mean = {name: np.empty(coarse.shape) for name, coarse in self._coarse.items()}
        for name, value in mean.items():
            coarse, fine, flat = self._coarse[name].reshape(-1), self._fine[name].reshape(-1), value.reshape(-1)
            for block in blocks(flat.size):
                flat[block] = (coarse[block] / COARSE + fine[block] / FINE) / self._weight
        return mean

    def _carry(self) -> None:
        """Move whole coarse units out of the fine part; the represented sum stays the same."""
        for name, whole in self._fine.items():
            coarse, fine = self._coarse[name].reshape(-1), whole.reshape(-1)
            for block in blocks(fine.size):
                units = fine[block] // FINE_PER_COARSE
                coarse[block] += units
                fine[block] -= units * FINE_PER_COARSE
        self._since_carry = 0


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover a flat array, small enough that what is computed on the way needs little memory beside a large model."""
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))


def _largest(value: NDArray[np.generic]) -> float:
    """The largest magnitude, exact; not a number where a value is none."""
    flat = value.reshape(-1)
    return float(np.max([np.abs(flat[block].astype(np.float64)).max() for block in blocks(flat.size)], initial=0.0))


def _add_product(coarse: NDArray[np.int64], fine: NDArray[np.int64], value: NDArray[np.generic], weight: int) -> None:
    """Add weight x value to a sum in fixed point; all flat."""
    for block in blocks(value.size):
        product = value[block].astype(np.float64) * weight
        whole = np.floor(product * COARSE)
        coarse[block] += whole.astype(np.int64)
        fine[block] += np.rint((product - whole / COARSE) * FINE).astype(np.int64)
