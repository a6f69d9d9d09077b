"""A real SuperLink on loopback, as the coordinator starts it: who is registered is let in, with the right key and over TLS, and nobody else."""

import os
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.fleet import Fleet
from server.provisioning import renew, revoke
from server.service import QUIET, Service, free_port
from server.superlink import SuperLink
from shared.certificates import load_node_key, new_node_key, node_key_pem
from shared.errors import ConnectionFailedError, NodeRefusedError
from shared.files import write_secret
from shared.kit import CA_CERTIFICATE, NODE_KEY, SERVER_CERTIFICATE, SERVER_KEY
from tests.provisioned import federation, joined, opened, provisioned

pytestmark = pytest.mark.slow
HOSTS = ("127.0.0.1", "localhost")
SECONDS = 60.0


@dataclass
class Running:
    """A SuperLink."""

    link: SuperLink
    address: str
    ca: Path
    foreign_ca: Path

    def fleet(self, key: ec.EllipticCurvePrivateKey, *, ca: Path | None = None, stop: threading.Event | None = None) -> Fleet:
        """A site's connection."""
        return Fleet(self.address, ssl.create_default_context(cafile=str(ca or self.ca)), key, stop=stop or threading.Event())


@dataclass
class Registered:
    """A site that is let in."""

    number: int
    key: ec.EllipticCurvePrivateKey

    @property
    def public(self) -> bytes:
        return node_key_pem(self.key.public_key())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("superlink")
    for name in ("kits", "foreign"):
        provisioned(root / name, federation(sites=["north"], hosts=HOSTS))
    kit, port, secret = root / "kits" / "coordinator", free_port(), root / "secret"
    write_secret(secret, secrets.token_bytes(32))
    command = [
        sys.executable, "-m", "server.superlink_process", "--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(kit / CA_CERTIFICATE),
        "--ssl-certfile", str(kit / SERVER_CERTIFICATE), "--ssl-keyfile", str(kit / SERVER_KEY), "--enable-supernode-auth",
        "--database", str(root / "superlink.db"), "--isolation", "process", "--superexec-auth-secret-file", str(secret),
    ]  # fmt: skip
    environment = {**os.environ, **QUIET, "HOME": str(root), "FLWR_HOME": str(root / "flwr")}
    with open(root / "superlink.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    link = SuperLink(f"127.0.0.1:{port}", kit / CA_CERTIFICATE)
    try:
        deadline = time.monotonic() + SECONDS
        while not link.answers():
            assert process.poll() is None and time.monotonic() < deadline, (root / "superlink.log").read_text()[-2000:]
            threading.Event().wait(0.1)
        yield Running(link, f"127.0.0.1:{port}", kit / CA_CERTIFICATE, root / "foreign" / "coordinator" / CA_CERTIFICATE)
    finally:
        link.close()
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def site(running: Running) -> Iterator[Registered]:
    """A site with a fresh key is registered while a test runs."""
    key = new_node_key()
    number = running.link.register(node_key_pem(key.public_key()), "north")
    yield Registered(number, key)
    for node in running.link.nodes():
        running.link.unregister(node.node_id)


def refused(fleet: Fleet) -> None:
    with pytest.raises(NodeRefusedError, match="HTTP 4"), fleet.active():
        pass


def test_a_registered_site_is_known_and_let_in_with_its_key(running: Running, site: Registered) -> None:
    [known] = running.link.nodes()
    assert (known.node_id, known.public_key, known.online, known.last_contact) == (site.number, site.public, False, None)
    fleet = running.fleet(site.key)
    with fleet.active() as number:
        assert number == site.number
        assert fleet.receive() is None
        [known] = running.link.nodes()
        assert known.online
        assert known.last_contact is not None
        assert abs((datetime.now(UTC) - known.last_contact).total_seconds()) < 30
    assert not running.link.nodes()[0].online


def test_two_sites_with_one_key_are_not_registered(running: Running, site: Registered) -> None:
    with pytest.raises(ConnectionFailedError):
        running.link.register(site.public, "south")
    assert [item.node_id for item in running.link.nodes()] == [site.number]


def test_a_second_life_of_a_site_that_is_online_is_refused(running: Running, site: Registered) -> None:
    with running.fleet(site.key).active():
        refused(running.fleet(site.key))
        assert running.link.nodes()[0].online


def test_a_key_that_nobody_registered_is_refused(running: Running, site: Registered) -> None:
    refused(running.fleet(new_node_key()))
    assert not running.link.nodes()[0].online


def test_who_claims_a_registered_key_without_having_it_is_refused(running: Running, site: Registered) -> None:
    fleet = running.fleet(new_node_key())
    fleet._public_key = public_key_to_bytes(site.key.public_key())  # what it says; what it signs with is another
    refused(fleet)
    assert not running.link.nodes()[0].online


def test_an_unregistered_site_is_out_at_its_next_question(running: Running, site: Registered) -> None:
    fleet = running.fleet(site.key)
    with fleet.active():
        running.link.unregister(site.number)
        assert running.link.nodes() == []
        with pytest.raises(NodeRefusedError):
            fleet.receive()
    refused(running.fleet(site.key))


def test_a_key_that_was_unregistered_never_comes_back_and_a_name_does(running: Running, site: Registered) -> None:
    running.link.unregister(site.number)
    with pytest.raises(ConnectionFailedError):  # why the coordinator unregisters what was revoked, and not what may be renewed
        running.link.register(site.public, "north")
    new = node_key_pem(new_node_key().public_key())
    number = running.link.register(new, "north")
    assert number != site.number
    assert [item.public_key for item in running.link.nodes()] == [new]


@pytest.mark.parametrize("path", ["/", "/v1/fleet/activate-node", "/v1/control/list-nodes"])
def test_plain_http_is_refused(running: Running, path: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://{running.address}{path}", content=b"", trust_env=False, timeout=10)
    assert running.link.answers()


def test_a_server_of_another_ca_is_not_spoken_to(running: Running, site: Registered) -> None:
    stop, problems = threading.Event(), []
    fleet = running.fleet(site.key, ca=running.foreign_ca, stop=stop)
    call = fleet._client.ActivateNode

    def once(request: object) -> object:
        stop.set()  # else it would try again for ever
        try:
            return call(request)
        except httpx.TransportError as error:
            problems.append(str(error))
            raise

    fleet._client.ActivateNode = once
    with pytest.raises(ConnectionFailedError, match="ConnectError"), fleet.active():
        pass
    assert "CERTIFICATE_VERIFY_FAILED" in problems[0]
    with pytest.raises(ConnectionFailedError):
        SuperLink(running.address, running.foreign_ca).nodes()


def test_no_run_is_active_and_stopping_one_that_is_none_is_nothing(running: Running) -> None:
    assert running.link.active_runs() == set()
    running.link.stop_run(123456)


def test_a_superlink_that_is_not_there_is_said(running: Running) -> None:
    absent = SuperLink(f"127.0.0.1:{free_port()}", running.ca)
    assert not absent.answers()
    with pytest.raises(ConnectionFailedError, match="superlink.log"):
        absent.active_runs()
    absent.close()


def test_the_coordinator_holds_it_to_the_roster_and_a_renewed_site_comes_back(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file, now = tmp_path / "kits", federation(hosts=HOSTS, site_days=1), datetime.now(UTC)
    provisioned(out, file)
    provisioned(out, file, requests=[joined(out, name, tmp_path / name) for name in ("north", "south")])
    service = Service(out / "coordinator")
    service._superlink.close()
    monkeypatch.setattr(service, "_superlink", running.link)
    keys = {name: node_key_pem(load_node_key(tmp_path / name / NODE_KEY).public_key()) for name in ("north", "south")}

    def numbers() -> dict[str, int]:
        service.tick()
        found = {node.public_key: node.node_id for node in running.link.nodes()}
        return {name: found[key] for name, key in keys.items() if key in found}

    before = numbers()
    assert before.keys() == {"north", "south"}
    with opened(out, file, now=now - timedelta(days=2)) as consortium:
        renew(consortium, names=["south"])  # until yesterday
    assert service._roster.expected() == {"north"}
    assert numbers() == before  # it may still say that it is there
    assert service._roster.site_of(before["south"]) is None  # and is asked nothing
    with opened(out, file) as consortium:
        renew(consortium, names=["south"])
    assert numbers() == before
    assert service._roster.expected() == {"north", "south"}
    with opened(out, file) as consortium:
        revoke(consortium, "north")
    assert numbers().keys() == {"south"}
    for node in running.link.nodes():
        running.link.unregister(node.node_id)
