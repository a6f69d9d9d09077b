"""What ledgers say: epsilon by study and over all of them, what remains of a hospital's limit, and whether a run's claim agrees."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from client.account import AccountName, Plan
from client.keys import check_ledger_key
from client.ledger import Ledger, check_there, reading
from client.policy import SiteFile
from server.run_folder import RunFolder
from shared.errors import ConfigurationError, DataMissingError
from shared.kit import MANIFEST, SITE_FILE
from shared.plan import Limit
from shared.privacy import MIN_NOISE_MULTIPLIER, PrivacyEvent, epsilon_of, epsilon_renyi, renyi_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpending:
    """One run's charges on a cohort; `epsilon` is of this run alone."""

    study: str
    run: str
    study_hash: str
    state: str  # "open": counts in full; "closed": counts what was charged
    rounds: int
    standing: int  # reservations without a commit: charged in full, nothing released
    steps: int
    planned_steps: int
    epsilon: float
    epsilon_planned: float
    shares: int | None = None  # of distributed noise: epsilons are of sums that hold the shares of so many sites
    epsilon_if_all_others_collude: float | None = None  # of what was charged; None as well where so little noise has no epsilon worth naming


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """A cohort's account of training or of test patients.

    Attributes:
        epsilon: of everything charged, as `Ledger.epsilon`; None after a loss that `repair` counted as a limit.
        epsilon_filter: what the limit is compared with; None in a simulation, which keeps no limit.
        remains: about the epsilon of one further study that would still be admitted; None in a simulation.
        refused: studies turned away for want of room.
    """

    name: str
    account: str
    path: str
    head: str
    epsilon: float | None
    delta: float
    limit: float | None
    epsilon_filter: float | None
    order: float | None
    remains: float | None
    refused: int
    repairs: int
    studies: list[StudySpending]

    def to_table(self) -> dict[str, object]:
        """For the envelope."""
        return dataclasses.asdict(self)


def site_file_of(path: Path) -> Path:
    """site.toml, where `path` is the folder of a site's kit or its state folder; any other path as it is.

    Raises:
        ConfigurationError: it is a kit without a site file.
    """
    if (path / SITE_FILE).is_file():
        return path / SITE_FILE
    if (path / MANIFEST).is_file():
        raise ConfigurationError(
            f"{path}: expected a site's kit that was taken up, found no {SITE_FILE} in it",
            "give the kit of a site; the coordinator keeps no ledger, and 'wardround site init' takes a kit up",
        )
    above = path.parent / SITE_FILE
    if path.is_dir() and above.is_file() and (path.parent / SiteFile.load(above).state).resolve() == path.resolve():
        return above
    return path


def ledgers_of(path: Path) -> list[Path]:
    """The ledger of a site file, or every ledger of a run's folder.

    Raises:
        DataMissingError: there is no ledger yet.
        ConfigurationError, StorageError: the file or folder is at fault.
    """
    if path.suffix == ".toml":
        ledger = SiteFile.load(path).ledger_path(path)
        check_there(ledger)
        return [ledger]
    RunFolder.open(path)
    ledgers = sorted((path / "ledgers").glob("*.sqlite"))
    if not ledgers:
        raise DataMissingError(
            f"{path}: expected ledgers, found none: the run was without privacy, never started, or of real sites, which keep their own",
            "look at study.toml in it; for a real site give its site.toml",
        )
    return ledgers


def spending_of(path: Path, *, delta: float | None) -> list[Spending]:
    """What the ledger of a site file, or every ledger of a run's folder, says; for each account that anything was charged to.

    Raises:
        DataMissingError: there is no ledger yet.
        ConfigurationError, StorageError, LedgerError: the file, folder or ledger is at fault.
    """
    if path.suffix == ".toml":
        policy = SiteFile.load(path).policy
        limit, used = Limit(epsilon=policy.max_epsilon, delta=policy.max_delta), delta or policy.max_delta
    else:
        limit, used = None, delta or RunFolder.open(path).study.privacy.delta or 1e-5
    found = []
    for file in ledgers_of(path):
        with reading(file) as ledger:
            if path.suffix == ".toml":
                check_ledger_key(path, ledger)
            found += [_spending(ledger, account, used, limit) for account in _accounts(ledger)]
    return found


def _accounts(ledger: Ledger) -> list[AccountName]:
    tested = bool(ledger.account.repairs) or any(plan.entry.evaluation is not None for plan in ledger.account.plans.values())
    return ["training", "evaluation"] if tested else ["training"]


def _spending(ledger: Ledger, account: AccountName, delta: float, limit: Limit | None) -> Spending:
    state = ledger.account
    assert state.genesis is not None
    order = state.genesis.order
    epsilon = ledger.epsilon(delta, account)
    kept = limit is not None and order is not None
    return Spending(
        name=ledger.path.stem,
        account=account,
        path=str(ledger.path),
        head=ledger.head,
        epsilon=epsilon if math.isfinite(epsilon) else None,
        delta=delta,
        limit=limit.epsilon if limit is not None else None,
        epsilon_filter=ledger.epsilon_filter(limit, account) if kept and limit is not None else None,
        order=order,
        remains=_remains(ledger, account, limit) if kept and limit is not None else None,
        refused=len(state.refused),
        repairs=len(state.repairs),
        studies=[_study(plan, account, delta) for plan in state.plans.values() if plan.planned(account) is not None],
    )


def _remains(ledger: Ledger, account: AccountName, limit: Limit) -> float:
    """Epsilon of the one Gaussian release that takes all the room left: sigma^2 = order / (2 x room)."""
    assert ledger.account.genesis is not None and ledger.account.genesis.order is not None
    order = ledger.account.genesis.order
    room = renyi_budget(limit.epsilon, order=order, delta=limit.delta) - ledger.account.divergence(account)
    if room <= 1e-12:
        return 0.0
    noise = max(MIN_NOISE_MULTIPLIER, math.sqrt(order / (2 * room)))
    return epsilon_of([PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)], limit.delta)


def _study(plan: Plan, account: AccountName, delta: float) -> StudySpending:
    charges = [charge for charge in plan.charges if charge.entry.account == account]
    planned = plan.planned(account)
    compose = epsilon_of if account == "training" else epsilon_renyi  # an evaluation's noise is discrete
    assert planned is not None
    return StudySpending(
        study=plan.entry.study,
        run=plan.entry.run,
        study_hash=plan.entry.study_hash,
        state="closed" if plan.closed else "open",
        rounds=len(charges),
        standing=sum(not charge.committed for charge in charges),
        steps=sum(charge.event.steps for charge in charges),
        planned_steps=planned.steps,
        epsilon=compose([charge.event for charge in charges], delta),
        epsilon_planned=compose([planned], delta),
        shares=plan.entry.shares if account == "training" else None,
        epsilon_if_all_others_collude=_colluding(plan, [charge.event for charge in charges], delta) if account == "training" else None,
    )


def _colluding(plan: Plan, charged: list[PrivacyEvent], delta: float) -> float | None:
    """Epsilon against the coordinator and all other sites together."""
    alone = [event for event in map(plan.alone, charged) if event is not None]
    return epsilon_of(alone, delta) if alone and len(alone) == len(charged) else None
