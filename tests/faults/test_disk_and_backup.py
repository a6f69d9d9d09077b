"""Disks that are full, states that come back from a backup, kits in folders with long names (faults 3, 13): said by name, and mended as it is said."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import client.station
from client.keys import signing_key, site_key
from client.ledger import reading
from client.policy import SiteFile
from client.repair import repair_ledger
from server.submissions import UNFINISHED
from server.witness import HEADS
from shared.audit import verify_audit, witnessed_heads
from shared.errors import AuditError
from shared.files import TRIED, make_private
from shared.kit import SITE_FILE
from tests.faults.federation import Federation, descendants, study

pytestmark = pytest.mark.slow
NORTH, EAST, SOUTH = "cleveland", "hungarian", "switzerland"
FOLDER = "Klinik für Ärzte – Haus 3, " + 10 * "Abteilung "  # a Unix socket's name has at most 107 bytes


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three hospitals, in a folder whose name is long and not plain."""
    root = tmp_path_factory.mktemp("disk") / FOLDER.strip()
    root.mkdir()
    made = Federation(root)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def run(federation: Federation) -> str:
    """A study that goes on and on."""
    name = federation.submit(study(rounds={"count": 1000, "deadline": "30s"}, privacy={"epsilon": 10.0}))
    federation.reached(name, 1)
    return name


def forbid_writing(*pids: int, forbidden: bool = True) -> None:
    """These processes can write to no file, as on a full disk; or again."""
    for pid in pids:
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if forbidden else hard, hard))


def answered(federation: Federation, run: str, site: str, status: str, reason: str = "") -> int:
    """The number of a round, of those that end from now on, in which the site had this status; in all of them the others were asked and answered."""
    before = len(federation.rounds(run))

    def look() -> int | None:
        rounds = range(before + 1, len(federation.rounds(run)) + 1)
        return next(
            (number for number in rounds if (found := federation.status_of(run, number, site))[0] == status and reason in str(found[1])), None
        )

    number = federation.wait(look, f"{site} is {status} {reason}", 60)
    others = {federation.status_of(run, later, other)[0] for later in range(before + 1, number + 1) for other in {NORTH, EAST, SOUTH} - {site}}
    assert others == {"ok"}
    return number


def test_3_a_site_that_cannot_write_says_so_and_is_back_as_soon_as_it_can(federation: Federation, run: str) -> None:
    state, daemon = federation.kit(NORTH) / "state", federation.child_of(NORTH, "client.daemon")
    forbid_writing(daemon)
    answered(federation, run, NORTH, "refused", "E103 A file of ours could not be written")
    rows = len(federation.audit(NORTH))
    answered(federation, run, NORTH, "refused")
    assert len(federation.audit(NORTH)) == rows  # whole rows, or none
    forbid_writing(daemon, forbidden=False)
    answered(federation, run, NORTH, "ok")
    seen = witnessed_heads(federation.coordinator / "state" / "audit.jsonl", site=NORTH)
    verify_audit(state / "audit.jsonl", witnessed=seen)
    with reading(state / "ledgers" / f"{NORTH}.sqlite") as ledger:
        assert ledger.num_rows > 0
    assert not [path for path in state.rglob(".*") if path.name not in (".lock", TRIED)]


def test_3_a_site_s_terminal_tells_of_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.station, "TRY_SECONDS", 0.0)
    told: list[tuple[str, str]] = []

    def tell(event: str, process: str, facts: Mapping[str, object]) -> None:
        told.append((event, str(facts.get("problem", ""))))

    state = tmp_path / "state"
    watch = client.station._Watch(state, tell)
    for _ in range(2):
        watch.look()
    make_private(state)
    watch.look()
    assert [event for event, _ in told] == ["unwritable", "writable"]
    assert told[0][1].startswith("E103 ") and str(state) in told[0][1] and "free space" in told[0][1]
    assert list(state.iterdir()) == []


def test_13_a_state_from_a_backup_is_refused_until_the_ledger_is_repaired(federation: Federation, run: str, tmp_path: Path) -> None:
    kit, daemon = federation.kit(SOUTH), federation.child_of(SOUTH, "client.daemon")
    parts = ("ledgers", "releases", "studies", "audit.jsonl", "audit.head")

    def copy(source: Path, target: Path) -> None:
        for part in parts:
            (shutil.copytree if (source / part).is_dir() else shutil.copy)(source / part, target / part)

    os.kill(daemon, signal.SIGSTOP)
    copy(kit / "state", tmp_path)
    os.kill(daemon, signal.SIGCONT)
    answered(federation, run, SOUTH, "ok")
    answered(federation, run, SOUTH, "ok")
    os.kill(daemon, signal.SIGSTOP)
    for part in parts:
        path = kit / "state" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    copy(tmp_path, kit / "state")
    os.kill(daemon, signal.SIGKILL)

    answered(federation, run, SOUTH, "refused", "E104 A ledger is damaged, was lost or put back")
    seen = witnessed_heads(federation.coordinator / "state" / "audit.jsonl", site=SOUTH)
    with pytest.raises(AuditError, match="that the other side saw"):
        verify_audit(kit / "state" / "audit.jsonl", witnessed=seen)
    [head] = {line.split("--head ")[1][:64] for line in (kit / "state" / "daemon.log").read_text().splitlines() if "ledger repair SITE.TOML" in line}
    assert head in (federation.coordinator / "state" / "witness" / HEADS).read_text()

    file = SiteFile.load(kit / SITE_FILE)  # what 'wardround ledger repair SITE.TOML --head HEAD' does
    signer = signing_key(site_key(kit / "state"))
    assert repair_ledger(file.ledger_path(kit / SITE_FILE), cohort=SOUTH, limit=file.policy.limit, signer=signer, heads=[head])
    answered(federation, run, SOUTH, "refused", "E700")
    text = (kit / SITE_FILE).read_text()
    (kit / SITE_FILE).write_text(text.replace("max_epsilon = 1000", "max_epsilon = 3000"))
    answered(federation, run, SOUTH, "ok")


def test_3_a_coordinator_that_cannot_write_says_so_and_goes_on_by_itself(federation: Federation, run: str) -> None:
    def started() -> int:
        return sum(row["event"] == "study started" for row in federation.audit("coordinator"))

    pids, before, begun = descendants(federation.pid("coordinator")), len(federation.rounds(run)), started()
    forbid_writing(*pids)
    try:
        federation.wait(lambda: any("E103" in warning for warning in federation.status().warnings), "the coordinator says so", 30)
    finally:
        forbid_writing(*descendants(federation.pid("coordinator")), forbidden=False)
    assert federation.submission(run).state in UNFINISHED
    federation.reached(run, before + 3)
    assert [record.round for record in federation.rounds(run)] == list(range(1, len(federation.rounds(run)) + 1))
    assert begun < started() <= begun + 3  # not at every look again
    verify_audit(federation.coordinator / "state" / "audit.jsonl")
    assert not [warning for warning in federation.status().warnings if "E103" in warning]


def test_what_is_beyond_an_approval_in_advance_waits_for_the_hospital(federation: Federation, run: str) -> None:
    federation.ask(run, "stop")
    path = federation.kit(EAST) / SITE_FILE
    path.write_text(path.read_text().replace("max_epsilon = 100.0", "max_epsilon = 2.0"))
    asked = study(name="beyond", rounds={"count": 1, "deadline": "30s", "require": 2}, privacy={"epsilon": 2.1})
    beyond = federation.submit(asked)
    federation.finished(beyond)
    assert {site: federation.status_of(beyond, 1, site)[0] for site in (NORTH, EAST)} == {NORTH: "ok", EAST: "refused"}
    assert "E601" in str(federation.status_of(beyond, 1, EAST)[1])
    assert (federation.kit(EAST) / "state" / "asked" / f"{asked.fingerprint()}.json").is_file()
    assert not (federation.kit(NORTH) / "state" / "asked").exists()
