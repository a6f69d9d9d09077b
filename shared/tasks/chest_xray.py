"""Chest radiograph: which of five findings does it show, learnt from reports that do not speak of every one.

Findings are the five of the CheXpert competition (Irvin et al. 2019). A finding is present, absent, or unknown: not spoken of, or "uncertain", which
is treated as not spoken of (their policy "U-Ignore"). Unknown ones add nothing to loss or metrics: the loss is masked, and each finding has a
histogram of its own over the patients for whom it is known.

Images are PNG or DICOM files, see `shared.tasks.images.READERS`.

Legend: N records, S side of an image, L findings, B score bins.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError, SchemaError
from shared.metrics import (
    NOISED_WIDTHS,
    NUM_BINS,
    FloatArray,
    Metric,
    Statistic,
    auroc,
    average_precision,
    calibration_error,
    score_cells,
)
from shared.schema import MISSING_MARKS, TensorSchema
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.images import (
    BoolArray,
    FloatImages,
    attribute_of,
    content_identifiers,
    data_file,
    in_set,
    model_input,
    patients_of,
    read_images,
    read_listing,
    refuse_too_many,
    repeated_images,
    tolerance_of,
)
from shared.tasks.tabular import attribute_texts

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

Grey = NDArray[np.floating]

NAME = "chest-xray"
SIDE = 64
FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion")
UNKNOWN = -1.0
MEANINGS = {"1": 1.0, "0": 0.0, "-1": UNKNOWN, **{mark.lower(): UNKNOWN for mark in MISSING_MARKS}}  # -1: uncertain
ATTRIBUTES = ("sex", "age")  # of a patient at the first image
SUBGROUPS = (
    Subgroup(attribute="sex", names={"F": "female", "M": "male"}),
    Subgroup(attribute="age", edges=(50, 70)),
)
SYNTHETIC_SITES = ("synthetic-1", "synthetic-2", "synthetic-3", "synthetic-4")
SYNTHETIC_GAINS = (1.0, 0.85, 1.1, 0.9)
SYNTHETIC_UNKNOWN_RATES = (0.1, 0.3, 0.2, 0.4)  # by site
SYNTHETIC_RATES = (0.25, 0.25, 0.2, 0.25, 0.35)  # by finding

SCHEMA = (TensorSchema(name="image", shape=(1, SIDE, SIDE), unit="grey value, black -1 to white 1", low=-1.0, high=1.0),)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV that lists PNG or DICOM files, or a folder with one CSV: a column `image` (a path below the folder) and a column for each finding.

    A finding is 1, 0, -1 (uncertain) or empty; capitals of its name do not matter. There may be `patient`, `site`, `sex` (F, M) and `age`.
    An image for which nothing is known is left out, and counted.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many records are.
    """
    tolerance = tolerance_of(options, NAME)
    file = data_file(path, NAME)
    if file.suffix.lower() != ".csv":
        raise SchemaError(f"{file.name}: expected a CSV file that lists images, got an NPZ", "see the task's page")
    frame = _named_findings(read_listing(file, ["image"]), file.name)
    labels, known = findings_of(frame)
    read = read_images(file.parent, frame["image"], side=SIDE, source=file.name)
    usable = read.usable & known & ~repeated_images(frame)
    problem = read.first_problem or "a finding outside its set, or an image listed twice"
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=file.name, first=problem, bad=~usable)
    kept = usable & (labels != UNKNOWN).any(axis=1)
    if not kept.any():
        raise DataMissingError(f"{file.name}: expected at least one image with a known finding, got none", "check the columns of findings")
    notes = {"records_dropped": int((~usable).sum()), "records_without_label": int((usable & ~kept).sum())}
    return _cohort(frame[kept], read.images[kept], labels[kept], notes=notes, source=file.name)


def _named_findings(frame: "pd.DataFrame", source: str) -> "pd.DataFrame":
    """The table with the columns of findings named as here.

    Raises:
        SchemaError: one is missing, or there twice.
    """
    spellings = {finding: [name for name in frame.columns if name.lower().replace("_", " ") == finding] for finding in FINDINGS}
    for finding, names in spellings.items():
        if len(names) != 1:
            raise SchemaError(
                f"{source}: expected one column {finding!r}, found {len(names)}", "rename or add it; leave it empty where nothing is known"
            )
    return frame.rename(columns={names[0]: finding for finding, names in spellings.items()})


def findings_of(frame: "pd.DataFrame") -> tuple[NDArray[np.float32], BoolArray]:
    """Labels `(N, L)`: 1, 0 or `UNKNOWN`; and where all of a record's are in the set, `(N,)`."""
    columns = [in_set(frame[finding], MEANINGS) for finding in FINDINGS]
    return np.stack([labels for labels, _ in columns], axis=1), np.logical_and.reduce([known for _, known in columns])


def _cohort(frame: "pd.DataFrame", images: FloatImages, labels: NDArray[np.float32], *, notes: Mapping[str, int], source: str) -> Cohort:
    patients = patients_of(frame["patient"].tolist() if "patient" in frame.columns else content_identifiers(images), source=source)
    attributes = {name: attribute_texts(frame[name])[patients.first] for name in ATTRIBUTES if name in frame.columns}
    if "site" in frame.columns:
        attributes["site"] = attribute_of(frame["site"].to_numpy(), patients, "site", source=source)
    return Cohort(
        inputs=(model_input(images),),
        labels=labels,
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes=attributes,
        notes=notes,
    )


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients: lungs, heart and ribs, and each finding drawn where it is seen.

    Four sites differ in exposure and in how many findings their reports leave out; the fourth never speaks of edema. Hearts grow with age.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    site = rng.integers(len(SYNTHETIC_SITES), size=num_patients)
    age = rng.integers(20, 90, size=num_patients)
    rates = np.tile(SYNTHETIC_RATES, (num_patients, 1))
    rates[:, FINDINGS.index("cardiomegaly")] += (age - 55) / 200
    truth = rng.random(rates.shape) < rates
    images = _synthetic_images(truth, rng) * np.array(SYNTHETIC_GAINS)[site][:, None, None]
    unknown = rng.random(truth.shape) < np.array(SYNTHETIC_UNKNOWN_RATES)[site][:, None]
    unknown[site == 3, FINDINGS.index("edema")] = True
    unknown[unknown.all(axis=1), -1] = False  # as a loader leaves out images for which nothing is known
    return Cohort(
        inputs=(model_input(np.clip(images, 0, 1).astype(np.float32)),),
        labels=np.where(unknown, UNKNOWN, truth).astype(np.float32),
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={
            "site": np.array(SYNTHETIC_SITES)[site],
            "sex": rng.choice(["F", "M"], size=num_patients),
            "age": age.astype(np.str_),
        },
        synthetic=True,
    )


def _synthetic_images(truth: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
    """`(N, S, S)`: tissue is bright and air dark."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    count = len(truth)

    def uniform(low: float, high: float) -> Grey:
        return rng.uniform(low, high, size=(count, 1, 1)).astype(np.float32)

    def ellipse(down: Grey | float, right: Grey | float, height: float, width: Grey | float) -> Grey:
        distance = ((rows - down) / height) ** 2 + ((columns - right) / width) ** 2
        return np.asarray(1 / (1 + np.exp(np.clip((distance - 1) * 6, -30, 30))), dtype=np.float32)

    atelectasis, cardiomegaly, consolidation, edema, effusion = truth.T.astype(np.float32)[:, :, None, None]
    side = np.sign(uniform(-1, 1))  # of what is seen on one side
    lung = uniform(0.14, 0.17)
    lungs = np.maximum(ellipse(0.48, 0.28, 0.34, lung), ellipse(0.48, 0.72, 0.34, lung))
    heart = ellipse(0.62, 0.55, 0.17, uniform(0.11, 0.16) + 0.08 * cardiomegaly)
    ribs = 0.04 * np.sin(rows * 45 + uniform(0, 6))
    air = 0.5 * lungs * (1 - heart)
    other_side = 0.5 + 0.22 * side
    air = air * (1 - 0.75 * effusion * ellipse(0.80, other_side, 0.16, 0.2))
    air = air * (1 - 0.65 * consolidation * ellipse(uniform(0.28, 0.5), 0.5 - 0.22 * side, 0.1, 0.1))
    air = air * (1 - 0.45 * edema * ellipse(0.48, 0.5, 0.22, 0.34))
    air = air * (1 - 0.7 * atelectasis * ellipse(uniform(0.55, 0.65), other_side, 0.035, 0.15))
    return np.asarray(0.75 - air + ribs * lungs + 0.03 * rng.standard_normal(air.shape, dtype=np.float32), dtype=np.float64)


# Model and loss -----------------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    """A CNN of four convolutions with GroupNorm; `(N, 1, S, S) -> (N, L)` logits."""

    def stage(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1), nn.GroupNorm(4, num_out), nn.ReLU()]

    return nn.Sequential(
        nn.AvgPool2d(2),
        *stage(1, 16, 1),
        *stage(16, 16, 2),
        *stage(16, 16, 2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, len(FINDINGS)),
    )


def masked_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over the findings that are known, summed and divided by L, for each record `(N,)`; 0 where none is known."""
    known = labels != UNKNOWN
    losses = nn.functional.binary_cross_entropy_with_logits(outputs, labels.clamp(min=0), reduction="none")
    return (losses * known).sum(dim=1) / len(FINDINGS)


# Metrics ------------------------------------------------------------------------------------------------------------------------


def finding_histograms(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(L, 2, B)`: for each finding, patients by its truth (row) and bin of its score; who is unknown is not counted.

    Args:
        predictions: `(N, L)` probabilities.
    """
    weights = cohort.record_weights()
    histograms = np.zeros((len(FINDINGS), 2, NUM_BINS))
    for index in range(len(FINDINGS)):
        known = cohort.labels[:, index] != UNKNOWN
        cells = score_cells(predictions[known, index], cohort.labels[known, index])
        histograms[index] = np.bincount(cells, weights=weights[known], minlength=2 * NUM_BINS).reshape(2, NUM_BINS)
    return histograms


def mean_over_findings(finish: Callable[[FloatArray], float | None]) -> Callable[[FloatArray], float | None]:
    """The mean of a metric over the findings that have a value; None where none has."""

    def finished(histograms: FloatArray) -> float | None:
        values = [value for histogram in histograms if (value := finish(histogram)) is not None]
        return sum(values) / len(values) if values else None

    return finished


def _auroc_of(index: int) -> Callable[[FloatArray], float | None]:
    return lambda histograms: auroc(histograms[index])


HISTOGRAMS = Statistic(
    name="finding_histograms",
    shape=(len(FINDINGS), 2, NUM_BINS),
    summarise=finding_histograms,
    sensitivity=len(FINDINGS) ** 0.5,  # a patient adds at most 1 to the histogram of each finding
    is_counts=False,  # entries count patients, but a patient is in several
    noised_widths=NOISED_WIDTHS,
)
METRICS = (
    Metric(name="auroc", statistic=HISTOGRAMS, finish=mean_over_findings(auroc), low=0, high=1),
    Metric(name="auprc", statistic=HISTOGRAMS, finish=mean_over_findings(average_precision), low=0, high=1),
    Metric(name="calibration_error", statistic=HISTOGRAMS, finish=mean_over_findings(calibration_error), higher_is_better=False, low=0, high=1),
    *(
        Metric(name=f"auroc_{finding.replace(' ', '_')}", statistic=HISTOGRAMS, finish=_auroc_of(index), low=0, high=1)
        for index, finding in enumerate(FINDINGS)
    ),
)


def chest_xray() -> Task:
    """The task `chest-xray`."""
    return Task(
        name=NAME,
        title="Findings in a chest radiograph",
        modality="image",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=model,
        loss=masked_loss,
        predict=torch.sigmoid,
        predicted=tuple(finding.replace(" ", "_") for finding in FINDINGS),
        metrics=METRICS,
        primary_metric="auroc",
        source="your own radiographs and findings; synthetic chests",
        default_study="chest-xray.toml",
        subgroups=SUBGROUPS,
    )
