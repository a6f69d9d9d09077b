"""A picture as PNG (W3C PNG, third edition): 8 bits, grey or RGB, one deflated block of unfiltered rows. Enough for a small picture in a page."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2  # colour types


def picture_array(values: object) -> NDArray[np.uint8] | None:
    """`(H, W)` or `(H, W, 3)` in 0..255 of nested lists in [0, 1], grey or RGB, the channels first or last; None for anything else."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not np.isfinite(array).all():
        return None
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def png(picture: NDArray[np.uint8]) -> bytes:
    """The file of a picture `(H, W)` or `(H, W, 3)`."""
    height, width = picture.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), picture.reshape(height, -1)], axis=1)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, RGB if picture.ndim == 3 else GREY, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + _chunk(b"IEND", b"")


def data_address(picture: NDArray[np.uint8]) -> str:
    """The picture as a `data:` address, which needs no request."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
