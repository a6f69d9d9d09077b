"""Predictions for a hospital's own patients, one row a patient: from a run, a .safetensors file or an exported ONNX model.

Nothing is sent, and nothing is charged to a ledger: the model is used, not trained. What comes out is of patients and stays where it is.

A hospital's loaders leave out a few bad records of many, and clip a few values, which is right for training: here a row left out is a patient missed,
and a value that cannot be is a prediction for nobody. So the data are refused, with the numbers of the rows, unless the caller says to go on without.

Legend: P patients, N records, K columns of predictions.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from client.data_check import DataSource
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, ModelMismatchError, SchemaError, UnknownTaskError
from shared.files import storage_errors
from shared.schema import MISSING_MARKS, MOST_NUMBER_LETTERS, OUT_OF_RANGE_TOLERANCE, Column, TableSchema, canonical, require_columns
from shared.task import Task, resolve_task, task_names
from wardround.deploying import INSTALL, NUM_SYNTHETIC, Session, onnx_session, read_onnx_facts, torch_session
from wardround.trained import read_trained

if TYPE_CHECKING:
    import pandas as pd

BATCH_SIZE = 1024  # records that a model sees at once
MAP_COLUMNS = ("mean_prediction", "highest_prediction", "share_at_least_half")  # of a map, such as a segmentation's
PATIENT, NUM_RECORDS = "patient", "num_records"
LEFT_OUT = (  # notes of loaders
    "records_dropped", "records_bad", "records_without_label", "records_without_outcome", "patients_dropped", "patients_not_in_split",
)  # fmt: skip
MOST_TOLD = 10  # rows in a message
ROW = "row of the file"  # names patients where the schema names no column for it

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One patient: the identifier as the data have it, how many records, and the mean of their predictions, `(K,)`."""

    patient: str = field(repr=False)
    num_records: int
    values: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A model and patients who fit it; nothing is predicted before `rows` is called.

    Attributes:
        columns: K names of what is predicted.
        labels_read: False where the data needed no label, because they were read by the schema alone.
        left_out: what was left out of the data, in words and numbers of rows, because the caller said so; empty where nothing was.
    """

    task: Task
    session: Session = field(repr=False)
    cohort: Cohort = field(repr=False)
    columns: tuple[str, ...]
    labels_read: bool
    left_out: str = ""

    def rows(self, *, batch_size: int = BATCH_SIZE) -> Iterator[Row]:
        """A row a patient, in the data's order; at most `batch_size` records are with the model at once.

        Raises:
            DataError: a prediction is not finite.
        """
        order = np.argsort(self.cohort.patient_of_record, kind="stable")
        ends = np.cumsum(np.bincount(self.cohort.patient_of_record, minlength=self.cohort.num_patients))
        first = 0
        while first < len(ends):
            start = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + batch_size, side="right")))  # patients of this batch, or one with many records
            end = int(ends[last - 1])
            values = np.concatenate([self._values(order[at : min(at + batch_size, end)]) for at in range(start, end, batch_size)])
            begins = np.concatenate([[0], ends[first : last - 1] - start])
            counts = np.diff([*begins, len(values)])
            means = np.add.reduceat(values, begins, axis=0) / counts[:, None]
            for place in range(last - first):
                yield Row(
                    patient=self.cohort.patient_ids[first + place], num_records=int(counts[place]), values=tuple(float(v) for v in means[place])
                )
            first = last

    def _values(self, records: NDArray[np.int64]) -> FloatArray:
        """`(n, K)` of these records."""
        inputs = tuple(values[records] for values in self.cohort.inputs)
        given = self.session(inputs)
        if not np.isfinite(given).all():
            raise DataError("expected finite predictions, got NaN or infinity for some records", "check the data with 'wardround data check'")
        return as_columns(given if self.task.row is None else self.task.row(given, inputs))


def require_row(task: Task, shape: Sequence[int]) -> None:
    """Raise `ConfigurationError` where a record's predictions, of this shape, are no row: neither numbers, nor a map of one of the inputs."""
    if task.row is None and len(shape) > 1 and not is_map(task, shape):
        raise ConfigurationError(
            f"task {task.name}: expected numbers, classes or a map of an input, which fit a row a patient, got {tuple(shape)} of other numbers",
            "use wardround.predicting.open_model(...) in Python, which gives them whole; or declare Task.row",
        )


def is_map(task: Task, shape: Sequence[int]) -> bool:
    """Whether predictions of this shape, of two or more axes, have a place for each place of an input, as a segmentation's have."""
    parts = () if isinstance(task.schema, TableSchema) else task.schema
    return len(shape) > 1 and any(part.shape[-len(shape) :] == tuple(shape) for part in parts)


def as_columns(predictions: NDArray[np.generic]) -> FloatArray:
    """Predictions `(n, ...)` as `(n, K)`; a map as the three numbers of `MAP_COLUMNS`."""
    numbers = predictions.astype(np.float64)
    if numbers.ndim <= 2:
        return numbers.reshape(len(numbers), -1)
    flat = numbers.reshape(len(numbers), -1)
    return np.stack([flat.mean(axis=1), flat.max(axis=1), (flat >= 0.5).mean(axis=1)], axis=1)


def column_names(task: Task, shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the predictions of one record of `shape`: the task's, else by the schema's label where there is one, else numbered.

    >>> from shared.task import resolve_task
    >>> column_names(resolve_task("heart-disease"), ()), column_names(resolve_task("survival-breast"), ())
    (('disease=present',), ('risk_5_years',))
    """
    if task.predicted and (task.row is not None or tuple(shape) in ((len(task.predicted),), () if len(task.predicted) == 1 else None)):
        return task.predicted
    label = task.schema.label if isinstance(task.schema, TableSchema) else None
    if len(shape) > 1:
        return MAP_COLUMNS
    if not shape or shape[0] == 1:
        return (_name(label),)
    if label is not None and len(label.values) == shape[0]:
        return tuple(f"{label.name}={value}" for value in label.values)
    return tuple(f"prediction_{index + 1}" for index in range(shape[0]))


def _name(label: Column | None) -> str:
    if label is None:
        return "prediction"
    return f"{label.name}={label.values[1]}" if label.type == "binary" else label.name


# Opening -----------------------------------------------------------------------------------------------------------------------------


def open_predictor(
    model: str | Path,
    data: str | Path | None,
    *,
    task: str | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
    skip_bad_rows: bool = False,
) -> Predictor:
    """A model and the patients to predict for, both checked.

    Args:
        model: a run's folder, a .safetensors file, or an .onnx file written by `wardround export`.
        data: as for `simulate`, or a site.toml; None: the task's own patients, where it has some.
        task: the task, where the model's file names one that is not installed.
        options: of the task's loader.
        skip_bad_rows: predict for the others where rows do not fit, or the loader leaves out records; else the whole data are refused.

    Raises:
        ModelMismatchError: the model is another task's, was altered, or is no model of ours.
        ConfigurationError: a .pt2, which is never loaded; a package or the task is not there; or predictions fit no row, said before data are read.
        DataError: the data are missing, may not be read, or do not fit the schema; nothing was predicted.
    """
    resolved, session = open_model(Path(model), task)
    shape = np.asarray(session(tuple(values[:1] for values in resolved.synthetic_cohort(NUM_SYNTHETIC, 0).inputs))).shape[1:]
    require_row(resolved, shape)
    source = DataSource.of(None if data is None else Path(data), dict(options or {}))
    cohort, labels_read, left_out = read_patients(resolved, source, skip_bad_rows=skip_bad_rows)
    if cohort.num_patients == 0:
        raise DataMissingError(f"{data}: expected at least one patient, found none", "check the data with 'wardround data check'")
    return Predictor(task=resolved, session=session, cohort=cohort, columns=column_names(resolved, shape), labels_read=labels_read, left_out=left_out)


def open_model(path: Path, task: str | None = None) -> tuple[Task, Session]:
    """The task of a model, and what gives its predictions whole, for inputs as the task's cohorts have them. Errors as of `open_predictor`."""
    if path.suffix == ".pt2":
        raise ConfigurationError(
            f"{path}: expected a run's folder, .safetensors or .onnx, got a .pt2, which torch unpickles and so is never loaded here",
            "give the run's folder, or export it with --format onnx",
        )
    if path.suffix != ".onnx":
        trained = read_trained(path, task=task)
        return trained.task, torch_session(trained.task, trained.model)
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"{path}: expected the package onnxruntime for an ONNX model, found none: {error}", INSTALL) from error
    with storage_errors(path, "read", remedy="check the path of the model"):
        data = path.read_bytes()
    facts = read_onnx_facts(path, data)
    if task is None and facts.task not in task_names():
        raise UnknownTaskError(
            f"{path}: its task {facts.task!r} is not installed here", "give it with --task: 'package.module:factory', or its schema's TOML file"
        )
    resolved = resolve_task(task or facts.task)
    if (resolved.name, resolved.fingerprint()) != (facts.task, facts.task_fingerprint):
        raise ModelMismatchError(
            f"{path}: expected a model of task {resolved.name} as it is here, got one of {facts.task!r} or of another version of it",
            "give the model's own task with --task, or export the run again",
        )
    return resolved, onnx_session(data)


def read_patients(task: Task, source: DataSource, *, skip_bad_rows: bool = False) -> tuple[Cohort, bool, str]:
    """The cohort, whether labels were read with it, and what was left out of the data, which is nothing unless `skip_bad_rows`.

    A CSV file with most of the columns of a table's schema is read by the schema, and its label is not looked at. Everything else is read by the task's
    own loader, which may ask for labels.

    Raises:
        DataError: the data are missing, may not be read, or do not fit; of rows that do not, with their numbers where they are known.
    """
    if source.path is None and not task.bundled:
        raise DataMissingError(f"task {task.name} has no data of its own", "give the file or folder with DATA")
    if source.path is not None and not source.path.exists():
        raise DataMissingError(f"{source.path}: expected data, found nothing", "check the path")
    if source.path is not None and not source.path.is_file() and not source.path.is_dir():  # a pipe or a device, which may have no end
        raise DataMissingError(f"{source.path}: expected a file or a folder, found something else", "save it as a file")
    if source.path is not None and isinstance(task.schema, TableSchema) and not source.options:
        frame = schema_frame(task.schema, source.path)
        if frame is not None:
            cohort, left_out = cohort_by_schema(frame, task.schema, source=source.path.name, skip_bad_rows=skip_bad_rows)
            return cohort, False, left_out
    try:
        return _by_loader(task, source, skip_bad_rows=skip_bad_rows)
    except PermissionError:
        raise DataAccessError(f"{source.path}: this user may not read it", "change its permissions") from None


# By the schema alone -----------------------------------------------------------------------------------------------------------------


def schema_frame(schema: TableSchema, path: Path) -> "pd.DataFrame | None":
    """The CSV file `path`, or the only one in the folder, as text, where most columns of the schema stand in its first line; else None.

    Raises:
        DataMissingError, DataAccessError, SchemaError: it is a file that ends in .csv, and cannot be read as one.
    """
    from shared.tasks.tabular import only_csv, read_csv

    try:
        frame = read_csv(only_csv(path))
    except DataAccessError:
        raise
    except DataError:
        if path.is_file() and path.suffix.lower() == ".csv":
            raise
        return None  # the task's own loader says what is wrong
    frame.columns = [str(name).strip() for name in frame.columns]
    needed = [column.name for column in schema.columns]
    return frame if 2 * len(set(needed) & set(frame.columns)) > len(needed) else None


def cohort_by_schema(frame: "pd.DataFrame", schema: TableSchema, *, source: str, skip_bad_rows: bool) -> tuple[Cohort, str]:
    """The cohort of a table, its labels all the same and of no meaning; and which rows were left out.

    Raises:
        SchemaError: a column is missing or twice; or a row has a value that its column cannot have, no patient, or nothing in it (unless `skip_bad_rows`,
            and then if it is every row).
        DataMissingError: there is no row.
    """
    from shared.tasks.tabular import cohort_from_frame, require_once

    frame, label = frame.copy(), schema.label
    frame[label.name] = str(label.low) if label.type == "number" else label.values[0]
    if schema.site and schema.site not in frame.columns:
        schema = schema.model_copy(update={"site": None})
    require_columns(list(frame.columns), schema, source=source)
    require_once(list(frame.columns), schema, source=source)
    if schema.patient is None:  # then a row is known by its place in the file
        frame[ROW] = [f"row {number + 1}" for number in range(len(frame))]
        schema = schema.model_copy(update={"patient": ROW})
    bad = misfits(frame, schema)
    left_out = told_misfits(bad, len(frame)) if bad else ""
    if bad and (not skip_bad_rows or len(bad) == len(frame)):
        raise SchemaError(f"{source}: {left_out}", "correct them, or predict for the others with --skip-bad-rows")
    kept = np.ones(len(frame), dtype=np.bool_)
    kept[list(bad)] = False
    return cohort_from_frame(frame[kept].reset_index(drop=True), schema, source=source), left_out


def misfits(frame: "pd.DataFrame", schema: TableSchema) -> dict[int, str]:
    """Rows that nothing can be predicted for, by place from 0: what ails each, in the order of the file; never a value.

    A number must lie in its column's declared range: of many records a few may be clipped to train on, of one patient a value that cannot be is an error
    of entry. A row in which no column has a value says nothing of a patient.
    """
    found: dict[int, str] = {}
    empty = np.ones(len(frame), dtype=np.bool_)
    for column in schema.columns:
        text = frame[column.name].astype(str).str.strip()
        missing = text.isin([*MISSING_MARKS, *column.missing_codes]).to_numpy()
        empty &= missing
        wrong = ~missing & ~_as_declared(text, missing, column)
        problem = (
            f"{column.name!r} is no number from {column.low:g} to {column.high:g}" if column.type == "number" else f"{column.name!r} is another value"
        )
        found = {int(place): problem for place in np.flatnonzero(wrong)} | found
        if column.missing == "drop":
            found = {int(place): f"{column.name!r} is missing" for place in np.flatnonzero(missing)} | found
    nameless = np.zeros(len(frame), dtype=np.bool_) if schema.patient is None else frame[schema.patient].astype(str).str.strip().isin(MISSING_MARKS)
    found |= {int(place): "no patient's identifier" for place in np.flatnonzero(nameless)}
    found |= {int(place): "nothing in it" for place in np.flatnonzero(empty)}
    return dict(sorted(found.items()))


def _as_declared(text: "pd.Series[str]", missing: NDArray[np.bool_], column: Column) -> NDArray[np.bool_]:
    import pandas as pd

    if column.type != "number":
        known = {canonical(value) for value in column.values}
        return text.map({value: canonical(value) in known for value in set(text)}).to_numpy(dtype=np.bool_)
    assert column.low is not None and column.high is not None
    short = ~missing & (text.str.len() <= MOST_NUMBER_LETTERS).to_numpy()
    numbers = np.array(pd.to_numeric(text.where(short), errors="coerce"), dtype=np.float64)
    return np.asarray((numbers >= column.low) & (numbers <= column.high))  # False of NaN


def told_misfits(bad: Mapping[int, str], num_rows: int) -> str:
    """How many rows, and of the first ten the number, from 1 below the header, and what ails it.

    >>> told_misfits({2: "'age' is missing"}, 9)
    "1 of 9 rows cannot be predicted for: row 3 ('age' is missing)"
    """
    first = ", ".join(f"row {place + 1} ({problem})" for place, problem in list(bad.items())[:MOST_TOLD])
    more = f" and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
    return f"{len(bad)} of {num_rows} rows cannot be predicted for: {first}{more}"


# By the task's loader ----------------------------------------------------------------------------------------------------------------


def _by_loader(task: Task, source: DataSource, *, skip_bad_rows: bool) -> tuple[Cohort, bool, str]:
    """Without tolerance where the loader has one, so that it says what ails which record; then what it left out or clipped is looked at."""
    said = ""
    try:
        cohort = _load(task, source, tolerance=0)
    except SchemaError as error:
        if not skip_bad_rows:
            raise SchemaError(error.what, f"{error.remedy}; or predict for the others with --skip-bad-rows") from None
        said = error.what
        cohort = _load(task, source, tolerance=None)
    counts = {name.replace("_", " "): number for name, number in cohort.notes.items() if number and name.startswith(LEFT_OUT)}
    clipped = cohort.notes.get("values_clipped", 0)
    if clipped > OUT_OF_RANGE_TOLERANCE * cohort.num_records:  # of training data a share of values; here of patients
        counts["values clipped, for they are out of their declared range"] = clipped
    told = "; ".join([*([said] if said else []), *(f"{name}: {number:,}" for name, number in counts.items())])
    if counts and not skip_bad_rows:
        raise SchemaError(
            f"{source.path or task.name}: expected data that can all be predicted for, got {told}",
            "correct them (a label may be any that fits), or predict for the others with --skip-bad-rows",
        )
    return cohort, True, told


def _load(task: Task, source: DataSource, *, tolerance: float | None) -> Cohort:
    """With this option, where the loader takes it and the caller gave none."""
    if tolerance is not None and "tolerance" not in source.options and source.path is not None:
        try:
            return task.load_cohort(source.path, {**source.options, "tolerance": tolerance})
        except ConfigurationError as error:
            if "tolerance" not in str(error):
                raise
    return task.load_cohort(source.path, dict(source.options))


# Writing -----------------------------------------------------------------------------------------------------------------------------


def write_rows(predictor: Predictor, file: TextIO) -> int:
    """Write the header and a line a patient as they come; gives the number of patients."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([PATIENT, NUM_RECORDS, *predictor.columns])
    count = 0
    for row in predictor.rows():
        writer.writerow([row.patient, row.num_records, *(f"{value:.6g}" for value in row.values)])
        count += 1
    return count


def predict(
    model: str | Path,
    data: str | Path | None = None,
    *,
    task: str | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
    skip_bad_rows: bool = False,
) -> "pd.DataFrame":
    """A row a patient: `patient`, `num_records`, and a column for each thing predicted. See `open_predictor` for arguments and errors.

    Example:
        predict("runs/heart-disease-20250101T000000Z-1a2b", "new_patients.csv")
    """
    import pandas as pd

    predictor = open_predictor(model, data, task=task, options=options, skip_bad_rows=skip_bad_rows)
    rows = [(row.patient, row.num_records, *row.values) for row in predictor.rows()]
    return pd.DataFrame(rows, columns=[PATIENT, NUM_RECORDS, *predictor.columns])
