"""Records of the first day in intensive care in six numbers, and which records do not look like the others.

A bottleneck autoencoder (Hinton and Salakhutdinov 2006, Science 313:504-507) on the features of `icu-apache`: the encoder sees what was measured and
that the rest was not; the decoder sees the six numbers alone, and is judged where something was measured. A record that it cannot give back is
unlike those that it learned from (Hawkins et al. 2002, "Outlier detection using replicator neural networks"): an error of entry, or a rare patient.

Values are in standard units: deviations from a healthy value over a public spread, both from a table of clinical knowledge and no statistic of the
data, cut at five. So every finding counts about alike. Labels are the outcomes of `icu-apache`, by which a simulation may divide patients; the loss
does not read them.

How well outliers are found is measured on planted ones: each test record is set beside its own mirror image, in which every second finding that was
measured is as far from the other end of its declared range. Each value is one that can be; together they seldom are.

Legend: N records, F features of `icu-apache`, V columns to reconstruct, K numbers of the code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataMissingError
from shared.metrics import NOISED_WIDTHS, NUM_BINS, FloatArray, Metric, Statistic, auroc, bin_of_score
from shared.models import Parameters, predict_in_batches, set_parameters
from shared.schema import TensorSchema
from shared.task import ExplainedOutput, Task
from shared.tasks import icu_apache
from shared.tasks.eicu import REGIONS

NAME = "record-autoencoder"
CODE, HIDDEN = 6, 128
MOST = 5.0  # standard units: what lies further out counts as so far
MOST_ERROR = (2 * MOST) ** 2  # of a record in a metric, in standard units squared
MOST_SQUARE = 2.0  # standard units squared, the mean over what was measured: a record of which there is more counts less
STEPS = 16  # of a record in the sums of R2
_POINTS = (45.0, 25.0)  # apache_points: a usual value and a spread, in points
_AGE = (63.0, 17.0)  # years
_COLUMNS = icu_apache.SCHEMA.columns
_FEATURES = icu_apache.SCHEMA.feature_names
COLUMNS = tuple(column.name for column in _COLUMNS)  # V names
NUM_VALUES = len(COLUMNS)

SCHEMA = (TensorSchema(name="features", shape=(len(_FEATURES),), unit=", ".join(_FEATURES), low=-1, high=1),)


# Standard units -----------------------------------------------------------------------------------------------------------------


def standard_of(column: str) -> tuple[float, float]:
    """Centre and spread of a column as fractions of its declared range scaled to [-1, 1]; a flag is taken as it is.

    >>> standard_of("vent")
    (0.0, 1.0)
    """
    public = {"apache_points": (*_POINTS, "linear"), "age": (*_AGE, "linear")}
    public |= {name: (healthy, spread, scale) for name, (_, _, _, scale, healthy, spread) in icu_apache.FINDINGS.items()}
    if column not in public:
        return 0.0, 1.0
    centre, spread, scale = public[column]
    declared = next(each for each in _COLUMNS if each.name == column)
    assert declared.low is not None and declared.high is not None
    low, high = declared.low, declared.high
    if scale == "log":
        low, high, centre = math.log(low), math.log(high), math.log(centre)  # a spread of a logarithm is one already
    return 2 * (centre - low) / (high - low) - 1, 2 * spread / (high - low)


_STANDARD = [standard_of(name) for name in COLUMNS]
_CENTRE, _SPREAD = (np.array(values, dtype=np.float32) for values in zip(*_STANDARD, strict=True))  # (V,)
_PLACES = [_FEATURES.index(name) for name in COLUMNS]  # (V,) of a column's value among the features
_INDICATED = [f"{name} missing" in _FEATURES for name in COLUMNS]
_FLAG_PLACES = [_FEATURES.index(f"{name} missing") if told else 0 for name, told in zip(COLUMNS, _INDICATED, strict=True)]
_MIRRORED = tuple(icu_apache.FINDINGS)[::2]  # findings that are turned round in a planted outlier


# Model --------------------------------------------------------------------------------------------------------------------------


class RecordAutoencoder(nn.Module):
    """`(N, F)` -> `(N, 2 + K)`: a record's error, the error of its mirror image (0 in training, where nobody asks), and its code.

    An error is the mean, over the columns that were measured, of the squared difference to what the decoder gives, in standard units.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2 * NUM_VALUES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_VALUES))
        constants = {
            "places": torch.tensor(_PLACES),
            "flag_places": torch.tensor(_FLAG_PLACES),
            "indicated": torch.tensor(_INDICATED, dtype=torch.float32),
            "centre": torch.from_numpy(_CENTRE),
            "spread": torch.from_numpy(_SPREAD),
            "sides": torch.tensor([-1.0 if name in _MIRRORED else 1.0 for name in COLUMNS]),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)  # of the architecture, not of what is trained
        self.places: torch.Tensor
        self.flag_places: torch.Tensor
        self.indicated: torch.Tensor
        self.centre: torch.Tensor
        self.spread: torch.Tensor
        self.sides: torch.Tensor

    def standard(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N, F)` -> values in standard units, 0 where not measured, and 1 where measured: `(N, V)` each."""
        measured = 1 - features[..., self.flag_places] * self.indicated
        return self._standardised(features[..., self.places]) * measured, measured

    def _standardised(self, scaled: torch.Tensor) -> torch.Tensor:
        return ((scaled - self.centre) / self.spread).clamp(-MOST, MOST)

    def encode(self, values: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """The code, `(N, K)`."""
        return self.encoder(torch.cat([values, measured - 1], dim=-1))  # type: ignore[no-any-return]

    def error(self, code: torch.Tensor, values: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """`(N, 1)`."""
        squares: torch.Tensor = measured * (self.decoder(code) - values) ** 2
        return squares.sum(dim=-1, keepdim=True) / measured.sum(dim=-1, keepdim=True)  # flags and age are always there

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Error, error of the mirror image, code."""
        values, measured = self.standard(features)
        code = self.encode(values, measured)
        error = self.error(code, values, measured)
        if self.training:
            return torch.cat([error, torch.zeros_like(error), code], dim=-1)
        mirrored = self._standardised(features[..., self.places] * self.sides) * measured
        return torch.cat([error, self.error(self.encode(mirrored, measured), mirrored, measured), code], dim=-1)


def record_error(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The error of each record, `(N,)`; what became of the patient is not looked at."""
    return outputs[..., 0]


# Metrics ------------------------------------------------------------------------------------------------------------------------


def standard_values(features: NDArray[np.generic]) -> tuple[FloatArray, FloatArray]:
    """As `RecordAutoencoder.standard`, of arrays: values `(N, V)` and 1 where measured `(N, V)`, float64."""
    scaled = features.astype(np.float64)
    measured = 1 - scaled[:, _FLAG_PLACES] * np.array(_INDICATED)
    return np.clip((scaled[:, _PLACES] - _CENTRE) / _SPREAD, -MOST, MOST) * measured, measured


def reconstruction_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(2,)`: squares and squared errors of the records, each the mean over what was measured, in parts of `MOST_SQUARE`.

    Where both together are longer than 1 (L2 norm) the record counts as much less as makes them so, which leaves their ratio; then each is rounded to
    steps of 1 / `STEPS`. So a strange patient does not decide the sum, noise may be small, and no difference of two sums is a value of a patient:
    of columns nothing is told, for a finding may have been measured in one patient alone.

    Args:
        predictions: `(N, 2 + K)`; the first is the record's mean squared error.
    """
    values, measured = standard_values(cohort.inputs[0])
    squares = (values**2).sum(axis=1) / measured.sum(axis=1)  # flags and age are always there
    errors = np.clip(np.nan_to_num(predictions[:, 0], nan=MOST_ERROR), 0, MOST_ERROR)
    terms = np.stack([squares, errors], axis=1) / MOST_SQUARE
    terms /= np.maximum(1.0, np.linalg.norm(terms, axis=1, keepdims=True))
    return np.asarray(cohort.record_weights() @ (np.round(terms * STEPS) / STEPS))


def explained(sums: FloatArray) -> float | None:
    """R2: one less the squared error over the squared distance from the healthy values, for patients alike but for those cut short."""
    squares, errors = sums
    return float(1 - errors / squares) if squares > 0 else None


def outlier_histogram(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(2, B)`: patients by bin of their record's error (row 0) and of its mirror image's (row 1), an error e as the score e / (1 + e)."""
    errors = np.clip(np.nan_to_num(predictions[:, :2], nan=MOST_ERROR), 0, MOST_ERROR)
    weights = cohort.record_weights()
    rows = [np.bincount(bin_of_score(column / (1 + column)), weights=weights, minlength=NUM_BINS) for column in errors.T]
    return np.asarray(rows, dtype=np.float64)


RECONSTRUCTION = Statistic(
    name="reconstruction", shape=(2,), summarise=reconstruction_sums, sensitivity=1 + math.sqrt(0.5) / STEPS,  # 1, and both rounded up
    is_counts=False,
)  # fmt: skip
OUTLIERS = Statistic(
    name="outlier_histogram", shape=(2, NUM_BINS), summarise=outlier_histogram, sensitivity=math.sqrt(2), is_counts=False,
    noised_widths=NOISED_WIDTHS,
)  # fmt: skip
METRICS = (
    Metric(name="r2", statistic=RECONSTRUCTION, finish=explained, low=-1, high=1),
    Metric(name="outlier_auroc", statistic=OUTLIERS, finish=auroc, low=0, high=1),
)


# Data and outliers --------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays of a folder of eICU tables, as of `icu-apache`. Options: `sites` ("region" or "hospital"), `tolerance`.

    Raises:
        ConfigurationError, DataError: see `shared.tasks.icu_apache.load_cohort`.
    """
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give the folder of eICU's tables with --data")
    return icu_apache.load_cohort(path, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """A record that the model cannot give back.

    Attributes:
        record: its place in the cohort.
        error: mean squared error over what was measured, in standard units.
        column: the measured column that is furthest from what the model expects; where to look for an error of entry.
        excess: how far, measured less expected, in standard units.
    """

    record: int = field(repr=False)
    error: float = field(repr=False)
    column: str = field(repr=False)
    excess: float = field(repr=False)


def outliers(parameters: Parameters, cohort: Cohort, *, num: int) -> list[Outlier]:
    """The `num` records with the largest errors, the largest first. They are of patients, and stay where the records are.

    Raises:
        ConfigurationError: `num` is less than 1.
        ProtocolError: the parameters are not the model's.

    Example:
        outliers(parameters, icu_apache.load_cohort(folder, {}), num=20)
    """
    if num < 1:
        raise ConfigurationError("outliers: expected num to be at least 1, got less", "ask for one or more")
    model = RecordAutoencoder()
    set_parameters(model, parameters)
    with torch.no_grad():
        values, measured = model.eval().standard(torch.from_numpy(cohort.inputs[0]))
        excess = (measured * (values - model.decoder(model.encode(values, measured)))).numpy()
    errors = predict_in_batches(model, cohort.inputs)[:, 0].numpy()
    worst = np.argsort(-errors, kind="stable")[:num].tolist()
    columns = np.abs(excess).argmax(axis=1)
    return [Outlier(record=row, error=float(errors[row]), column=COLUMNS[columns[row]], excess=float(excess[row, columns[row]])) for row in worst]


def record_autoencoder() -> Task:
    """The task `record-autoencoder`: four regions as sites."""
    return Task(
        name=NAME,
        title=f"Records of the first day in intensive care in {CODE} numbers, and which are unlike the others",
        modality="tabular",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=icu_apache.synthetic_cohort,
        model=RecordAutoencoder,
        loss=record_error,
        predict=lambda outputs: outputs,
        metrics=METRICS,
        primary_metric="r2",
        source="eICU Collaborative Research Database (Pollard et al. 2018)",
        sites=REGIONS,
        default_study=f"{NAME}.toml",
        subgroups=icu_apache.SCHEMA.subgroups,
        predicted=("error", "mirror_error", *(f"code_{number}" for number in range(1, CODE + 1))),
        explained=ExplainedOutput(words="the error of the record", of=lambda outputs: outputs[..., 0]),
    )
