"""The coordinator's one process: front door, page, and supervisor of Flower's SuperLink and of the process that starts the studies.

    sites --TLS--> front door (public port) --TLS, loopback--> SuperLink <--TLS, loopback-- SuperExec --> a ServerApp for each study
                   page, status, control (loopback)

Its loop holds the SuperLink's list of nodes to the CA's roster, starts submitted studies, and starts one again whose process died: the study
itself resumes from its checkpoint. Everything that must outlive it is in files: after SIGKILL a new one goes on.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from server.control import CONTROL_KEY, control_routes
from server.federation_file import FederationFile
from server.front_door import door_server, front_door, listening_socket
from server.live_roster import LiveRoster
from server.page import page_routes
from server.status import AuditHead, CoordinatorStatus, Failure, SiteState, SiteStatus, StudyState, study_status
from server.submissions import AUDIT, COORDINATOR, UNFINISHED, Submission, Submissions
from server.superlink import Node, SuperLink
from shared.audit import AuditLog
from shared.certificates import node_key_pem, parse_node_key, read_certificate, replace_secret
from shared.errors import ConnectionFailedError, KitError, StorageError, WardroundError
from shared.files import check_room, make_private, storage_errors
from shared.kit import (
    CA_CERTIFICATE,
    FEDERATION,
    RUNS,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    SIGNING_KEY,
    STATE,
    KitManifest,
    RosterSite,
    installed_version,
    load_signing_key,
    verify_kit,
)
from shared.supervision import Child, Supervisor, single_instance

TICK_SECONDS, SUPERVISE_SECONDS = 0.5, 0.2
MAX_ATTEMPTS = 5  # a study whose process dies so often without completing a round more is failed
LEAN = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # large blocks go back to the system at once, and not into a heap with holes
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorKit:
    """A coordinator's kit, opened."""

    folder: Path
    manifest: KitManifest
    federation: FederationFile

    @classmethod
    def open(cls, folder: Path) -> "CoordinatorKit":
        """The kit in `folder`.

        Raises:
            KitError: it is damaged, expired, or a site's.
        """
        manifest = verify_kit(folder)
        if manifest.site is not None:
            raise KitError(f"{folder}: expected the coordinator's kit, got that of site {manifest.site}", "give the coordinator's folder")
        return cls(folder=folder, manifest=manifest, federation=FederationFile.load(folder / FEDERATION))

    @property
    def state(self) -> Path:
        """All that the coordinator remembers, but for the runs."""
        return self.folder / STATE

    @property
    def submissions(self) -> Submissions:
        """The studies it was given."""
        return Submissions(self.folder / RUNS)


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What the last look at the SuperLink showed."""

    nodes: dict[int, Node] = field(default_factory=dict)
    up: bool = False


class Service:
    """The coordinator of the kit in `folder`; `run` blocks until it is told to stop."""

    def __init__(self, folder: Path) -> None:
        self._kit = CoordinatorKit.open(folder)
        state = self._kit.state
        with storage_errors(state, "make the coordinator's state"):
            make_private(state)
            make_private(folder / RUNS)
        self._roster = LiveRoster(folder, state)
        self._submissions = self._kit.submissions
        self._audit = AuditLog(state / AUDIT, owner=self._kit.manifest.federation, role="coordinator", signer=load_signing_key(folder / SIGNING_KEY))
        self._started = datetime.now(UTC)
        self._served = read_certificate(folder / SERVER_CERTIFICATE)
        self._seen = _Seen()
        self._port = free_port()
        self._superlink = SuperLink(f"127.0.0.1:{self._port}", folder / CA_CERTIFICATE)
        self._trouble = ""  # why the last look came to nothing
        self._checkpoints: dict[str, int] = {}  # by run: which one it was last started from, by its time of writing
        self._settled = False  # whether the runs of an earlier life were ended
        self._lock = threading.Lock()

    def run(self, *, begun: Callable[[], None] = lambda: None, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT.

        Args:
            begun: called once nobody else can serve this kit, before any process is started.
            ready: called once when sites can connect.

        Raises:
            AlreadyRunningError: another process serves this kit.
            ConnectionFailedError: a port is taken.
        """
        with single_instance(self._kit.state) as announce:
            begun()
            self._control_key = secrets.token_hex(32)
            replace_secret(self._secret_path, secrets.token_bytes(32))
            replace_secret(self._kit.state / CONTROL_KEY, self._control_key.encode())
            asyncio.run(self._serve(announce, ready))

    async def _serve(self, announce: Callable[[Mapping[str, int]], None], ready: Callable[[], None]) -> None:
        supervisor = Supervisor(self._children(), observe=self._observe)
        supervisor.start()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            door, page, coordinator = self._door(), self._page(), self._kit.federation.coordinator
            at_door, at_page = listening_socket(coordinator.listen, coordinator.port), listening_socket("127.0.0.1", coordinator.page_port)
            announce({"door": coordinator.port, "page": coordinator.page_port, "superlink": self._port})
            self._audit.append("coordinator started", {"wardround": installed_version(), "generation": self._roster.roster.generation})
            tasks = [
                asyncio.create_task(work) for work in (_serving(door, at_door), _serving(page, at_page), self._look(ready), _supervising(supervisor))
            ]
            waiting = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiting}:
                task.result()  # raises what ended it
            door.should_exit = page.should_exit = True
            for task in tasks[2:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            supervisor.stop()
            self._superlink.close()
            self._audit.append("coordinator stopped", {})

    def _door(self) -> uvicorn.Server:
        folder = self._kit.folder
        app = front_door(
            f"https://127.0.0.1:{self._port}", ssl.create_default_context(cafile=str(folder / CA_CERTIFICATE)), version=installed_version()
        )
        return door_server(app, certificate=folder / SERVER_CERTIFICATE, key=folder / SERVER_KEY)

    def _note_control(self, action: str, run: str) -> None:
        self._audit.append(f"study {action}", {"run": run})

    def _page(self) -> uvicorn.Server:
        routes = [*page_routes(self.status), *control_routes(self._submissions, self._control_key, observe=self._note_control)]
        return uvicorn.Server(uvicorn.Config(Starlette(routes=routes), access_log=False, server_header=False, log_config=None, lifespan="off"))

    def _children(self) -> list[Child]:
        state, folder, address = self._kit.state, self._kit.folder, f"127.0.0.1:{self._port}"
        binaries = Path(sys.executable).parent
        environment = {
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin", "HOME": str(state), "FLWR_HOME": str(state / "flwr"), COORDINATOR: str(folder),
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **LEAN, **QUIET, **{key: os.environ[key] for key in KEPT if key in os.environ},
        }  # fmt: skip
        superlink = (
            sys.executable, "-m", "server.superlink_process", "--host", "127.0.0.1", "--port", str(self._port),
            "--ssl-ca-certfile", str(folder / CA_CERTIFICATE), "--ssl-certfile", str(folder / SERVER_CERTIFICATE),
            "--ssl-keyfile", str(folder / SERVER_KEY), "--enable-supernode-auth", "--database", str(state / "superlink.db"),
            "--isolation", "process", "--superexec-auth-secret-file", str(self._secret_path),
        )  # fmt: skip
        superexec = (
            sys.executable, "-m", "server.superexec_process", "--runtime-api-address", address, "--root-certificates", str(folder / CA_CERTIFICATE),
            "--superexec-auth-secret-file", str(self._secret_path), "--parent-pid", str(os.getpid()),
        )  # fmt: skip
        return [
            Child(name="superlink", command=superlink, environment=environment, log=state / "superlink.log", ready=lambda: is_open(self._port)),
            Child(name="superexec", command=superexec, environment=environment, log=state / "superexec.log"),
        ]

    @property
    def _secret_path(self) -> Path:
        return self._kit.state / "superexec.secret"

    def _observe(self, event: str, child: str, facts: Mapping[str, object]) -> None:
        logger.info("%s %s%s", child, event, "".join(f" {key}={value}" for key, value in facts.items()))
        if event == "exited":
            if child == "superexec":
                self._settled = False  # the studies' processes died with it, which Flower would notice a minute later
            try:
                self._audit.append("process ended", {"process": child, "status": str(facts.get("status")), "outcome": "failed"})
            except WardroundError as error:  # on a full disk it is started again all the same
                logger.error("error %s: %s", error.code, error)

    # The loop ------------------------------------------------------------------------------------------------------------------

    async def _look(self, ready: Callable[[], None]) -> None:
        told = False
        while True:
            try:
                await asyncio.to_thread(self.tick)
                if not told and self._seen.up:
                    told = True
                    ready()
            except ConnectionFailedError as error:
                self._seen.up = False
                if told:
                    self._note_trouble(error)
            except WardroundError as error:  # a damaged roster lets nobody in, a full disk starts nothing; what runs goes on, and the page says it
                self._note_trouble(error)
            else:
                self._trouble = ""
            await asyncio.sleep(TICK_SECONDS)

    def _note_trouble(self, error: WardroundError) -> None:
        """Say once what is wrong; where there is no room, that is the reason of the rest."""
        try:
            check_room(self._kit.state)
        except StorageError as full:
            error = full
        if self._trouble != (trouble := f"error {error.code}: {error}"):
            logger.error("%s", trouble)
        self._trouble = trouble

    def tick(self) -> None:
        """One look: who is registered and who should be, which studies are to start, which have ended.

        Raises:
            ConnectionFailedError: the SuperLink does not answer (yet).
            KitError, StorageError: the roster or a run's folder is damaged.
        """
        with self._lock:
            nodes = self._superlink.nodes()
            nodes = self._hold_to_roster(nodes)
            self._seen = _Seen(nodes={node.node_id: node for node in nodes}, up=True)
            active = self._superlink.active_runs()
            if not self._settled:
                self._settle(active)
            for run, submission in self._submissions.all().items():
                if submission.state in UNFINISHED:
                    self._advance(run, submission, active)

    def _hold_to_roster(self, nodes: list[Node]) -> list[Node]:
        """Register who is on the roster, and unregister who is not, or revoked.

        Who has only expired stays, and is asked nothing: Flower never registers a key again that was unregistered, and this one may be renewed.
        """
        kept = {node_key_pem(parse_node_key(site.node_key)) for site in self._roster.roster.sites if site.revoked is None}
        wanted = {node_key_pem(parse_node_key(site.node_key)): site for site in self._roster.active()}
        known = {node.public_key: node for node in nodes}
        changed = False
        for key, node in known.items():
            if key not in kept:
                self._superlink.unregister(node.node_id)
                self._audit.append("site unregistered", {"site": self._roster.name_of(node.node_id), "node": str(node.node_id)})
                changed = True
        ids = {site.node_key: known[key].node_id for key, site in wanted.items() if key in known}
        for key, site in wanted.items():
            if key not in known:
                ids[site.node_key] = self._superlink.register(key, site.name)
                self._audit.append("site registered", {"site": site.name, "node": str(ids[site.node_key])})
                changed = True
        self._roster.remember(ids)
        return self._superlink.nodes() if changed else nodes

    def _settle(self, active: set[int]) -> None:
        """Once: the SuperLink's runs of an earlier life are ended; their studies are started again from their checkpoints."""
        for flower_run in active:
            self._superlink.stop_run(flower_run)
        for run, submission in self._submissions.all().items():
            if submission.state in UNFINISHED:
                self._submissions.update(run, flower_run=None, state="queued")
        self._settled = True

    def _advance(self, run: str, submission: Submission, active: set[int]) -> None:
        if submission.flower_run in active:
            self._note_progress(run, submission)
            return
        ended = self._submissions.ended(run)
        if ended is not None:
            self._submissions.update(run, state=ended.state, error=ended.error, flower_run=None)
            self._audit.append("study finished", {"run": run, "how": ended.state})
            logger.info("%s: %s", run, ended.state)
        elif submission.attempts >= MAX_ATTEMPTS:
            failure = Failure(
                code="E100", what=f"its process ended {MAX_ATTEMPTS} times without a result", remedy="see superexec.log in the coordinator's state"
            )
            self._submissions.update(run, state="failed", error=failure, flower_run=None)
        else:
            self._submissions.update(run, flower_run=None)  # where that cannot be written, nothing is started, at this look or the next
            flower_run, self._checkpoints[run] = self._superlink.start_run(run), self._checkpoint(run)
            try:
                self._submissions.update(run, flower_run=flower_run, attempts=submission.attempts + 1)
            except WardroundError:  # one that nobody knows of would hold the run's lock
                self._superlink.stop_run(flower_run)
                raise
            self._audit.append("study started", {"run": run, "attempt": submission.attempts + 1})
            logger.info("%s: started", run)

    def _note_progress(self, run: str, submission: Submission) -> None:
        checkpoint = self._checkpoint(run)
        state: StudyState = "running" if checkpoint else "waiting for sites"
        has_progressed = checkpoint != self._checkpoints.get(run, checkpoint)
        attempts = min(submission.attempts, 1) if has_progressed else submission.attempts
        if (submission.state, submission.attempts) != (state, attempts):
            self._submissions.update(run, state=state, attempts=attempts)

    def _checkpoint(self, run: str) -> int:
        """When the run's last complete round was written, in nanoseconds; 0 where none was."""
        try:
            return (self._submissions.path(run) / "checkpoint" / "latest.safetensors").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    # What is shown -------------------------------------------------------------------------------------------------------------

    def status(self) -> CoordinatorStatus:
        """Everything at this moment."""
        roster, now = self._roster.roster, datetime.now(UTC)
        names = dict.fromkeys((*self._kit.federation.sites, *(site.name for site in roster.sites)))
        submissions = self._submissions.all()
        return CoordinatorStatus(
            federation=roster.federation,
            wardround=installed_version(),
            time=now,
            started=self._started,
            generation=roster.generation,
            quorum=self._kit.federation.quorum,
            sites=tuple(self._site_status(name, roster.sites, now) for name in names),
            studies=tuple(
                study_status(self._submissions.folder(run), item.state, submitted=item.submitted, error=item.error)
                for run, item in reversed(submissions.items())
            ),
            audit=AuditHead(head=self._audit.head, rows=self._audit.num_rows),
            warnings=tuple(self._warnings(now)),
        )

    def _site_status(self, name: str, sites: tuple[RosterSite, ...], now: datetime) -> SiteStatus:
        entries = [site for site in sites if site.name == name]
        if not entries:
            return SiteStatus(name=name, state="awaiting approval")
        site = next((entry for entry in entries if entry.is_active(now)), entries[-1])
        node = self._seen.nodes.get(self._roster.node_of(site) or 0)
        state: SiteState = "never seen" if node is None or node.last_contact is None else "online" if node.online else "offline"
        if not site.is_active(now):
            state = "revoked" if site.revoked is not None else "expired"
        return SiteStatus(
            name=name, state=state, last_contact=None if node is None else node.last_contact, expires=site.expires, declared_size=site.declared_size
        )

    def _warnings(self, now: datetime) -> list[str]:
        found = [] if self._seen.up else ["the SuperLink does not answer (yet): no site can connect"]
        found += [self._trouble] if self._trouble else []
        if read_certificate(self._kit.folder / SERVER_CERTIFICATE) != self._served:
            found.append(
                f"the server's certificate was renewed; until it is started again, the one until {self._served.not_valid_after_utc:%Y-%m-%d} is served"
            )
        soon = now + timedelta(days=self._kit.federation.certificates.warn_days)
        for what, end in (
            ("the server's certificate", read_certificate(self._kit.folder / SERVER_CERTIFICATE).not_valid_after_utc),
            *((f"the approval of site {site.name}", site.expires) for site in self._roster.active()),
        ):
            if end < soon:
                found.append(f"{what} expires on {end:%Y-%m-%d}: 'wardround renew'")
        return found


KEPT = ("LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "COVERAGE_PROCESS_START")


async def _serving(server: uvicorn.Server, at: socket.socket) -> None:
    """A uvicorn server; signals are ours to handle."""
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    await server.serve(sockets=[at])


async def _supervising(supervisor: Supervisor) -> None:
    while True:
        supervisor.poll()
        await asyncio.sleep(SUPERVISE_SECONDS)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Whether somebody listens on this port of loopback."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
