"""Children that are kept alive, and that all end with their supervisor. Linux only.

A child that ends is started again after 0.5 s, then 1 s, 2 s ... up to 30 s; one that lived a minute starts from 0.5 s again. Children have their
own session, so that Ctrl-C reaches only the supervisor, and the kernel kills them when it dies, by SIGKILL too. That holds for the children
themselves; what *they* started is ended by `stop`, and when the child ends, as long as it stayed in the child's process group.

There is no thread: whoever owns the loop calls `Supervisor.poll` a few times a second (`run_until` does so in a blocking program).
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import pwd
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from shared.config import Settings
from shared.errors import AlreadyRunningError, ConfigurationError, UsageError, WardroundError
from shared.files import json_text, storage_errors, write_atomic

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "waiting", "stopped"]
Observe = Callable[[str, str, Mapping[str, object]], None]

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, STEADY_SECONDS = 0.5, 30.0, 60.0
POLL_SECONDS = 0.2
LARGEST_LOG_BYTES = 10_000_000
LOCK, INSTANCE = "supervisor.lock", "supervisor.json"
_REMEDY_STORAGE = "check free space and permissions of that folder"
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_CANNOT_EXECUTE = 127  # as a shell says it

# Runs in the child's own process before the command takes it over, not between fork and exec, where Python in a program with threads may
# deadlock. It comes after the change of user, which would clear the death signal.
_DIE_WITH_PARENT = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(0)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(sys.argv[2] + ": could not be started: " + error.strerror, file=sys.stderr, flush=True)
    os._exit({_CANNOT_EXECUTE})
"""


_LAUNCHER = ("-I", "-S", "-c")  # nothing of the environment, no site packages: it is there in some 20 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A program to keep running.

    `command` is found by the PATH of `environment`, which is all the environment it gets, and it runs in the folder `/`: name files by full
    paths. `log` takes both its outputs. `user` needs a supervisor that is root, and a Python that this user may run. `ready` says whether it is
    in service, and never raises; without one it is as soon as it was started.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    user: str | None = None
    ready: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildStatus:
    """How a child is doing."""

    name: str
    state: State  # waiting: it ended, and is to be started again
    pid: int | None
    restarts: int
    last_exit: int | None  # exit status of the last one that ended, -n where signal n killed it


@dataclass(slots=True, kw_only=True)
class _Running:
    """What changes about one child."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    since: float = 0.0  # seconds of the supervisor's clock
    due: float | None = None  # when to start it
    failures: int = 0  # in a row
    restarts: int = 0
    last_exit: int | None = None


class Supervisor:
    """Keeps `children` running between `start` and `stop`.

    Call all methods in one thread that lives as long as the supervisor, best the main one: the kernel ends a child when the *thread* that
    started it ends. `observe` is told `started` {pid}, `ready` {}, `exited` {status, alive_seconds, restart_in_seconds} and `stopped` {}.
    """

    def __init__(self, children: Sequence[Child], *, observe: Observe, clock: Callable[[], float] = time.monotonic) -> None:
        self._running = [_Running(child=child) for child in children]
        self._observe = observe
        self._clock = clock

    def start(self) -> None:
        """All children are started, in order, or none is left.

        Raises:
            StorageError: a log cannot be opened.
            ConfigurationError: a child is to be a user's whom this machine does not have.
            WardroundError: the system refuses a process, or that user.
        """
        try:
            for running in self._running:
                self._launch(running)
        except BaseException:
            self.stop(grace_seconds=0)
            raise

    def poll(self) -> None:
        """Children that ended are noticed, those whose time has come are started again. A start that fails counts as an end."""
        for running in self._running:
            if running.process is not None and _has_ended(running.process):
                self._bury(running)
            if running.due is not None and self._clock() >= running.due:
                self._relaunch(running)
            self._look_whether_ready(running)

    def run_until(self, stop: threading.Event) -> None:
        """Poll until `stop` is set; for a program that has nothing else to do."""
        while not stop.wait(POLL_SECONDS):
            self.poll()

    def stop(self, grace_seconds: float = 5.0) -> None:
        """No child, and nothing of its process group, is left: SIGTERM to all, and SIGKILL to what remains when all have ended or the time is up."""
        alive = [running for running in self._running if running.process is not None]
        for running in self._running:
            running.due = None
        for running in alive:
            _signal_group(running, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and not all(_has_ended(running.process) for running in alive if running.process is not None):
            time.sleep(0.02)
        for running in alive:
            self._end(running)
            self._observe("stopped", running.child.name, {})

    def status(self) -> tuple[ChildStatus, ...]:
        """How each child was at the last poll."""
        return tuple(
            ChildStatus(
                name=running.child.name,
                state=_state_of(running),
                pid=running.process.pid if running.process is not None else None,
                restarts=running.restarts,
                last_exit=running.last_exit,
            )
            for running in self._running
        )

    def _launch(self, running: _Running) -> None:
        running.due, running.ready, running.since = None, False, self._clock()
        running.process = _spawn(running.child)
        self._observe("started", running.child.name, {"pid": running.process.pid})
        self._look_whether_ready(running)

    def _relaunch(self, running: _Running) -> None:
        running.restarts += 1
        try:
            self._launch(running)
        except WardroundError as error:  # a full disk or process table today must not end the supervisor
            logger.warning("%s", error)
            running.last_exit = _CANNOT_EXECUTE
            self._schedule(running)

    def _look_whether_ready(self, running: _Running) -> None:
        if running.process is not None and not running.ready and (running.child.ready is None or running.child.ready()):
            running.ready = True
            self._observe("ready", running.child.name, {})

    def _bury(self, running: _Running) -> None:
        """Reap a child that ended and end what it left behind."""
        self._end(running)
        self._schedule(running)

    def _schedule(self, running: _Running) -> None:
        """Say when a child is to be started again."""
        now = self._clock()
        alive_seconds = now - running.since
        running.failures = 1 if alive_seconds >= STEADY_SECONDS else running.failures + 1
        wait_seconds = min(FIRST_WAIT_SECONDS * 2 ** min(running.failures - 1, 10), LONGEST_WAIT_SECONDS)
        running.due = now + wait_seconds
        facts = {"status": running.last_exit, "alive_seconds": alive_seconds, "restart_in_seconds": wait_seconds}
        self._observe("exited", running.child.name, facts)

    def _end(self, running: _Running) -> None:
        """Kill its group, then reap it: before that its number cannot be given to somebody else's group."""
        _signal_group(running, signal.SIGKILL)
        if running.process is not None:
            running.last_exit = running.process.wait()
        running.process, running.ready = None, False


class Instance(Settings):
    """Who works in a folder, as `supervisor.json` says it."""

    pid: int = Field(ge=1)
    started: str  # UTC, ISO 8601
    started_ticks: int  # of the kernel's clock: with the pid it names one process for ever
    ports: dict[str, int]  # of what, and where


@contextlib.contextmanager
def single_instance(folder: Path) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """In the block no other process of ours works in `folder`, and `read_instance` finds this one, with the ports that it calls `announce` with.

    Raises:
        AlreadyRunningError: one does; the error names its pid.
        StorageError: the folder cannot be written to.
    """
    with storage_errors(folder, "lock", remedy=_REMEDY_STORAGE):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor, fcntl.LOCK_EX, patience_seconds=0.5):
            raise _already_running(folder)
        started = datetime.now(UTC).isoformat(timespec="seconds")

        def announce(ports: Mapping[str, int]) -> None:
            instance = Instance(pid=os.getpid(), started=started, started_ticks=_start_of(os.getpid()) or 0, ports=dict(ports))
            write_atomic(folder / INSTANCE, json_text(instance.model_dump()))

        announce({})
        try:
            yield announce
        finally:
            with contextlib.suppress(OSError):
                (folder / INSTANCE).unlink()
    finally:
        os.close(descriptor)


def read_instance(folder: Path) -> Instance | None:
    """Who works in `folder` now; None where nobody does, whatever a process that was killed left there.

    Raises:
        StorageError: the folder cannot be read.
    """
    with storage_errors(folder, "look who works there", remedy=_REMEDY_STORAGE):
        try:
            descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if _locked(descriptor, fcntl.LOCK_SH, patience_seconds=0):
                return None
            instance = Instance.model_validate_json((folder / INSTANCE).read_bytes())
        except (FileNotFoundError, ValidationError):  # it has only just begun, or is about to end
            return None
        finally:
            os.close(descriptor)
    return instance if _start_of(instance.pid) == instance.started_ticks else None


def stop_instance(folder: Path, grace_seconds: float = 15.0) -> bool:
    """Whether one worked in `folder`; it no longer does: SIGTERM, and SIGKILL when the time is up. Nobody else is ever signalled.

    Raises:
        UsageError: it belongs to another user.
    """
    instance = read_instance(folder)
    if instance is None:
        return False
    try:
        process = os.pidfd_open(instance.pid)
    except ProcessLookupError:
        return True
    try:
        if _start_of(instance.pid) != instance.started_ticks:  # it ended before we had hold of it, and its number went to another
            return True
        _signal_process(process, instance, signal.SIGTERM)
        if not _ends_within(process, grace_seconds):
            _signal_process(process, instance, signal.SIGKILL)
            _ends_within(process, None)
    finally:
        os.close(process)
    return True


def die_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, by SIGKILL too; from now on, and at once where it has ended already."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`, mode 0600; above 10 MB what was there becomes `<name>.1`, in place of an older one.

    Raises:
        StorageError: it cannot be opened, or is a symbolic link.
    """
    with storage_errors(path, "open the log", remedy=_REMEDY_STORAGE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_size > LARGEST_LOG_BYTES:
                os.replace(path, path.with_name(path.name + ".1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)  # also where an older one was wider
    return descriptor


def _spawn(child: Child) -> subprocess.Popen[bytes]:
    """The child's process, which becomes its command by itself."""
    launcher = (sys.executable, *_LAUNCHER, _DIE_WITH_PARENT, str(os.getpid()), *child.command)
    entry = _user_of(child)
    log = open_log(child.log)
    try:
        return subprocess.Popen(
            launcher,
            env=dict(child.environment),
            cwd="/",  # not a folder in which others may leave modules
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=entry.pw_uid if entry is not None else None,
            group=entry.pw_gid if entry is not None else None,
            extra_groups=[] if entry is not None else None,
        )
    except OSError as error:
        who = f" as user {child.user}" if child.user is not None else ""
        reason = os.strerror(error.errno or errno.EIO)
        raise WardroundError(
            f"{child.name}: expected to start it{who}, got: {reason}", f"see that {sys.executable} may be run, and for another user start as root"
        ) from error
    finally:
        os.close(log)


def _user_of(child: Child) -> pwd.struct_passwd | None:
    if child.user is None:
        return None
    try:
        return pwd.getpwnam(child.user)
    except KeyError:
        raise ConfigurationError(f"{child.name}: expected a user of this machine, got {child.user!r}", "make that system user first") from None


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ended; it is not reaped yet, so its number is still its own."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _signal_group(running: _Running, number: signal.Signals) -> None:
    if running.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, number)


def _state_of(running: _Running) -> State:
    if running.process is not None:
        return "ready" if running.ready else "starting"
    return "stopped" if running.due is None else "waiting"


def _locked(descriptor: int, operation: int, *, patience_seconds: float) -> bool:
    """Whether the lock was had in time. A reader holds it for a moment while it looks, hence the patience."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


def _already_running(folder: Path) -> AlreadyRunningError:
    instance = read_instance(folder)
    who = f"process {instance.pid}, since {instance.started}" if instance is not None else "a process that has only just begun or is about to end"
    return AlreadyRunningError(f"{folder}: expected that nobody works here, found {who}", "stop that one first, or leave it be")


def _start_of(pid: int) -> int | None:
    """When the process started, in ticks of the kernel's clock (field 22 of /proc/<pid>/stat); None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def _signal_process(process: int, instance: Instance, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise UsageError(
            f"process {instance.pid}: expected one of this user, got another's", "stop it as the user that started it, or as root"
        ) from error


def _ends_within(process: int, seconds: float | None) -> bool:
    """Whether the process behind this pidfd ended in that time; None: however long it takes."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
