"""A real site, as its site.toml describes it: its cohort, its policy, its durable ledger and its secret key."""

import logging
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.admission import SiteSettings
from client.keys import signing_key, site_key
from client.policy import SiteFile
from client.site import Site
from shared.cohort import Cohort, held_out_patients
from shared.errors import DataMissingError
from shared.task import Task

RELEASES = "releases"  # in a site's state
logger = logging.getLogger(__name__)


def releases_folder(path: Path, file: SiteFile) -> Path:
    """Where the site that the file at `path` describes keeps what it made."""
    return path.parent / file.state / RELEASES / file.name


def open_site(
    path: Path,
    file: SiteFile,
    task: Task,
    *,
    opened: dict[str, Cohort] | None = None,
    still_wanted: Callable[[], None] = lambda: None,
    noise_seed: int | None = None,
    roster_key: Ed25519PrivateKey | None = None,
) -> Site:
    """A hospital as its site file describes it. Its cohort is opened only when a study has passed policy and ledger.

    Args:
        opened: cohorts by task, kept from study to study.
        still_wanted: called before every training step; raises where the work is stale.
        noise_seed: for tests alone, see `SiteSettings`.
        roster_key: of a deployment, see `SiteSettings`.
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
        releases_path=releases_folder(path, file),
        split_key=key,
        signer=signing_key(key),
        policy=file.policy,
        cohort_id=file.name,
        noise_seed=noise_seed,
        roster_key=roster_key,
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
