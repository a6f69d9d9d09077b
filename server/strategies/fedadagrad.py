"""FedAdagrad: Reddi et al. 2021, algorithm 2: v <- v + D^2; without momentum."""

from server.strategies.adaptive import Adaptive
from shared.strategy_options import FedAdagrad as Options


def fedadagrad(options: Options) -> Adaptive:
    """The server optimizer FedAdagrad."""
    return Adaptive(learning_rate=options.server_learning_rate, tau=options.tau, beta_1=0.0, second_moment=lambda v, square: v + square)
