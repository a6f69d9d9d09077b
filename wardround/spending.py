"""What ledgers say: epsilon by study and over all of them."""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from client.ledger import Ledger, Spend
from client.policy import SiteFile
from server.run_folder import RunFolder
from shared.errors import DataMissingError
from shared.privacy import epsilon_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpending:
    """One run's charges on a cohort; `epsilon` is of this run alone."""

    study: str
    run: str
    rounds: int
    steps: int
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """A cohort's ledger: `epsilon` composes all studies; `limit` is the site's own, None for a simulation's."""

    name: str
    epsilon: float
    delta: float
    limit: float | None
    studies: list[StudySpending]

    def to_table(self) -> dict[str, object]:
        """For the envelope."""
        return dataclasses.asdict(self)


def spending_of(path: Path, *, delta: float | None) -> list[Spending]:
    """The ledger of a site file, or every ledger of a run's folder.

    Raises:
        DataMissingError: there is no ledger yet.
        ConfigurationError, StorageError, LedgerError: the file, folder or ledger is at fault.
    """
    if path.suffix == ".toml":
        site = SiteFile.load(path)
        ledger = path.parent / site.state / "ledger.sqlite"
        return [_read(ledger, site.name, delta or site.policy.max_delta, site.policy.max_epsilon)]
    study = RunFolder.open(path).study
    ledgers = sorted((path / "ledgers").glob("*.sqlite"))
    if not ledgers:
        raise DataMissingError(f"{path}: expected ledgers, found none: the run was without privacy, or never started", "look at study.toml in it")
    return [_read(ledger, ledger.stem, delta or study.privacy.delta or 1e-5, None) for ledger in ledgers]


def _read(path: Path, name: str, delta: float, limit: float | None) -> Spending:
    if not path.is_file():
        raise DataMissingError(f"{path}: no ledger yet: nothing was ever spent on this cohort", "it is made by the first study")
    ledger = Ledger.read(path)
    spends = ledger.spends()
    ledger.close()
    by_run: dict[tuple[str, str], list[Spend]] = defaultdict(list)
    for spend in spends:
        by_run[spend.study, spend.run].append(spend)
    studies = [
        StudySpending(
            study=study,
            run=run,
            rounds=len(charged),
            steps=sum(spend.event.steps for spend in charged),
            epsilon=epsilon_of([spend.event for spend in charged], delta),
        )
        for (study, run), charged in by_run.items()
    ]
    return Spending(name=name, epsilon=epsilon_of([spend.event for spend in spends], delta), delta=delta, limit=limit, studies=studies)
