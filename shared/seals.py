"""Seals: a task is signed by the coordinator for one site, a reply by the site's daemon for one task.

Flower's node authentication signs a timestamp alone, so whoever ends TLS could replay, alter or forge what passes. A seal rides beside a packed
message. It signs (Ed25519) a statement that names

- for a task: the site it is for, a nonce drawn anew for every message, the seconds it may take, the coordinator's audit head, and the SHA-256 of
  the content: study hash, run, round and parameters;
- for a reply: the site, the nonce and the content's hash of the task it answers, the site's audit head, and the SHA-256 of its own content:
  update and statistics.

So an answer is good for one question alone, and a question for one site alone. What is not covered: that a message arrives, and when.
"""

import json
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from shared.envelope import Packed, from_records, pack, to_records, unpack, with_text
from shared.errors import ProtocolError, SealError
from shared.messages import GROUPS, JSON, MESSAGE, Content

NONCE_BYTES = 32
MAX_SEAL_CHARACTERS = 2000
MAX_SECONDS = 1e7  # a task that may take longer says this
HEX_256 = r"^[0-9a-f]{64}$"


class Seal(Content):
    """What rides beside a message. `seconds` is of a task: how long its answer is waited for."""

    nonce: str = Field(pattern=HEX_256)
    seconds: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    audit_head: str | None = Field(default=None, pattern=HEX_256)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedTask:
    """One question to one site, as both sides know it."""

    site: str
    nonce: str
    content: str  # SHA-256, hex
    seconds: float
    audit_head: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A message whose seal is good: its records as `shared.messages` reads them, and what the seal said."""

    record: RecordDict
    content: str  # SHA-256, hex
    audit_head: str | None


def packed_message(record: RecordDict, *, like: tuple[RecordDict, Packed] | None = None) -> Packed:
    """A message of `shared.messages`, packed.

    Args:
        like: another one and how it is packed; a round's tasks have the same array records, which are packed once for all sites.
    """
    fields = record[MESSAGE]
    assert isinstance(fields, ConfigRecord)
    text = str(fields[JSON])
    if like is not None and _same_arrays(record, like[0]):
        return with_text(like[1], text) if text != like[1].text else like[1]
    return pack(record, text=text)


def _same_arrays(record: RecordDict, other: RecordDict) -> bool:
    """Whether both hold the same objects, in the same order."""
    mine, others = ([(name, id(group)) for name, group in one.items() if isinstance(group, ArrayRecord)] for one in (record, other))
    return mine == others


def seal_task(
    packed: Packed, *, site: str, seconds: float, signer: Ed25519PrivateKey, audit_head: str | None = None
) -> tuple[RecordDict, SealedTask]:
    """The records to send to `site`, and what to hold its reply against."""
    nonce, within = secrets.token_hex(NONCE_BYTES), min(float(seconds), MAX_SECONDS)  # 5 is signed as 5.0
    task = SealedTask(site=site, nonce=nonce, content=packed.content, seconds=within, audit_head=audit_head)
    seal = Seal(nonce=task.nonce, seconds=task.seconds, audit_head=audit_head, signature=signer.sign(_task_statement(task)).hex())
    return to_records(packed, seal.model_dump_json()), task


def open_task(envelope: RecordDict, *, site: str, coordinator: Ed25519PublicKey) -> tuple[RecordDict, SealedTask]:
    """The message, and the task that the coordinator signed for this site.

    Raises:
        SealError: it has no seal of the coordinator's for this site and this content.
        ProtocolError: it is no packed message.
    """
    packed, text = from_records(envelope)
    seal = _parse(text)
    if seal.seconds is None:
        raise SealError("expected a task's seal, got a reply's")
    task = SealedTask(site=site, nonce=seal.nonce, content=packed.content, seconds=seal.seconds, audit_head=seal.audit_head)
    _verify(coordinator, seal, _task_statement(task), who="the coordinator")
    return _message(packed), task


def seal_reply(record: RecordDict, task: SealedTask, *, signer: Ed25519PrivateKey, audit_head: str | None = None) -> RecordDict:
    """The records to send as the answer to `task`."""
    packed = packed_message(record)
    signature = signer.sign(_reply_statement(task, packed.content, audit_head)).hex()
    return to_records(packed, Seal(nonce=task.nonce, audit_head=audit_head, signature=signature).model_dump_json())


def open_reply(envelope: RecordDict, task: SealedTask, *, site_key: Ed25519PublicKey) -> Opened:
    """The site's answer to this task.

    Raises:
        SealError: it is not the answer of this site to this task: forged, altered, or an answer to another.
        ProtocolError: it is no packed message.
    """
    packed, text = from_records(envelope)
    seal = _parse(text)
    if seal.nonce != task.nonce:
        raise SealError("expected the answer to this task, got one to another (a replay)")
    _verify(site_key, seal, _reply_statement(task, packed.content, seal.audit_head), who=f"site {task.site}")
    return Opened(record=_message(packed), content=packed.content, audit_head=seal.audit_head)


def _message(packed: Packed) -> RecordDict:
    arrays = unpack(packed)
    if set(arrays) - set(GROUPS):
        raise ProtocolError("expected arrays as parameters and statistics, got others")
    return RecordDict({MESSAGE: ConfigRecord({JSON: packed.text}), **arrays})


def _task_statement(task: SealedTask) -> bytes:
    return b"wardround task\n" + json.dumps([task.site, task.nonce, task.seconds, task.audit_head, task.content]).encode()


def _reply_statement(task: SealedTask, content: str, audit_head: str | None) -> bytes:
    return b"wardround reply\n" + json.dumps([task.site, task.nonce, task.content, audit_head, content]).encode()


def _parse(text: str) -> Seal:
    if len(text) > MAX_SEAL_CHARACTERS:
        raise SealError("expected a seal, got a longer text")
    try:
        return Seal.model_validate_json(text)
    except ValidationError:
        raise SealError("expected a sealed message, got one without a seal") from None


def _verify(key: Ed25519PublicKey, seal: Seal, statement: bytes, *, who: str) -> None:
    try:
        key.verify(bytes.fromhex(seal.signature), statement)
    except InvalidSignature:
        raise SealError(f"expected the signature of {who} on exactly this message, got another") from None
