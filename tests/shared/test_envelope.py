"""A packed message comes back bit for bit; other bytes are a `ProtocolError`, never another exception, and never much memory."""

import json
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.envelope import LARGE_BYTES, LENGTH_BYTES, MAX_ARRAYS, MAX_HEAD_BYTES, Packed, from_records, pack, to_records, unpack
from shared.errors import ProtocolError
from shared.messages import from_array_record, to_array_record

ARRAYS = st.dictionaries(
    st.text(max_size=20),
    hnp.arrays(dtype=st.sampled_from([np.float32, np.float64, np.float16]), shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    min_size=1,
    max_size=4,
)
GOOD = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(-0.5)}


def message(**groups: dict[str, np.ndarray]) -> RecordDict:
    return RecordDict({name: to_array_record(arrays) for name, arrays in groups.items()})


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Names in order, dtypes, shapes and every bit, NaN's included."""
    return list(first) == list(second) and all(
        (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        for one, other in zip(first.values(), second.values(), strict=True)
    )


def framed(head: object, rest: bytes = b"", *, length: int | None = None) -> Packed:
    """Arrays with this head, whose length may lie."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    arrays = (len(text) if length is None else length).to_bytes(LENGTH_BYTES, "big") + text + rest
    return Packed(text="", arrays=arrays, content="")


def refused(packed: Packed) -> None:
    with pytest.raises(ProtocolError):
        unpack(packed)


@pytest.mark.slow
@given(groups=st.dictionaries(st.text(max_size=20), ARRAYS, max_size=3), text=st.text(max_size=200))
@example(groups={"parameters": {"scalar": np.array(1.5), "empty": np.zeros((0, 3)), "odd": np.array([np.nan, -0.0, np.inf], np.float32)}}, text="{}")
def test_every_array_comes_back_bit_for_bit(groups: dict, text: str) -> None:
    packed, seal = from_records(to_records(pack(message(**groups), text=text), "seal"))
    found = unpack(packed)
    assert (packed.text, seal, list(found)) == (text, "seal", list(groups))
    assert all(same(from_array_record(found[name]), arrays) for name, arrays in groups.items())


def test_large_arrays_ride_beside_the_envelope_and_small_ones_in_it() -> None:
    large = {"w": np.random.default_rng(1).normal(size=(400, 400))}
    packed = pack(message(parameters=large), text="t")
    assert len(packed.arrays) > LARGE_BYTES
    assert set(to_records(packed, "s")) == {"envelope", "packed"}
    assert set(to_records(pack(message(parameters=GOOD), text="t"), "s")) == {"envelope"}
    found, _ = from_records(to_records(packed, "s"))
    assert found == packed
    assert same(from_array_record(unpack(found)["parameters"]), large)


def test_a_round_s_large_arrays_are_one_object_for_all_sites() -> None:
    packed = pack(message(parameters={"w": np.ones((400, 400))}), text="t")
    first, second = (to_records(packed, seal)["packed"].object_id for seal in ("for north", "for south"))
    assert first == second


def test_the_content_tells_text_and_arrays_apart() -> None:
    packed = pack(message(parameters=GOOD), text="t")
    others = [pack(message(parameters=GOOD), text="u"), pack(message(other=GOOD), text="t"), pack(RecordDict(), text="t")]
    assert len({packed.content, *(other.content for other in others)}) == 4
    assert pack(message(parameters=GOOD), text="t").content == packed.content


@given(data=st.binary(max_size=300))
def test_junk_is_refused(data: bytes) -> None:
    packed, _ = from_records(to_records(Packed(text="", arrays=data, content=""), ""))
    if data:
        refused(packed)
    else:
        assert unpack(packed) == {}


@given(position=st.integers(0, 10_000), change=st.integers(1, 255))
def test_an_altered_byte_is_refused_or_gives_other_arrays_and_another_content(position: int, change: int) -> None:
    packed = pack(message(parameters=GOOD), text="t")
    altered = bytearray(packed.arrays)
    altered[position % len(altered)] ^= change
    found, _ = from_records(to_records(Packed(text="t", arrays=bytes(altered), content=packed.content), ""))
    assert found.content != packed.content  # it is never taken over from the sender
    try:
        unpack(found)
    except ProtocolError:
        return


LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([1]))


@given(head=st.one_of(LEAF, st.lists(st.one_of(LEAF, st.lists(LEAF, min_size=6, max_size=6)), max_size=3)), rest=st.binary(max_size=10))
def test_whatever_json_the_head_is_nothing_but_a_protocol_error_comes(head: object, rest: bytes) -> None:
    try:
        found = unpack(framed(head, rest))
    except ProtocolError:
        return
    assert sum(len(array.data) for arrays in found.values() for array in arrays.values()) == len(rest)


ROW = ["parameters", "w", "float32", [1], "numpy.ndarray", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "packed",
    [
        framed([ROW, ROW], b"abcd"),  # one name twice
        framed([ROW], b"a"),
        framed([ROW], b"abc"),
        framed([[*ROW[:5], -1]], b""),
        framed([[*ROW[:5], 2**70]], b"ab"),
        framed([[5, *ROW[1:]]], b"ab"),
        framed([[None, *ROW[1:]]], b"ab"),
        framed([["parameters", 5, *ROW[2:]]], b"ab"),
        framed([["parameters", ["w"], *ROW[2:]]], b"ab"),
        framed([[*ROW[:3], ["1"], *ROW[4:]]], b"ab"),
        framed([[*ROW[:3], None, *ROW[4:]]], b"ab"),
        framed([ROW[:5]], b"ab"),
        framed({"parameters": ROW}, b"ab"),
        framed(b"[" * 50_000 + b"]" * 50_000),  # deep
        framed(b"9" * 10_000),
        framed(b"\xff\xfe"),
        framed(b"", length=0),
        framed([ROW], b"ab", length=0),
        framed([ROW], b"ab", length=2**64 - 1),
        framed([ROW], b"ab", length=2**31),
        framed([ROW] * (MAX_ARRAYS + 1)),
        Packed(text="", arrays=b"\0" * 7, content=""),
    ],
    ids=range(22),
)  # fmt: skip
def test_lies_of_the_head_are_refused(packed: Packed) -> None:
    refused(packed)


@pytest.mark.parametrize("declared", [2**63, 2**40, MAX_HEAD_BYTES + 1])
def test_a_declared_length_takes_no_memory(declared: int) -> None:
    tracemalloc.start()
    refused(framed([ROW], b"ab", length=declared))
    refused(framed([[*ROW[:5], declared]], b"ab"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_head_of_many_small_things_is_not_even_read() -> None:
    bomb = framed(b"[" + b"[]," * (MAX_HEAD_BYTES // 3) + b"[]]")
    tracemalloc.start()
    refused(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # read, it would be half a gigabyte


FIELDS = {"text": "t", "seal": "s", "arrays": b""}


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"envelope": MetricRecord({"a": 1.0})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "more": "x"})}),
        RecordDict({"envelope": ConfigRecord({"text": "t", "seal": "s"})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "text": b"t"})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "seal": 5})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "arrays": "text"})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "arrays": [b"a", b"b"]})}),
        RecordDict({"envelope": ConfigRecord(FIELDS), "more": ConfigRecord({})}),
        RecordDict({"envelope": ConfigRecord(FIELDS), "packed": ConfigRecord({})}),
        RecordDict({"envelope": ConfigRecord(FIELDS), "packed": ArrayRecord({})}),
        RecordDict({"envelope": ConfigRecord({**FIELDS, "arrays": b"x"}), "packed": ArrayRecord({"packed": Array("uint8", (1,), "packed", b"x")})}),
        RecordDict({"envelope": ConfigRecord(FIELDS), "packed": ArrayRecord({"other": Array("uint8", (1,), "packed", b"x")})}),
    ],
    ids=range(13),
)  # fmt: skip
def test_other_records_are_refused(records: RecordDict) -> None:
    with pytest.raises(ProtocolError):
        from_records(records)


def test_a_text_that_is_no_unicode_is_read_all_the_same() -> None:
    packed, seal = from_records(RecordDict({"envelope": ConfigRecord({**FIELDS, "text": "\ud800", "seal": "\ud800"})}))
    assert (packed.text, seal) == ("\ud800", "\ud800")
