"""The first 48 hours of a stay as inputs of a model: series of value, mask and time since the last measurement, and descriptors.

As the inputs of the GRU-simple of Che et al. 2018, "Recurrent Neural Networks for Multivariate Time Series with Missing Values".

Legend: P stays (a stay is a patient), T steps, V variables, G descriptors.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.models import make_private
from shared.schema import EncodedColumn, encode_column
from shared.tasks.icu_stays import DESCRIPTOR_NAMES, DESCRIPTORS, HOURS, NUM_VARIABLES, UNITS, UNKNOWN, VARIABLES, FloatArray, IcuStays


def descriptors(stays: IcuStays) -> FloatArray:
    """`(P, G)` in [-1, 1]: age, sex, height and type of unit as `DESCRIPTORS` declares; an age or height outside is cut to the range.

    Raises:
        SchemaError: more than one in twenty are outside: the unit is another.
    """
    return np.concatenate([part.features for part in _encoded_descriptors(stays)], axis=1).astype(np.float32)


def _encoded_descriptors(stays: IcuStays) -> list[EncodedColumn]:
    import pandas as pd

    return [encode_column(pd.Series(stays.described[column.name]), column, source="records") for column in DESCRIPTORS]


def binned(stays: IcuStays, hours_per_step: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Means (a flow: the sum, an hour's worth) and counts of measurements in each step, `(P, T, V)` each; a mean of none is 0."""
    num_steps, shape = HOURS // hours_per_step, (len(stays.ids), HOURS // hours_per_step, NUM_VARIABLES)
    step = np.minimum(stays.minute // (60 * hours_per_step), num_steps - 1)
    cell = (stays.stay * num_steps + step) * NUM_VARIABLES + stays.variable
    size = math.prod(shape)
    counts = np.bincount(cell, minlength=size).reshape(shape)
    sums = np.bincount(cell, weights=stays.value, minlength=size).reshape(shape)
    totals = np.array([variable.total for variable in VARIABLES])
    return sums / np.where(totals, hours_per_step, np.maximum(counts, 1)), counts


def series_inputs(stays: IcuStays, hours_per_step: int) -> tuple[FloatArray, FloatArray]:
    """The series `(P, T, 3 V)` and the descriptors `(P, G)`.

    A step has V values (the last one known, scaled; 0 before there is any), V marks of what was measured in it, and V times since the last
    measurement, in parts of 48 hours (1 before there is any).
    """
    values, counts = binned(stays, hours_per_step)
    num_steps = values.shape[1]
    scaled = np.stack([variable.scaled(values[:, :, index]) for index, variable in enumerate(VARIABLES)], axis=2)
    measured = counts > 0
    steps = np.arange(num_steps)[None, :, None]
    last = np.maximum.accumulate(np.where(measured, steps, -1), axis=1)  # step of the last measurement so far
    carried = np.where(last >= 0, np.take_along_axis(scaled, np.maximum(last, 0), axis=1), 0.0)
    gap = np.where(last >= 0, (steps - last) / num_steps, 1.0)
    return np.concatenate([carried, measured, gap], axis=2, dtype=np.float32, casting="unsafe"), descriptors(stays)


class RecurrentModel(nn.Module):
    """A recurrent layer over the series; its mean state, its last one and the descriptors go to one linear output. `(N, T, 3V), (N, G) -> (N, 1)`."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], hidden: int) -> None:
        super().__init__()
        self.recurrent = make_private(cell(3 * NUM_VARIABLES, hidden, batch_first=True))
        self.head = nn.Linear(2 * hidden + len(DESCRIPTOR_NAMES), 1)

    def forward(self, series: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
        """The output for each record, `(N, 1)`."""
        states, _ = self.recurrent(series)
        output: torch.Tensor = self.head(torch.cat([states.mean(dim=1), states[:, -1], described], dim=1))
        return output


def cohort_of(stays: IcuStays, inputs: tuple[NDArray[np.generic], ...], labels: NDArray[np.generic]) -> Cohort:
    """The cohort of all stays: a record a patient; site, sex and age as attributes."""
    num_clipped = sum(part.num_clipped for part in _encoded_descriptors(stays))
    return Cohort(
        inputs=inputs,
        labels=labels,
        patient_of_record=np.arange(len(stays.ids), dtype=np.int64),
        patient_ids=stays.ids,
        attributes={
            "site": np.array([UNITS[kind] for kind in stays.described["ICUType"].tolist()]),
            "sex": np.where(stays.described["Gender"] == UNKNOWN, "", stays.described["Gender"]),
            "age": np.where(stays.described["Age"] == UNKNOWN, "", stays.described["Age"]),
        },
        notes={**stays.notes, "values_clipped": num_clipped},
        synthetic=stays.synthetic,
    )
