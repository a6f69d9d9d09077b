"""FedNova: Wang, Liu, Liang, Joshi, Poor 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", equation 3
with plain SGD at the sites, so that a_i is a vector of tau_i ones: an update counts by the step, d_i = Delta_i / tau_i, and the model moves by
tau_eff times their mean, with tau_eff the mean of the tau_i.

A site's tau_i follows from its declared size, so nobody has to believe how many steps it says that it took.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from server.aggregation import ExactMean, FloatArrays
from shared.errors import ProtocolError


class NormalisedMean(ExactMean):
    """The weighted mean of updates by the step, times the weighted mean of the steps.

    Args:
        steps: of a round, by site.
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        super().__init__()
        self._steps = steps
        self._weighted_steps = 0

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update; see `ExactMean.add`."""
        steps = self._steps[site]
        super().add({name: np.asarray(value, dtype=np.float64) / steps for name, value in update.items()}, weight)
        self._weighted_steps += weight * steps

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str] = ()
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Add many; see `ExactMean.add_rows`."""
        steps = np.array([self._steps[site] for site in sites])
        refusals = super().add_rows(shapes, updates.astype(np.float64) / steps[:, None], weights)
        taken = [weight * int(own) for weight, own, refusal in zip(weights, steps, refusals, strict=True) if refusal is None]
        self._weighted_steps += sum(taken)
        return refusals

    def take_mean(self) -> FloatArrays:
        """tau_eff times the mean of updates by the step."""
        effective = self._weighted_steps / self.total_weight
        return {name: effective * value for name, value in super().take_mean().items()}
