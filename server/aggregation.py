"""An exact weighted mean: the sum of integers does not depend on the order in which updates arrive.

Each product weight x value (exact in float64 for float32 values and weights below 2**29) is written in fixed point as two integers,
coarse x 2**-20 + fine x 2**-70, and both are added as int64. Memory is O(parameters), whatever the number of sites.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import ProtocolError

COARSE = 2.0**20
FINE = 2.0**70
FINE_PER_COARSE = 2**50
MAX_WEIGHT = 10_000_000  # patients; whoever claims more, and was not approved with fewer, is not believed
MAX_PRODUCT = 2.0**31  # of weight x |value|
MAX_SUM = 2.0**42  # of the updates' largest weight x |value| together, so that the coarse sum stays below 2**62
MAX_UPDATES = 2**12  # carries are moved up after this many
BLOCK = 2**20  # values computed on at a time
ROWS = 16  # updates added at a time

FloatArrays = dict[str, NDArray[np.float64]]


class Aggregator(Protocol):
    """Takes the updates of a round one by one, each judged, and gives what they come to."""

    @property
    def total_weight(self) -> int:
        """Sum of the weights taken; 0 before the first."""
        ...

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str) -> None:
        """Take one; `ProtocolError` where it cannot be, and then nothing was."""
        ...

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str]
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Take many, `(S, D)`; what `add` would raise, by row."""
        ...

    def take_mean(self) -> FloatArrays:
        """What they come to; they are gone with it."""
        ...


class ExactMean:
    """A running weighted mean of named arrays."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._coarse = np.zeros(0, np.int64)  # of all arrays, one after another
        self._fine = np.zeros(0, np.int64)
        self._weight = 0
        self._since_carry = 0
        self._largest_sum = 0.0

    @property
    def total_weight(self) -> int:
        """Sum of the weights added."""
        return self._weight

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update.

        Args:
            site: whose it is, which makes no difference to a sum.
            update: finite arrays; the same names and shapes at every call.
            weight: 1 to `MAX_WEIGHT`.

        Raises:
            ProtocolError: a value is so large that the sum could overflow; nothing was added.
        """
        _check_weight(weight)
        largest = float(np.max([_largest(value) * weight for value in update.values()], initial=0.0))  # NaN where a value is none
        if not largest < MAX_PRODUCT:
            name = next(name for name, value in update.items() if not _largest(value) * weight < MAX_PRODUCT)
            raise _too_large(weight, f" {name}")
        self._make_room({name: value.shape for name, value in update.items()})
        self._count(largest, weight)
        start = 0
        for value in update.values():
            end = start + value.size
            _add_product(self._coarse[start:end], self._fine[start:end], value.reshape(-1), weight)
            start = end

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str] = ()
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Add many updates, as `add` does one after another; what it would raise, by row.

        Args:
            shapes: of the named arrays that stand in a row, one after another.
            updates: `(S, D)`.
        """
        self._make_room(dict(shapes))
        refusals: list[ProtocolError | None] = []
        for start in range(0, len(updates), ROWS):
            rows, scales = updates[start : start + ROWS], np.array(weights[start : start + ROWS])
            largest = np.abs(rows).max(axis=1, initial=0.0) * scales.astype(np.float64)
            refused = [self._refusal(float(value), int(weight)) for value, weight in zip(largest, scales, strict=True)]
            usable = [row for row, refusal in enumerate(refused) if refusal is None]
            if usable:
                _add_products(self._coarse, self._fine, rows if len(usable) == len(rows) else rows[usable], scales[usable])
            refusals += refused
        return refusals

    def _refusal(self, largest: float, weight: int) -> ProtocolError | None:
        try:
            _check_weight(weight)
            if not largest < MAX_PRODUCT:
                raise _too_large(weight)
            self._count(largest, weight)
        except ProtocolError as error:
            return error
        return None

    def _make_room(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if not self._shapes:
            size = sum(math.prod(shape) for shape in shapes.values())
            self._shapes, self._coarse, self._fine = shapes, np.zeros(size, np.int64), np.zeros(size, np.int64)
        assert self._shapes == shapes

    def _count(self, largest: float, weight: int) -> None:
        """Count one update in; carries move up where it is time.

        Raises:
            ProtocolError: the sum could overflow with it.
        """
        if self._largest_sum + largest >= MAX_SUM:
            raise ProtocolError("update: expected a sum that cannot overflow, got too many large updates")
        if self._since_carry >= MAX_UPDATES:
            self._carry(self._coarse)
        self._largest_sum += largest
        self._weight += weight
        self._since_carry += 1

    def mean(self) -> FloatArrays:
        """The weighted mean of all that was added; at least one update must have been."""
        return self._over(self._weight, np.empty(self._coarse.size), self._coarse)

    def take_mean(self) -> FloatArrays:
        """As `mean`, in the memory of the sum, which is gone with it: a large model's takes more than anything else of a round."""
        return self._take(self._weight)

    def take_sum(self) -> FloatArrays:
        """As `take_mean`, not divided by the weights: rounded once, from the exact sum."""
        return self._take(1)

    def _take(self, divisor: int) -> FloatArrays:
        coarse, self._coarse = self._coarse, np.zeros(0, np.int64)
        taken = self._over(divisor, coarse.view(np.float64), coarse)
        self._fine = np.zeros(0, np.int64)
        return taken

    def _over(self, divisor: int, flat: NDArray[np.float64], coarse: NDArray[np.int64]) -> FloatArrays:
        """The sum over `divisor`, written to `flat`, which may be the memory of the coarse sum."""
        assert self._weight > 0
        self._carry(coarse)
        for block in blocks(flat.size):
            flat[block] = (coarse[block] / COARSE + self._fine[block] / FINE) / divisor
        mean, start = {}, 0
        for name, shape in self._shapes.items():
            end = start + math.prod(shape)
            mean[name], start = flat[start:end].reshape(shape), end
        return mean

    def _carry(self, coarse: NDArray[np.int64]) -> None:
        """Move whole coarse units out of the fine part; the represented sum stays the same."""
        for block in blocks(self._fine.size):
            units = self._fine[block] // FINE_PER_COARSE
            coarse[block] += units
            self._fine[block] -= units * FINE_PER_COARSE
        self._since_carry = 0


def _check_weight(weight: int) -> None:
    if not 1 <= weight <= MAX_WEIGHT:
        raise ProtocolError(f"weight: expected 1 to {MAX_WEIGHT}, got {weight}")


def _too_large(weight: int, name: str = "") -> ProtocolError:
    return ProtocolError(f"update{name}: expected values below {MAX_PRODUCT / weight:.3g}, got larger ones")


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


def _add_products(coarse: NDArray[np.int64], fine: NDArray[np.int64], values: NDArray[np.floating], weights: NDArray[np.int64]) -> None:
    """Add weight x row to a sum in fixed point, for a few rows at once."""
    product = values.astype(np.float64) * (weights[:, None] * COARSE)
    whole = np.floor(product)
    coarse += whole.astype(np.int64).sum(axis=0)
    product -= whole
    product *= FINE_PER_COARSE
    fine += np.rint(product, out=product).astype(np.int64).sum(axis=0)
