"""Buffered asynchronous aggregation over the network: a site that is slow holds up nobody, counts when it comes, and is waited for by no closing."""

import os
import signal

import pytest

from client.ledger import reading
from client.policy import SiteFile
from shared.kit import SITE_FILE
from shared.results import Result, SiteRound
from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow
NORTH, EAST, SOUTH = "cleveland", "hungarian", "switzerland"


@pytest.fixture
def federation(hospitals: Federation) -> Federation:
    """Three hospitals."""
    return hospitals


def of_site(federation: Federation, run: str, name: str) -> list[SiteRound]:
    return [site for record in federation.rounds(run) for site in record.sites if site.name == name]


def charged_rounds(federation: Federation, site: str, run: str) -> list[int]:
    """The rounds whose training a site's ledger says was charged to a run."""
    path = federation.kit(site) / SITE_FILE
    with reading(SiteFile.load(path).ledger_path(path)) as ledger:
        return [charge.entry.round for charge in ledger.charges() if charge.entry.run == run and charge.entry.account == "training"]


def test_a_slow_site_holds_up_nobody_counts_when_it_comes_and_is_not_waited_for_at_the_end(federation: Federation) -> None:
    count = 14
    run = federation.submit(
        study(strategy={"name": "fedbuff", "buffer_size": 2}, rounds={"count": count, "deadline": "60s", "require": 2}, privacy={"epsilon": 20.0})
    )
    federation.reached(run, 2)
    daemon = federation.child_of(EAST, "client.daemon")
    os.kill(daemon, signal.SIGSTOP)
    try:
        federation.wait(
            lambda: [site.status for site in of_site(federation, run, EAST)[-3:]] == ["at work"] * 3, "three rounds have ended without it", 60
        )
    finally:
        os.kill(daemon, signal.SIGCONT)
    federation.wait(
        lambda: [site for site in of_site(federation, run, EAST) if site.status == "ok" and (site.staleness or 0) >= 2], "its update counts", 60
    )
    federation.reached(run, count - 2)
    os.kill(daemon, signal.SIGSTOP)
    try:
        federation.reached(run, count)
    finally:
        os.kill(daemon, signal.SIGCONT)
    federation.finished(run, seconds=90)
    records = federation.rounds(run)
    assert all(sum(site.status == "ok" for site in record.sites) == 2 for record in records)
    assert not {site.status for record in records for site in record.sites} - {"ok", "at work"}, federation.log(run)
    result = Result.model_validate_json((federation.submissions.path(run) / "result.json").read_bytes())
    assert set(result.per_site) == {NORTH, EAST, SOUTH}, "who was at work when the last round ended judges the final model as well"
    for site in (NORTH, EAST, SOUTH):
        rounds = charged_rounds(federation, site, run)
        assert len(set(rounds)) == len(rounds) <= count, "once with each round's number"
    assert len(charged_rounds(federation, EAST, run)) <= count - 2, "in the rounds in which it was at work it was asked nothing new"


def test_a_coordinator_killed_with_a_site_at_work_asks_it_the_same_again(federation: Federation) -> None:
    run = federation.submit(
        study(strategy={"name": "fedbuff", "buffer_size": 2}, rounds={"count": 12, "deadline": "60s", "require": 2}, privacy={"epsilon": 20.0})
    )
    federation.reached(run, 2)
    daemon = federation.child_of(EAST, "client.daemon")
    os.kill(daemon, signal.SIGSTOP)
    try:
        federation.wait(lambda: [site.status for site in of_site(federation, run, EAST)[-2:]] == ["at work"] * 2, "it is at work", 60)
        before = len(federation.rounds(run))
        federation.kill("coordinator")
    finally:
        os.kill(daemon, signal.SIGCONT)
    federation.start_coordinator()
    federation.finished(run, seconds=240)
    counted = [site for site in of_site(federation, run, EAST)[before:] if site.status == "ok"]
    assert counted and (counted[0].staleness or 0) >= 2, "trained on the model that it was asked about before the coordinator was killed"
    rounds = charged_rounds(federation, EAST, run)
    assert len(set(rounds)) == len(rounds)
