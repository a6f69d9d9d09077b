"""`wardround audit verify|export`."""

import dataclasses
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.options import DebugOption, JsonOption

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

LogArgument = Annotated[
    Path, typer.Argument(metavar="LOG|FOLDER", help="An audit log, or the folder of a site or kit: its state/audit.jsonl.", show_default=False)
]
KeyOption = Annotated[
    str | None, typer.Option("--key", metavar="HEX", help="The public key of the log's owner; without it the one in the first line is believed.")
]


@app.command("verify")
def verify(
    path: LogArgument,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="LOG|FOLDER", help="The other party's log: every row that it saw of this one must be here.")
    ] = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every line: hashes, signatures, order, and the mark of the last. A log that does not verify ends with exit code 1."""
    from shared.audit import verify_audit
    from wardround.cli.output import console, print_envelope

    log, public_key = log_of(path), parse_key(key)
    heads: list[str] = []
    found: list[dict[str, object]] = []
    if against is not None:  # before the log itself: what the other party saw by now is in there already
        heads = _heads_seen_by(log_of(against), log, public_key)
        found.append({"log": str(log_of(against)), **dataclasses.asdict(verify_audit(log_of(against)))})
    found.insert(0, {"log": str(log), **dataclasses.asdict(verify_audit(log, public_key=public_key, witnessed=heads))})
    for item in found:
        console(as_json=as_json).print(
            f"{item['log']}: {item['num_rows']} rows verify, every one signed by {item['role']} {item['owner']} (key {item['public_key']}); head {item['head']}",
            markup=False,
            soft_wrap=True,
        )
    if against is not None:
        seen = f"it holds all {len(heads)} heads that the other log saw" if heads else "the other log saw no head of it, and so proves nothing"
        console(as_json=as_json).print(f"{log}: {seen}", markup=False, soft_wrap=True)
    if as_json:
        print_envelope({"logs": found} | ({} if against is None else {"witnessed_heads": len(heads)}))


@app.command("export")
def export(
    path: LogArgument,
    form: Annotated[Literal["jsonl", "fhir"], typer.Option("--format", help="The signed lines, or FHIR R4 AuditEvents, one JSON object a line.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here instead of to stdout.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Rows from this time on, as 2026-01-31 or 2026-01-31T08:00+01:00.")
    ] = None,
    key: KeyOption = None,
    debug: DebugOption = False,
) -> None:
    """Hand out the rows of a log, if it verifies. A whole log written with --format jsonl --out gets its mark beside it, and verifies like the first."""
    from shared.audit import Begun, mark_path, verified_rows
    from shared.errors import ConfigurationError
    from shared.fhir import audit_event
    from shared.files import storage_errors, write_atomic
    from wardround.cli.output import console

    log, public_key, start = log_of(path), parse_key(key), parse_time(since)
    if out is not None and out == mark_path(out):
        raise ConfigurationError(f"--out: expected another ending than {out.suffix}, which is that of a log's mark", "for example .jsonl")
    new_mark = mark_path(out) if out is not None and form == "jsonl" and start is None else None
    for file in (out, new_mark):
        _check_new(file)
    with storage_errors(log, "read the audit log's mark"):  # before the rows: it may know fewer of them, never more
        mark = mark_path(log).read_bytes() if mark_path(log).is_file() else None
    rows = list(verified_rows(log, public_key=public_key))  # all of them, before the first is handed out
    begun = Begun.model_validate(rows[0].details)
    rows = [row for row in rows if start is None or datetime.fromisoformat(row.time) >= start]
    if form == "jsonl":
        text = b"".join(row.line() for row in rows).decode()
    else:
        events = (audit_event(row, owner=begun.owner, role=begun.role, public_key=begun.public_key) for row in rows)
        text = "".join(f"{json.dumps(event, allow_nan=False)}\n" for event in events)
    if out is None:
        sys.stdout.write(text)
        return
    write_atomic(out, text)
    if new_mark is not None and mark is not None:
        write_atomic(new_mark, mark)
    console(as_json=False).print(f"wrote {len(rows)} rows to {out}", markup=False, soft_wrap=True)


def log_of(path: Path) -> Path:
    """The log itself, or that of a site's or kit's folder."""
    return path / "state" / "audit.jsonl" if path.is_dir() else path


def parse_key(text: str | None) -> str | None:
    """The public key in `--key`.

    Raises:
        ConfigurationError: it is none.
    """
    from shared.errors import ConfigurationError

    if text is not None and not re.fullmatch("[0-9a-f]{64}", text):
        raise ConfigurationError(f"--key: expected the 64 hexadecimal digits of a public key, got {text!r}", "ask the log's owner for it")
    return text


def parse_time(text: str | None) -> datetime | None:
    """The moment in `--since`; without a zone it is UTC.

    Raises:
        ConfigurationError: it is none.
    """
    from shared.errors import ConfigurationError

    try:
        moment = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(f"--since: expected a date or time, got {text!r}", "for example 2026-01-31 or 2026-01-31T08:00+01:00") from None
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def _check_new(file: Path | None) -> None:
    from shared.errors import StorageError

    if file is not None and file.exists():
        raise StorageError(f"{file}: exists already, and may be a log or its mark", "give another with --out, or remove it")


def _heads_seen_by(other: Path, log: Path, public_key: str | None) -> list[str]:
    """The heads of `log` that the other party's log holds.

    Raises:
        ConfigurationError: they are not two parties' logs.
    """
    from shared.audit import read_begun, witnessed_heads
    from shared.errors import ConfigurationError

    begun, witness = read_begun(log, public_key=public_key), read_begun(other)
    if begun.role == witness.role:
        raise ConfigurationError(
            f"--against: expected a site's log and a coordinator's, got two of a {begun.role}: {log} and {other}", "give the other party's log"
        )
    return witnessed_heads(other, site=begun.owner if begun.role == "site" else None)
