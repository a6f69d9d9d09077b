"""What happens at a running coordinator, as events: the difference between two of its statuses, and the ends of its processes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import AwareDatetime

from server.status import CoordinatorStatus, Failure, SiteState, StudyState
from shared.errors import WardroundError
from shared.results import Record
from wardround.deployed_runs import FINISHED

LOOK_SECONDS, MOST_LOAD = 1.0, 0.1  # between two looks, and the share of the time that looking may take
STOP_SECONDS = 5.0
SERVICE = "server.service"


class Starting(Record):
    """The processes are about to be started."""

    event: Literal["starting"] = "starting"
    federation: str
    kit: str


class Ready(Record):
    """Sites can connect."""

    event: Literal["ready"] = "ready"
    address: str
    page: str
    num_sites: int
    seconds: float


class SiteChanged(Record):
    """A site came, went, was approved, revoked or expired."""

    event: Literal["site"] = "site"
    site: str
    state: SiteState
    last_contact: AwareDatetime | None = None


class StudyChanged(Record):
    """A study was submitted, goes on or has ended."""

    event: Literal["study"] = "study"
    run: str
    state: StudyState
    round: int
    rounds: int
    error: Failure | None = None


class Warned(Record):
    """Something that somebody should see to."""

    event: Literal["warning"] = "warning"
    text: str


class ProcessEnded(Record):
    """One of the coordinator's processes ended, and is started again."""

    event: Literal["process"] = "process"
    process: str
    status: str


class Stopped(Record):
    """The coordinator ended in order."""

    event: Literal["stopped"] = "stopped"


Happening = Starting | Ready | SiteChanged | StudyChanged | Warned | ProcessEnded | Stopped


def changes(before: CoordinatorStatus | None, after: CoordinatorStatus) -> list[Happening]:
    """What happened between two looks. At the first: warnings, sites that are there, and studies that go on."""
    events: list[Happening] = []
    known = set(before.warnings) if before is not None else set()
    events += [Warned(text=text) for text in after.warnings if text not in known]
    seen = after if before is None else before
    sites: dict[str, SiteState] = {site.name: site.state for site in seen.sites if before is not None or site.state != "online"}
    studies: dict[str, StudyState] = {study.run: study.state for study in seen.studies if before is not None or study.state in FINISHED}
    for site in after.sites:
        if site.state != sites.get(site.name):
            events.append(SiteChanged(site=site.name, state=site.state, last_contact=site.last_contact))
    for study in reversed(after.studies):  # the oldest first
        if study.state != studies.get(study.run):
            events.append(StudyChanged(run=study.run, state=study.state, round=study.round, rounds=study.rounds, error=study.error))
    return events


class Attendant:
    """Looks at a coordinator from a thread of its own, and tells what happens.

    Args:
        look: gives the status now.
        tell: called with every event, from that thread.
        pause_seconds: between two looks, or longer where looking takes long.
    """

    def __init__(self, look: Callable[[], CoordinatorStatus], tell: Callable[[Happening], None], *, pause_seconds: float = LOOK_SECONDS) -> None:
        self._pause_seconds = pause_seconds
        self._look = look
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="attendant", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """No event is told after this."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def _attend(self) -> None:
        before: CoordinatorStatus | None = None
        failing = ""
        wait_seconds = 0.0
        while not self._stop.wait(wait_seconds):
            began = time.monotonic()
            try:
                after = self._look()
            except WardroundError as error:  # a damaged roster or submission: said once, and what runs goes on
                if str(error) != failing:
                    failing = str(error)
                    self._tell(Warned(text=failing))
            else:
                for event in changes(before, after):
                    self._tell(event)
                before, failing = after, ""
            wait_seconds = max(self._pause_seconds, (time.monotonic() - began) / MOST_LOAD)


class ProcessLog(logging.Handler):
    """Tells of processes that ended, and of the service's warnings."""

    def __init__(self, tell: Callable[[Happening], None]) -> None:
        super().__init__(level=logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of `server.service`."""
        for event in _of_log(record):
            self._tell(event)


def _of_log(record: logging.LogRecord) -> Iterator[Happening]:
    if record.levelno >= logging.WARNING:
        yield Warned(text=record.getMessage())
    elif isinstance(record.args, tuple) and len(record.args) == 3 and record.args[1] == "exited":
        process, _, facts = record.args
        yield ProcessEnded(process=str(process), status=str(facts).strip())
