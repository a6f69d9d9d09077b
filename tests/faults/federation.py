"""A whole federation on loopback, of real processes over real TLS, for tests that break it."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np

from client.kit import SiteAnswers, init_site
from server.control import SubmitRequest, ask_coordinator
from server.federation_file import FederationFile
from server.provisioning import open_consortium, provision, revoke
from server.status import CoordinatorStatus
from server.submissions import Submission, Submissions
from shared.kit import REQUEST, SITE_FILE, SiteRequest
from shared.results import RoundRecord
from shared.study import Study

PASSPHRASE = "a passphrase for tests"
PROCESSES = Path(__file__).with_name("processes.py")
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")  # names that the task's files have
NUM_PATIENTS = 160
PATIENCE = 3  # how much slower a busy machine may be than what each wait allows for; a wait ends as soon as it may

T = TypeVar("T")

STUDY = {
    "name": "faults", "task": "heart-disease", "seed": 7, "purpose": "a test",
    "rounds": {"count": 4, "deadline": "60s", "require": 2},
    "training": {"learning_rate": 0.5, "batch_size": 32},
    "privacy": {"epsilon": 3.0, "delta": 1e-4, "noise_source": "os", "spare_rounds": 2},
    "evaluation": {"bootstrap": 0},
}  # fmt: skip


def study(**changes: object) -> Study:
    """The small study of these tests, changed."""
    return Study.from_table(STUDY).replace(**changes)


class Federation:
    """A coordinator and sites in `root`, provisioned and approved in advance, not yet started."""

    def __init__(self, root: Path, sites: Iterable[str] = HOSPITALS[:3], *, seed: int | None = None, max_epsilon: float = 1000.0) -> None:
        self.root = root
        self.sites = tuple(sites)
        self.seed = seed
        self._max_epsilon = max_epsilon
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        port, page_port = free_ports(2)
        table = {
            "name": "faults",
            "sites": self.sites,
            "coordinator": {"hosts": ["localhost", "127.0.0.1"], "listen": "127.0.0.1", "port": port, "page_port": page_port},
        }
        self.file = FederationFile.model_validate(table)
        self.kits = root / "kits"
        with open_consortium(self.file, self.kits, passphrase=PASSPHRASE) as consortium:
            provision(consortium)
        requests = [self._take_up(site) for site in self.sites]
        with open_consortium(self.file, self.kits, passphrase=PASSPHRASE) as consortium:
            provision(consortium, requests=requests)
        self.coordinator = self.kits / "coordinator"

    @property
    def port(self) -> int:
        """The front door's."""
        return self.file.coordinator.port

    def kit(self, site: str) -> Path:
        """A site's folder."""
        return self.kits / "sites" / site

    @property
    def submissions(self) -> Submissions:
        """The coordinator's studies."""
        return Submissions(self.coordinator / "runs")

    def _take_up(self, site: str) -> SiteRequest:
        data = self.root / "data" / f"processed.{site}.data"
        data.parent.mkdir(exist_ok=True)
        data.write_text(hospital_rows(site))
        answers = SiteAnswers(data=data, task="heart-disease", declared_size=100, declared_test_size=50, epsilon=self._max_epsilon)
        init_site(self.kit(site), answers)
        advance = f'\n[approve_in_advance]\ntasks = ["heart-disease"]\nmax_epsilon = 100.0\nuntil = {date.today() + timedelta(days=30)}\n'
        path = self.kit(site) / SITE_FILE
        path.write_text(path.read_text().replace("exact_metrics = false", "exact_metrics = true") + advance)
        return SiteRequest.read(self.kit(site) / REQUEST)

    # Processes ------------------------------------------------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        """Start it and wait until sites can connect."""
        self._start("coordinator", self.coordinator)
        self.wait(lambda: not self.status().warnings, "the coordinator is up", 60)

    def start_site(self, site: str, **environment: str) -> None:
        """Start it and wait until it is online."""
        self._start(site, self.kit(site), *([] if self.seed is None else [str(self.seed)]), **environment)
        self.wait(lambda: self.site_state(site) == "online", f"{site} is online", 90)

    def start(self, **environments: dict[str, str]) -> None:
        """Start everything, some sites with variables of their own."""
        self.start_coordinator()
        for site in self.sites:
            self._start(site, self.kit(site), *([] if self.seed is None else [str(self.seed)]), **environments.get(site, {}))
        for site in self.sites:
            self.wait(lambda: self.site_state(site) == "online", f"{site} is online", 90)  # noqa: B023  # called at once

    def _start(self, name: str, kit: Path, *arguments: str, **environment: str) -> None:
        with open(self.root / f"{name}.log", "ab") as log:
            role = "coordinator" if name == "coordinator" else "site"
            command = [sys.executable, str(PROCESSES), role, str(kit), *arguments]
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "HOME": str(self.root), **environment}
            )

    def kill(self, name: str) -> None:
        """SIGKILL to the whole of a site or the coordinator: its supervisor, and with it all its children."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> int:
        """SIGTERM, and its exit code."""
        process = self._running.pop(name)
        process.terminate()
        return process.wait(timeout=60)

    def close(self) -> None:
        """End everything that was started, by its id."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def pid(self, name: str) -> int:
        """The supervisor's of a site or the coordinator."""
        return self._running[name].pid

    def child_of(self, name: str, part: str) -> int:
        """The pid of a process of a site or the coordinator, by a part of its command line."""
        return self.wait(lambda: next(iter(_children(self._running[name].pid, part)), None), f"{part} of {name} runs", 30)

    # Studies --------------------------------------------------------------------------------------------------------------------

    def submit(self, asked: Study) -> str:
        """The name of a new run."""
        return ask_coordinator(self.coordinator / "state", "/studies", SubmitRequest(study=asked.to_table(), token=secrets.token_urlsafe(16)))

    def ask(self, run: str, verb: str) -> None:
        """Stop or resume a run."""
        ask_coordinator(self.coordinator / "state", f"/studies/{run}/{verb}")

    def submission(self, run: str) -> Submission:
        """How far a run is."""
        return self.submissions.get(run)

    def finished(self, run: str, state: str = "completed", seconds: float = 120) -> Submission:
        """A run once it has ended, in the state expected."""
        self.wait(lambda: self.submission(run).state not in ("queued", "waiting for sites", "running"), f"{run} has ended", seconds)
        found = self.submission(run)
        assert found.state == state, (found, self.log(run))
        return found

    def rounds(self, run: str) -> list[RoundRecord]:
        """The complete rounds of a run."""
        return self.submissions.folder(run).rounds()

    def reached(self, run: str, number: int, seconds: float = 90) -> list[RoundRecord]:
        """The rounds of a run once there are so many."""
        return self.wait(lambda: found if len(found := self.rounds(run)) >= number else None, f"round {number} of {run}", seconds)

    def log(self, run: str) -> str:
        """What the run's own log says."""
        path = self.submissions.path(run) / "log.jsonl"
        return path.read_text() if path.exists() else ""

    def status_of(self, run: str, number: int, site: str) -> tuple[str, str | None]:
        """A site's status and reason in a round."""
        [found] = [item for item in self.rounds(run)[number - 1].sites if item.name == site]
        return found.status, found.reason

    def model(self, run: str) -> bytes:
        """The final model."""
        return (self.submissions.path(run) / "model" / "final.safetensors").read_bytes()

    def status(self) -> CoordinatorStatus:
        """What the coordinator says of itself; raises OSError until it answers."""
        response = httpx.get(f"http://127.0.0.1:{self.file.coordinator.page_port}/status.json", trust_env=False, timeout=10)
        return CoordinatorStatus.model_validate_json(response.raise_for_status().content)

    def site_state(self, site: str) -> str:
        """As the coordinator sees it."""
        return next(item.state for item in self.status().sites if item.name == site)

    def audit(self, owner: str) -> list[dict[str, object]]:
        """The rows of a site's or the coordinator's audit log."""
        folder = self.coordinator if owner == "coordinator" else self.kit(owner)
        return [json.loads(line) for line in (folder / "state" / "audit.jsonl").read_text().splitlines()]

    def revoke(self, site: str) -> None:
        """What `wardround revoke` does."""
        with open_consortium(self.file, self.kits, passphrase=PASSPHRASE) as consortium:
            revoke(consortium, site)

    def wait(self, look: Callable[[], T | None], what: str, seconds: float) -> T:
        """What `look` gives, once it gives something; not longer than `seconds` and `PATIENCE` allow, and not when a process of ours has died."""
        deadline = time.monotonic() + PATIENCE * seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, OSError):
                if found := look():
                    return found
            for name, process in self._running.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}: {(self.root / f'{name}.log').read_text()[-3000:]}"
            time.sleep(0.1)
        tails = "\n".join(f"--- {path}\n{path.read_text()[-1500:]}" for path in sorted(self.root.rglob("*.log")))
        raise AssertionError(f"waited {PATIENCE * seconds} s in vain until {what}\n{tails}")


def hospital_rows(site: str) -> str:
    """Synthetic rows in the task's file format: age and exercise decide, with noise; the last column is the diagnosis."""
    rng = np.random.default_rng(HOSPITALS.index(site))
    lines = []
    for index in range(NUM_PATIENTS):
        age, angina = int(rng.integers(30, 78)), int(rng.integers(0, 2))
        ill = int(age + 15 * angina + rng.normal(0, 8) > 60)
        lines.append(f"{age},{index % 2},{1 + index % 4},{int(rng.integers(95, 190))},{int(rng.integers(120, 380))},{index % 2},{index % 3},"
                     f"{int(rng.integers(80, 190))},{angina},{rng.uniform(0, 4):.1f},?,?,?,{ill}")  # fmt: skip
    return "\n".join(lines) + "\n"


def free_ports(count: int) -> list[int]:
    """So many different free ports of loopback."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _children(parent: int, part: str) -> list[int]:
    """The pids below `parent` whose command line holds `part`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent and part in (path.parent / "cmdline").read_text():
                found.append(int(path.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """It and everybody below."""
    return [pid, *(found for child in _children(pid, "") for found in descendants(child))]
