"""Breast ultrasound: does the image show a malignant lesion, or a benign one or none.

Data: BreastMNIST of MedMNIST v2 (Yang et al. 2023; Zenodo 10.5281/zenodo.6496656, CC BY 4.0), 780 images of 28 x 28, made from BUSI (Al-Dhabyani
et al. 2020). Its published test part is the test part here; its training and validation parts are trained on. It says nothing of patients, so
every image counts as a patient's only one. A hospital's own images are PNG or DICOM files listed in a CSV, which may name patients, and sites.

Legend: N records, S side of an image.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError, SchemaError
from shared.metrics import BINARY_METRICS
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import (
    Augmentation,
    FloatImages,
    attribute_of,
    content_identifiers,
    data_file,
    images_of_stack,
    in_set,
    model_input,
    patients_of,
    read_images,
    read_listing,
    read_npz,
    refuse_too_many,
    repeated_images,
    tolerance_of,
)
from shared.tasks.tabular import logistic_loss

SIDE = 28
PARTS = ("train", "val", "test")  # of MedMNIST
MALIGNANT_CODE, OTHER_CODE = 0, 1  # MedMNIST's; here malignant counts 1
FINDINGS = {"malignant": 1.0, "benign": 0.0, "normal": 0.0, "1": 1.0, "0": 0.0}
SYNTHETIC_SITES = {
    "synthetic-1": (0.00, 1.0),
    "synthetic-2": (0.08, 0.9),
    "synthetic-3": (-0.05, 1.1),
    "synthetic-4": (0.04, 0.8),
}  # brightness, gain
SYNTHETIC_LOST_CONTACT_RATE = 0.1

SCHEMA = (TensorSchema(name="image", shape=(1, SIDE, SIDE), unit="grey value, black -1 to white 1", low=-1.0, high=1.0),)


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """MedMNIST's file (an NPZ with `train_images`, `train_labels` and so on), or a CSV that lists PNG or DICOM files, or a folder with one of them.

    The CSV has the columns `image` (a path below its folder) and `finding` (malignant, benign or normal), and may have `patient` and `site`.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the file is missing, unreadable or not as declared, or too many records are.
    """
    tolerance = tolerance_of(options, "breast-ultrasound")
    file = data_file(path, "breast-ultrasound")
    return load_medmnist(file, tolerance=tolerance) if file.suffix.lower() == ".npz" else load_listing(file, tolerance=tolerance)


def load_medmnist(path: Path, *, tolerance: float) -> Cohort:
    """The cohort in a file of MedMNIST, with its published split; a larger edition's images are resized."""
    arrays = read_npz(path, [f"{part}_{what}" for part in PARTS for what in ("images", "labels")])
    images, codes, test = [], [], []
    for part in PARTS:
        stack, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if labels.shape not in ((len(stack),), (len(stack), 1)) or labels.dtype.kind not in "iuf":
            raise SchemaError(
                f"{path.name}: array '{part}_labels': expected a number for each of {len(stack)} images, got {labels.shape} {labels.dtype}",
                "fetch the file again",
            )
        images.append(images_of_stack(stack, f"{part}_images", side=SIDE, source=path.name))
        codes.append(labels.reshape(-1))
        test.append(np.full(len(stack), part == "test"))
    code = np.concatenate(codes)
    usable = np.concatenate([read.usable for read in images]) & ((code == MALIGNANT_CODE) | (code == OTHER_CODE))
    refuse_too_many(
        int((~usable).sum()), len(usable), tolerance=tolerance, source=path.name, first=next((r.first_problem for r in images), ""), bad=~usable
    )
    pixels = np.concatenate([read.images for read in images])[usable]
    identifiers = content_identifiers(pixels)
    return Cohort(
        inputs=(model_input(pixels),),
        labels=(code[usable] == MALIGNANT_CODE).astype(np.float32),
        patient_of_record=np.arange(len(pixels), dtype=np.int64),
        patient_ids=tuple(identifiers),
        published_test=np.concatenate(test)[usable],
        notes={"records_dropped": int((~usable).sum()), "images_seen_before": sum(not name.endswith("-1") for name in identifiers)},
    )


def load_listing(path: Path, *, tolerance: float) -> Cohort:
    """The cohort that a CSV lists; without a column `patient` every image is a patient of its own."""
    frame = read_listing(path, ["image", "finding"])
    labels, known = in_set(frame["finding"], FINDINGS)
    read = read_images(path.parent, frame["image"], side=SIDE, source=path.name)
    usable = read.usable & known & ~repeated_images(frame)
    problem = read.first_problem or "a finding outside its set, or an image listed twice"
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=path.name, first=problem, bad=~usable)
    kept = frame[usable]
    identifiers = kept["patient"].tolist() if "patient" in kept.columns else content_identifiers(read.images[usable])
    patients = patients_of(identifiers, source=path.name)
    return Cohort(
        inputs=(model_input(read.images[usable]),),
        labels=labels[usable],
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes={name: attribute_of(kept[name].to_numpy(), patients, name, source=path.name) for name in ("site",) if name in kept.columns},
        notes={"records_dropped": int((~usable).sum())},
    )


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients: a dark lesion in speckle, round and smooth or, where malignant, irregular and taller than wide, with a shadow.

    Four sites differ in brightness and gain; in one image of ten the probe lost contact over a few columns, and nothing is seen there.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", "breast-ultrasound")
    labels = (rng.random(num_patients) < 0.3).astype(np.float32)
    names = np.array(list(SYNTHETIC_SITES))
    site = rng.integers(len(names), size=num_patients)
    images = _synthetic_images(labels, rng)
    brightness, gain = np.array(list(SYNTHETIC_SITES.values()), dtype=np.float32)[site].T
    images = np.clip((images - 0.5) * gain[:, None, None] + 0.5 + brightness[:, None, None], 0, 1).astype(np.float32) * _contact(num_patients, rng)
    return Cohort(
        inputs=(model_input(images),),
        labels=labels,
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site]},
        synthetic=True,
    )


def _synthetic_images(labels: NDArray[np.float32], rng: np.random.Generator) -> FloatImages:
    """`(N, S, S)`: a lesion's edge lies where the distance from its middle is 1; a malignant one's edge waves."""
    count = len(labels)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    middle = rng.uniform(0.35, 0.65, size=(2, count, 1, 1)) * SIDE
    radius = rng.uniform(0.14, 0.26, size=(count, 1, 1)) * SIDE
    malignant = labels[:, None, None]
    stretch = np.exp(rng.normal(0, 0.15, size=(count, 1, 1)) + 0.30 * (malignant - 0.3))
    down, right = (rows - middle[0]) / (radius * stretch), (columns - middle[1]) / (radius / stretch)
    angle = np.arctan2(down, right)
    waves = (0.04 + 0.16 * malignant) * np.sin(rng.integers(4, 8, size=(count, 1, 1)) * angle + rng.uniform(0, 2 * np.pi, size=(count, 1, 1)))
    inside = 1 / (1 + np.exp((np.hypot(down, right) - 1 - waves) * 8))
    shadow = (0.25 * malignant - 0.05) * (np.abs(right) < 0.8) * (down > 0.8)
    tissue = 0.55 - 0.35 * inside - shadow
    speckle = rng.gamma(12.0, 1 / 12.0, size=tissue.shape)  # multiplicative, as in ultrasound
    return np.asarray(np.clip(tissue * speckle, 0, 1), dtype=np.float32)


def _contact(count: int, rng: np.random.Generator) -> FloatImages:
    """`(N, 1, S)`: 1 where the probe touches the skin, 0 where it does not."""
    lost = rng.random((count, 1, 1)) < SYNTHETIC_LOST_CONTACT_RATE
    start, width = rng.integers(SIDE, size=(count, 1, 1)), rng.integers(3, 7, size=(count, 1, 1))
    columns = np.arange(SIDE)
    return np.asarray(~(lost & (columns >= start) & (columns < start + width)), dtype=np.float32)


def model() -> nn.Module:
    """A small CNN, `(N, 1, S, S) -> (N, 1)` logits: 825 parameters, for noise grows with their number and 125 patients a site are few.

    Halving the image first takes out speckle, which at this size tells nothing.
    """
    return nn.Sequential(
        Augmentation(shift=0.05, degrees=10),
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 1),
    )


def breast_ultrasound() -> Task:
    """The task `breast-ultrasound`."""
    return Task(
        name="breast-ultrasound",
        title="Malignant lesion in a breast ultrasound image",
        modality="image",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=model,
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="BreastMNIST of MedMNIST v2 (Yang et al. 2023), from BUSI (Al-Dhabyani et al. 2020); or PNG or DICOM files and a CSV",
        default_study="breast-ultrasound.toml",
    )
