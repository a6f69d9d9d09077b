"""Mask streams: ChaCha20 keystreams (RFC 8439) as words, added to or subtracted from a vector modulo 2**32 or 2**64.

Adding a uniform mask modulo a power of two gives a uniform word, whatever the word was (a one-time pad); a keystream is told from a uniform one by
nobody without its key. A vector is masked block by block, all streams one after another on each block: it stays in the processor's cache.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger]  # (n,) uint32 or uint64, little-endian
MASK_KEY_BYTES = 32
BLOCK_BYTES = 2**16
_ZEROS = memoryview(bytes(BLOCK_BYTES))


def add_masks(words: Words, *, plus: Iterable[bytes] = (), minus: Iterable[bytes] = ()) -> None:
    """Add the streams of the keys `plus` to `words`, and subtract those of `minus`, in place; words wrap.

    A key is one stream: it masks one vector, and once removed with the same sign reversed leaves no trace.

    >>> words = np.array([1, 2], dtype="<u4")
    >>> add_masks(words, plus=[bytes(32)]); add_masks(words, minus=[bytes(32)]); words.tolist()
    [1, 2]
    """
    added, subtracted = [_keystream(key) for key in plus], [_keystream(key) for key in minus]
    block_length = BLOCK_BYTES // words.itemsize
    block = np.empty(block_length, dtype=words.dtype)
    for start in range(0, len(words), block_length):
        part = words[start : start + block_length]
        stream = block[: len(part)]
        for keystream in added:
            _fill(stream, keystream)
            part += stream
        for keystream in subtracted:
            _fill(stream, keystream)
            part -= stream


def stream_words(key: bytes, count: int) -> NDArray[np.uint32]:
    """`(count,)` independent uniform uint32: the first words of the key's stream."""
    words = np.zeros(count, dtype="<u4")
    add_masks(words, plus=[key])
    return words


def _keystream(key: bytes) -> CipherContext:
    assert len(key) == MASK_KEY_BYTES
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _fill(words: Words, keystream: CipherContext) -> None:
    """The keystream's next words, in place of these."""
    into = memoryview(words.view(np.uint8))  # type: ignore[arg-type]  # a buffer, though numpy's types do not say so
    keystream.update_into(_ZEROS[: len(into)], into)
