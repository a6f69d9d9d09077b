"""`wardround audit`: one line a log, exit codes, and exports that verify or are AuditEvents."""

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fhir.resources.R4B.auditevent import AuditEvent

from shared.audit import AuditLog, mark_path, verify_audit
from tests.wardround.conftest import Command

SITE_KEY, COORDINATOR_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32)), Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
PUBLIC = SITE_KEY.public_key().public_bytes_raw().hex()


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    """A site's folder and a coordinator's log; in three rounds each has told the other its head."""
    folder, coordinator = tmp_path / "north", tmp_path / "coordinator.jsonl"
    site_log = AuditLog(folder / "state" / "audit.jsonl", owner="north", role="site", signer=SITE_KEY)
    other_log = AuditLog(coordinator, owner="mercy", role="coordinator", signer=COORDINATOR_KEY)
    for number in range(3):
        asked = other_log.append("task sent", {"site": "north", "round": number})
        left = site_log.append("update sent", {"coordinator": "mercy", "round": number, "audit_head": asked})
        other_log.append("update received", {"site": "north", "round": number, "audit_head": left})
        other_log.append("update received", {"site": "south", "round": number, "audit_head": "f" * 64})
    return folder, coordinator


def test_both_logs_verify_against_each_other(command: Command, logs: tuple[Path, Path]) -> None:
    folder, coordinator = logs
    outcome = command("audit", "verify", folder, "--against", coordinator, "--key", PUBLIC)
    assert outcome.code == 0
    lines = outcome.out.strip().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{folder}/state/audit.jsonl: 4 rows verify, every one signed by site north (key {PUBLIC}); head ")
    assert "10 rows verify, every one signed by coordinator mercy" in lines[1]
    assert "holds all 3 heads that the other log saw" in lines[2]
    data = command("audit", "verify", coordinator, "--against", folder, "--json").data
    assert data["witnessed_heads"] == 3
    assert isinstance(data["logs"], list)
    assert [(log["owner"], log["num_rows"]) for log in data["logs"]] == [("mercy", 10), ("north", 4)]


def test_one_log_says_one_line(command: Command, logs: tuple[Path, Path]) -> None:
    assert len(command("audit", "verify", logs[1]).out.strip().splitlines()) == 1
    assert "witnessed_heads" not in command("audit", "verify", logs[1], "--json").data


def test_a_site_put_back_to_an_earlier_copy_is_found_by_the_coordinators_log(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    folder, coordinator = logs
    shutil.copytree(folder, tmp_path / "copy")
    log = AuditLog(folder / "state" / "audit.jsonl", owner="north", role="site", signer=SITE_KEY)
    other = AuditLog(coordinator, owner="mercy", role="coordinator", signer=COORDINATOR_KEY)
    other.append("update received", {"site": "north", "audit_head": log.append("update sent", {})})
    assert command("audit", "verify", folder, "--against", coordinator).code == 0
    assert command("audit", "verify", tmp_path / "copy").code == 0  # in itself it verifies
    outcome = command("audit", "verify", tmp_path / "copy", "--against", coordinator, "--json")
    assert (outcome.code, outcome.data["code"]) == (1, "E106")
    assert log.head in str(outcome.data["what"])


def test_what_is_wrong_has_its_exit_code(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    folder, coordinator = logs
    assert command("audit", "verify", tmp_path / "none.jsonl").code == 5
    assert command("audit", "verify", tmp_path).code == 5
    assert command("audit", "verify", folder, "--key", "0" * 64).code == 1
    assert command("audit", "verify", folder, "--key", "no key").code == 3
    assert command("audit", "verify", folder, "--against", folder).code == 3
    assert command("audit", "export", folder, "--format", "fhir", "--since", "yesterday").code == 3
    assert command("audit", "export", folder, "--format", "xml").code == 2
    coordinator.write_bytes(coordinator.read_bytes().replace(b"task sent", b"task sort", 1))
    outcome = command("audit", "verify", coordinator)
    assert outcome.code == 1
    assert "line 2: it is not a row as it was written" in outcome.err
    assert command("audit", "verify", folder, "--against", coordinator).code == 1


def test_what_does_not_verify_is_not_exported(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    log = logs[0] / "state" / "audit.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    for form in ("jsonl", "fhir"):
        outcome = command("audit", "export", log, "--format", form, "--out", tmp_path / "out")
        assert (outcome.code, outcome.out) == (1, "")
        assert command("audit", "export", log, "--format", form).out == ""
    assert not (tmp_path / "out").exists()


def test_an_exported_log_verifies_like_the_first(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    log = logs[0] / "state" / "audit.jsonl"
    assert command("audit", "export", logs[0], "--format", "jsonl").out == log.read_text()
    copy = tmp_path / "handed-out.jsonl"
    assert command("audit", "export", logs[0], "--format", "jsonl", "--out", copy).code == 0
    assert verify_audit(copy) == verify_audit(log)
    before = copy.read_bytes()
    assert command("audit", "export", logs[0], "--format", "jsonl", "--out", copy).code == 1  # never over something that is there
    assert command("audit", "export", logs[0], "--format", "fhir", "--out", log).code == 1
    assert command("audit", "export", logs[0], "--format", "jsonl", "--out", log.with_name("audit.log")).code == 1  # its mark would be the log's own
    assert command("audit", "export", logs[0], "--format", "jsonl", "--out", tmp_path / "new.head").code == 3
    assert copy.read_bytes() == before
    assert mark_path(copy).exists()


def test_fhir_export_is_one_audit_event_a_row(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    lines = command("audit", "export", logs[1], "--format", "fhir").out.splitlines()
    rows = [json.loads(line) for line in logs[1].read_text().splitlines()]
    assert [AuditEvent.model_validate_json(line).id for line in lines] == [row["hash"] for row in rows]
    assert command("audit", "export", logs[1], "--format", "fhir", "--out", tmp_path / "events.ndjson").code == 0
    assert (tmp_path / "events.ndjson").read_text().splitlines() == lines


def test_since_leaves_out_what_came_before(command: Command, logs: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in logs[1].read_text().splitlines()]
    moment = rows[5]["time"]
    expected = [row["hash"] for row in rows if row["time"] >= moment]
    for since in (moment, moment.removesuffix("+00:00")):  # without a zone it is UTC
        got = command("audit", "export", logs[1], "--format", "jsonl", "--since", since).out.splitlines()
        assert [json.loads(line)["hash"] for line in got] == expected
    assert command("audit", "export", logs[1], "--format", "jsonl", "--since", "2999-01-01").out == ""
    assert command("audit", "export", logs[1], "--format", "jsonl", "--since", "2000-01-01", "--out", tmp_path / "part.jsonl").code == 0
    assert not mark_path(tmp_path / "part.jsonl").exists()  # a part is no log
