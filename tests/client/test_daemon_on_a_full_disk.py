"""A daemon, as a process, whose audit log has no room: it does nothing, says so in a fixed sentence, and goes on once there is room."""

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord

from client.door import SOCKET, ask, door_folder
from client.ledger import reading
from shared.errors import StorageError, fixed_sentence
from shared.messages import Content, Enrolled, Refused, Stopped, StopTask, Trained, TrainTask, decode, encode
from shared.models import Parameters
from tests.gated import GatedSite, enrolment, gated, study

pytestmark = pytest.mark.slow
WAIT = 60.0
START = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
runpy.run_module("client.daemon", run_name="__main__", alter_sys=True)
"""
Answer = tuple[Content, bool]


@contextlib.contextmanager
def daemon(site: GatedSite, *, largest: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The site's daemon, no file of which may grow beyond so many bytes."""
    with open(site.kit / "daemon.log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-c", START, str(largest), str(site.kit)], stdout=log, stderr=log)
    try:
        yield process
        assert process.poll() is None, (site.kit / "daemon.log").read_text()[-3000:]  # it lives to the end
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait()


def through_the_door(site: GatedSite, content: Content, parameters: Parameters | None = None) -> Answer:
    """A question to the process: its answer, and whether arrays came with it."""
    question, task = site.sealed(encode(content, parameters=parameters))
    answer = ask(door_folder(site.kit / "state") / SOCKET, question, wait_seconds=WAIT)
    record = site.opened(answer, task).record
    return decode(record, Enrolled, Trained, Refused, Stopped), any(isinstance(part, ArrayRecord) for part in record.values())


def spent(site: GatedSite) -> float:
    with reading(site.hospital.file.ledger_path(site.hospital.site_file)) as ledger:
        return ledger.epsilon(1e-3)


def test_what_cannot_be_written_down_is_not_done_and_the_daemon_lives(tmp_path: Path) -> None:
    site, asked = gated(tmp_path)["north"], study()
    site.approve(asked)
    assert isinstance(site.enrol(asked), Enrolled)
    site.gate.close()
    before, rows = spent(site), len(site.audit())
    train = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=1, fold=1)
    stop = StopTask(run="run-1", study_hash=asked.fingerprint())
    with daemon(site, largest=site.audit_path().stat().st_size) as process:
        for content, parameters in ((train, site.parameters), (enrolment(asked, "run-2"), None), (stop, None), (train, site.parameters)):
            answer, arrays = through_the_door(site, content, parameters)
            assert isinstance(answer, Refused)
            assert f"{answer.code} {answer.reason}" == fixed_sentence(StorageError)
            assert not arrays
        assert ask(door_folder(site.kit / "state") / SOCKET, b"junk", wait_seconds=WAIT) == b""
        assert spent(site) == before
        assert len(site.audit()) == rows  # whole, and it verifies
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answer, arrays = through_the_door(site, train, site.parameters)
        assert isinstance(answer, Trained) and arrays
        assert spent(site) > before
    assert [row["event"] for row in site.audit()[rows:]] == ["task received", "study approved", "answer sent"]


def test_what_was_trained_and_cannot_be_written_down_does_not_leave_and_is_charged_once(tmp_path: Path) -> None:
    """There is room for the row that the task came, and not for the row that the answer goes."""
    site, asked = gated(tmp_path)["north"], study()
    site.approve(asked)
    assert isinstance(site.enrol(asked), Enrolled)
    assert isinstance(site.train(asked, 1)[0], Trained)
    while site.audit_path().stat().st_size < 4 * largest_of_the_ledger(site):  # else it would be the ledger that has no room
        site.stop(asked)
    assert isinstance(site.train(asked, 1)[0], Trained)
    site.gate.close()
    came, left = (len(line) for line in site.audit_path().read_bytes().splitlines()[-2:])
    train = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=2, fold=1)
    # "study approved" is written between: the daemon that starts anew agrees to the study again
    approved = next(len(line) for line in site.audit_path().read_bytes().splitlines() if b'"study approved"' in line)
    room = site.audit_path().stat().st_size + came + approved + left // 2
    with daemon(site, largest=room) as process:
        answer, arrays = through_the_door(site, train, site.parameters)
        assert isinstance(answer, Refused) and answer.code == StorageError.code and not arrays
        charged = spent(site)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answer, arrays = through_the_door(site, train, site.parameters)
        assert isinstance(answer, Trained) and arrays
        assert spent(site) == charged


def largest_of_the_ledger(site: GatedSite) -> int:
    return max(path.stat().st_size for path in (site.kit / "state").rglob("*sqlite*"))
