"""Risk of dying in hospital, from what APACHE records of the first day in intensive care: a table, with regions or hospitals as sites.

Data: eICU (see `shared.tasks.eicu`), tables `apacheApsVar` and `apachePredVar` for stays with an outcome. Beside the findings themselves stands
one feature made of them by a published table, the APACHE III score. The table `apachePatientResult`, with the publisher's predicted mortality
and scores, is never opened; of `apachePredVar` only what is known on the first day is read, so neither `diedinhospital` nor
`dischargelocation`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.schema import Column, TableSchema
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.apache_iii import apache_iii_points
from shared.tasks.eicu import REGIONS, LoadOptions, load_options, numbers_of, read_stays, read_table, without_bad_rows, without_small_sites
from shared.tasks.tabular import ModelOptions, cohort_from_frame, table_task

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

# name: unit, plausible range, scale, a healthy value, and how far from it the synthetic ones lie
FINDINGS: dict[str, tuple[str, float, float, Literal["linear", "log"], float, float]] = {
    "urine": ("ml/day", 10, 20_000, "log", 1800, 0.6),
    "wbc": ("1000/mm3", 0.1, 100, "log", 9, 0.4),
    "temperature": ("degrees C", 30, 42, "linear", 36.8, 0.7),
    "respiratoryrate": ("breaths/min", 2, 60, "linear", 22, 9),
    "sodium": ("mmol/l", 100, 180, "linear", 139, 4),
    "heartrate": ("beats/min", 20, 220, "linear", 95, 22),
    "meanbp": ("mmHg", 30, 200, "linear", 80, 24),
    "ph": ("", 6.8, 7.8, "linear", 7.39, 0.07),
    "hematocrit": ("%", 10, 65, "linear", 36, 5),
    "creatinine": ("mg/dl", 0.1, 25, "log", 1.0, 0.4),
    "albumin": ("g/dl", 0.8, 6, "linear", 3.4, 0.5),
    "pao2": ("mmHg", 20, 600, "log", 110, 0.3),
    "pco2": ("mmHg", 8, 150, "log", 40, 0.2),
    "bun": ("mg/dl", 1, 250, "log", 16, 0.4),
    "glucose": ("mg/dl", 10, 1200, "log", 130, 0.3),
    "bilirubin": ("mg/dl", 0.1, 50, "log", 0.7, 0.5),
    "fio2": ("%", 21, 100, "linear", 35, 12),
    "eyes": ("", 1, 4, "linear", 4, 0.5),
    "motor": ("", 1, 6, "linear", 6, 0.6),
    "verbal": ("", 1, 5, "linear", 5, 0.7),
}
ORDERED = ("urine", "wbc", "ph", "pao2", "pco2", "fio2", "albumin", "bilirubin")  # measured where somebody asked for it
_FLAGS = ("vent", "intubated", "dialysis")
_PREDICTION_FLAGS = (
    "electivesurgery", "aids", "hepaticfailure", "lymphoma", "metastaticcancer", "leukemia", "immunosuppression", "cirrhosis", "diabetes",
)  # fmt: skip
APS_COLUMNS = (*_FLAGS, *FINDINGS)
MISSING_CODES = ("-1", "-1.0", "-1.00")


def _columns() -> tuple[Column, ...]:
    findings = [
        Column(name=name, type="number", unit=unit, low=low, high=high, scale=scale, missing="indicator", missing_codes=MISSING_CODES)
        for name, (unit, low, high, scale, _, _) in FINDINGS.items()
    ]
    flags = [Column(name=name, type="binary", missing_codes=MISSING_CODES) for name in (*_FLAGS, *_PREDICTION_FLAGS)]
    return (
        Column(name="apache_points", type="number", unit="points", low=0, high=150),
        Column(name="age", type="number", unit="years", low=15, high=90),
        *flags,
        *findings,
    )


SCHEMA = TableSchema(
    name="icu-apache",
    title="Death in hospital, from APACHE's findings of the first day in intensive care",
    label=Column(name="hospitaldischargestatus", type="binary", categories=("Alive", "Expired")),
    patient="uniquepid",
    site="site",
    columns=_columns(),
    subgroups=(Subgroup(attribute="gender"), Subgroup(attribute="age", edges=(45, 65, 80))),
)


def load_cohort(path: Path | None, options: Mapping[str, object], *, sites: Literal["region", "hospital"] = "region") -> Cohort:
    """The stays of a folder of eICU tables. Options: `sites` ("region" or "hospital"), `tolerance` (see `shared.tasks.eicu.LoadOptions`).

    Raises:
        ConfigurationError: an unknown option.
        DataError: a table is missing, unreadable or not as declared.
    """
    chosen = load_options(options, SCHEMA.name, sites=sites)
    if path is None:
        raise DataMissingError("task icu-apache has no data of its own", "give the folder of eICU's tables with --data")
    stays = read_stays(path, chosen)
    frame, notes = stays.frame, dict(stays.notes)
    for name, columns in (("apacheApsVar", APS_COLUMNS), ("apachePredVar", _PREDICTION_FLAGS)):
        table = read_findings(path, name, columns, options=chosen, notes=notes)
        frame = frame.merge(table, on="patientunitstayid", how="inner", validate="one_to_one")
    notes["stays_without_findings"] = len(stays.frame) - len(frame)
    if len(frame) == 0:
        raise DataMissingError(f"{path}: no stay has a row in both APACHE tables", "check that the tables are of one release")
    frame = without_small_sites(frame, notes) if chosen.sites == "hospital" else frame
    frame["electivesurgery"] = frame["electivesurgery"].replace("", "0")  # it is filled in for surgical patients alone
    return _cohort(frame, source=path.name, notes=notes)


def read_findings(path: Path, name: str, columns: tuple[str, ...], *, options: LoadOptions, notes: dict[str, int]) -> "pd.DataFrame":
    """One row a stay of an APACHE table; rows of a stay that is there already, or with text or infinity for a number, are skipped and counted."""
    table = read_table(path, name, ("patientunitstayid", *columns))
    bad = (table["patientunitstayid"].duplicated() | (table["patientunitstayid"] == "")).to_numpy()
    for column in columns:
        bad = bad | np.isinf(numbers_of(table[column]))  # pandas lends its own array, read-only
    notes["records_bad"] = notes.get("records_bad", 0) + int(bad.sum())
    return without_bad_rows(table, bad, tolerance=options.tolerance, source=name, what="a stay twice, or no number where one is declared")


def _cohort(frame: "pd.DataFrame", *, source: str, notes: Mapping[str, int], synthetic: bool = False) -> Cohort:
    points = apache_iii_points({name: _finding(frame[name]) for name in ("age", *APS_COLUMNS, *_PREDICTION_FLAGS)})
    frame = frame.assign(apache_points=points.astype(int).astype(str))
    kept = ["uniquepid", "site", "hospital", "region", "gender", SCHEMA.label.name, *(column.name for column in SCHEMA.columns)]
    cohort = cohort_from_frame(frame[kept], SCHEMA, source=source, synthetic=synthetic)
    return dataclasses.replace(cohort, notes={**notes, **cohort.notes})


def _finding(values: "pd.Series[str]") -> NDArray[np.float64]:
    numbers = numbers_of(values)
    return np.where(numbers == -1, np.nan, numbers)


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays, one a patient: the sicker, the further findings lie from healthy, the more is measured, and the likelier is death.

    Four regions differ in how sick their patients are, in what they measure, and in how often patients die who are as sick.
    """
    import pandas as pd

    rng = generator(seed, "synthetic", SCHEMA.name)
    region = rng.choice(len(REGIONS), size=num_patients, p=(0.35, 0.3, 0.25, 0.1))
    severity = rng.gamma(2.0, 0.5, size=num_patients) * np.array((0.9, 1.0, 1.1, 1.3))[region]
    age = np.clip(rng.normal(63, 17, size=num_patients), 16, 90)
    columns: dict[str, NDArray[np.generic]] = {}
    for name, (_, low, high, scale, healthy, spread) in FINDINGS.items():
        centre, sign = (np.log(healthy), 1) if scale == "log" else (healthy, -1 if name in ("eyes", "motor", "verbal") else 1)
        sign = -1 if name in ("urine", "albumin", "ph", "meanbp", "hematocrit", "pao2") else sign
        drawn = centre + spread * (0.5 * sign * severity + rng.normal(0, 0.4 + 0.6 * severity) * (sign if scale == "linear" else 1))
        values = np.clip(np.exp(drawn) if scale == "log" else drawn, low, high)
        values = np.round(values) if name in ("eyes", "motor", "verbal") else np.round(values, 2)
        measured = rng.random(num_patients) < (np.clip(0.25 + 0.2 * severity + 0.08 * region, 0, 0.95) if name in ORDERED else 0.9)
        columns[name] = np.where(measured, values.astype(str), "-1")
    for name, rate in zip((*_FLAGS, *_PREDICTION_FLAGS), (0.3, 0.15, 0.03, 0.16, 0.001, 0.02, 0.005, 0.02, 0.01, 0.03, 0.02, 0.2), strict=True):
        columns[name] = (rng.random(num_patients) < rate * (0.4 + 0.6 * severity)).astype(int).astype(str)
    logit = -4.8 + 2.2 * severity + 0.04 * (age - 63) + np.array((-0.2, 0.0, 0.1, 0.3))[region] + 1.0 * (columns["metastaticcancer"] == "1")
    died = rng.random(num_patients) < 1 / (1 + np.exp(-logit))
    names = np.array(REGIONS)[region]
    frame = pd.DataFrame(columns).assign(
        uniquepid=[f"synthetic-{index}" for index in range(num_patients)],
        age=np.round(age).astype(int).astype(str),
        gender=rng.choice(["Female", "Male"], size=num_patients),
        region=names,
        site=names,
        hospital=[f"hospital-{number}" for number in region * 10 + rng.integers(0, 10, size=num_patients)],
        hospitaldischargestatus=np.where(died, "Expired", "Alive"),
    )
    return _cohort(frame, source="synthetic", notes={}, synthetic=True)


def _task(hidden: tuple[int, ...]) -> Task:
    task = table_task(
        SCHEMA,
        load_cohort=load_cohort,
        model=ModelOptions(hidden=hidden),
        source="eICU Collaborative Research Database (Pollard et al. 2018); points of APACHE III (Knaus et al. 1991)",
        sites=REGIONS,
        default_study="icu-apache.toml",
    )
    return dataclasses.replace(task, synthetic_cohort=synthetic_cohort)


def icu_apache() -> Task:
    """The task `icu-apache`: logistic regression, four regions as sites."""
    return _task(())


def icu_apache_mlp() -> Task:
    """The same with one hidden layer: `shared.tasks.icu_apache:icu_apache_mlp`."""
    return _task((16,))


def icu_apache_hospitals() -> Task:
    """The same task where a loader without options takes each hospital as a site: `shared.tasks.icu_apache:icu_apache_hospitals`."""
    task = _task(())
    return dataclasses.replace(task, load_cohort=functools.partial(load_cohort, sites="hospital"), sites=())
