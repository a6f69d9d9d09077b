"""A real hospital, as its site.toml describes it: its cohort, its policy, its durable ledger and its secret key; and its kit in a deployment."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.keys import signing_key, site_key
from client.policy import SiteFile
from client.site import Site, SiteSettings
from shared.cohort import Cohort, held_out_patients
from shared.errors import ConfigurationError, DataMissingError, KitError
from shared.kit import SIGNING_KEY, SITE_FILE, KitManifest, load_signing_key, verify_kit
from shared.task import Task

RELEASES, AUDIT = "releases", "audit.jsonl"  # in a site's state
logger = logging.getLogger(__name__)


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


def open_site(
    path: Path,
    file: SiteFile,
    task: Task,
    *,
    opened: dict[str, Cohort] | None = None,
    still_wanted: Callable[[], None] = lambda: None,
    noise_seed: int | None = None,
) -> Site:
    """A hospital as its site file describes it. Its cohort is opened only when a study has passed policy and ledger.

    Args:
        opened: cohorts by task, kept from study to study.
        still_wanted: called before every training step; raises where the work is stale.
        noise_seed: for tests alone, see `SiteSettings`.
    """
    folder = path.parent
    state = folder / file.state
    cohort_path = folder / file.cohort.path
    declared = file.cohort
    key = site_key(state)
    settings = SiteSettings(
        name=file.name,
        declared_size=declared.declared_size,
        declared_num_patients=declared.declared_size + declared.declared_test_size,
        declared_num_test=declared.declared_test_size,
        ledger_path=file.ledger_path(path),
        releases_path=state / RELEASES / file.name,
        split_key=key,
        signer=signing_key(key),
        policy=file.policy,
        cohort_id=file.name,
        noise_seed=noise_seed,
    )

    def open_cohort() -> Cohort:
        if opened is not None and task.name in opened:
            return opened[task.name]
        try:
            cohort = task.load_cohort(cohort_path, dict(declared.options))
        except DataMissingError as error:
            raise DataMissingError(error.what, f"correct [cohort] path in {path}") from None
        training = int((~held_out_patients(cohort, key, published=False)).sum())
        if not 0.75 * training <= declared.declared_size <= 1.25 * training:
            logger.warning(
                "%s: cohort.declared_size = %d is more than a quarter off the training patients in %s", path, declared.declared_size, cohort_path
            )
        if opened is not None:
            opened[task.name] = cohort
        return cohort

    return Site(settings, task, open_cohort, still_wanted=still_wanted)
