"""Krum and multi-Krum: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", sections 4 and 5. Every site counts alike."""

import numpy as np
from numpy.typing import NDArray

from server.kept_updates import Matrix, Updates, combined, squared_distances
from shared.strategy_options import Krum as KrumOptions
from shared.strategy_options import MultiKrum as MultiKrumOptions


class Krum:
    """The one update, or the mean of the m, nearest to its neighbours; tolerates f bad sites of at least 2 f + 3."""

    def __init__(self, options: KrumOptions | MultiKrumOptions) -> None:
        self._tolerated = options.tolerated
        self._selected = 1 if isinstance(options, KrumOptions) else options.selected

    def __call__(self, updates: Updates) -> Matrix:
        """`(d,)`: the mean of the m updates with the smallest scores; m is S - f - 2 where the study names none."""
        num_updates = len(updates.weights)
        best = np.argsort(scores(squared_distances(updates), self._tolerated), kind="stable")
        chosen = best[: min(self._selected or num_updates, num_updates - self._tolerated - 2)]
        shares = np.zeros(num_updates)
        shares[chosen] = 1 / len(chosen)
        return combined(updates, shares)


def scores(distances: Matrix, tolerated: int) -> NDArray[np.float64]:
    """`(S,)`: the sum of each update's squared distances to its S - f - 2 nearest others, at least one.

    Args:
        distances: `(S, S)`, squared.
    """
    neighbours = max(1, len(distances) - tolerated - 2)
    return np.asarray(np.sort(distances, axis=1)[:, 1 : 1 + neighbours].sum(axis=1))
