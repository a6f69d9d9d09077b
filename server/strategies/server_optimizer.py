"""What every server optimizer is: state in, state out. The mean update of the sites is its pseudo-gradient."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArrays = dict[str, NDArray[np.float64]]
State = Mapping[str, FloatArrays]  # e.g. {"momentum": {...}}; arrays shaped like the parameters


class ServerOptimizer(Protocol):
    """Turns the mean update of a round into the change of the model."""

    def step(self, state: State, mean_update: FloatArrays) -> tuple[State, FloatArrays]:
        """The next state, and the change to add to the parameters. An empty `state` is the one before the first round."""
        ...


def zeros_like(arrays: FloatArrays) -> FloatArrays:
    """Zeros shaped like `arrays`."""
    return {name: np.zeros_like(value) for name, value in arrays.items()}
