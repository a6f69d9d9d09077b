"""A hospital as a member of a federation: its kit, its site.toml and its key. Its supervisor reads no more than this, so nothing here needs torch."""

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.policy import SiteFile
from shared.errors import ConfigurationError, KitError
from shared.kit import SIGNING_KEY, SITE_FILE, KitManifest, load_signing_key, verify_kit

AUDIT = "audit.jsonl"  # in a site's state


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospital:
    """One member of a federation: its kit, its site file, and the key that it signs with."""

    kit: Path
    manifest: KitManifest
    file: SiteFile
    signer: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def open(cls, kit: Path) -> "Hospital":
        """The hospital whose kit is in the folder `kit`, once it was initialised.

        Raises:
            KitError: the kit is damaged, expired, another site's, or holds no key yet.
            ConfigurationError: its site.toml does not fit.
        """
        manifest = verify_kit(kit)
        if manifest.site is None:
            raise KitError(f"{kit}: expected a site's kit, got the coordinator's", "give the folder of this site's kit")
        if not (kit / SIGNING_KEY).exists() or not (kit / SITE_FILE).exists():
            raise KitError(f"{kit}: expected a kit with keys and a {SITE_FILE}, found it not initialised", f"run 'wardround site init {kit}'")
        file = SiteFile.load(kit / SITE_FILE)
        if file.name != manifest.site:
            raise ConfigurationError(f"{kit / SITE_FILE}: name: expected {manifest.site!r}, as in the kit, got {file.name!r}", "correct this key")
        return cls(kit=kit, manifest=manifest, file=file, signer=load_signing_key(kit / SIGNING_KEY))

    @property
    def name(self) -> str:
        """The site's name."""
        return self.file.name

    @property
    def site_file(self) -> Path:
        """The path of site.toml."""
        return self.kit / SITE_FILE

    @property
    def state(self) -> Path:
        """The folder of all that the site remembers."""
        return self.kit / self.file.state

    @property
    def coordinator_key(self) -> Ed25519PublicKey:
        """What tasks are signed with."""
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.manifest.coordinator.signing_key))
