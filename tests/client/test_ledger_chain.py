"""A row that was edited, deleted, swapped, hashed anew or forged, and a ledger that was lost or put back, are refused; a mended one over-counts."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client.account import Event, Reserve
from client.chain import row_hash
from client.ledger import Ledger, PlannedStudy, begun_mark
from client.repair import repair_ledger
from shared.errors import BudgetExhaustedError, LedgerError, StorageError, WardroundError
from shared.plan import Limit
from shared.privacy import PrivacyEvent, renyi_budget

LIMIT = Limit(epsilon=3.0, delta=1e-4)
ROUND = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=5)
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def open_ledger(path: Path, limit: Limit = LIMIT) -> Ledger:
    return Ledger(path, cohort="north", unit="patient", limit=limit, signer=SIGNER)


def charge(ledger: Ledger, run: str, rounds: int, *, commit: bool = True) -> None:
    plan = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=5 * max(rounds, 1))
    ledger.admit(PlannedStudy(run=run, study="s", study_hash="0" * 64, training=plan))
    for number in range(rounds):
        row = ledger.reserve(
            Reserve(run=run, account="training", fold=1, round=number + 1, request=f"{number:064x}", event=Event.of(ROUND)), again=True
        )
        if commit:
            ledger.commit(row, steps=5, update="a" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A closed ledger of two runs, 14 rows with patients."""
    path = tmp_path / "ledgers" / "north.sqlite"
    ledger = open_ledger(path)
    ledger.bind_patients([b"a" * 32, b"b" * 32], test=[False, True], merged=False)
    charge(ledger, "run-1", 3)
    charge(ledger, "run-2", 2)
    ledger.close()
    yield path


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


def rehash(path: Path, sequence: int, *, signature: bytes | None = None) -> None:
    """Hash the row anew as an attacker would, and everything after it."""
    with closing(sqlite3.connect(path)) as database, database:
        rows = database.execute(
            "SELECT sequence, kind, time, body, previous FROM entry WHERE sequence >= ? ORDER BY sequence", (sequence,)
        ).fetchall()
        previous = rows[0][4]
        for number, kind, moment, body, _ in rows:
            digest = row_hash(sequence=number, kind=kind, moment=moment, body=body, previous=previous)
            database.execute("UPDATE entry SET previous = ?, hash = ? WHERE sequence = ?", (previous, digest, number))
            if signature is not None:
                database.execute(
                    "UPDATE entry SET signature = ? WHERE sequence = ?",
                    (Ed25519PrivateKey.from_private_bytes(signature).sign(bytes.fromhex(digest)), number),
                )
            previous = digest


def swap(path: Path) -> None:
    edit(
        path,
        "UPDATE entry SET sequence = -1 WHERE sequence = 4",
        "UPDATE entry SET sequence = 4 WHERE sequence = 6",
        "UPDATE entry SET sequence = 6 WHERE sequence = -1",
    )


def cheaper(path: Path) -> None:
    """An attacker makes a charge smaller."""
    edit(path, """UPDATE entry SET body = replace(body, '"steps":5', '"steps":1') WHERE kind = 'reserve'""")


TAMPER: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (cheaper, "it was edited"),
    "edited and hashed anew": (lambda path: (cheaper(path), rehash(path, 4)), "its signature is not this site's"),
    "forged with another key": (lambda path: (cheaper(path), rehash(path, 4, signature=b"k" * 32)), "its signature is not this site's"),
    "deleted": (lambda path: edit(path, "DELETE FROM entry WHERE sequence = 5"), "one was deleted or swapped"),
    "deleted first": (lambda path: edit(path, "DELETE FROM entry WHERE sequence = 1"), "row 1"),
    "swapped": (swap, "one was deleted or swapped"),
    "time": (lambda path: edit(path, "UPDATE entry SET time = '1999-01-01' WHERE sequence = 3"), "it was edited"),
    "kind": (lambda path: edit(path, "UPDATE entry SET kind = 'refuse' WHERE sequence = 4"), "it was edited"),
    "unsigned": (lambda path: edit(path, "UPDATE entry SET signature = x'' WHERE sequence = 7"), "its signature is not this site's"),
    "types": (lambda path: edit(path, "UPDATE entry SET hash = 5 WHERE sequence = 7"), "row 7"),
    "patient taken out": (lambda path: edit(path, "DELETE FROM patient WHERE part = 'test'"), "table of patients is not the one that was signed"),
    "patient changed sides": (lambda path: edit(path, "UPDATE patient SET part = 'test'"), "table of patients is not the one that was signed"),
    "no table": (lambda path: edit(path, "DROP TABLE entry", "DROP TABLE patient"), "it was lost"),
    "text": (lambda path: path.write_bytes(b"not a database" * 500), "damaged"),
    "header": (lambda path: overwrite(path, 0, b"\0" * 16), "damaged"),
    "pages": (lambda path: overwrite(path, 4096, b"\xff" * 8192), "damaged"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
}


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("how", list(TAMPER))
def test_what_was_tampered_with_is_refused_and_a_mended_ledger_counts_the_whole_limit(path: Path, how: str) -> None:
    before = open_ledger(path)
    spent = before.account.divergence("training")
    before.close()
    tamper, words = TAMPER[how]
    tamper(path)
    with pytest.raises(LedgerError, match=words) as caught:
        open_ledger(path)
    assert caught.value.code == "E104"
    with pytest.raises(LedgerError):
        Ledger.read(path)
    done = repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER)
    assert len(done) == 3 and list(path.parent.glob("north.sqlite.damaged-*"))
    mended = open_ledger(path)
    order = mended.account.genesis.order if mended.account.genesis is not None else None
    assert order is not None and mended.account.divergence("training") >= max(spent, renyi_budget(LIMIT.epsilon, order=order, delta=LIMIT.delta))
    with pytest.raises(BudgetExhaustedError):
        charge(mended, "run-3", 1)
    mended.close()
    assert repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER) == []  # it verifies now
    raised = open_ledger(path, Limit(epsilon=9.0, delta=1e-4))
    charge(raised, "run-3", 1)
    raised.bind_patients([b"x" * 32], test=[False], merged=False)
    raised.close()


def test_a_ledger_put_back_or_lost_lacks_the_row_that_was_seen(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.sqlite"
    shutil.copy(path, old)
    ledger = open_ledger(path)
    charge(ledger, "run-3", 1)
    head = ledger.head
    ledger.check_head(head)
    ledger.close()
    shutil.copy(old, path)
    for state in ("put back", "lost"):
        if state == "lost":
            path.unlink()
            with pytest.raises(LedgerError, match="it was lost"):
                open_ledger(path)
            begun_mark(path).unlink()  # the whole state folder was lost, or put back
        stale = open_ledger(path)  # in itself it verifies
        with pytest.raises(LedgerError, match="which the coordinator saw last; it does not: it was lost or put back"):
            stale.check_head(head)
        stale.close()
        repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER, heads=[head])
        mended = open_ledger(path)
        mended.check_head(head)
        with pytest.raises(BudgetExhaustedError):
            charge(mended, "run-4", 1)
        mended.close()


def test_a_ledger_put_back_while_it_is_open_is_noticed(path: Path, tmp_path: Path) -> None:
    ledger = open_ledger(path)
    charge(ledger, "run-3", 1)
    edit(path, f"DELETE FROM entry WHERE sequence > {ledger.num_rows - 3}")
    with pytest.raises(LedgerError, match="put back to an earlier state"):
        ledger.charges()
    ledger.close()


def test_repair_leaves_a_sound_ledger_alone_and_anothers_as_well(path: Path) -> None:
    before = path.read_bytes()
    assert repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER) == []
    assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="it is not damaged, but another's"):
        repair_ledger(path, cohort="south", limit=LIMIT, signer=SIGNER)


def test_a_copy_made_after_a_repair_and_put_back_is_charged_again(path: Path, tmp_path: Path) -> None:
    """What was spent after the repair is gone with the rows: answering for the head must not be free."""
    repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER, heads=["f" * 64])
    shutil.copy(path, tmp_path / "copy.sqlite")
    wide = Limit(epsilon=6.0, delta=1e-4)
    ledger = open_ledger(path, wide)
    charge(ledger, "after", 1)
    head = ledger.head
    ledger.close()
    shutil.copy(tmp_path / "copy.sqlite", path)
    repair_ledger(path, cohort="north", limit=wide, signer=SIGNER, heads=[head])
    ledger = open_ledger(path, wide)
    with pytest.raises(BudgetExhaustedError):
        charge(ledger, "again", 1)
    ledger.close()


def test_a_ledger_that_is_gone_can_be_begun_again_with_nothing_left(tmp_path: Path) -> None:
    path = tmp_path / "ledgers" / "north.sqlite"
    assert repair_ledger(path, cohort="north", limit=LIMIT, signer=SIGNER, heads=["f" * 64, "e" * 64])
    ledger = open_ledger(path)
    ledger.check_head("f" * 64)
    assert ledger.epsilon(1e-4) == float("inf")
    ledger.close()


def test_rows_hold_no_patient_and_no_unsigned_byte(path: Path) -> None:
    """Each row's hash covers all it says: changing any column of any row is found."""
    with closing(sqlite3.connect(path)) as database:
        bodies = [json.loads(body) for (body,) in database.execute("SELECT body FROM entry")]
    assert all((b"a" * 32).hex() not in json.dumps(body) for body in bodies)


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_any_change_of_the_file_is_refused_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A fuzzer over bytes: whatever is overwritten, the ledger says at least as much, or refuses with one of our own errors."""
    path = tmp_path_factory.mktemp("fuzz") / "north.sqlite"
    ledger = open_ledger(path)
    ledger.bind_patients([b"a" * 32], test=[False], merged=False)
    charge(ledger, "run-1", 2)
    spent, rows = ledger.epsilon(1e-4), ledger.num_rows
    ledger.close()
    size = path.stat().st_size
    for _ in range(data.draw(st.integers(1, 4))):
        overwrite(path, data.draw(st.integers(0, size - 1)), data.draw(st.binary(min_size=1, max_size=40)))
    try:
        opened = open_ledger(path)
        seen, seen_rows = opened.epsilon(1e-4), opened.num_rows
        opened.close()
    except WardroundError as error:
        assert isinstance(error, LedgerError | StorageError)
        return
    assert seen >= spent and seen_rows == rows


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_any_change_of_a_cell_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cells") / "north.sqlite"
    ledger = open_ledger(path)
    charge(ledger, "run-1", 2)
    rows = ledger.num_rows
    ledger.close()
    column = data.draw(st.sampled_from(["sequence", "kind", "time", "body", "previous", "hash", "signature"]))
    value = data.draw(
        st.one_of(st.text(max_size=20), st.binary(max_size=70), st.integers(-5, 2**40), st.floats(allow_nan=False, allow_infinity=False))
    )
    number = data.draw(st.integers(1, rows))
    try:
        with closing(sqlite3.connect(path)) as database, database:
            before = database.execute(f"SELECT {column} FROM entry WHERE sequence = ?", (number,)).fetchone()
            database.execute(f"UPDATE entry SET {column} = ? WHERE sequence = ?", (value, number))
            after = database.execute(f"SELECT {column} FROM entry WHERE {column} IS ?", before).fetchall()
    except (sqlite3.IntegrityError, UnicodeEncodeError, OverflowError):
        return
    if before[0] == value and type(before[0]) is type(value) and after:
        return
    with pytest.raises(LedgerError):
        open_ledger(path)


def test_histories_stay_fast_to_verify(path: Path) -> None:
    """Not a timing: a ledger of a thousand rows is read row by row and its hashes are those of an independent computation."""
    ledger = open_ledger(path, Limit(epsilon=60.0, delta=1e-4))
    charge(ledger, "long", 200)
    ledger.close()
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT sequence, kind, time, body, previous, hash FROM entry ORDER BY sequence").fetchall()
    digests = [row_hash(sequence=n, kind=kind, moment=moment, body=body, previous=previous) for n, kind, moment, body, previous, _ in rows]
    assert len(rows) > 400 and digests == [row[5] for row in rows]
    assert np.array_equal([row[4] for row in rows[1:]], digests[:-1])
