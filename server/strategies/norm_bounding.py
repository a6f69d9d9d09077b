"""Norm bounding: Sun, Kairouz, Suresh, McMahan 2019, "Can You Really Backdoor Federated Learning?", section 4: no update counts for more than
a norm that the study declares. A sum is enough, so nothing is kept."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from server.aggregation import ExactMean
from shared.errors import ProtocolError
from shared.strategy_options import NormBounding as Options


class BoundedMean(ExactMean):
    """The weighted mean of updates, each scaled down to the bound where it is longer."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._bound = options.max_update_norm

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update, scaled down where it is too long; see `ExactMean.add`."""
        norm = float(np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in update.values())))
        super().add(update if norm <= self._bound else {name: _scaled(value, self._bound / norm) for name, value in update.items()}, weight)

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str] = ()
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Add many; see `ExactMean.add_rows`."""
        norms = np.sqrt(np.square(updates, dtype=np.float64).sum(axis=1))
        factors = np.minimum(1.0, self._bound / np.maximum(norms, self._bound))
        return super().add_rows(shapes, updates * factors[:, None].astype(updates.dtype), weights)


def _scaled(values: NDArray[np.generic], factor: float) -> NDArray[np.generic]:
    """In their own type."""
    return np.asarray(np.multiply(values, values.dtype.type(factor)))
