"""Risk of dying in hospital, from APACHE's findings and the admission diagnoses in words: table and text of the first day, either of which may be missing.

Data: eICU (see `shared.tasks.eicu`). The table is that of `icu-apache`; the text is the table `admissionDx` as it was entered before 24 hours, where
each row is the path of an answer on the form ("Non-operative|Diagnosis|Cardiovascular|Sepsis, pulmonary"). A stay that ended within 24 hours, by
discharge or by death, is left out: at the hour of prediction its outcome is known. So cohort and numbers are not those of `icu-apache`.

One hospital in ten has no APACHE rows, and others enter no diagnoses; a stay that has either is in the cohort.

Legend: N stays.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.metrics import BINARY_METRICS
from shared.models import mlp
from shared.schema import TensorSchema, encode_table
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks import icu_apache
from shared.tasks.apache_iii import apache_iii_points
from shared.tasks.eicu import REGIONS, LoadOptions, load_options, numbers_of, read_stays, read_table, without_bad_rows, without_small_sites
from shared.tasks.multimodal_model import (
    WORDS_SCHEMA,
    FusedRisk,
    WordsEncoder,
    presence_counts,
    presence_schema,
    with_only,
    words_input,
)
from shared.tasks.tabular import logistic_loss

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "multimodal-risk-eicu"
MODALITIES = ("table", "text")
DAY_MINUTES = 24 * 60
FORM_HEADINGS = 2  # parts of a path that are the form's own, the same for every patient
FORM_PARTS = ("non-operative", "operative", "diagnosis", "organ system")  # the same; whether somebody was operated on is asked apart
USUAL_LOGIT = -2.5  # one in fourteen dies of those who stay for a day
ATTRIBUTES = ("site", "hospital", "region", "gender", "age")
_FEATURES = icu_apache.SCHEMA.feature_names
_FLAGS = tuple(column.name for column in icu_apache.SCHEMA.columns if column.type == "binary" and column.name not in icu_apache.APS_COLUMNS)

SCHEMA = (
    TensorSchema(name="table", shape=(len(_FEATURES),), unit=f"as icu-apache: {', '.join(_FEATURES)}", low=-1, high=1),
    WORDS_SCHEMA,
    presence_schema(MODALITIES),
)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays of a folder of eICU tables. Options: `sites` ("region" or "hospital"), `tolerance` (see `shared.tasks.eicu.LoadOptions`).

    Raises:
        ConfigurationError: an unknown option.
        DataError: a table is missing, unreadable or not as declared.
    """
    chosen = load_options(options, NAME, sites="region")
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give the folder of eICU's tables with --data")
    stays = read_stays(path, chosen)
    notes = dict(stays.notes)
    stayed = numbers_of(stays.frame["hospitaldischargeoffset"]) >= DAY_MINUTES
    notes["stays_ended_in_first_day"] = int((~stayed).sum())
    frame = stays.frame[stayed].reset_index(drop=True)
    findings = read_apache(path, options=chosen, notes=notes)
    texts = read_diagnoses(path, options=chosen, notes=notes)
    known = (frame["patientunitstayid"].isin(findings["patientunitstayid"]) | frame["patientunitstayid"].isin(list(texts))).to_numpy()
    notes["stays_with_neither"] = int((~known).sum())
    frame = frame[known].reset_index(drop=True)
    frame = without_small_sites(frame, notes) if chosen.sites == "hospital" else frame
    if len(frame) == 0:
        raise DataMissingError(f"{path}: no stay of 24 hours has APACHE's findings or a diagnosis", "check that the tables are of one release")
    return cohort_of_stays(frame, findings, texts, notes=notes, source=path.name)


def read_apache(path: Path, *, options: LoadOptions, notes: dict[str, int]) -> "pd.DataFrame":
    """One row for each stay in both APACHE tables, with the columns that `icu-apache` has but for age and points."""
    tables = [
        icu_apache.read_findings(path, name, columns, options=options, notes=notes)
        for name, columns in (("apacheApsVar", icu_apache.APS_COLUMNS), ("apachePredVar", _FLAGS))
    ]
    joined = tables[0].merge(tables[1], on="patientunitstayid", how="inner", validate="one_to_one")
    return joined.assign(electivesurgery=joined["electivesurgery"].replace("", "0"))  # it is filled in for surgical patients alone


def read_diagnoses(path: Path, *, options: LoadOptions, notes: dict[str, int]) -> dict[str, str]:
    """Stay -> its admission diagnoses of the first day, a line each; rows without stay or time are skipped and counted up to the tolerance."""
    table = read_table(path, "admissionDx", ("patientunitstayid", "admitdxpath", "admitdxenteredoffset"))
    minutes = numbers_of(table["admitdxenteredoffset"])
    bad = ~np.isfinite(minutes) | (table["patientunitstayid"] == "").to_numpy()
    notes["records_bad"] = notes.get("records_bad", 0) + int(bad.sum())
    table = table.assign(minute=minutes)
    table = without_bad_rows(table, bad, tolerance=options.tolerance, source="admissionDx", what="no stay, or a time that is no number")
    table = table[table["minute"] < DAY_MINUTES]
    lines: dict[str, list[str]] = {}
    for stay, entry in zip(table["patientunitstayid"], table["admitdxpath"], strict=True):
        lines.setdefault(stay, []).append(" ".join(part for part in entry.split("|")[FORM_HEADINGS:] if part.strip().lower() not in FORM_PARTS))
    return {stay: "\n".join(own) for stay, own in lines.items()}


def cohort_of_stays(frame: "pd.DataFrame", findings: "pd.DataFrame", texts: Mapping[str, str], *, notes: Mapping[str, int], source: str) -> Cohort:
    """The cohort of the stays `frame`, a record each, with what is known of them.

    Args:
        findings: see `read_apache`; texts: see `read_diagnoses`. Those of other stays are left out.
    """
    import pandas as pd

    stays = frame["patientunitstayid"]
    merged = frame.merge(findings, on="patientunitstayid", how="left", validate="many_to_one")
    words = words_input([texts.get(stay, "") for stay in stays])
    present = np.stack([stays.isin(findings["patientunitstayid"]).to_numpy(), words.any(axis=1)], axis=1)
    table = np.zeros((len(frame), len(_FEATURES)), dtype=np.float32)
    counts: dict[str, int] = {}
    if present[:, 0].any():
        encoded = encode_table(with_points(merged[present[:, 0]]), icu_apache.SCHEMA, source=source)  # which drops none: each has its label
        table[present[:, 0]] = encoded.features
        counts = {name: count for name, count in encoded.notes.items() if name != "records_dropped"}
    patient_of_record, patients = pd.factorize(frame["uniquepid"])
    first = frame.drop_duplicates("uniquepid")
    return Cohort(
        inputs=(table, words, present.astype(np.float32)),
        labels=(frame["hospitaldischargestatus"] == "Expired").to_numpy(dtype=np.float32),
        patient_of_record=patient_of_record.astype(np.int64),
        patient_ids=tuple(str(name) for name in patients),
        attributes={name: first[name].to_numpy(dtype=np.str_) for name in ATTRIBUTES},
        notes={**notes, **counts, **presence_counts(present, MODALITIES)},
    )


def with_points(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The stays with their APACHE III points, made of the findings by the published table."""
    points = apache_iii_points({name: _finding(frame[name]) for name in ("age", *icu_apache.APS_COLUMNS, *_FLAGS)})
    return frame.assign(apache_points=points.astype(int).astype(str))


def _finding(values: "pd.Series[str]") -> NDArray[np.float64]:
    numbers = numbers_of(values)
    return np.where(numbers == -1, np.nan, numbers)


# Synthetic stays ----------------------------------------------------------------------------------------------------------------

# words of an entry, how often it stands for those who live and for those who die
SYNTHETIC_ENTRIES = (
    ("Sepsis, pulmonary", 0.06, 0.18),
    ("Cardiac arrest (with or without respiratory arrest)", 0.02, 0.12),
    ("Pneumonia, bacterial", 0.08, 0.14),
    ("Rhythm disturbance (atrial, supraventricular)", 0.08, 0.06),
    ("Infarction, acute myocardial", 0.1, 0.07),
    ("Hemorrhage, intracranial", 0.04, 0.11),
    ("Bleeding, upper gastrointestinal", 0.08, 0.06),
    ("Diabetic ketoacidosis", 0.08, 0.01),
    ("Coronary bypass graft", 0.1, 0.02),
    ("Overdose, sedatives", 0.06, 0.01),
    ("Congestive heart failure", 0.1, 0.11),
    ("Cerebrovascular accident", 0.08, 0.1),
)
SYNTHETIC_LACKS = {"Midwest": (0.05, 0.05), "South": (0.05, 0.08), "West": (0.25, 0.2), "Northeast": (0.1, 1.0)}  # share without table, text


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays, one a patient: those of `icu-apache`, with entries that are likelier or rarer for who dies.

    Regions differ in what is missing; one of the four enters no diagnoses at all.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    cohort = icu_apache.synthetic_cohort(num_patients, seed)
    rng = generator(seed, "synthetic", NAME)
    rates = np.array([rates for _, *rates in SYNTHETIC_ENTRIES])[:, cohort.labels.astype(np.int64)].T  # (N, entries)
    entered = rng.random(rates.shape) < rates
    entered[~entered.any(axis=1), rng.integers(rates.shape[1])] = True
    words = words_input(["\n".join(SYNTHETIC_ENTRIES[place][0] for place in np.flatnonzero(own)) for own in entered])
    lacks = np.array([SYNTHETIC_LACKS[name] for name in cohort.attributes["region"].tolist()])
    present = rng.random(lacks.shape) >= lacks
    present[~present.any(axis=1), 0] = True
    inputs = (cohort.inputs[0] * present[:, :1].astype(np.float32), words * present[:, 1:], present.astype(np.float32))
    attributes = {name: cohort.attributes[name] for name in ATTRIBUTES}
    return replace(cohort, inputs=inputs, attributes=attributes, notes=presence_counts(present, MODALITIES))


# The task -----------------------------------------------------------------------------------------------------------------------


def model() -> FusedRisk:
    """Logistic regression on the table, and embeddings of words."""
    return FusedRisk({"table": mlp(len(_FEATURES), 1), "text": WordsEncoder()}, usual_logit=USUAL_LOGIT)


def eicu_task(only: tuple[str, ...] = MODALITIES) -> Task:
    """The task on the modalities `only`: the same stays, of whom nothing else is known."""
    return Task(
        name=NAME if only == MODALITIES else f"{NAME}-{'-'.join(only)}",
        title="Death in hospital, from findings and admission diagnoses of the first day in intensive care",
        modality="table and text",
        schema=SCHEMA,
        load_cohort=lambda path, options: with_only(load_cohort(path, options), MODALITIES, only),
        synthetic_cohort=lambda num_patients, seed: with_only(synthetic_cohort(num_patients, seed), MODALITIES, only),
        model=model,
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="eICU Collaborative Research Database (Pollard et al. 2018); points of APACHE III (Knaus et al. 1991)",
        sites=REGIONS,
        default_study="multimodal-risk-eicu.toml",
        subgroups=(Subgroup(attribute="gender"), Subgroup(attribute="age", edges=(45, 65, 80))),
    )


def multimodal_risk_eicu() -> Task:
    """The task `shared.tasks.multimodal_eicu:multimodal_risk_eicu`: table and text, four regions as sites."""
    return eicu_task()


def table_alone() -> Task:
    """The same stays by their table alone: `shared.tasks.multimodal_eicu:table_alone`."""
    return eicu_task(("table",))


def text_alone() -> Task:
    """The same stays by their diagnoses alone: `shared.tasks.multimodal_eicu:text_alone`."""
    return eicu_task(("text",))
