"""The coordinate-wise median: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", definition 1. Every site counts alike; it holds while more than half of the sites are honest."""

import numpy as np

from server.kept_updates import Matrix, Updates


def coordinate_median(updates: Updates) -> Matrix:
    """`(d,)`: of each coordinate the median over the sites; of an even number the mean of the two in the middle."""
    return np.concatenate([np.median(piece, axis=0) for _, piece in updates.columns()])
