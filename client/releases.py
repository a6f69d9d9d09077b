"""What a site released last, kept so that a request repeated after a crash gets the identical answer and is no new charge.

Only where noise comes from the operating system: seeded noise is drawn again instead. One file a run and kind, replaced by the next round's.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.errors import StorageError
from shared.files import storage_errors, write_atomic
from shared.models import arrays_digest

Arrays = dict[str, NDArray[np.floating]]


def row_digests(rows: NDArray[np.floating], template: Mapping[str, NDArray[np.floating]]) -> tuple[str, ...]:
    """`arrays_digest` of each row: the arrays of the template, one after another."""
    ends = np.cumsum([value.size for value in template.values()]) * rows.itemsize
    headers = [f"{name}\n{rows.dtype.str}{value.shape}\n".encode() for name, value in template.items()]
    digests = []
    for row in rows:
        digest, content, start = hashlib.sha256(), np.ascontiguousarray(row).data.cast("B"), 0
        for header, end in zip(headers, ends.tolist(), strict=True):
            digest.update(header)
            digest.update(content[start:end])
            start = end
        digests.append(digest.hexdigest())
    return tuple(digests)


class Releases:
    """The kept releases of one cohort, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, run: str, kind: str, request: str, arrays: Arrays) -> None:
        """Durably keep the answer to `request`, in place of the run's earlier one.

        Raises:
            StorageError: it cannot be written; then it must not leave either.
        """
        path = self._path(run, kind)
        with storage_errors(path, "keep a release"):
            self._folder.mkdir(parents=True, exist_ok=True)
        ordered = {f"{index:06d} {name}": np.array(value, order="C") for index, (name, value) in enumerate(arrays.items())}
        write_atomic(path, save(ordered, metadata={"request": request, "sha256": arrays_digest(arrays)}), mode=0o600)

    def find(self, run: str, kind: str, request: str) -> Arrays | None:
        """The identical arrays that answered `request`; None where another request was last.

        Raises:
            StorageError: the file is there and damaged.
        """
        path = self._path(run, kind)
        if not path.exists():
            return None
        try:
            with storage_errors(path, "read a release"), safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("request") != request:
                    return None
                arrays: Arrays = {name.split(" ", 1)[1]: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, IndexError) as error:
            raise StorageError(f"{path}: expected a kept release, got a damaged file", "delete it; the round is then a new charge") from error
        if arrays_digest(arrays) != metadata.get("sha256"):
            raise StorageError(f"{path}: expected a kept release, got other values", "delete it; the round is then a new charge")
        return arrays

    def drop(self, run: str, kind: str) -> None:
        """Forget the run's release of this kind."""
        with storage_errors(self._path(run, kind), "delete a release"):
            self._path(run, kind).unlink(missing_ok=True)

    def _path(self, run: str, kind: str) -> Path:
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-{kind}.safetensors"
