"""The final model's file as a report needs it: its hash and its header, read without torch and without its numbers."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from shared.errors import StorageError
from shared.files import storage_errors

FINAL = Path("model") / "final.safetensors"
HEADER = "wardround"  # as server.run_folder writes it
MAX_HEADER = 100_000_000  # bytes, as safetensors allows


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """`header` names study, study_hash, task and architecture."""

    sha256: str
    num_bytes: int
    num_parameters: int
    header: dict[str, str]


def read_final_model(folder: Path) -> ModelFile | None:
    """The final model of a run; None where it has none.

    Raises:
        StorageError: the file is damaged or none of ours.
    """
    path = folder / FINAL
    with storage_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(MAX_HEADER, len(data) - 8):
            raise ValueError("its header is longer than the file")
        table = json.loads(data[8 : 8 + length])
        header = json.loads(table.pop("__metadata__")[HEADER])
        size = sum(math.prod(tensor["shape"]) for tensor in table.values())
        known = {str(name): str(value) for name, value in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path}: expected a safetensors file of ours, could not read its header ({type(error).__name__})", "restore it, or run the study again"
        ) from error
    return ModelFile(sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data), num_parameters=size, header=known)
