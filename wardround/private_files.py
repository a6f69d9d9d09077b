"""Files that hold patients' data: their owner's alone to read, whole or not at all, and never in the place of another file unless told so."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from shared.errors import StorageError
from shared.files import storage_errors


@contextlib.contextmanager
def private_file(path: Path, *, force: bool = False) -> Iterator[TextIO]:
    """A text file to write to, mode 0600; it appears at `path` when the block ends, and not at all where the block raises.

    Args:
        force: a file that is there already is replaced.

    Raises:
        StorageError: there is a file already, or the folder cannot be written to.
    """
    if path.is_dir() or (path.exists() and not force):
        raise StorageError(f"{path}: expected a new file, found {'a folder' if path.is_dir() else 'one'}", "give another with --out, or add --force")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    with storage_errors(path, "write"):
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # another process's file, made meanwhile, stands
        finally:
            temporary.unlink(missing_ok=True)
