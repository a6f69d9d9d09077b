"""A message as few and plain bytes: one text, and all arrays in a row. What a seal signs, and what a courier carries.

Flower sends every record and every array as an object of its own, each with a request of its own. A packed message is one object, or, where its
arrays are large, one array beside it: it is then the same object for every site of a round, and the SuperLink keeps it once.

    arrays = length of the head (8 bytes, big-endian), head (JSON: group, name, dtype, shape, stype, bytes of each array), their bytes
"""

import hashlib
import json
import math
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from shared.errors import ProtocolError

LARGE_BYTES = 1_000_000
MAX_MESSAGE_BYTES = 2**29  # of a message's arrays: 130 million parameters in float32
CHUNK_BYTES = 5 * 2**20  # of an array, in one object of Flower's (its FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
FEW_OBJECTS = 16  # message, records, arrays: what a message consists of beside its chunks
MAX_ARRAYS = 100_000
MAX_HEAD_BYTES = 20_000_000  # of JSON, which takes some 25 times as much once it is read
LENGTH_BYTES = 8
_ENVELOPE, _TEXT, _SEAL, _ARRAYS = "envelope", "text", "seal", "arrays"
_PACKED = "packed"

_Head = list[tuple[str, str, str, list[int], str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One message. `content` is SHA-256 (hex) over text and arrays."""

    text: str
    arrays: bytes  # empty where there are none
    content: str


def most_objects(num_bytes: int) -> int:
    """How many objects of Flower's a message of so many bytes may be."""
    return math.ceil(num_bytes / CHUNK_BYTES) + FEW_OBJECTS


def pack(record: RecordDict, *, text: str) -> Packed:
    """The message whose JSON is `text`, and whose arrays are the array records of `record`.

    Raises:
        ProtocolError: it is larger than a message may be.
    """
    head: _Head = []
    pieces: list[bytes] = []
    for group, arrays in record.items():
        if isinstance(arrays, ArrayRecord):
            for name, array in arrays.items():
                head.append((group, name, array.dtype, list(array.shape), array.stype, len(array.data)))
                pieces.append(array.data)
    if not head:
        return _packed(text, b"")
    start = json.dumps(head).encode()
    if (size := LENGTH_BYTES + len(start) + sum(map(len, pieces))) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, got one of {size}", "take a smaller model")
    return _packed(text, b"".join([len(start).to_bytes(LENGTH_BYTES, "big"), start, *pieces]))


def with_text(packed: Packed, text: str) -> Packed:
    """A message with another JSON and the very same arrays, which are not copied."""
    return _packed(text, packed.arrays)


def unpack(packed: Packed) -> dict[str, ArrayRecord]:
    """Its arrays, by group.

    Raises:
        ProtocolError: they are not as `pack` writes them.
    """
    if not packed.arrays:
        return {}
    view = memoryview(packed.arrays)
    length = int.from_bytes(view[:LENGTH_BYTES], "big")
    offset = LENGTH_BYTES + length
    groups: dict[str, dict[str, Array]] = {}
    try:
        if length > MAX_HEAD_BYTES:
            raise ValueError("too long")
        head = json.loads(bytes(view[LENGTH_BYTES:offset]))
        if not isinstance(head, list) or len(head) > MAX_ARRAYS:
            raise ValueError("too many")
        for group, name, dtype, shape, stype, size in head:
            if not (isinstance(group, str) and isinstance(size, int) and 0 <= size <= len(view) - offset):
                raise ValueError("too long, or under no name")
            array = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=bytes(view[offset : offset + size]))
            if name in groups.setdefault(group, {}):
                raise ValueError("twice")
            groups[group][name] = array
            offset += size
        if offset != len(view):
            raise ValueError("too short")
        return {group: ArrayRecord(arrays) for group, arrays in groups.items()}
    except (ValueError, TypeError, OverflowError, RecursionError, KeyError):
        raise ProtocolError("expected packed arrays, got other bytes") from None


def to_records(packed: Packed, seal: str) -> RecordDict:
    """Flower's records of a sealed message."""
    large = len(packed.arrays) > LARGE_BYTES
    envelope = RecordDict({_ENVELOPE: ConfigRecord({_TEXT: packed.text, _SEAL: seal, _ARRAYS: b"" if large else packed.arrays})})
    if large:
        envelope[_PACKED] = ArrayRecord({_PACKED: Array(dtype="uint8", shape=(len(packed.arrays),), stype=_PACKED, data=packed.arrays)})
    return envelope


def from_records(envelope: RecordDict) -> tuple[Packed, str]:
    """The message and its seal, neither judged yet.

    Raises:
        ProtocolError: these are other records.
    """
    fields, large = envelope.get(_ENVELOPE), envelope.get(_PACKED)
    if set(envelope) - {_ENVELOPE, _PACKED} or not isinstance(fields, ConfigRecord) or set(fields) != {_TEXT, _SEAL, _ARRAYS}:
        raise ProtocolError("expected a sealed message, got other records")
    text, seal, arrays = fields[_TEXT], fields[_SEAL], fields[_ARRAYS]
    if isinstance(large, ArrayRecord) and set(large) == {_PACKED} and arrays == b"":
        arrays = large[_PACKED].data
    elif large is not None:
        raise ProtocolError("expected one packed array, got others")
    if not (isinstance(text, str) and isinstance(seal, str) and isinstance(arrays, bytes)):
        raise ProtocolError("expected text, seal and arrays, got other types")
    return _packed(text, arrays), seal


def _packed(text: str, arrays: bytes) -> Packed:
    parts = hashlib.sha256(text.encode(errors="surrogatepass")).digest() + hashlib.sha256(arrays).digest()
    return Packed(text=text, arrays=arrays, content=hashlib.sha256(parts).hexdigest())
