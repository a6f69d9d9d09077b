"""Epsilon computed again from the rows of ledgers, and held against what a run or a limit says."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from client.account import ACCOUNTS, AccountName
from client.cross_check import epsilon_prv
from client.keys import check_ledger_key
from client.ledger import Ledger, reading
from client.policy import SiteFile
from shared.errors import DataMissingError
from shared.plan import Limit
from shared.privacy import PrivacyEvent, epsilon_of, epsilon_renyi
from simulations.federation import ledger_file_name
from wardround.claim_in_words import claim_of
from wardround.report.run_files import read_run
from wardround.spending import ledgers_of

ROUNDING = 1e-6  # relative: accountants on another machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One epsilon: what was said (or allowed), and upper bounds computed again.

    Attributes:
        pld, prv: of the events charged; None where rows were lost, where PRV's numerics do not converge, and where discrete noise is among them.
        renyi: the bound that holds for discrete noise as well; None where rows were lost, and for training alone.
        filter: the Renyi filter's, open plans in full; None for a run.
        source: where the events are from.
    """

    name: str
    claimed: float
    pld: float | None
    prv: float | None
    renyi: float | None
    filter: float | None
    delta: float
    source: str

    @property
    def agrees(self) -> bool:
        """True where the number said covers what was charged: the tighter accountant's bound, and the filter's, are not above it."""
        bounds = [min(value for value in (self.pld, self.prv) if value is not None)] if self.pld is not None else []
        bounds += [value for value in (self.renyi, self.filter) if value is not None]
        return bool(bounds) and max(bounds) <= self.claimed * (1 + ROUNDING) + 1e-12

    def to_table(self) -> dict[str, object]:
        """For the envelope."""
        return {**dataclasses.asdict(self), "agrees": self.agrees}


def verify_path(path: Path) -> list[Check]:
    """A hospital's ledger against its limit, or a run's claim against its ledgers (where those are the hospitals' own: against itself).

    Raises:
        LedgerError: a ledger does not verify.
        DataMissingError: there is nothing to verify.
    """
    return _verify_site(path) if path.suffix == ".toml" else _verify_run(path)


def _verify_site(path: Path) -> list[Check]:
    limit = SiteFile.load(path).policy.limit
    checks = []
    for file in ledgers_of(path):
        with reading(file) as ledger:
            check_ledger_key(path, ledger)
            for account in ACCOUNTS:
                if ledger.account.divergence(account) > 0:
                    checks.append(_check_limit(ledger, account, limit))
    if not checks:
        raise DataMissingError(f"{path}: expected charges, found none", "nothing was spent on this cohort")
    return checks


def _check_limit(ledger: Ledger, account: AccountName, limit: Limit) -> Check:
    state = ledger.account
    events, discrete, lost = state.events(account), state.has_evaluations(account), bool(state.repairs)
    smooth = not discrete and not lost
    return Check(
        name=f"{ledger.path.stem}, {account} patients: within the limit",
        claimed=limit.epsilon,
        pld=epsilon_of(events, limit.delta) if smooth else None,
        prv=epsilon_prv(events, limit.delta) if smooth else None,
        renyi=epsilon_renyi(events, limit.delta) if discrete and not lost else None,
        filter=ledger.epsilon_filter(limit, account),
        delta=limit.delta,
        source="ledger",
    )


def _verify_run(path: Path) -> list[Check]:
    claim = claim_of(read_run(path))
    checks = []
    for name, site in sorted(claim.sites.items()):
        file = path / "ledgers" / f"{ledger_file_name(name)}.sqlite"
        events = [PrivacyEvent(noise_multiplier=site.noise_multiplier, sample_rate=site.sample_rate, steps=site.steps)]
        source = "claim"  # a real hospital keeps its ledger to itself
        if file.is_file():
            with reading(file) as ledger:
                events, source = ledger.account.events("training"), "ledger"
        pld, prv = epsilon_of(events, site.delta), epsilon_prv(events, site.delta)
        checks.append(Check(name=name, claimed=site.epsilon, pld=pld, prv=prv, renyi=None, filter=None, delta=site.delta, source=source))
    if not checks:
        raise DataMissingError(
            f"{path}: expected a claim about sites, found none: the run was without privacy, or nothing was spent", "see privacy.json"
        )
    return checks
