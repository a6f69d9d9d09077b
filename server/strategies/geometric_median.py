"""RFA: Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning", algorithm 2: the geometric median of the updates by the
smoothed Weiszfeld algorithm. It holds while the bad sites have less than half of all weight.

An iterate is a weighted mean of the updates, so its distances to them follow from theirs to each other: only the last one is written out.
"""

import numpy as np

from server.kept_updates import Matrix, Updates, combined, squared_distances
from shared.strategy_options import GeometricMedian as Options

ITERATIONS = 200  # at most; the paper takes 3, and here one costs nothing
CLOSE = 1e-9  # no share moves more: there


class GeometricMedian:
    """The point with the smallest weighted sum of distances to the updates."""

    def __init__(self, options: Options) -> None:
        self._smoothing = options.smoothing

    def __call__(self, updates: Updates) -> Matrix:
        """`(d,)`."""
        return combined(updates, shares_of(squared_distances(updates), updates.weights, self._smoothing))


def shares_of(distances: Matrix, weights: Matrix, smoothing: float) -> Matrix:
    """`(S,)`: the shares of the updates in their geometric median, from the squared distances `(S, S)` and the weights `(S,)`."""
    alphas = weights / weights.sum()
    shares = alphas
    for _ in range(ITERATIONS):
        from_here = distances @ shares - shares @ distances @ shares / 2  # of each update, squared
        new = alphas / np.maximum(np.sqrt(np.maximum(from_here, 0.0)), smoothing)
        new /= new.sum()
        if np.abs(new - shares).max() < CLOSE:
            return np.asarray(new)
        shares = new
    return np.asarray(shares)
