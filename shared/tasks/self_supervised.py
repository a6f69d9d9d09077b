"""Pre-training without outcomes: an LSTM gives back measurements that were hidden from it, and starts `icu-mortality` where few outcomes are known.

A denoising autoencoder (Vincent et al. 2010, JMLR 11:3371-3408) with emphasis on what was corrupted (section 4.2 there), over the series of
`icu-mortality`. Of each record, some measurements are hidden, as if nobody had taken them: what is then known is the last value before, and the time
since grows. From its state the model tells what was measured, and is judged where something was. The encoder is that of `icu-mortality`, under the
same names, so that `wardround simulate --task icu-mortality --start-from RUN` takes it over.

In training what is hidden is drawn for each record; in evaluation it is a fixed quarter of all steps and variables, so that a model has one error.

Privacy: pre-training is a run like another, with its own claim. Fine-tuning is a second one, and whoever was a patient of both has both promises,
which compose (Dwork and Roth 2014, theorem 3.16): at most epsilon + epsilon' at delta + delta'.

Legend: N records, T steps, V variables, G descriptors, H hidden.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort
from shared.metrics import FloatArray, Metric, Statistic
from shared.models import make_private
from shared.task import ExplainedOutput, Task
from shared.tasks import icu_mortality
from shared.tasks.icu_mortality import HIDDEN, NUM_STEPS
from shared.tasks.icu_stays import DESCRIPTOR_NAMES, NUM_VARIABLES, SITES, SOURCE, SUBGROUPS, series_schema

NAME = "self-supervised"
HIDDEN_RATE = 0.3  # chance of a measurement to be hidden in training
SHOWN_WEIGHT = 0.05  # in the loss, of a measurement that was not hidden
MOST_ERROR = 4.0  # of a record in the metrics, in squared halves of the usual range


class MaskedReconstruction(nn.Module):
    """`(N, T, 3V), (N, G)` -> `(N, 4)`: the loss, the model's error and that of the last known value, and 1 where anything was hidden.

    An error is the mean squared difference over the measurements that were hidden, in halves of a variable's usual range; 0 where none was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hiding = nn.Dropout(HIDDEN_RATE)  # of ones, which is a draw for each measurement
        self.recurrent = make_private(nn.LSTM(3 * NUM_VARIABLES, HIDDEN, batch_first=True))
        self.reconstruction = nn.Linear(HIDDEN + len(DESCRIPTOR_NAMES), NUM_VARIABLES)
        self.register_buffer("always_shown", 1.0 - fixed_quarter(), persistent=False)
        self.always_shown: torch.Tensor

    def forward(self, series: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
        """Loss, error, error of the last known value, whether anything was hidden."""
        values, measured = series[..., :NUM_VARIABLES], series[..., NUM_VARIABLES : 2 * NUM_VARIABLES]
        shown = (self.hiding(torch.ones_like(values)) > 0).to(values.dtype)
        if not self.training:
            shown = shown * self.always_shown
        partly = as_if_unmeasured(series, shown)
        states, _ = self.recurrent(partly)
        known = described.unsqueeze(1).expand(-1, series.shape[1], -1)
        squares = (self.reconstruction(torch.cat([states, known], dim=-1)) - values) ** 2
        hidden = measured * (1 - shown)
        last_known = (partly[..., :NUM_VARIABLES] - values) ** 2
        columns = [
            weighted_mean(squares, hidden + SHOWN_WEIGHT * measured * shown),
            weighted_mean(squares, hidden),
            weighted_mean(last_known, hidden),
        ]
        return torch.stack([*columns, (hidden.sum(dim=(1, 2)) > 0).to(values.dtype)], dim=1)


def fixed_quarter() -> torch.Tensor:
    """`(T, V)`, 1 where a measurement is hidden in evaluation: each variable in every fourth step, each step in every fourth variable or about."""
    step, variable = torch.arange(NUM_STEPS)[:, None], torch.arange(NUM_VARIABLES)[None, :]
    return ((step + variable) % 4 == 0).to(torch.float32)


def as_if_unmeasured(series: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """The series `(N, T, 3V)` as `shared.tasks.icu_series.series_inputs` gives it of the measurements that are shown alone.

    Args:
        shown: `(N, T, V)` or `(T, V)`, 0 or 1.
    """
    values, measured = series[..., :NUM_VARIABLES], series[..., NUM_VARIABLES : 2 * NUM_VARIABLES]
    seen = measured * shown
    value, gap = torch.zeros_like(values[:, 0]), torch.ones_like(values[:, 0])
    carried, gaps = [], []
    for step in range(series.shape[1]):
        now = seen[:, step]
        value = now * values[:, step] + (1 - now) * value
        gap = (1 - now) * (gap + 1 / series.shape[1]).clamp(max=1.0)
        carried.append(value)
        gaps.append(gap)
    return torch.cat([torch.stack(carried, dim=1), seen, torch.stack(gaps, dim=1)], dim=-1)


def weighted_mean(squares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`(N, T, V)` each -> `(N,)`; 0 where all weights are."""
    total = weights.sum(dim=(1, 2))
    return (squares * weights).sum(dim=(1, 2)) / torch.where(total > 0, total, torch.ones_like(total))


def reconstruction_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each record, `(N,)`; labels are not looked at."""
    return outputs[..., 0]


# Metrics ------------------------------------------------------------------------------------------------------------------------


def error_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(3,)`: patients of whom anything was hidden, the model's errors, those of the last known value; errors in parts of `MOST_ERROR`, cut to 1.

    Args:
        predictions: `(N, 3)`: error, error of the last known value, whether anything was hidden.
    """
    errors = np.clip(np.nan_to_num(predictions[:, :2], nan=MOST_ERROR, posinf=MOST_ERROR), 0, MOST_ERROR) / MOST_ERROR
    hidden = (predictions[:, 2] > 0.5).astype(np.float64)
    return np.asarray((cohort.record_weights() * hidden) @ np.column_stack([np.ones(len(errors)), errors]))


def _sums_agree(sums: FloatArray) -> bool:
    """A patient's error is at most 1."""
    return bool((sums[1:] <= sums[0] * (1 + 1e-9) + 1e-9).all())


def _skill(sums: FloatArray) -> float | None:
    return float(1 - sums[1] / sums[2]) if sums[2] > 0 else None


def _mean_error(sums: FloatArray) -> float | None:
    return float(sums[1] / sums[0] * MOST_ERROR) if sums[0] > 0 else None


ERRORS = Statistic(name="hidden_errors", shape=(3,), summarise=error_sums, sensitivity=3**0.5, is_counts=False, agrees=_sums_agree)
METRICS = (
    Metric(name="skill", statistic=ERRORS, finish=_skill, high=1),
    Metric(name="hidden_error", statistic=ERRORS, finish=_mean_error, higher_is_better=False, low=0, high=MOST_ERROR),
)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays of `icu-mortality` without how they ended; see `shared.tasks.physionet_2012.load_stays` for form, option and errors."""
    return without_outcomes(icu_mortality.load_cohort(path, options))


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays of four units with a hidden severity, without how they ended."""
    return without_outcomes(icu_mortality.synthetic_cohort(num_patients, seed))


def without_outcomes(cohort: Cohort) -> Cohort:
    """The cohort with 0 as every label."""
    return replace(cohort, labels=np.zeros(cohort.num_records, dtype=np.float32))


def self_supervised() -> Task:
    """The task `self-supervised`: pre-training of the encoder of `icu-mortality`, with its four types of unit as sites."""
    return Task(
        name=NAME,
        title="What was measured in intensive care, from what is left of it: pre-training without outcomes",
        modality="time series",
        schema=series_schema(NUM_STEPS),
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=MaskedReconstruction,
        loss=reconstruction_loss,
        predict=lambda outputs: outputs[..., 1:],
        metrics=METRICS,
        primary_metric="skill",
        source=SOURCE,
        sites=SITES,
        default_study=f"{NAME}.toml",
        subgroups=SUBGROUPS,
        predicted=("hidden_error", "last_known_error", "anything_hidden"),
        explained=ExplainedOutput(words="the model's error on what was hidden", of=lambda outputs: outputs[..., 1]),
    )
