"""What a table must look like, and how it becomes features: public ranges in, the same arithmetic at every site.

Scaling uses the declared ranges alone; nothing is estimated from a site's patients, so nothing about them leaves with the features.

Legend: N rows, F features.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.config import Real, Settings, nearest
from shared.errors import DataMissingError, SchemaError
from shared.study import NAME_PATTERN
from shared.subgroups import Subgroup

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for


MISSING_MARKS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", ".")
MOST_NUMBER_LETTERS = 64  # of a cell; a longer one is no number, and no parser is given it
OUT_OF_RANGE_TOLERANCE = 0.05  # share of a column's values that may be clipped before the column is refused


class Column(Settings):
    """One column: its type, unit, public plausible range or categories, and what to do where a value is missing."""

    name: str = Field(min_length=1)
    type: Literal["number", "binary", "category"]
    unit: str = ""
    low: Real | None = Field(default=None, description="of 'number': least plausible value, known without looking at the data")
    high: Real | None = Field(default=None, description="of 'number': largest plausible value")
    scale: Literal["linear", "log"] = Field(default="linear", description="of 'number': how the range is scaled to [-1, 1]")
    categories: tuple[str, ...] = Field(default=(), strict=False, description="of 'category' and 'binary' (two; the second counts 1)")
    missing: Literal["drop", "impute", "indicator"] = Field(
        default="impute", description="drop the row, take the middle of the range, or that and a column that says so"
    )
    missing_codes: tuple[str, ...] = Field(default=(), strict=False, description="values that mean 'not measured', e.g. '-1'")

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type == "number":
            if self.low is None or self.high is None:
                raise ValueError(
                    f"column {self.name!r}: expected low and high, the plausible range known without looking at the data, got none; fill them in"
                )
            if not self.low < self.high:
                raise ValueError(f"column {self.name!r}: expected low < high, got {self.low} and {self.high}")
            if self.scale == "log" and self.low <= 0:
                raise ValueError(f"column {self.name!r}: expected low > 0 for scale 'log', got {self.low}")
            if self.categories:
                raise ValueError(f"column {self.name!r}: a number has no categories; remove them or set type = 'category'")
        elif self.type == "binary" and len(self.categories) not in (0, 2):
            raise ValueError(f"column {self.name!r}: expected two categories, got {len(self.categories)}")
        elif self.type == "category" and len(self.categories) < 2:
            raise ValueError(f"column {self.name!r}: expected at least two categories, got {len(self.categories)}")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError(f"column {self.name!r}: expected distinct categories, got one twice")
        return self

    @property
    def values(self) -> tuple[str, ...]:
        """The categories, '0' and '1' where a binary column names none."""
        return self.categories or ("0", "1")

    @property
    def feature_names(self) -> list[str]:
        """Names of the features that this column becomes."""
        names = [f"{self.name}={value}" for value in self.categories] if self.type == "category" else [self.name]
        return [*names, f"{self.name} missing"] if self.missing == "indicator" else names


class TableSchema(Settings):
    """A table of records: features, the label, and which columns name patient and site."""

    name: str = Field(pattern=NAME_PATTERN)
    title: str = ""
    label: Column
    patient: str | None = Field(default=None, description="column with the patient's identifier; omitted: every row is a patient")
    site: str | None = Field(default=None, description="column that names the hospital, for partition = 'natural'")
    columns: tuple[Column, ...] = Field(min_length=1, strict=False)
    subgroups: tuple[Subgroup, ...] = Field(
        default=(), strict=False, description="columns, also such that are no feature, by which reports tell patients apart"
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [column.name for column in self.columns] + [self.label.name]
        names += [name for name in (self.patient, self.site) if name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected every column once, got {twice[0]!r} twice")
        return self

    @property
    def feature_names(self) -> list[str]:
        """F names, in the order of the model's input."""
        return [name for column in self.columns for name in column.feature_names]

    @property
    def needed_columns(self) -> list[str]:
        """Every column a data file must have."""
        return [column.name for column in self.columns] + [self.label.name] + [name for name in (self.patient,) if name]


class TensorSchema(Settings):
    """A model input that is a tensor: its shape without the record axis, type, unit and plausible range."""

    name: str
    shape: tuple[int, ...] = Field(strict=False)
    dtype: str = "float32"
    unit: str = ""
    low: Real
    high: Real


Schema = TableSchema | tuple[TensorSchema, ...]


def schema_fingerprint(schema: Schema) -> str:
    """SHA-256 (hex) of the schema's canonical JSON."""
    table = schema.model_dump(mode="json") if isinstance(schema, TableSchema) else [part.model_dump(mode="json") for part in schema]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTable:
    """Features `(N', F)` float32 and labels `(N',)` of the rows kept, `kept` `(N,)`, and what was done in counts."""

    features: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.generic] = field(repr=False)
    kept: NDArray[np.bool_] = field(repr=False)
    notes: dict[str, int]


def encode_table(frame: "pd.DataFrame", schema: TableSchema, *, source: str) -> EncodedTable:
    """The table as features and labels by the schema's rules. Rows without a label are dropped.

    Args:
        frame: text as read, one column per column of the file; missing values as in `MISSING_MARKS`.
        source: the file's name, for messages.

    Raises:
        SchemaError: a column is missing, in text where numbers are declared, all missing, or mostly out of its range.
        DataMissingError: no row is left.
    """
    require_columns(list(frame.columns), schema, source=source)
    if len(frame) == 0:
        raise DataMissingError(f"{source}: expected at least one row, got none", "check that this is the right file")
    encoded = [encode_column(frame[column.name], column, source=source) for column in schema.columns]
    labels, label_missing = encode_label(frame[schema.label.name], schema.label, source=source)
    dropped = label_missing.copy()
    for column, part in zip(schema.columns, encoded, strict=True):
        if column.missing == "drop":
            dropped |= part.missing
    kept = ~dropped
    if not kept.any():
        raise DataMissingError(
            f"{source}: no record is left of {len(frame)}: each lacks the label or a column with missing = 'drop'", "check the columns"
        )
    notes = {
        "records_dropped": int(dropped.sum()),
        "values_imputed": int(sum(part.missing[kept].sum() for part in encoded)),
        "values_clipped": sum(part.num_clipped for part in encoded),
    }
    features = np.concatenate([part.features for part in encoded], axis=1)[kept].astype(np.float32)
    return EncodedTable(features=features, labels=labels[kept], kept=kept, notes=notes)


def require_columns(present: Sequence[str], schema: TableSchema, *, source: str) -> None:
    """Every needed column is there.

    Raises:
        SchemaError: some are not; likely renamings are proposed.
    """
    absent = [name for name in schema.needed_columns if name not in present]
    if absent:
        spare = [name for name in present if name not in schema.needed_columns]
        hints = ", ".join(f"{name!r}{_likely(name, spare)}" for name in absent)
        raise SchemaError(f"{source}: expected {'column' if len(absent) == 1 else 'columns'} {hints}, not found", "rename or add it in the file")


def _likely(name: str, spare: list[str]) -> str:
    plain = {"".join(filter(str.isalnum, other.lower())): other for other in spare}
    same = plain.get("".join(filter(str.isalnum, name.lower())))
    return f" (did you mean {same!r}?)" if same else nearest(name, spare)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedColumn:
    """One column's features `(N, f)`, where it was missing `(N,)`, and how many values were clipped to the range."""

    features: NDArray[np.float64] = field(repr=False)
    missing: NDArray[np.bool_] = field(repr=False)
    num_clipped: int


def encode_column(values: "pd.Series[str]", column: Column, *, source: str) -> EncodedColumn:
    """A column as features: numbers scaled from [low, high] to [-1, 1], two categories to 0 and 1, more to one-hot.

    Raises:
        SchemaError: see `encode_table`.
    """
    encoded = encode_values(values, column, source=source)
    _refuse_all_missing(encoded.missing, column, source)
    _refuse_out_of_range(encoded.num_clipped, encoded.missing, column, source)
    return encoded


def encode_rows(frame: "pd.DataFrame", schema: TableSchema, *, source: str) -> tuple[NDArray[np.float32], int]:
    """The features `(N, f)` of rows taken one by one, without a label, and how many values were imputed. What makes a column doubtful as a whole is not looked at, for
    these may be few rows of many; whoever asks has looked at each value.

    Raises:
        SchemaError: a value is no number, or another category.
    """
    encoded = [encode_values(frame[column.name], column, source=source) for column in schema.columns]
    features = np.concatenate([part.features for part in encoded], axis=1).astype(np.float32)
    return features, int(sum(part.missing.sum() for part in encoded))


def encode_values(values: "pd.Series[str]", column: Column, *, source: str) -> EncodedColumn:
    """As `encode_column`, however many values are missing or clipped.

    Raises:
        SchemaError: a value is no number, or another category.
    """
    text = values.fillna("").astype(str).str.strip()
    missing = text.isin([*MISSING_MARKS, *column.missing_codes]).to_numpy()
    if column.type == "number":
        features, num_clipped = _encode_numbers(text, missing, column, source)
    else:
        features, num_clipped = _encode_categories(text, missing, column, source), 0
    if column.missing == "indicator":
        features = np.concatenate([features, missing[:, None].astype(np.float64)], axis=1)
    return EncodedColumn(features=features, missing=missing, num_clipped=num_clipped)


def _refuse_all_missing(missing: NDArray[np.bool_], column: Column, source: str) -> None:
    if missing.all() and column.missing != "indicator":
        raise SchemaError(
            f"{source}: column {column.name!r}: all {len(missing)} values are missing",
            "remove the column from the schema, or set missing = 'indicator'",
        )


def _encode_numbers(text: "pd.Series[str]", missing: NDArray[np.bool_], column: Column, source: str) -> tuple[NDArray[np.float64], int]:
    assert column.low is not None and column.high is not None
    low, high = column.low, column.high
    numbers = numbers_in(text, missing, name=column.name, source=source)
    outside = ~missing & ((numbers < low) | (numbers > high))
    clipped = np.clip(np.where(missing, low, numbers), low, high)
    if column.scale == "log":
        low, high, clipped = float(np.log(low)), float(np.log(high)), np.log(clipped)
    scaled = 2 * (clipped - low) / (high - low) - 1
    scaled[missing] = 0.0
    return scaled[:, None], int(outside.sum())


def numbers_in(text: "pd.Series[str]", missing: NDArray[np.bool_], *, name: str, source: str) -> NDArray[np.float64]:
    """The column as numbers `(N,)`, NaN where missing.

    Raises:
        SchemaError: some value that is not missing is not a finite number.
    """
    import pandas as pd

    short = ~missing & (text.str.len() <= MOST_NUMBER_LETTERS).to_numpy()
    numbers = np.array(pd.to_numeric(text.where(short), errors="coerce"), dtype=np.float64)
    bad = ~missing & ~np.isfinite(numbers)
    if bad.any():
        raise SchemaError(
            f"{source}: column {name!r}: expected numbers, got text or infinity in {int(bad.sum())} of {len(text)} rows",
            "correct the values, or list the code that means missing under missing_codes",
        )
    return numbers


def _refuse_out_of_range(num_outside: int, missing: NDArray[np.bool_], column: Column, source: str) -> None:
    present = int((~missing).sum())
    if num_outside > max(1.0, OUT_OF_RANGE_TOLERANCE * present):
        unit = f" {column.unit}" if column.unit else ""
        raise SchemaError(
            f"{source}: column {column.name!r}: expected values from {column.low:g} to {column.high:g}{unit}, got {num_outside} of {present} outside",
            "check the unit, or widen the range in the schema",
        )


def _encode_categories(text: "pd.Series[str]", missing: NDArray[np.bool_], column: Column, source: str) -> NDArray[np.float64]:
    index = category_index(text, missing, column, source=source)
    if column.type == "binary":
        return np.where(missing, 0.5, index)[:, None].astype(np.float64)
    one_hot = np.zeros((len(text), len(column.values)))
    one_hot[np.flatnonzero(~missing), index[~missing]] = 1.0
    return one_hot


def category_index(text: "pd.Series[str]", missing: NDArray[np.bool_], column: Column, *, source: str) -> NDArray[np.int64]:
    """`(N,)` index of each value among the column's categories; 0 where missing. Numbers match whatever their spelling (1, 1.0).

    Raises:
        SchemaError: a value is not among the categories.
    """
    lookup = {canonical(value): index for index, value in enumerate(column.values)}
    values = text.to_list()
    index_of = {value: lookup.get(canonical(value), -1) for value in set(values)}  # each spelling once, however many rows have it
    found = np.fromiter((index_of[value] for value in values), dtype=np.int64, count=len(values))
    unknown = ~missing & (found < 0)
    if unknown.any():
        raise SchemaError(
            f"{source}: column {column.name!r}: expected one of {', '.join(column.values)}, got another value in {int(unknown.sum())} rows",
            "add the category to the schema, or correct the file",
        )
    return np.where(missing, 0, found)


def canonical(value: str) -> str:
    """One spelling for a category: '1.0' and ' 1' are '1'."""
    stripped = value.strip()
    try:
        number = float(stripped)
    except ValueError:
        return stripped
    return str(int(number)) if np.isfinite(number) and number == int(number) else stripped


def encode_label(values: "pd.Series[str]", label: Column, *, source: str) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Labels `(N,)` (float32 0/1, int64 class, or float32 number in its unit) and where they are missing `(N,)`."""
    text = values.fillna("").astype(str).str.strip()
    missing = text.isin([*MISSING_MARKS, *label.missing_codes]).to_numpy()
    if missing.all():
        raise SchemaError(f"{source}: label {label.name!r}: all {len(text)} values are missing", "check that this is the right column")
    if label.type == "number":
        numbers = numbers_in(text, missing, name=label.name, source=source)
        num_outside = int((~missing & ((numbers < (label.low or 0)) | (numbers > (label.high or 0)))).sum())
        _refuse_out_of_range(num_outside, missing, label, source)
        return np.clip(np.nan_to_num(numbers), label.low, label.high).astype(np.float32), missing
    index = category_index(text, missing, label, source=source)
    return (index.astype(np.float32) if label.type == "binary" else index), missing
