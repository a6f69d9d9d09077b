"""`wardround site start`: keeps a hospital's daemon and courier running, and ends them together."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from client.hospital import Hospital
from shared.files import storage_errors
from shared.supervision import Child, Supervisor, single_instance

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy")
DAEMON_LOG, COURIER_LOG = "daemon.log", "courier.log"  # in the site's state

logger = logging.getLogger(__name__)


def run_station(kit: Path, stop: threading.Event, *, daemon: tuple[str, ...] | None = None, ready: Callable[[], None] = lambda: None) -> None:
    """Keep the site of this kit running until `stop` is set.

    Args:
        daemon: for tests alone: another command than the daemon's.
        ready: called once both processes were started.

    Raises:
        KitError, ConfigurationError: the kit or site.toml does not fit.
        AlreadyRunningError: another process does so already.
    """
    hospital = Hospital.open(kit)
    with storage_errors(hospital.state, "make the site's state"):
        hospital.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with single_instance(hospital.state) as announce:
        supervisor = Supervisor(children(hospital, daemon), observe=_observe)
        supervisor.start()
        try:
            announce({})
            ready()
            supervisor.run_until(stop)
        finally:
            supervisor.stop()


def children(hospital: Hospital, daemon: tuple[str, ...] | None = None) -> list[Child]:
    """The two processes of a site."""
    environment = {**QUIET, **{key: os.environ[key] for key in KEPT if key in os.environ}}
    kit = str(hospital.kit.resolve())
    return [
        Child(
            name="daemon", command=daemon or (sys.executable, "-m", "client.daemon", kit), environment=environment, log=hospital.state / DAEMON_LOG
        ),
        Child(name="courier", command=(sys.executable, "-m", "client.courier", kit), environment=environment, log=hospital.state / COURIER_LOG),
    ]


def _observe(event: str, child: str, facts: Mapping[str, object]) -> None:
    logger.info("%s %s%s", child, event, "".join(f" {key}={value}" for key, value in facts.items()))
