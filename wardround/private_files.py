"""Files that hold patients' data: their owner's alone to read, whole or not at all, outside what is shown to others, and never in another's place."""

import contextlib
import errno
import io
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from shared.errors import ConfigurationError, StorageError
from shared.files import storage_errors

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SHOWN = ("run.json", "result.json")  # a folder with one of them is a run's, which is shown to others
NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)  # what file systems without O_TMPFILE say
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)  # and those without hard links, as exFAT and some network shares


def refuse_in_run(path: Path) -> None:
    """Raise `ConfigurationError` where `path` is in a run's folder, at any depth: its files are shown to others, and this one is of patients."""
    for folder in path.resolve().parents:
        if any((folder / name).is_file() for name in SHOWN):
            raise ConfigurationError(
                f"{path}: expected a file outside the run's folder {folder.name}, which is shown to others", "give another place with --out"
            )


@contextlib.contextmanager
def private_file(path: Path, *, force: bool = False) -> Iterator[TextIO]:
    """A text file to write to, mode 0600; it appears at `path` when the block ends, and not at all where the block raises or the process is killed.

    Until then it has no name (O_TMPFILE), so whatever ends the process leaves nothing. Where the file system has no such files, it has a hidden
    one, which goes when the block raises and, in the main thread, at SIGTERM; a SIGKILL leaves it.

    Args:
        force: a file that is there already is replaced.

    Raises:
        ConfigurationError: `path` is in a run's folder.
        StorageError: there is a file already, or the folder cannot be written to.
    """
    refuse_in_run(path)
    if path.is_dir() or (path.exists() and not force):
        raise _taken(path)
    with storage_errors(path, "write"):
        handle, temporary = _nameless(path)
    with _ended_by_sigterm(), contextlib.ExitStack() as stack:
        if temporary is not None:
            stack.callback(temporary.unlink, missing_ok=True)
        file = stack.enter_context(io.TextIOWrapper(io.BufferedWriter(_OwnFile(handle, path)), encoding="utf-8", newline=""))
        yield file
        with storage_errors(path, "write"):
            file.flush()
            os.fsync(file.fileno())
            _name(file, temporary, path, force=force)


class _OwnFile(io.FileIO):
    """Says what the system says about a write as ours; what else the caller's block does is none of its business."""

    def __init__(self, handle: int, path: Path) -> None:
        super().__init__(handle, "w")
        self._path = path

    def write(self, data: "ReadableBuffer", /) -> int:
        with storage_errors(self._path, "write"):
            return super().write(data)


def _taken(path: Path) -> StorageError:
    return StorageError(f"{path}: expected a new file, found {'a folder' if path.is_dir() else 'one'}", "give another with --out, or add --force")


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"


def _nameless(path: Path) -> tuple[int, Path | None]:
    """A new file in the folder of `path`, without a name where that can be, else with the one that comes back."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        try:
            return os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o600), None
        except OSError as error:
            if error.errno not in NO_NAMELESS:
                raise
    temporary = _beside(path)
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), temporary


def _name(file: TextIO, temporary: Path | None, path: Path, *, force: bool) -> None:
    """Give the file its name: another process's file, made meanwhile, stands unless `force`."""
    if force:
        named = _beside(path) if temporary is None else temporary
        try:
            if temporary is None:
                _link(file, None, named)
            os.replace(named, path)
        finally:
            named.unlink(missing_ok=True)
        return
    try:
        _link(file, temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        if error.errno not in NO_LINKS or temporary is None:
            raise
        with contextlib.suppress(FileExistsError):  # no hard links here: an empty file holds the place
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.replace(temporary, path)
            return
        raise _taken(path) from None


def _link(file: TextIO, temporary: Path | None, path: Path) -> None:
    if temporary is not None:
        os.link(temporary, path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the block as Ctrl-C does, so that what stands behind it is cleared; only the main thread can be asked for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
