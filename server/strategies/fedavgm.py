"""FedAvgM: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
section 4.3: server momentum, v <- beta v + mean update; w <- w + eta v."""

from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken, zeros_like
from shared.strategy_options import FedAvgM as Options


class FedAvgM:
    """Averaging with momentum at the server."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """v <- beta v + mean update; the change is eta v."""
        velocity = state.get("velocity") or zeros_like(mean_update)
        velocity = {name: self._options.server_momentum * velocity[name] + value for name, value in mean_update.items()}
        return {"velocity": velocity}, {name: self._options.server_learning_rate * value for name, value in velocity.items()}
