"""A run that starts with a model that another run left, instead of one from its seed: pre-training, then fine-tuning.

What the other run learnt of its patients is covered by that run's claim alone. Whoever was a patient of both has both promises, which compose.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.run_folder import read_tensors
from shared.errors import DataMissingError, ModelMismatchError
from shared.models import Parameters, initial_parameters
from shared.results import StartedFrom
from shared.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """The parameters to start from, and what of them came from where."""

    parameters: Parameters
    source: StartedFrom


def warm_start(task: Task, seed: int, path: Path) -> WarmStart:
    """Every tensor of the task's model that the other model has under the same name, in the same shape and type; the rest from the seed.

    Args:
        path: a run's folder, whose final model is meant, or a model's file.

    Raises:
        DataMissingError: there is no such file, or the run has no final model.
        ModelMismatchError: it is none of ours or damaged, its values are not finite, or the two models share no tensor.
    """
    file = path / "model" / "final.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DataMissingError(f"{file}: expected a model to start from, found none", "give the folder of a run that ended, or a .safetensors file")
    header, tensors = read_tensors(file)
    parameters = initial_parameters(task.model(), seed)
    taken = [name for name, value in parameters.items() if name in tensors and _alike(tensors[name], value)]
    if not taken:
        raise ModelMismatchError(
            f"{file}: expected a model that shares tensors with task {task.name}, got one that shares none (names, shapes, types)",
            "start from a model with the same encoder",
        )
    if not all(np.isfinite(tensors[name]).all() for name in taken):
        raise ModelMismatchError(f"{file}: expected finite values, got NaN or infinity", "start from another model")
    fresh = tuple(name for name in parameters if name not in taken)
    source = StartedFrom(study=str(header.get("study")), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), taken=tuple(taken), fresh=fresh)
    return WarmStart(parameters=parameters | {name: tensors[name] for name in taken}, source=source)


def _alike(one: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", other: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
