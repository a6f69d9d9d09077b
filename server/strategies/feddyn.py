"""FedDyn: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama 2021, "Federated Learning Based on Dynamic Regularization", algorithm 1, the
server's part: h <- h - alpha |P|/m mean(theta_k - theta); theta <- mean theta_k - h / alpha."""

from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken, zeros_like
from shared.strategy_options import FedDyn as Options


class FedDyn:
    """h is in the state."""

    def __init__(self, options: Options) -> None:
        self._alpha = options.alpha

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """See the algorithm."""
        before = state.get("h") or zeros_like(mean_update)
        after = {name: before[name] - self._alpha * taken.share * value for name, value in mean_update.items()}
        return {"h": after}, {name: value - after[name] / self._alpha for name, value in mean_update.items()}
