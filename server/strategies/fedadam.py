"""FedAdam: Reddi et al. 2021, algorithm 2: v <- beta_2 v + (1 - beta_2) D^2."""

from server.strategies.adaptive import Adaptive
from shared.strategy_options import FedAdam as Options


def fedadam(options: Options) -> Adaptive:
    """The server optimizer FedAdam."""
    beta_2 = options.beta_2
    return Adaptive(
        learning_rate=options.server_learning_rate,
        tau=options.tau,
        beta_1=options.beta_1,
        second_moment=lambda v, square: beta_2 * v + (1 - beta_2) * square,
    )
