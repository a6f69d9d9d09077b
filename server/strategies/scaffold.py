"""SCAFFOLD: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1
with option II, lines 16 and 17: x <- x + eta_g mean(y_i - x); c <- c + |S|/N mean(c_i+ - c_i).

c_i+ - c_i is -c - (y_i - x) / (K eta_l), so its mean follows from the mean update, and sites send nothing else.
"""

from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken, zeros_like
from shared.strategy_options import Scaffold as Options

CONTROL = "control"


class Scaffold:
    """The coordinator's control variate is in the state, as "control".

    Args:
        local_steps: K.
    """

    def __init__(self, options: Options, *, local_steps: int) -> None:
        self._rate = options.server_learning_rate
        self._local_steps = local_steps

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """See the algorithm."""
        control = state.get(CONTROL) or zeros_like(mean_update)
        moved = self._local_steps * taken.learning_rate
        control = {name: control[name] + taken.share * (-control[name] - value / moved) for name, value in mean_update.items()}
        return {CONTROL: control}, {name: self._rate * value for name, value in mean_update.items()}
