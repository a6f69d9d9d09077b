"""Making a federation: the CA, the coordinator's kit, a kit for every site, and the signed roster of the sites that were approved.

Everything is a function of federation.toml and of what lies in the folder already: what is there and right stays, what is missing or stale is
written, each file whole or not at all, keys before what names them, a manifest after the files that it names, the roster before the coordinator's
manifest. So a run that was killed leaves something that the next run completes, and a run with nothing to do writes nothing. Keys, `state` and
`runs` are never overwritten. The generation, in the roster and in a kit when it is written, only grows, and only when something changed.
"""

import contextlib
import fcntl
import io
import os
import stat
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from server import authority as ca
from server.authority import Authority, issue_server_certificate, open_authority, serves
from server.federation_file import FederationFile
from shared import kit
from shared.certificates import (
    certificate_bytes,
    load_node_key,
    load_signing_key,
    make_folder,
    new_node_key,
    node_key_bytes,
    node_key_text,
    read_bytes,
    read_certificate,
    replace_secret,
    signing_key_bytes,
    signing_key_text,
)
from shared.config import nearest
from shared.errors import ConfigurationError, KitError, StorageError
from shared.files import storage_errors, write_atomic, write_secret
from shared.kit import CoordinatorAddress, KitManifest, Roster, RosterSite, SiteRequest, digest, installed_version, read_manifest

AUTHORITY, COORDINATOR, SITES, LOCK = "ca", "coordinator", "sites", ".lock"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same kit gives the same zip
README = """\
This is the kit of {site} for the federation {federation}. It is signed; do not edit kit.json, kit.sig or ca.crt.
1. Run 'wardround site init' on this folder, and compare the CA's fingerprint that it prints with the coordinator, over the phone.
2. {second}
3. Fill in site.toml, then run 'wardround site check' and 'wardround site start' on this folder.
"""
SEND_REQUEST = "Send request.json to the coordinator (it holds no private key) and read its fingerprint over the phone."
HAS_KEYS = "The folder keys/ is this site's identity: keep it secret and backed up. The coordinator needs no request."


def has_authority(out: Path) -> bool:
    """Whether the folder `out` has a CA already."""
    return any(
        (out / folder / name).exists() for folder, name in ((AUTHORITY, ca.KEY), (AUTHORITY, ca.CERTIFICATE), (COORDINATOR, kit.CA_CERTIFICATE))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Consortium:
    """A federation file, the folder that it is made in, and its opened CA."""

    file: FederationFile
    out: Path
    authority: Authority = field(repr=False)
    now: datetime

    @property
    def coordinator_kit(self) -> Path:
        """The coordinator's folder."""
        return self.out / COORDINATOR

    def site_kit(self, name: str) -> Path:
        """A site's folder."""
        return self.out / SITES / name

    def in_days(self, days: int) -> datetime:
        """So many days from now, or the end of the CA, whichever is first."""
        return min(self.now + timedelta(days=days), self.authority.certificate.not_valid_after_utc)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """Where a site stands: "kit written" | "waiting for its request" | "approved" | "expired" | "revoked"."""

    name: str
    status: str
    expires: datetime
    kit: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    """What a federation's folder holds now."""

    generation: int
    ca_fingerprint: str
    coordinator_kit: Path
    sites: tuple[SiteStatus, ...]
    warnings: tuple[str, ...]


@contextlib.contextmanager
def open_consortium(file: FederationFile, out: Path, *, passphrase: str, now: datetime | None = None) -> Iterator[Consortium]:
    """The federation in the folder `out`, for this process alone; its CA is made where there is none.

    Raises:
        ConfigurationError: the passphrase is wrong, or the folder is another federation's.
        StorageError: another process has it open, or it cannot be written.
    """
    make_folder(out)
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    with _locked(out):
        if has_authority(out) and not (out / AUTHORITY / ca.KEY).exists():
            raise ConfigurationError(
                f"{out / AUTHORITY / ca.KEY}: expected the CA's key, found none", f"bring the folder {AUTHORITY}/ back from where it is kept"
            )
        authority = open_authority(out / AUTHORITY, federation=file.name, passphrase=passphrase, days=file.certificates.ca_days, now=moment)
        yield Consortium(file=file, out=out, authority=authority, now=moment)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Nobody else provisions in `out` during the block; the system frees the lock of a process that dies."""
    with storage_errors(out / LOCK, "open"):
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{out}: another process is provisioning here", "wait until it has ended") from None
        yield
    finally:
        os.close(lock)


def provision(consortium: Consortium, *, requests: Sequence[SiteRequest] = (), with_keys: bool = False) -> Provisioned:
    """Write what is missing or stale, and put the sites of `requests` on the roster.

    Args:
        with_keys: make the keys of sites that were never approved and sent no request, and put them into their kits.

    Raises:
        KitError, ConfigurationError: a request is refused; then nothing was written.
        StorageError: a file cannot be written.
    """
    roster = _read_roster(consortium)
    sites = () if roster is None else roster.sites
    for request in requests:
        sites = admit(consortium, sites, request)
    keyed: list[str] = []
    if with_keys:
        known = {site.name for site in sites}
        keyed = [name for name in consortium.file.sites if name not in known and not (consortium.site_kit(name) / kit.REQUEST).exists()]
        sites = (*sites, *(_make_site_keys(consortium, name) for name in keyed))
    written = _complete(consortium, roster, sites, keyed=keyed)
    return _describe(consortium, written=written)


def renew(consortium: Consortium, *, names: Collection[str] = ()) -> Provisioned:
    """A new server certificate with a new key, and new dates and kits for the sites of these names (none given: for all).

    Raises:
        ConfigurationError: nothing was provisioned yet, or a name is no site's.
        StorageError: a file cannot be written.
    """
    roster = _existing_roster(consortium)
    for name in names:
        _check_name(consortium.file, name)
    chosen = list(names) or list(consortium.file.sites)
    expires = consortium.in_days(consortium.file.certificates.site_days)
    sites = tuple(site.model_copy(update={"expires": expires}) if site.name in chosen and site.revoked is None else site for site in roster.sites)
    written = _complete(consortium, roster, sites, renewed=chosen, new_certificate=True)
    return _describe(consortium, written=written)


def revoke(consortium: Consortium, name: str, *, reason: str | None = None) -> Provisioned:
    """Take a site off the roster. Its keys are never approved again; the name may come back with others. Revoked again, nothing changes.

    Raises:
        ConfigurationError: it was never approved.
        StorageError: the roster cannot be written.
    """
    roster = _existing_roster(consortium)
    mine = [site for site in roster.sites if site.name == name]
    if not mine:
        known = list(dict.fromkeys(site.name for site in roster.sites))
        expected = f"expected one that was approved: {', '.join(known)}" if known else "expected one that was approved, and none was"
        raise ConfigurationError(
            f"site {name!r}: {expected}{nearest(name, known)}",
            "only who was approved can be revoked; a site that is not to come is taken out of 'sites' in the federation file",
        )
    if any(site.revoked is None for site in mine):
        mark = {"revoked": consortium.now, "reason": reason}
        sites = tuple(site.model_copy(update=mark) if site.name == name and site.revoked is None else site for site in roster.sites)
        _write_roster(consortium, sites, generation=_newest(consortium, roster) + 1)
    return _describe(consortium, written=[])


def admit(consortium: Consortium, sites: tuple[RosterSite, ...], request: SiteRequest) -> tuple[RosterSite, ...]:
    """`sites` with that of `request`; asked again with the same keys, only its declared size may change.

    Raises:
        KitError: it is for another federation or CA, or brings a key that is another's, or revoked, or new for a site that has one.
        ConfigurationError: federation.toml has no such site.
    """
    name = request.site
    if (request.federation, request.ca_fingerprint) != (consortium.file.name, consortium.authority.fingerprint):
        raise KitError(
            f"request of {name}: expected one for {consortium.file.name} and this CA, got one for {request.federation} and "
            f"{'this' if request.ca_fingerprint == consortium.authority.fingerprint else 'another'} CA",
            "give the site its kit again; if its CA's fingerprint differs, somebody altered the kit on its way",
        )
    _check_name(consortium.file, name)
    keys = {request.node_key, request.signing_key}
    owners = [site for site in sites if keys & {site.node_key, site.signing_key}]
    for site in owners:
        if site.revoked is not None:
            raise KitError(
                f"request of {name}: brings a key that was revoked with {site.name}", "let the site move its folder keys/ away and run init again"
            )
        if site.name != name:
            raise KitError(f"request of {name}: brings the key of {site.name}: two sites cannot have one key", "let each site make its own keys")
    if request.signing_key == _coordinator_address(consortium).signing_key:
        raise KitError(f"request of {name}: brings the coordinator's own key", "let the site make its own keys")
    current = next((site for site in sites if site.name == name and site.revoked is None), None)
    if current is None:
        return (*sites, _approved(consortium, name, request.node_key, request.signing_key, request.declared_size))
    if keys != {current.node_key, current.signing_key}:
        raise KitError(f"request of {name}: brings other keys than the approved ones", f"if the site lost them, revoke {name} first")
    return tuple(site.model_copy(update={"declared_size": request.declared_size}) if site is current else site for site in sites)


def _approved(consortium: Consortium, name: str, node_key: str, signing_key: str, declared_size: int | None) -> RosterSite:
    expires = consortium.in_days(consortium.file.certificates.site_days)
    return RosterSite(name=name, node_key=node_key, signing_key=signing_key, declared_size=declared_size, approved=consortium.now, expires=expires)


def _make_site_keys(consortium: Consortium, name: str) -> RosterSite:
    """The roster's entry for keys in the site's kit, which are made where a run that was killed has not made them."""
    folder = consortium.site_kit(name)
    make_folder(folder)
    make_folder(folder / kit.KEYS, secret=True)
    with storage_errors(folder / kit.KEYS, "write"):
        if not (folder / kit.NODE_KEY).exists():
            write_secret(folder / kit.NODE_KEY, node_key_bytes(new_node_key()))
        if not (folder / kit.SIGNING_KEY).exists():
            write_secret(folder / kit.SIGNING_KEY, signing_key_bytes(Ed25519PrivateKey.generate()))
    node_key, signing_key = load_node_key(folder / kit.NODE_KEY), load_signing_key(folder / kit.SIGNING_KEY)
    return _approved(consortium, name, node_key_text(node_key.public_key()), signing_key_text(signing_key), None)


def _complete(
    consortium: Consortium,
    roster: Roster | None,
    sites: tuple[RosterSite, ...],
    *,
    renewed: Collection[str] = (),
    keyed: Collection[str] = (),
    new_certificate: bool = False,
) -> list[str]:
    """Bring the folder to `sites`, and the kits to the federation file; the names of the sites whose kit was written."""
    _write_coordinator_files(consortium, new_certificate=new_certificate)
    files = {name: _site_files(consortium, name, with_keys=name in keyed) for name in consortium.file.sites}
    stale = [name for name in files if name in renewed or not _is_current(consortium, consortium.site_kit(name), files[name])]
    own_files = {name: read_bytes(consortium.coordinator_kit / name) for name in sorted(kit.COORDINATOR_FILES)}
    own_stale = new_certificate or not _is_current(consortium, consortium.coordinator_kit, own_files)
    changed = bool(stale) or own_stale or roster is None or roster.sites != sites
    generation = _newest(consortium, roster) + changed
    for name in stale:
        _write_site_kit(consortium, name, files[name], generation=generation)
    for name in files:
        _write_zip(consortium.site_kit(name))
    if roster is None or roster.generation != generation:
        _write_roster(consortium, sites, generation=generation)
    if own_stale:
        certificate = read_certificate(consortium.coordinator_kit / kit.SERVER_CERTIFICATE)
        _write_manifest(consortium, None, own_files, generation=generation, expires=certificate.not_valid_after_utc)
    return stale


def _write_coordinator_files(consortium: Consortium, *, new_certificate: bool) -> None:
    """Everything in the coordinator's kit but roster and manifest; what is there and right is left alone."""
    folder = consortium.coordinator_kit
    make_folder(folder)
    _coordinator_address(consortium)  # makes its signing key
    make_folder(folder / kit.TLS, secret=True)
    if new_certificate or not _has_server_certificate(consortium):
        key = new_node_key()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        days = consortium.file.certificates.server_days
        certificate = issue_server_certificate(
            consortium.authority, key.public_key(), consortium.file.coordinator.hosts, days=days, now=consortium.now
        )
        replace_secret(folder / kit.SERVER_KEY, private)
        write_atomic(folder / kit.SERVER_CERTIFICATE, certificate_bytes(certificate))
    for name, content in (
        (kit.CA_CERTIFICATE, certificate_bytes(consortium.authority.certificate)),
        (kit.FEDERATION, consortium.file.to_toml().encode()),
    ):
        _write_changed(folder / name, content)


def _has_server_certificate(consortium: Consortium) -> bool:
    """Whether the server's certificate is this CA's, for the hosts of the federation file, and of the key beside it."""
    folder = consortium.coordinator_kit
    try:
        certificate = read_certificate(folder / kit.SERVER_CERTIFICATE)
        certificate.verify_directly_issued_by(consortium.authority.certificate)
        private = serialization.load_pem_private_key(read_bytes(folder / kit.SERVER_KEY), None)
        return private.public_key() == certificate.public_key() and serves(certificate, consortium.file.coordinator.hosts)
    except (KitError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False


def _coordinator_address(consortium: Consortium) -> CoordinatorAddress:
    """What every kit says of the coordinator, whose signing key is made where there is none."""
    path = consortium.coordinator_kit / kit.SIGNING_KEY
    if not path.exists():
        if _manifest_of(consortium, consortium.coordinator_kit) is not None:
            raise KitError(f"{path}: expected the coordinator's signing key, found none: the sites know it", "restore it from backup")
        make_folder(path.parent, secret=True)
        with storage_errors(path, "write"):
            write_secret(path, signing_key_bytes(Ed25519PrivateKey.generate()))
    coordinator = consortium.file.coordinator
    return CoordinatorAddress(hosts=coordinator.hosts, port=coordinator.port, signing_key=signing_key_text(load_signing_key(path)))


def _site_files(consortium: Consortium, name: str, *, with_keys: bool) -> dict[str, bytes]:
    """The files of a site's kit but its manifest. Keys are among them where we make them now, or made them then: never a site's own."""
    folder = consortium.site_kit(name)
    with_keys = with_keys or kit.NODE_KEY in _listed_files(folder)
    readme = README.format(site=name, federation=consortium.file.name, second=HAS_KEYS if with_keys else SEND_REQUEST)
    files = {kit.CA_CERTIFICATE: certificate_bytes(consortium.authority.certificate), kit.README: readme.encode()}
    return files | {key: read_bytes(folder / key) for key in (kit.NODE_KEY, kit.SIGNING_KEY) if with_keys}


def _listed_files(folder: Path) -> Collection[str]:
    """What the manifest in `folder` lists, signed or not: a run that was killed may have left it without its signature."""
    try:
        return KitManifest.model_validate_json(read_bytes(folder / kit.MANIFEST)).files
    except (KitError, ValidationError):
        return ()


def _manifest_of(consortium: Consortium, folder: Path) -> KitManifest | None:
    """The manifest in a kit's folder; None where there is none of this CA."""
    try:
        manifest = read_manifest(folder)
        return manifest if read_certificate(folder / kit.CA_CERTIFICATE) == consortium.authority.certificate else None
    except KitError:
        return None


def _is_current(consortium: Consortium, folder: Path, files: dict[str, bytes]) -> bool:
    """Whether the kit in `folder` says what one written now would, and holds these files."""
    manifest = _manifest_of(consortium, folder)
    if manifest is None or manifest.coordinator != _coordinator_address(consortium):
        return False
    if manifest.files != {name: digest(content) for name, content in files.items()}:
        return False
    return all((folder / name).is_file() and read_bytes(folder / name) == content for name, content in files.items())


def _write_site_kit(consortium: Consortium, name: str, files: dict[str, bytes], *, generation: int) -> None:
    folder = consortium.site_kit(name)
    make_folder(folder)
    for path, content in files.items():
        if path not in kit.SECRETS:  # those are there
            _write_changed(folder / path, content)
    expires = consortium.in_days(consortium.file.certificates.site_days)
    _write_manifest(consortium, name, files, generation=generation, expires=expires)


def _write_manifest(consortium: Consortium, site: str | None, files: dict[str, bytes], *, generation: int, expires: datetime) -> None:
    """kit.json and its signature; a crash between the two leaves a kit that does not verify, and is written again."""
    folder = consortium.coordinator_kit if site is None else consortium.site_kit(site)
    manifest = KitManifest(
        federation=consortium.file.name,
        site=site,
        coordinator=_coordinator_address(consortium),
        generation=generation,
        wardround_version=installed_version(),
        created=consortium.now,
        expires=expires,
        files={name: digest(content) for name, content in sorted(files.items())},
    )
    write_atomic(folder / kit.MANIFEST, manifest.content())
    write_atomic(folder / kit.SIGNATURE, consortium.authority.sign(manifest.content()))


def _write_zip(folder: Path) -> None:
    """The kit of `folder` as a zip beside it, mode 0600 where it holds keys; of what else lies in the folder, nothing."""
    names = sorted({kit.MANIFEST, kit.SIGNATURE, *read_manifest(folder).files})
    content, path = zip_bytes({name: read_bytes(folder / name) for name in names}), folder.parent / f"{folder.name}.zip"
    secret = any(name in kit.SECRETS for name in names)
    if path.is_file() and path.read_bytes() == content and not (secret and stat.S_IMODE(path.stat().st_mode) != 0o600):
        return
    if secret:
        replace_secret(path, content)
    else:
        write_atomic(path, content)


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """A zip of `files` (path -> content) that has the same bytes whenever it is made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.create_system = 3  # Unix, on every system: the mode counts
            entry.external_attr = (stat.S_IFREG | (0o600 if name in kit.SECRETS else 0o644)) << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def _write_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def _write_roster(consortium: Consortium, sites: tuple[RosterSite, ...], *, generation: int) -> None:
    roster = Roster(federation=consortium.file.name, generation=generation, sites=sites).signed(consortium.authority.key)
    write_atomic(consortium.coordinator_kit / kit.ROSTER, roster.content())


def _read_roster(consortium: Consortium) -> Roster | None:
    """The roster so far; None where there is none.

    Raises:
        KitError: it does not verify. It is not made anew: that would forget who was revoked.
    """
    path = consortium.coordinator_kit / kit.ROSTER
    if path.exists():
        return Roster.read(path, consortium.out / AUTHORITY / ca.CERTIFICATE)
    if _manifest_of(consortium, consortium.coordinator_kit) is not None:
        raise KitError(f"{path}: expected the roster, found none: without it nobody knows who was revoked", "restore it from backup")
    return None


def _existing_roster(consortium: Consortium) -> Roster:
    roster = _read_roster(consortium)
    if roster is None:
        raise ConfigurationError(f"{consortium.out}: expected a provisioned federation, found no roster", "run 'wardround provision' first")
    return roster


def _newest(consortium: Consortium, roster: Roster | None) -> int:
    """The newest generation that the roster or any kit has: a run that was killed wrote kits before the roster."""
    folders = [consortium.coordinator_kit, *map(consortium.site_kit, consortium.file.sites)]
    manifests = [manifest for folder in folders if (manifest := _manifest_of(consortium, folder)) is not None]
    return max([manifest.generation for manifest in manifests] + ([] if roster is None else [roster.generation]), default=0)


def _check_name(file: FederationFile, name: str) -> None:
    if name not in file.sites:
        raise ConfigurationError(f"site {name!r}: expected one of {', '.join(file.sites)}", "add it to 'sites' in the federation file first")


def _names(roster: Roster) -> str:
    return ", ".join(dict.fromkeys(site.name for site in roster.sites if site.revoked is None))


def _describe(consortium: Consortium, *, written: Collection[str]) -> Provisioned:
    roster = _existing_roster(consortium)
    statuses = tuple(_status(consortium, roster, name, written=name in written) for name in consortium.file.sites)
    return Provisioned(
        generation=roster.generation,
        ca_fingerprint=consortium.authority.fingerprint,
        coordinator_kit=consortium.coordinator_kit,
        sites=statuses,
        warnings=tuple(_warnings(consortium, roster, statuses)),
    )


def _status(consortium: Consortium, roster: Roster, name: str, *, written: bool) -> SiteStatus:
    folder = consortium.site_kit(name)
    entries = [site for site in roster.sites if site.name == name]
    if entries:
        latest = entries[-1]
        status = "revoked" if latest.revoked else "approved" if latest.is_active(consortium.now) else "expired"
        return SiteStatus(name=name, status=status, expires=latest.expires, kit=folder)
    manifest = _manifest_of(consortium, folder)
    expires = consortium.now if manifest is None else manifest.expires
    return SiteStatus(name=name, status="kit written" if written else "waiting for its request", expires=expires, kit=folder)


def _warnings(consortium: Consortium, roster: Roster, statuses: Sequence[SiteStatus]) -> Iterator[str]:
    """What ends soon, and who is approved without being in the federation file."""
    server = consortium.coordinator_kit / kit.SERVER_CERTIFICATE
    renew_all = "run 'wardround renew'"
    ends = [("the CA", consortium.authority.certificate.not_valid_after_utc, "a CA is not renewed: provision a new one in another folder")]
    if server.exists():
        ends.append(("the coordinator's server certificate", read_certificate(server).not_valid_after_utc, renew_all))
    ends += [(f"site {status.name}", status.expires, f"{renew_all}, and send it its new kit") for status in statuses if status.status != "revoked"]
    for what, end, remedy in ends:
        if end <= consortium.now:
            yield f"{what} expired on {end:%Y-%m-%d}; {remedy}"
        elif end <= consortium.now + timedelta(days=consortium.file.certificates.warn_days):
            yield f"{what} expires on {end:%Y-%m-%d}; {remedy}"
    gone = [site.name for site in roster.sites if site.revoked is None and site.name not in consortium.file.sites]
    for name in gone:
        yield f"site {name} is approved, but no longer in the federation file; put it back, or run 'wardround revoke'"
