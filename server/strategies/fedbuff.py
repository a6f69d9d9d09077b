"""FedBuff: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1 with
the staleness of section 5. Nobody waits for the slowest: the server steps once K updates are in its buffer, and who is still at work works on.

s(tau) = 1 / sqrt(1 + tau)                    tau: server steps between the model that was trained on and the one that is changed
w <- w + eta_g / K sum_i s(tau_i) Delta_i

A round is a server step. The paper starts another client whenever one ends; here idle sites are asked once a round, with the round's model, so the
buffer never holds two updates of a site.

Privacy. A site is asked at most once with each round's number, so it trains at most `rounds.count` times a fold, slow or fast: the plan that it
admitted, with noise solved for all of them, covers what it does. Its ledger charges each training when it begins; fast sites spend all of the
plan, slow ones less. What the server does with an update, however late, is post-processing. When an answer comes tells how long a site worked; here
as with every other strategy no epsilon covers that, and here it decides which updates meet in a buffer as well.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from server.aggregation import ExactMean
from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken
from shared.errors import ProtocolError
from shared.strategy_options import FedBuff as Options


def staleness_weight(staleness: int) -> float:
    """s(tau), by which an update counts.

    >>> staleness_weight(3)
    0.5
    """
    return 1 / math.sqrt(1 + staleness)


class Buffer(ExactMean):
    """The mean of the updates in the buffer, each scaled by its staleness.

    Args:
        staleness: by site, before its update is added; who is not in it was asked about the newest model.
    """

    def __init__(self, options: Options, *, staleness: Mapping[str, int]) -> None:
        super().__init__()
        self._largest = options.largest_staleness
        self._staleness = staleness

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update.

        Raises:
            ProtocolError: it is too old; or see `ExactMean.add`.
        """
        staleness = self._staleness.get(site, 0)
        if staleness > self._largest:
            raise ProtocolError(
                f"update: expected one of a model at most {self._largest} rounds old (strategy.largest_staleness), got one of {staleness} rounds"
            )
        super().add({name: staleness_weight(staleness) * np.asarray(value, dtype=np.float64) for name, value in update.items()}, weight)


class FedBuff:
    """The server's step, of a length that the study fixes."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """The change is eta_g times the buffer's mean; there is no state."""
        return state, {name: self._options.server_learning_rate * value for name, value in mean_update.items()}
