"""What `simulation.py` trains: sites of 200 training and 50 test patients each, synthetic, and the same for every side.

Ours takes them as tasks of its own, `workloads:tabular`, `workloads:image`, `workloads:sequence`; the others as arrays.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sides import models
from torch import nn

from shared.cohort import Cohort
from shared.metrics import confusion_metrics
from shared.models import make_private
from shared.schema import TensorSchema
from shared.task import Task

TRAIN, TEST, STEPS, SIDE = 200, 50, 48, 28
Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]  # inputs (S, 250, ...) and labels (S, 250)


def tabular_arrays(num_sites: int, rng: np.random.Generator) -> Arrays:
    """30 numbers; two classes, which a plane with some noise divides."""
    inputs = rng.standard_normal((num_sites, TRAIN + TEST, models.FEATURES), dtype=np.float32)
    direction = rng.normal(size=models.FEATURES) / np.sqrt(models.FEATURES)
    labels = inputs @ direction.astype(np.float32) + 0.5 * rng.standard_normal(inputs.shape[:2], dtype=np.float32) > 0
    return inputs, labels.astype(np.int64)


def image_arrays(num_sites: int, rng: np.random.Generator) -> Arrays:
    """28x28; ten classes, each a coarse pattern under noise; a tenth of the labels is drawn anew."""
    patterns = np.kron(rng.normal(size=(10, 7, 7)), np.ones((4, 4))).astype(np.float32)
    labels = rng.integers(10, size=(num_sites, TRAIN + TEST))
    inputs = rng.standard_normal((*labels.shape, 1, SIDE, SIDE), dtype=np.float32)
    inputs += 2.0 * patterns[labels][:, :, None]
    return inputs, np.where(rng.random(labels.shape) < 0.1, rng.integers(10, size=labels.shape), labels)


def sequence_arrays(num_sites: int, rng: np.random.Generator) -> Arrays:
    """48 steps of 12 channels; two classes, which differ in the mean of a mixture of the channels."""
    labels = rng.integers(2, size=(num_sites, TRAIN + TEST))
    inputs = rng.standard_normal((*labels.shape, STEPS, models.CHANNELS), dtype=np.float32)
    direction = (rng.normal(size=models.CHANNELS) / np.sqrt(models.CHANNELS)).astype(np.float32)
    inputs += 0.4 * (2 * labels[..., None, None] - 1).astype(np.float32) * direction
    return inputs, labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Patients, our model of them, and the learning rate that every side takes."""

    arrays: Callable[[int, np.random.Generator], Arrays]
    model: Callable[[], nn.Module]
    num_classes: int
    learning_rate: float


WORKLOADS = {
    "tabular": Workload(arrays=tabular_arrays, model=models.tabular, num_classes=2, learning_rate=0.5),
    "image": Workload(arrays=image_arrays, model=models.image, num_classes=10, learning_rate=0.5),
    "sequence": Workload(arrays=sequence_arrays, model=lambda: make_private(models.sequence()), num_classes=2, learning_rate=0.5),
    **{
        f"tabular_{width}": Workload(
            arrays=tabular_arrays, model=functools.partial(models.tabular, (width, width // 2)), num_classes=2, learning_rate=0.5
        )
        for width in (128, 256, 512)  # for scaling.py
    },
}


def _cohort(inputs: NDArray[np.float32], labels: NDArray[np.int64]) -> Cohort:
    num_sites = len(labels)
    return Cohort(
        inputs=(inputs.reshape(-1, *inputs.shape[2:]),),
        labels=labels.reshape(-1),
        patient_of_record=np.arange(labels.size),
        patient_ids=tuple(map(str, range(labels.size))),
        attributes={"site": np.repeat([f"{number:05d}" for number in range(num_sites)], TRAIN + TEST)},
        published_test=np.tile(np.arange(TRAIN + TEST) >= TRAIN, num_sites),
        synthetic=True,
    )


def _load(path: Path | None, options: Mapping[str, object]) -> Cohort:
    assert path is not None
    return _cohort(np.load(path / "inputs.npy", mmap_mode="c"), np.load(path / "labels.npy", mmap_mode="c"))


def task_of(name: str) -> Task:
    """The task of this workload."""
    workload = WORKLOADS[name]

    def synthetic(num_patients: int, seed: int) -> Cohort:
        return _cohort(*workload.arrays(max(1, num_patients // (TRAIN + TEST)), np.random.default_rng(seed)))

    inputs, _ = workload.arrays(1, np.random.default_rng(0))
    return Task(
        name=name, title=name, modality="synthetic", schema=(TensorSchema(name=name, shape=inputs.shape[2:], low=-10.0, high=10.0),),
        load_cohort=_load, synthetic_cohort=synthetic, model=workload.model, metrics=confusion_metrics(workload.num_classes), primary_metric="accuracy",
        loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="none"), predict=_same,
    )  # fmt: skip


def _same(outputs: torch.Tensor) -> torch.Tensor:
    return outputs


tabular, image, sequence = (functools.partial(task_of, name) for name in ("tabular", "image", "sequence"))
tabular_128, tabular_256, tabular_512 = (functools.partial(task_of, f"tabular_{width}") for width in (128, 256, 512))
