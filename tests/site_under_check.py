"""A provisioned site with a cohort, and a real TLS server that tells what a coordinator's front door would; for tests of checks and commands."""

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from client.kit import SiteAnswers, init_site
from server.federation_file import FederationFile
from shared.kit import SERVER_CERTIFICATE, SERVER_KEY, SITE_FILE, installed_version
from tests.provisioned import provisioned

SITE = "north"
NUM_PATIENTS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUnderCheck:
    """A federation's folder, with one site that has taken up its kit and not been approved."""

    out: Path
    port: int

    @property
    def kit(self) -> Path:
        """The site's."""
        return self.out / "sites" / SITE

    @property
    def coordinator(self) -> Path:
        """The coordinator's kit."""
        return self.out / "coordinator"

    @property
    def state(self) -> Path:
        """The site's; made where it is not there."""
        state = self.kit / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        return state

    def change(self, old: str, new: str) -> None:
        """Another word in site.toml."""
        path = self.kit / SITE_FILE
        text = path.read_text()
        assert text.count(old) == 1, (old, text)
        path.write_text(text.replace(old, new))


def make_site(
    root: Path, port: int, *, host: str = "localhost", now: datetime | None = None, page_port: int = 1, listen: str = "127.0.0.1", **days: int
) -> SiteUnderCheck:
    """A federation in `root` whose coordinator is at this port, and its one site."""
    coordinator = {"hosts": [host], "port": port, "page_port": page_port, "listen": listen}
    file = FederationFile.model_validate({"name": "tests", "sites": [SITE], "coordinator": coordinator, "certificates": days})
    provisioned(root / "kits", file, now=now)
    site = SiteUnderCheck(out=root / "kits", port=port)
    data = root / "processed.va.data"
    data.write_text(heart_rows(NUM_PATIENTS))
    answers = SiteAnswers(data=data, task="heart-disease", declared_size=112, declared_test_size=48, epsilon=10.0)
    init_site(site.kit, answers, now=now)
    return site


def heart_rows(number: int) -> str:
    """Synthetic rows in the file format of the task heart-disease."""
    rng = np.random.default_rng(3)
    lines = []
    for index in range(number):
        age, angina = int(rng.integers(30, 78)), int(rng.integers(0, 2))
        ill = int(age + 15 * angina + rng.normal(0, 8) > 60)
        lines.append(f"{age},{index % 2},{1 + index % 4},{int(rng.integers(95, 190))},{int(rng.integers(120, 380))},{index % 2},{index % 3},"
                     f"{int(rng.integers(80, 190))},{angina},{rng.uniform(0, 4):.1f},?,?,?,{ill}")  # fmt: skip
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the door says at /health; the clock is `ahead` of ours."""

    status: str = "ok"
    version: str = field(default_factory=installed_version)
    ahead: timedelta | None = timedelta(0)

    def body(self) -> bytes:
        """As JSON."""
        told = {"status": self.status, "wardround": self.version}
        if self.ahead is not None:
            told["time"] = (datetime.now(UTC) + self.ahead).isoformat()
        return json.dumps(told).encode()


@contextlib.contextmanager
def door(site: SiteUnderCheck, told: Told | bytes | None = None, *, folder: Path | None = None, plain: bool = False) -> Iterator[None]:
    """A server at the coordinator's port that answers /health, and 404 to all else.

    Args:
        told: what it says; bytes are said as they are.
        folder: the coordinator's kit whose certificate it has; the site's own coordinator's by default.
        plain: HTTP without TLS.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = told if isinstance(told, bytes) else (told or Told()).body()
            self._say(200 if self.path == "/health" else 404, body)

        def do_POST(self) -> None:
            self._say(404, b"")

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that does not trust us hangs up

    server = Server(("127.0.0.2" if _host(site) == "127.0.0.2" else "127.0.0.1", site.port), Handler)
    if not plain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        kit = folder or site.coordinator
        context.load_cert_chain(kit / SERVER_CERTIFICATE, kit / SERVER_KEY)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _host(site: SiteUnderCheck) -> str:
    kit: Mapping[str, Mapping[str, list[str]]] = json.loads((site.kit / "kit.json").read_text())
    return kit["coordinator"]["hosts"][0]
