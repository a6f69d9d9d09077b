"""`wardround site start`: keeps a hospital's daemon and courier running, and ends them together.

The daemon is ready when its socket answers, the courier when the coordinator has let it in. What each is doing stands in `station.json`, for
`wardround site status`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from client.connection import CONNECTION, read_connection
from client.door import SOCKET, door_folder
from client.hospital import AUDIT, Hospital
from shared.config import Settings
from shared.errors import StorageError
from shared.files import check_room, json_text, make_private, storage_errors, write_atomic
from shared.supervision import POLL_SECONDS, Child, Observe, State, Supervisor, single_instance

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy")
DAEMON_LOG, COURIER_LOG, STATION = "daemon.log", "courier.log", "station.json"  # in the site's state
DAEMON, COURIER = "daemon", "courier"
TRY_SECONDS = 10.0  # how often it is tried whether there is room for what a round writes down

logger = logging.getLogger(__name__)


class ChildState(Settings):
    """A process of the site, as `station.json` says it."""

    name: str
    state: State
    pid: int | None
    restarts: int
    last_exit: int | None


class StationState(Settings):
    """station.json."""

    children: tuple[ChildState, ...]


def run_station(
    kit: Path,
    stop: threading.Event,
    *,
    daemon: tuple[str, ...] | None = None,
    begun: Callable[[], None] = lambda: None,
    ready: Callable[[], None] = lambda: None,
    observe: Observe | None = None,
) -> None:
    """Keep the site of this kit running until `stop` is set.

    Args:
        daemon: for tests alone: another command than the daemon's.
        begun: called once nobody else can run this site, before any process is started; what it raises ends the site.
        ready: called once both processes were started.
        observe: told what happens, as `Supervisor` tells it of `daemon` and `courier`; the courier's `ready` has {node}, and there are
            also its `unreachable` {problem} and `reachable` {}, and the daemon's `unwritable` {problem} and `writable` {}. Without one it is logged.

    Raises:
        KitError, ConfigurationError: the kit or site.toml does not fit.
        AlreadyRunningError: another process does so already.
    """
    hospital = Hospital.open(kit)
    with storage_errors(hospital.state, "make the site's state"):
        make_private(hospital.state)
    with single_instance(hospital.state) as announce:
        begun()
        with contextlib.suppress(FileNotFoundError):
            (hospital.state / CONNECTION).unlink()  # of an earlier life
        watch = _Watch(hospital.state, observe or _log)
        supervisor = Supervisor(children(hospital, daemon), observe=watch.observe)
        watch.supervisor = supervisor
        supervisor.start()
        try:
            announce({})
            ready()
            while not stop.wait(POLL_SECONDS):
                supervisor.poll()
                watch.look()
        finally:
            supervisor.stop()
            watch.forget()


def children(hospital: Hospital, daemon: tuple[str, ...] | None = None) -> list[Child]:
    """The two processes of a site."""
    environment = {**QUIET, **{key: os.environ[key] for key in KEPT if key in os.environ}}
    kit, state = str(hospital.kit.resolve()), hospital.state
    return [
        Child(
            name=DAEMON,
            command=daemon or (sys.executable, "-m", "client.daemon", kit),
            environment=environment,
            log=state / DAEMON_LOG,
            ready=lambda: _answers(state),
        ),
        Child(
            name=COURIER,
            command=(sys.executable, "-m", "client.courier", kit),
            environment=environment,
            log=state / COURIER_LOG,
            ready=lambda: (connection := read_connection(state)) is not None and connection.connected,
        ),
    ]


def read_station(state: Path) -> StationState | None:
    """What the station of this state folder wrote last; None where there is nothing. Whether it still runs, `read_instance` tells."""
    try:
        return StationState.model_validate_json((state / STATION).read_bytes())
    except (OSError, ValidationError):
        return None


class _Watch:
    """Passes on what the supervisor observes, and keeps `station.json` and what is known of the courier's connection."""

    def __init__(self, state: Path, tell: Observe) -> None:
        self._state = state
        self._tell = tell
        self._problem: str | None = None
        self._unwritable: str | None = None
        self._try_at = 0.0  # time.monotonic()
        self._written = ""
        self._audited = _size(state / AUDIT)  # bytes of the audit log that were looked at
        self.supervisor: Supervisor | None = None

    def observe(self, event: str, child: str, facts: Mapping[str, object]) -> None:
        if event == "started" and child == COURIER:
            self._problem = None
        if event == "exited" and child == COURIER:
            self.look()
            with contextlib.suppress(OSError):
                (self._state / CONNECTION).unlink()  # or the next one would seem to be connected already
        connection = read_connection(self._state) if event == "ready" and child == COURIER else None
        self._tell(event, child, facts if connection is None else {**facts, "node": connection.node})

    def look(self) -> None:
        """Tell of the courier's connection what is new, and write down how the processes are."""
        connection = read_connection(self._state)
        problem = None if connection is None else connection.problem
        if connection is not None and problem != self._problem:
            self._problem = problem
            self._tell(*(("reachable", COURIER, {}) if problem is None else ("unreachable", COURIER, {"problem": problem})))
        self._tell_answers()
        if time.monotonic() >= self._try_at:
            self._try_at = time.monotonic() + TRY_SECONDS
            self._try_to_write()
        if self.supervisor is not None:
            self._write(StationState(children=tuple(ChildState(**dataclasses.asdict(child)) for child in self.supervisor.status())))

    def _tell_answers(self) -> None:
        """Tell what the daemon has answered since the last look, as its audit log says."""
        if _size(self._state / AUDIT) == self._audited:
            return
        with contextlib.suppress(OSError), open(self._state / AUDIT, "rb") as file:
            file.seek(self._audited)
            lines = file.read().split(b"\n")
            self._audited += sum(len(line) + 1 for line in lines[:-1])  # the last is not yet whole
        for line in lines[:-1]:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row["event"] == "answer sent":
                    self._tell("answered", DAEMON, row["details"])

    def _try_to_write(self) -> None:
        """Tell where the state cannot be written to any more: a daemon that cannot write down what it answers cannot write down why either."""
        problem = None
        try:
            check_room(self._state)
        except StorageError as error:
            problem = f"{error.code} {error}"
        if problem != self._unwritable:
            self._unwritable = problem
            self._tell(*(("writable", DAEMON, {}) if problem is None else ("unwritable", DAEMON, {"problem": problem})))

    def forget(self) -> None:
        """The site has ended."""
        for name in (STATION, CONNECTION):
            with contextlib.suppress(OSError):
                (self._state / name).unlink()

    def _write(self, station: StationState) -> None:
        text = json_text(station.model_dump())
        if text != self._written:
            with contextlib.suppress(StorageError):  # a full disk must not end the site
                write_atomic(self._state / STATION, text)
            self._written = text


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _answers(state: Path) -> bool:
    """Whether the daemon listens at its socket; reached through its folder's descriptor, for a socket's path has at most 107 bytes."""
    try:
        folder = os.open(door_folder(state), os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
            probe.settimeout(1)
            return probe.connect_ex(f"/proc/self/fd/{folder}/{SOCKET}") == 0
    finally:
        os.close(folder)


def _log(event: str, child: str, facts: Mapping[str, object]) -> None:
    logger.info("%s %s%s", child, event, "".join(f" {key}={value}" for key, value in facts.items()))
