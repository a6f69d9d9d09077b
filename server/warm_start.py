"""A run that starts with a model that another run left, instead of one from its seed: pre-training, then fine-tuning.

What the other run learnt of its patients is covered by that run's claim alone, which is read with its model and told wherever the new run's is: a
promise of the second run is none to a patient of the first. Whoever was a patient of both has both promises, which compose.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from server.run_folder import read_tensors
from shared.errors import DataMissingError, ModelMismatchError, StorageError
from shared.files import storage_errors
from shared.models import Parameters, initial_parameters
from shared.results import PrivacyClaim, RunStart, StartedFrom
from shared.task import Task
from shared.whole_promise import WholePromise, whole_promise

LEAST_SHARE = 0.5  # of the parameters that are not personal: two tasks with one output share its bias, which is no start

Read = TypeVar("Read", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """The parameters to start from, and what of them came from where."""

    parameters: Parameters
    source: StartedFrom


def warm_start(task: Task, seed: int, path: Path, *, personal: frozenset[str] = frozenset()) -> WarmStart:
    """Every tensor of the task's model that the other model has under the same name, in the same shape and type; the rest from the seed.

    Args:
        path: a run's folder, whose final model is meant, or a model's file.
        personal: names of what stays at the sites of the run that starts: each begins with the seed's.

    Raises:
        DataMissingError: there is no such file, or the run has no final model.
        ModelMismatchError: it is none of ours or damaged, its values are not finite, or the two models share no tensor, or less than half of what
            the sites share, by number of parameters.
        StorageError: its run's claim sheet is damaged.
    """
    file = path / "model" / "final.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DataMissingError(f"{file}: expected a model to start from, found none", "give the folder of a run that ended, or a .safetensors file")
    header, tensors = read_tensors(file)
    parameters = initial_parameters(task.model(), seed)
    untrained = personal | set(str(header.get("personal", "")).split("\n"))
    taken = [name for name, value in parameters.items() if name not in untrained and name in tensors and _alike(tensors[name], value)]
    if not taken:
        raise ModelMismatchError(
            f"{file}: expected a model that shares tensors with task {task.name}, got one that shares none (names, shapes, types)",
            "start from a model with the same encoder",
        )
    if not all(np.isfinite(tensors[name]).all() for name in taken):
        raise ModelMismatchError(f"{file}: expected finite values, got NaN or infinity", "start from another model")
    asked = sum(value.size for name, value in parameters.items() if name not in personal)
    share = sum(parameters[name].size for name in taken) / max(asked, 1)
    if share < LEAST_SHARE:
        raise ModelMismatchError(
            f"{file}: expected a model that shares at least {LEAST_SHARE:.0%} of the parameters of task {task.name}, got one that shares {share:.2g} of "
            f"them ({', '.join(taken[:3])})",
            "start from a model with the same encoder",
        )
    fresh = tuple(name for name in parameters if name not in taken)
    promised = promise_of_run(path)
    source = StartedFrom(
        study=str(header.get("study")), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), taken=tuple(taken), fresh=fresh, share=share,
        unit=promised.unit, protects=promised.protects, epsilon=promised.epsilon, delta=promised.delta,
        epsilon_if_all_others_collude=promised.colluding, conditions=promised.conditions,
    )  # fmt: skip
    return WarmStart(parameters=parameters | {name: tensors[name] for name in taken}, source=source)


def promise_of_run(path: Path) -> WholePromise:
    """What the run in the folder `path` promised, with what it started from itself; unit "unknown" of a model's file that stands alone.

    Raises:
        StorageError: privacy.json or run.json of the folder is damaged.
    """
    if not path.is_dir():
        return WholePromise(unit="unknown")
    claim, start = _read(path / "privacy.json", PrivacyClaim), _read(path / "run.json", RunStart)
    return whole_promise(claim, None if start is None else start.started_from)


def _read(file: Path, kind: type[Read]) -> Read | None:
    if not file.is_file():
        return None
    with storage_errors(file, "read"):
        content = file.read_bytes()
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        raise StorageError(f"{file}: expected a file of a run, got one that is damaged or of another version", "restore it") from None


def _alike(one: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", other: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
