"""What every server optimizer is: state in, state out. The mean update of the sites is its pseudo-gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArrays = dict[str, NDArray[np.float64]]
State = Mapping[str, FloatArrays]  # e.g. {"momentum": {...}}; arrays shaped like the parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a mean update is of.

    Attributes:
        share: of all sites' weight, of those whose updates are in it.
        learning_rate: of the sites in this round.
    """

    share: float = 1.0
    learning_rate: float = 1.0


ALL = Taken()


class ServerOptimizer(Protocol):
    """Turns the mean update of a round into the change of the model."""

    def step(self, state: State, mean_update: FloatArrays, taken: Taken = ALL) -> tuple[State, FloatArrays]:
        """The next state, and the change to add to the parameters. An empty `state` is the one before the first round."""
        ...


def zeros_like(arrays: FloatArrays) -> FloatArrays:
    """Zeros shaped like `arrays`."""
    return {name: np.zeros_like(value) for name, value in arrays.items()}
