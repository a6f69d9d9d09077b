"""Folders for what is big and short-lived, in memory where there is such a place; what a killed process left is removed by the next.

Each folder is locked by the process that made it, for as long as that lives; one that nobody holds is left over.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
PREFIX = "wardround-"
NEW_SECONDS = 60.0  # in which a folder may have been made and not yet be locked
_held: dict[Path, int] = {}  # by folder, the descriptor that holds its lock


def make_folder(num_bytes: int = 0) -> Path:
    """A new folder, for `remove_folder`: in memory where twice `num_bytes` are free there, else on disk.

    Raises:
        OSError: there is no room for it.
    """
    in_memory = os.access(MEMORY, os.W_OK)
    if in_memory:
        _remove_left_over()
    in_memory = in_memory and shutil.disk_usage(MEMORY).free > 2 * num_bytes
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY if in_memory else None))
    _held[made] = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(_held[made], fcntl.LOCK_EX)
    return made


def remove_folder(made: Path) -> None:
    """Remove a folder and all that is in it."""
    shutil.rmtree(made, ignore_errors=True)
    if made in _held:
        os.close(_held.pop(made))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new folder for a block, gone after it."""
    made = make_folder()
    try:
        yield made
    finally:
        remove_folder(made)


def _remove_left_over() -> None:
    """Remove this user's folders that nobody holds any more."""
    for path in MEMORY.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            about = path.stat()
            if about.st_uid != os.getuid() or time.time() < about.st_mtime + NEW_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
