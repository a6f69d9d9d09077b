"""A CSV file of patients to predict for, read by its schema alone and in parts, however large it is.

It is read twice: once from end to end, to check every row and to count each patient's records, before anything is predicted; then for what a model
takes. Between the two only the patients' identifiers are held. A label that is there, or empty, is not looked at.

A hospital's loaders clip a few values of many, which is right for training: of one patient, a value that cannot be is an error of entry. So rows that do
not fit are refused, with their numbers, unless the caller says to go on without them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataAccessError, DataError, DataMissingError, SchemaError
from shared.schema import MISSING_MARKS, MOST_NUMBER_LETTERS, Column, TableSchema, canonical, encode_rows, require_columns
from shared.tasks.tabular import cohort_from_frame, csv_columns, csv_files, csv_parts, require_once
from wardround.patients import CONTROL, CONTROL_TOLD, Batch

if TYPE_CHECKING:
    import pandas as pd

PART_BYTES = 2**20  # of the file; as text in memory some twenty times as much
MOST_TOLD = 10  # rows in a message
ROW = "row of the file"  # names patients where the schema names no column for it
SKIP = "correct them, or predict for the others with --skip-bad-rows"


class TableRows:
    """The patients of one CSV file, checked.

    Attributes:
        num_patients, num_records: to predict for.
        left_out: which rows are not, in words and numbers; empty where all are.
        notes: what was done to values, in counts.

    Args:
        path: of the file.
        schema: which it is to fit.
        skip_bad_rows: go on without rows that do not fit.
        part_bytes: of the file, read at once.

    Raises:
        SchemaError: a column is missing or twice; or a row has a value that its column cannot have, no patient, or nothing in it (unless `skip_bad_rows`,
            and then if it is every row).
        DataMissingError: there is no row.
        DataError: it cannot be read; see `read_csv`.
    """

    synthetic = False

    def __init__(self, path: Path, schema: TableSchema, *, skip_bad_rows: bool = False, part_bytes: int = PART_BYTES) -> None:
        self._path, self._part_bytes = path, part_bytes
        columns = _stripped(csv_columns(path))
        require_once(columns, schema, source=path.name)
        require_columns([*columns, schema.label.name], _without_site(schema, columns), source=path.name)
        self._schema = _without_site(schema, columns)
        self._version = _version(path)
        bad: dict[int, str] = {}
        num_rows = num_bad = num_imputed = 0
        counts: Counter[str] = Counter()
        who = hashlib.sha256()
        for part in self._examined():
            bad |= {num_rows + place: problem for place, problem in list(part.wrong.items())[: MOST_TOLD - len(bad)]}
            num_rows, num_bad, num_imputed = num_rows + part.num_rows, num_bad + len(part.wrong), num_imputed + part.num_imputed
            who.update(_as_lines(part.names))
            if self._schema.patient is not None:
                counts.update(part.names)
        if num_rows == 0:
            raise DataMissingError(f"{path.name}: expected at least one row, got none", "check that this is the right file")
        self.left_out = told_misfits(bad, num_bad, num_rows) if num_bad else ""
        if num_bad and (not skip_bad_rows or num_bad == num_rows):
            raise SchemaError(f"{path.name}: {self.left_out}", SKIP if num_bad < num_rows else "correct them")
        self._counts, self._who = counts, who.digest()
        self.num_records = num_rows - num_bad
        self.num_patients = len(counts) if self._schema.patient is not None else self.num_records
        self.notes: Mapping[str, int] = {"values_imputed": num_imputed}

    def num_records_of(self, patient: str) -> int:
        """How many records a patient has."""
        return 1 if self._schema.patient is None else self._counts[patient]

    def batches(self, size: int) -> Iterator[Batch]:
        """The records in the file's order, at most `size` at once.

        Raises:
            DataError: the file is another than it was, or whose its rows are.
        """
        for names, frame in self._kept():
            features, _ = encode_rows(frame, self._schema, source=self._path.name)
            for at in range(0, len(names), size):
                yield Batch(patients=names[at : at + size], inputs=(features[at : at + size],))
        self._check_unchanged()

    def cohort(self) -> Cohort:
        """All of it at once, its labels all the same and of no meaning."""
        import pandas as pd

        label = self._schema.label
        schema = self._schema.model_copy(update={"patient": self._schema.patient or ROW})
        parts = [frame.assign(**{ROW: names}) if self._schema.patient is None else frame for names, frame in self._kept()]
        whole = pd.concat(parts, ignore_index=True).assign(**{label.name: str(label.low) if label.type == "number" else label.values[0]})
        self._check_unchanged()
        return cohort_from_frame(whole, schema, source=self._path.name)

    def _kept(self) -> Iterator[tuple[list[str], "pd.DataFrame"]]:
        """Of each part the rows that fit, and the name of each row's patient.

        Raises:
            DataError: at the end, where other rows were kept than when the file was checked, whatever the system says of the file.
        """
        num_records, who = 0, hashlib.sha256()
        for part in self._examined():
            num_records += len(part.names)
            who.update(_as_lines(part.names))
            yield part.names, part.frame
        if (num_records, who.digest()) != (self.num_records, self._who):
            raise self._changed()

    def _examined(self) -> "Iterator[_Part]":
        num_rows, patient = 0, self._schema.patient
        for part in self._parts():
            missing, wrong = examine(part, self._schema)
            kept = np.ones(len(part), dtype=np.bool_)
            kept[list(wrong)] = False
            frame = part[kept].reset_index(drop=True)
            names = [f"row {num_rows + place + 1}" for place in np.flatnonzero(kept)] if patient is None else _names(frame, patient)
            num_rows += len(part)
            yield _Part(num_rows=len(part), wrong=wrong, num_imputed=int(missing[kept].sum()), names=names, frame=frame)

    def _parts(self) -> "Iterator[pd.DataFrame]":
        for part in csv_parts(self._path, part_bytes=self._part_bytes):
            part.columns = _stripped(part.columns)
            yield part

    def _check_unchanged(self) -> None:
        if _version(self._path) != self._version:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"{self._path}: expected the file that was checked, found it changed since", "run it again when nobody writes to the file")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some rows of the file, examined: those that are `wrong`, by place in the part, and the others with the names of their patients."""

    num_rows: int
    wrong: Mapping[int, str]
    num_imputed: int  # values of the others
    names: list[str] = field(repr=False)
    frame: "pd.DataFrame" = field(repr=False)


def open_table(path: Path, schema: TableSchema, *, skip_bad_rows: bool = False) -> TableRows | None:
    """The CSV file `path`, or the only one in the folder, in whose first line most columns of the schema stand; None where there is no such, or more than one.

    Raises:
        DataMissingError, DataAccessError, SchemaError: it is a file that ends in .csv, and cannot be read as one; or see `TableRows`.
    """
    needed = {column.name for column in schema.columns}
    fitting = []
    for file in csv_files(path):
        try:
            columns = _stripped(csv_columns(file))
        except DataAccessError:
            raise
        except DataError:
            if file == path and path.suffix.lower() == ".csv":
                raise
            continue  # the task's own loader says what is wrong
        if 2 * len(needed & set(columns)) > len(needed):
            fitting.append(file)
    return TableRows(fitting[0], schema, skip_bad_rows=skip_bad_rows) if len(fitting) == 1 else None


def examine(frame: "pd.DataFrame", schema: TableSchema) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Which values are missing, `(N, C)`, and the rows that nothing can be predicted for, by place from 0: what ails each, in order; never a value.

    A number must lie in its column's declared range. A row in which no column has a value says nothing of a patient.
    """
    found: dict[int, str] = {}
    all_missing = []
    for column in schema.columns:
        text = frame[column.name].astype(str).str.strip()
        missing = text.isin([*MISSING_MARKS, *column.missing_codes]).to_numpy()
        all_missing.append(missing)
        wrong = ~missing & ~_as_declared(text, missing, column)
        problem = (
            f"{column.name!r} is no number from {column.low:g} to {column.high:g}" if column.type == "number" else f"{column.name!r} is another value"
        )
        found = {int(place): problem for place in np.flatnonzero(wrong)} | found
        if column.missing == "drop":
            found = {int(place): f"{column.name!r} is missing" for place in np.flatnonzero(missing)} | found
    values = np.stack(all_missing, axis=1)
    if schema.patient is not None:
        names = frame[schema.patient].astype(str).str.strip()
        found |= {int(place): "no patient's identifier" for place in np.flatnonzero(names.isin(MISSING_MARKS))}
        found |= {int(place): CONTROL_TOLD for place in np.flatnonzero(names.str.contains(CONTROL))}
    found |= {int(place): "nothing in it" for place in np.flatnonzero(values.all(axis=1))}
    return values, dict(sorted(found.items()))


def _as_declared(text: "pd.Series[str]", missing: NDArray[np.bool_], column: Column) -> NDArray[np.bool_]:
    import pandas as pd

    if column.type != "number":
        known = {canonical(value) for value in column.values}
        return text.map({value: canonical(value) in known for value in set(text)}).to_numpy(dtype=np.bool_)
    assert column.low is not None and column.high is not None
    short = ~missing & (text.str.len() <= MOST_NUMBER_LETTERS).to_numpy()
    numbers = np.array(pd.to_numeric(text.where(short), errors="coerce"), dtype=np.float64)
    return np.asarray((numbers >= column.low) & (numbers <= column.high))  # False of NaN


def told_misfits(bad: Mapping[int, str], num_bad: int, num_rows: int) -> str:
    """How many rows, and of the first ones the number, from 1 below the header, and what ails it.

    >>> told_misfits({2: "'age' is missing"}, 3, 9)
    "3 of 9 rows cannot be predicted for: row 3 ('age' is missing) and 2 more"
    """
    first = ", ".join(f"row {place + 1} ({problem})" for place, problem in bad.items())
    more = f" and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
    return f"{num_bad} of {num_rows} rows cannot be predicted for: {first}{more}"


def _names(frame: "pd.DataFrame", patient: str) -> list[str]:
    return [str(name) for name in frame[patient].astype(str).str.strip()]


def _as_lines(names: list[str]) -> bytes:
    """One line each, for none has a line break: the same bytes wherever parts begin."""
    return "".join(f"{name}\n" for name in names).encode(errors="surrogatepass")


def _stripped(columns: "list[str] | pd.Index[str]") -> list[str]:
    return [str(name).strip() for name in columns]


def _without_site(schema: TableSchema, columns: list[str]) -> TableSchema:
    return schema.model_copy(update={"site": None}) if schema.site and schema.site not in columns else schema


def _version(path: Path) -> tuple[int, int, int, int]:
    """The time of the last change of any kind is among them: a program can put the time of writing back, but not that one."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
