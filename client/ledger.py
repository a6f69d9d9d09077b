"""A site's durable account of the privacy spent on a cohort, over all studies: admit a plan, reserve before the first gradient, commit after.

A study is admitted once, as a whole plan; `client.account` states the theorem that keeps the cohort's limit over all plans. A reservation is
durable before training starts; a commit may only lower it to the steps really taken, so a crash in between leaves the full charge
standing: never an under-count. Rows are never changed (`client.chain`), and each holds the event, never only an epsilon.
"""

import contextlib
import fcntl
import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.account import Account, AccountName, Admit, Bind, Charge, Close, Commit, Entry, Event, Genesis, Plan, Refuse, Repair, Reserve
from client.chain import GENESIS, REMEDY_DAMAGED, Chain, Row, public_key_text
from client.memory_chain import Journal, MemoryChain
from shared.errors import BudgetExhaustedError, DataMissingError, LedgerError, ProtocolError
from shared.files import write_atomic
from shared.plan import Limit
from shared.privacy import PrivacyEvent, epsilon_of, epsilon_renyi, filter_order, renyi_budget, renyi_divergence, renyi_epsilon

RELATION = "add or remove one {unit}"
TRAIN, TEST, BOTH = "train", "test", "both"
MOST_REFUSALS = 500  # rows: a coordinator that asks without end does not fill the disk
WITHIN = 1 + 1e-9  # of a budget: rounding of sums is not spending


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStudy:
    """What a study asks of a ledger: one event on the training patients, and perhaps one on the test patients."""

    run: str
    study: str
    study_hash: str
    training: PrivacyEvent
    evaluation: PrivacyEvent | None = None
    cross_validated: bool = False
    coordinator_key: str | None = None  # Ed25519, hex: who counter-signs
    shares: int | None = None  # of distributed noise, in every sum: then `training` is what the sums cost


class Ledger:
    """The account of one cohort. Safe for several processes: whatever is written is one exclusive transaction.

    Args:
        path: the SQLite file; created if absent.
        cohort: the cohort's id; a ledger of another cohort is refused.
        unit: "patient" or "record"; a ledger keeps one neighbouring relation.
        limit: what the cohort may spend; it fixes the filter's order when the ledger is begun. None: a simulation's, which ends with its run.
        signer: the site's key; None only for a simulation's.

    Raises:
        LedgerError: a row does not verify, or the file belongs to another cohort, unit or site.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, *, cohort: str, unit: str, limit: Limit | None = None, signer: Ed25519PrivateKey | None = None) -> None:
        self.unit = unit
        self.limit = limit
        self._chain = Chain(path, signer=signer, durable=signer is not None)
        self._account = Account()
        genesis = _genesis(cohort=cohort, unit=unit, limit=limit, signer=signer)
        with self._chain.transaction():
            if not self._chain.rows:
                self._check_never_begun()
                self._append(genesis)
            self._check_genesis(genesis)
            self.check_patients()
        self._mark_begun()

    @classmethod
    def simulated(cls, path: Path, *, cohort: str, unit: str, journal: Journal) -> "Ledger":
        """A virtual site's: in memory and in the run's `journal`, and at `path` once it is closed."""
        ledger = cls.__new__(cls)
        ledger.unit, ledger.limit = unit, None
        ledger._chain, ledger._account = MemoryChain(path, journal), Account()
        genesis = _genesis(cohort=cohort, unit=unit, limit=None, signer=None)
        with ledger._chain.transaction():
            if not ledger._chain.rows:
                ledger._append(genesis)
            ledger._check_genesis(genesis)
        return ledger

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """An existing ledger, verified, for reading only.

        Raises:
            LedgerError, StorageError: it is damaged or cannot be read.
        """
        ledger = cls.__new__(cls)
        ledger._chain, ledger._account = Chain.reading(path), Account()
        with ledger._chain.snapshot():
            ledger._chain.catch_up()
            ledger.check_patients()
        genesis = ledger.account.genesis
        if genesis is None:
            raise LedgerError(f"{path}: expected a ledger, got a file without rows", REMEDY_DAMAGED)
        ledger.unit, ledger.limit = genesis.relation.rsplit(" ", 1)[-1], genesis.limit
        return ledger

    def _check_never_begun(self) -> None:
        if begun_mark(self.path).exists():
            raise LedgerError(f"{self.path}: expected the ledger that was begun here, found none or an empty one: it was lost", REMEDY_DAMAGED)

    def _mark_begun(self) -> None:
        """Leave a mark beside a hospital's ledger, so that a file that is deleted is missed."""
        mark = begun_mark(self.path)
        if self.signed and not mark.exists():
            write_atomic(mark, f"{self._chain.rows[0].hash}\n")

    @classmethod
    def write_restored(cls, path: Path, rows: list[Row], repair: Repair, *, cohort: str, unit: str, limit: Limit, signer: Ed25519PrivateKey) -> None:
        """A new file with `rows`, which verified in an earlier one (a genesis where there are none), and `repair` after them, all or nothing."""
        ledger = cls.__new__(cls)
        ledger._chain, ledger._account = Chain(path, signer=signer), Account()
        with ledger._chain.transaction():
            ledger._chain.restore(rows)
            if not rows:
                ledger._append(_genesis(cohort=cohort, unit=unit, limit=limit, signer=signer))
            ledger._append(repair)
        ledger.close()

    def _check_genesis(self, expected: Genesis) -> None:
        genesis = self.account.genesis
        if genesis is None:
            raise LedgerError(f"{self.path}: row 1: expected the genesis of a ledger, got another row", REMEDY_DAMAGED)
        if (genesis.cohort, genesis.relation) != (expected.cohort, expected.relation):
            raise LedgerError(
                f"{self.path}: expected the ledger of cohort {expected.cohort!r} ({expected.relation}), got that of {genesis.cohort!r} ({genesis.relation})",
                "point state at the folder of this cohort; a ledger is never reused",
            )
        if genesis.public_key != expected.public_key:
            raise LedgerError(
                f"{self.path}: expected a ledger signed with this site's key, got another site's", "restore the ledger that belongs to this key"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return self._chain.path

    @property
    def account(self) -> Account:
        """The state after all rows known."""
        rows = self._chain.rows
        if self._account.num_rows > len(rows):  # a transaction was taken back
            self._account = Account()
        if self._account.num_rows < len(rows):
            self._account.apply(rows[self._account.num_rows :])
        return self._account

    @property
    def num_rows(self) -> int:
        """Rows known."""
        return len(self._chain.rows)

    @property
    def public_key(self) -> str | None:
        """The key (hex) that the rows are signed with; None in a simulation's ledger."""
        return None if self.account.genesis is None else self.account.genesis.public_key

    @property
    def signed(self) -> bool:
        """True for a hospital's ledger."""
        return self.public_key is not None

    @property
    def head(self) -> str:
        """Hash (hex) of the last row: what a coordinator remembers."""
        return self._chain.head

    def check_head(self, remembered: str) -> None:
        """Return where this ledger holds the row that somebody else saw as its head.

        Raises:
            LedgerError: it does not: it was lost, replaced, or put back to an earlier state.
        """
        if not self.holds(remembered):
            raise missing_row(self.path, remembered)

    def holds(self, head: str) -> bool:
        """True where a row has this hash (hex), or a repair has answered for it."""
        self._chain.refresh()
        return any(row.hash == head for row in self._chain.rows) or any(head in row.heads for row in self.account.repairs)

    # What a study may do ------------------------------------------------------------------------------------------------------

    def check_room(self, study: PlannedStudy) -> None:
        """Return where `study` would be admitted; without room the refusal is written down.

        Raises:
            BudgetExhaustedError: the filter has no room for the whole plan; it says what is spent, asked and allowed.
            ProtocolError: the run's name was used for another study.
        """
        try:
            self._check_plan(study)
        except BudgetExhaustedError:
            entry = Refuse(run=study.run, study=study.study, study_hash=study.study_hash, rule="policy.max_epsilon")
            if len(self.account.refused) < MOST_REFUSALS and not any(known.study_hash == entry.study_hash for known in self.account.refused):
                with self._chain.transaction():
                    self._append(entry)
            raise

    def _check_plan(self, study: PlannedStudy) -> None:
        self._chain.refresh()
        plan = self.account.plans.get(study.run)
        asked = (study.study_hash, study.training, study.evaluation)
        if plan is not None and (plan.entry.study_hash, plan.planned("training"), plan.planned("evaluation")) != asked:
            raise ProtocolError("run: expected a name of its own, got that of a run with another study, noise or sample rate")
        if self.limit is not None:
            check_filter(self.account, self.limit, [study], reopened=plan)

    def _check_still_fits(self, plan: Plan) -> None:
        entry, training = plan.entry, plan.planned("training")
        if self.limit is not None and training is not None:
            study = PlannedStudy(
                run=entry.run, study=entry.study, study_hash=entry.study_hash, training=training, evaluation=plan.planned("evaluation")
            )
            check_filter(self.account, self.limit, [study], reopened=plan)

    def admit(self, study: PlannedStudy) -> None:
        """Agree to the whole plan of `study`, durably; a plan that is open already is not admitted twice.

        Raises:
            BudgetExhaustedError, ProtocolError: as `check_room`.
        """
        with self._chain.transaction():
            self._check_plan(study)
            plan = self.account.plans.get(study.run)
            if plan is None or plan.closed:
                evaluation = None if study.evaluation is None else Event.of(study.evaluation)
                entry = Admit(
                    run=study.run, study=study.study, study_hash=study.study_hash, training=Event.of(study.training), evaluation=evaluation,
                    limit=self.limit, coordinator_key=study.coordinator_key, shares=study.shares,
                )  # fmt: skip
                self._append(entry)

    def reserve(self, entry: Reserve, *, again: bool) -> int:
        """Charge `entry` in full, durably, within its run's plan; the number of its row comes back.

        Args:
            again: False: the same request is the same release (its noise can be drawn again) and no new charge. True: a new charge always.

        Raises:
            BudgetExhaustedError: the plan has no steps left, or what a repair counts leaves no room for it; nothing is written.
            ProtocolError: no such plan was admitted here.
        """
        with self._chain.transaction():
            plan = self.account.plans.get(entry.run)
            known = None if again or plan is None else plan.find(entry)
            if known is not None:
                return known.sequence
            planned = plan.planned(entry.account) if plan is not None and not plan.closed else None
            if plan is None or planned is None:
                raise ProtocolError("expected a study that this site has agreed to, got one it has not, or has closed")
            event = entry.event.privacy_event()
            if (event.noise_multiplier, event.sample_rate) != (planned.noise_multiplier, planned.sample_rate):
                raise ProtocolError("expected the noise and sample rate of the admitted plan, got others")
            if plan.steps(entry.account) + event.steps > planned.steps:
                raise BudgetExhaustedError(
                    f"ledger: expected at most the {planned.steps} steps that were admitted for run {entry.run!r}, got {plan.steps(entry.account)} charged and {event.steps} more",
                    "a crash or a repeated round used them up; plan for that with [privacy] spare_rounds",
                    rule="privacy.spare_rounds",
                )
            if self.account.repairs:  # each counts a whole limit: what was admitted before, too, goes on only where there is room
                self._check_still_fits(plan)
            return self._append(entry)

    def commit(self, reserve: int, *, steps: int, update: str) -> None:
        """Lower the reservation in row `reserve` to the steps really taken, and write down the hash (hex) of what is released.

        Raises:
            LedgerError: there is no such reservation, or it was for fewer steps.
        """
        with self._chain.transaction():
            charge = self.account.by_sequence.get(reserve)
            if charge is None or not 0 <= steps <= charge.entry.event.steps:
                raise LedgerError(f"{self.path}: expected a reservation of at least {steps} steps in row {reserve}, got none", "report this")
            if not charge.committed:
                self._append(Commit(reserve=reserve, steps=steps, update=update))

    def close_plan(self, run: str) -> None:
        """The run has ended: what its plan did not use returns to the cohort."""
        with self._chain.transaction():
            plan = self.account.plans.get(run)
            if plan is not None and not plan.closed:
                self._append(Close(run=run))

    # What was spent -----------------------------------------------------------------------------------------------------------

    def charges(self) -> list[Charge]:
        """Every charge, oldest first."""
        self._chain.refresh()
        return sorted(self.account.by_sequence.values(), key=lambda charge: charge.sequence)

    def steps(self, run: str, account: AccountName = "training") -> int:
        """How many steps this run was charged."""
        self._chain.refresh()
        plan = self.account.plans.get(run)
        return 0 if plan is None else plan.steps(account)

    def charged(self, run: str, account: AccountName = "training") -> list[PrivacyEvent]:
        """What this run was charged."""
        self._chain.refresh()
        plan = self.account.plans.get(run)
        return [] if plan is None else plan.charged(account)

    def epsilon(self, delta: float, account: AccountName = "training") -> float:
        """Epsilon at `delta` of everything charged to `account`: composed by privacy loss distributions, and by Renyi divergence where
        evaluations are among it, whose noise is discrete; infinite after a loss."""
        self._chain.refresh()
        if self.account.repairs:
            return float("inf")
        events = self.account.events(account)
        return epsilon_renyi(events, delta) if self.account.has_evaluations(account) else epsilon_of(events, delta)

    def epsilon_filter(self, limit: Limit, account: AccountName = "training") -> float:
        """What the filter holds against `limit`: open plans in full."""
        self._chain.refresh()
        genesis = self.account.genesis
        assert genesis is not None and genesis.order is not None
        total = self.account.divergence(account)
        return renyi_epsilon(total, order=genesis.order, delta=limit.delta) if total else 0.0

    # Whose patients -----------------------------------------------------------------------------------------------------------

    def bind_patients(self, hashes: Sequence[bytes], *, test: Sequence[bool], merged: bool) -> None:
        """Remember the keyed hashes of the cohort's patients and their sides; later versions of the cohort may add and lose some.

        Args:
            test: for each hash, whether that patient is tested on.
            merged: a cross-validation: everybody is on both sides.

        Raises:
            LedgerError: the ledger knows patients, and none of these is among them; or some are in another ledger beside this one.
        """
        now = {digest: BOTH if merged else TEST if held_out else TRAIN for digest, held_out in zip(hashes, test, strict=True)}
        with self._alone_in_folder():
            check_overlap(self.path, set(now))
            with self._chain.transaction():
                known: dict[bytes, str] = dict(self._chain.database.execute("SELECT hash, part FROM patient"))
                if known and known.keys().isdisjoint(now):
                    raise LedgerError(
                        f"{self.path}: expected the patients that this ledger was begun with, got none of them",
                        "give each cohort a site file of its own",
                    )
                parts = {digest: part if known.get(digest, part) == part else BOTH for digest, part in now.items()}
                changed = [(digest, part) for digest, part in parts.items() if known.get(digest) != part]
                self._chain.database.executemany("INSERT INTO patient VALUES (?, ?) ON CONFLICT (hash) DO UPDATE SET part = excluded.part", changed)
                self._append(Bind(salt=secrets.token_hex(16), patients=_digest({**known, **parts}), merged=BOTH in parts.values()))

    @contextlib.contextmanager
    def _alone_in_folder(self) -> Iterator[None]:
        """No other process binds patients to a ledger of this folder meanwhile."""
        with self._chain.storage(), open(self.path.parent / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def patients(self) -> set[bytes]:
        """The keyed hashes of all patients ever bound."""
        with self._chain.storage():
            return {row[0] for row in self._chain.database.execute("SELECT hash FROM patient")}

    def check_patients(self) -> None:
        """Return where the table of patients is the one that the rows answer for.

        Raises:
            LedgerError: patients were added to it or taken from it.
        """
        with self._chain.storage():
            table: dict[bytes, str] = dict(self._chain.database.execute("SELECT hash, part FROM patient"))
        expected = self.account.patients
        if (table or expected is not None) and _digest(table) != expected:
            raise LedgerError(f"{self.path}: the table of patients is not the one that was signed", REMEDY_DAMAGED)

    def mark_repaired(self, repair: Repair) -> None:
        """Write down that something was lost, and what counts as spent for it."""
        with self._chain.transaction():
            self._append(repair)

    def close(self) -> None:
        """Release the file."""
        self._chain.close()

    def _append(self, entry: Entry) -> int:
        kind, account = GENESIS if isinstance(entry, Genesis) else type(entry).__name__.lower(), self.account
        row = self._chain.append_entry(kind, entry)
        account.take(row, entry)
        return row.sequence


def check_filter(account: Account | None, limit: Limit, studies: Sequence[PlannedStudy], *, reopened: Plan | None = None) -> None:
    """Return where a Renyi filter for `limit` has room for all of these studies beside what the account holds; None: of a ledger not begun yet.

    Args:
        reopened: the open plan of the one study, which the account counts already.

    Raises:
        BudgetExhaustedError: it has not.
    """
    genesis = None if account is None else account.genesis
    order = filter_order(limit.epsilon, limit.delta) if genesis is None else genesis.order
    assert order is not None
    merged = (account is not None and account.merged) or any(study.cross_validated for study in studies)
    budget = renyi_budget(limit.epsilon, order=order, delta=limit.delta)
    events: dict[AccountName, list[PrivacyEvent]] = {
        "training": [study.training for study in studies if study.training is not None],
        "evaluation": [study.evaluation for study in studies if study.evaluation is not None],
    }
    asked = {name: sum(renyi_divergence(event, order) for event in found) for name, found in events.items()}
    if reopened is not None:  # what it counts is in the total already: an open plan asks for nothing more, and must still fit
        asked = {name: max(0.0, value - reopened.divergence(name, order)) for name, value in asked.items()}
    if merged:
        asked = dict.fromkeys(asked, sum(asked.values()))
    for name in events:
        spent = 0.0 if account is None or genesis is None else account.divergence(name, merged=merged)
        if spent + asked[name] > budget * WITHIN and (asked[name] or reopened is not None):
            before, after = (renyi_epsilon(value, order=order, delta=limit.delta) if value else 0.0 for value in (spent, spent + asked[name]))
            whole = "the whole study" if len(studies) == 1 else f"all {len(studies)} studies"
            raise BudgetExhaustedError(
                f"ledger: expected at most epsilon {limit.epsilon:g} at delta {limit.delta:g} on this cohort ({name} patients); "
                f"spent {before:.3g}, with {whole} {after:.3g} (Renyi filter of order {order:g})",
                "ask for less (epsilon, rounds), or let the hospital raise its limit; 'wardround privacy spent' says there what room is left",
                rule="policy.max_epsilon",
            )


def missing_row(path: Path, remembered: str) -> LedgerError:
    """What to say of a ledger that lacks the row that a coordinator saw last."""
    return LedgerError(
        f"{path}: expected a ledger that holds the row {remembered}, which the coordinator saw last; it does not: it was lost or put back",
        "if the coordinator means another hospital of this name, let it use another --out; else restore the newest copy, or, if there is none, let "
        f"'wardround ledger repair SITE.TOML --head {remembered}' count the whole limit as spent",
    )


def check_there(path: Path) -> None:
    """Return where there is a ledger at `path`.

    Raises:
        LedgerError: there was one, and it is gone.
        DataMissingError: nothing was spent under this name; other ledgers beside it are named.
    """
    if path.is_file():
        return
    if begun_mark(path).exists():
        raise LedgerError(f"{path}: expected the ledger that was begun here, found none: it was lost", REMEDY_DAMAGED)
    others = ", ".join(other.stem for other in sorted(path.parent.glob(f"*{path.suffix}")))
    beside = f"; beside it there are ledgers of {others}" if others else ""
    raise DataMissingError(f"{path}: no ledger of this name yet{beside}", "it is made by the first study; a renamed cohort keeps its former name's")


def begun_mark(path: Path) -> Path:
    """The file that says a ledger was begun at `path`."""
    return path.with_suffix(".begun")


def _genesis(*, cohort: str, unit: str, limit: Limit | None, signer: Ed25519PrivateKey | None) -> Genesis:
    order = None if limit is None else filter_order(limit.epsilon, limit.delta)
    return Genesis(cohort=cohort, relation=RELATION.format(unit=unit), limit=limit, order=order, public_key=public_key_text(signer))


def check_overlap(path: Path, hashes: set[bytes]) -> None:
    """Return where none of these patients is in another ledger beside the one at `path`, which may not exist yet.

    Raises:
        LedgerError: some are; it names the other cohort.
    """
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        if other.resolve() == path.resolve():
            continue
        with reading(other) as neighbour:
            genesis, shared = neighbour.account.genesis, not hashes.isdisjoint(neighbour.patients())
        if shared and genesis is not None:
            raise LedgerError(
                f"{path}: expected patients of no other ledger, got some that are in that of cohort {genesis.cohort!r} beside it",
                "a patient has one ledger, whatever the cohort is called: give the cohort its former name, or divide the patients",
            )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Ledger]:
    """`Ledger.read(path)`, closed after the block."""
    ledger = Ledger.read(path)
    try:
        yield ledger
    finally:
        ledger.close()


def _digest(table: dict[bytes, str]) -> str:
    digest = hashlib.sha256()
    for key, part in sorted(table.items()):
        digest.update(key + part.encode() + b"\n")
    return digest.hexdigest()
