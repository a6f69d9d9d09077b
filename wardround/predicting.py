"""Predictions for a hospital's own patients, one row a patient: from a run, a .safetensors file or an exported ONNX model.

Nothing is sent, and nothing is charged to a ledger: the model is used, not trained. What comes out is of patients and stays where it is.

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
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, ModelMismatchError, UnknownTaskError
from shared.files import storage_errors
from shared.schema import Column, TableSchema
from shared.task import Task, resolve_task, task_names
from wardround.deploying import INSTALL, Session, onnx_session, read_onnx_facts, torch_session
from wardround.trained import read_trained

if TYPE_CHECKING:
    import pandas as pd

BATCH_SIZE = 1024  # records that a model sees at once
MAP_COLUMNS = ("mean_prediction", "highest_prediction", "share_at_least_half")  # of a map, such as a segmentation's
PATIENT, NUM_RECORDS = "patient", "num_records"
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
    """

    task: Task
    session: Session = field(repr=False)
    cohort: Cohort = field(repr=False)
    columns: tuple[str, ...]
    labels_read: bool

    def rows(self, *, batch_size: int = BATCH_SIZE) -> Iterator[Row]:
        """A row a patient, in the data's order; at most `batch_size` records are with the model at once.

        Raises:
            DataError: a prediction is not finite.
            ConfigurationError: predictions are neither numbers, classes nor maps of probabilities.
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
        given = self.session(tuple(values[records] for values in self.cohort.inputs))
        if not np.isfinite(given).all():
            raise DataError("expected finite predictions, got NaN or infinity for some records", "check the data with 'wardround data check'")
        if given.ndim > 2 and (given.min(initial=0) < 0 or given.max(initial=0) > 1):
            raise ConfigurationError(
                f"task {self.task.name}: expected numbers, classes or a map of probabilities, which fit a row, got {given.shape[1:]} of other numbers",
                "use wardround.predicting.open_predictor(...).session in Python, which gives them whole",
            )
        return as_columns(given)


def as_columns(predictions: NDArray[np.generic]) -> FloatArray:
    """Predictions `(n, ...)` as `(n, K)`; a map as the three numbers of `MAP_COLUMNS`."""
    numbers = predictions.astype(np.float64)
    if numbers.ndim <= 2:
        return numbers.reshape(len(numbers), -1)
    flat = numbers.reshape(len(numbers), -1)
    return np.stack([flat.mean(axis=1), flat.max(axis=1), (flat >= 0.5).mean(axis=1)], axis=1)


def column_names(task: Task, shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the predictions of one record of `shape`: by the schema's label where there is one, else numbered as the model gives them.

    >>> from shared.task import resolve_task
    >>> column_names(resolve_task("heart-disease"), ())
    ('disease=present',)
    """
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
    model: str | Path, data: str | Path | None, *, task: str | None = None, options: Mapping[str, str | int | float | bool] | None = None
) -> Predictor:
    """A model and the patients to predict for, both checked.

    Args:
        model: a run's folder, a .safetensors file, or an .onnx file written by `wardround export`.
        data: as for `simulate`, or a site.toml; None: the task's own patients, where it has some.
        task: the task, where the model's file names one that is not installed.
        options: of the task's loader.

    Raises:
        ModelMismatchError: the model is another task's, was altered, or is no model of ours.
        ConfigurationError: a .pt2, which is never loaded; or a package or the task is not there.
        DataError: the data are missing, may not be read, or do not fit the schema; nothing was predicted.
    """
    resolved, session = _open_model(Path(model), task)
    source = DataSource.of(None if data is None else Path(data), dict(options or {}))
    cohort, labels_read = read_patients(resolved, source, by_schema=(task or "").endswith(".toml"))
    if cohort.num_patients == 0:
        raise DataMissingError(f"{data}: expected at least one patient, found none", "check the data with 'wardround data check'")
    probe = session(tuple(values[:1] for values in cohort.inputs))
    return Predictor(task=resolved, session=session, cohort=cohort, columns=column_names(resolved, probe.shape[1:]), labels_read=labels_read)


def _open_model(path: Path, task: str | None) -> tuple[Task, Session]:
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


def read_patients(task: Task, source: DataSource, *, by_schema: bool = False) -> tuple[Cohort, bool]:
    """The cohort, and whether labels were read with it.

    A CSV file with the columns of a table's schema needs no label where it has none (or always, where `by_schema`): it is read by the schema.
    Everything else is read by the task's own loader, which may ask for labels.

    Raises:
        DataError: the data are missing, may not be read, or do not fit.
    """
    if source.path is None and not task.bundled:
        raise DataMissingError(f"task {task.name} has no data of its own", "give the file or folder with DATA")
    if source.path is not None and not source.path.exists():
        raise DataMissingError(f"{source.path}: expected data, found nothing", "check the path")
    if source.path is not None and isinstance(task.schema, TableSchema) and not source.options:
        unlabelled = _by_schema(task.schema, source.path, always=by_schema)
        if unlabelled is not None:
            return unlabelled, False
    try:
        return task.load_cohort(source.path, dict(source.options)), True
    except PermissionError:
        raise DataAccessError(f"{source.path}: this user may not read it", "change its permissions") from None


def _by_schema(schema: TableSchema, path: Path, *, always: bool) -> Cohort | None:
    """The cohort of a CSV with the schema's columns, its labels all the same and of no meaning; None where it is another file."""
    from shared.tasks.tabular import cohort_from_frame, only_csv, read_csv

    try:
        frame = read_csv(only_csv(path))
    except DataAccessError:
        raise
    except DataError:
        return None  # the task's own loader says what is wrong
    needed = [name for name in schema.needed_columns if name != schema.label.name]
    if not set(needed) <= set(frame.columns) or (schema.label.name in frame.columns and not always):
        return None
    frame[schema.label.name] = str(schema.label.low) if schema.label.type == "number" else schema.label.values[0]
    if schema.site and schema.site not in frame.columns:
        schema = schema.model_copy(update={"site": None})
    if schema.patient is None:  # then a row is known by its place in the file
        frame[ROW] = [f"row {number + 1}" for number in range(len(frame))]
        schema = schema.model_copy(update={"patient": ROW})
    return cohort_from_frame(frame, schema, source=path.name)


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
    model: str | Path, data: str | Path | None = None, *, task: str | None = None, options: Mapping[str, str | int | float | bool] | None = None
) -> "pd.DataFrame":
    """A row a patient: `patient`, `num_records`, and a column for each thing predicted. See `open_predictor` for arguments and errors.

    Example:
        predict("runs/heart-disease-20250101T000000Z-1a2b", "new_patients.csv")
    """
    import pandas as pd

    predictor = open_predictor(model, data, task=task, options=options)
    rows = [(row.patient, row.num_records, *row.values) for row in predictor.rows()]
    return pd.DataFrame(rows, columns=[PATIENT, NUM_RECORDS, *predictor.columns])
