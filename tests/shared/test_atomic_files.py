"""All or nothing: a full disk, a failed rename or a missing folder leaves what was there."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import StorageError
from shared.files import append_line, json_text, make_private, storage_errors, write_atomic

FULL_DISK = """
import resource, sys
from pathlib import Path
from shared.errors import StorageError
from shared.files import append_line, write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1])
for act in (lambda: write_atomic(path, "x" * 100_000), lambda: append_line(path, "y" * 100_000)):
    try:
        act()
    except StorageError as error:
        print(error.code, error)
"""


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "old")
    write_atomic(path, b"new \xff")
    assert path.read_bytes() == b"new \xff" and [item.name for item in tmp_path.iterdir()] == ["result.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_leaves_the_old_content_and_no_scraps(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write half way, as a full disk does."""
    path = tmp_path / "result.json"
    path.write_text("old\n")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.count("E103") == 2 and "could not write" in done.stdout and "could not append to" in done.stdout
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_scraps(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="could not write"):
        write_atomic(tmp_path / "taken", "x")
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/such.json: could not write: No such file or directory; check free space"):
        write_atomic(tmp_path / "no" / "such.json", "x")


def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    for line in ("one", "zwei ä"):
        append_line(tmp_path / "rounds.jsonl", line)
    assert (tmp_path / "rounds.jsonl").read_text(encoding="utf-8") == "one\nzwei ä\n"


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage_errors(tmp_path, "write"):
        raise KeyError("not a matter of storage")
    with pytest.raises(StorageError, match="TimeoutError"), storage_errors(tmp_path, "write"):
        raise TimeoutError


def test_json_has_no_nan() -> None:
    assert json_text({"a": 0.1, "b": "ä"}) == '{\n  "a": 0.1,\n  "b": "ä"\n}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        json_text({"a": float("nan")})


@pytest.mark.parametrize("mode", [None, 0o700, 0o755, 0o770, 0o777])
def test_a_private_folder_is_private_also_where_it_came_back_from_a_backup(tmp_path: Path, mode: int | None) -> None:
    folder = tmp_path / "state"
    if mode is not None:
        folder.mkdir()
        folder.chmod(mode)
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
