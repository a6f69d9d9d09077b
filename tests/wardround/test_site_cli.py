"""`site start|status|stop|approve|check`: the hospital's word, and a site that is run from the command line."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import wardround.cli.site_running
from client.approvals import Approvals, Asked, what_is_asked
from client.connection import ConnectionFile
from client.hospital import Hospital
from client.station import StationState, read_station
from shared import kit as names
from shared.audit import AuditLog, verified_rows
from shared.errors import NotApprovedError
from shared.kit import installed_version
from shared.study import Study
from shared.supervision import single_instance
from shared.task import resolve_task
from tests.faults.federation import free_ports
from tests.provisioned import opened, provisioned
from tests.site_under_check import SITE, SiteUnderCheck, Told, door, make_site
from tests.wardround.conftest import Command
from wardround.approving import as_deployed, costs, parse_expiry
from wardround.cli.site_running import line_of

STUDY = {
    "name": "hearts", "task": "heart-disease", "purpose": "a test", "rounds": {"count": 3},
    "privacy": {"epsilon": 2.0, "delta": 1e-4, "evaluation_epsilon": 1.0, "noise_source": "os"},
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteUnderCheck:
    """A site that has taken up its kit; its coordinator is not there. Standard input is no terminal, and the login has a name."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setenv("LOGNAME", "tester")
    return make_site(tmp_path, free_ports(1)[0])


def study(**changes: object) -> Study:
    return Study.from_table(STUDY).replace(**changes)


def ask(site: SiteUnderCheck, **changes: object) -> Asked:
    """What the daemon remembers when a coordinator asks for a study that is not approved."""
    hospital, wanted = Hospital.open(site.kit), study(**changes)
    asked = what_is_asked(wanted, resolve_task(wanted.task), hospital.file)
    approvals = Approvals(hospital.state, hospital.signer)
    with pytest.raises(NotApprovedError):
        approvals.check(asked)
    site.state.mkdir(exist_ok=True)
    approvals.remember(asked)
    return asked


def is_approved(site: SiteUnderCheck, asked: Asked) -> bool:
    hospital = Hospital.open(site.kit)
    with contextlib.suppress(NotApprovedError):
        return bool(Approvals(hospital.state, hospital.signer).check(asked))
    return False


def audit(site: SiteUnderCheck) -> list[tuple[str, dict[str, object]]]:
    return [(row.event, dict(row.details)) for row in verified_rows(site.state / "audit.jsonl")]


# The hospital's word --------------------------------------------------------------------------------------------------------------


def test_what_is_asked_is_shown_approved_signed_written_down_and_taken_back(site: SiteUnderCheck, command: Command) -> None:
    asked = ask(site)
    listed = command("site", "approve", site.kit)
    assert listed.code == 0 and "hearts" in listed.out and asked.study_hash[:12] in listed.out and "epsilon 2 for each patient" in listed.out
    shown = command("site", "approve", site.kit, "hearts")
    assert shown.code == 2 and "--yes" in shown.err and not is_approved(site, asked)
    for text in ("a test", f"hash         {asked.study_hash[:16]}: the coordinator sees the same", f"in full {asked.study_hash}", "heart-disease",
                 asked.architecture, asked.code_hash, "the code installed here, nothing to compare", "rounds       3", "these are not sums",
                 "max_epsilon = 10",
                 "epsilon 2 for each patient at delta 0.0001", "epsilon 1 for each test patient", "an update of the model", "training patients: room",
                 "test patients: room"):  # fmt: skip
        assert text in shown.out, text
    done = command("site", "approve", site.kit, asked.study_hash[:8], "--yes", "--by", "Dr. Eva Muster", "--expires", "2099-12-31", "--json")
    assert done.code == 0 and done.data["approved"] is True and done.data["expires"] == "2099-12-31T23:59:59+00:00"
    assert is_approved(site, asked)
    [(event, details)] = audit(site)[1:]
    assert event == "study approved by hand" and details["by"] == "Dr. Eva Muster" and details["study_hash"] == asked.study_hash
    listed = command("site", "approve", site.kit)
    assert "nothing waits to be decided" in listed.out and "2099-12-31" in listed.out and "Dr. Eva Muster" in listed.out
    back = command("site", "approve", site.kit, "hearts", "--withdraw", "--json")
    assert back.code == 0 and back.data["withdrawn"] is True and not is_approved(site, asked)
    assert audit(site)[-1][0] == "study approval withdrawn"
    with pytest.raises(NotApprovedError, match="found none"):
        Approvals(site.state, Hospital.open(site.kit).signer).check(asked)


def test_the_budget_says_what_would_be_left(site: SiteUnderCheck) -> None:
    hospital = Hospital.open(site.kit)
    training, test = costs(hospital, ask(site))
    assert (training.account, test.account) == ("training", "test")
    assert training.after is not None and test.after is not None
    assert 8 < training.after < training.before <= 10 and training.after < test.after < test.before == training.before
    [whole] = costs(hospital, ask(site, privacy={"epsilon": 10.0, "evaluation_epsilon": None} | {"delta": 1e-4}, name="whole"))[:1]
    assert whole.after is not None and whole.after < 0.05
    [too_much] = costs(hospital, ask(site, privacy={"epsilon": 12.0}, name="more"))[:1]
    assert too_much.after is None
    assert costs(hospital, ask(site, privacy={"unit": "none"}, name="open")) == []
    unknown = costs(hospital, ask(site, privacy={"noise_multiplier": 2.0}, name="noise"))[0]
    assert unknown.asks is None and unknown.before == training.before


def test_a_study_without_privacy_and_one_that_does_not_fit_say_so_loudly(site: SiteUnderCheck, command: Command) -> None:
    ask(site, privacy={"unit": "none"}, name="open")
    ask(site, privacy={"epsilon": 12.0}, name="more")
    assert "WITHOUT PRIVACY" in command("site", "approve", site.kit, "open").out
    assert "does NOT FIT" in command("site", "approve", site.kit, "more").out


def test_two_studies_of_one_name_are_told_apart_by_their_hash(site: SiteUnderCheck, command: Command) -> None:
    first, second = ask(site), ask(site, seed=8)
    refused = command("site", "approve", site.kit, "hearts", "--yes")
    assert refused.code == 2 and first.study_hash[:12] in refused.err and second.study_hash[:12] in refused.err
    assert command("site", "approve", site.kit, second.study_hash, "--yes").code == 0
    assert (is_approved(site, first), is_approved(site, second)) == (False, True)
    assert command("site", "approve", site.kit, "hearts", "--yes").code == 0  # only one of that name waits any more
    assert is_approved(site, first)


def test_a_study_file_is_approved_as_a_coordinator_would_submit_it(site: SiteUnderCheck, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study(privacy={"noise_source": "seeded"}, federation={"sites": 9}, rounds={"require": 2}).to_toml())
    done = command("site", "approve", site.kit, path, "--yes", "--json")
    assert done.code == 0 and done.data["remarks"] == []
    deployed = study(rounds={"require": 2})
    assert as_deployed(Study.load(path)) == deployed
    assert is_approved(site, what_is_asked(deployed, resolve_task("heart-disease"), Hospital.open(site.kit).file))


@pytest.mark.parametrize(
    ("changes", "code", "what"),
    [({"privacy": {"epsilon": 2.0}}, 3, "approve the study when the coordinator asks for it"), ({"task": "os:getcwd"}, 6, "policy.allowed_tasks")],
)
def test_a_study_file_that_leaves_delta_open_or_names_another_task_is_not_approved(
    site: SiteUnderCheck, command: Command, tmp_path: Path, changes: dict[str, object], code: int, what: str
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(Study.from_table({"name": "file", "task": "heart-disease", "privacy": {"epsilon": 2.0, "delta": 1e-4}, **changes}).to_toml())
    refused = command("site", "approve", site.kit, path, "--yes")
    assert refused.code == code and what in refused.err
    assert not (site.state / "approvals").exists()


def test_a_study_file_beyond_the_policy_says_so(site: SiteUnderCheck, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study(privacy={"epsilon": 50.0}).to_toml())
    shown = command("site", "approve", site.kit, path)
    assert "your policy refuses it all the same: policy.max_epsilon" in " ".join(shown.out.split()) and "quorum above 1" in shown.out


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["nobody-asked"], 2, "no study of this name or hash"),
        (["--withdraw"], 2, "expected a study with it"),
        (["--yes"], 2, "expected a study with it"),
        (["hearts", "--yes", "--expires", "soon"], 2, "expected a duration or a day"),
        (["hearts", "--yes", "--expires", "2001-01-01"], 2, "expected a time to come"),
        (["hearts", "--yes", "--by", "x" * 101], 2, "at most 100"),
        (["hearts", "--yes", "--by", "two\nlines"], 2, "printable"),
    ],
)
def test_wrong_use_approves_nothing(site: SiteUnderCheck, command: Command, arguments: list[str], code: int, what: str) -> None:
    asked = ask(site)
    refused = command("site", "approve", site.kit, *arguments)
    assert refused.code == code and what in refused.err and not is_approved(site, asked)


def test_what_cannot_be_written_down_is_not_approved(site: SiteUnderCheck, command: Command) -> None:
    asked = ask(site)
    (site.state / "audit.jsonl").write_text("no log of ours\n")
    refused = command("site", "approve", site.kit, "hearts", "--yes")
    assert refused.code == 1 and "E106" in refused.err and not is_approved(site, asked)


def test_root_is_nobodys_name_and_who_stands_behind_sudo_is(site: SiteUnderCheck, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(site)
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.delenv("SUDO_USER", raising=False)
    refused = command("site", "approve", site.kit, "hearts", "--yes")
    assert refused.code == 2 and "give it with --by NAME" in refused.err and not is_approved(site, asked)
    assert command("site", "approve", site.kit).code == 0  # to look needs no name
    monkeypatch.setenv("SUDO_USER", "eva")
    assert command("site", "approve", site.kit, "hearts", "--yes", "--json").data["by"] == "eva"
    monkeypatch.delenv("SUDO_USER")
    back = command("site", "approve", site.kit, "hearts", "--withdraw", "--json")
    assert back.code == 0 and back.data["by"] == "root" and not is_approved(site, asked)


@pytest.mark.slow
def test_on_a_terminal_root_is_asked_who_decides(site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(site)
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.delenv("SUDO_USER", raising=False)
    code, shown = on_terminal(["site", "approve", str(site.kit), "hearts"], "y", "Dr. Eva Muster")
    assert code == 0 and is_approved(site, asked)
    assert "who decides (your name; the login is root): " in shown and "approved by Dr. Eva Muster, until" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "approved"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_it_is_asked_and_silence_is_no(site: SiteUnderCheck, answer: str, approved: bool) -> None:
    asked = ask(site)
    code, shown = on_terminal(["site", "approve", str(site.kit), "hearts"], answer)
    assert code == 0 and "approve? [y/N]" in shown
    assert is_approved(site, asked) == approved and ("not approved: it stays undecided" in shown) != approved
    assert max(len(line) for line in shown.replace("\r", "").splitlines()) <= 80


def on_terminal(arguments: list[str], answer: str, name: str = "") -> tuple[int, str]:
    """Exit code and output of a command on a terminal of 80 columns, where this is typed once it asks, and the name at once after it."""
    here, there = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    process = subprocess.Popen([sys.executable, "-m", "wardround", *arguments], stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    shown, answered, deadline = b"", False, time.monotonic() + 60
    while select.select([here], [], [], max(deadline - time.monotonic(), 0))[0]:
        try:
            shown += os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if b"[y/N]" in shown and not answered:
            os.write(here, f"{answer}\n{name}\n".encode() if name else answer.encode() + b"\n")
            answered = True
    os.close(here)
    return process.wait(timeout=30), shown.decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("180d", "2026-06-30T12:00:00+00:00"), ("2h", "2026-01-01T14:00:00+00:00"), ("2026-03-01", "2026-03-01T23:59:59+00:00")],
)
def test_an_expiry_is_a_duration_or_a_last_day(text: str, expected: str) -> None:
    assert parse_expiry(text, now=datetime(2026, 1, 1, 12, tzinfo=UTC)).isoformat() == expected


# Running --------------------------------------------------------------------------------------------------------------------------


def test_a_site_that_does_not_run_says_so_with_exit_code_4_and_stops_with_0(site: SiteUnderCheck, command: Command) -> None:
    ask(site)
    shown = command("site", "status", site.kit)
    assert shown.code == 4 and "not running" in shown.out and "1 study waits to be decided" in shown.out and "nothing was spent" in shown.out
    told = command("site", "status", site.kit, "--json")
    assert told.code == 4 and '"running": false' in told.out and '"pending": 1' in told.out
    stopped = command("site", "stop", site.kit, "--json")
    assert stopped.code == 0 and stopped.data["was_running"] is False
    for verb in ("status", "stop", "start", "approve"):
        for wrong, what in ((site.coordinator, "got the coordinator's"), (site.out, "got no kit"), (site.out / "sites", "got no kit")):
            refused = command("site", verb, wrong)
            assert refused.code == 3 and what in refused.err and refused.err.rstrip().endswith(f"give {site.kit}")
    assert command("site", "check", site.kit / "kit.json").code == 2
    for whole in (command("site", "check", site.out), command("doctor", site.out)):
        assert whole.code == 2 and f"give {site.coordinator}; or, for a site, give {site.kit}" in whole.err


def test_status_shows_processes_connection_approvals_and_the_last_rows(site: SiteUnderCheck, command: Command) -> None:
    asked = ask(site)
    assert command("site", "approve", site.kit, "hearts", "--yes", "--by", "somebody").code == 0
    child = {"name": "courier", "state": "ready", "pid": 4711, "restarts": 3, "last_exit": -9}
    with single_instance(site.state):
        (site.state / "station.json").write_text(json.dumps({"children": [child]}))
        connection = ConnectionFile(site.state)
        assert "NOT CONNECTED yet" in command("site", "status", site.kit).out
        connection.tell(node=99)
        told = command("site", "status", site.kit, "--json")
        shown = command("site", "status", site.kit).out
    assert told.code == 0 and told.data["connected"] is True and told.data["processes"] == [child]
    assert told.data["approved"][0]["study_hash"] == asked.study_hash  # type: ignore[index]
    for text in ("running since", "connected as node 99", "4711", "somebody", "study approved by hand"):
        assert text in shown


def test_another_version_at_the_coordinator_stops_the_start_and_names_both(site: SiteUnderCheck, command: Command) -> None:
    with door(site, Told(version="9.9.9")):
        refused = command("site", "start", site.kit)
    assert refused.code == 3 and "E305" in refused.err and "9.9.9" in refused.err and installed_version() in refused.err
    assert not (site.state / "supervisor.json").exists()


def test_what_happens_is_told_in_lines() -> None:
    def text(event: str, again: bool = False, **facts: object) -> str:
        return line_of(event, facts, again=again)[0]

    assert (
        text("ready", process="daemon") == "daemon listens"
        and text("ready", process="courier", node=5, again=True) == "courier is connected as node 5 again"
    )
    assert text("started", process="daemon", pid=1) == text("stopped", process="daemon") == ""
    assert "killed by signal 9" in text("exited", process="daemon", status=-9, restart_in_seconds=0.5)
    assert "does not let this site in" in text("unreachable", problem="E401 coordinator: expected ..., got HTTP 412")
    assert "does not answer (ConnectError)" in text("unreachable", problem="ConnectError")


def test_a_site_that_is_not_let_in_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell = wardround.cli.site_running._teller(as_json=False)
    for _ in range(3):
        tell("unreachable", {"process": "courier", "problem": "E401 refused"})
        tell("exited", {"process": "courier", "status": 4, "restart_in_seconds": 1.0})
        tell("started", {"process": "courier", "pid": 3})
        tell("ready", {"process": "daemon"})
    tell("ready", {"process": "courier", "node": 1})
    tell("exited", {"process": "courier", "status": -9, "restart_in_seconds": 0.5})
    shown = capsys.readouterr().out
    assert shown.count("does not let this site in") == 1 and shown.count("courier ended") == 1 and "connected as node 1" in shown


def started(site: SiteUnderCheck, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wardround", "site", "start", str(site.kit), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_until(process: subprocess.Popen[str], wanted: Callable[[str], bool], seconds: float = 60) -> list[str]:
    """The lines a process prints up to the one wanted."""
    assert process.stdout is not None
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if wanted(line):
                return lines
    finally:
        killer.cancel()
    raise AssertionError(f"ended, or not in time: {''.join(lines)}")


@pytest.mark.slow
def test_without_a_coordinator_a_site_starts_says_so_restarts_what_dies_and_ends_in_order(site: SiteUnderCheck) -> None:
    process = started(site)
    try:
        shown = "".join(lines_until(process, lambda line: "daemon listens" in line))
        if "does not answer (ConnectError)" not in shown:  # of another process, which may be later
            shown += "".join(lines_until(process, lambda line: "does not answer (ConnectError)" in line))
        assert f"WARN localhost:{site.port}: no answer" in shown and "does not answer (ConnectError)" in shown
        station = read_station(site.state)
        assert station is not None
        daemon = next(child.pid for child in station.children if child.name == "daemon")
        assert daemon is not None
        os.kill(daemon, signal.SIGKILL)
        again = "".join(lines_until(process, lambda line: "daemon listens again" in line))
        assert "daemon ended (killed by signal 9)" in again
        process.send_signal(signal.SIGINT)
        assert lines_until(process, lambda line: "stopped" in line) and process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()
    assert not (site.state / "station.json").exists() and not (site.state / "courier.json").exists()


@pytest.fixture
def coordinator(site: SiteUnderCheck) -> Iterator[Callable[[], None]]:
    """Starts the coordinator of the site's federation; it ends with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> None:
        script = "import sys; from pathlib import Path; from server.service import Service; Service(Path(sys.argv[1])).run(ready=lambda: print('ready', flush=True))"
        process = subprocess.Popen([sys.executable, "-c", script, str(site.coordinator.resolve())], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        lines_until(process, lambda line: "ready" in line)

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_a_site_comes_from_its_kit_to_healthy_and_running_with_a_real_coordinator(
    site: SiteUnderCheck, coordinator: Callable[[], None], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator()
    waiting = command("site", "check", site.kit)
    assert waiting.code == 4 and "not approved yet" in waiting.out and waiting.out.splitlines()[-1] == "not healthy: node"
    file = names.FEDERATION
    from server.federation_file import FederationFile

    provisioned(site.out, FederationFile.load(site.coordinator / file), requests=[names.SiteRequest.read(site.kit / names.REQUEST)])
    deadline = time.monotonic() + 30
    while (found := command("site", "check", site.kit, "--json")).data["healthy"] is not True:
        assert time.monotonic() < deadline, found.out
    assert found.code == 0
    process = started(site, "--json")
    try:
        events = [json.loads(line) for line in lines_until(process, lambda line: '"ready"' in line and "courier" in line)]
        assert events[0]["event"] == "starting" and isinstance(events[-1]["node"], int)
        running = command("site", "status", site.kit, "--json")
        assert running.code == 0 and running.data["connected"] is True
        healthy = command("site", "check", site.kit)
        assert healthy.code == 0 and "the site runs" in healthy.out and healthy.out.splitlines()[-1].startswith("healthy")
        second = command("site", "start", site.kit)
        assert second.code == 1 and "E110" in second.err and second.out == ""
        assert command("site", "status", site.kit).code == 0
        assert command("site", "stop", site.kit).out.strip() == "stopped"
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


# What an administrator may install --------------------------------------------------------------------------------------------------


def test_texts_for_the_machines_administrator_stand_beside_both_kits_and_are_never_overwritten(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "federation.toml").write_text(
        'name = "two"\nsites = ["North.West"]\n[coordinator]\nhosts = ["coordinator.example.org", "192.0.2.7"]\n'
    )
    monkeypatch.setenv("WARDROUND_CA_PASSPHRASE", "a passphrase for tests")
    made = command("provision", "federation.toml")
    assert made.code == 0 and "kits/coordinator/units" in made.out
    units = Path("kits/coordinator/units")
    assert {str(path.relative_to(units)) for path in units.rglob("*") if path.is_file()} == {
        "wardround-coordinator.service", "user/wardround-coordinator.service", "compose.yaml", "Dockerfile", "nginx.conf",
    }  # fmt: skip
    assert "listen 192.0.2.7:8443 ssl;" in (units / "nginx.conf").read_text() and "server 127.0.0.1:8443;" in (units / "nginx.conf").read_text()
    (units / "nginx.conf").write_text("edited")
    taken = command("site", "init", "kits/sites/North.West", "--json")
    assert taken.code == 0 and "kits/sites/North.West/units" in str(taken.data["units"])
    own = Path("kits/sites/North.West/units")
    unit, script = (own / "wardround-site-North.West.service").read_text(), own / "courier-user.sh"
    assert f"site start {tmp_path}/kits/sites/North.West" in unit and "User=" not in (own / "user/wardround-site-North.West.service").read_text()
    assert os.access(script, os.X_OK) and "useradd --system --no-create-home --shell /usr/sbin/nologin wardround-courier" in script.read_text()
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    script.write_text("edited")
    assert command("site", "init", "kits/sites/North.West").code == command("provision", "federation.toml").code == 0
    assert script.read_text() == (units / "nginx.conf").read_text() == "edited"
    assert names.verify_kit(Path("kits/coordinator")) and names.verify_kit(Path("kits/sites/North.West"))


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_the_nginx_configuration_is_one_that_nginx_takes(site: SiteUnderCheck, tmp_path: Path) -> None:
    from server.federation_file import FederationFile
    from server.installation import write_coordinator_units

    with opened(site.out, FederationFile.load(site.coordinator / names.FEDERATION)) as consortium:
        text = write_coordinator_units(site.coordinator, consortium.file) / "nginx.conf"
    whole = tmp_path / "nginx.conf"
    logs = "\n".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    whole.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n{logs}\naccess_log off;\ninclude {text};\n}}\n")
    tried = subprocess.run(["nginx", "-t", "-e", f"{tmp_path}/error.log", "-c", str(whole)], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr


def test_a_path_that_no_unit_can_name_is_said_and_stops_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd\nfolder"
    odd.mkdir()
    (odd / "federation.toml").write_text('name = "two"\nsites = ["north"]\n[coordinator]\nhosts = ["localhost"]\n')
    monkeypatch.setenv("WARDROUND_CA_PASSPHRASE", "a passphrase for tests")
    made = command("provision", odd / "federation.toml", "--out", odd / "kits")
    assert made.code == 0 and "no systemd, Compose or nginx file was written" in made.out
    assert command("site", "init", odd / "kits/sites/north").code == 0


def test_the_station_file_is_what_the_supervisor_says(site: SiteUnderCheck) -> None:
    site.state.joinpath("station.json").write_text('{"children": [{"name": "x"}]}')
    assert read_station(site.state) is None
    site.state.joinpath("station.json").write_text('{"children": []}')
    assert read_station(site.state) == StationState(children=())


def test_an_audit_log_is_begun_by_an_approval_and_taken_up_by_the_daemon(site: SiteUnderCheck, command: Command) -> None:
    ask(site)
    assert command("site", "approve", site.kit, "hearts", "--yes").code == 0
    hospital = Hospital.open(site.kit)
    log = AuditLog(site.state / "audit.jsonl", owner=SITE, role="site", signer=hospital.signer)
    assert log.num_rows == 2 and timedelta(0) < datetime.now(UTC) - datetime.fromisoformat(list(verified_rows(log.path))[-1].time) < timedelta(
        minutes=5
    )
