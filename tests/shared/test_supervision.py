"""Real children that are killed, crash and linger, and supervisors that are killed: what must live lives, what must end ends."""

import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from shared.errors import AlreadyRunningError, ConfigurationError, StorageError, WardroundError
from shared.supervision import (
    FIRST_WAIT_SECONDS,
    INSTANCE,
    LARGEST_LOG_BYTES,
    LONGEST_WAIT_SECONDS,
    STEADY_SECONDS,
    Child,
    Supervisor,
    open_log,
    read_instance,
    single_instance,
    stop_instance,
)

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60
ENVIRONMENT = {"PATH": os.environ["PATH"]}
SLEEPER = "exec sleep 1000"
STUBBORN = "trap '' TERM; echo armed; while :; do sleep 1000; done"
PARENT = "sleep 1000 & echo $! > {folder}/grandchild; wait"
Event = tuple[str, str, Mapping[str, object]]

SUPERVISED = """
import json, os, signal, sys, threading
from pathlib import Path
from shared.supervision import Child, Supervisor, single_instance
folder = Path(sys.argv[1])
environment = {"PATH": os.environ["PATH"]}
children = [Child(name=str(n), command=("sh", "-c", script), environment=environment, log=folder / f"{n}.log") for n, script in enumerate(sys.argv[2:])]
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
supervisor = Supervisor(children, observe=lambda *event: None)
with single_instance(folder) as announce:
    supervisor.start()
    announce({"page": 8081})
    print(json.dumps([status.pid for status in supervisor.status()]), flush=True)
    supervisor.run_until(stop)
    supervisor.stop(grace_seconds=1)
"""


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    """Whether it runs; what only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Rig:
    """Supervisors with a clock that only a test moves, and all that they told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.events: list[Event] = []
        self.supervisors: list[Supervisor] = []

    def child(self, script: str, *, name: str = "a", ready: Callable[[], bool] | None = None, user: str | None = None) -> Child:
        command = ("sh", "-c", script.format(folder=self.folder))
        return Child(name=name, command=command, environment=ENVIRONMENT, log=self.folder / f"{name}.log", ready=ready, user=user)

    def supervise(self, *children: Child) -> Supervisor:
        supervisor = Supervisor(children, observe=lambda event, child, facts: self.events.append((event, child, facts)), clock=lambda: self.now)
        self.supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    def exits(self) -> list[Mapping[str, object]]:
        return [facts for event, _, facts in self.events if event == "exited"]

    def poll_until_exit(self, supervisor: Supervisor) -> Mapping[str, object]:
        """Poll until one more child was noticed to have ended."""
        before = len(self.exits())

        def ended() -> bool:
            supervisor.poll()
            return len(self.exits()) > before

        _until(ended)
        return self.exits()[-1]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    for supervisor in made.supervisors:
        supervisor.stop(grace_seconds=0)


def _pid(supervisor: Supervisor, index: int = 0) -> int:
    pid = supervisor.status()[index].pid
    assert pid is not None
    return pid


def test_a_killed_child_is_started_again_and_the_others_go_on(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child(SLEEPER), rig.child(SLEEPER, name="b"))
    first, other = _pid(supervisor, 0), _pid(supervisor, 1)
    os.kill(first, signal.SIGKILL)
    assert rig.poll_until_exit(supervisor) == {"status": -9, "alive_seconds": 0.0, "restart_in_seconds": FIRST_WAIT_SECONDS}
    assert [status.state for status in supervisor.status()] == ["waiting", "ready"]
    rig.now += FIRST_WAIT_SECONDS - 0.01
    supervisor.poll()
    assert supervisor.status()[0].pid is None
    rig.now += 0.01
    supervisor.poll()
    one, two = supervisor.status()
    assert one.pid not in (None, first) and _alive(_pid(supervisor)) and two.pid == other and _alive(other)
    assert (one.state, one.restarts, one.last_exit) == ("ready", 1, -9) and (two.restarts, two.last_exit) == (0, None)
    assert [(event, child) for event, child, _ in rig.events] == [
        *(("started", "a"), ("ready", "a"), ("started", "b"), ("ready", "b"), ("exited", "a"), ("started", "a"), ("ready", "a"))
    ]


def test_a_crash_loop_slows_down_and_a_steady_child_starts_afresh(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child("exit 3"))
    waits = []
    for _ in range(9):
        facts = rig.poll_until_exit(supervisor)
        assert facts["status"] == 3
        waits.append(facts["restart_in_seconds"])
        rig.now += float(str(facts["restart_in_seconds"]))
    assert waits == [min(FIRST_WAIT_SECONDS * 2**failure, LONGEST_WAIT_SECONDS) for failure in range(9)] and waits[-1] == LONGEST_WAIT_SECONDS
    supervisor.poll()
    rig.now += STEADY_SECONDS  # the clock says that it lived a minute
    assert rig.poll_until_exit(supervisor)["restart_in_seconds"] == FIRST_WAIT_SECONDS
    assert supervisor.status()[0].restarts == 9


def test_a_program_that_is_not_there_is_tried_again_and_its_log_says_so(rig: Rig) -> None:
    child = Child(name="a", command=("/no/such/program",), environment={}, log=rig.folder / "a.log")
    supervisor = rig.supervise(child)
    assert rig.poll_until_exit(supervisor)["status"] == 127
    assert (rig.folder / "a.log").read_text() == "/no/such/program: could not be started: No such file or directory\n"


def test_a_start_that_fails_later_does_not_end_the_supervisor(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child("exit 3"))
    rig.poll_until_exit(supervisor)
    (rig.folder / "a.log").unlink()
    (rig.folder / "a.log").mkdir()
    rig.now += 1
    facts = rig.poll_until_exit(supervisor)
    assert (facts["status"], facts["restart_in_seconds"]) == (127, 2 * FIRST_WAIT_SECONDS)
    (rig.folder / "a.log").rmdir()
    rig.now += 1
    assert rig.poll_until_exit(supervisor)["status"] == 3


@pytest.mark.slow
def test_stop_ends_all_and_what_they_started(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child(PARENT), rig.child(STUBBORN, name="b"), rig.child(SLEEPER, name="c"))
    _until(lambda: (rig.folder / "grandchild").exists() and (rig.folder / "grandchild").read_text().endswith("\n"))
    _until(lambda: (rig.folder / "b.log").read_text() == "armed\n")
    pids = [*(_pid(supervisor, index) for index in range(3)), int((rig.folder / "grandchild").read_text())]
    assert all(map(_alive, pids))
    supervisor.stop(grace_seconds=0.3)
    _until(lambda: not any(map(_alive, pids)))
    assert [status.state for status in supervisor.status()] == ["stopped"] * 3
    assert [status.last_exit for status in supervisor.status()] == [-15, -9, -15]
    rig.now += 1000
    supervisor.poll()
    assert [status.pid for status in supervisor.status()] == [None] * 3
    assert [child for event, child, _ in rig.events if event == "stopped"] == ["a", "b", "c"]


def test_what_a_crashed_child_had_started_is_ended_before_it_starts_again(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child(PARENT))
    _until(lambda: (rig.folder / "grandchild").exists() and (rig.folder / "grandchild").read_text().endswith("\n"))
    grandchild = int((rig.folder / "grandchild").read_text())
    os.kill(_pid(supervisor), signal.SIGKILL)
    rig.poll_until_exit(supervisor)
    _until(lambda: not _alive(grandchild))


def test_children_are_not_in_reach_of_ctrl_c(rig: Rig) -> None:
    supervisor = rig.supervise(rig.child(SLEEPER))
    pid = _pid(supervisor)
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


def test_ready_is_asked_until_it_says_so_and_again_after_a_restart(rig: Rig) -> None:
    answers = itertools.chain([False, False, True, False], itertools.repeat(True))
    supervisor = rig.supervise(rig.child(SLEEPER, ready=lambda: next(answers)))
    states = [supervisor.status()[0].state]
    for _ in range(3):
        supervisor.poll()
        states.append(supervisor.status()[0].state)
    assert states == ["starting", "starting", "ready", "ready"]
    os.kill(_pid(supervisor), signal.SIGKILL)
    rig.poll_until_exit(supervisor)
    rig.now += 1
    supervisor.poll()
    assert supervisor.status()[0].state == "ready"
    assert [event for event, _, _ in rig.events] == ["started", "ready", "exited", "started", "ready"]


def test_a_child_gets_the_environment_given_and_no_descriptor_of_ours(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_SECRET", "seen")
    with socket.socket() as ours:
        ours.set_inheritable(True)
        child = Child(
            name="a", command=("sh", "-c", "env; ls /proc/self/fd; pwd"), environment={**ENVIRONMENT, "MINE": "1"}, log=rig.folder / "a.log"
        )
        rig.poll_until_exit(rig.supervise(child))
    lines = (rig.folder / "a.log").read_text().splitlines()
    assert "MINE=1" in lines and not any("WARDROUND_SECRET" in line for line in lines)
    assert [line for line in lines if line.isdigit()] == ["0", "1", "2", "3"]  # 3 is that of ls itself
    assert lines[-1] == "/"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start another user's child")
def test_another_users_child_has_that_user_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/sh")
    monkeypatch.setattr("shared.supervision._DIE_WITH_PARENT", "id -u; id -G")
    monkeypatch.setattr("shared.supervision._LAUNCHER", ("-c",))
    rig.poll_until_exit(rig.supervise(rig.child("", user="nobody")))
    uid, groups = (rig.folder / "a.log").read_text().split()
    assert int(uid) == 65534 and groups == "65534"


def test_a_user_who_is_not_there_is_named_and_nothing_is_left_running(rig: Rig) -> None:
    with pytest.raises(ConfigurationError, match="b: expected a user of this machine, got 'no-such-user'"):
        rig.supervise(rig.child(SLEEPER), rig.child(SLEEPER, name="b", user="no-such-user"))
    pid = next(facts["pid"] for event, _, facts in rig.events if event == "started")
    assert isinstance(pid, int) and not _alive(pid)
    assert rig.supervisors[0].status()[0].state == "stopped"


def test_a_refused_process_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(WardroundError, match="a: expected to start it, got: No such file or directory; see that /no/such/python may be run"):
        rig.supervise(rig.child(SLEEPER))


def test_logs_are_private_appended_and_turned_over(rig: Rig) -> None:
    log = rig.folder / "logs" / "a.log"
    child = Child(name="a", command=("sh", "-c", "echo out; echo err >&2"), environment=ENVIRONMENT, log=log)
    previous = os.umask(0)
    try:
        supervisor = rig.supervise(child)
        rig.poll_until_exit(supervisor)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    rig.now += 1
    rig.poll_until_exit(supervisor)
    assert log.read_text() == "out\nerr\n" * 2
    log.chmod(0o644)
    for generation in ("first", "second"):
        with log.open("r+b") as file:
            file.write(generation.encode())
            file.truncate(LARGEST_LOG_BYTES + 1)
        os.close(open_log(log))
        assert log.stat().st_size == 0 and stat.S_IMODE(log.stat().st_mode) == 0o600
        assert (rig.folder / "logs" / "a.log.1").read_bytes().startswith(generation.encode())
    with log.open("r+b") as file:
        file.truncate(LARGEST_LOG_BYTES)
    os.close(open_log(log))
    assert log.stat().st_size == LARGEST_LOG_BYTES, "not above the limit"
    assert sorted(path.name for path in log.parent.iterdir()) == ["a.log", "a.log.1"]


def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "a.log").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match=r"a\.log: could not open the log"):
        open_log(tmp_path / "a.log")


@pytest.mark.slow
def test_run_until_polls_until_it_is_told_to_stop(tmp_path: Path) -> None:
    stop = threading.Event()
    asked = []

    def ready() -> bool:
        asked.append(1)
        if len(asked) == 3:
            stop.set()
        return False

    child = Child(name="a", command=("sleep", "1000"), environment=ENVIRONMENT, log=tmp_path / "a.log", ready=ready)
    supervisor = Supervisor([child], observe=lambda *event: None)
    supervisor.start()
    supervisor.run_until(stop)
    supervisor.stop(grace_seconds=1)
    assert len(asked) == 3


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[int]]]]:
    """A supervisor in a process of its own, with the pids of its children."""
    processes: list[subprocess.Popen[str]] = []

    def start(*scripts: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen([sys.executable, "-c", SUPERVISED, str(tmp_path), *scripts], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    yield start
    for process in processes:
        with process:
            process.kill()


Start = Callable[..., tuple[subprocess.Popen[str], list[int]]]


@pytest.mark.slow
def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path, supervised: Start) -> None:
    process, pids = supervised(SLEEPER, STUBBORN)
    _until(lambda: (tmp_path / "1.log").read_text() == "armed\n")
    assert all(map(_alive, pids))
    process.kill()
    process.wait()
    _until(lambda: not any(map(_alive, pids)))
    assert (tmp_path / INSTANCE).exists(), "a killed process cannot tidy up"
    assert read_instance(tmp_path) is None and not stop_instance(tmp_path)
    supervised(SLEEPER)
    again = read_instance(tmp_path)
    assert again is not None and again.pid != process.pid


@pytest.mark.slow
def test_two_instances_are_refused_and_the_first_goes_on(tmp_path: Path, supervised: Start) -> None:
    process, pids = supervised(SLEEPER)
    with pytest.raises(AlreadyRunningError, match=f"found process {process.pid}, since 20"), single_instance(tmp_path):
        raise AssertionError("never both")
    assert process.poll() is None and _alive(pids[0])
    instance = read_instance(tmp_path)
    assert instance is not None and (instance.pid, instance.ports) == (process.pid, {"page": 8081})


@pytest.mark.parametrize("grace_seconds", [60, 0])
def test_an_instance_is_stopped_with_its_children(tmp_path: Path, supervised: Start, grace_seconds: float) -> None:
    process, pids = supervised(SLEEPER, SLEEPER)
    assert stop_instance(tmp_path, grace_seconds)
    assert process.wait() == (0 if grace_seconds else -9)
    _until(lambda: not any(map(_alive, pids)))
    assert read_instance(tmp_path) is None
    assert not stop_instance(tmp_path)


def test_the_folder_is_free_again_after_an_error_in_the_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), single_instance(tmp_path / "new"):
        mine = read_instance(tmp_path / "new")
        assert mine is not None and mine.pid == os.getpid()
        raise ZeroDivisionError
    assert read_instance(tmp_path / "new") is None
    with single_instance(tmp_path / "new"):
        assert read_instance(tmp_path / "new") is not None
    assert not (tmp_path / "new" / INSTANCE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"started_ticks": 1}, {"pid": 0}, {"extra": 1}, {"pid": "1"}])
def test_a_process_that_the_file_does_not_name_exactly_is_never_signalled(tmp_path: Path, change: dict[str, object]) -> None:
    """The lock is held, but the file is another's: a number that was given to a new process, or damage."""
    with single_instance(tmp_path):
        said = json.loads((tmp_path / INSTANCE).read_text())
        (tmp_path / INSTANCE).write_text(json.dumps({**said, **change}))
        assert read_instance(tmp_path) is None
        assert not stop_instance(tmp_path, grace_seconds=0)
        with pytest.raises(AlreadyRunningError, match="a process that has only just begun or is about to end"), single_instance(tmp_path):
            raise AssertionError("never both")


def test_a_folder_where_nobody_ever_was(tmp_path: Path) -> None:
    assert read_instance(tmp_path) is None and read_instance(tmp_path / "absent") is None
    assert list(tmp_path.iterdir()) == []
