"""What one side encodes the other decodes, bit for bit; anything else is a `ProtocolError` and nothing of it is run."""

import io
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import ProtocolError
from shared.messages import (
    JSON,
    MAX_JSON_BYTES,
    MESSAGE,
    PARAMETERS,
    Content,
    Enrolled,
    EnrolTask,
    Evaluated,
    EvaluateTask,
    Refused,
    Trained,
    TrainTask,
    decode,
    decode_parameters,
    decode_statistics,
    encode,
)
from shared.models import template_of
from shared.results import SitePrivacy
from shared.study import Study

STUDY = Study.from_table({"name": "s", "task": "t", "privacy": {"epsilon": 3.0, "delta": 1e-4}})
SPENT = SitePrivacy(epsilon=1.5, delta=1e-4, noise_multiplier=2.0, sample_rate=0.1, steps=7, epsilon_cross_check=1.49)
CONTENTS = [
    EnrolTask(run="r", study=STUDY.to_table(), task_fingerprint="f"),
    Enrolled(name="a", declared_size=10, declared_num_patients=12, declared_num_test=2),
    TrainTask(run="r", study_hash="h", round=1, fold=1),
    EvaluateTask(run="r", study_hash="h", round=2, fold=1),
    Trained(name="a", round=1, fold=1, privacy=SPENT),
    Evaluated(name="a", round=1, fold=1, privacy=None),
    Refused(name="a", code="E600", reason="The site's policy does not allow what the study asks."),
]
KINDS = [type(content) for content in CONTENTS]
GOOD = {"w": np.array([[1.0, -2.0, 3.5]], dtype=np.float32), "b": np.array(0.5, dtype=np.float32)}
TEMPLATE = template_of(GOOD)
TRAIN = TrainTask(run="r", study_hash="h", round=1, fold=1)


def npy(value: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def claims(shape: str, descr: str = "'<f4'", body: bytes = bytes(8)) -> bytes:
    """Bytes of an .npy file whose header claims this."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize("content", CONTENTS, ids=[kind.__name__ for kind in KINDS])
def test_messages_round_trip(content: Content) -> None:
    assert decode(encode(content), *KINDS) == content
    others = [kind for kind in KINDS if kind is not type(content)]
    with pytest.raises(ProtocolError, match="got another message"):
        decode(encode(content), *others)


def test_a_study_survives_the_wire() -> None:
    received = decode(encode(CONTENTS[0]), EnrolTask)
    assert Study.from_table(received.study).fingerprint() == STUDY.fingerprint()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        hnp.arrays(
            st.sampled_from([np.float32, np.float64]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
        max_size=4,
    )
)
def test_parameters_round_trip_bit_for_bit(parameters: dict[str, np.ndarray]) -> None:
    received = decode_parameters(encode(TRAIN, parameters=parameters), template_of(parameters))
    assert list(received) == list(parameters)
    for name, value in parameters.items():
        assert received[name].dtype == value.dtype and received[name].shape == value.shape
        assert received[name].tobytes() == np.ascontiguousarray(value).tobytes()


def test_transposed_parameters_keep_their_meaning() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(decode_parameters(encode(TRAIN, parameters={"w": value}), {"w": ((3, 2), "float32")})["w"], value)


def _with(key: str, value: object) -> Callable[[RecordDict], None]:
    return lambda record: record.__setitem__(key, value)  # type: ignore[arg-type]


def _field(key: str, value: object) -> Callable[[RecordDict], None]:
    return lambda record: record[MESSAGE].__setitem__(key, value)  # type: ignore[index,union-attr]


def _json(old: str, new: str) -> Callable[[RecordDict], None]:
    return lambda record: record[MESSAGE].__setitem__(JSON, record[MESSAGE][JSON].replace(old, new))  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    "corrupt",
    [
        _with("extra", ConfigRecord({})),
        _with("extra", ArrayRecord({})),
        _with(MESSAGE, ConfigRecord({})),
        _with(MESSAGE, MetricRecord({})),
        _with(MESSAGE, ArrayRecord({})),
        lambda record: record.__delitem__(MESSAGE),
        _field("extra", 1),
        _field(JSON, 3),
        _field(JSON, b"{}"),
        _field(JSON, ""),
        _field(JSON, '{"kind":"train"'),
        _field(JSON, '{"kind":"train"}'),
        _field(JSON, "[" * 100_000),
        _field(JSON, '{"kind":"train",' + " " * MAX_JSON_BYTES + "}"),
        _json('"round":1', '"round":"x"'),
        _json('"round":1', '"round":1.5'),
        _json('"round":1', '"round":null'),
        _json('"round":1', '"round":1,"num_examples":1000000000'),
        _json('"kind":"train"', '"kind":"trained"'),
        _json('"study_hash":"h",', ""),
    ],
)
def test_a_corrupt_message_is_a_protocol_error(corrupt: Callable[[RecordDict], None]) -> None:
    record = encode(TRAIN)
    corrupt(record)
    with pytest.raises(ProtocolError) as caught:
        decode(record, TrainTask)
    assert len(str(caught.value)) < 300


def test_no_infinity_in_a_message() -> None:
    record = encode(CONTENTS[4])
    for bad in ("NaN", "Infinity", "1e999", "-1"):
        record[MESSAGE] = ConfigRecord({JSON: CONTENTS[4].model_dump_json().replace('"epsilon":1.5', f'"epsilon":{bad}')})
        with pytest.raises(ProtocolError):
            decode(record, Trained)


WRONG = {
    "missing": {"w": GOOD["w"]},
    "extra": {**GOOD, "c": GOOD["b"]},
    "order": {"b": GOOD["b"], "w": GOOD["w"]},
    "renamed": {"W": GOOD["w"], "b": GOOD["b"]},
    "shape": {**GOOD, "w": GOOD["w"].T.copy()},
    "broadcastable": {**GOOD, "w": np.zeros((1, 1), dtype=np.float32)},
    "scalar for one": {**GOOD, "b": np.zeros(1, dtype=np.float32)},
    "double": {**GOOD, "w": GOOD["w"].astype(np.float64)},
    "half": {**GOOD, "w": GOOD["w"].astype(np.float16)},
    "NaN": {**GOOD, "b": np.array(np.nan, dtype=np.float32)},
    "infinity": {**GOOD, "w": np.array([[1, 2, -np.inf]], dtype=np.float32)},
    "nothing": {},
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_other_parameters_are_a_protocol_error(wrong: str) -> None:
    record = encode(TRAIN, parameters=WRONG[wrong])
    with pytest.raises(ProtocolError, match="expected"):
        decode_parameters(record, TEMPLATE)


def test_parameters_must_be_there() -> None:
    for record in (encode(TRAIN), RecordDict({PARAMETERS: ConfigRecord({})})):
        with pytest.raises(ProtocolError, match="expected arrays under 'parameters', got none"):
            decode_parameters(record, TEMPLATE)


class Trap:
    """Pickled, it would write a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


NOT_AN_ARRAY = {
    "nothing": b"",
    "half": npy(np.zeros(2, np.float32))[:-3],
    "longer": npy(np.zeros(2, np.float32)) + b"x",
    "text": b"hello",
    "zip": b"PK\x03\x04" + bytes(60),
    "archive": npz(w=np.zeros(2, np.float32)),
    "terabytes": claims("(9999999999999,)"),
    "beyond 64 bits": claims("(" + "9" * 30 + ",)"),
    "product wraps": claims("(4294967296, 4294967296)"),
    "negative": claims("(-2,)"),
    "shape of floats": claims("(2.0,)"),
    "shape of text": claims("('2',)"),
    "shape an expression": claims("(1 + 1,)"),
    "objects": claims("(2,)", "'O'"),
    "no such dtype": claims("(2,)", "'zz'"),
    "dtype None": claims("(2,)", "None"),
    "structured": claims("(1,)", "[('a', '<f4'), ('b', '<f4')]"),
    "big-endian": claims("(2,)", "'>f4'"),
    "integers": claims("(2,)", "'<i4'"),
    "complex": claims("(1,)", "'<c8'"),
    "open bracket": b"\x93NUMPY\x01\x00\x05\x00(((((",
    "deep": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000,
    "bad indent": b"\x93NUMPY\x01\x00\x0c\x00\n  {\n {}\n  x\n",
    "not a mapping": b"\x93NUMPY\x01\x00\x04\x00[1]\n",
    "no UTF-8": b"\x93NUMPY\x03\x00\x04\x00\x00\x00\xff\xff\xff\n",
    "another version": b"\x93NUMPY\x09\x00" + npy(np.zeros(2, np.float32))[8:],
}


@pytest.mark.parametrize("bad", list(NOT_AN_ARRAY))
def test_bytes_that_are_no_array_are_a_protocol_error(bad: str) -> None:
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=NOT_AN_ARRAY[bad])
    with pytest.raises(ProtocolError, match="expected"):
        decode_parameters(RecordDict({PARAMETERS: ArrayRecord({"w": array})}), {"w": ((2,), "float32")})


def test_another_serialisation_is_a_protocol_error() -> None:
    array = Array(dtype="float32", shape=(2,), stype="torch.tensor", data=npy(np.zeros(2, np.float32)))
    with pytest.raises(ProtocolError):
        decode_parameters(RecordDict({PARAMETERS: ArrayRecord({"w": array})}), {"w": ((2,), "float32")})


def test_pickles_are_never_loaded(tmp_path: object) -> None:
    target = f"{tmp_path}/owned"
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(target)
    for data in (npy(trap, allow_pickle=True), pickle.dumps(Trap(target)), npz(w=np.zeros(1)) + pickle.dumps(Trap(target))):
        array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
        with pytest.raises(ProtocolError):
            decode_parameters(RecordDict({PARAMETERS: ArrayRecord({"w": array})}), {"w": ((1,), "float32")})
    with pytest.raises(FileNotFoundError):
        open(target).close()


@given(st.binary(max_size=200), st.integers(0, 150))
def test_random_damage_is_a_protocol_error_or_still_an_array(noise: bytes, at: int) -> None:
    whole = npy(np.arange(4, dtype=np.float32))
    data = whole[:at] + noise + whole[at + len(noise) :]
    record = RecordDict({PARAMETERS: ArrayRecord({"w": Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=data)})})
    try:
        received = decode_parameters(record, {"w": ((4,), "float32")})
    except ProtocolError:
        return
    assert received["w"].shape == (4,) and np.isfinite(received["w"]).all()


def test_statistics_round_trip_and_may_be_absent() -> None:
    shapes = {"histogram": (2, 3), "errors": (5,)}
    statistics = {"histogram": np.arange(6.0).reshape(2, 3)}
    received = decode_statistics(encode(CONTENTS[4], statistics=statistics), shapes, signed=False)
    assert received is not None and np.array_equal(received["histogram"], statistics["histogram"]) and list(received) == ["histogram"]
    assert decode_statistics(encode(CONTENTS[4]), shapes, signed=False) is None


def test_statistics_with_noise_may_be_negative_and_nothing_else_is_let_in() -> None:
    shapes = {"histogram": (2, 3)}
    noised = {"histogram": np.array([[0.5, -3.25, 2.0], [0, -1e6, 7]])}
    received = decode_statistics(encode(CONTENTS[4], statistics=noised), shapes, signed=True)
    assert received is not None and np.array_equal(received["histogram"], noised["histogram"])
    for bad in (np.full((2, 3), np.nan), np.full((2, 3), -np.inf), np.zeros((3, 2)), np.zeros((2, 3), dtype=np.float32)):
        with pytest.raises(ProtocolError, match="expected"):
            decode_statistics(encode(CONTENTS[4], statistics={"histogram": bad}), shapes, signed=True)


@pytest.mark.parametrize(
    "statistics",
    [
        {"ages": np.zeros((2, 3))},
        {"histogram": np.zeros((3, 2))},
        {"histogram": np.zeros((2, 3), dtype=np.float32)},
        {"histogram": np.full((2, 3), np.nan)},
        {"histogram": np.full((2, 3), np.inf)},
        {"histogram": np.array([[0.0, 0, -1], [0, 0, 0]])},
    ],
)
def test_other_statistics_are_a_protocol_error(statistics: dict[str, np.ndarray]) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        decode_statistics(encode(CONTENTS[4], statistics=statistics), {"histogram": (2, 3)}, signed=False)


@pytest.mark.parametrize("field", ["declared_size", "declared_num_patients", "declared_num_test"])
def test_a_declared_size_is_one_that_can_be_reckoned_with(field: str) -> None:
    text = Enrolled(name="a", declared_size=10, declared_num_patients=12, declared_num_test=2).model_dump_json()
    for value, fits in ((2**31, True), (2**31 + 1, False), (10**400, False)):  # the last is beyond a float
        record = RecordDict({MESSAGE: ConfigRecord({JSON: re.sub(rf'"{field}":\d+', f'"{field}":{value}', text)})})
        if fits:
            assert getattr(decode(record, Enrolled), field) == value
        else:
            with pytest.raises(ProtocolError, match=field):
                decode(record, Enrolled)
