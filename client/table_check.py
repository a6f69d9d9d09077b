"""A table as its file has it, column by column, also where its loader gives up at the first thing that is wrong.

A value that stands in the file and not in the schema (a category, a site) is named only where at least `FEWEST_NAMED` patients share it.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.findings import Check, Finding, failed, passed, warned
from client.measure_units import likely_conversion
from shared.cohort import BoolArray, Cohort
from shared.config import nearest
from shared.errors import DataError, SchemaError
from shared.schema import MISSING_MARKS, OUT_OF_RANGE_TOLERANCE, Column, TableSchema, canonical, require_columns
from shared.task import Task

if TYPE_CHECKING:
    import pandas as pd

FEWEST_NAMED = 10  # patients who share what is named
MUCH_MISSING = {"impute": 0.5, "indicator": 0.95, "drop": 0.05}  # share of a column's values, by its policy


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table as text, a row a record of the file, or a row a patient where only the cohort tells it (`of_file` False)."""

    frame: "pd.DataFrame" = field(repr=False)
    schema: TableSchema
    of_file: bool
    twice: tuple[str, ...] = ()  # names that head two columns

    def text(self, column: Column) -> "pd.Series[str]":
        """The column's values as they will be read."""
        return self.frame[column.name].fillna("").astype(str).str.strip()

    def missing(self, column: Column) -> BoolArray:
        """`(rows,)`, where a value is not known."""
        return np.asarray(self.text(column).isin([*MISSING_MARKS, *column.missing_codes]), dtype=np.bool_)

    def columns(self, *, label: bool = False) -> list[Column]:
        """Those of the schema that are there."""
        wanted = [*self.schema.columns, *([self.schema.label] if label else [])]
        return [column for column in wanted if column.name in self.frame.columns]

    @property
    def patients(self) -> "pd.Series[str] | None":
        """Each row's patient, where a column names it."""
        name = self.schema.patient
        return self.frame[name].astype(str).str.strip() if name and name in self.frame.columns else None

    @property
    def sites(self) -> "pd.Series[str] | None":
        """Each row's site, where there are several."""
        name = next((name for name in (self.schema.site, "site") if name and name in self.frame.columns), None)
        if name is None or self.frame[name].nunique() < 2:
            return None
        return self.frame[name].astype(str).str.strip()

    def num_patients(self, rows: "pd.Series[bool] | BoolArray") -> int:
        """Patients behind the rows of a mask."""
        patients, mask = self.patients, np.asarray(rows, dtype=np.bool_)
        return int(mask.sum()) if patients is None else int(patients[mask].nunique())


def table_of(task: Task, path: Path | None, cohort: Cohort | None, error: Exception | None) -> TableView | None:
    """The file behind the cohort, or the cohort, as a table; None where it is none. `error` is what the loader stopped at.

    A file counts where it has a header line with a column of the schema, or where the loader itself missed its columns.
    """
    if not isinstance(task.schema, TableSchema):
        return None
    return _table_of_file(task.schema, path, error) or _table_of_cohort(task.schema, cohort)


def _table_of_file(schema: TableSchema, path: Path | None, error: Exception | None) -> TableView | None:
    """The file, where it is a CSV whose header is meant for this schema."""
    from shared.tasks.tabular import only_csv, read_csv

    if path is None:
        return None
    try:
        file = only_csv(path)
        frame = read_csv(file)
    except DataError:
        return None
    wanted = {plain_name(name) for name in schema.needed_columns}
    if wanted & {plain_name(name) for name in frame.columns} or _lacks_columns(list(frame.columns), schema, file.name, error):
        return TableView(frame=frame, schema=schema, of_file=True, twice=_named_twice(file))
    return None


def _lacks_columns(names: list[str], schema: TableSchema, source: str, error: Exception | None) -> bool:
    """True where the loader read this very table with this schema, and missed columns in it."""
    try:
        require_columns(names, schema, source=source)
    except SchemaError as found:
        return isinstance(error, SchemaError) and error.what == found.what
    return False


def _named_twice(file: Path) -> tuple[str, ...]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
    names = [name.strip() for name in next(csv.reader([first], delimiter=max(",;\t", key=first.count), skipinitialspace=True), [])]
    return tuple(sorted({name for name in names if name and names.count(name) > 1}))


def _table_of_cohort(schema: TableSchema, cohort: Cohort | None) -> TableView | None:
    """The first record of every patient, where the loader keeps its columns as attributes."""
    import pandas as pd

    if cohort is None or not cohort.num_patients or not any(column.name in cohort.attributes for column in schema.columns):
        return None
    names = [name for name in (*(column.name for column in schema.columns), "site") if name in cohort.attributes]
    return TableView(frame=pd.DataFrame({name: cohort.attributes[name].astype(str) for name in names}), schema=schema, of_file=False)


def counted(number: int, noun: str) -> str:
    """ "1 site", "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def plain_name(name: str) -> str:
    """A name without case, spaces and punctuation: "Patient ID" is "patient_id"."""
    return "".join(filter(str.isalnum, name.lower()))


# Columns -------------------------------------------------------------------------------------------------------------------------


def table_checks(table: TableView) -> list[tuple[str, Check]]:
    """What there is to ask of a table, by name."""
    return [
        ("columns", lambda: _columns(table)),
        ("numbers", lambda: _numbers(table)),
        ("categories", lambda: _categories(table)),
        ("missing", lambda: _missing(table)),
        ("constant", lambda: _constant(table)),
    ]


def _columns(table: TableView) -> Iterator[Finding]:
    """Every column is there, once."""
    if not table.of_file:
        yield passed(f"{len(table.columns())} columns, as the loader kept them")
        return
    schema, present = table.schema, list(table.frame.columns)
    wanted = [*schema.needed_columns, *([schema.site] if schema.site else [])]
    spare = [name for name in present if name not in wanted]
    absent = [name for name in wanted if name not in present]
    if set(absent) == set(wanted):
        names = ", ".join(map(repr, wanted[:8])) + (" ..." if len(wanted) > 8 else "")
        yield failed(
            f"none of the schema's {len(wanted)} columns is in the file: {names}", "check that this is the right file, and that it has a header line"
        )
        return
    for name in absent:
        near = likely_column(name, spare)
        if near is None:
            yield failed(f"column {name!r} is not in the file", "add it, or take it out of the schema")
        else:
            yield failed(f"column {name!r} is not in the file; {near!r} may be it", f"rename {near!r} to {name!r}, in the file or in the schema")
    for name in table.twice:
        yield warned(f"two columns are named {name!r}: the first is read", "keep the right one")
    nameless = 0 if table.patients is None else int(table.patients.isin(MISSING_MARKS).sum())
    if nameless:
        yield failed(f"column {schema.patient!r}: no patient's identifier in {nameless} of {len(table.frame)} rows", "fill it in")
    if not absent:
        rest = f"; {len(spare)} more in the file are no features" if spare else ""
        yield passed(f"{len(wanted)} columns of the schema are there, {len(table.frame)} rows{rest}")


def likely_column(name: str, spare: Sequence[str]) -> str | None:
    """The column of the file that may be meant: the same but for spelling, one name within the other, or near to it.

    >>> likely_column("patient_id", ["Age", "Patient ID"])
    'Patient ID'
    """
    plain = plain_name(name)
    same = [other for other in spare if plain_name(other) == plain]
    within = [other for other in spare if min(len(plain), len(plain_name(other))) >= 3 and (plain in plain_name(other) or plain_name(other) in plain)]
    near = re.search("'(.*)'", nearest(name, [other for other in spare if len(other) >= 3]))
    return next(iter([*same, *within, *([near.group(1)] if near else [])]), None)


def _numbers(table: TableView) -> Iterator[Finding]:
    """Numbers are numbers, in their unit and range."""
    numeric = [column for column in table.columns(label=True) if column.type == "number"]
    found = [finding for column in numeric for finding in _number_column(table, column)]
    yield from found
    if numeric and not found:
        yield passed(f"{len(numeric)} columns are numbers within their ranges")


def _number_column(table: TableView, column: Column) -> Iterator[Finding]:
    import pandas as pd

    assert column.low is not None and column.high is not None
    text, missing = table.text(column), table.missing(column)
    numbers = np.array(pd.to_numeric(text.where(~missing), errors="coerce"), dtype=np.float64)
    unread = ~missing & ~np.isfinite(numbers)
    if unread.any():
        yield failed(
            f"column {column.name!r}: no number in {int(unread.sum())} of {len(text)} rows{_kinds(text[unread])}",
            "correct them, or list the code that means missing under missing_codes",
        )
    known = numbers[~missing & ~unread]
    outside = (known < column.low) | (known > column.high)
    if not outside.any():
        return
    what = (
        f"column {column.name!r}: {int(outside.sum())} of {len(known)} values ({outside.mean():.1%}) are out of {_range(column)}"
        f"{_which_side(known, column)}"
    )
    other = likely_conversion(known[outside], known[~outside], low=column.low, high=column.high, unit=column.unit, name=column.name)
    fix = "check the unit, or widen the range in the schema"
    if other is not None:
        what += f"; {'they' if (~outside).any() else 'all'} look like {other.unit or 'another power of ten'}"
        fix = f"{other} to have {column.unit or 'the declared unit'}"
    if outside.sum() > max(1.0, OUT_OF_RANGE_TOLERANCE * len(known)):
        yield failed(what, fix)
    else:
        yield warned(f"{what}; they are clipped to it", fix)


def _range(column: Column) -> str:
    return f"{column.low:g} to {column.high:g}{f' {column.unit}' if column.unit else ''}"


def _which_side(known: NDArray[np.float64], column: Column) -> str:
    below, above = int((known < (column.low or 0)).sum()), int((known > (column.high or 0)).sum())
    return f", {below} below and {above} above" if below and above else ", all below" if below else ", all above"


_KINDS = (
    ("with a decimal comma", r"[-+]?\d+,\d+"),
    ("with < or >", r"[<>≤≥]=?\s*[-+]?\d.*"),
    ("a date", r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}.*"),
    ("a number with its unit", r"[-+]?\d+([.,]\d+)?\s*[^\d\s.,].*"),
    ("infinite", r"[-+]?inf(inity)?"),
)


def _kinds(text: "pd.Series[str]") -> str:
    """What unreadable numbers look like, in counts."""
    found, rest = [], text
    for words, pattern in _KINDS:
        fits = rest.str.fullmatch(pattern, flags=re.IGNORECASE)
        if fits.any():
            found.append(f"{int(fits.sum())} {words}")
            rest = rest[~fits]
    if found and len(rest):
        found.append(f"{len(rest)} other text")
    return f" ({', '.join(found)})" if found else ""


def _categories(table: TableView) -> Iterator[Finding]:
    """Every category is the schema's, and seen at more than one site."""
    coded = [column for column in table.columns(label=True) if column.type != "number"]
    found = [finding for column in coded for finding in (*_unknown_categories(table, column), *_at_one_site(table, column))]
    yield from found
    if coded and not found:
        yield passed(f"{len(coded)} columns have the schema's categories alone")


def _unknown_categories(table: TableView, column: Column) -> Iterator[Finding]:
    missing, found = table.missing(column), table.text(column).map(canonical)
    unknown = ~missing & ~found.isin([canonical(value) for value in column.values]).to_numpy()
    if not unknown.any():
        return
    values = found[unknown]
    shared = [value for value in sorted(values.unique()) if table.num_patients(unknown & (found == value).to_numpy()) >= FEWEST_NAMED]
    named = f"; shared by {FEWEST_NAMED} patients or more: {', '.join(map(repr, shared[:8]))}" if shared else ""
    by_letters = {plain_name(value): value for value in column.values}
    meant = sorted({by_letters[plain_name(value)] for value in values.unique() if plain_name(value) and plain_name(value) in by_letters})
    spelled = f"; some are {', '.join(meant)} in another spelling" if meant else ""
    yield failed(
        f"column {column.name!r}: {counted(values.nunique(), 'value')} outside the categories of the schema ({', '.join(column.values)}), in {int(unknown.sum())} of "
        f"{len(found)} rows{spelled}{named}",
        "correct the file, add the category to the schema, or list it under missing_codes",
    )


def _at_one_site(table: TableView, column: Column) -> Iterator[Finding]:
    sites = table.sites
    if sites is None:
        return
    found = table.text(column).map(canonical).where(~table.missing(column))
    alone = [value for value in column.values if sites[found == canonical(value)].nunique() == 1]
    if alone:
        parts = ", ".join(f"{value!r} ({_site_name(table, sites[found == canonical(value)].iloc[0])})" for value in alone)
        yield warned(
            f"column {column.name!r}: seen at one of {sites.nunique()} sites only: {parts}",
            "ask whether the others code it otherwise; a model takes it for the site",
        )


def _site_name(table: TableView, site: str) -> str:
    sites = table.sites
    assert sites is not None
    return f"at {site}" if table.num_patients((sites == site).to_numpy()) >= FEWEST_NAMED else "at a small site"


def _missing(table: TableView) -> Iterator[Finding]:
    """How much is not known, column by column."""
    shares = {column.name: (column, float(table.missing(column).mean())) for column in table.columns(label=True) if len(table.frame)}
    done = {"impute": "the middle of the range stands in for them", "indicator": "a column says so", "drop": "these rows are left out"}
    for name, (column, share) in shares.items():
        is_label = name == table.schema.label.name
        what = (
            f"{'label' if is_label else 'column'} {name!r}: {int(table.missing(column).sum())} of {len(table.frame)} values ({share:.1%}) not known"
        )
        if share == 1 and (is_label or column.missing != "indicator"):
            yield failed(what, "check the export, or take it out of the schema" if not is_label else "check that this is the right column")
        elif is_label and share:
            yield warned(f"{what}; these rows are left out", "ask why they have no outcome")
        elif share > MUCH_MISSING[column.missing]:
            yield warned(f"{what}; {done[column.missing]}", "ask whether it is stored elsewhere, or take it out of the schema")
    some = {name: share for name, (_, share) in shares.items() if share}
    told = ", ".join(f"{name} {share:.1%}" for name, share in sorted(some.items(), key=lambda item: -item[1]))
    yield passed(f"not known: {told}" if told else f"nothing is missing in {len(shares)} columns")


def _constant(table: TableView) -> Iterator[Finding]:
    """Columns that tell no patient from another."""
    names = []
    for column in table.columns():
        known = table.text(column)[~table.missing(column)]
        if len(known) > 1 and known.map(canonical).nunique() == 1:
            names.append(column.name)
    if names:
        yield warned(f"one value throughout: {', '.join(map(repr, names))}", "check the export; a model learns nothing from them")
    elif table.columns():
        yield passed("no column is constant")
