"""What the rows of a ledger add up to: plans admitted, rounds charged, and the Renyi filter over all of them.

Within a plan, whose events are fixed before any result is seen, epsilon is composed by privacy loss distributions. Between plans, each
chosen after seeing results of those before, the site's limit is kept by a Renyi filter (Feldman and Zrnic 2021, theorem 3.1): the
divergences at one order, fixed at genesis, may add up to the budget of the limit, and the whole is then (epsilon, delta)-private,
however the plans were chosen. A plan counts in full from its admission; once closed, it counts what it was charged.

A plan of distributed noise is charged as what its sums cost: the events are those of Gaussian noise that dominates the sum of shares step by step
(`shared.distributed_noise`, theorem), so every bound below covers it, the filter's at any order too. Against all other sites together, who can take their
shares away, no limit is held; the row says how many shares there are, so that it can be told what that would be.

Two accounts: "training" is the promise to training patients, "evaluation" to test patients; they are different people, so each has the
limit to itself. From the first cross-validation, or the first patient who changes sides, on (row "bind"), everything counts for everybody.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.chain import GENESIS, Row
from shared.errors import ConfigurationError, LedgerError
from shared.plan import Limit
from shared.privacy import MIN_NOISE_MULTIPLIER, PrivacyEvent, renyi_budget, renyi_divergence

AccountName = Literal["training", "evaluation"]
ACCOUNTS: tuple[AccountName, ...] = ("training", "evaluation")
Hex = r"^[0-9a-f]{64}$"


class Entry(BaseModel):
    """Base of the bodies of all rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Event(Entry):
    """A privacy event, as a row holds it."""

    noise_multiplier: float
    sample_rate: float
    steps: int = Field(ge=0)

    @classmethod
    def of(cls, event: PrivacyEvent) -> "Event":
        """The row's form of `event`."""
        return cls(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate, steps=event.steps)

    def privacy_event(self) -> PrivacyEvent:
        """The event.

        Raises:
            ConfigurationError: no mechanism has these numbers.
        """
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)


class Genesis(Entry):
    """First row: whose ledger this is, under which neighbouring relation, and the filter's order, which never changes."""

    cohort: str
    relation: str
    limit: Limit | None  # as it was; the policy's own is what counts. None: a simulation's, which keeps no limit
    order: float | None
    public_key: str | None


class Admit(Entry):
    """A study's whole plan, agreed to once.

    `shares`: the noise of its training is that of sums, in which so many sites' shares are for certain; `training` is what a sum costs
    (`shared.distributed_noise`), and against all other sites together a share alone is all there is. None: the noise is each update's own.
    """

    run: str
    study: str
    study_hash: str
    training: Event
    evaluation: Event | None
    limit: Limit | None
    coordinator_key: str | None
    shares: int | None = Field(default=None, ge=1)


class Reserve(Entry):
    """A full charge, before the first gradient. `witnessed`: the coordinator's signature on an earlier head of this ledger."""

    run: str
    account: AccountName
    fold: int
    round: int
    request: str = Field(pattern=Hex)
    event: Event
    witnessed_head: str | None = None
    witness_signature: str | None = None


class Commit(Entry):
    """The steps really taken of the reservation in row `reserve`, and the hash of what was released."""

    reserve: int
    steps: int = Field(ge=0)
    update: str = Field(pattern=Hex)


class Close(Entry):
    """The plan of `run` has ended: what it did not use returns."""

    run: str


class Refuse(Entry):
    """A study that was turned away for want of room."""

    run: str
    study: str
    study_hash: str
    rule: str


class Bind(Entry):
    """The cohort's patients: hash over the sorted table of keyed hashes, and whether both accounts now count for everybody.

    Written at every enrolment, changed or not, with a random `salt`: so the ledger's head, which a coordinator sees, tells nothing of it.
    """

    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    patients: str = Field(pattern=Hex)
    merged: bool


class Repair(Entry):
    """Something was lost: this much of a limit counts as spent, and `heads` (lost ones) are answered for.

    `rebuilt`: the table of patients was lost as well, and with it who is on which side.
    """

    spent: Limit
    heads: tuple[str, ...] = Field(strict=False)
    rebuilt: bool
    reason: str


KINDS: dict[str, type[Entry]] = {
    "admit": Admit, "reserve": Reserve, "commit": Commit, "close": Close, "refuse": Refuse, "bind": Bind, "repair": Repair,
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Charge:
    """One reservation and what became of it; not committed, it stands in full."""

    sequence: int
    entry: Reserve
    event: PrivacyEvent
    time: str
    committed: bool = False
    update: str | None = None


@dataclass(slots=True, kw_only=True)
class Plan:
    """An admitted study and its charges."""

    entry: Admit
    charges: list[Charge] = field(default_factory=list)
    closed: bool = False
    _steps: dict[str, int] = field(default_factory=dict)  # by account
    _by_request: dict[str, list[Charge]] = field(default_factory=dict)

    def take(self, charge: Charge) -> None:
        """Add a reservation."""
        self.charges.append(charge)
        self._by_request.setdefault(charge.entry.request, []).append(charge)
        self._steps[charge.entry.account] = self.steps(charge.entry.account) + charge.event.steps

    def commit(self, charge: Charge, entry: Commit) -> None:
        """Lower a reservation to the steps really taken.

        Raises:
            ValueError: it would be raised, or was committed already.
        """
        if charge.committed or entry.steps > charge.event.steps:
            raise ValueError("a commit that raises a charge, or a second one")
        if entry.steps < charge.event.steps:
            self._steps[charge.entry.account] -= charge.event.steps - entry.steps
            charge.event = replace(charge.event, steps=entry.steps)
        charge.committed, charge.update = True, entry.update

    def find(self, entry: Reserve) -> Charge | None:
        """The charge for the same release, where there is one."""
        known = self._by_request.get(entry.request, [])
        return next((charge for charge in known if (charge.entry.account, charge.entry.event) == (entry.account, entry.event)), None)

    def planned(self, account: AccountName) -> PrivacyEvent | None:
        """The whole plan's event on this account."""
        event = self.entry.training if account == "training" else self.entry.evaluation
        return None if event is None else event.privacy_event()

    def alone(self, event: PrivacyEvent) -> PrivacyEvent | None:
        """`event` of this plan against the coordinator and all other sites together, who leave a site's own share of the noise; None where there is
        no such share, or so little noise has no epsilon worth naming."""
        noise = event.noise_multiplier / math.sqrt(self.entry.shares or 1)
        return None if self.entry.shares is None or noise < MIN_NOISE_MULTIPLIER else replace(event, noise_multiplier=noise)

    def charged(self, account: AccountName) -> list[PrivacyEvent]:
        """The events charged on this account."""
        return [charge.event for charge in self.charges if charge.entry.account == account]

    def steps(self, account: AccountName) -> int:
        """The steps charged on this account."""
        return self._steps.get(account, 0)

    def divergence(self, account: AccountName, order: float) -> float:
        """What the plan counts in the filter: the whole of it while open, then what it was charged."""
        used = sum(renyi_divergence(event, order) for event in self.charged(account))
        planned = None if self.closed else self.planned(account)
        return used if planned is None else max(used, renyi_divergence(planned, order))


@dataclass(slots=True, kw_only=True)
class Account:
    """The state of a ledger after its rows."""

    genesis: Genesis | None = None
    num_rows: int = 0
    plans: dict[str, Plan] = field(default_factory=dict)
    by_sequence: dict[int, Charge] = field(default_factory=dict)
    refused: list[Refuse] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    patients: str | None = None
    merged: bool = False

    def apply(self, rows: Iterable[Row]) -> None:
        """Add `rows`.

        Raises:
            LedgerError: a row, though signed, does not make sense after those before.
        """
        for row in rows:
            try:
                self.take(row, (Genesis if row.kind == GENESIS else KINDS[row.kind]).model_validate_json(row.body))
            except (ValidationError, ConfigurationError, KeyError, ValueError) as error:
                raise LedgerError(f"row {row.sequence} ({row.kind}): it makes no sense here", "report this") from error

    def take(self, row: Row, entry: Entry) -> None:
        """Add one row, whose body is `entry`.

        Raises:
            ValueError, KeyError, ConfigurationError: it does not make sense after those before.
        """
        match entry:
            case Genesis():
                if self.num_rows:
                    raise ValueError("a second genesis")
                self.genesis = entry
            case Admit():
                if entry.run in self.plans and not self.plans[entry.run].closed:
                    raise ValueError("a plan twice")
                plan = self.plans.setdefault(entry.run, Plan(entry=entry))
                plan.entry, plan.closed = entry, False
            case Reserve():
                charge = Charge(sequence=row.sequence, entry=entry, event=entry.event.privacy_event(), time=row.time)
                self.plans[entry.run].take(charge)
                self.by_sequence[row.sequence] = charge
            case Commit():
                charge = self.by_sequence[entry.reserve]
                self.plans[charge.entry.run].commit(charge, entry)
            case Close():
                self.plans[entry.run].closed = True
            case Refuse():
                self.refused.append(entry)
            case Bind():
                self.patients, self.merged = entry.patients, self.merged or entry.merged
            case Repair():
                self.repairs.append(entry)
                if entry.rebuilt:
                    self.patients, self.merged = None, True
        self.num_rows += 1

    def events(self, account: AccountName) -> list[PrivacyEvent]:
        """Everything charged to `account`, over all plans; both accounts' where they are merged."""
        return [
            charge.event for plan in self.plans.values() for charge in plan.charges if self.merged or charge.entry.account == account
        ]  # fmt: skip

    def has_evaluations(self, account: AccountName) -> bool:
        """True where a charge on this account is for a noised evaluation."""
        return any(
            charge.entry.account == "evaluation" for plan in self.plans.values() for charge in plan.charges if self.merged or account == "evaluation"
        )

    def divergence(self, account: AccountName, *, merged: bool | None = None) -> float:
        """The total that the filter compares with its budget."""
        assert self.genesis is not None and self.genesis.order is not None
        order = self.genesis.order
        accounts = ACCOUNTS if (self.merged if merged is None else merged) else (account,)
        lost = sum(max(0.0, renyi_budget(row.spent.epsilon, order=order, delta=row.spent.delta)) for row in self.repairs)
        return lost + sum(plan.divergence(name, order) for plan in self.plans.values() for name in accounts)
