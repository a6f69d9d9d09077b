"""`wardround doctor`: what stands in the way on this machine, at a site, or at the coordinator."""

import contextlib
import json
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from client.checks import check_machine, check_site, free_disk, packages, permissions, python, state_folder, telemetry
from client.findings import Finding, NotLookedAtError, failed, passed, run_checks, warned
from client.reaching import EXPIRES_SOON
from server.authority import serves
from server.federation_file import CoordinatorTable, FederationFile
from shared.certificates import load_signing_key, read_bytes, read_certificate
from shared.errors import DataMissingError, WardroundError
from shared.kit import (
    CA_CERTIFICATE,
    FEDERATION,
    KEYS,
    MANIFEST,
    ROSTER,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    SIGNING_KEY,
    STATE,
    Roster,
    read_manifest,
    verify_kit,
)
from shared.supervision import Instance, read_instance
from wardround.plural import plural

BINARIES = ("flower-superlink", "flower-superexec")
RENEW = "run 'wardround renew', and start the coordinator anew"
PAGE_SECONDS = 5.0


def examine(kit: Path | None) -> tuple[str, Iterator[Finding]]:
    """What is examined ("machine", "site" or "coordinator"), and what is found, as it is found."""
    if kit is None:
        return "machine", check_machine(Path.cwd())
    if _is_coordinators(kit):
        return "coordinator", check_coordinator(kit)
    return "site", check_site(kit)


def _is_coordinators(kit: Path) -> bool:
    """Whether the kit says that it is the coordinator's; looked at as it stands, for a damaged kit is to be examined as well."""
    try:
        return json.loads(read_bytes(kit / MANIFEST)).get("site", "") is None
    except (WardroundError, ValueError, AttributeError):
        return (kit / ROSTER).exists() or (kit / FEDERATION).exists()


def check_coordinator(kit: Path) -> Iterator[Finding]:
    """What there is to find at the coordinator's kit, as it is found."""
    state = kit / STATE
    return run_checks(
        [
            ("python", python),
            ("packages", packages),
            ("kit", lambda: _kit(kit)),
            ("certificates", lambda: _certificates(kit)),
            ("roster", lambda: _roster(kit)),
            ("authority", lambda: _authority(kit)),
            ("ports", lambda: _ports(kit)),
            ("state", lambda: state_folder(state)),
            ("disk", lambda: free_disk(state)),
            ("permissions", lambda: _permissions(kit)),
            ("audit log", lambda: _audit_log(kit)),
            ("superlink", _superlink),
            ("telemetry", telemetry),
            ("page", lambda: _page(kit)),
        ]
    )


def _kit(kit: Path) -> Iterator[Finding]:
    manifest = verify_kit(kit)
    FederationFile.load(kit / FEDERATION)
    yield passed(f"coordinator of {manifest.federation}, generation {manifest.generation}: signed, {len(manifest.files)} files as they should be")


def _file(kit: Path) -> FederationFile:
    try:
        return FederationFile.load(kit / FEDERATION)
    except WardroundError:
        raise NotLookedAtError(f"{FEDERATION} cannot be used") from None


def _certificates(kit: Path) -> Iterator[Finding]:
    """In date, this CA's, and for every host of the federation file."""
    file, now, fine = _file(kit), datetime.now(UTC), True
    authority, certificate = read_certificate(kit / CA_CERTIFICATE), read_certificate(kit / SERVER_CERTIFICATE)
    warn = EXPIRES_SOON
    for what, end, fix in (
        ("the CA", authority.not_valid_after_utc, "provision a new federation in another folder: a CA is not renewed"),
        ("the server's certificate", certificate.not_valid_after_utc, RENEW),
    ):
        if end <= now:
            yield failed(f"{what} expired on {end:%Y-%m-%d}", fix, exit_code=4)
        elif end - now < warn:
            yield warned(f"{what} expires on {end:%Y-%m-%d}", fix)
        fine = fine and end - now >= warn
    if not _issued(certificate, authority):
        fine = False
        yield failed("the server's certificate is not this CA's", "provision again", exit_code=4)
    if not serves(certificate, file.coordinator.hosts):
        fine = False
        yield failed(f"the server's certificate is not for all of {', '.join(file.coordinator.hosts)}", "provision again", exit_code=4)
    if fine:
        yield passed(
            f"server until {certificate.not_valid_after_utc:%Y-%m-%d}, for {', '.join(file.coordinator.hosts)}; CA until {authority.not_valid_after_utc:%Y-%m-%d}"
        )


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _roster(kit: Path) -> Iterator[Finding]:
    """Signed by the CA, not older than the kit, and with somebody on it."""
    roster, file, now = Roster.read(kit / ROSTER, kit / CA_CERTIFICATE), _file(kit), datetime.now(UTC)
    active = roster.active(now)
    soon = [site for site in active if site.expires - now < EXPIRES_SOON]
    if roster.generation < read_manifest(kit).generation:
        yield failed("an earlier roster was put back", "restore the newest roster.json, or provision again", exit_code=4)
    if not active:
        yield warned("no site is approved yet", "approve one: 'wardround provision FEDERATION --approve REQUEST'")
    elif len(active) < file.quorum:
        yield warned(f"{plural(len(active), 'site')} approved, fewer than the quorum of {file.quorum}", "approve more, or lower quorum")
    else:
        yield passed(f"generation {roster.generation}, signed: {', '.join(site.name for site in active)}")
    for site in soon:
        yield warned(f"site {site.name} expires on {site.expires:%Y-%m-%d}", "run 'wardround renew', and send it its new kit")


def _authority(kit: Path) -> Iterator[Finding]:
    """The CA's key is not where the coordinator is served from."""
    inside = [path for path in kit.rglob("ca.key") if path.is_file()]
    beside = kit.resolve().parent / "ca" / "ca.key"
    if inside:
        yield failed(f"{inside[0]}: the CA's key is in the kit", "move it away from this machine: whoever holds it can add sites")
    elif beside.exists():
        plain = b"ENCRYPTED" not in beside.read_bytes()[:100]
        wide = stat.S_IMODE(beside.stat().st_mode) & 0o077
        if plain or wide:
            yield failed(f"{beside}: {'not encrypted' if plain else 'may be read by others'}", f"chmod 600 {beside}" if wide else "provision anew")
        else:
            yield warned(f"{beside} is on this machine, encrypted", "keep it elsewhere: it is needed only to provision, renew and revoke")
    else:
        yield passed("the CA's key is not on this machine beside the kit")


def _ports(kit: Path) -> Iterator[Finding]:
    """Free, or our own."""
    coordinator, instance = _file(kit).coordinator, _instance(kit)
    if instance is not None:
        ports = ", ".join(f"{what} {port}" for what, port in instance.ports.items()) or "not opened yet"
        yield passed(f"ours: the coordinator runs as process {instance.pid} ({ports})")
        return
    taken = [f"{host}:{port}" for host, port in _addresses(coordinator) if not _is_free(host, port)]
    if taken:
        yield failed(
            f"{', '.join(taken)}: taken by another program, or no address of this machine",
            "end it, or change the ports in federation.toml",
            exit_code=4,
        )
    else:
        yield passed(f"{coordinator.port} and {coordinator.page_port} are free")


def _addresses(coordinator: CoordinatorTable) -> list[tuple[str, int]]:
    return [(coordinator.listen, coordinator.port), ("127.0.0.1", coordinator.page_port)]


def _is_free(host: str, port: int) -> bool:
    try:
        with contextlib.closing(socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)):
            return True
    except OSError:
        return False


def _instance(kit: Path) -> Instance | None:
    return read_instance(kit / STATE)


def _permissions(kit: Path) -> Iterator[Finding]:
    for path in (kit / SIGNING_KEY, kit / SERVER_KEY):
        read_bytes(path)
    yield from permissions(kit / KEYS, kit / STATE)
    wide = stat.S_IMODE((kit / SERVER_KEY).stat().st_mode)
    if wide & 0o077:
        yield failed(f"{kit / SERVER_KEY} may be read by others (mode {wide:04o})", f"chmod 600 {kit / SERVER_KEY}")


def _audit_log(kit: Path) -> Iterator[Finding]:
    from shared.audit import verify_audit

    key = load_signing_key(kit / SIGNING_KEY).public_key().public_bytes_raw().hex()
    try:
        found = verify_audit(kit / STATE / "audit.jsonl", public_key=key)
    except DataMissingError:
        yield passed("none yet: it is begun when the coordinator starts")
        return
    yield passed(f"{found.num_rows} rows verify, every one signed by the coordinator")


def _superlink() -> Iterator[Finding]:
    """Flower's programs are beside this Python."""
    missing = [name for name in BINARIES if shutil.which(name, path=str(Path(sys.executable).parent)) is None]
    if missing:
        yield failed(f"{', '.join(missing)}: not found beside {sys.executable}", "install wardround, with flwr, in one environment")
    else:
        yield passed(f"{' and '.join(BINARIES)} beside {sys.executable}")


def _page(kit: Path) -> Iterator[Finding]:
    """A running coordinator's page answers, and says what it warns of."""
    coordinator = _file(kit).coordinator
    if _instance(kit) is None:
        yield passed("the coordinator does not run: nothing to look at")
        return
    url = f"http://127.0.0.1:{coordinator.page_port}/status.json"
    try:
        status = httpx.get(url, trust_env=False, timeout=PAGE_SECONDS).raise_for_status().json()
        warnings, online = status["warnings"], sum(site["state"] == "online" for site in status["sites"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        yield failed(f"{url}: no answer ({type(error).__name__})", "is the coordinator just starting? Else see its log", exit_code=4)
        return
    yield passed(f"{url} answers: {online} of {plural(len(status['sites']), 'site')} online")
    for warning in warnings:
        yield warned(warning, "see 'wardround coordinator status'")
