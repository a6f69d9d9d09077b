"""An append-only chain of signed rows in one SQLite file: what a ledger is written in.

Row n holds the hash of row n - 1. Its own hash is SHA-256 over its canonical JSON, and the site's Ed25519 key signs that hash, so a row
that was edited, deleted from the middle, swapped, or hashed anew is found by everybody who reads. Rows cut off at the end are not: for
that somebody else must remember the head (the coordinator's witness does).

SQLite in WAL mode with full sync, and not a file that we append to ourselves: its exclusive transactions keep two processes from
spending the same room, and a row that a dying machine half wrote is gone when the file is opened again, never half there.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel

from shared.errors import LedgerError, StorageError

Body = dict[str, object]

GENESIS = "genesis"
FIRST_PREVIOUS = "0" * 64
LOCK_TIMEOUT_SECONDS = 30
REMEDY_DAMAGED = "keep the file, and let 'wardround ledger repair' build one from it that counts at least as much"
REMEDY_STORAGE = "check free space and permissions of the state folder"
_TABLES = """
CREATE TABLE IF NOT EXISTS entry (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, hash TEXT NOT NULL, signature BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS patient (hash BLOB PRIMARY KEY, part TEXT NOT NULL) WITHOUT ROWID;
"""
COLUMNS = "sequence, kind, time, body, previous, hash, signature"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entry; `body` is canonical JSON, `signature` empty in a simulation's chain, which has no key."""

    sequence: int  # from 1
    kind: str
    time: str
    body: str
    previous: str
    hash: str
    signature: bytes

    @classmethod
    def of(cls, values: tuple[object, ...]) -> "Row":
        """The row in a tuple of `COLUMNS`, with whatever types the file held; `verify_rows` judges them."""
        return cls(**dict(zip(COLUMNS.split(", "), values, strict=True)))  # type: ignore[arg-type]  # judged later

    def content(self) -> Body:
        """The body as a table."""
        return dict(json.loads(self.body))


def row_hash(*, sequence: int, kind: str, moment: str, body: str, previous: str) -> str:
    """SHA-256 (hex) over everything a row says and the hash of the row before."""
    return hashlib.sha256(json.dumps([sequence, kind, moment, body, previous], separators=(",", ":")).encode()).hexdigest()


class Chain:
    """The rows of one file, verified as they are read.

    Args:
        signer: the site's key; None for a simulation's chain.
        durable: False: no write-ahead log and no fsync (a killed process still loses nothing, a dead machine may).

    Raises:
        LedgerError: a row does not verify; it says which and how.
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, signer: Ed25519PrivateKey | None, durable: bool = True) -> None:
        self.path = path
        self._signer = signer
        self.rows: list[Row] = []
        with self.storage():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
            if durable:
                self._write_ahead()
            self.database.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self.database.executescript(_TABLES)

    @classmethod
    def reading(cls, path: Path) -> "Chain":
        """An existing chain, opened for reading only; nothing is read yet.

        Raises:
            StorageError: it cannot be opened.
        """
        chain = cls.__new__(cls)
        chain.path, chain._signer, chain.rows = path, None, []
        with chain.storage():
            chain.database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
        return chain

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read in the block is of one moment."""
        with self.storage():
            self.database.execute("BEGIN")
            try:
                yield
            finally:
                self.database.execute("ROLLBACK")

    def _write_ahead(self) -> None:
        """Switch to a write-ahead log. SQLite does not wait here for another process that does so to the same new file, so we do."""
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                self.database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @property
    def head(self) -> str:
        """Hash of the last row known."""
        return self.rows[-1].hash if self.rows else FIRST_PREVIOUS

    def catch_up(self) -> list[Row]:
        """Read and verify the rows that came since; they come back.

        Raises:
            LedgerError: one does not verify, or the last one known is no longer there.
        """
        known = len(self.rows)
        with self.storage():
            query = f"SELECT {COLUMNS} FROM entry WHERE sequence >= ? ORDER BY sequence"
            rows = [Row.of(values) for values in self.database.execute(query, (max(known, 1),))]
        if known and (not rows or rows.pop(0).hash != self.head):
            raise self._damaged(known, "it is not the one that was there: the file was put back to an earlier state")
        verify_rows(rows, previous=self.head, first=known + 1, path=self.path, key=self._key(rows))
        self.rows.extend(rows)
        return rows

    def refresh(self) -> None:
        """Read what other processes wrote, but within a transaction, which is up to date."""
        if not self.database.in_transaction:
            self.catch_up()

    def _key(self, rows: list[Row]) -> Ed25519PublicKey | None:
        first = self.rows[0] if self.rows else rows[0] if rows else None
        return None if first is None else public_key_of(first, self.path)

    def append(self, kind: str, body: Body, *, moment: str | None = None) -> Row:
        """A new row at the end, of now unless `moment` says otherwise; call it inside `transaction`."""
        sequence, previous = len(self.rows) + 1, self.head
        moment = moment or datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = row_hash(sequence=sequence, kind=kind, moment=moment, body=text, previous=previous)
        signature = self._signer.sign(bytes.fromhex(digest)) if self._signer is not None else b""
        row = Row(sequence=sequence, kind=kind, time=moment, body=text, previous=previous, hash=digest, signature=signature)
        self._insert(row)
        return row

    def append_entry(self, kind: str, entry: BaseModel) -> Row:
        """As `append`, of a body that was checked."""
        return self.append(kind, entry.model_dump(mode="json"))

    def restore(self, rows: list[Row]) -> None:
        """Write `rows` of an earlier file as they were; call it inside `transaction`, on an empty chain."""
        for row in rows:
            self._insert(row)

    def _insert(self, row: Row) -> None:
        values = (row.sequence, row.kind, row.time, row.body, row.previous, row.hash, row.signature)
        self.database.execute(f"INSERT INTO entry ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self.rows.append(row)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Exclusive among all processes, and up to date with what they wrote; on an exception nothing of the block was written."""
        with self.storage():
            self.database.execute("BEGIN IMMEDIATE")
            before = None
            try:
                self.catch_up()
                before = len(self.rows)
                yield
                self.database.execute("COMMIT")
            except BaseException:
                if before is not None:
                    del self.rows[before:]
                if self.database.in_transaction:
                    self.database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def storage(self) -> Iterator[None]:
        """SQLite's and the system's errors of the block as ours."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}", REMEDY_STORAGE) from error
        except sqlite3.OperationalError as error:
            if "no such" in str(error):  # table or column: a file of something else, or an attacker's
                raise LedgerError(f"{self.path}: expected a ledger, got another file: {error}", REMEDY_DAMAGED) from error
            raise StorageError(f"{self.path}: the ledger could not be read or written: {error}", REMEDY_STORAGE) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path}: the ledger is damaged: {error}", REMEDY_DAMAGED) from error

    def close(self) -> None:
        """Release the file."""
        self.database.close()

    def _damaged(self, sequence: int, why: str) -> LedgerError:
        return LedgerError(f"{self.path}: row {sequence}: {why}", REMEDY_DAMAGED)


def verify_rows(rows: list[Row], *, previous: str, first: int, path: Path, key: Ed25519PublicKey | None) -> None:
    """Return where `rows` continue the chain after the hash `previous`, without a gap, each signed by `key` (None: a simulation's chain).

    Raises:
        LedgerError: the first row that does not.
    """
    for number, row in enumerate(rows, start=first):
        fault = _fault_of(row, number, previous, key)
        if fault is not None:
            raise LedgerError(f"{path}: row {number}: {fault}", REMEDY_DAMAGED)
        previous = row.hash


def _fault_of(row: Row, number: int, previous: str, key: Ed25519PublicKey | None) -> str | None:
    texts = (row.kind, row.time, row.body, row.previous, row.hash)
    if not isinstance(row.sequence, int) or not all(isinstance(text, str) for text in texts) or not isinstance(row.signature, bytes):
        return "its columns have other types than were written"
    if row.sequence != number or row.previous != previous:
        return f"it does not follow the row before: one was deleted or swapped (expected number {number}, got {row.sequence})"
    if row.hash != row_hash(sequence=row.sequence, kind=row.kind, moment=row.time, body=row.body, previous=row.previous):
        return "its hash is not that of its content: it was edited"
    if key is None:
        return "it is signed, in a chain without a key" if row.signature else None
    try:
        key.verify(row.signature, bytes.fromhex(row.hash))
    except InvalidSignature:
        return "its signature is not this site's: it was written by somebody else"
    return None


def public_key_of(genesis: Row, path: Path) -> Ed25519PublicKey | None:
    """The key that the first row says all rows are signed with; None in a simulation's chain.

    Raises:
        LedgerError: it is no genesis, or its key is none.
    """
    try:
        text = genesis.content()["public_key"] if genesis.kind == GENESIS else 0
        return None if text is None else Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(text)))
    except (KeyError, ValueError, TypeError) as error:
        raise LedgerError(f"{path}: row 1: expected the genesis of a ledger with its public key, got another row", REMEDY_DAMAGED) from error


def public_key_text(signer: Ed25519PrivateKey | None) -> str | None:
    """The public half of `signer`, as genesis holds it (hex)."""
    return None if signer is None else signer.public_key().public_bytes_raw().hex()
