"""A kit: what one needs to join a federation. Its formats, and how they are verified.

Trust starts with one certificate, the consortium's CA, whose SHA-256 fingerprint two people compare over the phone. Its key signs the manifest of
every kit (`kit.json`, which holds the SHA-256 of every file) and the roster of the sites; it is needed only to provision, so who holds the
coordinator's machine, and not the CA's passphrase, can neither alter a kit nor add a site. What a signature cannot show is age: an old roster, put
back whole, verifies. A site has keys and no certificate; the request with its public keys is signed by both private keys, as a proof that it has
them, and its fingerprint covers the CA's as well: one comparison finds a foreign CA as well as a foreign key.
"""

import hashlib
import importlib.metadata
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, Field, ValidationError, field_validator

from shared.certificates import (
    authority_key,
    is_signed,
    load_signing_key,
    parse_node_key,
    read_bytes,
    read_certificate,
    sign,
)
from shared.config import Settings
from shared.errors import KitError
from shared.files import json_text
from shared.study import NAME_PATTERN

__all__ = ["KitManifest", "Roster", "RosterSite", "SiteRequest", "load_signing_key", "read_manifest", "verify_kit"]

# Where things are in a kit's folder.
MANIFEST, SIGNATURE, CA_CERTIFICATE, README = "kit.json", "kit.sig", "ca.crt", "README.txt"
KEYS, NODE_KEY, SIGNING_KEY = "keys", "keys/node.key", "keys/signing.key"
REQUEST, SITE_FILE, SITE_EXAMPLE, STATE = "request.json", "site.toml", "site.toml.example", "state"  # a site's own
FEDERATION, ROSTER, TLS, SERVER_CERTIFICATE, SERVER_KEY, RUNS = "federation.toml", "roster.json", "tls", "tls/server.crt", "tls/server.key", "runs"

SECRETS = frozenset({NODE_KEY, SIGNING_KEY, SERVER_KEY})
SITE_FILES = frozenset({CA_CERTIFICATE, README, NODE_KEY, SIGNING_KEY})  # all that a manifest may bring to a site: no policy, no code
COORDINATOR_FILES = frozenset({CA_CERTIFICATE, FEDERATION, SERVER_CERTIFICATE, SERVER_KEY, SIGNING_KEY})
ASK_AGAIN = "ask the coordinator for the kit again"

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Model = TypeVar("Model", bound=Settings)


class CoordinatorAddress(Settings):
    """Where the coordinator is, and with which key it signs."""

    hosts: tuple[str, ...] = Field(min_length=1, description="names and addresses; the first is what sites dial")
    port: int = Field(ge=1, le=65535)
    signing_key: Hex64


class KitManifest(Settings):
    """kit.json: signed by the CA, byte for byte."""

    format: Literal[1] = 1
    federation: Name
    site: Name | None = Field(description="None: the coordinator's kit")
    coordinator: CoordinatorAddress
    generation: int = Field(ge=1, description="of the roster, when this kit was written")
    wardround_version: str = Field(max_length=100)
    created: AwareDatetime
    expires: AwareDatetime
    files: dict[str, Hex64] = Field(description="path in the kit -> SHA-256")

    def content(self) -> bytes:
        """The bytes of kit.json."""
        return json_text(self.model_dump(mode="json")).encode()


class RosterSite(Settings):
    """A site that was approved once; a name that came back with a new key has one entry for each key."""

    name: Name
    node_key: str
    signing_key: Hex64
    declared_size: int | None = Field(ge=2)
    approved: AwareDatetime
    expires: AwareDatetime
    revoked: AwareDatetime | None = None
    reason: str | None = Field(default=None, max_length=500, description="of the revocation")

    @field_validator("node_key")
    @classmethod
    def _check_node_key(cls, text: str) -> str:
        parse_node_key(text)
        return text

    def is_active(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and now < self.expires


class Roster(Settings):
    """roster.json: the sites, signed by the CA. `generation` only grows."""

    federation: Name
    generation: int = Field(ge=1)
    sites: tuple[RosterSite, ...]
    signature: str = Field(default="", pattern=r"^([0-9a-f]{2})*$", description="of the CA over all the rest")

    @classmethod
    def read(cls, path: Path, ca_certificate: Path) -> "Roster":
        """The roster at `path`, when the CA of `ca_certificate` signed it.

        Raises:
            KitError: it is missing, damaged or altered, or another CA's.
        """
        roster = _read_canonical(cls, path)
        key = authority_key(read_certificate(ca_certificate), ca_certificate)
        if not is_signed(key, bytes.fromhex(roster.signature), roster._statement()):
            raise KitError(f"{path}: expected a roster signed by the CA in {ca_certificate}, got an altered one or another CA's", "provision again")
        return roster

    def signed(self, key: ec.EllipticCurvePrivateKey) -> "Roster":
        """The same roster with the signature of the CA's `key`."""
        return self.model_copy(update={"signature": sign(key, self._statement()).hex()})

    def content(self) -> bytes:
        """The bytes of roster.json."""
        return json_text(self.model_dump(mode="json")).encode()

    def active(self, now: datetime) -> list[RosterSite]:
        """The sites that may take part at `now`, at most one of a name."""
        return [site for site in self.sites if site.is_active(now)]

    def _statement(self) -> bytes:
        return b"wardround roster\n" + _canonical(self.model_dump(mode="json", exclude={"signature"}))


class SiteRequest(Settings):
    """request.json: a site asks to be put on the roster. It holds no private key; both keys sign it, as a proof that the site has them."""

    format: Literal[1] = 1
    federation: Name
    site: Name
    ca_fingerprint: Hex64 = Field(description="of the CA in the kit that the site has")
    node_key: str
    signing_key: Hex64
    declared_size: int | None = Field(ge=2)
    wardround_version: str = Field(max_length=100)
    created: AwareDatetime
    node_signature: str = Field(default="", pattern=r"^([0-9a-f]{2})*$")
    signing_signature: str = Field(default="", pattern=r"^([0-9a-f]{2})*$")

    @field_validator("node_key")
    @classmethod
    def _check_node_key(cls, text: str) -> str:
        parse_node_key(text)
        return text

    @classmethod
    def read(cls, path: Path) -> "SiteRequest":
        """The request at `path`, when both its keys signed it.

        Raises:
            KitError: it is missing, damaged or altered.
        """
        request = _read_canonical(cls, path)
        if not request._is_signed():
            raise KitError(f"{path}: expected a request signed by both of its keys, got an altered one", "ask the site to send request.json again")
        return request

    def signed(self, node_key: ec.EllipticCurvePrivateKey, signing_key: Ed25519PrivateKey) -> "SiteRequest":
        """The same request with the signatures of the two keys that it names."""
        statement = self._statement()
        return self.model_copy(update={"node_signature": sign(node_key, statement).hex(), "signing_signature": signing_key.sign(statement).hex()})

    def says_the_same(self, other: "SiteRequest") -> bool:
        """Whether it differs from `other` at most in when, and by which version, it was made."""
        return (self.fingerprint, self.declared_size) == (other.fingerprint, other.declared_size)

    def content(self) -> bytes:
        """The bytes of request.json."""
        return json_text(self.model_dump(mode="json")).encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over federation, site, the CA's fingerprint and both keys: what two people compare."""
        return hashlib.sha256(_canonical([self.federation, self.site, self.ca_fingerprint, self.node_key, self.signing_key])).hexdigest()

    def _statement(self) -> bytes:
        return b"wardround site request\n" + _canonical(self.model_dump(mode="json", exclude={"node_signature", "signing_signature"}))

    def _is_signed(self) -> bool:
        statement = self._statement()
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signing_key)).verify(bytes.fromhex(self.signing_signature), statement)
        except InvalidSignature:
            return False
        return is_signed(parse_node_key(self.node_key), bytes.fromhex(self.node_signature), statement)


def installed_version() -> str:
    """The version of this wardround."""
    return importlib.metadata.version("wardround")


def digest(content: bytes) -> str:
    """SHA-256 (hex), as a manifest holds it."""
    return hashlib.sha256(content).hexdigest()


def read_manifest(folder: Path) -> KitManifest:
    """The manifest of the kit in `folder`, when the CA certificate beside it signed it; files and dates are not looked at.

    Raises:
        KitError: a file is missing, damaged or altered.
    """
    authority = folder / CA_CERTIFICATE
    key = authority_key(read_certificate(authority), authority)
    content = read_bytes(folder / MANIFEST)
    if not is_signed(key, read_bytes(folder / SIGNATURE), content):
        raise KitError(f"{folder / MANIFEST}: expected the text that {authority} signed in {SIGNATURE}: one of the three was altered", ASK_AGAIN)
    manifest = _parse(KitManifest, content, folder / MANIFEST)
    allowed = COORDINATOR_FILES if manifest.site is None else SITE_FILES
    if not {CA_CERTIFICATE} <= set(manifest.files) <= allowed:
        raise KitError(f"{folder / MANIFEST}: expected only the files {', '.join(sorted(allowed))} in a kit, got others", ASK_AGAIN)
    return manifest


def verify_kit(folder: Path, *, now: datetime | None = None) -> KitManifest:
    """The manifest of the kit in `folder`: signed, in date, and every file as it says; the coordinator's roster as well.

    What a site adds to its kit (site.toml, keys that it made, state) is its own and not looked at. Whether the CA is the right one, only
    its fingerprint tells.

    Raises:
        KitError: it is not so; the message names the file.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        if digest(read_bytes(folder / name)) != expected:
            raise KitError(f"{folder / name}: its SHA-256 is not the one in {MANIFEST}: the file was altered or damaged", ASK_AGAIN)
    now = now or datetime.now(UTC)
    end = min(manifest.expires, read_certificate(folder / CA_CERTIFICATE).not_valid_after_utc)
    if now >= end:
        raise KitError(f"{folder / MANIFEST}: expired on {end:%Y-%m-%d}", "ask the coordinator to run 'wardround renew', and for the new kit")
    if manifest.site is None:
        _check_roster(folder, manifest)
    return manifest


def _check_roster(folder: Path, manifest: KitManifest) -> None:
    roster = Roster.read(folder / ROSTER, folder / CA_CERTIFICATE)
    if roster.federation != manifest.federation or roster.generation < manifest.generation:
        raise KitError(
            f"{folder / ROSTER}: expected generation {manifest.generation} or later of {manifest.federation}, "
            f"got {roster.generation} of {roster.federation}: an earlier roster was put back",
            "restore the newest roster.json, or provision again",
        )


def _read_canonical(model: type[Model], path: Path) -> Model:
    """The `model` in the JSON file at `path`, when not a byte of it is other than we write it."""
    content = read_bytes(path)
    value = _parse(model, content, path)
    if json_text(value.model_dump(mode="json")).encode() != content:
        raise KitError(f"{path}: expected the file as wardround wrote it, got an edited one", "ask for the file again; do not edit it")
    return value


def _parse(model: type[Model], content: bytes, path: Path) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        [first, *_] = error.errors()
        key = ".".join(map(str, first["loc"])) or "(whole file)"
        raise KitError(f"{path}: {key}: {first['msg']}", "ask for the file again; do not edit it") from None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
