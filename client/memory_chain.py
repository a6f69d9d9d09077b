"""The chain of a simulated ledger: its rows are in memory while the run goes on, and every new one in one journal for all sites.

A simulation's ledger protects nobody, but it must charge as a hospital's does: a reservation is in the journal before the first gradient.
What costs a hospital's chain its time (a file and a transaction of its own, hashes, signatures) is done once, when the run ends: then every
site's rows are written as a chain that everybody can read and verify. An interrupted run is resumed from the journal.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from client.chain import FIRST_PREVIOUS, Chain, Row
from shared.errors import LedgerError
from shared.files import storage_errors

JOURNAL = "journal.jsonl"


class Journal:
    """The rows of all simulated ledgers of a run, in the order in which they were written, in one file of a folder.

    Raises:
        LedgerError: a line that is there is none of ours.
        StorageError: the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self._known: dict[str, list[Row]] = {}
        self._held = False
        self._moment = ""  # of all rows that are held together
        self._waiting: list[str] = []
        with storage_errors(self.path, "open the ledgers' journal"):
            folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:  # a killed process half wrote a line, before anything was trained on it
            self.path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
            try:
                site, kind, moment, body = json.loads(line)
                rows = self._known.setdefault(site, [])
                rows.append(_row(len(rows) + 1, kind, moment, json.dumps(body)))
            except (ValueError, TypeError) as error:
                raise LedgerError(f"{self.path}: line {number}: expected a ledger's row, got another text", "start a new run") from error

    def rows_of(self, site: str) -> list[Row]:
        """What an earlier, interrupted execution wrote for this site."""
        return self._known.pop(site, [])

    def now(self) -> str:
        """The time of a row."""
        return self._moment if self._held else datetime.now(UTC).isoformat(timespec="seconds")

    def write(self, site: str, row: Row) -> None:
        """Add a row of the site, whose name is JSON; it is in the file when `flush` returns."""
        self._waiting.append(f'[{site}, "{row.kind}", "{row.time}", {row.body}]\n')

    def flush(self) -> None:
        """Hand all rows to the system, unless held."""
        if self._waiting and not self._held:
            with storage_errors(self.path, "write the ledgers' journal"), open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._waiting))
            self._waiting.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hand the rows of the whole block over together, at its end: before anything that they charge for is trained."""
        self._moment, self._held = self.now(), True
        try:
            yield
        finally:
            self._held = False
            self.flush()


def _row(sequence: int, kind: str, moment: str, body: str) -> Row:
    """A row that is not hashed yet."""
    return Row(sequence=sequence, kind=kind, time=moment, body=body, previous="", hash="", signature=b"")


class MemoryChain(Chain):
    """The chain of one simulated site; its rows are hashed when it is closed."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        self._journal = journal
        self._name = json.dumps(path.stem)
        self.rows: list[Row] = journal.rows_of(path.stem)

    @property
    def head(self) -> str:
        """Nobody remembers it."""
        return FIRST_PREVIOUS

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Nobody else writes; on an exception nothing of the block is kept in memory, and it ends the run."""
        before = len(self.rows)
        try:
            yield
        except BaseException:
            del self.rows[before:]
            raise
        self._journal.flush()

    def append_entry(self, kind: str, entry: BaseModel) -> Row:
        """A new row at the end; call it inside `transaction`."""
        row = _row(len(self.rows) + 1, kind, self._journal.now(), entry.model_dump_json())
        self._journal.write(self._name, row)
        self.rows.append(row)
        return row

    def catch_up(self) -> list[Row]:
        """Nobody else has written."""
        return []

    def refresh(self) -> None:
        """Nobody else has written."""

    def close(self) -> None:
        """Write the rows as a chain of their own, which everybody can read and verify."""
        self.path.unlink(missing_ok=True)
        chain = Chain(self.path, signer=None, durable=False)
        with chain.transaction():
            for row in self.rows:
                chain.append(row.kind, json.loads(row.body), moment=row.time)
        chain.close()
