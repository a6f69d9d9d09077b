"""The coordinate-wise trimmed mean: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", definition 2. Every site counts alike."""

import numpy as np

from server.kept_updates import Matrix, Updates
from shared.strategy_options import TrimmedMean as Options


class TrimmedMean:
    """Tolerates f bad sites of at least 2 f + 1."""

    def __init__(self, options: Options) -> None:
        self._tolerated = options.tolerated

    def __call__(self, updates: Updates) -> Matrix:
        """`(d,)`: of each coordinate the mean without its f smallest and f largest values."""
        return np.concatenate([trimmed(piece, self._tolerated) for _, piece in updates.columns()])


def trimmed(values: Matrix, each_side: int) -> Matrix:
    """Mean over the rows of `(S, b)`, without so many of the smallest and of the largest in each column."""
    if not each_side:
        return np.asarray(values.mean(axis=0))
    return np.asarray(np.sort(values, axis=0)[each_side:-each_side].mean(axis=0))
