"""What `simulation.py` trains: sites of 200 training and 50 test patients each, so that every framework gets the same batches to make."""

import dataclasses

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort
from shared.models import mlp
from shared.task import Task, resolve_task

TRAIN, TEST, FEATURES, HIDDEN = 200, 50, 30, (64, 32)


def tabular_arrays(num_sites: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(S, 250, 30)` float32 and labels `(S, 250)` int64; two classes, which a plane with some noise divides."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_sites, TRAIN + TEST, FEATURES)).astype(np.float32)
    direction = rng.normal(size=FEATURES) / np.sqrt(FEATURES)
    labels = (inputs @ direction + 0.5 * rng.normal(size=inputs.shape[:2]) > 0).astype(np.int64)
    return inputs, labels


def _cohort(num_patients: int, seed: int) -> Cohort:
    num_sites = max(1, num_patients // (TRAIN + TEST))
    inputs, labels = tabular_arrays(num_sites, seed)
    return Cohort(
        inputs=(inputs.reshape(-1, FEATURES),),
        labels=labels.reshape(-1),
        patient_of_record=np.arange(labels.size),
        patient_ids=tuple(map(str, range(labels.size))),
        attributes={"site": np.array([f"site-{number:05d}" for number in range(num_sites) for _ in range(TRAIN + TEST)])},
        published_test=np.tile(np.arange(TRAIN + TEST) >= TRAIN, num_sites),
        synthetic=True,
    )


def tabular_model() -> nn.Module:
    """An MLP 30-64-32-2, 4,130 parameters."""
    return mlp(FEATURES, 2, hidden=HIDDEN)


def tabular() -> Task:
    """The tabular workload."""
    from shared.metrics import confusion_metrics

    return dataclasses.replace(
        resolve_task("breast-cancer"), name="tabular-workload", model=tabular_model, synthetic_cohort=_cohort, bundled=False, sites=(),
        metrics=confusion_metrics(2), primary_metric="accuracy", predict=lambda outputs: outputs,
        loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="none"),
    )  # fmt: skip


def accuracy(model: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> float:
    """On all sites' test patients."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(inputs[:, TRAIN:].reshape(-1, FEATURES))).argmax(dim=1).numpy()
    return float((predicted == labels[:, TRAIN:].reshape(-1)).mean())
