"""A site's one secret, what is derived from it, and the ledger that is signed with it."""

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.chain import public_key_text
from client.ledger import Ledger, check_there, reading
from client.policy import LEDGERS, SiteFile
from shared.errors import LedgerError, StorageError
from shared.files import storage_errors, write_secret

KEY_BYTES = 32


def signing_key(key: bytes) -> Ed25519PrivateKey:
    """The key that signs the ledger's rows, derived from the site's one secret."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.blake2b(b"ledger", key=key, digest_size=32).digest())


def site_key(state: Path) -> bytes:
    """The site's secret, for patient hashes, splits and the ledger's signatures: made once, 32 bytes, mode 0600.

    Raises:
        LedgerError: there is a ledger, and its key is gone.
        StorageError: the state folder cannot be written, or the key there is damaged.
    """
    path = state / "patient-hash.key"
    with storage_errors(path, "make or read the site's key", remedy="correct 'state' in the site file, or the permissions of that folder"):
        state.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if list((state / LEDGERS).glob("*.sqlite")):
                raise LedgerError(
                    f"{path}: expected the site's key beside its ledger, found none",
                    "restore it from backup: the ledger knows its patients, and is signed, by this key",
                )
            write_secret(path, os.urandom(KEY_BYTES))
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"{path}: expected a key of {KEY_BYTES} bytes, got {len(key)}", "restore it from backup: splits and the ledger's patients hang on it"
        )
    return key


def open_ledger(path: Path) -> Ledger:
    """The existing ledger of the cohort in the site file at `path`, for writing.

    Raises:
        DataMissingError: there is none yet.
        LedgerError: it does not verify, or is another site's.
    """
    file = SiteFile.load(path)
    ledger = file.ledger_path(path)
    check_there(ledger)
    with reading(ledger) as existing:
        unit = existing.unit
    return Ledger(ledger, cohort=file.name, unit=unit, limit=file.policy.limit, signer=signing_key(site_key(path.parent / file.state)))


def check_ledger_key(path: Path, ledger: Ledger) -> None:
    """Return where `ledger` is signed with the key of the site file at `path`: a forger would have begun it with a key of his own.

    Raises:
        LedgerError: it is not.
    """
    key = signing_key(site_key(path.parent / SiteFile.load(path).state))
    if ledger.public_key != public_key_text(key):
        raise LedgerError(f"{ledger.path}: expected a ledger signed with this site's key, got another", "restore the ledger that belongs to this key")
