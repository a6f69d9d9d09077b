"""Rows of an audit log as FHIR R4 AuditEvent resources (hl7.org/fhir/R4/auditevent.html), for a hospital's own audit repository.

An exported event carries its row's hash and signature, so that it can be traced to the signed line; in itself it is not signed. Codes are
those of the value sets that R4 binds: DICOM PS3.16 for the kind of event and the part an agent played, HL7's own for source and entity; our name of
the event stands as subtype under `urn:wardround:audit-event`.
"""

import json
import re
from typing import Literal, TypeAlias

from shared.audit import BEGUN, RECOVERED, AuditRow, Role

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Resource = dict[str, Json]
Direction = Literal["in", "out", "within"]

EVENTS = "urn:wardround:audit-event"
STUDIES = "urn:wardround:study"
ROWS = "urn:wardround:audit-row"
KEYS = "urn:wardround:ed25519"
DICOM = "http://dicom.nema.org/resources/ontology/DCM"
HL7 = "http://terminology.hl7.org/CodeSystem/"

INWARD = frozenset({"received", "came", "asked", "requested"})  # words of an event's name
OUTWARD = frozenset({"sent", "left", "released", "answered"})
OUTCOMES = {"ok": "0", "refused": "4", "failed": "8"}  # success, minor failure (the request was turned away), serious failure


def audit_event(row: AuditRow, *, owner: str, role: Role, public_key: str) -> Resource:
    """The AuditEvent of `row` in the log of this owner; JSON-ready.

    Understood in `details`: `outcome` ("ok", "refused", "failed"; absent is ok), `reason`, `study`, `study_hash`, and the other party: `coordinator`
    in a site's log, `site` in the coordinator's. Everything there goes into `entity.detail` as well.

    Example:
        >>> row = AuditRow(sequence=2, time="2026-01-01T08:00:00.000+00:00", event="update sent", details={"study_hash": "ab", "coordinator": "mercy"},
        ...                previous="0" * 64, hash="1" * 64, signature="2" * 128)
        >>> event = audit_event(row, owner="north", role="site", public_key="3" * 64)
        >>> event["type"]["display"], event["action"], event["outcome"], [agent["name"] for agent in event["agent"]]
        ('Export', 'R', '0', ['north', 'mercy'])
    """
    direction = _direction(row.event)
    event: Resource = {
        "resourceType": "AuditEvent",
        "id": row.hash,
        "type": _type(row.event, direction),
        "subtype": [{"system": EVENTS, "code": row.event}],
        "action": _action(row.event, direction),
        "recorded": row.time,
        "outcome": OUTCOMES.get(str(row.details.get("outcome", "ok")), OUTCOMES["failed"]),
        "agent": _agents(row, direction, owner=owner, role=role, public_key=public_key),
        "source": {"observer": _who(owner, public_key), "type": [_coding(f"{HL7}security-source-type", "4", "Application Server")]},
        "entity": [*_study(row), _log_entry(row)],
    }
    reason = row.details.get("reason")
    return event | ({"outcomeDesc": _text(reason)} if isinstance(reason, str) else {})


def _direction(event: str) -> Direction:
    words = set(re.split(r"[\W_]+", event))
    return "in" if words & INWARD else "out" if words & OUTWARD else "within"


def _type(event: str, direction: Direction) -> Resource:
    if event == RECOVERED:
        return _coding(DICOM, "110113", "Security Alert")
    kinds = {"in": ("110107", "Import"), "out": ("110106", "Export"), "within": ("110100", "Application Activity")}
    return _coding(DICOM, *kinds[direction])


def _action(event: str, direction: Direction) -> str:
    actions = {"in": "C", "out": "R", "within": "E"}  # DICOM PS3.15: an import creates, an export reads
    return {BEGUN: "C", RECOVERED: "U"}.get(event, actions[direction])


def _agents(row: AuditRow, direction: Direction, *, owner: str, role: Role, public_key: str) -> list[Json]:
    """The owner and, where the row names it, the other party. What comes in was asked for by the other party, all else by the owner."""
    source, destination = ("110153", "Source Role ID"), ("110152", "Destination Role ID")
    ours, theirs = {"in": (destination, source), "out": (source, destination), "within": (("110150", "Application"),) * 2}[direction]
    other = row.details.get("coordinator" if role == "site" else "site")
    named = isinstance(other, str) and bool(other.strip())
    agents: list[Json] = [_agent(owner, ours, who=_who(owner, public_key), requestor=not (named and direction == "in"))]
    if named:
        agents.append(_agent(str(other), theirs, who={"display": _text(other)}, requestor=direction == "in"))
    return agents


def _agent(name: str, part: tuple[str, str], *, who: Resource, requestor: bool) -> Resource:
    return {"type": {"coding": [_coding(DICOM, *part)]}, "who": who, "name": _text(name), "requestor": requestor}


def _who(owner: str, public_key: str) -> Resource:
    return {"identifier": {"system": KEYS, "value": public_key}, "display": _text(owner)}


def _study(row: AuditRow) -> list[Json]:
    study_hash, name = row.details.get("study_hash"), row.details.get("study")
    if not isinstance(study_hash, str) or not study_hash.strip():
        return []
    entity: Resource = {
        "what": {"identifier": {"system": STUDIES, "value": _text(study_hash)}},
        "type": _coding(f"{HL7}audit-entity-type", "2", "System Object"),
        "role": _coding(f"{HL7}object-role", "20", "Job"),
    }
    return [entity | ({"name": _text(name)} if isinstance(name, str) else {})]


def _log_entry(row: AuditRow) -> Resource:
    """The signed line, with all it says."""
    proof = {"sequence": row.sequence, "previous": row.previous, "hash": row.hash, "signature": row.signature}
    detail: list[Json] = [{"type": f"row.{key}", "valueString": _text(value)} for key, value in proof.items()]
    detail += [{"type": _text(key), "valueString": _text(value)} for key, value in row.details.items()]
    return {
        "what": {"identifier": {"system": ROWS, "value": row.hash}},
        "type": _coding(f"{HL7}audit-entity-type", "2", "System Object"),
        "role": _coding(f"{HL7}object-role", "13", "Security Resource"),
        "name": f"audit row {row.sequence}",
        "detail": detail,
    }


def _coding(system: str, code: str, display: str) -> Resource:
    return {"system": system, "code": code, "display": display}


def _text(value: object) -> str:
    """A FHIR string, which is not blank and holds no control characters: a plain text as it is, anything else as JSON."""
    if isinstance(value, str) and value.strip() == value and value and value.isprintable():
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
