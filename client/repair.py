"""Mend a ledger that does not verify, was lost, or was put back to an earlier copy. A mended ledger counts at least what was spent.

Why it never counts less: every row that verifies is kept with its charge, and whatever is gone was admitted by a filter that kept the
limit, so it cost at most the limit, which is charged in full. Nothing can be spent then until the hospital raises the limit, and what it
adds is all there is. Assumes: the limit was never higher than the one given here.
"""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.account import Account, Repair
from client.chain import COLUMNS, FIRST_PREVIOUS, Row, public_key_text, verify_rows
from client.ledger import Ledger
from shared.errors import LedgerError
from shared.files import storage_errors
from shared.plan import Limit


def repair_ledger(path: Path, *, cohort: str, limit: Limit, signer: Ed25519PrivateKey, heads: Sequence[str] = ()) -> list[str]:
    """Mend the ledger at `path`; what was done comes back, in sentences: none where it verifies and holds `heads`.

    Args:
        limit: charged in full for what is gone; also where an earlier repair has charged it, for a copy made after that may have been put back.
        heads: the rows (hex) that coordinators saw last.

    Raises:
        LedgerError: it belongs to another site or cohort, which is no damage.
        StorageError: the folder cannot be written.
    """
    rows, account = salvage(path, signer)
    if account.genesis is not None and (account.genesis.cohort, account.genesis.public_key) != (cohort, public_key_text(signer)):
        raise LedgerError(
            f"{path}: expected the ledger of cohort {cohort!r}, got that of {account.genesis.cohort!r}", "it is not damaged, but another's"
        )
    unit = "patient" if account.genesis is None else account.genesis.relation.rsplit(" ", 1)[-1]
    known = {row.hash for row in rows} | {head for repair in account.repairs for head in repair.heads}
    lost = tuple(head for head in heads if head not in known)
    charged = f"epsilon {limit.epsilon:g}, the whole limit, is charged for what is gone; raise policy.max_epsilon to go on"
    if not _verifies(path):
        repair = Repair(spent=limit, heads=lost, rebuilt=True, reason="rows were damaged or missing")
        aside = _replace(path, lambda new: Ledger.write_restored(new, rows, repair, cohort=cohort, unit=unit, limit=limit, signer=signer))
        kept = [] if aside is None else [f"the damaged file was kept as {aside.name}"]
        return [*kept, f"{len(rows)} rows verified and were kept", charged]
    if not lost:
        return []
    ledger = Ledger(path, cohort=cohort, unit=unit, limit=limit, signer=signer)
    ledger.mark_repaired(Repair(spent=limit, heads=lost, rebuilt=False, reason="it was put back to an earlier state"))
    ledger.close()
    return [charged]


def salvage(path: Path, signer: Ed25519PrivateKey) -> tuple[list[Row], Account]:
    """The longest beginning of the chain that verifies and makes sense, and what it adds up to; nothing of a file that is no ledger."""
    rows: list[Row] = []
    account = Account()
    if not path.exists():
        return rows, account
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for values in database.execute(f"SELECT {COLUMNS} FROM entry ORDER BY sequence"):
                row = Row.of(values)
                previous = rows[-1].hash if rows else FIRST_PREVIOUS
                verify_rows([row], previous=previous, first=len(rows) + 1, path=path, key=signer.public_key())
                account.apply([row])
                rows.append(row)
    except (sqlite3.DatabaseError, LedgerError):
        pass  # what came before is what can be kept
    return rows, account


def _verifies(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        Ledger.read(path).close()
    except LedgerError:
        return False
    return True


def _replace(path: Path, write: Callable[[Path], None]) -> Path | None:
    """`write` makes the file anew, in one step; what was there is kept beside it. A crash at any moment leaves the damaged file or the new one."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    new, aside = path.with_name(f".{path.name}.{moment}"), path.with_name(f"{path.name}.damaged-{moment}")
    with storage_errors(path, "repair the ledger"):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        if existed:
            with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the old log, replayed, would spoil the new file
            shutil.copy2(path, aside)
        write(new)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        os.replace(new, path)
    return aside if existed else None
