"""Of no cell can it be told from the aggregate that it holds fewer patients than the minimum; bins are public; the counts are those of the patients."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from client.data_profile import NOT_KNOWN, NUM_BINS, ROUNDED_TO, Profile, Variable, aggregate, profile_of, rounded, shown_cells, shown_rows
from shared.cohort import Cohort
from shared.schema import Column, TableSchema, TensorSchema
from shared.task import Task
from shared.tasks.tabular import ModelOptions, cohort_from_frame, load_table, synthetic_cohort, table_task
from tests.client.test_data_check import SCHEMA, TASK, table

COUNTS = st.one_of(st.integers(0, 14), st.sampled_from([0, 0, 1, 9, 10, 11, 12, 13, 40, 200]))
MIN_CELLS = st.sampled_from([5, 7, 10, 12, 20])


def profile_with(joint: np.ndarray) -> Profile:
    """A cohort with two variables and a label, with so many patients in each cell `(A, B, K)` of the three."""
    places = np.repeat(np.arange(joint.size), joint.ravel())
    a, b, k = np.unravel_index(places, joint.shape)
    variables = [
        Variable(name=name, cells=tuple(f"{name}{place}" for place in range(size)), of_patient=of_patient.astype(np.int64))
        for name, size, of_patient in zip("abk", joint.shape, (a, b, k), strict=True)
    ]
    return Profile(
        task="t", synthetic=False, num_patients=len(places), num_records=len(places), variables=tuple(variables[:2]), label=variables[2], site=None
    )


class Outsider:
    """Somebody who knows the aggregate, the exact number of patients, and the exact count behind every number that is printed."""

    def __init__(self, joint: np.ndarray, told: Mapping[str, object]) -> None:
        self.joint = joint
        self.known: list[np.ndarray] = [np.ones(joint.shape)]
        self.masks: dict[str, np.ndarray] = {}  # every cell of every table
        axes = {"a": 0, "b": 1, "k": 2}
        tables = [("k", told["label"]), *((item["name"], item) for item in told["distributions"])]  # type: ignore[index,attr-defined]
        for name, item in tables:
            if item is None:
                continue
            axis = axes[name]
            self._learn(item, [self._mask({axis: place}) for place in range(joint.shape[axis])], name)
            by = item.get("by_label")
            for label in range(joint.shape[2]) if by and name != "k" else ():
                self._learn(by, [self._mask({axis: place, 2: label}) for place in range(joint.shape[axis])], name, column=label)
        for first in range(2):
            for place in range(joint.shape[first]):
                for label in range(joint.shape[2]):
                    self.masks[f"{'ab'[first]}{place} k{label}"] = self._mask({first: place, 2: label})

    def _mask(self, chosen: Mapping[int, int]) -> np.ndarray:
        mask = np.zeros(self.joint.shape)
        mask[tuple(chosen.get(axis, slice(None)) for axis in range(3))] = 1
        return mask

    def _learn(self, item: Mapping[str, object], masks: list[np.ndarray], name: str, column: int | None = None) -> None:
        shown = {cell["cell"]: cell["patients"] for cell in item["cells"]}  # type: ignore[attr-defined]
        for place, mask in enumerate(masks):
            self.masks.setdefault(f"{name}{place}" if column is None else f"{name}{place} k{column}", mask)
            if f"{name}{place}" in shown:
                printed = shown[f"{name}{place}"] if column is None else shown[f"{name}{place}"][column]
                assert printed == rounded(np.array(int((self.joint * mask).sum())))
                self.known.append(mask)
        hidden = [mask for place, mask in enumerate(masks) if f"{name}{place}" not in shown]
        if hidden:
            self.known.append(sum(hidden[1:], start=hidden[0]))

    def most(self, mask: np.ndarray) -> float:
        """The most patients that a cell can hold, for all that is known."""
        equations = np.stack([known.ravel() for known in self.known])
        solved = linprog(-mask.ravel(), A_eq=equations, b_eq=equations @ self.joint.ravel(), bounds=(0, None), method="highs")
        assert solved.status == 0
        return -float(solved.fun)


def check_nothing_follows(joint: np.ndarray, min_cell: int) -> None:
    told = aggregate(profile_with(joint), min_cell=min_cell)
    json.dumps(told, allow_nan=False)
    if told["patients"] is None:
        assert told["label"] is None and told["distributions"] == []
        return
    outsider = Outsider(joint, told)
    for known in outsider.known:  # what is printed, and complements of it that are printed or follow
        assert int((joint * known).sum()) >= min_cell
    for name, mask in outsider.masks.items():
        if (joint * mask).sum() < min_cell:
            assert outsider.most(mask) >= min_cell - 1e-6, f"{name} is known to hold fewer than {min_cell}"


@st.composite
def joints(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(st.integers(2, 4)), draw(st.integers(2, 3)), draw(st.integers(2, 3)))
    return np.array(draw(st.lists(COUNTS, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))).reshape(shape)


@pytest.mark.slow
@example(joint=np.array([[1, 2], [10, 10], [9, 100], [100, 9]])[:, None, :], min_cell=10)  # a row that one table hides for another's sake
@settings(max_examples=60)
@given(joint=joints(), min_cell=MIN_CELLS)
def test_no_small_cell_follows_from_all_that_is_told(joint: np.ndarray, min_cell: int) -> None:
    check_nothing_follows(joint, min_cell)


@pytest.mark.slow
@settings(max_examples=800)
@given(joint=joints(), min_cell=MIN_CELLS)
def test_no_small_cell_follows_from_all_that_is_told_in_many_tables(joint: np.ndarray, min_cell: int) -> None:
    check_nothing_follows(joint, min_cell)


def test_the_outsider_finds_what_a_careless_aggregate_gives_away() -> None:
    joint = np.array([[[50], [3]], [[40], [20]]])[:, :, 0][:, None, :]  # (2, 1, 2): the second class of a0 holds three
    careless = {
        "label": {"cells": [{"cell": "k0", "patients": 90}, {"cell": "k1", "patients": 25}], "hidden_together": None},
        "distributions": [
            {
                "name": "a",
                "cells": [{"cell": "a0", "patients": 55}, {"cell": "a1", "patients": 60}],
                "hidden_together": None,
                "by_label": {"cells": [{"cell": "a1", "patients": [40, 20]}], "hidden_together": None},
            }
        ],
    }
    outsider = Outsider(joint, careless)
    assert outsider.most(outsider.masks["a0 k1"]) == pytest.approx(3)
    check_nothing_follows(joint, 10)


@given(counts=st.lists(COUNTS, min_size=1, max_size=12), min_cell=MIN_CELLS)
def test_what_is_hidden_is_two_cells_or_more_and_enough_together(counts: list[int], min_cell: int) -> None:
    known = np.array(counts)
    shown = shown_cells(known, min_cell)
    assert (known[shown] >= min_cell).all() and (rounded(known[shown]) >= min_cell).all()
    if shown.any() and not shown.all():
        assert (~shown).sum() >= 2 and known[~shown].sum() >= min_cell
    if (rounded(known) >= min_cell).all() and (known >= min_cell).all():
        assert shown.all()  # nothing is hidden that need not be


def test_suppression_by_hand() -> None:
    assert shown_cells(np.array([50, 3, 20, 40]), 10).tolist() == [True, False, False, True]  # the smallest of the others follows
    assert shown_cells(np.array([50, 9, 9, 40]), 10).tolist() == [True, False, False, True]  # two small ones do for each other
    assert shown_cells(np.array([50, 0, 0, 40]), 10).tolist() == [True, False, False, False]  # two that hold nobody do not
    assert shown_cells(np.array([200, 0]), 10).tolist() == [False, False]
    assert shown_cells(np.array([12, 30]), 12).tolist() == [False, False]  # 12 would be printed as 10
    rows = np.array([[40, 40], [30, 4], [20, 15], [60, 11]])
    assert shown_rows(rows, np.ones(4, dtype=np.bool_), 10).tolist() == [True, False, False, True]


@given(st.lists(st.integers(0, 10_000), min_size=1))
def test_rounding_is_to_the_nearest_multiple(counts: list[int]) -> None:
    told = rounded(np.array(counts))
    assert (told % ROUNDED_TO == 0).all() and (np.abs(told - counts) <= ROUNDED_TO // 2).all()


# Variables -----------------------------------------------------------------------------------------------------------------------


def test_a_table_is_counted_in_bins_of_the_schemas_range_whatever_the_data() -> None:
    frame = table(120)
    frame.loc[:3, "age"] = ["", "200", "18", "110"]
    frame.loc[:1, "smoker"] = ["?", "now"]
    one, half = (profile_of(TASK, cohort_from_frame(part.reset_index(drop=True), SCHEMA, source="a")) for part in (frame, frame.iloc[:60]))
    age, glucose, temperature, smoker = one.variables
    assert [variable.cells for variable in one.variables] == [variable.cells for variable in half.variables]
    assert age.cells[0] == "18 to 27.2" and age.cells[-2:] == ("100.8 to 110", NOT_KNOWN) and len(age.cells) == NUM_BINS + 1
    assert [age.of_patient[index] for index in range(4)] == [NUM_BINS, NUM_BINS - 1, 0, NUM_BINS - 1] and age.num_outside == 1
    assert smoker.cells == ("never", "past", "now", NOT_KNOWN) and smoker.of_patient[:2].tolist() == [3, 2]
    assert one.label is not None and one.site is not None and not one.site.declared and one.site.cells == ("north", "south")
    for variable in (age, glucose, temperature, smoker, one.site):
        assert variable.counts.sum() == 120 and np.array_equal(variable.by(one.label).sum(axis=1), variable.counts)


def test_a_patient_counts_once_by_the_first_record() -> None:
    frame = table(30)
    again = frame.iloc[:10].assign(age="99", smoker="now")
    both = cohort_from_frame(pd.concat([frame, again], ignore_index=True), SCHEMA, source="a")
    one, two = profile_of(TASK, cohort_from_frame(frame, SCHEMA, source="a")), profile_of(TASK, both)
    assert two.num_records == 40 and all(np.array_equal(a.counts, b.counts) for a, b in zip(one.variables, two.variables, strict=True))


def tensor_task(shape: tuple[int, ...], modality: str, unit: str = "") -> Task:
    return dataclasses.replace(TASK, modality=modality, schema=(TensorSchema(name="input", shape=shape, unit=unit, low=-1, high=1),))


def tensor_cohort(values: np.ndarray, labels: np.ndarray) -> Cohort:
    ids = tuple(f"p{index}" for index in range(len(values)))
    return Cohort(inputs=(values,), labels=labels, patient_of_record=np.arange(len(values)), patient_ids=ids)


def test_channels_of_tensors_and_labels_of_every_kind() -> None:
    values = np.linspace(-1, 1, 40 * 3 * 8, dtype=np.float32).reshape(40, 3, 8)
    classes = np.tile([0.0, 1.0], 20).astype(np.float32)
    names = [variable.name for variable in profile_of(tensor_task((3, 8), "signal"), tensor_cohort(values, classes)).variables]
    assert names == ["input 1, mean", "input 2, mean", "input 3, mean"]
    series = profile_of(tensor_task((3, 8), "time series", ", ".join("abcdefgh")), tensor_cohort(values, classes))
    assert [variable.name for variable in series.variables] == [f"{name}, mean" for name in "abcdefgh"]
    image = profile_of(tensor_task((1, 4, 6), "image"), tensor_cohort(values.reshape(40, 1, 4, 6), np.zeros((40, 1, 4, 6), np.float32)))
    assert [variable.name for variable in image.variables] == ["input, mean", "label: anything marked"]
    assert image.label is None and image.variables[1].counts.tolist() == [40, 0, 0]
    several = profile_of(tensor_task((3, 8), "signal"), tensor_cohort(values, np.tile(np.array([[0, 1, np.nan]], np.float32), (40, 1))))
    assert [variable.counts.tolist() for variable in several.variables[3:]] == [[40, 0, 0], [0, 40, 0], [0, 0, 40]]


def test_few_patients_give_an_aggregate_that_says_nothing() -> None:
    told = aggregate(profile_of(TASK, cohort_from_frame(table(8), SCHEMA, source="a")), min_cell=10)
    assert told["patients"] is None and told["label"] is None and told["distributions"] == []


def test_names_of_small_sites_are_not_told() -> None:
    frame = table(200)
    frame.loc[:4, "hospital"] = "St-Nowhere"
    told = json.dumps(aggregate(profile_of(TASK, cohort_from_frame(frame, SCHEMA, source="a")), min_cell=10))
    assert "St-Nowhere" not in told


def test_a_number_is_predicted() -> None:
    schema = TableSchema(
        name="stay",
        label=Column(name="days", type="number", low=1, high=100, scale="log"),
        columns=(Column(name="age", type="number", low=0, high=100),),
    )
    task = table_task(schema, load_cohort=lambda path, options: load_table(path, schema, options), model=ModelOptions())
    found = profile_of(task, synthetic_cohort(schema, 300, 3))
    told = aggregate(found, min_cell=10)
    assert found.label is None and found.synthetic and [variable.name for variable in found.variables] == ["age", "label: days"]
    assert told["label"] is None and all(item["by_label"] is None for item in told["distributions"])  # type: ignore[attr-defined]


def test_a_minimum_below_the_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        aggregate(profile_with(np.full((2, 2, 2), 20)), min_cell=1)
