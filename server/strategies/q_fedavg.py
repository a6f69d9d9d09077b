"""q-FedAvg: Li, Sanjabi, Beirami, Smith 2020, "Fair Resource Allocation in Federated Learning", algorithm 2. Sites with a higher loss count for more:

Delta_k = F_k^q L (w - w_k)        F_k: loss of the received model; L: 1 / learning rate
h_k = q F_k^(q-1) L^2 |w - w_k|^2 + L F_k^q
w <- w - sum_k p_k Delta_k / sum_k p_k h_k

With q = 0 this is FedAvg. p_k are the declared sizes, which the paper has the sampling of devices do.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from server.aggregation import ExactMean, FloatArrays
from shared.errors import ProtocolError
from shared.study import QFedAvg as Options

LEAST_LOSS = 1e-10  # so that F^(q-1) is finite; the authors' own code adds as much


class FairMean(ExactMean):
    """The change of q-FedAvg.

    Args:
        learning_rate: of the sites in this round.
        losses: by site; filled before its update is added.
    """

    def __init__(self, options: Options, *, learning_rate: float, losses: Mapping[str, float]) -> None:
        super().__init__()
        self._q = options.q
        self._max_loss = options.max_loss
        self._lipschitz = 1 / learning_rate
        self._losses = losses
        self._steepness: list[float] = []  # p_k h_k

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update of a site whose loss is known.

        Raises:
            ProtocolError: it is not; or see `ExactMean.add`.
        """
        if site not in self._losses:
            raise ProtocolError("expected the loss of the received model, got none")
        loss = min(self._losses[site], self._max_loss) + LEAST_LOSS  # noise may pass it, and so may a lie
        squared = math.fsum(float(np.square(value, dtype=np.float64).sum()) for value in update.values())
        super().add({name: loss**self._q * np.asarray(value, dtype=np.float64) for name, value in update.items()}, weight)
        steepness = self._q * loss ** (self._q - 1) * self._lipschitz**2 * squared + self._lipschitz * loss**self._q
        self._steepness.append(weight * steepness)

    def take_mean(self) -> FloatArrays:
        """What the model moves by."""
        factor = self._lipschitz * self.total_weight / math.fsum(self._steepness)
        return {name: factor * value for name, value in super().take_mean().items()}
