"""The learning rate of a round, as both sides know it."""

import math

from shared.study import Training


def learning_rate_at(training: Training, round_number: int, num_rounds: int) -> float:
    """The learning rate of a round, counted from 1: linear warm-up, then constant, linear or cosine decay to zero after the last round."""
    if round_number <= training.warmup_rounds:
        return training.learning_rate * round_number / (training.warmup_rounds + 1)
    progress = (round_number - 1 - training.warmup_rounds) / max(num_rounds - training.warmup_rounds, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[training.schedule]
    return training.learning_rate * factor
