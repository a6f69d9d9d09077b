"""Seals: a task is signed by the coordinator for one site, a reply by the site's daemon for one task.

Flower's node authentication signs a timestamp alone, so whoever ends TLS could replay, alter or forge what passes. A seal is a further
Flower record beside the message. It signs (Ed25519) a statement that names

- for a task: the site it is for, a nonce drawn anew for every message, the seconds it may take, the coordinator's audit head, and the SHA-256 of
  the content: study hash, run, round and parameters;
- for a reply: the site, the nonce and the content's hash of the task it answers, the site's audit head, and the SHA-256 of its own content:
  update and statistics.

So an answer is good for one question alone, and a question for one site alone. What is not covered: that a message arrives, and when.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from shared.errors import ProtocolError, SealError
from shared.messages import JSON, MESSAGE, PARAMETERS, STATISTICS, Content

SEAL = "seal"
NONCE_BYTES = 32
MAX_SEAL_CHARACTERS = 2000
HEX_256 = r"^[0-9a-f]{64}$"

ArraysDigest = Callable[[ArrayRecord], bytes]


class Seal(Content):
    """What rides beside a message. `seconds` is of a task: how long its answer is waited for."""

    nonce: str = Field(pattern=HEX_256)
    seconds: float | None = Field(default=None, gt=0, lt=1e7)
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


def seal_task(
    record: RecordDict, *, site: str, seconds: float, signer: Ed25519PrivateKey, audit_head: str | None = None, digest: ArraysDigest | None = None
) -> tuple[RecordDict, SealedTask]:
    """`record` with the coordinator's seal for `site`, and what to hold the reply against.

    Args:
        digest: gives `arrays_digest`; a round's messages share their arrays, which need be hashed once.
    """
    task = SealedTask(
        site=site,
        nonce=secrets.token_hex(NONCE_BYTES),
        content=content_digest(record, digest or arrays_digest),
        seconds=seconds,
        audit_head=audit_head,
    )
    signature = signer.sign(_task_statement(task)).hex()
    return _with_seal(record, Seal(nonce=task.nonce, seconds=seconds, audit_head=audit_head, signature=signature)), task


def open_task(record: RecordDict, *, site: str, coordinator: Ed25519PublicKey) -> tuple[RecordDict, SealedTask]:
    """The record without its seal, and the task that the coordinator signed for this site.

    Raises:
        SealError: it has no seal of the coordinator's for this site and this content.
    """
    content, seal = _without_seal(record)
    if seal.seconds is None:
        raise SealError("expected a task's seal, got a reply's")
    task = SealedTask(site=site, nonce=seal.nonce, content=content_digest(content), seconds=seal.seconds, audit_head=seal.audit_head)
    _verify(coordinator, seal, _task_statement(task), who="the coordinator")
    return content, task


def seal_reply(record: RecordDict, task: SealedTask, *, signer: Ed25519PrivateKey, audit_head: str | None = None) -> RecordDict:
    """`record` with the site's seal, as the answer to `task`."""
    signature = signer.sign(_reply_statement(task, content_digest(record), audit_head)).hex()
    return _with_seal(record, Seal(nonce=task.nonce, audit_head=audit_head, signature=signature))


def open_reply(record: RecordDict, task: SealedTask, *, site_key: Ed25519PublicKey) -> tuple[RecordDict, Seal]:
    """The record without its seal, and the seal.

    Raises:
        SealError: it is not the answer of this site to this task: forged, altered, or an answer to another.
    """
    content, seal = _without_seal(record)
    if seal.nonce != task.nonce:
        raise SealError("expected the answer to this task, got one to another (a replay)")
    _verify(site_key, seal, _reply_statement(task, content_digest(content), seal.audit_head), who=f"site {task.site}")
    return content, seal


def content_digest(record: RecordDict, digest: ArraysDigest | None = None) -> str:
    """SHA-256 (hex) of all a message says: its text, and names, types, shapes and bytes of its arrays.

    Raises:
        ProtocolError: it has other records than a message's.
    """
    if set(record) - {MESSAGE, PARAMETERS, STATISTICS}:
        raise ProtocolError("expected the records message, parameters and statistics, got others")
    whole = hashlib.sha256()
    for key in (MESSAGE, PARAMETERS, STATISTICS):
        part = record.get(key)
        match part:
            case None:
                whole.update(b"\x00" * 32)
            case ArrayRecord():
                whole.update((digest or arrays_digest)(part))
            case ConfigRecord():
                whole.update(_text_digest(part))
            case _:
                raise ProtocolError("expected text and arrays, got metrics")
    return whole.hexdigest()


def arrays_digest(arrays: ArrayRecord) -> bytes:
    """SHA-256 over every array's name, type, shape and bytes, in the order of names; `(32,)` bytes."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        head = json.dumps([name, array.dtype, list(array.shape), array.stype, len(array.data)]).encode()
        whole.update(len(head).to_bytes(8, "big"))
        whole.update(head)
        whole.update(array.data)
    return whole.digest()


def _text_digest(fields: ConfigRecord) -> bytes:
    text = fields.get(JSON)
    if set(fields) != {JSON} or not isinstance(text, str):
        raise ProtocolError("expected one JSON text, got other fields")
    return hashlib.sha256(text.encode()).digest()


def _task_statement(task: SealedTask) -> bytes:
    return b"wardround task\n" + json.dumps([task.site, task.nonce, task.seconds, task.audit_head, task.content]).encode()


def _reply_statement(task: SealedTask, content: str, audit_head: str | None) -> bytes:
    return b"wardround reply\n" + json.dumps([task.site, task.nonce, task.content, audit_head, content]).encode()


def _with_seal(record: RecordDict, seal: Seal) -> RecordDict:
    return RecordDict({**record, SEAL: ConfigRecord({JSON: seal.model_dump_json()})})


def _without_seal(record: RecordDict) -> tuple[RecordDict, Seal]:
    fields = record.get(SEAL)
    text = fields.get(JSON) if isinstance(fields, ConfigRecord) and set(fields) == {JSON} else None
    if not isinstance(text, str) or len(text) > MAX_SEAL_CHARACTERS:
        raise SealError("expected a sealed message, got one without a seal")
    try:
        seal = Seal.model_validate_json(text)
    except ValidationError:
        raise SealError("expected a sealed message, got one with a damaged seal") from None
    return RecordDict({key: value for key, value in record.items() if key != SEAL}), seal


def _verify(key: Ed25519PublicKey, seal: Seal, statement: bytes, *, who: str) -> None:
    try:
        key.verify(bytes.fromhex(seal.signature), statement)
    except InvalidSignature:
        raise SealError(f"expected the signature of {who} on exactly this message, got another") from None
