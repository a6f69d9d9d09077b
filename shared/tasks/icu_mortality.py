"""Death in hospital from the first 48 hours in intensive care: an LSTM (Hochreiter and Schmidhuber 1997) or a GRU (Cho et al. 2014) over four-hour steps.

The question and the 48 hours are those of the PhysioNet/CinC Challenge 2012 (Silva et al. 2012); the four types of unit are the sites.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from shared.cohort import Cohort
from shared.schema import Column
from shared.task import Task
from shared.tasks.icu_series import RecurrentModel, cohort_of, series_inputs
from shared.tasks.icu_stays import SITES, SOURCE, SUBGROUPS, IcuStays, series_schema
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.physionet_2012 import load_stays
from shared.tasks.tabular import label_rule

NAME = "icu-mortality"
HOURS_PER_STEP = 4
NUM_STEPS = 12
HIDDEN = 16


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays in a folder of records and outcomes; see `shared.tasks.physionet_2012.load_stays` for its form, its option and its errors."""
    return _cohort(load_stays(path, options, task=NAME))


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays of four units with a hidden severity."""
    return _cohort(synthetic_stays(num_patients, seed))


def _cohort(stays: IcuStays) -> Cohort:
    return cohort_of(stays, series_inputs(stays, HOURS_PER_STEP), stays.died)


def icu_mortality() -> Task:
    """The task `icu-mortality`, with an LSTM."""
    return _task(nn.LSTM)


def icu_mortality_gru() -> Task:
    """The same with a GRU: `task = "shared.tasks.icu_mortality:icu_mortality_gru"`."""
    return _task(nn.GRU)


def _task(cell: type[nn.LSTM] | type[nn.GRU]) -> Task:
    rule = label_rule(Column(name="died", type="binary"))
    return Task(
        name=NAME,
        title="Death in hospital, from the first 48 hours in intensive care",
        modality="time series",
        schema=series_schema(NUM_STEPS),
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=lambda: RecurrentModel(cell, HIDDEN),
        loss=rule.loss,
        predict=rule.predict,
        metrics=rule.metrics,
        primary_metric="auroc",
        source=SOURCE,
        sites=SITES,
        default_study="icu-mortality.toml",
        subgroups=SUBGROUPS,
    )
