"""A real hospital, as its site.toml describes it: its cohort, its policy, its durable ledger and its secret key."""

import contextlib
import os
import secrets
from pathlib import Path

from client.policy import SiteFile
from client.site import Site, SiteSettings
from shared.errors import LedgerError, StorageError
from shared.files import storage_errors
from shared.task import Task

LEDGER = "ledger.sqlite"

KEY_BYTES = 32


def open_site(path: Path, file: SiteFile, task: Task) -> Site:
    """A hospital as its site file describes it. Its cohort is opened only when a study has passed policy and ledger."""
    folder = path.parent
    state = folder / file.state
    cohort_path = folder / file.cohort.path
    declared = file.cohort
    settings = SiteSettings(
        name=file.name,
        declared_size=declared.declared_size,
        declared_num_patients=declared.declared_size + declared.declared_test_size,
        declared_num_test=declared.declared_test_size,
        ledger_path=state / LEDGER,
        split_key=site_key(state),
        policy=file.policy,
        cohort_id=file.name,
    )
    return Site(settings, task, lambda: task.load_cohort(cohort_path, dict(declared.options)))


def site_key(state: Path) -> bytes:
    """The site's secret key for patient hashes and splits: made once, 32 bytes, mode 0600.

    Raises:
        LedgerError: there is a ledger, and its key is gone.
        StorageError: the state folder cannot be written, or the key there is damaged.
    """
    path = state / "patient-hash.key"
    with storage_errors(path, "make or read the site's key"):
        state.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if (state / LEDGER).exists():
                raise LedgerError(
                    f"{path}: expected the site's key beside its ledger, found none",
                    "restore it from backup: the ledger knows its patients by this key",
                )
            _make_key(path)
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"{path}: expected a key of {KEY_BYTES} bytes, got {len(key)}", "restore it from backup: splits and the ledger's patients hang on it"
        )
    return key


def _make_key(path: Path) -> None:
    """A new key at `path`, whole or not at all; where another process was first, its key stands."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
