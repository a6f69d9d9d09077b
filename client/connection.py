"""How the courier stands with the coordinator, as it says itself in `courier.json`, a file of the site's state.

The courier opens the file before it gives up its powers and keeps the descriptor: afterwards it could open none. What it writes is believed no
further than what is shown to people: it faces the network.
"""

import contextlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from shared.config import Settings
from shared.files import storage_errors

CONNECTION = "courier.json"  # in a site's state
SIZE = 1024  # bytes, filled up with spaces, so that one write replaces all
MAX_TEXT = 300


class Connection(Settings):
    """One courier process and its coordinator."""

    pid: int = Field(ge=1)
    since: AwareDatetime
    node: int | None = Field(default=None, description="Flower's number of this site, once the coordinator has let it in")
    problem: str | None = Field(default=None, max_length=MAX_TEXT, description="why the coordinator does not answer, or does not let it in")

    @property
    def connected(self) -> bool:
        """Let in, and answered when last asked."""
        return self.node is not None and self.problem is None


class ConnectionFile:
    """The courier's end: what it last told stands in the file.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, state: Path) -> None:
        with storage_errors(state / CONNECTION, "write", remedy="check free space and permissions of the state folder"):
            self._file = os.open(state / CONNECTION, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            os.fchmod(self._file, 0o600)
        self._lock = threading.Lock()
        self._said = Connection(pid=os.getpid(), since=datetime.now(UTC))
        self.tell()

    def tell(self, *, node: int | None = None, problem: str | None = None) -> None:
        """Say that this is so from now on; what was said already is not said again, and `node` once said stays."""
        with self._lock:
            known = self._said
            said = known.model_copy(
                update={"node": node if node is not None else known.node, "problem": None if problem is None else problem[:MAX_TEXT]}
            )
            if said != known:
                said = said.model_copy(update={"since": datetime.now(UTC)})
            self._said = said
            text = json.dumps(said.model_dump(mode="json"))
            with contextlib.suppress(OSError):  # a full disk must not end the courier
                os.pwrite(self._file, text.encode().ljust(SIZE), 0)


def read_connection(state: Path) -> Connection | None:
    """What the courier of this state folder told last, be it alive or not; None where there is nothing, or nothing sensible."""
    try:
        with open(state / CONNECTION, "rb") as file:
            return Connection.model_validate_json(file.read(2 * SIZE))
    except (OSError, ValidationError):
        return None
