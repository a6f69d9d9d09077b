"""A question is good for one site, an answer for one question; whatever is altered, swapped or replayed is a `SealError` or a `ProtocolError`."""

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from shared.envelope import from_records, pack
from shared.errors import ProtocolError, SealError
from shared.messages import CONTROL, MESSAGE, Refused, TrainTask, decode, decode_control, decode_parameters, encode, to_array_record
from shared.models import template_of
from shared.seals import MAX_SEAL_CHARACTERS, MAX_SECONDS, SealedTask, open_reply, open_task, packed_message, seal_reply, seal_task

COORDINATOR, NORTH, SOUTH = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(0.25, dtype=np.float32)}
LARGE = {"w": np.random.default_rng(0).normal(size=(500, 500)).astype(np.float64)}
TASK = TrainTask(run="r", study_hash="h", round=1, fold=1)
HEAD = "ab" * 32
REPLY = Refused(name="north", code="E600", reason="No.")


def asked(
    *, site: str = "north", seconds: float = 60.0, model: dict[str, np.ndarray] = MODEL, head: str | None = HEAD
) -> tuple[RecordDict, SealedTask]:
    return seal_task(packed_message(encode(TASK, parameters=model)), site=site, seconds=seconds, signer=COORDINATOR, audit_head=head)


def answered(task: SealedTask, *, model: dict[str, np.ndarray] = MODEL, signer: Ed25519PrivateKey = NORTH, head: str | None = HEAD) -> RecordDict:
    return seal_reply(encode(REPLY, parameters=model), task, signer=signer, audit_head=head)


def test_what_a_strategy_sends_beside_the_parameters_is_sealed_as_they_are() -> None:
    content = encode(TASK, parameters=MODEL)
    content[CONTROL] = to_array_record({"w": MODEL["w"] * 2})
    records, sent = seal_task(packed_message(content), site="north", seconds=60.0, signer=COORDINATOR, audit_head=HEAD)
    record, task = opened_task(records)
    assert np.array_equal(decode_control(record, {"w": ((2, 3), "float32")})["w"], MODEL["w"] * 2)
    assert task.content == sent.content != opened_task(asked()[0])[1].content


def opened_task(records: RecordDict, site: str = "north") -> tuple[RecordDict, SealedTask]:
    return open_task(records, site=site, coordinator=COORDINATOR.public_key())


def opened_reply(records: RecordDict, task: SealedTask) -> RecordDict:
    return open_reply(records, task, site_key=NORTH.public_key()).record


def with_fields(records: RecordDict, **changes: Any) -> RecordDict:
    """The same envelope with other fields."""
    return RecordDict({**records, "envelope": ConfigRecord({**dict(records["envelope"]), **changes})})


def with_seal(records: RecordDict, **changes: Any) -> RecordDict:
    """The same envelope with other keys in its seal."""
    return with_fields(records, seal=json.dumps({**json.loads(records["envelope"]["seal"]), **changes}))


@pytest.mark.parametrize("model", [MODEL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("head", [HEAD, None])
def test_question_and_answer_arrive_bit_for_bit(model: dict[str, np.ndarray], head: str | None) -> None:
    records, sent = asked(model=model, head=head)
    record, task = opened_task(records)
    assert task == sent
    assert task.audit_head == head
    assert decode(record, TrainTask) == TASK
    update = {name: -value for name, value in decode_parameters(record, template_of(model)).items()}
    opened = open_reply(answered(task, model=update, head=head), sent, site_key=NORTH.public_key())
    assert decode(opened.record, Refused) == REPLY
    assert opened.audit_head == head
    for name, value in decode_parameters(opened.record, template_of(model)).items():
        assert value.tobytes() == (-model[name]).tobytes()


@given(seconds=st.one_of(st.floats(1e-300, 1e6), st.integers(1, 10**6)))
def test_seconds_come_back_to_the_last_bit(seconds: float) -> None:
    records, _ = asked(seconds=seconds)
    assert opened_task(records)[1].seconds == seconds


@pytest.mark.parametrize("seconds", [1e7, 4000 * 3600.0, 1e300, float("inf")])
def test_a_deadline_of_half_a_year_is_no_error(seconds: float) -> None:
    records, sent = asked(seconds=seconds)
    assert opened_task(records)[1] == sent
    assert sent.seconds == MAX_SECONDS


def test_no_two_questions_share_a_nonce() -> None:
    assert len({asked()[1].nonce for _ in range(50)}) == 50


def flips(text: str | bytes) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, len(text) - 1), st.integers(1, 127))


def flipped(value: str | bytes, at: int, change: int) -> str | bytes:
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[at] ^= change
    return data.decode() if isinstance(value, str) else bytes(data)


@pytest.mark.parametrize("field", ["text", "arrays", "seal"])
@pytest.mark.parametrize("direction", ["task", "reply"])
@given(data=st.data())
def test_every_altered_byte_is_refused(field: str, direction: str, data: st.DataObject) -> None:
    records, task = asked()
    if direction == "reply":
        records = answered(task)
    good = records["envelope"][field]
    altered = with_fields(records, **{field: flipped(good, *data.draw(flips(good)))})
    try:
        found = opened_task(altered)[1] if direction == "task" else open_reply(altered, task, site_key=NORTH.public_key())
    except (SealError, ProtocolError):
        return
    # Only the seal's own JSON may be spelled otherwise, as 60e0 for 60.0: then it says the same.
    assert field == "seal"
    assert found == task if direction == "task" else found.content == open_reply(records, task, site_key=NORTH.public_key()).content


@pytest.mark.parametrize("at", [0, 8, 100, -1])
def test_every_altered_byte_of_large_arrays_is_refused(at: int) -> None:
    records, task = asked(model=LARGE)
    for sealed, opening in ((records, opened_task), (answered(task, model=LARGE), lambda found: opened_reply(found, task))):
        data = sealed["packed"]["packed"].data
        altered = flipped(data, at % len(data), 1)
        with pytest.raises(SealError):
            opening(RecordDict({**sealed, "packed": ArrayRecord({"packed": Array("uint8", (len(data),), "packed", altered)})}))


def test_a_task_is_for_one_site() -> None:
    records, _ = asked(site="north")
    with pytest.raises(SealError):
        opened_task(records, site="south")


def test_a_task_of_another_key_is_refused() -> None:
    records, _ = seal_task(packed_message(encode(TASK)), site="north", seconds=5, signer=SOUTH)
    with pytest.raises(SealError):
        opened_task(records)


@pytest.mark.parametrize("change", [{"seconds": 61.0}, {"audit_head": None}, {"audit_head": "cd" * 32}, {"nonce": "0" * 64}])
def test_what_the_seal_of_a_task_says_is_signed(change: dict[str, object]) -> None:
    with pytest.raises(SealError):
        opened_task(with_seal(asked()[0], **change))


def test_the_answer_to_one_task_is_none_to_another() -> None:
    (_, first), (_, second) = asked(), asked()
    replayed = answered(first)
    with pytest.raises(SealError, match="replay"):
        opened_reply(replayed, second)
    with pytest.raises(SealError, match="signature"):  # the nonce of the new task does not help
        opened_reply(with_seal(replayed, nonce=second.nonce), second)


def test_an_answer_names_the_content_it_answers() -> None:
    _, task = asked()
    other = SealedTask(site=task.site, nonce=task.nonce, content="0" * 64, seconds=task.seconds)
    with pytest.raises(SealError):
        opened_reply(answered(other), task)


@pytest.mark.parametrize("change", [{"audit_head": None}, {"audit_head": "cd" * 32}])
def test_the_head_in_an_answer_is_signed(change: dict[str, object]) -> None:
    _, task = asked()
    with pytest.raises(SealError):
        opened_reply(with_seal(answered(task), **change), task)


@pytest.mark.parametrize("signer", [SOUTH, COORDINATOR])
def test_an_answer_of_another_key_is_refused(signer: Ed25519PrivateKey) -> None:
    _, task = asked()
    with pytest.raises(SealError):
        opened_reply(answered(task, signer=signer), task)


def test_an_answer_of_another_site_under_this_site_s_name_is_refused() -> None:
    _, north = asked(site="north")
    _, south = asked(site="south")
    swapped = with_seal(answered(south), nonce=north.nonce)
    with pytest.raises(SealError):
        opened_reply(swapped, north)


def test_a_task_is_no_answer_and_an_answer_no_task_even_with_one_key_for_both() -> None:
    records, task = asked()
    with pytest.raises(SealError):
        open_reply(records, task, site_key=COORDINATOR.public_key())
    reply = answered(task, signer=COORDINATOR)
    with pytest.raises(SealError, match="task's seal"):
        opened_task(reply)
    with pytest.raises(SealError):
        opened_task(with_seal(reply, seconds=task.seconds))


SEALS = ["", "{}", "null", "[" * 1000, '{"a":' * 300, "9" * 1900, "x" * (MAX_SEAL_CHARACTERS + 1), "\ud800", '{"nonce": 5}', "\x00"]


@pytest.mark.parametrize("seal", SEALS, ids=range(len(SEALS)))
def test_junk_for_a_seal_is_refused(seal: str) -> None:
    records, task = asked()
    for opening in (opened_task, lambda found: opened_reply(found, task)):
        with pytest.raises(SealError):
            opening(with_fields(records, seal=seal))


CHANGES: list[dict[str, object]] = [
    {"signature": "00" * 64}, {"signature": "zz" * 64}, {"signature": ""}, {"signature": "ab" * 64 + "\n"}, {"nonce": "AB" * 32}, {"nonce": "ab" * 32 + "\n"},
    {"seconds": -1}, {"seconds": 1e300}, {"seconds": "nan"}, {"seconds": True}, {"more": 1}, {"audit_head": "x"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_an_ill_formed_seal_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SealError):
        opened_task(with_seal(asked()[0], **change))


@given(seal=st.text(max_size=300), text=st.text(max_size=300), arrays=st.binary(max_size=300))
def test_whatever_comes_nothing_but_these_two_errors_is_raised(seal: str, text: str, arrays: bytes) -> None:
    _, task = asked()
    for fields in ({"seal": seal}, {"seal": seal, "text": text}, {"text": text, "arrays": arrays}, {"arrays": arrays}):
        for opening in (opened_task, lambda found: opened_reply(found, task)):
            with pytest.raises((SealError, ProtocolError)):
                opening(with_fields(asked()[0], **fields))


@pytest.mark.parametrize("group", [MESSAGE, "PATIENT TEXT", "\ud800", ""])
def test_arrays_of_undeclared_groups_are_refused_whoever_signed_them(group: str) -> None:
    record = RecordDict({**encode(TASK), group: to_array_record(MODEL)}) if group != MESSAGE else RecordDict({MESSAGE: to_array_record(MODEL)})
    packed = pack(record, text=TASK.model_dump_json())
    records, _ = seal_task(packed, site="north", seconds=5, signer=COORDINATOR)
    with pytest.raises(ProtocolError) as refused:
        opened_task(records)
    assert "PATIENT" not in str(refused.value)


def test_signed_junk_is_a_protocol_error() -> None:
    junk, _ = from_records(with_fields(asked()[0], arrays=b"junk" * 10))
    records, _ = seal_task(junk, site="north", seconds=5, signer=COORDINATOR)
    with pytest.raises(ProtocolError):
        opened_task(records)
