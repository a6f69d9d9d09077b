"""Bulyan: El Mhamdi, Guerraoui, Rouault 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section 4. Every site counts alike."""

import numpy as np

from server.kept_updates import Matrix, Updates, squared_distances
from server.strategies.krum import scores
from shared.strategy_options import Bulyan as Options


class Bulyan:
    """Krum selects, and of what it selected each coordinate's values around the median count; tolerates f bad sites of at least 4 f + 3."""

    def __init__(self, options: Options) -> None:
        self._tolerated = options.tolerated

    def __call__(self, updates: Updates) -> Matrix:
        """`(d,)`: of S - 2 f updates, taken out by Krum one after another, the mean of the S - 4 f values nearest to the median, by coordinate."""
        selected = self._select(squared_distances(updates))
        return np.concatenate([nearest_to_median(piece[selected], len(selected) - 2 * self._tolerated) for _, piece in updates.columns()])

    def _select(self, distances: Matrix) -> list[int]:
        left, selected = list(range(len(distances))), []
        for _ in range(len(distances) - 2 * self._tolerated):
            best = int(np.argmin(scores(distances[np.ix_(left, left)], self._tolerated))) if len(left) > 1 else 0
            selected.append(left.pop(best))
        return sorted(selected)


def nearest_to_median(values: Matrix, count: int) -> Matrix:
    """Mean of the `count` values of each column of `(S, b)` that are nearest to its median."""
    apart = np.abs(values - np.median(values, axis=0))
    nearest = np.argsort(apart, axis=0, kind="stable")[:count]
    return np.asarray(np.take_along_axis(values, nearest, axis=0).mean(axis=0))
