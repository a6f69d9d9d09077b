"""The audit log: whatever is edited, cut, swapped or put back is found by line; a killed process or a full disk leaves a log that goes on."""

import doctest
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import assume, given
from hypothesis import strategies as st

import shared.audit
import shared.files
from shared.audit import (
    AuditLog,
    AuditRow,
    mark_path,
    mark_statement,
    read_begun,
    row_hash,
    row_statement,
    verified_rows,
    verify_audit,
    witnessed_heads,
)
from shared.errors import AuditError, DataMissingError, StorageError

ROOT = Path(__file__).parents[2]
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
KEY = SIGNER.public_key().public_bytes_raw().hex()
NUM_ROWS = 8

BEGIN = """
import os, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shared.audit import AuditLog
from shared.errors import StorageError
path, signer = Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes(32))
"""

ENDLESS = (
    BEGIN
    + """
log, number = AuditLog(path, owner="north", role="site", signer=signer), 0
while True:
    print(log.append("update sent", {"number": number, "padding": ["x" * 500] * 20}), flush=True)
    number += 1
"""
)

TWO_HUNDRED = (
    BEGIN
    + """
print("ready", flush=True)
sys.stdin.readline()
log = AuditLog(path, owner="north", role="site", signer=signer)
for number in range(200):
    log.append("asked", {"process": sys.argv[2], "number": number})
"""
)

FULL_DISK = (
    BEGIN
    + """
import resource
log = AuditLog(path, owner="north", role="site", signer=signer)
log.append("asked", {"round": 1})
before = path.read_bytes(), log.head, log.num_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) + 300, resource.RLIM_INFINITY))
try:
    log.append("asked", {"padding": ["y" * 500] * 20})
except StorageError as error:
    print(error)
assert (path.read_bytes(), log.head, log.num_rows) == before
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("asked", {"round": 2})
"""
)


def open_log(path: Path, *, signer: Ed25519PrivateKey = SIGNER, owner: str = "north") -> AuditLog:
    return AuditLog(path, owner=owner, role="site", signer=signer)


def written(path: Path) -> list[bytes]:
    """The lines of a new log of `NUM_ROWS` rows at `path`."""
    log = open_log(path)
    for number in range(1, NUM_ROWS):
        log.append("update sent", {"round": number, "shapes": [(3, 4), (4,)], "bytes": 64, "epsilon": 0.25, "study_hash": "ab" * 32})
    return path.read_bytes().splitlines(keepends=True)


def table_of(line: bytes) -> dict[str, Any]:
    return dict(json.loads(line))


def line_of(table: dict[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def signed(table: dict[str, Any], signer: Ed25519PrivateKey) -> dict[str, Any]:
    """The row hashed and signed anew, as a forger would."""
    digest = row_hash(sequence=table["sequence"], moment=table["time"], event=table["event"], details=table["details"], previous=table["previous"])
    return table | {"hash": digest, "signature": signer.sign(row_statement(digest)).hex()}


def found(path: Path) -> str:
    """What `verify_audit` says is wrong; opening says nothing else than our own errors."""
    with pytest.raises(AuditError) as caught:
        verify_audit(path)
    assert caught.value.code == "E106"
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


def test_example_of_the_docstring() -> None:
    assert doctest.testmod(shared.audit).failed == 0


def test_a_log_verifies_and_says_whose_it_is(path: Path) -> None:
    lines = written(path)
    summary = verify_audit(path, public_key=KEY)
    assert (summary.num_rows, summary.owner, summary.role, summary.public_key) == (NUM_ROWS, "north", "site", KEY)
    rows = list(verified_rows(path))
    assert [row.line() for row in rows] == lines
    assert (summary.head, summary.first_time, summary.last_time) == (rows[-1].hash, rows[0].time, rows[-1].time)
    assert rows[0].event == "begun" and rows[0].details == {"owner": "north", "role": "site", "public_key": KEY, "format": 1}
    again = open_log(path)
    assert (again.head, again.num_rows) == (summary.head, NUM_ROWS)
    assert all(again.holds(row.hash) for row in rows)
    assert not again.holds("0" * 64) and not again.holds(SIGNER.public_key().public_bytes_raw().hex())
    assert path.read_bytes() == b"".join(lines)


def test_hashes_and_signatures_are_those_of_an_independent_computation(path: Path) -> None:
    previous = "0" * 64
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY))
    for number, line in enumerate(written(path), 1):
        row = table_of(line)
        said = json.dumps([number, row["time"], row["event"], row["details"], previous], sort_keys=True, separators=(",", ":"))
        assert row["hash"] == hashlib.sha256(said.encode()).hexdigest() and row["previous"] == previous
        key.verify(bytes.fromhex(row["signature"]), b"wardround: the audit log has a row with hash " + row["hash"].encode())
        previous = row["hash"]
    mark = json.loads(mark_path(path).read_text())
    assert (mark["sequence"], mark["hash"]) == (NUM_ROWS, previous)
    key.verify(bytes.fromhex(mark["signature"]), mark_statement(NUM_ROWS, previous))


# Tampering ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(data=st.data())
def test_any_changed_byte_of_any_line_is_found_in_that_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("edit") / "audit.jsonl"
    lines = written(path)
    number = data.draw(st.integers(1, NUM_ROWS))
    line = bytearray(lines[number - 1])
    at, byte = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 255))
    assume(line[at] != byte)
    line[at] = byte
    path.write_bytes(b"".join([*lines[: number - 1], bytes(line), *lines[number:]]))
    assert f"line {number}: " in found(path)


@pytest.mark.slow
@given(data=st.data())
def test_any_field_changed_is_found_in_that_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Canonical lines with another value; with and without a hash that fits, signed by a stranger."""
    path = tmp_path_factory.mktemp("field") / "audit.jsonl"
    lines = written(path)
    number = data.draw(st.integers(1, NUM_ROWS))
    row = table_of(lines[number - 1])
    field = data.draw(st.sampled_from(["sequence", "time", "event", "details", "previous", "hash", "signature", "more"]))
    texts = st.text(max_size=20) | st.from_regex("[0-9a-f]{64}", fullmatch=True) | st.just("2026-01-01T00:00:00.000+00:00")
    value = data.draw(
        st.one_of(texts, st.integers(-2, 2**70), st.booleans(), st.none(), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
    )
    assume(row.get(field) != value)
    changed = row | {field: value}
    if field not in ("hash", "signature", "more") and data.draw(st.booleans()):
        changed = signed(changed, STRANGER)
    path.write_bytes(b"".join([*lines[: number - 1], line_of(changed), *lines[number:]]))
    assert f"line {number}: " in found(path)


@pytest.mark.slow
@given(data=st.data())
def test_any_deletion_swap_copy_or_cut_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("order") / "audit.jsonl"
    lines = written(path)
    how = data.draw(st.sampled_from(["delete", "swap", "copy", "cut lines", "cut bytes"]))
    one, two = sorted(data.draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=2, max_size=2, unique=True)))
    match how:
        case "delete":
            changed, line = b"".join(lines[:one] + lines[one + 1 :]), one + 1
        case "swap":
            changed, line = b"".join([*lines[:one], lines[two], *lines[one + 1 : two], lines[one], *lines[two + 1 :]]), one + 1
        case "copy":
            changed, line = b"".join([*lines[:two], lines[one], *lines[two:]]), two + 1
        case "cut lines":
            changed, line = b"".join(lines[:two]), two + 1
        case _:
            whole = b"".join(lines)
            size = data.draw(st.integers(0, len(whole) - 1))
            changed = whole[:size]
            line = changed.count(b"\n") + 1
    path.write_bytes(changed)
    assert f"line {line}: " in found(path)
    if how in ("cut lines", "cut bytes"):  # opening finds what is wrong at the end, and leaves the evidence as it is
        with pytest.raises(AuditError, match=f"line {line}: "):
            open_log(path)
        assert path.read_bytes() == changed


@given(kept=st.integers(1, NUM_ROWS - 1))
def test_log_and_mark_put_back_together_are_found_by_the_other_sides_memory(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    path = tmp_path_factory.mktemp("back") / "audit.jsonl"
    log = open_log(path)
    while log.num_rows < kept:
        log.append("asked", {"round": log.num_rows})
    old, old_mark = path.read_bytes(), mark_path(path).read_bytes()
    early = log.head
    late = log.append("asked", {"round": log.num_rows})
    assert verify_audit(path, witnessed=[early, late]).num_rows == kept + 1
    path.write_bytes(old)
    assert f"line {kept + 1}: it is missing" in found(path)
    mark_path(path).write_bytes(old_mark)
    assert verify_audit(path, public_key=KEY, witnessed=[early]).num_rows == kept  # in itself it verifies
    with pytest.raises(AuditError, match=f"expected the row {late} that the coordinator saw, got {kept} rows without it"):
        verify_audit(path, witnessed={"the coordinator": late})
    stale = open_log(path)
    assert stale.holds(early) and not stale.holds(late)
    with pytest.raises(AuditError, match=r"line .*put back to an earlier state"):
        log.append("asked", {"round": 0})  # a process that has it open notices by itself


def test_an_owner_who_writes_it_all_anew_is_found_by_memory_alone(tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    seen = verify_audit(tmp_path / "audit.jsonl").head
    written(tmp_path / "new.jsonl")
    assert verify_audit(tmp_path / "new.jsonl", public_key=KEY).num_rows == NUM_ROWS
    with pytest.raises(AuditError, match="written anew"):
        verify_audit(tmp_path / "new.jsonl", public_key=KEY, witnessed=[seen])


@pytest.mark.parametrize("how", ["spaces", "order", "twice", "escapes"])
def test_a_line_that_says_the_same_in_another_form_is_found(path: Path, how: str) -> None:
    lines = written(path)
    table = table_of(lines[3])
    other = {
        "spaces": json.dumps(table, sort_keys=True),
        "order": json.dumps(dict(reversed(table.items())), separators=(",", ":")),
        "twice": lines[3].decode().strip().replace('"event":', '"event":"","event":'),
        "escapes": lines[3].decode().strip().replace("update", "\\u0075pdate"),
    }[how]
    assert json.loads(other) == table
    path.write_bytes(b"".join([*lines[:3], other.encode() + b"\n", *lines[4:]]))
    assert "line 4: it is not a row as it was written" in found(path)


def test_rows_of_two_histories_of_one_owner_make_no_third(path: Path, tmp_path: Path) -> None:
    """Every line is the owner's and in order; only the chain shows that they do not belong together."""
    ours, theirs = written(path), written(tmp_path / "other.jsonl")
    path.write_bytes(b"".join(ours[:4] + theirs[4:]))
    assert "line 5: it does not follow the line before" in found(path)


def test_another_row_of_the_marked_number_is_found(path: Path) -> None:
    """Log and mark were put back, another row was written, and the newer mark was restored."""
    written(path)
    old, old_mark = path.read_bytes(), mark_path(path).read_bytes()
    open_log(path).append("asked", {"round": 9})
    new_mark = mark_path(path).read_bytes()
    path.write_bytes(old)
    mark_path(path).write_bytes(old_mark)
    open_log(path).append("asked", {"round": 10})
    mark_path(path).write_bytes(new_mark)
    assert f"line {NUM_ROWS + 1}: it is not the one that was marked" in found(path)
    with pytest.raises(AuditError, match="it is not the one that was marked"):
        open_log(path)


def test_a_foreign_key_is_found(path: Path, tmp_path: Path) -> None:
    lines = written(path)
    forged, previous = [], "0" * 64
    for line in lines:
        row = table_of(line) | {"previous": previous}
        if row["event"] == "begun":
            row["details"]["public_key"] = STRANGER.public_key().public_bytes_raw().hex()
        forged.append(signed(row, STRANGER))
        previous = forged[-1]["hash"]
    path.write_bytes(b"".join(map(line_of, forged)))
    assert "expected a mark signed by the log's owner" in found(path)
    signature = STRANGER.sign(mark_statement(NUM_ROWS, previous)).hex()
    mark_path(path).write_text(json.dumps({"sequence": NUM_ROWS, "hash": previous, "signature": signature}))
    assert verify_audit(path).num_rows == NUM_ROWS  # consistent in itself
    with pytest.raises(AuditError, match="line 1: expected a log signed with key"):
        verify_audit(path, public_key=KEY)
    with pytest.raises(AuditError):
        open_log(path)


def test_another_sites_log_is_not_continued(path: Path) -> None:
    before = written(path)
    with pytest.raises(AuditError, match=r"line 1: expected the audit log of site 'south' with key .*, got that of site 'north'"):
        open_log(path, owner="south")
    mark_path(path).unlink()
    with pytest.raises(AuditError, match="line 1: expected the audit log of site 'south'"):
        open_log(path, owner="south")
    assert path.read_bytes().splitlines(keepends=True) == before


@pytest.mark.parametrize("change", ["edited", "junk", "gone", "with an unfinished line"])
def test_the_mark_is_guarded_as_well(path: Path, change: str) -> None:
    written(path)
    mark = json.loads(mark_path(path).read_text())
    match change:
        case "edited":
            mark_path(path).write_text(json.dumps(mark | {"sequence": 3}))
        case "junk":
            mark_path(path).write_bytes(b"\xff\x00")
        case _:
            mark_path(path).unlink()
    if change.startswith("with"):
        path.write_bytes(path.read_bytes()[:-10])
    before = path.read_bytes()
    for act in (lambda: verify_audit(path), lambda: open_log(path), lambda: open_log(path)):
        with pytest.raises(AuditError, match="mark|not finished"):
            act()
    assert path.read_bytes() == before


def test_a_log_that_is_lost_is_missed(path: Path) -> None:
    with pytest.raises(DataMissingError, match="expected an audit log, found none"):
        verify_audit(path)
    log = open_log(path)
    path.unlink()
    for act in (lambda: verify_audit(path), lambda: log.append("asked", {}), lambda: log.holds(log.head)):
        with pytest.raises(AuditError, match=r"line 1: .*it was lost"):
            act()
    with pytest.raises(AuditError, match="line 1: it is missing"):
        open_log(path)


@pytest.mark.parametrize("content", [b"", b"no log", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n", b'{"details":{}}\n'])
def test_another_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert "line 1: " in found(path)
    if content:
        with pytest.raises(AuditError, match="line 1: "):
            open_log(path)
        assert path.read_bytes() == content


def test_order_is_by_sequence_and_not_by_the_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime.now()

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # a clock that somebody sets back
            nonlocal moment
            moment -= timedelta(days=1)
            return moment.replace(tzinfo=tz)

    monkeypatch.setattr(shared.audit, "datetime", Backwards)
    written(path)
    times = [row.time for row in verified_rows(path)]
    assert times == sorted(times, reverse=True) and len(set(times)) == NUM_ROWS


def test_heads_of_the_other_party_are_read_by_site(path: Path) -> None:
    log = open_log(path)
    heads = [character * 64 for character in "abc"]
    for site, head in zip(["north", "south", "north"], heads, strict=True):
        log.append("update received", {"site": site, "audit_head": head})
    log.append("update received", {"site": "north", "audit_head": heads[2]})
    log.append("update received", {"site": "north"})
    assert witnessed_heads(path, site="north") == [heads[0], heads[2]]
    assert witnessed_heads(path, site=None) == heads
    assert read_begun(path).owner == "north"
    with pytest.raises(AuditError):
        read_begun(path, public_key="0" * 64)


# What a row may hold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), b"x", object(), {1: 2}, {"a": {"b": [float("-inf")]}}, "x" * 501, 2**63, {"x" * 501: 1}]
)
def test_details_hold_nothing_but_short_plain_values(path: Path, value: Any) -> None:
    log = open_log(path)
    before = path.read_bytes()
    with pytest.raises(AssertionError, match="an audit row holds") as caught:
        log.append("asked", {"key": value})
    assert "xxx" not in str(caught.value)  # whatever it was, the message does not repeat it
    assert path.read_bytes() == before


@pytest.mark.parametrize("event", ["", " asked", "a\nb", "begun", "recovered", "x" * 101])
def test_events_are_a_few_words(path: Path, event: str) -> None:
    with pytest.raises(AssertionError, match="an audit event"):
        open_log(path).append(event, {})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(details=st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_whatever_may_be_written_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, details: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("details") / "audit.jsonl"
    head = open_log(path).append("asked", details)
    last = list(verified_rows(path))[-1]
    assert (last.details, last.hash) == (details, head)
    assert AuditRow.of(last.line()) == last


# Crashes, full disks, several writers -------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(cut=st.integers(1, 400), marked=st.booleans())
def test_an_unfinished_line_is_cut_off_and_the_cut_recorded(tmp_path_factory: pytest.TempPathFactory, cut: int, marked: bool) -> None:
    """A process was killed while it wrote line n + 1; perhaps, before that, between line n and its mark."""
    path = tmp_path_factory.mktemp("torn") / "audit.jsonl"
    lines = written(path)
    mark = mark_path(path).read_bytes()
    log = open_log(path)
    if not marked:
        log.append("asked", {"round": 9})
        mark_path(path).write_bytes(mark)
    whole = path.read_bytes()
    path.write_bytes(whole + lines[-1][: min(cut, len(lines[-1]) - 1)])
    assert "it is not finished" in found(path)
    recovered = open_log(path)
    rows = list(verified_rows(path))
    assert path.read_bytes().startswith(whole)
    assert len(rows) == recovered.num_rows == NUM_ROWS + (1 if marked else 2)
    assert (rows[-1].event, rows[-1].details) == ("recovered", {"bytes_cut": min(cut, len(lines[-1]) - 1)})
    assert json.loads(mark_path(path).read_text())["sequence"] == len(rows)
    head = log.append("asked", {})  # a process that had it open goes on as well
    assert verify_audit(path).head == head


def test_a_line_whose_blocks_never_reached_the_disk_is_cut_off(path: Path) -> None:
    lines = written(path)
    with path.open("ab") as file:
        file.write(bytes(200) + lines[-1][200:])
    assert open_log(path).num_rows == NUM_ROWS + 1
    assert verify_audit(path).num_rows == NUM_ROWS + 1


@pytest.mark.parametrize("size", [1, 20, 200])
def test_a_log_that_was_hardly_begun_is_begun_again(path: Path, size: int) -> None:
    first = written(path)[0]
    mark_path(path).unlink()
    path.write_bytes(first[:size])
    assert open_log(path).num_rows == 2
    assert [row.event for row in verified_rows(path)] == ["begun", "recovered"]
    path.write_bytes(first)
    mark_path(path).unlink()  # killed between the first line and its mark
    assert verify_audit(path).num_rows == open_log(path).num_rows == 1
    assert mark_path(path).exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_holds_every_row_that_was_answered(path: Path) -> None:
    """A real SIGKILL, at moments set by how much the process has said: it dies somewhere in the row after."""
    answered = []
    for most in (1, 3, 2, 7, 5, 11, 4, 6):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        answered += [process.stdout.readline().strip() for _ in range(most)]
        os.kill(process.pid, signal.SIGKILL)
        answered += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        log = open_log(path)
        summary = verify_audit(path, public_key=KEY, witnessed=answered)
        assert (summary.head, summary.num_rows) == (log.head, log.num_rows) and log.holds(answered[-1])
        assert sorted(file.name for file in path.parent.iterdir()) == ["audit.head", "audit.jsonl"]
    assert len(set(answered)) == len(answered) >= 39


def test_a_full_disk_leaves_the_old_state_and_says_so(path: Path) -> None:
    """A file-size limit makes the kernel refuse the write half way, as a full disk does."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "could not read or append to the audit log: File too large; check free space" in done.stdout
    assert [row.details.get("round") for row in verified_rows(path)] == [None, 1, 2]


@pytest.mark.parametrize("step", ["write", "sync", "mark", "interrupt"])
def test_a_row_that_failed_at_any_step_does_not_stand(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    written(path)
    log = open_log(path)
    before, mark, head = path.read_bytes(), mark_path(path).read_bytes(), log.head
    real_write, calls = os.write, 0

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(file: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        return real_write(file, bytes(data[:100])) if calls == 1 else full()

    def interrupted(file: int, data: bytes) -> int:
        raise KeyboardInterrupt

    target: dict[str, tuple[str, Callable[..., int]]] = {
        "write": ("write", half), "sync": ("fsync", full), "mark": ("replace", full), "interrupt": ("write", interrupted),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(os, *target[step])
        with pytest.raises(KeyboardInterrupt if step == "interrupt" else StorageError):
            log.append("asked", {"padding": "z" * 400})
    assert (path.read_bytes(), mark_path(path).read_bytes(), log.head) == (before, mark, head)
    assert verify_audit(path).head == head
    assert verify_audit(path, witnessed=[log.append("asked", {})]).num_rows == NUM_ROWS + 1


def test_a_row_whose_mark_stands_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename was done and only the sync of the folder failed: taking the row back would look like a rollback."""
    written(path)
    log = open_log(path)

    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shared.files, "_sync_folder", broken)
        with pytest.raises(StorageError):
            log.append("asked", {})
    assert verify_audit(path).num_rows == NUM_ROWS + 1
    log.append("asked", {})
    assert verify_audit(path).num_rows == log.num_rows == NUM_ROWS + 2


def test_a_row_is_on_the_disk_before_it_is_marked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(path)
    inode, happened = path.stat().st_ino, []
    real_sync, real_replace = os.fsync, os.replace

    def sync(file: int) -> None:
        real_sync(file)
        happened.append("row" if os.fstat(file).st_ino == inode else "mark or folder")

    def replace(old: Path, new: Path) -> None:
        real_replace(old, new)
        happened.append("marked")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    log.append("asked", {})
    assert happened == ["row", "mark or folder", "marked", "mark or folder"]


def test_what_a_process_killed_while_it_marked_left_behind_is_removed(path: Path) -> None:
    written(path)
    scrap = path.with_name(f".{mark_path(path).name}.0a1b2c3d")
    scrap.write_text("{")
    open_log(path)
    assert not scrap.exists() and verify_audit(path).num_rows == NUM_ROWS


@pytest.mark.slow
def test_two_processes_make_one_chain(path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_HUNDRED, str(path), name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("daemon", "command")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # both at once, also with beginning it
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert verify_audit(path).num_rows == 401
    rows = list(verified_rows(path))[1:]
    for name in ("daemon", "command"):
        assert [row.details["number"] for row in rows if row.details["process"] == name] == list(range(200))


def test_threads_make_one_chain(path: Path) -> None:
    log = open_log(path)
    heads: list[str] = []
    threads = [threading.Thread(target=lambda: heads.extend([log.append("asked", {}) for _ in range(25)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify_audit(path, witnessed=heads).num_rows == log.num_rows == 101


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StorageError, match="could not make the folder of the audit log"):
        open_log(tmp_path / "state" / "audit.jsonl")


def test_the_details_of_an_event_are_read_back(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", owner="north", role="site", signer=Ed25519PrivateKey.generate())
    for number in range(3):
        log.append("task received", {"nonce": f"{number:x}"})
        log.append("answer sent", {"reason": '"event":"task received"', "event": "task received"})
    assert log.details_of("task received") == [{"nonce": f"{number:x}"} for number in range(3)]
    assert log.details_of("nothing") == []
    content = log.path.read_bytes()
    log.path.write_bytes(content.replace(b'{"nonce":"1"}', b'{"nonce":"1"', 1))
    with pytest.raises(AuditError, match="line 4"):
        log.details_of("task received")
