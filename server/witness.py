"""The coordinator as witness of the sites' ledgers: it remembers and counter-signs the head that each site showed last, over all runs.

A ledger that was deleted, or put back to an earlier copy, still verifies in itself; only somebody else's memory shows what is gone. A
head is a hash: it says nothing of what the ledger holds.
"""

import json
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, RootModel, ValidationError

from shared.errors import StorageError
from shared.files import storage_errors, write_atomic, write_secret
from shared.messages import WitnessedHead, head_statement

KEY, HEADS = "witness.key", "heads.json"


class _Heads(RootModel[dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]]):
    """Site -> head (hex)."""


class Witness:
    """The memory in `folder`, made where it is absent.

    Raises:
        StorageError: it cannot be read or written, or is damaged: then nothing can be said of the sites' ledgers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(folder, "make or read the witness's memory"):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / KEY).exists():
                write_secret(folder / KEY, Ed25519PrivateKey.generate().private_bytes_raw())
            key = (folder / KEY).read_bytes()
            text = (folder / HEADS).read_text() if (folder / HEADS).exists() else "{}"
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(key)
            self._heads = dict(_Heads.model_validate_json(text).root)
        except (ValueError, ValidationError) as error:
            raise StorageError(f"{folder}: expected the witness's key and heads, got damaged files", "restore them from backup") from error

    @property
    def public_key(self) -> str:
        """Hex; a site writes it beside the study that it admits."""
        return self._key.public_key().public_bytes_raw().hex()

    def heads(self) -> dict[str, WitnessedHead]:
        """What every site showed last, counter-signed."""
        return {site: WitnessedHead(head=head, signature=self._key.sign(head_statement(site, head)).hex()) for site, head in self._heads.items()}

    def remember(self, shown: dict[str, str]) -> None:
        """Durably take these heads as the sites' last."""
        if any(self._heads.get(site) != head for site, head in shown.items()):
            self._heads.update(shown)
            write_atomic(self._folder / HEADS, json.dumps(self._heads, indent=2, sort_keys=True) + "\n")
