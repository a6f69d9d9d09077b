"""`wardround site check`: each check is made to fail for real, names itself and the fix, and hides no other."""

import contextlib
import json
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import checks, reaching
from client.approvals import Approvals, what_is_asked
from client.checks import CLOCK, COHORT, NODE, check_machine, check_site, file_system_of, why_not_healthy
from client.connection import ConnectionFile
from client.findings import Finding, exit_code_of, failed, passed, run_checks
from client.keys import signing_key, site_key
from client.ledger import Ledger
from client.policy import SiteFile
from server.authority import issue_server_certificate
from shared import kit as names
from shared.audit import AuditLog
from shared.certificates import certificate_bytes, load_signing_key, new_node_key
from shared.kit import installed_version
from shared.study import Study
from shared.supervision import single_instance
from shared.task import resolve_task
from tests.faults.federation import free_ports
from tests.provisioned import opened, provisioned
from tests.site_under_check import SITE, SiteUnderCheck, Told, door, heart_rows, make_site

pytestmark = pytest.mark.slow  # seconds altogether

Found = dict[str, list[Finding]]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteUnderCheck:
    """One that would be healthy, were its coordinator there."""
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checks, "file_system_of", lambda path: "ext4")
    return make_site(tmp_path, free_ports(1)[0])


def look(site: SiteUnderCheck) -> Found:
    """What is found, by check, in order."""
    found: Found = {}
    for finding in check_site(site.kit):
        found.setdefault(finding.check, []).append(finding)
    return found


def everything(found: Found) -> list[Finding]:
    return [finding for findings in found.values() for finding in findings]


def levels(found: Found) -> dict[str, str]:
    return {name: " ".join(finding.level for finding in findings) for name, findings in found.items()}


def says(finding: Finding, level: str, what: str, fix: str) -> None:
    assert finding.level == level and what in finding.what and fix in finding.fix, finding


def test_a_site_that_lacks_only_its_approval_passes_everything_else(site: SiteUnderCheck) -> None:
    with door(site):
        found = look(site)
    assert {name: level for name, level in levels(found).items() if level != "PASS"} == {NODE: "WARN"}
    says(found[NODE][0], "WARN", "not approved yet", str(site.kit / "request.json"))
    assert list(found)[:8] == ["python", "packages", "kit", "site.toml", "certificates", CLOCK, "name", "port"]
    assert exit_code_of(everything(found)) == 0 and why_not_healthy(everything(found)) == [NODE]


def test_a_running_site_tells_how_it_stands_and_is_not_disturbed(site: SiteUnderCheck) -> None:
    with door(site), single_instance(site.state):
        says(look(site)[NODE][0], "WARN", "not connected yet", "wait")
        connection = ConnectionFile(site.state)
        connection.tell(node=17)
        found = look(site)
        says(found[NODE][0], "PASS", "node 17", "")
        assert why_not_healthy(everything(found)) == []
        connection.tell(problem="ConnectError")
        says(look(site)[NODE][0], "FAIL", "ConnectError", "coordinator up")
        connection.tell(problem="E401 coordinator: HTTP 412")
        says(look(site)[NODE][0], "WARN", "not approved yet", "request.json")
        log = AuditLog(site.state / "audit.jsonl", owner=SITE, role="site", signer=load_signing_key(site.kit / names.SIGNING_KEY))
        log.append("task received", {"round": 1})
        says(look(site)[NODE][0], "FAIL", "let in no more", "revoked")


# The way to the coordinator -------------------------------------------------------------------------------------------------------


def test_a_closed_port_is_a_failure_of_connection_and_hides_nothing(site: SiteUnderCheck) -> None:
    found = look(site)
    says(found["port"][0], "FAIL", f"localhost:{site.port}", "HTTPS_PROXY")
    says(found["tls"][0], "FAIL", "no answer (Connection refused)", "coordinator up")
    assert [found[name][0].level for name in (CLOCK, "version", NODE)] == ["WARN"] * 3
    assert levels(found)[COHORT] == levels(found)["training"] == "PASS"
    assert exit_code_of(everything(found)) == 4 and why_not_healthy(everything(found)) == ["port", "tls", NODE]


def test_another_ca_is_found(site: SiteUnderCheck, tmp_path: Path) -> None:
    provisioned(tmp_path / "others")
    with door(site, folder=tmp_path / "others" / "coordinator"):
        found = look(site)
    says(found["tls"][0], "FAIL", "does not verify", "compare the CA's fingerprint")
    assert levels(found)["port"] == "PASS" and levels(found)[CLOCK] == "WARN"


def test_a_certificate_for_another_name_is_found(tmp_path: Path) -> None:
    site = make_site(tmp_path, free_ports(1)[0], host="127.0.0.2")
    key = new_node_key()
    with opened(site.out, _federation(site)) as consortium:
        other = issue_server_certificate(consortium.authority, key.public_key(), ("elsewhere.example.org",), days=9, now=consortium.now)
    folder = tmp_path / "other"
    (folder / "tls").mkdir(parents=True)
    (folder / names.SERVER_CERTIFICATE).write_bytes(certificate_bytes(other))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / names.SERVER_KEY).write_bytes(key.private_bytes(*pem))
    with door(site, folder=folder):
        says(look(site)["tls"][0], "FAIL", "mismatch", "'hosts'")


def _federation(site: SiteUnderCheck):  # type: ignore[no-untyped-def]
    from server.federation_file import FederationFile

    return FederationFile.load(site.coordinator / names.FEDERATION)


def test_what_speaks_no_tls_or_is_no_front_door_is_found(site: SiteUnderCheck) -> None:
    with door(site, plain=True):
        says(look(site)["tls"][0], "FAIL", "no TLS there", "port")
    for other in (b"<html>", b"[]", b'{"status": 1, "wardround": 2}'):
        with door(site, other):
            says(look(site)["tls"][0], "FAIL", "another server", "kit.json")
    with door(site, Told(status="starting")):
        [secure, starting] = look(site)["tls"]
        says(secure, "PASS", "TLSv1", "")
        says(starting, "WARN", "not up yet", "wait")


def test_a_name_without_an_address_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path, 9, host="nowhere.example.org")

    def unknown(*arguments: object, **options: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = look(site)
    says(found["name"][0], "FAIL", "nowhere.example.org: no address", "network people")
    assert levels(found)["tls"] == "FAIL"


@pytest.mark.parametrize(
    ("ahead", "level", "what"),
    [(timedelta(minutes=10), "FAIL", "10 minutes behind"), (timedelta(minutes=-7), "FAIL", "7 minutes ahead of"),
     (timedelta(minutes=2), "WARN", "120 s behind"), (timedelta(seconds=3), "PASS", "within 3.0 s"), (None, "WARN", "does not tell its time")],
)  # fmt: skip
def test_a_clock_that_is_off_is_said_first(site: SiteUnderCheck, ahead: timedelta | None, level: str, what: str) -> None:
    with door(site, Told(ahead=ahead)):
        found = look(site)
    says(found[CLOCK][0], level, what, "" if level == "PASS" else "timedatectl" if ahead is not None else "same version")
    assert len(found[CLOCK]) == 1 and (next(iter(found)) == CLOCK) == (level == "FAIL")
    assert exit_code_of(everything(found)) == (4 if level == "FAIL" else 0)


@pytest.mark.slow
def test_an_expired_kit_and_certificate_are_told_and_the_clock_is_compared_all_the_same(tmp_path: Path) -> None:
    site = make_site(tmp_path, free_ports(1)[0], now=datetime.now(UTC) - timedelta(days=400))
    with door(site):
        found = look(site)
    says(found["kit"][0], "FAIL", "expired", "wardround renew")
    assert [finding.what.split(" expired")[0] for finding in found["certificates"]] == ["kit", "coordinator's certificate"]
    says(found["tls"][0], "FAIL", "certificate has expired", "timedatectl")
    assert levels(found)[CLOCK] == "PASS"


def test_what_ends_soon_is_a_warning_and_what_begins_later_a_failure(tmp_path: Path) -> None:
    site = make_site(tmp_path, free_ports(1)[0], server_days=20)
    manifest = names.read_manifest(site.kit)
    with door(site):
        health = reaching.ask_health(reaching.Coordinator.of(manifest, site.kit))
    [soon] = reaching.certificates(manifest, site.kit, health)
    says(soon, "WARN", "coordinator's certificate expires on", "wardround renew")
    early = datetime.now(UTC) - timedelta(days=2)
    early_findings = list(reaching.certificates(manifest, site.kit, health, now=early))
    assert [finding.what.split(" is valid")[0] for finding in early_findings if finding.level == "FAIL"] == ["CA", "coordinator's certificate"]
    assert "PASS" not in [finding.level for finding in early_findings]


def test_another_version_is_named_with_ours(site: SiteUnderCheck) -> None:
    with door(site, Told(version="9.8.7")):
        found = look(site)
    says(found["version"][0], "FAIL", f"9.8.7 at the coordinator and {installed_version()} here", "same version")
    assert exit_code_of(everything(found)) == 3


def test_a_proxy_is_used_said_and_found_where_it_is_shut(site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    [shut] = free_ports(1)
    with door(site), _connecting_proxy() as (port, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://someone:hunter2@127.0.0.1:{port}")
        found = look(site)
        assert asked and set(asked) == {f"localhost:{site.port}"}
        says(found["proxy"][0], "PASS", f"through 127.0.0.1:{port}", "")
        assert levels(found)["tls"] == levels(found)["version"] == "PASS"
        assert not any("hunter2" in finding.what + finding.fix for finding in everything(found))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{shut}")
        found = look(site)
        says(found["proxy"][0], "FAIL", f"127.0.0.1:{shut}", f"CONNECT localhost:{site.port}")
        assert levels(found)["port"] == levels(found)["tls"] == "FAIL"
        monkeypatch.setenv("NO_PROXY", "localhost")
        assert levels(look(site))["proxy"] == levels(look(site))["tls"] == "PASS"


@contextlib.contextmanager
def _connecting_proxy() -> Iterator[tuple[int, list[str]]]:
    """A proxy that passes CONNECT on, and what it was asked for."""
    asked: list[str] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            target = head.split()[1].decode()
            asked.append(target)
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=copy, args=(upstream, client))
                back.start()
                copy(client, upstream)
                back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listening.getsockname()[1], asked
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


# The kit, and what the hospital has -------------------------------------------------------------------------------------------------


def _alter_kit(site: SiteUnderCheck) -> None:
    (site.kit / "README.txt").write_text("altered")


def _open_key(site: SiteUnderCheck) -> None:
    (site.kit / names.NODE_KEY).chmod(0o644)


def _open_state(site: SiteUnderCheck) -> None:
    site.state.chmod(0o755)


def _no_cohort(site: SiteUnderCheck) -> None:
    (site.out.parent / "processed.va.data").unlink()


def _other_cohort(site: SiteUnderCheck) -> None:
    (site.out.parent / "processed.va.data").write_text("age,sex\n1,2\n")


def _small_cohort(site: SiteUnderCheck) -> None:
    (site.out.parent / "processed.va.data").write_text(heart_rows(60))


def _ledger(site: SiteUnderCheck, key: Ed25519PrivateKey | None = None) -> Path:
    file = SiteFile.load(site.kit / names.SITE_FILE)
    path = file.ledger_path(site.kit / names.SITE_FILE)
    signer = key or signing_key(site_key(site.state))
    Ledger(path, cohort=file.name, unit="patient", limit=file.policy.limit, signer=signer).close()
    return path


def _damage_ledger(site: SiteUnderCheck) -> None:
    with contextlib.closing(sqlite3.connect(_ledger(site))) as database, database:
        database.execute("UPDATE entry SET body = replace(body, '10.0', '99.0')")


def _foreign_ledger(site: SiteUnderCheck) -> None:
    site_key(site.state)
    _ledger(site, Ed25519PrivateKey.generate())


def _lose_ledger(site: SiteUnderCheck) -> None:
    _ledger(site).unlink()


def _rename_cohort(site: SiteUnderCheck) -> None:
    path = _ledger(site)
    path.rename(path.with_name("former.sqlite"))
    path.with_suffix(".begun").unlink()


def _edit_audit(site: SiteUnderCheck) -> None:
    log = AuditLog(site.state / "audit.jsonl", owner=SITE, role="site", signer=load_signing_key(site.kit / names.SIGNING_KEY))
    log.append("answer sent", {"round": 1})
    log.path.write_text(log.path.read_text().replace('"round":1', '"round":2'))


def _state_is_a_file(site: SiteUnderCheck) -> None:
    site.change('state = "state"', 'state = "request.json/state"')


def _approved(site: SiteUnderCheck, *, until: timedelta = timedelta(days=1)) -> Path:
    study = Study.from_table({"name": "asked", "task": "heart-disease", "privacy": {"epsilon": 1.0, "delta": 1e-4}})
    file = SiteFile.load(site.kit / names.SITE_FILE)
    approvals = Approvals(site.state, load_signing_key(site.kit / names.SIGNING_KEY))
    asked = what_is_asked(study, resolve_task(study.task), file)
    approvals.approve(asked, by="me", expires=datetime.now(UTC) + until)
    return site.state / "approvals" / f"{asked.study_hash}.json"


def _alter_approval(site: SiteUnderCheck) -> None:
    path = _approved(site)
    table = json.loads(path.read_text())
    table["expires"] = "2099-01-01T00:00:00Z"
    path.write_text(json.dumps(table))


def _damage_approval(site: SiteUnderCheck) -> None:
    _approved(site).write_text("{")


def _expire_approval(site: SiteUnderCheck) -> None:
    _approved(site, until=timedelta(seconds=-1))


def _change(old: str, new: str) -> Callable[[SiteUnderCheck], None]:
    return lambda site: site.change(old, new)


METRICS = 'allowed_metrics = ["auroc"'
CASES: dict[str, tuple[Callable[[SiteUnderCheck], None], str, str, str, str, int]] = {
    "altered kit": (_alter_kit, "kit", "FAIL", "README.txt: its SHA-256", "ask the coordinator", 4),
    "open key": (_open_key, "permissions", "FAIL", "node.key may be read by others (mode 0644)", "chmod 600", 1),
    "open state": (_open_state, "permissions", "FAIL", "state may be read by others", "chmod 700", 1),
    "missing cohort": (_no_cohort, COHORT, "FAIL", "processed.va.data", "", 5),
    "other cohort": (_other_cohort, COHORT, "FAIL", "processed.va.data", "", 5),
    "small cohort": (_small_cohort, COHORT, "WARN", "60 patients", "declared_size", 0),
    "damaged ledger": (_damage_ledger, "ledger", "FAIL", "row 1: its hash", "ledger repair", 1),
    "foreign ledger": (_foreign_ledger, "ledger", "FAIL", "signed with this site's key", "restore", 1),
    "lost ledger": (_lose_ledger, "ledger", "FAIL", "lost", "ledger repair", 1),
    "renamed cohort": (_rename_cohort, "ledger", "WARN", "ledgers of former", "former name", 0),
    "edited audit log": (_edit_audit, "audit log", "FAIL", "line 2", "evidence", 1),
    "no state folder": (_state_is_a_file, "state", "FAIL", "could not write to the state folder", "site.toml", 1),
    "altered approval": (_alter_approval, "approvals", "FAIL", "signed with this site's key", "", 6),
    "damaged approval": (_damage_approval, "approvals", "FAIL", "damaged", "approve the study again", 1),
    "expired approval": (_expire_approval, "approvals", "WARN", "expired", "withdraw", 0),
    "too few patients": (_change("min_patients = 20", "min_patients = 500"), "policy", "FAIL", "every study is refused", "lower it", 3),
    "huge budget": (_change("max_epsilon = 10.0", "max_epsilon = 50.0"), "policy", "WARN", "max_epsilon = 50", "lower it", 0),
    "large delta": (_change("max_delta = 0.0001", "max_delta = 0.01"), "policy", "WARN", "max_delta = 0.01", "set it below", 0),
    "no privacy": (_change("allow_no_privacy = false", "allow_no_privacy = true"), "policy", "WARN", "without any noise", "false", 0),
    "unknown metric": (_change(METRICS, f'{METRICS}, "aurok"'), "policy", "WARN", "(did you mean 'auroc'?)", "known: ", 0),
    "few test patients": (_change("declared_test_size = 48", "declared_test_size = 4"), "policy", "WARN", "no metric leaves", "declare", 0),
    "bad key": (_change("min_patients = 20", "min_patient = 20"), "site.toml", "FAIL", "min_patient", "correct", 3),
    "other name": (_change(f'name = "{SITE}"', 'name = "south"'), "site.toml", "FAIL", f"expected '{SITE}'", "correct this key", 3),
    "unknown task": (_change('["heart-disease"]', '["heart-diseases"]'), COHORT, "FAIL", "did you mean 'heart-disease'?", "known", 3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_at_the_site_is_named_with_its_fix(site: SiteUnderCheck, case: str) -> None:
    make, name, level, what, fix, exit_code = CASES[case]
    make(site)
    with door(site):
        found = look(site)
    wrong = [finding for finding in found[name] if finding.level == level]
    assert wrong, found[name]
    says(wrong[0], level, what, fix)
    assert exit_code_of(everything(found)) == exit_code
    assert {"telemetry", "training", "confinement"} <= set(found)
    assert (name in why_not_healthy(everything(found))) == (level == "FAIL")


def test_a_sound_ledger_log_and_approval_pass(site: SiteUnderCheck) -> None:
    _ledger(site)
    _approved(site)
    AuditLog(site.state / "audit.jsonl", owner=SITE, role="site", signer=load_signing_key(site.kit / names.SIGNING_KEY))
    with door(site):
        found = look(site)
    says(found["ledger"][0], "PASS", "rows verify, every one signed by this site", "")
    says(found["audit log"][0], "PASS", "1 rows verify", "")
    says(found["approvals"][0], "PASS", "1 studies approved", "")


def test_advance_approvals_without_effect_are_told(site: SiteUnderCheck) -> None:
    path = site.kit / names.SITE_FILE
    path.write_text(path.read_text() + '\n[approve_in_advance]\ntasks = ["breast-cancer"]\nmax_epsilon = 1\nuntil = 2020-01-01\n')
    told = " ".join(finding.what for finding in look(site)["policy"] if finding.level == "WARN")
    assert "approve_in_advance ended on 2020-01-01" in told and "names breast-cancer, which allowed_tasks does not" in told


def test_a_kit_that_was_not_taken_up_or_is_the_coordinators_is_said_to_be(site: SiteUnderCheck) -> None:
    (site.kit / names.SITE_FILE).unlink()
    found = look(site)
    says(found["kit"][1], "FAIL", "not taken up", "wardround site init")
    assert found[COHORT][0].what == "not looked at: site.toml cannot be used" and COHORT not in why_not_healthy(everything(found))
    says(next(finding for finding in check_site(site.coordinator) if finding.check == "kit"), "FAIL", "got the coordinator's", "wardround doctor")


# The machine --------------------------------------------------------------------------------------------------------------------


def test_confinement_is_needed_unless_the_policy_accepts_that_there_is_none(site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "reachable_services", lambda: ())
    monkeypatch.setattr(checks, "describe_confinement", lambda user: "none")
    says(look(site)["confinement"][0], "FAIL", "nothing confines the courier", "courier-user.sh")
    site.change("allow_no_privacy = false", "accept_unconfined_courier = true")
    says(look(site)["confinement"][0], "WARN", "accept_unconfined_courier", "Landlock")
    monkeypatch.setattr(checks, "describe_confinement", lambda user: "user+landlock")
    monkeypatch.setattr(checks, "reachable_services", lambda: (Path("/run/docker.sock"),))
    [fine, service] = look(site)["confinement"]
    says(fine, "PASS", "user+landlock", "")
    says(service, "WARN", "/run/docker.sock", "a user without it")


def test_another_user_alone_is_no_wall_before_a_cohort_that_all_may_read(
    site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "describe_confinement", lambda user: "user")
    monkeypatch.setattr(checks, "reachable_services", lambda: ())
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, which nobody else may enter
        Path(folder).chmod(0o755)
        data = Path(folder) / "processed.va.data"
        data.write_text(heart_rows(160))
        data.chmod(0o644)
        site.change(str(tmp_path / "processed.va.data"), str(data))
        says(look(site)["confinement"][0], "FAIL", str(data), f"chmod o-rwx {data}")
        data.chmod(0o640)
        assert levels(look(site))["confinement"] == "PASS"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "level"), [(10**8, "FAIL"), (10**9, "WARN"), (10**10, "PASS")])
def test_a_full_disk_is_found(site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    says(next(finding for finding in check_machine(site.kit) if finding.check == "disk"), level, f"{free / 1e9:.1f} GB free", "")


def test_a_state_that_ends_with_the_machine_is_a_warning(site: SiteUnderCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "file_system_of", lambda path: "tmpfs")
    says(look(site)["state"][0], "WARN", "on tmpfs", "volume")


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    assert file_system_of(Path("/proc/self")) == "proc"


def test_what_is_installed_wrongly_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "LEAST_PYTHON", (9, 0))
    monkeypatch.setattr(checks, "PACKAGES", ("flwr", "nowhere_to_be_found"))
    monkeypatch.setattr(checks, "FLOWER", "0.9.")
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    found: Found = {}
    for finding in check_machine(tmp_path):
        found.setdefault(finding.check, []).append(finding)
    says(found["python"][0], "FAIL", "expected Python 9.0 or newer", "newer Python")
    says(found["packages"][0], "FAIL", "nowhere_to_be_found cannot be imported", "pip install")
    says(found["packages"][1], "FAIL", "expected flwr 0.9.x, got 1.41", "pip install 'flwr==0.9.*'")
    says(found["telemetry"][0], "FAIL", "FLWR_TELEMETRY_ENABLED", "wardround")


def test_a_training_step_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("client.private_training.train_round_private", lambda *arguments, **options: 1)
    says(next(finding for finding in check_machine(tmp_path) if finding.check == "training"), "FAIL", "left the model unchanged", "reinstall")


def test_a_check_that_breaks_is_a_failure_and_hides_no_other() -> None:
    def breaks() -> Iterator[Finding]:
        yield passed("so far")
        raise RuntimeError("a patient's name")

    found = list(run_checks([("one", breaks), ("two", lambda: [failed("bad", "mend", exit_code=5)])]))
    assert [(finding.check, finding.level) for finding in found] == [("one", "PASS"), ("one", "FAIL"), ("two", "FAIL")]
    assert "patient" not in found[1].what and isinstance(found[1].cause, RuntimeError) and exit_code_of(found) == 1
