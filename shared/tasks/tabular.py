"""Tasks on tables: one builder for all of them, and the general one that a schema TOML file describes without a line of Python."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from shared.cohort import Cohort
from shared.config import Real, Settings, read_toml, validate
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, SchemaError
from shared.metrics import BINARY_METRICS, Metric, confusion_metrics, error_metrics
from shared.models import mlp
from shared.schema import MISSING_MARKS, Column, TableSchema, encode_table
from shared.seeding import generator
from shared.task import LoadCohort, Task

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for


MOST_LINE_BYTES = 2**24
MOST_ATTRIBUTE_LETTERS = 200  # of a text by which patients are divided
SYNTHETIC_MISSING_RATE = 0.03
SYNTHETIC_SIGNAL = 2.5  # standard deviation of the logit that the features carry
REMEDY_FOLDER = "give the file itself with --data, or a folder that holds one"


class ModelOptions(Settings):
    """The model of a tabular task: a multilayer perceptron, or logistic regression where `hidden` is empty."""

    hidden: tuple[int, ...] = Field(default=(32,), strict=False)
    dropout: Real = Field(default=0.0, ge=0, lt=1)
    normalise: bool = Field(default=False, description="LayerNorm in each hidden layer; what strategy 'fedbn' keeps at a site")


class TabularTask(TableSchema):
    """A schema file: a `TableSchema` and the model."""

    model: ModelOptions = ModelOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRule:
    """How a label of one type is modelled: outputs, loss, prediction, metrics."""

    num_outputs: int
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    predict: Callable[[torch.Tensor], torch.Tensor]
    metrics: tuple[Metric, ...]


def label_rule(label: Column) -> LabelRule:
    """Logistic loss for two categories, cross-entropy for more; for a number the quasi-likelihood of a fraction of its declared range.

    That is logistic loss with the label scaled to [0, 1] (Papke and Wooldridge 1996): it is least at the mean, as squared error is, and its
    gradient stays bounded at the learning rates that suit classification.
    """
    if label.type == "binary":
        return LabelRule(num_outputs=1, loss=logistic_loss, predict=lambda outputs: torch.sigmoid(outputs[:, 0]), metrics=BINARY_METRICS)
    if label.type == "category":
        return LabelRule(num_outputs=len(label.values), loss=_cross_entropy, predict=_softmax, metrics=confusion_metrics(len(label.values)))
    assert label.low is not None and label.high is not None
    low, span = label.low, label.high - label.low
    return LabelRule(
        num_outputs=1,
        loss=lambda outputs, labels: logistic_loss(outputs, (labels - low) / span),
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]) * span + low,
        metrics=error_metrics(label.low, label.high),
    )


def logistic_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits `(N, 1)` against 0/1 `(N,)`, for each record `(N,)`."""
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")


def _cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def _softmax(outputs: torch.Tensor) -> torch.Tensor:
    return torch.softmax(outputs, dim=1)


def table_task(schema: TableSchema, *, load_cohort: LoadCohort, model: ModelOptions, **about: object) -> Task:
    """A task on tables of this schema. `about` sets further fields of `Task` (title, source, sites, bundled, default_study)."""
    rule = label_rule(schema.label)
    num_features = len(schema.feature_names)
    fields: dict[str, object] = {"title": schema.title or schema.name, "primary_metric": rule.metrics[0].name, **about}
    return Task(
        name=schema.name,
        modality="tabular",
        schema=schema,
        load_cohort=load_cohort,
        synthetic_cohort=lambda num_patients, seed: synthetic_cohort(schema, num_patients, seed),
        model=lambda: mlp(num_features, rule.num_outputs, hidden=model.hidden, dropout=model.dropout, normalise=model.normalise),
        loss=rule.loss,
        predict=rule.predict,
        metrics=rule.metrics,
        subgroups=schema.subgroups,
        **fields,  # type: ignore[arg-type]  # Task's own constructor checks the names
    )


def load_tabular_task(path: Path) -> Task:
    """The task that a schema TOML file describes.

    Raises:
        ConfigurationError: the file is missing or does not fit; it names the key.
    """
    table = validate(TabularTask, read_toml(path), str(path))
    schema = TableSchema.model_validate(table.model_dump(exclude={"model"}))
    return table_task(
        schema, load_cohort=lambda data, options: load_table(data, schema, options), model=table.model, source=f"schema file {path.name}"
    )


def load_table(path: Path | None, schema: TableSchema, options: Mapping[str, object]) -> Cohort:
    """The cohort in a CSV file (or in the one CSV file of a folder). No options.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `read_csv` and `encode_table`.
    """
    reject_options(options, schema.name)
    if path is None:
        raise DataMissingError(f"task {schema.name} has no data of its own", "give your file with --data")
    file = only_csv(path)
    return cohort_from_frame(read_csv(file), schema, source=file.name)


def reject_options(options: Mapping[str, object], task: str) -> None:
    """Raise `ConfigurationError` where a loader without options is given some."""
    if options:
        raise ConfigurationError(f"task {task}: its loader has no option {sorted(options)[0]!r}", "remove it")


def only_csv(path: Path) -> Path:
    """`path`, or the only CSV file in the folder `path`.

    Raises:
        DataMissingError: there is none, or more than one.
        DataAccessError: the folder may not be read.
    """
    files = csv_files(path)
    if len(files) != 1:
        raise DataMissingError(f"{path}: expected one CSV file, found {len(files)}", REMEDY_FOLDER)
    return files[0]


def csv_files(path: Path) -> list[Path]:
    """`path`, or the CSV files in the folder `path`.

    Raises:
        DataMissingError: there is no such file or folder.
        DataAccessError: the folder may not be read.
    """
    if not path.exists():
        raise DataMissingError(f"{path}: expected data, found nothing", "check the path given with --data")
    if path.is_file():
        return [path]
    if not path.is_dir():  # a device or a pipe, which may have no end
        raise DataMissingError(f"{path}: expected a file or a folder, found something else", "save it as a file")
    try:
        return sorted(file for file in path.iterdir() if file.suffix.lower() == ".csv")
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read the folder", "change its permissions") from None


def read_csv(path: Path, *, names: list[str] | None = None) -> "pd.DataFrame":
    """A CSV file as text columns, empty where a field is empty. Commas, tabs, or semicolons (then decimal commas too), as in the first line.

    Args:
        names: the columns of a file without a header line.

    Raises:
        DataMissingError: no such file, or an empty one.
        DataAccessError: it may not be read.
        SchemaError: it is not UTF-8 text or not a regular CSV, or a line is longer than 16 MiB.
    """
    with _csv_errors(path):
        return _read_separated(path, names)


def csv_columns(path: Path) -> list[str]:
    """The names in the first line of a CSV file. Errors as of `read_csv`."""
    import pandas as pd

    with _csv_errors(path):
        _count_lines(path)
        return [str(name) for name in pd.read_csv(path, nrows=0, **_as_text(_separator(path))).columns]


def csv_parts(path: Path, *, part_bytes: int) -> "Iterator[pd.DataFrame]":
    """As `read_csv`, in parts of about so many bytes of the file; their index goes on from part to part. Errors as of `read_csv`, as they are come to."""
    import pandas as pd

    with _csv_errors(path):
        num_lines = _count_lines(path)
        num_rows = max(1, part_bytes * num_lines // max(1, path.stat().st_size))
        separator = _separator(path)
        reader = pd.read_csv(path, chunksize=num_rows, **_as_text(separator))
    with reader:
        while True:
            with _csv_errors(path):
                part = next(reader, None)
            if part is None:
                return
            yield _with_points(part, separator)


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    """What goes wrong in reading a CSV file, in our own words."""
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            yield
    except FileNotFoundError:
        raise DataMissingError(f"{path}: expected a CSV file, found none", "check the path given with --data") from None
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read it", "change its permissions") from None
    except pd.errors.EmptyDataError:
        raise DataMissingError(f"{path}: expected a CSV file with rows, got an empty file", "check the export") from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: expected UTF-8 text, got other bytes", "save it as UTF-8 CSV") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        raise SchemaError(f"{path}: expected the same number of fields in every line, got a line with more", "check separators and quotes") from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({type(error).__name__})", "check the file system") from None


def _read_separated(path: Path, names: list[str] | None) -> "pd.DataFrame":
    import pandas as pd

    _count_lines(path)
    separator = _separator(path)
    frame = pd.read_csv(path, names=names, header=None if names else 0, **_as_text(separator))
    return _with_points(frame, separator)


def _count_lines(path: Path) -> int:
    """How many lines there are.

    Raises:
        SchemaError: one is longer than 16 MiB, which would be held whole.
    """
    number = 0
    with open(path, "rb") as lines:
        while line := lines.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise SchemaError(
                    f"{path}: expected lines of at most {MOST_LINE_BYTES // 2**20} MiB, got a longer one", "check that it is a CSV file"
                )
    return number


def _separator(path: Path) -> str:
    with open(path, encoding="utf-8-sig") as file:
        return max(",;\t", key=file.readline().count)


def _as_text(separator: str) -> dict[str, Any]:
    """How pandas is to read: everything as text, and no guesses."""
    return {
        "dtype": str,
        "keep_default_na": False,
        "index_col": False,  # else a field too many in every line shifts all columns, in silence
        "sep": separator,
        "skipinitialspace": True,
        "encoding": "utf-8-sig",
        "compression": None,  # by its ending a file would be unpacked, however large it becomes
    }


def _with_points(frame: "pd.DataFrame", separator: str) -> "pd.DataFrame":
    """Decimal commas as points, in a file with semicolons."""
    return frame.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True) if separator == ";" else frame


def cohort_from_frame(frame: "pd.DataFrame", schema: TableSchema, *, source: str, synthetic: bool = False) -> Cohort:
    """The cohort of a table; rows of one patient are its records, and every other column is an attribute by which to partition."""
    import pandas as pd

    encoded = encode_table(frame, schema, source=source)
    kept = frame[encoded.kept].reset_index(drop=True)
    ids = kept[schema.patient].astype(str).str.strip() if schema.patient else pd.Series(row_identifiers(kept))
    nameless = ids.isin(MISSING_MARKS)
    if schema.patient and nameless.any():
        raise SchemaError(
            f"{source}: column {schema.patient!r}: expected a patient's identifier in every row, got none in {int(nameless.sum())} rows",
            "fill it in",
        )
    patient_of_record, patients = pd.factorize(ids)
    first = pd.Series(patient_of_record).drop_duplicates().index.to_numpy()
    attributes = {name: attribute_texts(kept[name])[first] for name in kept.columns if name not in (schema.patient, schema.label.name)}
    if schema.site:
        if schema.site not in attributes:
            raise SchemaError(f"{source}: expected column {schema.site!r}, which names the site, not found", "rename or add it in the file")
        attributes["site"] = attributes[schema.site]
    return Cohort(
        inputs=(encoded.features,),
        labels=encoded.labels,
        patient_of_record=patient_of_record.astype(np.int64),
        patient_ids=tuple(str(name) for name in patients),
        attributes=attributes,
        notes=encoded.notes,
        synthetic=synthetic,
    )


def attribute_texts(values: "pd.Series[str]") -> NDArray[np.str_]:
    """`(N,)`: each cut to `MOST_ATTRIBUTE_LETTERS`, for an array gives every text the room of the longest: one long remark of one patient would fill memory."""
    return values.astype(str).str.slice(0, MOST_ATTRIBUTE_LETTERS).to_numpy(dtype=np.str_)


def require_once(present: Sequence[str], schema: TableSchema, *, source: str) -> None:
    """Raise `SchemaError` where a column of the schema stands twice in a file: pandas calls the second one `name.1`."""
    for name in schema.needed_columns:
        if any(re.fullmatch(rf"{re.escape(name)}\.\d+", other) for other in present if other not in schema.needed_columns):
            raise SchemaError(f"{source}: expected one column {name!r}, found two", "rename or remove one in the file")


def row_identifiers(frame: "pd.DataFrame") -> list[str]:
    """An identifier for each row from its content, so that renaming a file or adding rows makes nobody a new patient."""
    digests = [hashlib.blake2b("\x1f".join(row).encode(), digest_size=16).hexdigest() for row in frame.astype(str).itertuples(index=False)]
    seen: dict[str, int] = {}
    identifiers = []
    for digest in digests:
        seen[digest] = seen.get(digest, 0) + 1
        identifiers.append(f"{digest}-{seen[digest]}")
    return identifiers


def synthetic_cohort(schema: TableSchema, num_patients: int, seed: int) -> Cohort:
    """Synthetic patients of the schema: independent columns, a label that depends on them, three per cent of values missing.

    They pass through the same encoding as real ones. The dependence is a linear score, drawn once for the schema's name.
    """
    import pandas as pd

    rng = generator(seed, "synthetic", schema.name)
    frame = pd.DataFrame({column.name: _synthetic_column(column, num_patients, rng) for column in schema.columns})
    if schema.patient:
        frame[schema.patient] = [f"synthetic-{index}" for index in range(num_patients)]
    if schema.site:
        frame[schema.site] = rng.choice(["synthetic-1", "synthetic-2", "synthetic-3", "synthetic-4"], size=num_patients)
    frame[schema.label.name] = _synthetic_label(schema.label, _synthetic_score(frame, schema), rng)
    for column in schema.columns:
        if column.missing != "drop":
            frame.loc[rng.random(num_patients) < SYNTHETIC_MISSING_RATE, column.name] = ""
    return cohort_from_frame(frame, schema, source="synthetic", synthetic=True)


def _synthetic_column(column: Column, count: int, rng: np.random.Generator) -> NDArray[np.str_]:
    if column.type != "number":
        values = np.array([value for value in column.values if value not in column.missing_codes])
        return np.asarray(rng.choice(values, size=count))
    assert column.low is not None and column.high is not None
    scaled = np.clip(rng.normal(0.0, 0.35, size=count), -1, 1) / 2 + 0.5
    low, high = (np.log(column.low), np.log(column.high)) if column.scale == "log" else (column.low, column.high)
    values = low + scaled * (high - low)
    values = np.exp(values) if column.scale == "log" else values
    return np.asarray([repr(value) for value in np.clip(values, column.low, column.high).tolist()])


def _synthetic_score(frame: "pd.DataFrame", schema: TableSchema) -> NDArray[np.float64]:
    labelled = frame.assign(**{schema.label.name: schema.label.values[0] if schema.label.type != "number" else str(schema.label.low)})
    features = encode_table(labelled, schema, source="synthetic").features.astype(np.float64)
    weights = generator(0, "truth", schema.name).normal(size=features.shape[1])
    score = (features - features.mean(axis=0)) @ weights
    return np.asarray(score / max(float(score.std()), 1e-9) * SYNTHETIC_SIGNAL)


def _synthetic_label(label: Column, score: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.str_]:
    noisy = score + rng.logistic(size=len(score))
    if label.type == "number":
        assert label.low is not None and label.high is not None
        return np.asarray([repr(value) for value in (label.low + (label.high - label.low) / (1 + np.exp(-noisy / 2))).tolist()])
    edges = np.quantile(noisy, np.linspace(0, 1, len(label.values) + 1)[1:-1])
    return np.asarray(label.values)[np.searchsorted(edges, noisy)]
