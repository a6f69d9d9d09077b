"""Sites that are killed, hang or are slow; too few sites; a study that is stopped (faults 1a, 1b, 4, 5)."""

import os
import signal
import time

import pytest

from client.ledger import reading
from client.policy import SiteFile
from shared.kit import SITE_FILE
from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow
NORTH, EAST, SOUTH = "cleveland", "hungarian", "switzerland"
LONG = {"local_epochs": 300}  # of training: seconds, so that a signal finds it under way


@pytest.fixture
def federation(hospitals: Federation) -> Federation:
    """Three hospitals."""
    return hospitals


def charged_steps(federation: Federation, site: str, run: str) -> int:
    """The training steps that a site's ledger says were charged to a run."""
    with reading(SiteFile.load(federation.kit(site) / SITE_FILE).ledger_path(federation.kit(site) / SITE_FILE)) as ledger:
        return sum(event.steps for event in ledger.charged(run))


def training_begun(federation: Federation, site: str, run: str, number: int) -> bool:
    """Whether the site's log says that this round's task has come, and not that it was answered."""
    rows = [row for row in federation.audit(site) if row["details"].get("run") == run and row["details"].get("round") == number]  # type: ignore[attr-defined]
    return bool(rows) and rows[-1]["event"] == "task received"


def test_1a_a_daemon_killed_in_training_is_back_within_a_round_and_its_charge_stands(federation: Federation) -> None:
    run = federation.submit(study(training=LONG, rounds={"count": 3, "deadline": "90s"}, privacy={"epsilon": 10.0}))
    federation.wait(lambda: training_begun(federation, NORTH, run, 2), "round 2 is under way", 120)
    time.sleep(0.5)  # into the training
    os.kill(federation.child_of(NORTH, "client.daemon"), signal.SIGKILL)
    federation.finished(run, seconds=240)
    assert [federation.status_of(run, number, NORTH)[0] for number in (1, 2, 3)] == ["ok", "failed", "ok"]
    assert all(federation.status_of(run, number, EAST)[0] == "ok" for number in (1, 2, 3))
    assert charged_steps(federation, NORTH, run) == charged_steps(federation, EAST, run)  # the lost round's too


def test_1b_a_site_killed_whole_is_back_in_the_same_study(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": 60, "deadline": "20s"}, privacy={"epsilon": 10.0}))
    federation.reached(run, 2)
    federation.kill(SOUTH)
    before = len(federation.rounds(run))
    federation.start_site(SOUTH)
    federation.wait(lambda: federation.rounds(run)[-1].round > before and federation.status_of(run, len(federation.rounds(run)), SOUTH)[0] == "ok",
                    "the site takes part again", 90)  # fmt: skip
    federation.ask(run, "stop")
    federation.finished(run, "stopped", seconds=60)


def test_4_a_hung_site_is_named_and_the_next_round_goes_on_without_it_and_with_it_again(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": 4, "deadline": "8s"}))
    federation.reached(run, 1)
    daemon = federation.child_of(EAST, "client.daemon")
    os.kill(daemon, signal.SIGSTOP)
    try:
        hung = federation.wait(
            lambda: next((record.round for record in federation.rounds(run) for site in record.sites if (site.name, site.status) == (EAST, "missing")), None),
            "the hung site is missed", 60,
        )  # fmt: skip
    finally:
        os.kill(daemon, signal.SIGCONT)
    assert "E801" in str(federation.status_of(run, hung, EAST)[1])
    assert federation.status_of(run, hung, NORTH)[0] == "ok"
    federation.finished(run, seconds=90)
    again = federation.submit(study(rounds={"count": 1, "require": "all"}))
    federation.finished(again, seconds=60)


def test_4_stale_work_is_given_up_at_its_deadline(federation: Federation) -> None:
    run = federation.submit(
        study(training={"local_steps": 40_000}, rounds={"count": 1, "deadline": "10s", "require": 1}, privacy={"epsilon": 90.0, "spare_rounds": 0})
    )
    failed = federation.finished(run, "failed", seconds=120)
    assert failed.error is not None and failed.error.code == "E800"
    for site in federation.sites:
        assert site in failed.error.what
        refused = federation.wait(lambda: [row for row in federation.audit(site) if "E802" in str(row["details"].get("reason"))], "work is stale", 30)  # type: ignore[attr-defined]  # noqa: B023
        assert refused


def test_a_stop_reaches_the_sites_and_a_resumed_study_goes_on(federation: Federation) -> None:
    run = federation.submit(study(training=LONG, rounds={"count": 3, "deadline": "90s"}, privacy={"epsilon": 10.0}))
    federation.wait(lambda: training_begun(federation, NORTH, run, 2), "round 2 is under way", 120)
    federation.ask(run, "stop")
    federation.finished(run, "stopped", seconds=60)
    assert [record.round for record in federation.rounds(run)] == [1]
    federation.ask(run, "resume")
    federation.finished(run, seconds=240)
    assert [record.round for record in federation.rounds(run)] == [1, 2, 3]


def test_5_too_few_sites_are_waited_for_named_and_the_study_can_be_resumed(federation: Federation) -> None:
    assert federation.end(SOUTH) == 0
    run = federation.submit(study(rounds={"count": 1, "require": "all", "deadline": "6s", "on_missing": "abort"}))
    failed = federation.finished(run, "failed", seconds=60)
    assert failed.error is not None and failed.error.code == "E800"
    assert f"{SOUTH}: E801" in failed.error.what
    federation.start_site(SOUTH)
    federation.ask(run, "resume")
    federation.finished(run, seconds=60)
