"""Folders for what is big and short-lived, in memory where there is such a place; what a killed process left is removed by the next."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
PREFIX = "wardround-"


def make_folder(num_bytes: int = 0) -> Path:
    """A new folder, which is the caller's to remove: in memory where twice `num_bytes` are free there, else on disk.

    Raises:
        OSError: there is no room for it.
    """
    in_memory = os.access(MEMORY, os.W_OK)
    if in_memory:
        _remove_left_over()
    in_memory = in_memory and shutil.disk_usage(MEMORY).free > 2 * num_bytes
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=MEMORY if in_memory else None))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """The same for a block, and gone after it."""
    made = make_folder()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_left_over() -> None:
    """Remove this user's folders whose process is gone."""
    for path in MEMORY.glob(f"{PREFIX}*-*"):
        number = path.name.removeprefix(PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if number.isdigit() and path.stat().st_uid == os.getuid() and not Path(f"/proc/{number}").exists():
                shutil.rmtree(path, ignore_errors=True)
