"""An exact weighted mean: the sum of integers does not depend on the order in which updates arrive.

Each product weight x value (exact in float64 for float32 values and weights below 2**29) is written in fixed point as two integers,
coarse x 2**-20 + fine x 2**-70, and both are added as int64. Memory is O(parameters), whatever the number of sites.
"""

from collections.abc import Mapping

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
        products = {name: value.astype(np.float64) * weight for name, value in update.items()}
        for name, product in products.items():
            if product.size and not np.abs(product).max() < MAX_PRODUCT:
                raise ProtocolError(f"update {name}: expected values below {MAX_PRODUCT / weight:.3g}, got larger ones")
        largest = max((float(np.abs(product).max()) for product in products.values() if product.size), default=0.0)
        if self._largest_sum + largest >= MAX_SUM:
            raise ProtocolError("update: expected a sum that cannot overflow, got too many large updates")
        self._largest_sum += largest
        for name, product in products.items():
            coarse = np.floor(product * COARSE)
            fine = np.rint((product - coarse / COARSE) * FINE).astype(np.int64)
            if name not in self._coarse:
                self._coarse[name], self._fine[name] = np.zeros(product.shape, np.int64), np.zeros(product.shape, np.int64)
            self._coarse[name] += coarse.astype(np.int64)
            self._fine[name] += fine
        self._weight += weight
        self._since_carry += 1
        if self._since_carry >= MAX_UPDATES:
            self._carry()

    def mean(self) -> FloatArrays:
        """The weighted mean of all that was added; at least one update must have been."""
        assert self._weight > 0
        self._carry()
        return {name: np.asarray((coarse / COARSE + self._fine[name] / FINE) / self._weight) for name, coarse in self._coarse.items()}

    def _carry(self) -> None:
        """Move whole coarse units out of the fine part; the represented sum stays the same."""
        for name, fine in self._fine.items():
            units = fine // FINE_PER_COARSE
            self._coarse[name] += units
            self._fine[name] = fine - units * FINE_PER_COARSE
        self._since_carry = 0
