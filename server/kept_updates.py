"""All updates of a round, kept until the last has come: what a robust rule needs, and a sum does not.

They lie in a file without a name, so that memory stays bounded and nothing is left behind; a rule looks at some columns of all of them at a time.

S: updates, in the order of their sites' names, whatever the order in which they came. d: values of one.
"""

import math
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.aggregation import MAX_PRODUCT, FloatArrays
from shared.errors import ProtocolError, StorageError

Matrix = NDArray[np.float64]
PIECE = 2**23  # values of all updates looked at a time: 64 MB as float64


class Updates(Protocol):
    """What a rule looks at.

    Attributes:
        weights: `(S,)`.
    """

    weights: Matrix

    def columns(self) -> Iterator[tuple[slice, Matrix]]:
        """Pieces of all updates, `(S, b)`, with the columns that they are; together all d."""
        ...


class Rule(Protocol):
    """How the updates of a round become one."""

    def __call__(self, updates: Updates) -> Matrix:
        """`(d,)`; at least `least_updates` of the study's strategy are there."""
        ...


class KeptUpdates:
    """Takes updates as `server.aggregation.ExactMean` does, and gives what a rule makes of them in place of the mean."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # also of a round that comes to nothing
        self._names: list[str] = []
        self._weights: list[int] = []

    @property
    def total_weight(self) -> int:
        """Sum of the weights of the updates taken."""
        return sum(self._weights)

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str) -> None:
        """Keep one update of finite values.

        Raises:
            ProtocolError: a value is so large that a distance could overflow; nothing was kept.
            StorageError: the disk is full.
        """
        self._shapes = self._shapes or {name: value.shape for name, value in update.items()}
        self._keep(site, [value.reshape(-1) for value in update.values()], weight)

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str]
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Keep many, `(S, d)`; what `add` would raise, by row."""
        self._shapes = self._shapes or dict(shapes)
        refusals: list[ProtocolError | None] = []
        for site, update, weight in zip(sites, updates, weights, strict=True):
            try:
                self._keep(site, [update], weight)
            except ProtocolError as error:
                refusals.append(error)
            else:
                refusals.append(None)
        return refusals

    def _keep(self, site: str, parts: Sequence[NDArray[np.generic]], weight: int) -> None:
        if not all(np.abs(part).max(initial=0.0) < MAX_PRODUCT for part in parts):
            raise ProtocolError(f"update: expected values below {MAX_PRODUCT:.3g}, got larger ones")
        try:
            for part in parts:
                self._file.write(part.astype(np.float64).data)
            self._file.flush()
        except OSError as error:
            raise StorageError(f"the updates of a round could not be kept ({type(error).__name__})", "make room where temporary files go") from None
        self._names.append(site)
        self._weights.append(weight)

    def take_mean(self) -> FloatArrays:
        """What the rule makes of all updates, by name; they are gone with it."""
        size = sum(math.prod(shape) for shape in self._shapes.values())
        order = np.argsort(self._names)
        rows = np.memmap(self._file, dtype=np.float64, mode="r", shape=(len(order), size))
        flat = self._rule(_Rows(rows, order, np.array(self._weights, dtype=np.float64)[order]))
        named, start = {}, 0
        for name, shape in self._shapes.items():
            named[name] = flat[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return named


class _Rows:
    def __init__(self, rows: Matrix, order: NDArray[np.intp], weights: Matrix) -> None:
        self._rows = rows
        self._order = order
        self.weights = weights

    def columns(self) -> Iterator[tuple[slice, Matrix]]:
        """Each piece is a copy, `(S, b)`."""
        step = max(1, PIECE // len(self._order))
        for start in range(0, self._rows.shape[1], step):
            columns = slice(start, min(start + step, self._rows.shape[1]))
            yield columns, np.asarray(self._rows[:, columns])[self._order]


def combined(updates: Updates, shares: Matrix) -> Matrix:
    """`(d,)`: the sum of share x update, for shares `(S,)`; updates without a share are not looked at, whatever they hold."""
    used = np.flatnonzero(shares)
    return np.concatenate([shares[used] @ piece[used] for _, piece in updates.columns()])


def squared_distances(updates: Updates) -> Matrix:
    """`(S, S)`: squared L2 distances. Around the median of each column, so that one huge update takes no digits from the others."""
    total = np.zeros((len(updates.weights),) * 2)
    for _, piece in updates.columns():
        piece -= np.median(piece, axis=0)
        squares = np.einsum("ij,ij->i", piece, piece)
        total += np.maximum(squares[:, None] + squares[None] - 2 * (piece @ piece.T), 0.0)
    np.fill_diagonal(total, 0.0)
    return total
