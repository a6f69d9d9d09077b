"""Randomness by `derive(seed, round, who)`: a result depends on what is drawn for, never on the order of calls.

Derivation: BLAKE2b over a canonical encoding of the path, so distinct paths give independent 256-bit keys. Generators are Philox
(Salmon et al. 2011), keyed with 128 bits; torch's CPU generators take only 32 bits of seed and are used for nothing that matters.
"""

import hashlib
import json

import numpy as np

Step = str | int


def derive_key(seed: int, *path: Step) -> bytes:
    """32 bytes that depend on `seed` and `path` alone."""
    encoded = json.dumps([seed, *path], separators=(",", ":")).encode()
    return hashlib.blake2b(encoded, digest_size=32, person=b"wardround").digest()


def derive(seed: int, *path: Step) -> int:
    """An integer in [0, 2**63) that depends on `seed` and `path` alone.

    >>> derive(7, "round", 1) == derive(7, "round", 1), derive(7, "round", 1) == derive(7, "round", 2)
    (True, False)
    """
    return int.from_bytes(derive_key(seed, *path)[:8], "big") >> 1


def generator(seed: int, *path: Step) -> np.random.Generator:
    """A NumPy generator (Philox, 128-bit key) for this path."""
    return generator_of(derive_key(seed, *path))


def generator_of(key: bytes) -> np.random.Generator:
    """A NumPy generator (Philox) of the first 128 bits of `key`; never for privacy noise."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))
