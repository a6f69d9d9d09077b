"""Risk of death in hospital after surgery, calibrated: a multilayer perceptron on summaries of the first 48 hours in the two surgical units.

Stays of ICU types 2 (cardiac surgery recovery) and 4 (surgical) of the PhysioNet/CinC Challenge 2012 (Silva et al. 2012). Beside how well it tells
patients apart, the task says whether a risk means what it says: a risk table, which sets what was predicted beside what happened in bands of risk
(Steyerberg 2019, Clinical Prediction Models, section 15.3). It is made from the same histogram as the AUROC, so it costs no privacy of its own.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.metrics import SCORE_HISTOGRAM, FloatArray, Metric, bin_scores
from shared.models import mlp
from shared.schema import Column, TensorSchema
from shared.task import Task
from shared.tasks.icu_series import binned, cohort_of, descriptors
from shared.tasks.icu_stays import DESCRIPTOR_NAMES, FAR_OUT, HOURS, SOURCE, SUBGROUPS, UNITS, VARIABLES, IcuStays
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.physionet_2012 import load_stays
from shared.tasks.tabular import label_rule

NAME = "surgical-risk"
SURGICAL = ("2", "4")  # ICUType
SITES = tuple(UNITS[kind] for kind in SURGICAL)
HOURS_PER_STEP = 4  # of the means among which a lowest and a highest is
SUMMARIES = ("lowest", "highest", "second day", "measured")
NUM_FEATURES = len(SUMMARIES) * len(VARIABLES) + len(DESCRIPTOR_NAMES)
HIDDEN = (16,)
RISK_EDGES = (0.0, 0.05, 0.2, 1.0)  # low, intermediate, high
SYNTHETIC_SHARE = 0.48  # of synthetic stays that are in the surgical units


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskBand:
    """Patients whose predicted risk is in [low, high): how many, their mean predicted risk, and the share who died."""

    low: float
    high: float
    patients: float
    predicted: float
    observed: float


def risk_table(histogram: FloatArray) -> list[RiskBand]:
    """The bands of risk in which there are patients.

    Args:
        histogram: `(2, B)`, summed over sites, exact or with noise: survivors and deaths by bin of predicted risk, as `shared.metrics.score_histogram`.

    >>> from shared.metrics import NUM_BINS, bin_of_score
    >>> histogram = np.zeros((2, NUM_BINS))
    >>> histogram[:, bin_of_score(np.array([0.1]))[0]] = 90, 10
    >>> [(band.low, band.high, band.patients, round(band.predicted, 2), band.observed) for band in risk_table(histogram)]
    [(0.05, 0.2, 100.0, 0.1, 0.1)]
    """
    scores, counts = bin_scores(), histogram.sum(axis=0)
    bands = []
    for low, high in itertools.pairwise(RISK_EDGES):
        within = (scores >= low) & (scores < high)
        patients = float(counts[within].sum())
        if patients > 0:
            predicted, observed = (counts * scores)[within].sum() / patients, histogram[1, within].sum() / patients
            bands.append(
                RiskBand(low=low, high=high, patients=patients, predicted=float(np.clip(predicted, 0, 1)), observed=float(np.clip(observed, 0, 1)))
            )
    return bands


def observed_rate(histogram: FloatArray, low: float) -> float | None:
    """Share who died of those in the band of risk that begins at `low`; None where there is nobody."""
    return next((band.observed for band in risk_table(histogram) if band.low == low), None)


def observed_to_expected(histogram: FloatArray) -> float | None:
    """Deaths that happened over deaths that were predicted: 1 is calibration in the large."""
    expected = float((histogram.sum(axis=0) * bin_scores()).sum())
    return float(histogram[1].sum()) / expected if expected > 0 else None


RISK_METRICS = (
    *(
        Metric(
            name=f"died_of_risk_{low:.0%}_to_{high:.0%}".replace("%", ""),
            statistic=SCORE_HISTOGRAM,
            finish=functools.partial(observed_rate, low=low),
            higher_is_better=False,
            low=0,
            high=1,
        )
        for low, high in itertools.pairwise(RISK_EDGES)
    ),
    Metric(name="observed_to_expected", statistic=SCORE_HISTOGRAM, finish=observed_to_expected, higher_is_better=False, low=0),
)


def summary_inputs(stays: IcuStays) -> NDArray[np.float32]:
    """`(P, F)`: of every variable the lowest and the highest four-hour mean, the mean of the second day, and whether it was measured; descriptors.

    Scaled as series are; 0 where a variable was never measured. Where the second day has no measurement the first day's mean stands for it.
    """
    lows_highs = _scaled(*binned(stays, HOURS_PER_STEP))
    days = _scaled(*binned(stays, HOURS // 2))
    measured = np.isfinite(days).any(axis=1)
    low, high = np.fmin.reduce(lows_highs, axis=1), np.fmax.reduce(lows_highs, axis=1)  # of what is measured
    second = np.where(np.isfinite(days[:, 1]), days[:, 1], days[:, 0])
    parts = [np.where(measured, part, 0.0) for part in (low, high, second)]
    return np.concatenate([*parts, measured, descriptors(stays)], axis=1, dtype=np.float32, casting="unsafe")


def _scaled(values: FloatArray, counts: NDArray[np.int64]) -> FloatArray:
    """`(P, T, V)`; NaN where nothing was measured."""
    scaled = np.stack([variable.scaled(values[:, :, index]) for index, variable in enumerate(VARIABLES)], axis=2).astype(np.float64)
    return np.where(counts > 0, scaled, np.nan)


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The surgical stays in a folder of records and outcomes; see `shared.tasks.physionet_2012.load_stays` for its form, its option and its errors.

    Raises:
        DataMissingError: also where no stay is surgical.
    """
    return _cohort(load_stays(path, options, task=NAME))


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays of the two units with a hidden severity."""
    cohort = _cohort(synthetic_stays(int(num_patients / SYNTHETIC_SHARE * 1.3) + 40, seed))
    return cohort.select(np.arange(min(num_patients, cohort.num_patients)))


def _cohort(stays: IcuStays) -> Cohort:
    surgical = np.isin(stays.described["ICUType"], SURGICAL)
    if not surgical.any():
        raise DataMissingError(f"task {NAME}: expected stays of ICUType {' or '.join(SURGICAL)}, found none", "check the records")
    whole = cohort_of(stays, (summary_inputs(stays),), stays.died)
    return replace(whole.select(surgical), notes={**whole.notes, "stays_not_surgical": int((~surgical).sum())})


def surgical_risk() -> Task:
    """The task `surgical-risk`."""
    rule = label_rule(Column(name="died", type="binary"))
    unit = f"{', '.join(SUMMARIES)} of each of {', '.join(variable.name for variable in VARIABLES)}; {', '.join(DESCRIPTOR_NAMES)}"
    return Task(
        name=NAME,
        title="Risk of death in hospital after surgery",
        modality="time series, summarised",
        schema=(TensorSchema(name="summaries", shape=(NUM_FEATURES,), unit=unit, low=-FAR_OUT, high=FAR_OUT),),
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=lambda: mlp(NUM_FEATURES, 1, hidden=HIDDEN),
        loss=rule.loss,
        predict=rule.predict,
        metrics=(*rule.metrics, *RISK_METRICS),
        primary_metric="auroc",
        source=SOURCE,
        sites=SITES,
        default_study="surgical-risk.toml",
        subgroups=SUBGROUPS,
    )
