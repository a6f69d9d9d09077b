"""`wardround data profile`: a cohort counted in public bins, and the aggregate of it that may be discussed outside.

Every variable (column, channel, site) divides the patients into cells that were declared before anybody looked: bins of the schema's range,
its categories, "not known". A patient counts once, by the first record. The aggregate is what is left of these counts after suppression
(Hundepool et al. 2012, "Statistical Disclosure Control", chapter 4): small cells are hidden, and then further ones, until what is hidden in a table
with a known total is at least two cells that hold at least the minimum together. `aggregate` states what follows from it.

Legend: P patients, J cells of a variable, K classes of the label.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.data_check import classes_of
from shared.cohort import BoolArray, Cohort
from shared.schema import MISSING_MARKS, Column, TableSchema, TensorSchema, canonical
from shared.task import Task

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
NUM_BINS = 10
ROUNDED_TO = 5
MOST_CHANNELS = 160
NOT_KNOWN = "not known"
TIME = "time"  # how the modality of a task on steps x variables begins
LABEL, SITE = "label", "site"

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A division of the patients into cells.

    Attributes:
        cells: names, J of them.
        of_patient: `(P,)`, index into `cells`.
        edges: where the cells are bins of a number, J or J + 1 (then the last cell is "not known") ends of them.
        num_outside: patients whose value is out of the range; they are counted in the nearest bin.
        declared: the cells' names are public; else they come from the data, as a site's name may.
    """

    name: str
    unit: str = ""
    cells: tuple[str, ...]
    of_patient: NDArray[np.int64] = field(repr=False)
    edges: tuple[float, ...] = ()
    num_outside: int = 0
    declared: bool = True

    @property
    def counts(self) -> Counts:
        """Patients of each cell, `(J,)`."""
        return np.bincount(self.of_patient, minlength=len(self.cells))

    def by(self, other: "Variable") -> Counts:
        """Patients of each cell and each cell of `other`, `(J, K)`."""
        table = np.zeros((len(self.cells), len(other.cells)), dtype=np.int64)
        np.add.at(table, (self.of_patient, other.of_patient), 1)
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A cohort in counts. `label` is None where no single class is predicted, `site` where there is one site."""

    task: str
    synthetic: bool
    num_patients: int
    num_records: int
    variables: tuple[Variable, ...]
    label: Variable | None
    site: Variable | None


def profile_of(task: Task, cohort: Cohort) -> Profile:
    """The cohort counted in public bins."""
    schema = task.schema
    classes = classes_of(cohort, schema.label if isinstance(schema, TableSchema) else None)
    label = None if classes is None else Variable(name=LABEL, cells=classes[0], of_patient=classes[1])
    variables = _of_table(schema, cohort) if isinstance(schema, TableSchema) else _of_tensors(schema, cohort, last=task.modality.startswith(TIME))
    if label is None:
        variables += _of_labels(schema.label if isinstance(schema, TableSchema) else None, cohort)
    return Profile(
        task=task.name, synthetic=cohort.synthetic, num_patients=cohort.num_patients, num_records=cohort.num_records, variables=tuple(variables),
        label=label, site=_sites(task, cohort),
    )  # fmt: skip


def _sites(task: Task, cohort: Cohort) -> Variable | None:
    if "site" not in cohort.attributes:
        return None
    found, index = np.unique(cohort.attributes["site"], return_inverse=True)
    if len(found) < 2:
        return None
    if set(found.tolist()) <= set(task.sites):
        place = np.array([task.sites.index(name) for name in found.tolist()])
        return Variable(name=SITE, cells=task.sites, of_patient=place[index].astype(np.int64))
    return Variable(name=SITE, cells=tuple(found.tolist()), of_patient=index.astype(np.int64), declared=False)


# Variables -----------------------------------------------------------------------------------------------------------------------


def _of_table(schema: TableSchema, cohort: Cohort) -> list[Variable]:
    """A variable a column, from the text that the loader kept; without it, a variable a feature."""
    import pandas as pd

    kept = [column for column in schema.columns if column.name in cohort.attributes and column.name != schema.site]
    if kept:
        return [_of_column(column, pd.Series(cohort.attributes[column.name]).astype(str).str.strip()) for column in kept]
    part = TensorSchema(name="features", shape=(len(schema.feature_names),), low=-1, high=1)
    return _channels(part, cohort.inputs[0][_first_records(cohort)], names=schema.feature_names)


def _of_column(column: Column, text: "pd.Series[str]") -> Variable:
    import pandas as pd

    missing = text.isin([*MISSING_MARKS, *column.missing_codes]).to_numpy()
    if column.type == "number":
        assert column.low is not None and column.high is not None
        numbers = np.array(pd.to_numeric(text.where(~missing), errors="coerce"), dtype=np.float64)
        return _binned(column.name, numbers, column.low, column.high, unit=column.unit, log=column.scale == "log")
    index = {canonical(value): place for place, value in enumerate(column.values)}
    place = np.asarray(text.map(canonical).map(index).where(~missing).fillna(len(column.values)), dtype=np.int64)
    return Variable(name=column.name, unit=column.unit, cells=(*column.values, NOT_KNOWN), of_patient=place)


def _binned(name: str, numbers: NDArray[np.float64], low: float, high: float, *, unit: str = "", log: bool = False) -> Variable:
    """Numbers `(P,)` in `NUM_BINS` bins of the declared range, equally wide on its scale; what is out of it in the nearest, NaN as not known."""
    edges = np.geomspace(low, high, NUM_BINS + 1) if log else np.linspace(low, high, NUM_BINS + 1)
    known = np.isfinite(numbers)
    place = np.full(len(numbers), NUM_BINS, dtype=np.int64)
    place[known] = np.searchsorted(edges[1:-1], numbers[known], side="right")
    cells = (*(f"{start:.4g} to {end:.4g}" for start, end in itertools.pairwise(edges)), NOT_KNOWN)
    outside = int(((numbers < low) | (numbers > high))[known].sum())
    return Variable(name=name, unit=unit, cells=cells, of_patient=place, edges=tuple(edges.tolist()), num_outside=outside)


def _of_tensors(schema: Sequence[TensorSchema], cohort: Cohort, *, last: bool) -> list[Variable]:
    first = _first_records(cohort)
    return [variable for values, part in zip(cohort.inputs, schema, strict=True) for variable in _channels(part, values[first], last=last)]


def _first_records(cohort: Cohort) -> NDArray[np.int64]:
    """`(P,)`, each patient's first record."""
    _, first = np.unique(cohort.patient_of_record, return_index=True)
    return first.astype(np.int64)


def _channels(part: TensorSchema, values: NDArray[np.generic], *, names: Sequence[str] = (), last: bool = True) -> list[Variable]:
    """A variable a channel: the mean of its values, in bins of the declared range.

    Args:
        values: `(P, ...)`.
        names: of the channels; else the schema's unit, where it lists as many.
        last: the last axis is that of the channels, not the shortest.
    """
    numbers = values.astype(np.float64).reshape(len(values), *(values.shape[1:] or (1,)))
    axis = numbers.ndim - 1 if last else int(np.argmin(numbers.shape[1:])) + 1
    if numbers.shape[axis] > MOST_CHANNELS:
        return [_binned(f"{part.name}, mean", _means(numbers.reshape(len(numbers), -1)), part.low, part.high, unit=part.unit)]
    parts = np.moveaxis(numbers, axis, 1).reshape(len(numbers), numbers.shape[axis], -1)
    names, unit = (names, part.unit) if names else _listed(part.unit, parts.shape[1])
    titles = names or ([part.name] if parts.shape[1] == 1 else [f"{part.name} {index + 1}" for index in range(parts.shape[1])])
    mean = ", mean" if parts.shape[2] > 1 else ""
    return [_binned(f"{title}{mean}", _means(parts[:, index]), part.low, part.high, unit=unit) for index, title in enumerate(titles)]


def _listed(unit: str, count: int) -> tuple[Sequence[str], str]:
    """The names that a schema's unit lists for so many channels, and what is left of the unit."""
    names = [name.strip() for name in unit.split(",")]
    return (names, "") if len(set(names)) == count > 1 else ((), unit)


def _means(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(P,)`: of the finite values of each row `(P, ...)`, NaN where there is none."""
    finite = np.isfinite(rows)
    number = finite.sum(axis=1)
    return np.where(number > 0, np.where(finite, rows, 0).sum(axis=1) / np.maximum(number, 1), np.nan)


def _of_labels(label: Column | None, cohort: Cohort) -> list[Variable]:
    """What is predicted, where it is a number, several findings at once, or a map."""
    values = np.asarray(cohort.label_of_patient(), dtype=np.float64)
    if label is not None and label.low is not None and label.high is not None:
        return [_binned(f"label: {label.name}", values, label.low, label.high, unit=label.unit, log=label.scale == "log")]
    if values.ndim == 2 and values.shape[1] <= MOST_CHANNELS:
        return [_yes_or_no(f"label {index + 1}", column) for index, column in enumerate(values.T)]
    if values.ndim > 2:
        return [_yes_or_no("label: anything marked", np.asarray((np.nan_to_num(values) > 0).reshape(len(values), -1).any(axis=1), dtype=np.float64))]
    return []


def _yes_or_no(name: str, values: NDArray[np.float64]) -> Variable:
    """Values `(P,)` above 0, 0, and neither (NaN or negative)."""
    place = np.where(np.isnan(values) | (values < 0), 2, np.where(values > 0, 1, 0))
    return Variable(name=name, cells=("no", "yes", NOT_KNOWN), of_patient=place.astype(np.int64))


# The aggregate -------------------------------------------------------------------------------------------------------------------


def rounded(counts: Counts) -> Counts:
    """The nearest multiples of `ROUNDED_TO`."""
    return (counts + ROUNDED_TO // 2) // ROUNDED_TO * ROUNDED_TO


def _enough(counts: Counts, min_cell: int) -> BoolArray:
    """True where a count may be told: neither it nor what is printed for it is below the minimum."""
    return np.asarray((counts >= min_cell) & (rounded(counts) >= min_cell), dtype=np.bool_)


def shown_cells(counts: Counts, min_cell: int) -> BoolArray:
    """`(J,)`, the cells of a table with a known total that may be told.

    Those hidden are none, or at least two that hold at least `min_cell` together: the smallest of the others follow the small ones. A cell of
    nobody is small, for "nobody" tells about everybody.

    >>> shown_cells(np.array([50, 3, 20, 40]), 10).tolist()
    [True, False, False, True]
    """
    return shown_rows(counts[:, None], _enough(counts, min_cell), min_cell)


def shown_rows(table: Counts, shown: BoolArray, min_cell: int) -> BoolArray:
    """`(J,)`, the rows of a table `(J, K)` with known column totals that may be told in full, of those in `shown`.

    The rows hidden are none, or hold at least `min_cell` together in every column; so they are at least two, for one that does is not small.
    """
    shown = shown & _enough(table, min_cell).all(axis=1)
    while shown.any() and not shown.all() and not _enough(table[~shown].sum(axis=0), min_cell).all():
        candidates = np.flatnonzero(shown)
        shown[candidates[np.argmin(table[candidates].sum(axis=1))]] = False
    return shown


def aggregate(profile: Profile, *, min_cell: int) -> dict[str, object]:
    """The suppressed aggregate, as JSON.

    From all that it says, and from the exact number of patients and the exact counts behind every rounded one, nobody can tell of any cell that
    it holds fewer than `min_cell` patients: for each hidden cell there are patients, in agreement with all that is told, of whom it holds at
    least as many. For the tables told are the label's, every variable's, and every variable by label. Where one variable's cells are hidden, in its
    table by label at least two whole rows are, and their sums, by class, are at least the minimum; a table of nonnegative numbers with
    given margins can hold, in any one cell, the lesser of its two margins. Two variables meet in the label alone, so what one table tells does not
    bound another. Not covered: what somebody knows from elsewhere about patients or about how columns hang together (that one is part of
    another, say), and aggregates of a cohort that has changed a little since.

    Raises:
        ValueError: min_cell is below `ROUNDED_TO`.
    """
    if min_cell < ROUNDED_TO:
        raise ValueError(f"expected min_cell of at least {ROUNDED_TO}, got {min_cell}")
    told = bool(_enough(np.array([profile.num_patients]), min_cell)[0])
    variables = [*([profile.site] if profile.site else []), *profile.variables] if told else []
    label = profile.label if told else None
    return {
        "schema_version": SCHEMA_VERSION,
        "task": profile.task,
        "synthetic": profile.synthetic,
        "counted": "patients, each once, by the first record",
        "min_cell": min_cell,
        "rounded_to": ROUNDED_TO,
        "patients": int(rounded(np.array(profile.num_patients))) if told else None,
        "label": None if label is None else _one_way(label, shown_cells(label.counts, min_cell)),
        "distributions": [_distribution(variable, label, min_cell) for variable in variables],
    }


def _distribution(variable: Variable, label: Variable | None, min_cell: int) -> dict[str, object]:
    shown = shown_cells(variable.counts, min_cell)
    by_label = None if label is None else _two_way(variable, label, shown, min_cell)
    return {"name": variable.name, "unit": variable.unit, **_one_way(variable, shown), "by_label": by_label}


def _one_way(variable: Variable, shown: BoolArray) -> dict[str, object]:
    cells = [{"cell": variable.cells[place], "patients": int(rounded(variable.counts)[place])} for place in np.flatnonzero(shown)]
    hidden = None if shown.all() else {**_names(variable, shown), "patients": int(rounded(variable.counts[~shown].sum()))}
    return {"cells": cells, "hidden_together": hidden}


def _two_way(variable: Variable, label: Variable, shown: BoolArray, min_cell: int) -> dict[str, object] | None:
    """Whole rows, of those that the variable's own table tells: a cell is told for every class or for none. None where nothing is told, as where a class is small."""
    table = variable.by(label)
    shown = shown_rows(table, shown, min_cell)
    if not shown.any():
        return None
    cells = [{"cell": variable.cells[place], "patients": rounded(table[place]).tolist()} for place in np.flatnonzero(shown)]
    hidden = None if shown.all() else {**_names(variable, shown), "patients": rounded(table[~shown].sum(axis=0)).tolist()}
    return {"classes": list(label.cells), "cells": cells, "hidden_together": hidden}


def _names(variable: Variable, shown: BoolArray) -> dict[str, object]:
    """What is hidden, by name where the names are public: that a hospital is there at all may be no one's to know."""
    if not variable.declared:
        return {}
    return {"cells": [variable.cells[place] for place in np.flatnonzero(~shown)]}
