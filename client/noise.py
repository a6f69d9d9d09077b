"""The noise of a site's training: `shared.noise`, from which the coordinator draws as well where it promises something to whole sites."""

from shared.noise import (
    ARITHMETIC_SHARE,
    KEY_BYTES,
    ROUNDING_SHARE,
    GaussianNoise,
    KeyedStream,
    Noise,
    NoiseGrid,
    SimulatedNoise,
    standard_normals,
    subkey,
)

__all__ = [
    "ARITHMETIC_SHARE",
    "KEY_BYTES",
    "ROUNDING_SHARE",
    "GaussianNoise",
    "KeyedStream",
    "Noise",
    "NoiseGrid",
    "SimulatedNoise",
    "standard_normals",
    "subkey",
]
