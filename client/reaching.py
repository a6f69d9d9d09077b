"""Can this site reach its coordinator, and is it the right one? One check for every step of the way: clock, name, port, proxy, TLS, version, node.

Everything goes the way the courier goes: HTTPS from here, through a proxy where the environment names one, trusting the consortium's CA alone.
"""

import contextlib
import json
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from cryptography import x509

from client.connection import Connection, read_connection
from client.findings import Finding, NotLookedAtError, failed, passed, warned
from shared.certificates import load_node_key, read_certificate
from shared.errors import ConnectionFailedError, NodeRefusedError, VersionMismatchError
from shared.kit import CA_CERTIFICATE, NODE_KEY, REQUEST, KitManifest, installed_version
from shared.supervision import read_instance

TIMEOUT_SECONDS, NODE_SECONDS = 8.0, 15.0
MAX_HEALTH_BYTES = 10_000
WARN_SKEW_SECONDS, MAX_SKEW_SECONDS = 60.0, 300.0  # beyond the second Flower lets a node in no more
EXPIRES_SOON = timedelta(days=30)
_NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a clock that is off must not hide that it is
SET_CLOCK = "set this machine's clock, best by NTP: 'timedatectl set-ntp true'"
NETWORK = "ask your network people for an outbound way to this host and port, or set HTTPS_PROXY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the coordinator's front door told at `/health`."""

    status: str
    version: str
    skew_seconds: float | None  # how far its clock is ahead of ours; None: it does not tell its time
    certificate: x509.Certificate
    protocol: str  # of TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """Where a kit says that the coordinator is."""

    host: str
    port: int
    kit: Path

    @classmethod
    def of(cls, manifest: KitManifest, kit: Path) -> "Coordinator":
        """The one that this kit names."""
        return cls(host=manifest.coordinator.hosts[0], port=manifest.coordinator.port, kit=kit)

    @property
    def address(self) -> str:
        """host:port, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def proxy(self) -> str | None:
        """The proxy on the way there, without its password; None where there is none."""
        found = urllib.request.getproxies()
        proxy = found.get("https") or found.get("all")
        if not proxy or urllib.request.proxy_bypass(self.host):
            return None
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return f"{parts.hostname}:{parts.port or 3128}"

    def trust(self) -> ssl.SSLContext:
        """Trusts the kit's CA, and nobody else.

        Raises:
            KitError: it cannot be read.
        """
        read_certificate(self.kit / CA_CERTIFICATE)
        return ssl.create_default_context(cafile=str(self.kit / CA_CERTIFICATE))


def ask_health(coordinator: Coordinator, *, check_dates: bool = True) -> Health:
    """What the coordinator tells of itself, over TLS that is verified by CA and name, and where `check_dates`, by its dates.

    Raises:
        ConnectionFailedError: it cannot be reached, or is not the coordinator; it says where on the way.
        KitError: the CA's certificate cannot be read.
    """
    context = coordinator.trust()
    if not check_dates:
        context.verify_flags |= _NO_CHECK_TIME
    url, before = f"https://{coordinator.address}/health", time.time()
    try:
        with httpx.Client(verify=context, timeout=TIMEOUT_SECONDS) as client, client.stream("GET", url) as response:
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            certificate, protocol = x509.load_der_x509_certificate(tls.getpeercert(True)), str(tls.version())
            content = next(response.iter_bytes(MAX_HEALTH_BYTES), b"")
    except httpx.HTTPError as error:
        raise _unreachable(coordinator, error) from error
    told, halfway = _told(content), (before + time.time()) / 2
    if told is None:
        raise ConnectionFailedError(
            f"{coordinator.address}: expected the coordinator's front door, got another server (HTTP {response.status_code})",
            "compare host and port in kit.json with the coordinator",
        )
    return Health(
        status=told["status"],
        version=told["wardround"],
        skew_seconds=_moment(told.get("time"), halfway),
        certificate=certificate,
        protocol=protocol,
    )


def check_version(health: Health) -> None:
    """Return where both sides run the same version.

    Raises:
        VersionMismatchError: they do not; both are named.
    """
    if health.version != installed_version():
        raise VersionMismatchError(
            f"expected the same wardround at both sides, got {health.version} at the coordinator and {installed_version()} here",
            "install the same version at both sides",
        )


def preflight(coordinator: Coordinator, manifest: KitManifest) -> list[str]:
    """What to warn of before a site starts; a coordinator that does not answer is among it, for it may come later.

    Raises:
        VersionMismatchError: it answers, with another version.
    """
    problem, health = "", None
    try:
        health = ask_health(coordinator, check_dates=False)
        check_version(health)
        problem = "" if health.status == "ok" else "the coordinator's door is open, but its SuperLink is not up yet"
    except ConnectionFailedError as error:
        problem = f"{error.what}: tried again until it does; {error.remedy}"
    found = [*certificates(manifest, coordinator.kit, health), *(clock(health) if health is not None and health.skew_seconds is not None else ())]
    return [*([problem] if problem else []), *(f"{finding.what}; {finding.fix}" for finding in found if finding.level != "PASS")]


# Checks -------------------------------------------------------------------------------------------------------------------------


def clock(health: Health) -> Iterator[Finding]:
    """The clocks of both sides agree."""
    skew = health.skew_seconds
    if skew is None:
        yield warned("not compared: the coordinator does not tell its time", "let it install the same version of wardround")
        return
    side = "behind" if skew > 0 else "ahead of"
    if abs(skew) > MAX_SKEW_SECONDS:
        yield failed(f"{abs(skew) / 60:.0f} minutes {side} the coordinator's: Flower lets in nobody beyond 5", SET_CLOCK, exit_code=4)
    elif abs(skew) > WARN_SKEW_SECONDS:
        yield warned(f"{abs(skew):.0f} s {side} the coordinator's: beyond 5 minutes Flower lets nobody in", SET_CLOCK)
    else:
        yield passed(f"within {max(abs(skew), 0.1):.1f} s of the coordinator's")


def certificates(manifest: KitManifest, kit: Path, health: Health | None, *, now: datetime | None = None) -> Iterator[Finding]:
    """Kit, CA and the coordinator's server certificate are in date, and will be for a while."""
    now = now or datetime.now(UTC)
    ends = [("kit", None, manifest.expires), ("CA", *_dates(read_certificate(kit / CA_CERTIFICATE)))]
    if health is not None:
        ends.append(("coordinator's certificate", *_dates(health.certificate)))
    asks, fine = "ask the coordinator to run 'wardround renew', and for the new kit", True
    for what, start, end in ends:
        if end <= now:
            yield failed(f"{what} expired on {end:%Y-%m-%d}", asks, exit_code=4)
        elif start is not None and start > now:
            yield failed(f"{what} is valid only from {start:%Y-%m-%d %H:%M} UTC on", SET_CLOCK, exit_code=4)
        elif end - now < EXPIRES_SOON:
            yield warned(f"{what} expires on {end:%Y-%m-%d}", asks)
        fine = fine and end - now >= EXPIRES_SOON and (start is None or start <= now)
    if fine:
        yield passed("; ".join(f"{what} until {end:%Y-%m-%d}" for what, _, end in ends))


def _dates(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def name(coordinator: Coordinator) -> Iterator[Finding]:
    """The coordinator's name, or the proxy's, has an address."""
    host = coordinator.host if coordinator.proxy is None else coordinator.proxy.rpartition(":")[0]
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        yield failed(
            f"{host}: no address for this name ({error.strerror})", "ask your network people, or the coordinator for another host", exit_code=4
        )
        return
    yield passed(f"{host}{' (the proxy)' if coordinator.proxy else ''} is {', '.join(found)}")


def port(coordinator: Coordinator) -> Iterator[Finding]:
    """Somebody listens at the coordinator's port, or the proxy's."""
    proxy = coordinator.proxy
    host, number = (coordinator.host, coordinator.port) if proxy is None else (proxy.rpartition(":")[0], int(proxy.rpartition(":")[2]))
    try:
        with contextlib.closing(socket.create_connection((host, number), timeout=TIMEOUT_SECONDS)):
            yield passed(f"{host}:{number} answers")
    except OSError as error:
        yield failed(f"{host}:{number}: no connection ({error.strerror or type(error).__name__})", f"is it up? Else {NETWORK}", exit_code=4)


def proxy(coordinator: Coordinator, health: Health | None) -> Iterator[Finding]:
    """Where the environment names a proxy, it lets us through."""
    if coordinator.proxy is None:
        yield passed("none: HTTPS_PROXY is not set for this host")
    elif health is not None:
        yield passed(f"through {coordinator.proxy}, as HTTPS_PROXY says")
    else:
        yield failed(
            f"HTTPS_PROXY names {coordinator.proxy}, and nothing came through it",
            f"let it pass CONNECT {coordinator.address}, or name the host in NO_PROXY",
            exit_code=4,
        )


def tls(coordinator: Coordinator) -> Iterator[Finding]:
    """A real handshake: the consortium's CA, the right name, in date."""
    health = ask_health(coordinator)
    yield passed(f"{health.protocol}, certificate of this consortium's CA for {coordinator.host}")
    if health.status != "ok":
        yield warned("the coordinator's door is open, but its SuperLink is not up yet", "wait, and check again")


def version(health: Health) -> Iterator[Finding]:
    """The same wardround at both sides."""
    check_version(health)
    yield passed(f"wardround {health.version} at both sides")


def node(coordinator: Coordinator, state: Path, *, was_let_in: bool) -> Iterator[Finding]:
    """The coordinator lets this site's node in. A site that runs is asked how it stands; for one that does not, the node comes and goes at once."""
    if read_instance(state) is not None:
        yield _as_it_runs(coordinator, read_connection(state), was_let_in=was_let_in)
        return
    try:
        number = _come_and_go(coordinator)
    except NodeRefusedError as error:
        yield _not_let_in(coordinator, error.what, was_let_in=was_let_in)
        return
    yield passed(f"let in, as node {number}")


def _as_it_runs(coordinator: Coordinator, connection: Connection | None, *, was_let_in: bool) -> Finding:
    if connection is None or (connection.node is None and connection.problem is None):
        return warned("the site runs and is not connected yet", "wait, and check again")
    if connection.problem is not None and connection.problem.startswith(NodeRefusedError.code):
        return _not_let_in(coordinator, connection.problem, was_let_in=was_let_in)
    if connection.problem is not None:
        return failed(f"the site runs, and its coordinator does not answer: {connection.problem}", "is the coordinator up?", exit_code=4)
    return passed(f"let in, as node {connection.node}: the site runs, since {connection.since:%Y-%m-%d %H:%M} UTC")


def _not_let_in(coordinator: Coordinator, what: str, *, was_let_in: bool) -> Finding:
    if was_let_in:
        return failed(
            f"let in no more: {what}", "after a crash wait 20 seconds; else ask the coordinator: was this site revoked, has it expired?", exit_code=4
        )
    return warned(f"not approved yet: {what}", f"send {coordinator.kit / REQUEST} to the coordinator, and compare the fingerprint over the phone")


def _come_and_go(coordinator: Coordinator) -> int:
    """The number of this site's node, which is online for a moment.

    Raises:
        NodeRefusedError, ConnectionFailedError, KitError: it could not be.
    """
    from client.fleet import Fleet  # flwr takes a while

    stop = threading.Event()
    giving_up = threading.Timer(NODE_SECONDS, stop.set)
    giving_up.start()
    try:
        key = load_node_key(coordinator.kit / NODE_KEY)
        with Fleet(coordinator.address, coordinator.trust(), key, stop=stop).active() as number:
            return number
    finally:
        giving_up.cancel()
        stop.set()


# What came back ------------------------------------------------------------------------------------------------------------------


def _told(content: bytes) -> dict[str, str] | None:
    """The texts of a front door's health, or None."""
    try:
        told = json.loads(content)
    except ValueError:
        return None
    texts = {key: value for key, value in told.items() if isinstance(value, str)} if isinstance(told, dict) else {}
    return texts if {"status", "wardround"} <= set(texts) else None


def _moment(text: str | None, ours: float) -> float | None:
    try:
        told = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return told.timestamp() - ours if told.tzinfo is not None else None


def _unreachable(coordinator: Coordinator, error: httpx.HTTPError) -> ConnectionFailedError:
    """Why, as the deepest cause says it."""
    causes = list(_causes(error))
    verification = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if verification is not None:
        return ConnectionFailedError(
            f"{coordinator.address}: its certificate does not verify: {verification.verify_message.rstrip('.')}",
            _certificate_remedy(verification.verify_message),
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return ConnectionFailedError(
            f"{coordinator.address}: no TLS there", "is it the coordinator's port, or does something in between answer in its place?"
        )
    if isinstance(error, httpx.ProxyError):
        return ConnectionFailedError(f"proxy {coordinator.proxy}: it lets nothing through ({error})", f"let it pass CONNECT {coordinator.address}")
    reason = next((cause.strerror for cause in reversed(causes) if isinstance(cause, OSError) and cause.strerror), type(error).__name__)
    return ConnectionFailedError(f"{coordinator.address}: no answer ({reason})", f"is the coordinator up? Else {NETWORK}")


def _certificate_remedy(message: str) -> str:
    if "expired" in message or "not yet valid" in message:
        return f"{SET_CLOCK}; if it is right, ask the coordinator to run 'wardround renew'"
    if "ismatch" in message:
        return "the coordinator's certificate lacks this name: it is to add it to 'hosts' and provision again"
    return (
        "somebody between here and the coordinator answers in its place, or the kit is of another consortium: compare the CA's fingerprint by phone"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def looked_at(health: Health | None) -> Health:
    """`health`, where there is one; else a check that needs it is not made."""
    if health is None:
        raise NotLookedAtError("the coordinator does not answer")
    return health
