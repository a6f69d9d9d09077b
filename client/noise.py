"""Gaussian noise from a cryptographic stream: ChaCha20 keystream, 53-bit uniforms, Box-Muller in float64.

In a deployment the key comes from the operating system and is forgotten; a simulation derives it from (seed, round, site, fold), and its
result says so. One key is one stream: two steps never share noise, and two keys never do. torch's own CPU generator has 32-bit seeds and
is not used. Not covered yet: rounding of sum and noise to a common grid, so the low bits of a float are not protected.
"""

import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

KEY_BYTES = 32


class GaussianNoise:
    """A stream of independent N(0, 1) draws, determined by a 32-byte key."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @staticmethod
    def fresh_key() -> bytes:
        """A key from the operating system, to be used once and forgotten."""
        return os.urandom(KEY_BYTES)

    def uniforms(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """`(count,)` in (0, 1]: the middles of 2**53 equal intervals, rounded to float64, so never 0 and at least 2**-54."""
        words = np.frombuffer(self._keystream.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """A float64 tensor of `shape` with independent N(0, std^2) entries (Box and Muller 1958)."""
        count = int(np.prod(shape))
        half = (count + 1) // 2
        uniform = self.uniforms(2 * half)
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        draws = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return torch.from_numpy(std * draws).reshape(shape)
