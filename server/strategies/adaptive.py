"""Adaptive federated optimization: Reddi et al. 2021, algorithm 2. FedAdagrad, FedAdam and FedYogi differ in one line, `second_moment`.

m <- beta_1 m + (1 - beta_1) D        D: mean update
v <- second_moment(v, D^2)            v starts at tau^2
w <- w + eta m / (sqrt(v) + tau)
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken, zeros_like

SecondMoment = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


class Adaptive:
    """Algorithm 2 of the paper with a rule for the second moment."""

    def __init__(self, *, learning_rate: float, tau: float, beta_1: float, second_moment: SecondMoment) -> None:
        self._learning_rate = learning_rate
        self._tau = tau
        self._beta_1 = beta_1
        self._second_moment = second_moment

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """One line of the algorithm after the other; nothing is corrected for bias, as in the paper."""
        momentum = state.get("momentum") or zeros_like(mean_update)
        variance = state.get("variance") or {name: np.full_like(value, self._tau**2) for name, value in mean_update.items()}
        momentum = {name: self._beta_1 * momentum[name] + (1 - self._beta_1) * value for name, value in mean_update.items()}
        variance = {name: self._second_moment(variance[name], value**2) for name, value in mean_update.items()}
        change = {name: self._learning_rate * momentum[name] / (np.sqrt(variance[name]) + self._tau) for name in mean_update}
        return {"momentum": momentum, "variance": variance}, change
