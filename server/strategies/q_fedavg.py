"""q-FedAvg: Li, Sanjabi, Beirami, Smith 2020, "Fair Resource Allocation in Federated Learning", algorithm 2. Sites with a higher loss count for more:

Delta_k = F_k^q L (w - w_k)        F_k: loss of the received model; L: 1 / learning rate
h_k = q F_k^(q-1) L^2 |w - w_k|^2 + L F_k^q
w <- w - sum_k p_k Delta_k / sum_k p_k h_k

With q = 0 this is FedAvg. p_k are the declared sizes, which the paper has the sampling of devices do.

Under privacy |w - w_k|^2 holds the square of the noise, which in a small site's update is far larger than the rest, and would all but stop the model.
How large it is on average follows from public numbers (`noise_energy`), and is taken off: post-processing.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from server.aggregation import ExactMean, FloatArrays
from shared.errors import ProtocolError
from shared.plan import SitePlan
from shared.strategy_options import QFedAvg as Options
from shared.study import Study

NONE: Mapping[str, float] = {}
LEAST_LOSS = 1e-10  # so that F^(q-1) is finite; the authors' own code adds as much


class FairMean(ExactMean):
    """The change of q-FedAvg.

    Args:
        learning_rate: of the sites in this round.
        losses: by site; filled before its update is added.
        noise: by site, the expected square of the L2 norm of the noise in its update, over the squared learning rate.
    """

    def __init__(self, options: Options, *, learning_rate: float, losses: Mapping[str, float], noise: Mapping[str, float] = NONE) -> None:
        super().__init__()
        self._q = options.q
        self._max_loss = options.max_loss
        self._lipschitz = 1 / learning_rate
        self._losses = losses
        self._noise = noise
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
        moved = max(0.0, self._lipschitz**2 * squared - self._noise.get(site, 0.0))
        steepness = self._q * loss ** (self._q - 1) * moved + self._lipschitz * loss**self._q
        self._steepness.append(weight * steepness)

    def take_mean(self) -> FloatArrays:
        """What the model moves by."""
        factor = self._lipschitz * self.total_weight / math.fsum(self._steepness)
        return {name: factor * value for name, value in super().take_mean().items()}


def noise_energy(study: Study, plan: SitePlan, num_parameters: int) -> float:
    """The expected square of the L2 norm of the noise in an update of plain SGD, over the squared learning rate: each of the steps adds Gaussian noise
    of noise multiplier x C / expected batch size to each of the parameters. 0 without privacy, and for other optimizers, where it is not known."""
    if plan.noise_multiplier is None or plan.max_grad_norm is None or study.training.optimizer != "sgd" or study.training.momentum:
        return 0.0
    return plan.shared_steps * num_parameters * (plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size) ** 2
