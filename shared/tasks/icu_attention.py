"""Risk of dying in hospital, from the events of the first day in intensive care: self-attention over (code, time).

Data: eICU (see `shared.tasks.eicu`): events are rows of the tables `diagnosis`, `treatment`, `medication` and `admissionDx`, and facts of admission
(age, sex, kind of unit, where from) at time 0. Only events entered before 24 hours count: a drug by the later of its order and its start. Whether a
diagnosis stood at discharge, whether an order was cancelled and when it ended are known later, and not read. A stay that ended within 24
hours, by discharge or by death, is left out: at the hour of prediction its outcome is known.

Codes become numbers by a fixed public hash of their text, at three levels of their path, so no vocabulary is taken from any patient's record.
The model is one layer of scaled dot-product attention (Vaswani et al. 2017, section 3.2) over the sum of the levels' embeddings and of time.

Legend: N stays, E events of a stay, at most; L levels of a code; D width.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.metrics import BINARY_METRICS
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.eicu import REGIONS, LoadOptions, load_options, numbers_of, read_stays, read_table, without_bad_rows, without_small_sites
from shared.tasks.tabular import logistic_loss
from shared.tasks.text import SmallStart

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "icu-attention"
NUM_CODES = 1024  # 0: no code
NUM_EVENTS = 40  # of a stay; where there are more, the latest stay, and the facts of admission
NUM_LEVELS = 3
DAY_MINUTES = 24 * 60
WIDTH = 16
NUM_HEADS = 2
EMBEDDING_SCALE = 3.0
SUM_SCALE = 0.3
USUAL_LOGIT = -2.2  # one in ten dies, as in intensive care at large; clipped gradients would spend rounds to find that out
AGE_EDGES = (40, 50, 60, 70, 80)

# table -> column of its code, columns of its times, and how much of the code's path each level takes
EVENT_TABLES: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "diagnosis": ("diagnosisstring", ("diagnosisoffset",), (1, 2, 3)),
    "treatment": ("treatmentstring", ("treatmentoffset",), (1, 2, 3)),
    "admissionDx": ("admitdxpath", ("admitdxenteredoffset",), (3, 5, 6)),  # the first parts are the form's own headings
    "medication": ("drugname", ("drugorderoffset", "drugstartoffset"), (1,)),
}
FACTS = ("gender", "unittype", "unitadmitsource")
DOSE_FORMS = frozenset(
    {
        "bag",
        "caps",
        "capsule",
        "cup",
        "inhaler",
        "inj",
        "injection",
        "infusion",
        "mini",
        "premix",
        "soln",
        "solution",
        "syringe",
        "tablet",
        "tabs",
        "vial",
    }
)


@functools.cache
def code_number(text: str) -> int:
    """1 to NUM_CODES - 1: a public hash of the text, the same everywhere; 0 where it is empty.

    >>> code_number("") == 0 < code_number("diagnosis|cardiovascular") < NUM_CODES
    True
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % (NUM_CODES - 1) if text else 0


@functools.cache
def levels_of(table: str, code: str) -> tuple[int, int, int]:
    """Numbers of a code's path at each level; 0 where the path is shorter."""
    path = drug_of(code) if table == "medication" else [part.strip().lower() for part in code.split("|")]
    takes = EVENT_TABLES[table][2] if table in EVENT_TABLES else (1, 2)
    numbers = [code_number("|".join([table, *path[:take]])) if path and take <= len(path) else 0 for take in takes]
    first, second, third = (numbers + [0] * NUM_LEVELS)[:NUM_LEVELS]
    return first, second, third


def drug_of(name: str) -> list[str]:
    """The drug's name without dose and form: its first word of four letters or more that is no form; nothing where it has none.

    >>> drug_of("5 ML VIAL : DILTIAZEM HCL 25 MG/5ML IV SOLN")
    ['diltiazem']
    """
    words = [word for word in re.findall(r"[a-z]{4,}", name.lower()) if word not in DOSE_FORMS]
    return words[:1]


# From tables to arrays -----------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The stays of a folder of eICU tables. Options: `sites` ("region" or "hospital"), `tolerance` (see `shared.tasks.eicu.LoadOptions`).

    Raises:
        ConfigurationError: an unknown option.
        DataError: a table is missing, unreadable or not as declared.
    """
    import pandas as pd

    chosen = load_options(options, NAME, sites="region")
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give the folder of eICU's tables with --data")
    stays = read_stays(path, chosen, more_columns=FACTS[1:])
    notes = dict(stays.notes)
    stayed = numbers_of(stays.frame["hospitaldischargeoffset"]) >= DAY_MINUTES
    notes["stays_ended_in_first_day"] = int((~stayed).sum())
    frame = stays.frame[stayed].reset_index(drop=True)
    if chosen.sites == "hospital":
        frame = without_small_sites(frame, notes)
    if len(frame) == 0:
        raise DataMissingError(f"{path}: no stay lasted 24 hours", "check that these are eICU's tables")
    events = pd.concat([read_events(path, table, options=chosen, notes=notes) for table in EVENT_TABLES], ignore_index=True)
    return cohort_of_events(frame, events, notes=notes)


def read_events(path: Path, table: str, *, options: LoadOptions, notes: dict[str, int]) -> "pd.DataFrame":
    """Events of one table in the first day: columns `patientunitstayid`, `table`, `code`, `minute`.

    Rows without a time, or with text for one, are skipped and counted up to the tolerance.
    """
    code, times, _ = EVENT_TABLES[table]
    frame = read_table(path, table, ("patientunitstayid", code, *times))
    minutes = np.stack([numbers_of(frame[time]) for time in times]).max(axis=0)  # NaN where one is missing
    bad = ~np.isfinite(minutes) | (frame["patientunitstayid"] == "").to_numpy()
    notes["records_bad"] = notes.get("records_bad", 0) + int(bad.sum())
    frame = frame.assign(table=table, minute=minutes).rename(columns={code: "code"})[["patientunitstayid", "table", "code", "minute"]]
    frame = without_bad_rows(frame, bad, tolerance=options.tolerance, source=table, what="no stay, or a time that is no number")
    return frame[frame["minute"] < DAY_MINUTES].reset_index(drop=True)


def admission_facts(frame: "pd.DataFrame") -> "pd.DataFrame":
    """What is known at minute 0, as events: an age of 65 is 'over 40', 'over 50' and 'over 60'."""
    import pandas as pd

    age = numbers_of(frame["age"])
    parts = [frame.assign(code=f"age|{edge} and over")[np.isfinite(age) & (age >= edge)] for edge in AGE_EDGES]
    parts += [frame.assign(code=f"{name}|" + frame[name])[(frame[name] != "").to_numpy()] for name in FACTS]
    return pd.concat(parts, ignore_index=True).assign(table="admission", minute=0.0)[["patientunitstayid", "table", "code", "minute"]]


def cohort_of_events(frame: "pd.DataFrame", events: "pd.DataFrame", *, notes: Mapping[str, int], synthetic: bool = False) -> Cohort:
    """The cohort of stays `frame`, a record each, with their `events`; events of other stays are left out.

    Of events of one code the first counts. `notes` gains how many were left out of stays with more than NUM_EVENTS.
    """
    import pandas as pd

    number = dict(zip(frame["patientunitstayid"], range(len(frame)), strict=True))
    facts = admission_facts(frame)
    everything = pd.concat([facts.assign(order=1), events.assign(order=0)], ignore_index=True)
    everything["stay"] = everything["patientunitstayid"].map(number)
    everything = everything.loc[everything["stay"].notna()].reset_index(drop=True)
    levels = np.array([levels_of(table, code) for table, code in zip(everything["table"], everything["code"], strict=True)], dtype=np.int64)
    levels = levels.reshape(-1, NUM_LEVELS)
    for level in range(NUM_LEVELS):
        everything[f"level{level}"] = levels[:, level]
    everything = everything.loc[np.flatnonzero(levels.any(axis=1))]
    everything = everything.sort_values(["stay", "minute"], kind="stable").drop_duplicates(["stay", "level0", "level1", "level2"])
    everything = everything.sort_values(["stay", "order", "minute"], ascending=[True, False, False], kind="stable")
    place = everything.groupby("stay").cumcount().to_numpy()
    kept = place < NUM_EVENTS
    stay, place = everything["stay"].to_numpy(dtype=np.int64)[kept], place[kept]
    codes, hours = np.zeros((len(frame), NUM_EVENTS, NUM_LEVELS), dtype=np.int64), np.zeros((len(frame), NUM_EVENTS), dtype=np.float32)
    codes[stay, place] = everything[[f"level{level}" for level in range(NUM_LEVELS)]].to_numpy(dtype=np.int64)[kept]
    hours[stay, place] = np.clip(everything["minute"].to_numpy(dtype=np.float64)[kept] / 60, -24, 24)
    patient_of_record, patients = pd.factorize(frame["uniquepid"])
    first = frame.drop_duplicates("uniquepid")
    return Cohort(
        inputs=(codes, hours),
        labels=(frame["hospitaldischargestatus"] == "Expired").to_numpy(dtype=np.float32),
        patient_of_record=patient_of_record.astype(np.int64),
        patient_ids=tuple(str(name) for name in patients),
        attributes={name: first[name].to_numpy(dtype=np.str_) for name in ("site", "hospital", "region", "gender", "age")},
        notes={**notes, "events_left_out": int((~kept).sum())},
        synthetic=synthetic,
    )


# The model -----------------------------------------------------------------------------------------------------------------------


class EventAttention(nn.Module):
    """`(N, E, L)` codes and `(N, E)` hours -> `(N, 1)` logits; an event without a code is no event."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CODES, WIDTH)
        self.time = nn.Linear(2, WIDTH, bias=False)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.output = nn.Linear(WIDTH, 1)
        self.start = SmallStart(self.embedding)

    def forward(self, codes: torch.Tensor, hours: torch.Tensor) -> torch.Tensor:
        present = (codes > 0).to(hours.dtype)  # (N, E, L)
        event = present[..., 0]  # (N, E)
        clock = hours / 24
        embedded = (self.embedding(codes) * present[..., None]).sum(dim=2) * EMBEDDING_SCALE
        embedded = (embedded + EMBEDDING_SCALE * self.time(torch.stack([clock, clock**2], dim=-1))) * event[..., None]  # (N, E, D)
        seen = embedded + self._attend(embedded, event)
        logits: torch.Tensor = self.output((seen * event[..., None]).sum(dim=1) * SUM_SCALE) + USUAL_LOGIT
        return logits

    def _attend(self, embedded: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._heads(layer(embedded)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5  # (N, head, E, E)
        weights = (scores + (event[:, None, None, :] - 1) * 1e4).softmax(dim=-1)
        attended: torch.Tensor = (weights @ value).transpose(1, 2).reshape(embedded.shape)
        return attended

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(*values.shape[:2], NUM_HEADS, -1).transpose(1, 2)


# Synthetic stays -----------------------------------------------------------------------------------------------------------------

# table, code, how often at an ordinary severity, how much likelier with each step of it
_SYNTHETIC_CODES: tuple[tuple[str, str, float, float], ...] = (
    ("diagnosis", "cardiovascular|shock / hypotension|septic shock", 0.06, 1.2),
    ("diagnosis", "cardiovascular|shock / hypotension|hypotension", 0.1, 0.7),
    ("diagnosis", "cardiovascular|ventricular disorders|hypertension", 0.25, -0.3),
    ("diagnosis", "cardiovascular|arrhythmias|atrial fibrillation", 0.15, 0.3),
    ("diagnosis", "cardiovascular|cardiac arrest|asystole", 0.02, 1.5),
    ("diagnosis", "pulmonary|respiratory failure|acute respiratory failure", 0.2, 0.9),
    ("diagnosis", "pulmonary|pulmonary infections|pneumonia", 0.15, 0.5),
    ("diagnosis", "renal|disorder of kidney|acute renal failure", 0.15, 0.8),
    ("diagnosis", "endocrine|glucose metabolism|diabetes mellitus", 0.2, 0.0),
    ("diagnosis", "neurologic|altered mental status / pain|change in mental status", 0.15, 0.5),
    ("treatment", "pulmonary|ventilation and oxygenation|mechanical ventilation", 0.25, 1.0),
    ("treatment", "pulmonary|ventilation and oxygenation|oxygen therapy", 0.3, -0.2),
    ("treatment", "cardiovascular|shock|vasopressors", 0.1, 1.2),
    ("treatment", "renal|dialysis|hemodialysis", 0.04, 0.9),
    ("treatment", "gastrointestinal|medications|stress ulcer prophylaxis", 0.3, 0.1),
    ("treatment", "infectious diseases|medications|therapeutic antibacterials", 0.3, 0.4),
    ("admissionDx", "admission diagnosis|all diagnosis|non-operative|diagnosis|cardiovascular|sepsis, pulmonary", 0.1, 0.8),
    ("admissionDx", "admission diagnosis|all diagnosis|operative|diagnosis|cardiovascular|coronary bypass", 0.15, -0.8),
    ("medication", "NOREPINEPHRINE 4 MG/250 ML", 0.1, 1.2),
    ("medication", "ACETAMINOPHEN 325 MG PO TABS", 0.4, -0.2),
    ("medication", "FUROSEMIDE 10 MG/ML INJ", 0.25, 0.3),
    ("medication", "METOPROLOL 25 MG PO TABS", 0.25, -0.4),
    ("medication", "INSULIN LISPRO 100 UNIT/ML", 0.3, 0.1),
    ("medication", "ONDANSETRON 4 MG/2 ML INJ", 0.3, -0.1),
)


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic stays, one a patient: with severity, which makes death likelier, some codes grow likelier and earlier, and others rarer.

    Four regions differ in severity, and each writes down a table of its own choice less than the others do; one stay in thirty has no events.
    """
    import pandas as pd

    rng = generator(seed, "synthetic", NAME)
    region = rng.choice(len(REGIONS), size=num_patients, p=(0.35, 0.3, 0.25, 0.1))
    severity = rng.normal(np.array((-0.1, 0.0, 0.1, 0.3))[region], 1.0)
    age = np.clip(rng.normal(63, 17, size=num_patients), 16, 90)
    stays = np.array([f"stay-{index}" for index in range(num_patients)])
    writes = rng.random(num_patients) > 1 / 30
    tables = list(EVENT_TABLES)
    parts = []
    for table, code, rate, steepness in _SYNTHETIC_CODES:
        share = np.where(region == tables.index(table), 0.7, 1.0)
        there = writes & (rng.random(num_patients) < np.clip(rate * np.exp(steepness * severity) * share, 0, 0.95))
        minute = rng.gamma(2.0, np.exp(-0.2 * severity) * 200)
        parts.append(pd.DataFrame({"patientunitstayid": stays[there], "table": table, "code": code, "minute": minute[there]}))
    events = pd.concat(parts, ignore_index=True)
    died = rng.random(num_patients) < 1 / (1 + np.exp(-(-2.2 + 1.8 * severity + 0.04 * (age - 63))))
    names = np.array(REGIONS)[region]
    frame = pd.DataFrame(
        {
            "patientunitstayid": stays,
            "uniquepid": [f"synthetic-{index}" for index in range(num_patients)],
            "age": np.round(age).astype(int).astype(str),
            "gender": rng.choice(["Female", "Male"], size=num_patients),
            "unittype": rng.choice(["Med-Surg ICU", "MICU", "CCU-CTICU"], size=num_patients, p=(0.7, 0.2, 0.1)),
            "unitadmitsource": rng.choice(["Emergency Department", "Floor", "Operating Room"], size=num_patients, p=(0.6, 0.2, 0.2)),
            "region": names,
            "site": names,
            "hospital": [f"hospital-{number}" for number in region * 10 + rng.integers(0, 10, size=num_patients)],
            "hospitaldischargestatus": np.where(died, "Expired", "Alive"),
        }
    )
    return cohort_of_events(frame, events[events["minute"] < DAY_MINUTES].reset_index(drop=True), notes={}, synthetic=True)


def predict(outputs: torch.Tensor) -> torch.Tensor:
    """`(N, 1)` logits -> `(N,)` risks."""
    return torch.sigmoid(outputs[:, 0])


def icu_attention() -> Task:
    """The task `icu-attention`."""
    return Task(
        name=NAME,
        title="Death in hospital, from events of the first day in intensive care",
        modality="events",
        schema=(
            TensorSchema(name="codes", shape=(NUM_EVENTS, NUM_LEVELS), dtype="int64", low=0, high=NUM_CODES - 1),
            TensorSchema(name="hours", shape=(NUM_EVENTS,), unit="hours since admission to the unit", low=-24, high=24),
        ),
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=EventAttention,
        loss=logistic_loss,
        predict=predict,
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="eICU Collaborative Research Database (Pollard et al. 2018)",
        sites=REGIONS,
        default_study="icu-attention.toml",
        subgroups=(Subgroup(attribute="gender"), Subgroup(attribute="age", edges=(45, 65, 80))),
    )
