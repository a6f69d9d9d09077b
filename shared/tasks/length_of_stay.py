"""Days in hospital from the first 48 hours in intensive care: an LSTM (Hochreiter and Schmidhuber 1997) that predicts the logarithm of days.

Stays of the PhysioNet/CinC Challenge 2012 (Silva et al. 2012). The rule for deaths: the question is when a patient goes home, and a death ends a stay
without answering it, so those who died in hospital are left out and counted, as are stays whose length is not known. Who uses the model must say that
it speaks of survivors. The loss is smooth absolute error of log-days, which is least near the median, as absolute error is.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.metrics import error_metrics
from shared.task import Task
from shared.tasks.icu_series import RecurrentModel, cohort_of, series_inputs
from shared.tasks.icu_stays import SITES, SOURCE, SUBGROUPS, IcuStays, series_schema
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.physionet_2012 import load_stays

NAME = "length-of-stay"
HOURS_PER_STEP = 4
NUM_STEPS = 12
HIDDEN = 16
MOST_DAYS = 60.0  # longer stays count as so long
USUAL_DAYS = 9.0  # of a stay with intensive care: where the model starts
SMOOTH = 0.5  # in log-days: from there on the loss grows linearly, and a gradient is bounded


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays in a folder of records and outcomes; see `shared.tasks.physionet_2012.load_stays` for its form, its option and its errors.

    Raises:
        DataMissingError: also where no stay ended with a discharge after a known time.
    """
    return _cohort(load_stays(path, options, task=NAME))


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays of four units, all of survivors."""
    stays = synthetic_stays(num_patients, seed)
    return _cohort(replace(stays, died=np.zeros_like(stays.died)))


def _cohort(stays: IcuStays) -> Cohort:
    alive, known = stays.died == 0, np.isfinite(stays.days)
    if not (alive & known).any():
        raise DataMissingError(f"task {NAME}: expected stays that ended with a discharge after a known time, found none", "check the outcomes")
    left_out = {"deaths_left_out": int((~alive).sum()), "unknown_lengths_left_out": int((alive & ~known).sum())}
    labels = np.clip(np.nan_to_num(stays.days, nan=1.0), 1.0, MOST_DAYS).astype(np.float32)
    whole = cohort_of(stays, series_inputs(stays, HOURS_PER_STEP), labels)
    return replace(whole.select(alive & known), notes={**whole.notes, **left_out})


def log_days_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Smooth absolute error of log-days, for each record `(N,)`.

    Args:
        outputs: `(N, 1)`, log-days above the logarithm of `USUAL_DAYS`.
        labels: `(N,)`, days, 1 or more.
    """
    return nn.functional.smooth_l1_loss(outputs[:, 0] + math.log(USUAL_DAYS), labels.log(), reduction="none", beta=SMOOTH)


def predicted_days(outputs: torch.Tensor) -> torch.Tensor:
    """Days `(N,)`, from 1 to `MOST_DAYS`."""
    return (outputs[:, 0] + math.log(USUAL_DAYS)).clamp(0.0, math.log(MOST_DAYS)).exp()


def length_of_stay() -> Task:
    """The task `length-of-stay`."""
    return Task(
        name=NAME,
        title="Days in hospital of survivors, from the first 48 hours in intensive care",
        modality="time series",
        schema=series_schema(NUM_STEPS),
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=lambda: RecurrentModel(nn.LSTM, HIDDEN),
        loss=log_days_loss,
        predict=predicted_days,
        metrics=error_metrics(0.0, MOST_DAYS),
        primary_metric="mae",
        source=SOURCE,
        sites=SITES,
        default_study="length-of-stay.toml",
        subgroups=SUBGROUPS,
    )
