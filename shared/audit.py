"""An append-only audit log: JSON lines, each holding the hash of the line before, each signed; kept by every site and by the coordinator.

Line n is one canonical JSON object (sorted keys, no spaces): `sequence` (n, from 1), `time` (UTC), `event`, `details`, `previous` (the hash of
line n - 1), `hash` (SHA-256 over the five) and `signature` (Ed25519, of the log's owner, over a statement of the hash). The first is `begun`
and names owner, role and public key. Beside the log stands a signed mark, `audit.head`, of the last line. Order is by sequence: a clock that goes
back is no fault. Details hold names, shapes, bytes, hashes, epsilons and declared counts, never a patient's data.

Who finds what:

- Hashes and signatures: an edit, deletion, insertion or reorder by anybody who lacks the owner's key, a line of a foreign key, two lines of
  one number. A whole log written anew with another key is found only where the owner's key is known (`public_key`).
- The mark: lines cut off at the end, an older copy of the log put back, a deleted log. It is written after the line, so between the two a crash
  leaves it one line behind; never ahead. Whoever puts back log and mark together, or deletes both, is not found by it.
- The other side's memory (heads are exchanged every round; `witnessed_heads` reads them from the other's log): both of these, and an owner who
  rewrites and signs anew what was already witnessed: the row that the other saw is no longer there.
- Nobody finds what the owner never wrote down or wrote down wrongly, what an owner rewrote after the last exchange of heads, an older copy of log
  and mark from after it, or a site and a coordinator that rewrite both logs together.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, JsonValue

from shared.config import Settings
from shared.errors import AuditError, DataMissingError
from shared.files import storage_errors, write_atomic

Role = Literal["site", "coordinator"]
Scalar: TypeAlias = str | int | float | bool | None
Value: TypeAlias = "Scalar | Sequence[Value] | Mapping[str, Value]"
Details: TypeAlias = Mapping[str, Value]

BEGUN, RECOVERED = "begun", "recovered"
FORMAT: Literal[1] = 1
FIRST_PREVIOUS = "0" * 64
MAX_TEXT = 500  # characters of a string in details: room for a name or a hash, not for a record
MAX_INTEGER = 2**63
EVENT_PATTERN = re.compile(r"\S+( \S+)*")  # as FHIR's codes
MAX_EVENT = 100  # characters
FIRST_BYTES = b'{"details":{"format":'  # of every log, so that an unfinished first line is known from another file
REMEDY_DAMAGED = (
    "keep the log and its mark as evidence; to go on, move both elsewhere: a new log is begun, and the other side's memory will name what is missing"
)
REMEDY_UNFINISHED = "start what writes it: a line that a dying process left unfinished is then cut off, and the cut is recorded"
REMEDY_STORAGE = "check free space and permissions of the state folder"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class AuditRow(Settings):
    """One line."""

    sequence: int = Field(ge=1)
    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
    event: str
    details: dict[str, JsonValue]
    previous: Digest
    hash: Digest
    signature: Signature

    @classmethod
    def of(cls, line: bytes) -> "AuditRow":
        """The row that `line`, with its newline, is the canonical form of; its hash is that of its content.

        Raises:
            ValueError: it is not.
        """
        try:
            row = cls.model_validate(json.loads(line))
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if row.line() != line:
            raise ValueError("not in canonical form")
        if row.hash != row_hash(sequence=row.sequence, moment=row.time, event=row.event, details=row.details, previous=row.previous):
            raise ValueError("its hash is not that of its content")
        return row

    def line(self) -> bytes:
        """Canonical JSON and a newline."""
        return f"{_canonical(self.model_dump())}\n".encode()

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """True where the owner of `key` wrote it."""
        return _is_signed(row_statement(self.hash), self.signature, key)


class Begun(Settings):
    """What the first line says."""

    owner: str
    role: Role
    public_key: Digest  # Ed25519, hex
    format: Literal[1]

    def key(self) -> Ed25519PublicKey:
        """The key that all lines are signed with."""
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public_key))


class _Mark(Settings):
    """The last line, as it was written."""

    sequence: int = Field(ge=1)
    hash: Digest
    signature: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """A log that verified."""

    num_rows: int
    head: str  # hex
    owner: str
    role: Role
    public_key: str  # hex
    first_time: str
    last_time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """The last line known: its number, hash and bytes, and where it ends in the file (bytes)."""

    num_rows: int = 0
    head: str = FIRST_PREVIOUS
    line: bytes = b""
    end: int = 0

    def after(self, row: AuditRow) -> "_Tail":
        """With `row` behind it."""
        line = row.line()
        return _Tail(num_rows=row.sequence, head=row.hash, line=line, end=self.end + len(line))


class AuditLog:
    """The log of one site or coordinator. Safe for several threads, and for several processes: each appends after what the others wrote.

    Opening reads the lines from the mark on and finds what is wrong at the end; `verify_audit` reads all.

    Args:
        path: the file; begun where it is absent.
        owner: the site's or coordinator's name.
        signer: its key.

    Raises:
        AuditError: the log is damaged, was put back or lost, or is another's.
        StorageError: it cannot be read or written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "audit.jsonl"
        >>> log = AuditLog(path, owner="north", role="site", signer=Ed25519PrivateKey.generate())
        >>> head = log.append("update sent", {"round": 1, "study_hash": "ab" * 32, "bytes": 4096, "epsilon": 0.12})
        >>> verify_audit(path, witnessed={"coordinator": head}).num_rows
        2
    """

    def __init__(self, path: Path, *, owner: str, role: Role, signer: Ed25519PrivateKey) -> None:
        self.path = path
        self._signer = signer
        self._begun = Begun(owner=owner, role=role, public_key=signer.public_key().public_bytes_raw().hex(), format=FORMAT)
        self._lock = threading.Lock()
        self._tail = _Tail()
        with storage_errors(path, "make the folder of the audit log", remedy=REMEDY_STORAGE):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._exclusive(create=True) as file:
            self._open(file)

    @property
    def head(self) -> str:
        """Hash (hex) of the last row known: what the other side remembers."""
        return self._tail.head

    @property
    def num_rows(self) -> int:
        """Rows known."""
        return self._tail.num_rows

    def append(self, event: str, details: Details) -> str:
        """A new row, on the disk; the new head (hex) comes back. On an error nothing of it stands, or all of it (only the very last sync failed).

        Args:
            event: what happened, in a few words: never begun or recovered, which are the log's own.
            details: declared names, shapes, bytes, hashes, epsilons, counts. `audit_head` (with `site`) is kept for heads of the *other* party's log;
                `outcome` ("ok", "refused", "failed"), `reason`, `study`, `study_hash`, `site` and `coordinator` are understood by the FHIR export.

        Raises:
            AuditError: the log was damaged, put back or lost since it was opened.
            StorageError: the disk is full or the folder cannot be written.
            AssertionError: the details hold what no row may hold.
        """
        if not (EVENT_PATTERN.fullmatch(event) and len(event) <= MAX_EVENT) or event in (BEGUN, RECOVERED):
            raise AssertionError("an audit event is a few words of our own")
        _check_declared(details, "details")
        with self._exclusive() as file:
            self._settle(file, torn=self._catch_up(file))
            self._write(file, event, details)
            return self.head

    def holds(self, head: str) -> bool:
        """True where the log has a row with this hash (hex), written by its owner."""
        needle = head.encode()
        with self._exclusive() as file, os.fdopen(file, "rb", closefd=False) as lines:
            for line in lines:
                if needle in line:
                    with contextlib.suppress(ValueError):
                        row = AuditRow.of(line)
                        if row.hash == head and row.signed_by(self._signer.public_key()):
                            return True
        return False

    def details_of(self, event: str) -> list[dict[str, JsonValue]]:
        """The details of every row of this event, oldest first. Rows before the mark are believed as they stand: `verify_audit` reads them all.

        Raises:
            AuditError: such a row is damaged.
            StorageError: the log cannot be read.
        """
        needle, found = f'"event":{json.dumps(event)}'.encode(), []
        with self._exclusive() as file, os.fdopen(file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                if needle in line:
                    try:
                        row = json.loads(line)
                        if row["event"] == event:
                            found.append(dict(row["details"]))
                    except (ValueError, TypeError, KeyError, RecursionError):
                        raise _damaged(self.path, number, "it is no row") from None
        return found

    @contextlib.contextmanager
    def _exclusive(self, *, create: bool = False) -> Iterator[int]:
        """The open file, which no other thread and no other process reads or writes meanwhile; the system's errors as ours."""
        with self._lock, storage_errors(self.path, "read or append to the audit log", remedy=REMEDY_STORAGE):
            try:
                file = os.open(self.path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o666)  # as the umask allows
            except FileNotFoundError:
                raise _damaged(self.path, 1, "expected the audit log that was begun here, found none: it was lost") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)  # and so unlocks

    def _open(self, file: int) -> None:
        """Go to the marked line and from there to the end; begin a log that is empty."""
        mark_file = mark_path(self.path)
        for scrap in self.path.parent.glob(f".{mark_file.name}.*"):  # of processes that were killed while they marked
            scrap.unlink(missing_ok=True)
        mark = _parse_mark(_read_if_there(mark_file), mark_file)
        if mark is not None:
            _check_mark(mark, self._signer.public_key(), mark_file)
            self._tail = self._marked_tail(file, mark)
        torn = self._catch_up(file)
        if mark is None and self.num_rows > 1:
            raise _unmarked(self.path)
        self._settle(file, torn=torn)
        if mark is None or mark.sequence < self.num_rows:
            self._mark(self._tail)

    def _marked_tail(self, file: int, mark: _Mark) -> _Tail:
        """The state when the mark was written; the lines before are only counted, but for the first."""
        number = end = 0
        with os.fdopen(file, "rb", closefd=False) as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                number, end = number + 1, end + len(line)
                if number == 1:
                    self._check_ours(_begun_of(_parsed(line, self.path, 1), self.path))
                if number == mark.sequence:
                    row = _parsed(line, self.path, number)
                    _check_row(row, number=number, previous=row.previous, key=self._signer.public_key(), path=self.path)
                    _check_marked(row, mark, self.path)
                    return _Tail(num_rows=number, head=row.hash, line=line, end=end)
        raise _shorter_than_mark(self.path, number, mark)

    def _check_ours(self, begun: Begun) -> None:
        if begun != self._begun:
            expected, got = (f"{item.role} {item.owner!r} with key {item.public_key[:16]}..." for item in (self._begun, begun))
            raise AuditError(
                f"{self.path}: line 1: expected the audit log of {expected}, got that of {got}", "point to the folder that belongs to this key"
            )

    def _catch_up(self, file: int) -> int:
        """Read and verify what other processes appended; how many bytes a killed one left unfinished at the end comes back."""
        tail = self._tail
        if os.pread(file, len(tail.line), tail.end - len(tail.line)) != tail.line:
            raise _damaged(self.path, tail.num_rows, "it is not the one that was there: the file was put back to an earlier state")
        *lines, torn = _read_from(file, tail.end).split(b"\n")
        if not torn and lines and b"\0" in lines[-1]:  # its blocks were not all on the disk when the machine died
            torn = lines.pop() + b"\n"
        for line in lines:
            number = self.num_rows + 1
            row = _parsed(line + b"\n", self.path, number)
            if number == 1:
                self._check_ours(_begun_of(row, self.path))
            _check_row(row, number=number, previous=self.head, key=self._signer.public_key(), path=self.path)
            self._tail = self._tail.after(row)
        if torn and not self.num_rows and not (torn.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(torn) or not torn.strip(b"\0\n")):
            raise _damaged(self.path, 1, "expected the beginning of an audit log, got another file")
        return len(torn)

    def _settle(self, file: int, *, torn: int) -> None:
        """Cut off what is unfinished, begin a log that is empty, and record the cut."""
        if torn:
            os.ftruncate(file, self._tail.end)
            os.fsync(file)
        if not self.num_rows:
            self._write(file, BEGUN, self._begun.model_dump())
        if torn:
            self._write(file, RECOVERED, {"bytes_cut": torn})

    def _write(self, file: int, event: str, details: Details) -> None:
        """Append a row and mark it; where either fails, what was written is taken back."""
        before = self._tail
        row = _signed_row(event, details, after=before, signer=self._signer)
        try:
            _write_whole(file, row.line())
            self._mark(before.after(row))
        except BaseException:
            if not self._is_marked(row):  # if it is, the row stays: a log shorter than its mark would be a rollback; the next append finds it
                with contextlib.suppress(OSError):
                    os.ftruncate(file, before.end)
                    os.fsync(file)
            raise
        self._tail = before.after(row)

    def _mark(self, tail: _Tail) -> None:
        signature = self._signer.sign(mark_statement(tail.num_rows, tail.head)).hex()
        write_atomic(mark_path(self.path), _canonical({"sequence": tail.num_rows, "hash": tail.head, "signature": signature}) + "\n")

    def _is_marked(self, row: AuditRow) -> bool:
        try:
            mark = _parse_mark(_read_if_there(mark_path(self.path)), self.path)
        except (OSError, AuditError):
            return True  # not known: keep the row
        return mark is not None and mark.sequence >= row.sequence


def mark_path(path: Path) -> Path:
    """Where the mark of the log at `path` stands."""
    return path.with_suffix(".head")


def row_hash(*, sequence: int, moment: str, event: str, details: Mapping[str, object], previous: str) -> str:
    """SHA-256 (hex) over everything a row says and the hash of the row before."""
    return hashlib.sha256(_canonical([sequence, moment, event, details, previous]).encode()).hexdigest()


def row_statement(digest: str) -> bytes:
    """What the owner signs in a row with this hash (hex)."""
    return f"wardround: the audit log has a row with hash {digest}".encode()


def mark_statement(sequence: int, digest: str) -> bytes:
    """What the owner signs in the mark."""
    return f"wardround: the audit log had {sequence} rows, the last with hash {digest}".encode()


# Reading ------------------------------------------------------------------------------------------------------------------------


def verify_audit(path: Path, *, public_key: str | None = None, witnessed: Mapping[str, str] | Sequence[str] = ()) -> AuditSummary:
    """What the log at `path` is, where every line verifies; it can be open and written to meanwhile.

    Args:
        public_key: the owner's, hex; None believes the one in the first line.
        witnessed: heads (hex) that others saw; a mapping says who saw which.

    Raises:
        AuditError: the first line that does not verify, by its number; or a witnessed row is missing.
        DataMissingError: there is no log.
        StorageError: it cannot be read.
    """
    heads = {head: who for who, head in witnessed.items()} if isinstance(witnessed, Mapping) else dict.fromkeys(witnessed, "the other side")
    first = last = None
    for row in verified_rows(path, public_key=public_key):
        first, last = first or row, row
        heads.pop(row.hash, None)
    assert first is not None and last is not None
    for head, who in heads.items():
        raise AuditError(
            f"{path}: expected the row {head} that {who} saw, got {last.sequence} rows without it: rows were cut off, put back or written anew",
            REMEDY_DAMAGED,
        )
    begun = _begun_of(first, path)
    return AuditSummary(
        num_rows=last.sequence,
        head=last.hash,
        owner=begun.owner,
        role=begun.role,
        public_key=begun.public_key,
        first_time=first.time,
        last_time=last.time,
    )


def verified_rows(path: Path, *, public_key: str | None = None) -> Iterator[AuditRow]:
    """Every row of the log at `path`, oldest first, each verified before it comes; the mark is compared after the last.

    Raises:
        AuditError, DataMissingError, StorageError: as `verify_audit`; nothing is proven of rows that came before.
    """
    with storage_errors(path, "read the audit log", remedy=REMEDY_STORAGE):
        size, mark = _snapshot(path)
        number, previous, key, end = 0, FIRST_PREVIOUS, None, 0
        with open(path, "rb") as lines:
            while end < size:
                line = lines.readline()
                number, end = number + 1, end + len(line)
                if mark is not None and number <= mark.sequence and not line.endswith(b"\n"):
                    raise _shorter_than_mark(path, number - 1, mark)
                row = _parsed(line, path, number)
                if key is None:
                    key = _key_of(row, path, public_key)
                    if mark is not None:
                        _check_mark(mark, key, mark_path(path))
                _check_row(row, number=number, previous=previous, key=key, path=path)
                if mark is not None and number == mark.sequence:
                    _check_marked(row, mark, path)
                previous = row.hash
                yield row
    if mark is not None and number < mark.sequence:
        raise _shorter_than_mark(path, number, mark)
    if number == 0:
        raise _damaged(path, 1, "expected the beginning of an audit log, got an empty file")
    if mark is None and number > 1:  # a process killed after the first line leaves no mark; after the second it does
        raise _unmarked(path)


def read_begun(path: Path, *, public_key: str | None = None) -> Begun:
    """Whose log it is that stands at `path`; only its first line is verified.

    Raises:
        AuditError, DataMissingError, StorageError: as `verify_audit`.
    """
    first = next(verified_rows(path, public_key=public_key), None)
    assert first is not None  # an empty log is an error
    return _begun_of(first, path)


def witnessed_heads(path: Path, *, site: str | None) -> list[str]:
    """The heads (hex) of the other party's log that the log at `path` holds: `audit_head` of every row whose `site` is this one (None: any).

    Raises:
        AuditError, DataMissingError, StorageError: as `verify_audit`.
    """
    details = (row.details for row in verified_rows(path))
    heads = (found.get("audit_head") for found in details if site is None or found.get("site") == site)
    return list(dict.fromkeys(head for head in heads if isinstance(head, str)))


def _snapshot(path: Path) -> tuple[int, _Mark | None]:
    """Size in bytes and mark at one moment: between two appends."""
    mark_file = mark_path(path)
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return os.fstat(file.fileno()).st_size, _parse_mark(_read_if_there(mark_file), mark_file)
    except FileNotFoundError:
        if mark_file.exists():
            raise _damaged(path, 1, "expected the audit log whose mark is beside it, found none: it was lost") from None
        raise DataMissingError(
            f"{path}: expected an audit log, found none", "check the path; a log is begun when its site or coordinator starts"
        ) from None


def _parsed(line: bytes, path: Path, number: int) -> AuditRow:
    if not line.endswith(b"\n"):
        raise AuditError(f"{path}: line {number}: it is not finished: a process died while it wrote, or the file was cut", REMEDY_UNFINISHED)
    try:
        return AuditRow.of(line)
    except ValueError:
        raise _damaged(path, number, "it is not a row as it was written: it was edited") from None


def _check_row(row: AuditRow, *, number: int, previous: str, key: Ed25519PublicKey, path: Path) -> None:
    if row.sequence != number or row.previous != previous:
        fault = f"one was deleted, inserted or swapped (expected number {number}, got {row.sequence})"
        raise _damaged(path, number, f"it does not follow the line before: {fault}")
    if not row.signed_by(key):
        raise _damaged(path, number, "its signature is not the owner's: it was written by somebody else")


def _begun_of(row: AuditRow, path: Path) -> Begun:
    try:
        if row.event != BEGUN:
            raise ValueError(row.event)
        return Begun.model_validate(row.details)
    except ValueError:
        raise _damaged(path, 1, f"expected the beginning of an audit log of format {FORMAT}, got another row") from None


def _key_of(row: AuditRow, path: Path, expected: str | None) -> Ed25519PublicKey:
    begun = _begun_of(row, path)
    if expected is not None and begun.public_key != expected:
        raise _damaged(path, 1, f"expected a log signed with key {expected}, got key {begun.public_key}")
    return begun.key()


def _parse_mark(text: bytes | None, path: Path) -> _Mark | None:
    try:
        return None if text is None else _Mark.model_validate_json(text)
    except ValueError:
        raise AuditError(f"{path}: expected the mark of an audit log, got a damaged file", REMEDY_DAMAGED) from None


def _check_mark(mark: _Mark, key: Ed25519PublicKey, path: Path) -> None:
    if not _is_signed(mark_statement(mark.sequence, mark.hash), mark.signature, key):
        raise AuditError(f"{path}: expected a mark signed by the log's owner, got another: it was edited or belongs to another log", REMEDY_DAMAGED)


def _check_marked(row: AuditRow, mark: _Mark, path: Path) -> None:
    if row.hash != mark.hash:
        raise _damaged(path, row.sequence, "it is not the one that was marked: lines were written anew after others were cut off")


def _is_signed(statement: bytes, signature: str, key: Ed25519PublicKey) -> bool:
    try:
        key.verify(bytes.fromhex(signature), statement)
    except InvalidSignature:
        return False
    return True


def _damaged(path: Path, number: int, why: str) -> AuditError:
    return AuditError(f"{path}: line {number}: {why}", REMEDY_DAMAGED)


def _shorter_than_mark(path: Path, number: int, mark: _Mark) -> AuditError:
    return _damaged(path, number + 1, f"it is missing: the mark knows {mark.sequence} lines, the log has {number}: it was cut off or put back")


def _unmarked(path: Path) -> AuditError:
    mark = mark_path(path)
    return AuditError(f"{mark}: expected the mark of the audit log beside it, found none", "restore it, or copy it together with the log")


# Writing ------------------------------------------------------------------------------------------------------------------------


def _signed_row(event: str, details: Details, *, after: _Tail, signer: Ed25519PrivateKey) -> AuditRow:
    sequence, moment = after.num_rows + 1, datetime.now(UTC).isoformat(timespec="milliseconds")
    content = json.loads(_canonical(details))  # as it will be read: tuples are lists
    digest = row_hash(sequence=sequence, moment=moment, event=event, details=content, previous=after.head)
    signature = signer.sign(row_statement(digest)).hex()
    return AuditRow(sequence=sequence, time=moment, event=event, details=content, previous=after.head, hash=digest, signature=signature)


def _write_whole(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)


def _read_from(file: int, start: int) -> bytes:
    with os.fdopen(file, "rb", closefd=False) as content:
        content.seek(start)
        return content.read()


def _read_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_declared(value: object, where: str) -> None:
    """Return where `value` is plain, finite and short. Explicit, for `assert` can be switched off; and without the value, which nobody may see."""
    match value:
        case None | bool():
            sound = True
        case str():
            sound = len(value) <= MAX_TEXT
        case int():
            sound = abs(value) < MAX_INTEGER
        case float():
            sound = math.isfinite(value)
        case list() | tuple():
            sound = True
            _check_all(value, where)
        case Mapping():
            sound = all(isinstance(key, str) and len(key) <= MAX_TEXT for key in value)
            _check_all(value.values(), where)
        case _:
            sound = False
    if not sound:
        raise AssertionError(f"{where}: an audit row holds short strings, finite numbers, and lists and tables of them, got {type(value).__name__}")


def _check_all(values: Iterable[object], where: str) -> None:
    for value in values:
        _check_declared(value, where)
