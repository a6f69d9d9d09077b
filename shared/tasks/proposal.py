"""A first schema for somebody's own table: types and units are proposed from a look at it; ranges are not.

A range taken from the data would be a statistic of the patients that leaves with every scaled feature, so it stays a blank for a person
who knows the measure. Categories are proposed, to be read before they are shared.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from shared.config import nearest
from shared.errors import ConfigurationError, StorageError
from shared.files import write_atomic
from shared.schema import MISSING_MARKS, canonical
from shared.study import NAME_PATTERN
from shared.tasks.tabular import read_csv

MAX_CATEGORIES = 12
LABEL_NAMES = ("label", "target", "outcome", "died", "death", "diagnosis", "class", "y", "event", "mortality")
PATIENT_NAMES = ("patient", "patient_id", "patientid", "subject", "subject_id", "id", "pid", "mrn", "uniquepid")
SITE_NAMES = ("site", "hospital", "center", "centre", "hospital_id", "hospitalid", "clinic")
UNITS = {
    r"^age": "years", r"weight": "kg", r"height": "cm", r"bmi": "kg/m2", r"temp": "degrees C", r"sbp|dbp|systolic|diastolic|blood.?press|trestbps": "mmHg",
    r"heart.?rate|pulse|^hr$": "beats/min", r"resp": "breaths/min", r"spo2|saturation": "%", r"glucose|chol": "mg/dl", r"creatinine": "mg/dl",
    r"sodium|potassium": "mmol/l", r"h(a)?emoglobin": "g/dl", r"days|los": "days",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A schema as TOML text, and what is left for a person to fill in."""

    toml: str
    questions: list[str]

    def write(self, path: Path) -> None:
        """Write the TOML to `path`, which must not exist.

        Raises:
            StorageError: it exists, or cannot be written.
        """
        if path.exists():
            raise StorageError(f"{path}: exists already, and may hold work of yours", "give another with --out, or remove it")
        write_atomic(path, self.toml)


def propose_schema(source: Path, *, label: str | None = None, patient: str | None = None, site: str | None = None) -> Proposal:
    """A proposal for the CSV file `source`; `label`, `patient` and `site` name columns, else they are guessed from usual names.

    Raises:
        DataError: the file is missing, unreadable or empty.
        ConfigurationError: a named column is not there, or no label can be guessed.
    """
    frame = read_csv(source)
    names = list(frame.columns)
    label_name = _column_named(label, LABEL_NAMES, names, "--label")
    if label_name is None:
        raise ConfigurationError(
            f"{source}: which column is to be predicted? None has a usual name ({', '.join(LABEL_NAMES[:5])} ...)", "name it with --label"
        )
    patient_name, site_name = (
        _column_named(given, usual, names, option) for given, usual, option in ((patient, PATIENT_NAMES, "--patient"), (site, SITE_NAMES, "--site"))
    )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip("-.") or "my-task"
    assert re.match(NAME_PATTERN, name[:64])
    lines = [
        f"# Proposed from the columns of {source.name}. Read every line: it says what leaves in a feature.",
        f"name = {_quote(name[:64])}",
        'title = ""',
    ]
    lines += [f"{key} = {_quote(value)}" for key, value in (("patient", patient_name), ("site", site_name)) if value]
    if not patient_name:
        lines.append(
            "# No column names the patient: every row counts as a patient of its own. If a patient can have several rows, name the column here."
        )
    questions: list[str] = []
    lines += ["", "[label]", *_column_lines(frame[label_name], label_name, questions, is_label=True)]
    for column in names:
        if column not in (label_name, patient_name, site_name):
            lines += ["", "[[columns]]", *_column_lines(frame[column], column, questions, is_label=False)]
    lines += ["", "[model]", "hidden = [32]  # [] is logistic regression", "dropout = 0.0", ""]
    return Proposal(toml="\n".join(lines), questions=questions)


def _column_named(given: str | None, usual: tuple[str, ...], names: list[str], option: str) -> str | None:
    if given is not None:
        if given not in names:
            raise ConfigurationError(f"{option}: no column {given!r}{nearest(given, names)}", f"columns: {', '.join(names[:20])}")
        return given
    plain = {_plain(name): name for name in names}
    return next((plain[_plain(name)] for name in usual if _plain(name) in plain), None)


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation: "Patient ID" is "patient_id"."""
    return "".join(filter(str.isalnum, name.lower()))


def _column_lines(values: "pd.Series[str]", name: str, questions: list[str], *, is_label: bool) -> list[str]:
    text = values.fillna("").astype(str).str.strip()
    present = text[~text.isin(MISSING_MARKS)]
    numbers = pd.to_numeric(present, errors="coerce")
    distinct = sorted({canonical(value) for value in present.unique()}) if len(present.unique()) <= 10 * MAX_CATEGORIES else []
    lines = [f"name = {_quote(name)}"]
    few = 0 < len(distinct) <= MAX_CATEGORIES
    if len(distinct) == 2:
        lines += ['type = "binary"', f"categories = {json.dumps(distinct)}  # the second counts as 1"]
    elif few and (numbers.isna().any() or (is_label and len(distinct) <= 5)):
        lines += ['type = "category"', f"categories = {json.dumps(distinct)}"]
    elif _looks_like_identifier(present, numbers):
        lines += ["# Every row has another whole number here: an identifier? Remove this column, or name it above as patient."]
        lines += ['type = "number"', "# low =", "# high ="]
        questions.append(f"{name}: an identifier? Remove it, or name it as patient with --patient")
    elif len(present) and numbers.notna().all():
        lines += [
            'type = "number"',
            f"unit = {_quote(_unit_of(name))}",
            "# low =    # least plausible value, known without looking at the data",
            "# high =   # largest plausible value",
        ]
        questions.append(f"{name}: low and high")
    else:
        lines += ['type = "category"', "categories = []  # free text or too many values: list the ones you mean, or remove this column"]
        questions.append(f"{name}: its categories, or remove the column")
    if not is_label:
        lines.append('missing = "impute"  # or "indicator", or "drop"')
    return lines


def _looks_like_identifier(present: "pd.Series[str]", numbers: "pd.Series[float]") -> bool:
    """Whole numbers, all different, in at least twenty rows."""
    return len(present) >= 20 and bool(present.is_unique) and bool(present.str.fullmatch(r"\d+").all()) and bool(numbers.notna().all())


def _unit_of(name: str) -> str:
    return next((unit for pattern, unit in UNITS.items() if re.search(pattern, name.lower())), "")


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
