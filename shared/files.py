"""Writing that is all or nothing: temporary file in the same folder, fsync, rename, fsync of the folder."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from shared.errors import StorageError

TRIED, ROOM_BYTES = ".tried", 100_000
REMEDY = "check free space and permissions of that folder, or give another with --out"


@contextlib.contextmanager
def storage_errors(path: Path, action: str, *, remedy: str = REMEDY) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StorageError(f"{path}: could not {action}: {reason}", remedy) from error


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """`path` holds either all of `data` or what it held before, also after a crash or on a full disk.

    Args:
        mode: of the file, as far as the umask allows.

    Raises:
        StorageError: the folder cannot be written to, or the disk is full.
    """
    content = data.encode() if isinstance(data, str) else data
    with storage_errors(path, "write"):
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def check_room(folder: Path) -> None:
    """Return where `folder` can take as much as a round writes down; nothing of the attempt is left.

    Raises:
        StorageError: the disk is full, or the folder is not there or not to be written.
    """
    file = folder / TRIED
    with storage_errors(folder, "write there", remedy="free space there, or correct its permissions"):
        try:
            file.write_bytes(b"\1" * ROOM_BYTES)
        finally:
            file.unlink(missing_ok=True)


def write_absent(path: Path, text: str) -> bool:
    """Whether `text` was written to `path`: what is there already stays, for somebody may have edited it.

    Raises:
        StorageError: the folder cannot be made or written to.
    """
    if path.exists():
        return False
    with storage_errors(path, "make its folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return True


def make_private(folder: Path) -> None:
    """`folder` is there, and nobody but its owner can look into it, also where it came back from a backup with other permissions.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def write_secret(path: Path, data: bytes) -> None:
    """`data` at `path`, mode 0600, whole or not at all; where another process was first, its file stands.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """`line` and a newline stand at the end of `path`, on the disk.

    Raises:
        StorageError: the file cannot be written to; what a failed write left is cut off again.
    """
    with storage_errors(path, "append to"), open(path, "ab", buffering=0) as file:
        start = file.tell()
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, start)
            raise


def json_text(value: object) -> str:
    """Canonical JSON for files people read: two spaces, no NaN (a NaN is a bug and raises `ValueError`)."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
