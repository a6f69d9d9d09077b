"""`coordinator start|status|stop`: what is told of a running one, and what is said where none runs."""

import itertools
import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

from server.page import page_routes
from server.status import AuditHead, CoordinatorStatus, Failure, SiteStatus, StudyStatus
from shared.errors import ConfigurationError, StorageError
from shared.kit import STATE
from shared.supervision import single_instance
from tests.provisioned import federation, provisioned
from tests.wardround.conftest import Command
from tests.wardround.serving import serving
from wardround.attending import Attendant, Happening, ProcessEnded, ProcessLog, SiteChanged, StudyChanged, Warned, changes
from wardround.cli.coordinator import address_of

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


def study(run: str, state: str, **more: object) -> StudyStatus:
    return StudyStatus.model_validate({"run": run, "study": "s", "task": "t", "state": state, "rounds": 4, "submitted": NOW, **more})


def status(
    *, sites: dict[str, str] | None = None, studies: tuple[StudyStatus, ...] = (), warnings: tuple[str, ...] = (), quorum: int = 1
) -> CoordinatorStatus:
    entries = tuple(SiteStatus.model_validate({"name": name, "state": state}) for name, state in (sites or {}).items())
    return CoordinatorStatus(
        federation="tests", wardround="0", time=NOW, started=NOW - timedelta(hours=1), generation=1, quorum=quorum, sites=entries, studies=studies,
        audit=AuditHead(head="", rows=0), warnings=warnings,
    )  # fmt: skip


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A coordinator's kit."""
    return provisioned(tmp_path / "kits").coordinator_kit


def test_without_a_coordinator_status_exits_4_and_stop_is_content(command: Command, kit: Path) -> None:
    outcome = command("coordinator", "status", kit)
    assert outcome.code == 4 and "expected a running coordinator, found none" in outcome.err and f"coordinator start {kit}" in outcome.err
    stopped = command("coordinator", "stop", kit, "--json")
    assert stopped.code == 0 and stopped.data == {"kit": str(kit), "was_running": False} and "no coordinator was running" in stopped.err


def test_a_sites_kit_is_refused_by_every_verb(command: Command, kit: Path) -> None:
    site = kit.parent / "sites" / "north"
    for verb in ("start", "status", "stop"):
        outcome = command("coordinator", verb, site)
        assert outcome.code == 4 and "expected the coordinator's kit, got that of site north" in outcome.err
        assert outcome.err.rstrip().endswith(f"what to do: give {kit}")


def test_the_folder_of_all_kits_names_the_one_that_is_meant(command: Command, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("start", "status", "stop"):
        for wrong in (kit.parent, kit.parent / "sites"):
            outcome = command("coordinator", verb, wrong)
            assert outcome.code == 4 and outcome.err.rstrip().endswith(f"what to do: give {kit}")
    assert command("study", "list", "--coordinator", kit.parent).code == 4
    monkeypatch.chdir(kit.parent.parent)
    assert "give kits/coordinator" in command("coordinator", "status", "kits").err
    assert "give" not in command("coordinator", "status", kit.parent.parent / "elsewhere" / "deep" / "down").err


@pytest.mark.slow
def test_a_second_start_says_who_runs_and_nothing_else(command: Command, kit: Path) -> None:
    with single_instance(kit / STATE):
        outcome = command("coordinator", "start", kit)
        assert outcome.code == 1 and "E110" in outcome.err and outcome.out == ""
        assert command("coordinator", "start", kit, "--json").out.count("\n") == 1  # the error's envelope


def test_one_site_is_no_sites(command: Command, kit: Path) -> None:
    with serving(kit, page_routes(lambda: status(sites={"north": "online"}))):
        assert "1 of 1 site online" in command("coordinator", "status", kit).out


def test_status_is_what_the_running_one_says(command: Command, kit: Path) -> None:
    failed = study("s-20260131T080000Z-abcd", "failed", round=2, error=Failure(code="E800", what="too few " * 40))
    found = status(sites={"north": "online", "south": "never seen"}, studies=(failed,), warnings=("the certificate expires soon",), quorum=2)
    with serving(kit, page_routes(lambda: found)):
        outcome = command("coordinator", "status", kit, "--json")
    assert outcome.code == 0 and CoordinatorStatus.model_validate_json(json.dumps(outcome.data)) == found
    assert "1 of 2 sites online, quorum 2" in outcome.err and "WARN the certificate expires soon" in outcome.err
    rows = [line.split() for line in outcome.err.splitlines()]
    assert ["s-20260131T080000Z-abcd", "failed", "2/4", "-", "-"] in rows
    assert "E800 too few" in outcome.err and outcome.err.count("too few") < 40


def test_another_program_at_the_port_is_not_believed(command: Command, kit: Path) -> None:
    with serving(kit, [Route("/status.json", lambda request: JSONResponse({"federation": "another"}))]):
        outcome = command("coordinator", "status", kit)
    assert outcome.code == 4 and "expected the coordinator's status, got ValidationError" in outcome.err


def test_at_first_only_what_is_there_or_goes_on_is_told() -> None:
    first = status(
        sites={"north": "online", "south": "offline"}, studies=(study("b", "running", round=3), study("a", "completed")), warnings=("expires",)
    )
    assert changes(None, first) == [
        Warned(text="expires"),
        SiteChanged(site="north", state="online"),
        StudyChanged(run="b", state="running", round=3, rounds=4),
    ]
    assert changes(first, first) == []


def test_every_change_is_told_once_and_studies_in_the_order_of_submission() -> None:
    why = Failure(code="E800", what="too few sites")
    before = status(sites={"north": "online", "south": "offline"}, studies=(study("a", "running"),), warnings=("one",))
    after = status(
        sites={"north": "revoked", "south": "offline", "west": "awaiting approval"},
        studies=(study("b", "queued"), study("a", "failed", round=2, error=why)), warnings=("one", "two"),
    )  # fmt: skip
    assert changes(before, after) == [
        Warned(text="two"), SiteChanged(site="north", state="revoked"), SiteChanged(site="west", state="awaiting approval"),
        StudyChanged(run="a", state="failed", round=2, rounds=4, error=why), StudyChanged(run="b", state="queued", round=0, rounds=4),
    ]  # fmt: skip


def test_the_attendant_tells_a_lasting_error_once_and_what_happens_after_it() -> None:
    told: list[Happening] = []
    damaged, well = ConfigurationError("damaged"), status(sites={"north": "online"})
    looks = itertools.chain([damaged, damaged, StorageError("full")], itertools.repeat(well))  # it goes on looking until it is stopped
    done = threading.Event()

    def look() -> CoordinatorStatus:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    def tell(event: Happening) -> None:
        told.append(event)
        if isinstance(event, SiteChanged):
            done.set()

    attendant = Attendant(look, tell, pause_seconds=0.001)
    attendant.start()
    assert done.wait(10)
    attendant.stop()
    assert told == [Warned(text="damaged"), Warned(text="full"), SiteChanged(site="north", state="online")]


def test_of_the_services_log_ends_of_processes_and_warnings_are_told() -> None:
    told: list[Happening] = []
    log = logging.Logger("a log of its own")
    log.addHandler(ProcessLog(told.append))
    log.info("%s %s%s", "superlink", "started", " pid=1")
    log.info("%s: started", "run")
    log.info("%s %s%s", "superlink", "exited", " status=-9 alive_seconds=3")
    log.warning("%s", "the SuperLink does not answer")
    assert told == [ProcessEnded(process="superlink", status="status=-9 alive_seconds=3"), Warned(text="the SuperLink does not answer")]


@pytest.mark.parametrize(("host", "address"), [("coordinator.example.org", "https://coordinator.example.org:8443"), ("::1", "https://[::1]:8443")])
def test_the_address_is_one_that_sites_can_dial(host: str, address: str) -> None:
    assert address_of(federation(hosts=[host])) == address
