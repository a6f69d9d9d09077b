"""The coordinator's memory of the sites' ledgers: kept, counter-signed, and refused where it is damaged."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from server.witness import HEADS, KEY, Witness
from shared.errors import StorageError
from shared.messages import head_statement


def test_heads_are_remembered_and_counter_signed(tmp_path: Path) -> None:
    Witness(tmp_path / "w").remember({"north": "a" * 64, "south": "b" * 64})
    again = Witness(tmp_path / "w")
    again.remember({"north": "c" * 64})
    heads = Witness(tmp_path / "w").heads()
    assert {site: head.head for site, head in heads.items()} == {"north": "c" * 64, "south": "b" * 64}
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(again.public_key))
    for site, head in heads.items():
        key.verify(bytes.fromhex(head.signature), head_statement(site, head.head))
    assert stat.S_IMODE((tmp_path / "w" / KEY).stat().st_mode) == 0o600


@pytest.mark.parametrize(("name", "content"), [(HEADS, "{"), (HEADS, "[]"), (HEADS, '{"north": "short"}'), (HEADS, '{"north": 5}'), (KEY, "short")])
def test_a_damaged_memory_is_refused(tmp_path: Path, name: str, content: str) -> None:
    Witness(tmp_path).remember({"north": "a" * 64})
    (tmp_path / name).write_text(content)
    with pytest.raises(StorageError, match="damaged files"):
        Witness(tmp_path)
