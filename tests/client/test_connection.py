"""What the courier tells of its connection: whole, private, and believed only where it makes sense."""

import os
import stat
from pathlib import Path

import pytest

from client.connection import CONNECTION, ConnectionFile, read_connection
from shared.errors import StorageError


def test_what_was_told_last_stands_and_a_node_once_told_stays(tmp_path: Path) -> None:
    assert read_connection(tmp_path) is None
    told = ConnectionFile(tmp_path)
    begun = read_connection(tmp_path)
    assert begun is not None and (begun.pid, begun.node, begun.connected) == (os.getpid(), None, False)
    told.tell(node=2**63)
    told.tell(problem="x" * 5000)
    lost = read_connection(tmp_path)
    assert lost is not None and lost.node == 2**63 and lost.problem == "x" * 300 and not lost.connected
    told.tell(problem="x" * 5000)
    assert read_connection(tmp_path) == lost  # and since the same moment
    told.tell()
    again = read_connection(tmp_path)
    assert again is not None and again.connected and again.since >= lost.since


def test_it_is_its_owners_alone_and_a_longer_file_of_before_is_gone(tmp_path: Path) -> None:
    path = tmp_path / CONNECTION
    path.write_text("y" * 100_000)
    path.chmod(0o666)
    ConnectionFile(tmp_path).tell(node=1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and read_connection(tmp_path) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b'{"pid": 1, "since": "2026-01-01T00:00:00Z", "more": 1}', b"\xff" * 9000])
def test_nonsense_is_no_connection(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONNECTION).write_bytes(content)
    assert read_connection(tmp_path) is None


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / CONNECTION).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError):
        ConnectionFile(tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"
