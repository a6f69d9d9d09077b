"""Predictions for a hospital's own patients, one row a patient: from a run, a .safetensors file or an exported ONNX model.

Nothing is sent, and nothing is charged to a ledger: the model is used, not trained. What comes out is of patients and stays where it is.

A table that fits the task's schema is a stream, however large it is (`wardround.table_rows`). Everything else is read whole by the task's own loader, as
it is to train; loaders leave out a few bad records of many, and clip a few values, which is right for training, but here a row left out is a patient
missed. So the data are refused, with the numbers of the rows, unless the caller says to go on without.

Legend: P patients, N records, K columns of predictions.
"""

import csv
import dataclasses
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
from shared.schema import OUT_OF_RANGE_TOLERANCE, Column, TableSchema
from shared.task import Task, resolve_task, task_names
from wardround.deploying import INSTALL, NUM_SYNTHETIC, Session, onnx_session, read_onnx_facts, torch_session
from wardround.patients import CONTROL, CONTROL_TOLD, Patients, WholeCohort
from wardround.table_rows import open_table
from wardround.trained import Owner, read_trained

if TYPE_CHECKING:
    import pandas as pd

BATCH_SIZE = 1024  # records that a model sees at once
MAP_COLUMNS = ("mean_prediction", "highest_prediction", "share_at_least_half")  # of a map, such as a segmentation's
PATIENT, NUM_RECORDS = "patient", "num_records"
LEFT_OUT = ("records_dropped", "records_bad", "records_without_label", "records_without_outcome", "patients_dropped")  # notes of loaders

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
        owner: whose own model it is; None of a model that is shared.
    """

    task: Task
    session: Session = field(repr=False)
    patients: Patients = field(repr=False)
    columns: tuple[str, ...]
    labels_read: bool
    owner: Owner | None = None

    def rows(self, *, batch_size: int = BATCH_SIZE) -> Iterator[Row]:
        """A row a patient, in the order in which they begin; at most `batch_size` records are with the model at once.

        A patient whose records lie apart is held, as a sum, until the last one, and with it whoever begins after it.

        Raises:
            DataError: a prediction is not finite, or the data are no longer what was checked.
        """
        held: dict[str, tuple[int, FloatArray]] = {}  # by patient, how many records so far and their sum
        num_given = 0
        for batch in self.patients.batches(batch_size):
            for patient, values in zip(batch.patients, self._values(batch.inputs), strict=True):
                num, total = held.get(patient, (0, np.zeros_like(values)))
                held[patient] = num + 1, total + values
            while held:
                patient, (num, total) = next(iter(held.items()))
                if num < self.patients.num_records_of(patient):
                    break
                del held[patient]
                num_given += 1
                yield Row(patient=patient, num_records=num, values=tuple(float(value) for value in total / num))
        if held or num_given != self.patients.num_patients:
            raise DataError(
                f"expected all records of {self.patients.num_patients:,} patients, found all of {num_given:,}, and of {len(held):,} not as many as were counted: "
                "the data are no longer what was checked, or somebody in them has no record",
                "run it again when nobody writes to the data; if it stays so, report the task's loader",
            )

    def _values(self, inputs: tuple[NDArray[np.generic], ...]) -> FloatArray:
        """`(n, K)` of these records."""
        given = self.session(inputs)
        if not np.isfinite(given).all():
            raise DataError("expected finite predictions, got NaN or infinity for some records", "check the data with 'wardround data check'")
        return as_columns(given if self.task.row is None else self.task.row(given, inputs))


def require_row(task: Task, shape: Sequence[int]) -> None:
    """Raise `ConfigurationError` where a record's predictions, of this shape, are no row: neither numbers, nor a map of one of the inputs."""
    if task.row is None and len(shape) > 1 and not is_map(task, shape):
        told = " x ".join(map(str, shape)) + " numbers"
        raise ConfigurationError(
            f"task {task.name}: expected a model that predicts something of a patient, a number or a class or a map of an input, got one that gives {told} of another kind",
            "docs/models.md says what such a model is for; wardround.predicting.open_model(...) in Python gives its output whole; a task of your own may declare Task.row",
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
    resolved, session, owner = _opened(Path(model), task)
    shape = np.asarray(session(tuple(values[:1] for values in resolved.synthetic_cohort(NUM_SYNTHETIC, 0).inputs))).shape[1:]
    require_row(resolved, shape)
    source = DataSource.of(None if data is None else Path(data), dict(options or {}))
    patients = open_patients(resolved, source, skip_bad_rows=skip_bad_rows)
    if patients.num_patients == 0:
        raise DataMissingError(f"{data}: expected at least one patient, found none", "check the data with 'wardround data check'")
    return Predictor(
        task=resolved, session=session, patients=patients, columns=column_names(resolved, shape), labels_read=isinstance(patients, WholeCohort),
        owner=owner,
    )  # fmt: skip


def open_model(path: Path, task: str | None = None) -> tuple[Task, Session]:
    """The task of a model, and what gives its predictions whole, for inputs as the task's cohorts have them. Errors as of `open_predictor`."""
    resolved, session, _ = _opened(path, task)
    return resolved, session


def _opened(path: Path, task: str | None) -> tuple[Task, Session, Owner | None]:
    """As `open_model`, and whose own model it is."""
    if path.suffix == ".pt2":
        raise ConfigurationError(
            f"{path}: expected a run's folder, .safetensors or .onnx, got a .pt2, which torch unpickles and so is never loaded here",
            "give the run's folder, or export it with --format onnx",
        )
    if path.suffix != ".onnx":
        trained = read_trained(path, task=task)
        return trained.task, torch_session(trained.task, trained.model), trained.owner
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
    return resolved, onnx_session(data), facts.owner


def open_patients(task: Task, source: DataSource, *, skip_bad_rows: bool = False) -> Patients:
    """Patients whose data fit; nobody is left out unless `skip_bad_rows`.

    A CSV file with most of the columns of a table's schema is read by the schema, and its label is not looked at. Everything else is read by the task's
    own loader, which may ask for labels.

    Raises:
        DataError: the data are missing, may not be read, or do not fit; of rows that do not, with their numbers where they are known.
    """
    path = source.path
    if path is None and not task.bundled:
        raise DataMissingError(f"task {task.name} has no data of its own", "give the file or folder with DATA")
    if path is not None and not path.exists():
        raise DataMissingError(f"{path}: expected data, found nothing", "check the path")
    if path is not None and not path.is_file() and not path.is_dir():  # a pipe or a device, which may have no end
        raise DataMissingError(f"{path}: expected a file or a folder, found something else", "save it as a file")
    try:
        if path is not None and isinstance(task.schema, TableSchema) and not source.options:
            table = open_table(path, task.schema, skip_bad_rows=skip_bad_rows)
            if table is not None:
                return table
        return _by_loader(task, source, skip_bad_rows=skip_bad_rows)
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read it", "change its permissions") from None


# By the task's loader ----------------------------------------------------------------------------------------------------------------


def _by_loader(task: Task, source: DataSource, *, skip_bad_rows: bool) -> WholeCohort:
    """Without tolerance where the loader has one, so that it says what ails which record; then what it left out or clipped is looked at."""
    said = ""
    try:
        cohort = _load(task, source, tolerance=0)
    except SchemaError as error:
        said = error.what
        cohort = _load(task, source, tolerance=None)  # where this fails too, it is not of some rows alone
        if not skip_bad_rows:
            raise SchemaError(said, f"{error.remedy}; or predict for the others with --skip-bad-rows") from None
    counts = {name.replace("_", " "): number for name, number in cohort.notes.items() if number and name.startswith(LEFT_OUT)}
    clipped = cohort.notes.get("values_clipped", 0)
    if clipped > OUT_OF_RANGE_TOLERANCE * cohort.num_records:  # of training data a share of values; here of patients
        counts["values clipped, for they are out of their declared range"] = clipped
    named = np.array([not CONTROL.search(name) for name in cohort.patient_ids], dtype=np.bool_)
    if not named.all():
        counts[f"patients with {CONTROL_TOLD}"] = int((~named).sum())
    told = "; ".join([*([said] if said else []), *(f"{name}: {number:,}" for name, number in counts.items())])
    if counts and not skip_bad_rows:
        raise SchemaError(
            f"{source.path or task.name}: expected data that can all be predicted for, got {told}",
            "correct them (a label may be any that fits), or predict for the others with --skip-bad-rows",
        )
    return WholeCohort(cohort if named.all() else dataclasses.replace(cohort.select(named), notes=cohort.notes), left_out=told)


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
    """Write the header and a line a patient as they come, each one line, for no identifier has a control character; gives the number of patients."""
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
