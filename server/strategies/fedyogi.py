"""FedYogi: Reddi et al. 2021, algorithm 2: v <- v - (1 - beta_2) D^2 sign(v - D^2)."""

import numpy as np

from server.strategies.adaptive import Adaptive
from shared.strategy_options import FedYogi as Options


def fedyogi(options: Options) -> Adaptive:
    """The server optimizer FedYogi."""
    beta_2 = options.beta_2
    return Adaptive(
        learning_rate=options.server_learning_rate,
        tau=options.tau,
        beta_1=options.beta_1,
        second_moment=lambda v, square: v - (1 - beta_2) * square * np.sign(v - square),
    )
