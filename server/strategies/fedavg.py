"""FedAvg: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1. The model moves by the mean update, weighted by the sites' declared sizes."""

from server.strategies.server_optimizer import ALL, FloatArrays, State, Taken


class FedAvg:
    """w <- w + mean update. FedProx (Li et al. 2020) is the same at the server; its proximal term is in the sites' training."""

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """The change is the mean update itself."""
        return state, mean_update
