"""Exported rows are AuditEvents by the FHIR definitions, with codes of the value sets that R4 binds, and lead back to their signed lines."""

import doctest
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fhir.resources.R4B.auditevent import AuditEvent
from hypothesis import given
from hypothesis import strategies as st

import shared.fhir
from shared.audit import AuditLog, Role, verified_rows, verify_audit
from shared.fhir import audit_event
from tests.shared.test_audit import values

SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
FHIR_STRING = re.compile(r"[\r\n\t\u0020-\U0010ffff]+")


def exported(path: Path, event: str, details: dict[str, Any], *, role: Role = "site", owner: str = "north") -> dict[str, Any]:
    """The resource of a row that was really written, validated, and as it stands in a file."""
    AuditLog(path, owner=owner, role=role, signer=SIGNER).append(event, details)
    summary = verify_audit(path)
    row = list(verified_rows(path))[-1]
    text = json.dumps(audit_event(row, owner=summary.owner, role=summary.role, public_key=summary.public_key), allow_nan=False)
    resource: dict[str, Any] = json.loads(text)
    checked = AuditEvent.model_validate_json(text)
    assert checked.recorded == datetime.fromisoformat(row.time)
    assert json.loads(checked.model_dump_json(exclude_none=True)).keys() == resource.keys()
    return resource


def test_example_of_the_docstring() -> None:
    assert doctest.testmod(shared.fhir).failed == 0


def test_a_row_becomes_an_event_that_leads_back_to_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    details = {"coordinator": "mercy", "study": "heart", "study_hash": "ab" * 32, "bytes": 4096, "shapes": [[3, 4]], "epsilon": 0.5, "private": True}
    event = exported(path, "update sent", details)
    row = list(verified_rows(path))[-1]
    assert event["subtype"] == [{"system": "urn:wardround:audit-event", "code": "update sent"}]
    assert (event["id"], event["recorded"], event["outcome"], "outcomeDesc" in event) == (row.hash, row.time, "0", False)
    assert event["source"]["observer"]["display"] == "north"
    study, line = event["entity"]
    assert study["what"]["identifier"]["value"] == "ab" * 32 and study["name"] == "heart"
    said = {item["type"]: item["valueString"] for item in line["detail"]}
    assert said == {
        "row.sequence": "2", "row.previous": row.previous, "row.hash": row.hash, "row.signature": row.signature, "coordinator": "mercy",
        "study": "heart", "study_hash": "ab" * 32, "bytes": "4096", "shapes": "[[3,4]]", "epsilon": "0.5", "private": "true",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("role", "event", "details", "code", "action", "requestors"),
    [
        ("site", "task received", {"coordinator": "mercy"}, "110107", "C", {"north": False, "mercy": True}),
        ("site", "task received", {}, "110107", "C", {"north": True}),
        ("site", "update-sent", {"coordinator": "mercy"}, "110106", "R", {"north": True, "mercy": False}),
        ("site", "policy.decided", {"coordinator": "mercy"}, "110100", "E", {"north": True, "mercy": False}),
        ("coordinator", "update received", {"site": "south"}, "110107", "C", {"north": False, "south": True}),
        ("coordinator", "task_sent", {"site": "south"}, "110106", "R", {"north": True, "south": False}),
    ],
)
def test_who_asked_and_which_way_it_went(
    tmp_path: Path, role: Role, event: str, details: dict[str, Any], code: str, action: str, requestors: Any
) -> None:
    resource = exported(tmp_path / "audit.jsonl", event, details, role=role)
    assert (resource["type"]["code"], resource["action"]) == (code, action)
    assert {agent["name"]: agent["requestor"] for agent in resource["agent"]} == requestors
    assert sum(requestors.values()) == 1


@pytest.mark.parametrize(("outcome", "code"), [("ok", "0"), ("refused", "4"), ("failed", "8"), ("something else", "8")])
def test_outcomes(tmp_path: Path, outcome: str, code: str) -> None:
    resource = exported(tmp_path / "audit.jsonl", "study asked", {"outcome": outcome, "reason": "policy.max_epsilon"})
    assert (resource["outcome"], resource["outcomeDesc"]) == (code, "policy.max_epsilon")


def test_the_logs_own_rows_are_events_too(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, owner="mercy", role="coordinator", signer=SIGNER)
    path.write_bytes(path.read_bytes() + b"{")
    log.append("asked", {})
    kinds = []
    for row in verified_rows(path):
        event = audit_event(row, owner="mercy", role="coordinator", public_key="0" * 64)
        AuditEvent.model_validate(event)
        kinds.append((event["type"]["display"], event["action"]))  # type: ignore[index,call-overload]  # a JSON table
    assert kinds == [("Application Activity", "C"), ("Security Alert", "U"), ("Import", "C")]


@pytest.mark.slow
@given(
    details=st.dictionaries(st.text(max_size=8), values, max_size=4),
    known=st.fixed_dictionaries({}, optional=dict.fromkeys(["outcome", "reason", "study", "study_hash", "coordinator"], values)),
    owner=st.text(min_size=1, max_size=30),
)
def test_whatever_a_row_holds_the_event_is_valid(
    tmp_path_factory: pytest.TempPathFactory, details: dict[str, Any], known: dict[str, Any], owner: str
) -> None:
    resource = exported(tmp_path_factory.mktemp("fhir") / "audit.jsonl", "update sent", details | known, owner=owner)

    def check(value: Any) -> None:
        if isinstance(value, dict | list):
            assert value  # FHIR has no empty lists or tables
            for item in value.values() if isinstance(value, dict) else value:
                check(item)
        elif isinstance(value, str):
            assert FHIR_STRING.fullmatch(value) and value == value.strip()

    check(resource)
