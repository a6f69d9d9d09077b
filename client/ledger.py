"""A site's durable account of the privacy spent on a cohort, over all studies: reserve before the first gradient, commit after.

SQLite, one file per site and cohort. A reservation is durable before training starts; a commit may only lower it to the steps really
taken, so a crash in between leaves the full charge standing: never an under-count. The ledger keeps events, never only an epsilon.

A release is identified by what determines it: run, fold, round, the parameters received and the noise key. The same release asked for
again (a resumed simulation with seeded noise) is the same bits and no new charge; with noise from the operating system the key is new
and so is the charge.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.errors import BudgetExhaustedError, ConfigurationError, LedgerError, StorageError
from shared.privacy import PrivacyEvent, epsilon_of

_TABLES = """
CREATE TABLE IF NOT EXISTS genesis (cohort TEXT NOT NULL, relation TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spend (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, release TEXT NOT NULL UNIQUE, run TEXT NOT NULL, study TEXT NOT NULL,
    fold INTEGER NOT NULL, round INTEGER NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL, state TEXT NOT NULL CHECK (state IN ('reserved', 'committed')), time TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS patient (hash BLOB PRIMARY KEY) WITHOUT ROWID;
"""
RELATION = "add or remove one {unit}"
LOCK_TIMEOUT_SECONDS = 30
REMEDY_DAMAGED = "restore it from backup; without it no study can start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """One row: what a round at this site costs. `state` "reserved" is a full charge that was not lowered."""

    release: str
    run: str
    study: str
    fold: int
    round: int
    event: PrivacyEvent
    state: str = "reserved"
    time: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a cohort may spend over all studies."""

    epsilon: float
    delta: float


class Ledger:
    """The account of one cohort. Safe for several processes: every reservation is one exclusive transaction.

    Args:
        path: the SQLite file; created if absent.
        cohort: the cohort's id; a ledger of another cohort is refused.
        unit: "patient" or "record"; a ledger keeps one neighbouring relation.
        durable: False only for a simulation's ledger, which ends with its run (no fsync; a killed process still loses nothing).

    Raises:
        LedgerError: the file is damaged or belongs to another cohort or unit.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, *, cohort: str, unit: str, durable: bool = True) -> None:
        self._path = path
        self.unit = unit
        with self._storage():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
            self._write_ahead()
            self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self._database.executescript(_TABLES)
            with self._transaction():
                self._check_genesis(cohort, RELATION.format(unit=unit))

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """An existing ledger, opened for reading only.

        Raises:
            LedgerError, StorageError: it is damaged or cannot be read.
        """
        ledger = cls.__new__(cls)
        ledger._path = path
        with ledger._storage():
            ledger._database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
        return ledger

    def _write_ahead(self) -> None:
        """Switch to a write-ahead log. SQLite does not wait here for another process that does so to the same new file, so we do."""
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _check_genesis(self, cohort: str, relation: str) -> None:
        row = self._database.execute("SELECT cohort, relation FROM genesis").fetchone()
        if row is None:
            self._database.execute("INSERT INTO genesis VALUES (?, ?, ?)", (cohort, relation, _now()))
        elif row != (cohort, relation):
            raise LedgerError(
                f"{self._path}: expected the ledger of cohort {cohort!r} ({relation}), got that of {row[0]!r} ({row[1]})",
                "point state at the folder of this cohort; a ledger is never reused",
            )

    def check_room(self, event: PrivacyEvent, limit: Limit) -> None:
        """Return where `event`, on top of everything charged, stays within `limit`.

        Raises:
            BudgetExhaustedError: it does not; it says what is spent, asked and allowed.
        """
        spent = [other for events in self.charged().values() for other in events]
        after = epsilon_of([*spent, event], limit.delta)
        if after > limit.epsilon * (1 + 1e-9):
            before = epsilon_of(spent, limit.delta)
            raise BudgetExhaustedError(
                f"ledger: expected at most epsilon {limit.epsilon:g} at delta {limit.delta:g} on this cohort; spent {before:.3g}, with this {after:.3g}",
                "ask for less (epsilon, rounds), or let the hospital raise its limit",
            )

    def reserve(self, spend: Spend, limit: Limit, *, planned: PrivacyEvent) -> None:
        """Charge `spend` in full, durably, if there is room. The same release again is no new charge.

        Args:
            planned: the whole study's event. While a run stays within it, one look at plan and ledger settles all of its rounds.

        Raises:
            BudgetExhaustedError: there is no room; nothing is written.
        """
        with self._storage(), self._transaction():
            known = self._database.execute("SELECT 1 FROM spend WHERE release = ?", (spend.release,)).fetchone()
            if known is None:
                self._check_spend(spend, limit, planned)
                self._insert(spend)

    def _check_spend(self, spend: Spend, limit: Limit, planned: PrivacyEvent) -> None:
        charged = [(run, other) for run, events in self.charged().items() for other in events]
        own_steps = spend.event.steps + sum(other.steps for run, other in charged if run == spend.run and _same_mechanism(other, planned))
        others = [other for run, other in charged if run != spend.run or not _same_mechanism(other, planned)]
        if _same_mechanism(spend.event, planned) and own_steps <= planned.steps and epsilon_of([*others, planned], limit.delta) <= limit.epsilon:
            return
        self.check_room(spend.event, limit)

    def _insert(self, spend: Spend) -> None:
        event = spend.event
        row = (spend.release, spend.run, spend.study, spend.fold, spend.round, event.noise_multiplier, event.sample_rate, event.steps, _now())
        self._database.execute(
            "INSERT INTO spend (release, run, study, fold, round, noise_multiplier, sample_rate, steps, state, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'reserved', ?)",
            row,
        )

    def commit(self, release: str, *, steps: int) -> None:
        """Lower the charge of a reserved release to the steps really taken.

        Raises:
            LedgerError: there is no such reservation, or it was for fewer steps.
        """
        with self._storage(), self._transaction():
            row = self._database.execute("SELECT steps FROM spend WHERE release = ?", (release,)).fetchone()
            if row is None or not 0 <= steps <= row[0]:
                raise LedgerError(f"{self._path}: expected a reservation of at least {steps} steps, got {row[0] if row else 'none'}", "report this")
            self._database.execute("UPDATE spend SET steps = ?, state = 'committed' WHERE release = ?", (steps, release))

    def spends(self) -> list[Spend]:
        """Every charge, oldest first."""
        with self._storage():
            rows = self._database.execute(
                "SELECT release, run, study, fold, round, noise_multiplier, sample_rate, steps, state, time FROM spend ORDER BY sequence"
            ).fetchall()
        try:
            return [
                Spend(
                    release=release, run=run, study=study, fold=fold, round=number, state=state, time=time,
                    event=PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps),
                )
                for release, run, study, fold, number, noise, rate, steps, state, time in rows
            ]  # fmt: skip
        except (ConfigurationError, TypeError) as error:
            raise LedgerError(f"{self._path}: the ledger is damaged: a row holds no privacy event", REMEDY_DAMAGED) from error

    def epsilon(self, delta: float) -> float:
        """Epsilon at `delta` of everything charged."""
        return epsilon_of([event for events in self.charged().values() for event in events], delta)

    def charged(self) -> dict[str, list[PrivacyEvent]]:
        """What each run was charged, row by row, each checked to be an event: a sum in SQL would hide an edited row."""
        by_run: dict[str, list[PrivacyEvent]] = {}
        for spend in self.spends():
            by_run.setdefault(spend.run, []).append(spend.event)
        return by_run

    def bind_patients(self, hashes: list[bytes]) -> None:
        """Remember the keyed hashes of the cohort's patients; later versions of the cohort may add and lose some.

        Raises:
            LedgerError: the ledger knows patients, and none of these is among them: it is another population's.
        """
        with self._storage(), self._transaction():
            known = {row[0] for row in self._database.execute("SELECT hash FROM patient")}
            if known and known.isdisjoint(hashes):
                raise LedgerError(
                    f"{self._path}: expected the patients that this ledger was begun with, got none of them", "give each cohort its own state folder"
                )
            self._database.executemany("INSERT OR IGNORE INTO patient VALUES (?)", [(value,) for value in hashes])

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror}", "check free space and permissions of the state folder") from error
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self._path}: the ledger could not be written: {error}", "check free space and permissions of the state folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self._path}: the ledger is damaged: {error}", REMEDY_DAMAGED) from error


def _same_mechanism(one: PrivacyEvent, other: PrivacyEvent) -> bool:
    return (one.noise_multiplier, one.sample_rate) == (other.noise_multiplier, other.sample_rate)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
