"""Survival after breast cancer, from clinical findings at diagnosis, in six regions.

Data: The Cancer Genome Atlas, breast invasive carcinoma: clinical data of the NCI's Genomic Data Commons, outcomes by Liu et al. 2018, made into 39
features by Andreux et al. 2020, with regions and split as in FLamby's Fed-TCGA-BRCA (Ogier du Terrail et al. 2022): 1,088 patients, 151 deaths. Its
features are taken over unchanged, but that age is scaled by a declared range. Its model is Cox's, trained on batches; that loss crosses patients (see
`shared.tasks.survival`), so it is not offered here, with or without privacy: the task has discrete-time hazards, and beside them the piecewise
exponential form of Cox's model, `shared.tasks.survival_breast:survival_breast_exponential`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataMissingError, SchemaError
from shared.schema import MISSING_MARKS, Column, TableSchema, canonical, require_columns
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import ExplainedOutput, Task
from shared.tasks.images import reading, refuse_too_many, tolerance_of
from shared.tasks.survival import (
    DAYS_PER_YEAR,
    RISK_YEARS,
    SURVIVAL_METRICS,
    USUAL_HAZARD,
    ProportionalHazards,
    exponential_loss,
    exponential_risk,
    hazard_loss,
    hazard_risk,
    log_cumulative_hazard,
    survival_labels,
)
from shared.tasks.tabular import cohort_from_frame, only_csv, read_csv, require_once

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "survival-breast"
SITES = ("Northeast", "South", "West", "Midwest", "Europe", "Canada")  # FLamby's centres 0 to 5
PUBLISHED_TABLE, PUBLISHED_SPLIT = "brca.csv", "train_test_split.csv"
PARTS = ("train", "test")
EVENT = Column(name="E", type="binary")
MOST_DAYS = 10_958.0  # thirty years

# Features that tell one thing together; at most one of a group is 1, and none of them is another value yet.
RACES = {"race_asian": "Asian", "race_black or african american": "Black or African American", "race_white": "White"}
RACE_NOT_REPORTED = "race_not reported"
_GROUPS: dict[str, tuple[str, ...]] = {
    "ethnicity": ("ethnicity_not hispanic or latino", "ethnicity_not reported"),
    "race": ("race_asian", "race_black or african american", RACE_NOT_REPORTED, "race_white"),
    "metastasis": ("ajcc_pathologic_m_MX",),
    "nodes": tuple(f"ajcc_pathologic_n_{stage}" for stage in ("N0 (i-)", "N1", "N1a", "N2", "N2a")),
    "stage": tuple(f"ajcc_pathologic_stage_Stage {stage}" for stage in ("IA", "IIA", "IIB", "IIIA", "IIIC")),
    "tumour": tuple(f"ajcc_pathologic_t_{size}" for size in ("T1c", "T2", "T3")),
    "edition": tuple(f"ajcc_staging_system_edition_{number}th" for number in (5, 6, 7)),
    "code": ("icd_10_code_C50.9",),
    "morphology": ("morphology_8500/3", "morphology_8520/3"),
    "diagnosis": ("primary_diagnosis_Infiltrating duct carcinoma, NOS", "primary_diagnosis_Lobular carcinoma, NOS"),
    "prior": ("prior_malignancy_yes",),
    "synchronous": ("synchronous_malignancy_Not Reported",),
    "treatment": ("treatment_or_therapy_not reported", "treatment_or_therapy_yes"),
    "tumor_stage": tuple(f"tumor_stage_stage {stage}" for stage in ("i", "ia", "iia", "iib", "iiia", "iiic")),
}

SCHEMA = TableSchema(
    name=NAME,
    title="Survival after breast cancer, from clinical findings at diagnosis",
    label=Column(name="T", type="number", unit="days", low=0, high=MOST_DAYS),
    patient="pid",
    site="site",
    columns=(
        Column(name="age_at_index", type="number", unit="years", low=18, high=100),
        *(Column(name=name, type="binary") for names in _GROUPS.values() for name in names),
    ),
    subgroups=(Subgroup(attribute="age_at_index", title="age", edges=(50, 65)), Subgroup(attribute="race")),
)


# Files --------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV of these columns with `pid`, `T` (days until death or last seen), `E` (1: died), perhaps `site`; or FLamby's folder. Option `tolerance`.

    FLamby's folder holds `brca.csv` and `train_test_split.csv`, which says who is tested and, by a number from 0 to 5, the region. Who is not
    in it is left out. A record is bad, skipped and counted up to `tolerance` (a share, by default one in twenty), where it has no patient, one
    that was there before, a time below 0, or a value that is not as declared; one without a time or `E` is left out.

    Raises:
        DataMissingError, DataAccessError, SchemaError: a file is missing, unreadable or not as declared, or too many records are bad.
    """
    tolerance = tolerance_of(options, NAME)
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give your file or folder with --data")
    with reading(str(path)):
        published = path.is_dir() and (path / PUBLISHED_SPLIT).is_file()
    file = path / PUBLISHED_TABLE if published else only_csv(path)
    frame = read_csv(file)
    frame.columns = [str(name).strip() for name in frame.columns]
    require_columns(list(frame.columns), SCHEMA, source=file.name)
    require_once(list(frame.columns), SCHEMA, source=file.name)
    if EVENT.name not in frame.columns:
        raise SchemaError(f"{file.name}: expected column {EVENT.name!r} (1: died, 0: last seen alive), not found", "rename or add it in the file")
    kept, notes = _usable_records(frame, tolerance=tolerance, source=file.name)
    if not published:
        return _cohort(kept, source=file.name, notes=notes)
    split = _published_split(path / PUBLISHED_SPLIT)
    listed = kept[kept["pid"].isin(split.index)].reset_index(drop=True)
    if len(listed) == 0:
        raise DataMissingError(f"{path}: no patient of {PUBLISHED_TABLE} is in {PUBLISHED_SPLIT}", "fetch both files again")
    listed["site"] = split.loc[listed["pid"], "site"].to_numpy()
    cohort = _cohort(listed, source=file.name, notes={**notes, "patients_not_in_split": len(kept) - len(listed)})
    return dataclasses.replace(cohort, published_test=split.loc[list(cohort.patient_ids), "test"].to_numpy(dtype=np.bool_))


def _usable_records(frame: "pd.DataFrame", *, tolerance: float, source: str) -> tuple["pd.DataFrame", dict[str, int]]:
    """The rows with an outcome that are as declared, and counts of the others."""
    if len(frame) == 0:
        raise DataMissingError(f"{source}: expected at least one row, got none", "check that this is the right file")
    text = frame.astype(str).apply(lambda values: values.str.strip())
    bad = text["pid"].isin(MISSING_MARKS) | text["pid"].duplicated()
    for column in (*SCHEMA.columns, SCHEMA.label, EVENT):
        bad |= _not_as_declared(text[column.name], column)
    if "site" in text.columns:
        bad |= text["site"].isin(MISSING_MARKS)
    unusable = bad.to_numpy(dtype=np.bool_)
    refuse_too_many(
        int(unusable.sum()),
        len(frame),
        tolerance=tolerance,
        source=source,
        first="no patient or one twice, or a value that is not as declared",
        bad=unusable,
    )
    known = ~text["T"].isin(MISSING_MARKS) & ~text["E"].isin(MISSING_MARKS)
    kept = text[known.to_numpy() & ~unusable].reset_index(drop=True)
    if len(kept) == 0:
        raise DataMissingError(f"{source}: no record is left of {len(frame)}: each lacks T or E", "check the columns")
    return kept, {"records_bad": int(unusable.sum()), "records_without_outcome": int((~known.to_numpy() & ~unusable).sum())}


def _not_as_declared(text: "pd.Series[str]", column: Column) -> "pd.Series[bool]":
    """Where a column holds text, infinity or less than 0 for a number, or a category that it does not have. What is out of range is clipped later."""
    import pandas as pd

    present = ~text.isin(MISSING_MARKS)
    if column.type != "number":
        return present & ~text.map(canonical).isin(column.values)
    numbers = pd.to_numeric(text.where(present), errors="coerce")
    bad: pd.Series[bool] = present & ~np.isfinite(numbers) | (numbers < 0)  # neither a time nor an age is below 0
    return bad


def _published_split(file: Path) -> "pd.DataFrame":
    """By patient: region `site` and whether it is tested on, `test`."""
    frame = read_csv(file)
    absent = [name for name in ("pid", "fold", "fold2") if name not in frame.columns]
    if absent:
        raise SchemaError(f"{file.name}: expected column {absent[0]!r}, not found", "fetch the file again")
    regions = {f"{part}_{number}": site for part in PARTS for number, site in enumerate(SITES)}
    part, _, _ = frame["fold2"].str.partition("_").T.to_numpy()
    if frame["pid"].duplicated().any() or not frame["fold2"].isin(regions).all() or not (frame["fold"] == part).all():
        raise SchemaError(
            f"{file.name}: expected each patient once, with fold2 from train_0 to test_5 and fold to match, got others", "fetch it again"
        )
    return frame.assign(site=frame["fold2"].map(regions), test=frame["fold"] == "test").set_index("pid")


def _cohort(frame: "pd.DataFrame", *, source: str, notes: Mapping[str, int], synthetic: bool = False) -> Cohort:
    """The cohort of records each of which has a time and an event."""
    schema = SCHEMA if "site" in frame.columns else SCHEMA.model_copy(update={"site": None})
    cohort = cohort_from_frame(frame.drop(columns=EVENT.name), schema, source=source, synthetic=synthetic)
    assert cohort.num_records == len(frame)  # records without an outcome are out already, and no column drops any
    died = frame[EVENT.name].map(canonical).to_numpy() == "1"
    kept = {name: cohort.attributes[name] for name in ("site", *(column.name for column in SCHEMA.columns)) if name in cohort.attributes}
    return dataclasses.replace(
        cohort,
        labels=survival_labels(cohort.labels.astype(np.float64), died),
        attributes={**kept, "race": _race(frame)},
        notes={**notes, **cohort.notes},
    )


def _race(frame: "pd.DataFrame") -> NDArray[np.str_]:
    """`(N,)`: as reported; who has none of the features is of another, or it is not known."""
    told = [(frame[column].map(canonical) == "1").to_numpy() for column in (*RACES, RACE_NOT_REPORTED)]
    return np.select(told, [*RACES.values(), ""], default="another, or not stated").astype(np.str_)


# Synthetic patients -------------------------------------------------------------------------------------------------------------

_RATES = {  # of each group's features, in their order; the rest has none
    "ethnicity": (0.81, 0.15), "race": (0.06, 0.16, 0.08, 0.69), "metastasis": (0.15,), "nodes": (0.14, 0.12, 0.15, 0.05, 0.06),
    "tumour": (0.2, 0.58, 0.12), "edition": (0.05, 0.41, 0.38), "code": (0.99,), "morphology": (0.71, 0.18), "prior": (0.06,),
    "synchronous": (0.06,), "treatment": (0.09, 0.77),
}  # fmt: skip
_STAGE_RATES = (0.08, 0.08, 0.33, 0.23, 0.14, 0.06)  # i, ia, iia, iib, iiia, iiic
_STAGE_EFFECTS = (-1.6, -1.2, -0.5, 0.0, 0.8, 1.5, 2.0)  # on the log hazard; last: another stage, such as iv
_EFFECTS = {"treatment_or_therapy_yes": -0.8, "treatment_or_therapy_not reported": 0.5, "ajcc_pathologic_t_T3": 0.5, "prior_malignancy_yes": 0.6}
_SYNTHETIC_REGIONS = (  # share of patients, shift of age in years and of the log hazard, years until half are last seen
    (0.28, 2.0, 0.1, 5.0), (0.18, -2.0, 0.4, 4.0), (0.19, 0.0, -0.1, 3.5), (0.15, 1.0, 0.0, 5.0), (0.15, -4.0, -0.2, 3.0), (0.05, 4.0, 0.0, 3.0),
)  # fmt: skip
_SYNTHETIC_MISSING_RATE = 0.02


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients of six regions with proportional hazards: age, stage, treatment and the like act on a log hazard that is constant in time.

    Regions differ in age, in hazard and in how long patients are followed; follow-up ends independently of the rest; a few ages are missing.
    """
    import pandas as pd

    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    share, age_shift, hazard_shift, follow_up = np.array(_SYNTHETIC_REGIONS).T
    region = rng.choice(len(SITES), size=num_patients, p=share / share.sum())
    age = np.clip(rng.normal(58, 13, size=num_patients) + age_shift[region], 22, 95).round()
    stage = rng.choice(len(_STAGE_EFFECTS), size=num_patients, p=(*_STAGE_RATES, 1 - sum(_STAGE_RATES)))
    columns = {name: values for group, rates in _RATES.items() for name, values in _one_of(_GROUPS[group], rates, num_patients, rng).items()}
    columns |= dict(zip(_GROUPS["diagnosis"], (columns[name] for name in _GROUPS["morphology"]), strict=True))  # the same in words
    columns |= {name: (stage == place).astype(int) for place, name in enumerate(_GROUPS["tumor_stage"])}
    columns |= {name: (stage == place).astype(int) for place, name in enumerate(_GROUPS["stage"], start=1)}
    log_hazard = np.log(USUAL_HAZARD) + 0.04 * (age - 58) + np.array(_STAGE_EFFECTS)[stage] + hazard_shift[region]
    log_hazard += sum(effect * columns[name] for name, effect in _EFFECTS.items())
    event_years = rng.exponential(size=num_patients) / np.exp(log_hazard)
    seen_years = rng.exponential(size=num_patients) * follow_up[region] / np.log(2)
    days = np.clip(np.minimum(event_years, seen_years) * DAYS_PER_YEAR, 0, MOST_DAYS).round()
    frame = pd.DataFrame(columns).astype(str).assign(
        pid=[f"synthetic-{index}" for index in range(num_patients)],
        site=np.array(SITES)[region],
        age_at_index=np.where(rng.random(num_patients) < _SYNTHETIC_MISSING_RATE, "", age.astype(int).astype(str)),
        T=days.astype(int).astype(str),
        E=np.where(event_years <= seen_years, "1", "0"),
    )  # fmt: skip
    return _cohort(frame, source="synthetic", notes={}, synthetic=True)


def _one_of(names: tuple[str, ...], rates: tuple[float, ...], count: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """For each patient a 1 in one of the columns, or in none."""
    drawn = rng.choice(len(names) + 1, size=count, p=(*rates, 1 - sum(rates)))
    return {name: (drawn == place).astype(np.int64) for place, name in enumerate(names)}


# The task -----------------------------------------------------------------------------------------------------------------------


def _task(name: str, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], risk: Callable[[torch.Tensor], torch.Tensor]) -> Task:
    """A task of this `name`; a file of a model says the name alone, so another loss, and so another meaning of the outputs, is another name."""
    num_features = len(SCHEMA.feature_names)
    return Task(
        name=name,
        title=SCHEMA.title,
        modality="tabular",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=lambda: ProportionalHazards(num_features),
        loss=loss,
        predict=risk,
        predicted=(f"risk_{RISK_YEARS:g}_years",),
        explained=ExplainedOutput(
            words=f"the logarithm of the cumulative hazard over {RISK_YEARS:g} years, which rises with the risk",
            of=lambda outputs: log_cumulative_hazard(risk(outputs.double())),
        ),
        metrics=SURVIVAL_METRICS,
        primary_metric="c_index",
        source="TCGA-BRCA clinical data (Liu et al. 2018; Andreux et al. 2020); regions and split of FLamby",
        sites=SITES,
        default_study="survival-breast.toml",
        subgroups=SCHEMA.subgroups,
    )


def survival_breast() -> Task:
    """The task `survival-breast`: discrete-time hazards."""
    return _task(NAME, hazard_loss, hazard_risk)


def survival_breast_exponential() -> Task:
    """The same with the piecewise exponential form of Cox's model: `shared.tasks.survival_breast:survival_breast_exponential`."""
    return _task(f"{NAME}-exponential", exponential_loss, exponential_risk)
