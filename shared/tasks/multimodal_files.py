"""Image, table, note and gene panel of patients in a folder: what is declared of each, and how it is read; any of them may be missing.

The declared columns suit patients with an infection of the lungs. Bounds are public, and numbers are scaled by them alone.

Legend: N records, one a patient; F features of the table; G markers of the panel; S side of an image.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.cohort import BoolArray, Cohort
from shared.errors import DataMissingError
from shared.schema import MISSING_MARKS, Column, TensorSchema, encode_column
from shared.tasks.biomarker_panel import shipped_panel
from shared.tasks.eicu import numbers_of
from shared.tasks.images import (
    FloatImages,
    in_set,
    model_input,
    patients_of,
    read_images,
    read_listing,
    reading,
    refuse_too_many,
    tolerance_of,
)
from shared.tasks.multimodal_model import (
    WORDS_SCHEMA,
    presence_counts,
    presence_schema,
    words_input,
)
from shared.tasks.tabular import attribute_texts
from shared.tasks.text import has_control_characters

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "multimodal-risk"
MODALITIES = ("image", "table", "text", "panel")
SIDE = 28
NUM_MARKERS = 50
MOST_MISSING = 0.5  # share of a panel's markers; of one with more too little is known, and it counts as absent
ATTRIBUTES = ("site", "sex", "age")
PATIENTS_FILE, NOTES_FILE, PANEL_FILE = "patients.csv", "notes.csv", "panel.csv"

COLUMNS = (
    Column(name="age", type="number", unit="years", low=18, high=100),
    Column(name="sex", type="binary", categories=("F", "M")),
    Column(name="heart_rate", type="number", unit="beats/min", low=20, high=220, missing="indicator"),
    Column(name="systolic_pressure", type="number", unit="mmHg", low=50, high=250, missing="indicator"),
    Column(name="respiratory_rate", type="number", unit="breaths/min", low=4, high=60, missing="indicator"),
    Column(name="temperature", type="number", unit="degrees C", low=32, high=42, missing="indicator"),
    Column(name="oxygen_saturation", type="number", unit="%", low=50, high=100, missing="indicator"),
    Column(name="white_cells", type="number", unit="1000/mm3", low=0.1, high=100, scale="log", missing="indicator"),
    Column(name="creatinine", type="number", unit="mg/dl", low=0.1, high=25, scale="log", missing="indicator"),
    Column(name="lactate", type="number", unit="mmol/l", low=0.2, high=30, scale="log", missing="indicator"),
)
PANEL = tuple(Column(name=marker.name, type="number", unit="log2", low=marker.low, high=marker.high) for marker in shipped_panel()[:NUM_MARKERS])
FEATURES = tuple(name for column in COLUMNS for name in column.feature_names)


def _fingerprint(columns: Sequence[Column]) -> str:
    """Names the columns with their bounds, so that sites with others are of another task."""
    return hashlib.sha256("\n".join(column.model_dump_json() for column in columns).encode()).hexdigest()[:16]


SCHEMA = (
    TensorSchema(name="image", shape=(1, SIDE, SIDE), unit="grey value, black -1 to white 1", low=-1, high=1),
    TensorSchema(name="table", shape=(len(FEATURES),), unit=f"{', '.join(FEATURES)}; bounds {_fingerprint(COLUMNS)}", low=-1, high=1),
    WORDS_SCHEMA,
    TensorSchema(
        name="panel",
        shape=(NUM_MARKERS,),
        unit=f"{PANEL[0].name} to {PANEL[-1].name}, log2, each one's bounds -1 to 1; bounds {_fingerprint(PANEL)}",
        low=-1,
        high=1,
    ),
    presence_schema(MODALITIES),
)


# Files --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the files say, a row for each patient `(N,)`, and what is wrong with a row."""

    table: "pd.DataFrame" = field(repr=False)  # patient, label, perhaps site; and the table's columns as text
    panel: "pd.DataFrame" = field(repr=False)  # (N, G) as text
    texts: tuple[str, ...] = field(repr=False)
    images: FloatImages = field(repr=False)  # (N, S, S)
    pictured: BoolArray = field(repr=False)  # where an image is named
    problems: Mapping[str, BoolArray] = field(repr=False)  # what is wrong -> where
    notes: Mapping[str, int]


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A folder with `patients.csv`: `patient`, `label` (0, 1), perhaps `site`, `image`, `note`, the table's columns; and `notes.csv`, `panel.csv`.

    An image is a path below the folder (PNG or DICOM). Notes may stand in `notes.csv` as well (`patient`, `text`; several of a patient are joined), and
    panels in `panel.csv` (`patient` and all markers, log2). What is empty or has no row is absent, and so is a panel with over half of its markers
    missing. A patient without any modality is left out and counted, and so is one without a label. A row is bad, skipped and counted up to the option
    `tolerance`, where the patient has no identifier or a row before, the label is outside its set, the site is empty, an image is named and cannot
    be used, a note has control characters, or text or infinity stands for a number.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many rows are bad.
    """
    tolerance = tolerance_of(options, NAME)
    file = patients_file(path)
    rows = read_rows(file, tolerance=tolerance)
    bad = np.any(list(rows.problems.values()), axis=0)
    first = next((what for what, where in rows.problems.items() if where.any()), "")
    refuse_too_many(int(bad.sum()), len(bad), tolerance=tolerance, source=file.name, first=first, bad=bad)
    unlabelled = rows.table["label"].isin(MISSING_MARKS).to_numpy(dtype=np.bool_)
    measured = (rows.table[[column.name for column in COLUMNS]] != "").any(axis=1).to_numpy()
    panelled = (rows.panel == "").mean(axis=1).to_numpy() <= MOST_MISSING
    words = words_input(rows.texts)
    present = np.stack([rows.pictured, measured, words.any(axis=1), panelled], axis=1)
    nothing = ~present.any(axis=1)
    kept = ~bad & ~unlabelled & ~nothing
    if not kept.any():
        raise DataMissingError(f"{file.name}: no patient is left of {len(kept)}: each lacks a label or all modalities", "check the columns")
    present, source = present[kept], file.name
    table, counts = encoded(rows.table[kept], COLUMNS, present[:, 1], source=source)
    panel, panel_counts = encoded(rows.panel[kept], PANEL, present[:, 3], source=PANEL_FILE)
    images = model_input(rows.images[kept]) * present[:, 0, None, None, None].astype(np.float32)
    patients = patients_of(rows.table["patient"][kept].tolist(), source=source)
    return Cohort(
        inputs=(images, table, words[kept], panel, present.astype(np.float32)),
        labels=in_set(rows.table["label"][kept], {"0": 0.0, "1": 1.0})[0],
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes={name: attribute_texts(rows.table[name][kept]) for name in ATTRIBUTES if name in rows.table.columns},
        notes={
            "records_bad": int(bad.sum()),
            "records_without_label": int((unlabelled & ~bad).sum()),
            "records_without_any_modality": int((nothing & ~bad & ~unlabelled).sum()),
            **{name: count + panel_counts[name] for name, count in counts.items()},
            **rows.notes,
            **presence_counts(present, MODALITIES),
        },
    )


def patients_file(path: Path | None) -> Path:
    """`patients.csv`: `path` itself, or in the folder `path`.

    Raises:
        DataMissingError, DataAccessError: there is none, or it may not be read.
    """
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give your folder with --data")
    with reading(str(path)):
        return path / PATIENTS_FILE if path.is_dir() else path


def read_rows(file: Path, *, tolerance: float) -> Rows:
    """The patients' list, and what stands beside it in its folder.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `load_cohort`.
    """
    frame = read_listing(file, ["patient", "label"])
    frame = frame.where(~frame.isin(MISSING_MARKS), "")
    names = frame["patient"]
    texts, nobodys_notes = _texts(frame, file.parent)
    panel, nobodys_panels = _panel(names, file.parent, tolerance=tolerance)
    named = frame["image"].tolist() if "image" in frame.columns else [""] * len(frame)
    pictured = np.array([name != "" for name in named], dtype=np.bool_)
    images, usable, first_problem = np.zeros((len(frame), SIDE, SIDE), dtype=np.float32), ~pictured, ""
    for place in np.flatnonzero(pictured).tolist():
        read = read_images(file.parent, [named[place]], side=SIDE, source=f"{file.name}: row {place + 1}")
        images[place], usable[place] = read.images[0], read.usable[0]
        first_problem = first_problem or read.first_problem
    table = frame.reindex(columns=[*frame.columns, *(column.name for column in COLUMNS if column.name not in frame.columns)], fill_value="")
    _, known = in_set(frame["label"], {"0": 0.0, "1": 1.0, "": 0.0})
    no_number = _no_numbers(table[[column.name for column in COLUMNS if column.type == "number"]]) | _no_numbers(panel)
    problems = {
        "a patient without identifier, or with a row before": ((names == "") | names.duplicated()).to_numpy(),
        "a label outside its set": ~known,
        "a patient without site": (frame["site"] == "").to_numpy() if "site" in frame.columns else np.zeros(len(frame), dtype=np.bool_),
        first_problem or "an image that cannot be used": ~usable,
        "a note with control characters": np.array([has_control_characters(text) for text in texts], dtype=np.bool_),
        "text or infinity for a number": no_number,
        "another category of sex": ~table["sex"].isin(["", "F", "M"]).to_numpy(),
    }
    notes = {"notes_of_nobody": nobodys_notes, "panels_of_nobody": nobodys_panels}
    return Rows(table=table, panel=panel, texts=texts, images=images, pictured=pictured, problems=problems, notes=notes)


def _texts(frame: "pd.DataFrame", folder: Path) -> tuple[tuple[str, ...], int]:
    """Each patient's notes, a line each, and how many rows of `notes.csv` are of no patient listed."""
    lines = {name: [] if note == "" else [note] for name, note in zip(frame["patient"], _column(frame, "note"), strict=True)}
    nobodys = 0
    with reading(NOTES_FILE):
        has_notes = (folder / NOTES_FILE).exists()
    if has_notes:
        notes = read_listing(folder / NOTES_FILE, ["patient", "text"])
        for name, text in zip(notes["patient"], notes["text"], strict=True):
            if name in lines:
                lines[name].append(text)
            else:
                nobodys += 1
    return tuple("\n".join(lines[name]) for name in frame["patient"]), nobodys


def _column(frame: "pd.DataFrame", name: str) -> list[str]:
    return frame[name].tolist() if name in frame.columns else [""] * len(frame)


def _panel(names: "pd.Series[str]", folder: Path, *, tolerance: float) -> tuple["pd.DataFrame", int]:
    """Each patient's panel as text `(N, G)`, empty where there is none, and how many rows of `panel.csv` are of no patient listed.

    Raises:
        SchemaError: a marker's column is missing, or more than `tolerance` of the rows are a patient's second; the first one counts.
    """
    import pandas as pd

    markers = [marker.name for marker in PANEL]
    with reading(PANEL_FILE):
        has_panels = (folder / PANEL_FILE).exists()
    if not has_panels:
        return pd.DataFrame("", index=names.index, columns=markers), 0
    panel = read_listing(folder / PANEL_FILE, ["patient", *markers])
    twice = panel["patient"].duplicated().to_numpy(dtype=np.bool_)
    refuse_too_many(int(twice.sum()), len(panel), tolerance=tolerance, source=PANEL_FILE, first="a patient's second panel", bad=twice)
    panel = panel[~twice].set_index("patient")[markers]
    panel = panel.where(~panel.isin(MISSING_MARKS), "")
    return panel.reindex(names, fill_value="").reset_index(drop=True), int((~panel.index.isin(names)).sum())


def _no_numbers(table: "pd.DataFrame") -> BoolArray:
    """`(N,)`, True where a row has anything but finite numbers and empty fields."""
    wrong = np.stack([np.isinf(numbers_of(table[name])) for name in table.columns])
    return np.asarray(wrong.any(axis=0), dtype=np.bool_)


def encoded(table: "pd.DataFrame", columns: Sequence[Column], present: BoolArray, *, source: str) -> tuple[NDArray[np.float32], dict[str, int]]:
    """The columns as features `(N, F)` by their declared rules, 0 where not present; and what was imputed and clipped.

    A column that nobody has takes what one missing value does.

    Raises:
        SchemaError: too many of a column's values are out of its bounds.
    """
    features, counts = [], {"values_imputed": 0, "values_clipped": 0}
    for column in columns:
        values = table[column.name]
        if not (values[present] != "").any():
            middle = 0.5 if column.type == "binary" else 0.0
            part = np.tile([middle, 1.0][: len(column.feature_names)], (len(values), 1))
        else:
            part_of_column = encode_column(values, column, source=source)
            part = part_of_column.features
            counts["values_clipped"] += part_of_column.num_clipped
        counts["values_imputed"] += int((values[present] == "").sum())
        features.append(part)
    return np.where(present[:, None], np.concatenate(features, axis=1), 0.0).astype(np.float32), counts
