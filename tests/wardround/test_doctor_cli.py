"""`wardround doctor`: the machine, a site, and the coordinator, each made to fail for real."""

import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import wardround.doctor
from client import checks
from server.federation_file import FederationFile
from server.provisioning import revoke
from shared import kit as names
from shared.audit import AuditLog
from shared.certificates import load_signing_key
from shared.supervision import single_instance
from tests.faults.federation import free_ports
from tests.provisioned import opened, provisioned
from tests.site_under_check import SITE, SiteUnderCheck, make_site
from tests.wardround.conftest import Command

Findings = dict[str, list[tuple[str, str, str]]]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteUnderCheck:
    """A federation with one approved site; its CA's key was taken elsewhere, and nothing runs."""
    monkeypatch.setattr(checks, "file_system_of", lambda path: "ext4")
    port, page_port = free_ports(2)
    site = make_site(tmp_path, port, page_port=page_port)
    approve(site)
    (site.out / "ca").rename(tmp_path / "elsewhere")
    return site


def approve(site: SiteUnderCheck) -> None:
    file = FederationFile.load(site.coordinator / names.FEDERATION)
    provisioned(site.out, file, requests=[names.SiteRequest.read(site.kit / names.REQUEST)])


def examined(command: Command, kit: Path, code: int) -> Findings:
    """Level, what and fix of every finding, by check."""
    outcome = command("doctor", kit, "--json")
    assert outcome.code == code, outcome.err
    found: Findings = {}
    for item in outcome.data["findings"]:  # type: ignore[attr-defined]
        found.setdefault(item["check"], []).append((item["level"], item["what"], item["fix"]))
    return found


def test_a_machine_without_a_kit(command: Command) -> None:
    told = command("doctor")
    assert told.code == 0 and told.out.splitlines()[-1].startswith("healthy: this machine can take part")
    assert [line.split()[1] for line in told.out.splitlines() if line.startswith(("PASS", "WARN"))] == [
        "python", "packages", "disk", "confinement", "telemetry", "training",
    ]  # fmt: skip


def test_a_coordinator_with_nothing_wrong(command: Command, site: SiteUnderCheck) -> None:
    AuditLog(
        site.coordinator / "state" / "audit.jsonl", owner="tests", role="coordinator", signer=load_signing_key(site.coordinator / names.SIGNING_KEY)
    )
    (site.coordinator / "state").chmod(0o700)
    told = command("doctor", site.coordinator)
    assert told.code == 0 and "WARN" not in told.out and told.out.splitlines()[-1] == "healthy: nothing stands in the coordinator's way"
    assert f"{site.port} and" in told.out and "1 rows verify" in told.out and f"signed: {SITE}" in told.out


def test_a_sites_kit_is_checked_as_site_check_does(command: Command, site: SiteUnderCheck) -> None:
    told = command("doctor", site.kit)
    assert told.code == 4 and told.out.splitlines()[-1] == "not healthy: port, tls, node"
    assert f"localhost:{site.port}: no connection" in told.out and "fix: is it up?" in told.out


def test_lines_are_no_wider_than_the_terminal_but_for_long_paths(site: SiteUnderCheck, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.cli.output.PLAIN_WIDTH", 80)
    told = command("doctor", site.kit)
    assert all(len(line) <= 80 or str(site.out)[:20] in line or sys.executable in line for line in told.out.splitlines())


def _alter_roster(site: SiteUnderCheck) -> None:
    path = site.coordinator / names.ROSTER
    path.write_text(path.read_text().replace('"declared_size": 112', '"declared_size": 113'))


def _revoke(site: SiteUnderCheck) -> None:
    (site.out.parent / "elsewhere").rename(site.out / "ca")
    with opened(site.out, FederationFile.load(site.coordinator / names.FEDERATION)) as consortium:
        revoke(consortium, SITE)


def _other_hosts(site: SiteUnderCheck) -> None:
    path = site.coordinator / names.FEDERATION
    path.write_text(path.read_text().replace('"localhost"', '"localhost", "new.example.org"'))


def _other_certificate(site: SiteUnderCheck) -> None:
    other = make_site(site.out.parent / "others", 9)
    (site.coordinator / names.SERVER_CERTIFICATE).write_bytes((other.coordinator / names.SERVER_CERTIFICATE).read_bytes())


def _key_inside(site: SiteUnderCheck) -> None:
    (site.coordinator / "ca.key").write_bytes((site.out.parent / "elsewhere" / "ca.key").read_bytes())


def _key_open(site: SiteUnderCheck) -> None:
    (site.out.parent / "elsewhere").rename(site.out / "ca")
    (site.out / "ca" / "ca.key").chmod(0o644)


def _server_key_open(site: SiteUnderCheck) -> None:
    (site.coordinator / names.SERVER_KEY).chmod(0o640)


def _audit_edited(site: SiteUnderCheck) -> None:
    path = site.coordinator / "state" / "audit.jsonl"
    AuditLog(path, owner="tests", role="coordinator", signer=load_signing_key(site.coordinator / names.SIGNING_KEY))
    path.write_text(path.read_text().replace("tests", "toast"))


CASES: dict[str, tuple[Callable[[SiteUnderCheck], None], str, str, str, str, int]] = {
    "altered roster": (_alter_roster, "roster", "FAIL", "signed by the CA", "provision again", 4),
    "nobody approved": (_revoke, "roster", "WARN", "no site is approved", "--approve", 0),
    "other hosts": (_other_hosts, "certificates", "FAIL", "new.example.org", "provision again", 4),
    "other certificate": (_other_certificate, "certificates", "FAIL", "not this CA's", "provision again", 4),
    "CA key in the kit": (_key_inside, "authority", "FAIL", "CA's key is in the kit", "move it away", 1),
    "CA key open": (_key_open, "authority", "FAIL", "may be read by others", "chmod 600", 1),
    "server key open": (_server_key_open, "permissions", "FAIL", "server.key may be read by others (mode 0640)", "chmod 600", 1),
    "edited audit log": (_audit_edited, "audit log", "FAIL", "line 1", "evidence", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_at_the_coordinator_is_named_with_its_fix(command: Command, site: SiteUnderCheck, case: str) -> None:
    make, name, level, what, fix, code = CASES[case]
    make(site)
    found = examined(command, site.coordinator, code)
    wrong = [item for item in found[name] if item[0] == level]
    assert wrong and what in wrong[0][1] and fix in wrong[0][2], found[name]
    assert {"ports", "superlink", "page"} <= set(found)


def test_a_ca_key_beside_the_kit_is_a_warning(command: Command, site: SiteUnderCheck) -> None:
    (site.out.parent / "elsewhere").rename(site.out / "ca")
    [(level, what, fix)] = examined(command, site.coordinator, 0)["authority"]
    assert level == "WARN" and "encrypted" in what and "elsewhere" in fix


def test_an_expired_and_a_soon_expired_certificate(command: Command, tmp_path: Path) -> None:
    old = make_site(tmp_path / "old", 9, now=datetime.now(UTC) - timedelta(days=400))
    found = examined(command, old.coordinator, 4)
    assert found["certificates"][0][:2] == ("FAIL", found["certificates"][0][1]) and "expired on" in found["certificates"][0][1]
    soon = make_site(tmp_path / "soon", 9, server_days=10, site_days=10)
    approve(soon)
    found = examined(command, soon.coordinator, 0)
    assert found["certificates"][0][0] == "WARN" and "wardround renew" in found["certificates"][0][2]
    assert any(f"site {SITE} expires" in what for _, what, _ in found["roster"])


def test_ports_that_another_program_has_are_named_and_our_own_are_not(command: Command, site: SiteUnderCheck) -> None:
    with socket.create_server(("127.0.0.1", site.port)):
        [(level, what, _)] = examined(command, site.coordinator, 4)["ports"]
        assert level == "FAIL" and f"127.0.0.1:{site.port}" in what
        state = site.coordinator / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        with single_instance(state) as announce:
            announce({"door": site.port})
            found = examined(command, site.coordinator, 4)
    assert found["ports"][0][0] == "PASS" and f"door {site.port}" in found["ports"][0][1]
    assert found["page"][0][0] == "FAIL" and "no answer (ConnectError)" in found["page"][0][1]


def test_superlink_that_is_not_installed_is_missed(command: Command, site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wardround.doctor, "BINARIES", ("flower-superlink", "flower-nowhere"))
    [(level, what, _)] = examined(command, site.coordinator, 1)["superlink"]
    assert level == "FAIL" and what.startswith("flower-nowhere: not found beside")


def test_what_is_no_kit_is_a_wrong_use(command: Command, tmp_path: Path) -> None:
    assert command("doctor", tmp_path / "none").code == 2
    assert command("doctor", tmp_path).code == 4  # an empty folder: a site's kit with everything missing


def test_an_unforeseen_error_shows_its_traceback_only_with_debug(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise ZeroDivisionError("something")

    monkeypatch.setattr(checks, "telemetry", broken)
    plain, debug = command("doctor"), command("doctor", "--debug")
    assert plain.code == debug.code == 1 and "unexpected ZeroDivisionError" in plain.out
    assert "Traceback" not in plain.err and "Traceback" in debug.err and plain.out.splitlines()[-1] == "not healthy: telemetry"
