"""What is wrong with a cohort is said at once, by name of column and in counts, and a patient's value never."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.data_check import DataSource, Subject, check_data, look_at
from client.findings import Finding
from client.measure_units import conversions_to, likely_conversion
from client.table_check import likely_column
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.errors import ConfigurationError
from shared.schema import Column, TableSchema, TensorSchema
from shared.task import Task
from shared.tasks.tabular import ModelOptions, load_table, table_task

HEART = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "fed_heart_disease"
SECRET = "Ada-Lovelace-1815"  # stands in one patient's row alone

SCHEMA = TableSchema(
    name="admissions",
    patient="patient_id",
    site="hospital",
    label=Column(name="died", type="binary"),
    columns=(
        Column(name="age", type="number", unit="years", low=18, high=110),
        Column(name="glucose", type="number", unit="mg/dl", low=20, high=600),
        Column(name="temperature", type="number", unit="degrees C", low=30, high=43, missing="indicator"),
        Column(name="smoker", type="category", categories=("never", "past", "now")),
    ),
)
Change = Callable[[pd.DataFrame], pd.DataFrame]


def task_of(schema: TableSchema) -> Task:
    return table_task(schema, load_cohort=lambda path, options: load_table(path, schema, options), model=ModelOptions())


TASK = task_of(SCHEMA)


def table(count: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        {
            "patient_id": [f"p{index:04d}" for index in range(count)],
            "hospital": rng.choice(["north", "south"], count),
            "died": rng.integers(0, 2, count).astype(str),
            "age": rng.integers(20, 95, count).astype(str),
            "glucose": np.round(rng.normal(130, 15, count), 1).astype(str),
            "temperature": np.round(rng.normal(37, 0.6, count), 1).astype(str),
            "smoker": rng.choice(["never", "past", "now"], count),
        }
    )


def found_in(folder: Path, frame: pd.DataFrame | bytes, task: Task = TASK) -> list[Finding]:
    file = folder / "admissions.csv"
    file.write_bytes(frame if isinstance(frame, bytes) else frame.to_csv(index=False).encode())
    return list(check_data(look_at(task, DataSource(path=file))))


def of_level(found: list[Finding], level: str) -> list[Finding]:
    return [finding for finding in found if finding.level == level]


def scaled(column: str, factor: float, offset: float = 0.0, rows: slice = slice(None)) -> Change:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        chosen = frame.index[rows]
        frame.loc[chosen, column] = [f"{float(value) * factor + offset:.2f}" for value in frame.loc[chosen, column]]
        return frame

    return change


def put(column: str, value: str, rows: slice = slice(None)) -> Change:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame.index[rows], column] = value
        return frame

    return change


def test_good_data_are_fine(tmp_path: Path) -> None:
    found = found_in(tmp_path, table())
    assert {finding.level for finding in found} == {"PASS"}
    assert [finding.check for finding in found if "200 patients, 200 records" in finding.what] == ["cohort"]


ONE_THING: Mapping[str, tuple[Change, str, str, str]] = {
    "celsius": (scaled("temperature", 1.8, 32), "FAIL", "all look like degrees F", "multiply by 0.5556 and add -17.78 to have degrees C"),
    "molar": (scaled("glucose", 1 / 18.016), "FAIL", "200 of 200 values (100.0%) are out of 20 to 600 mg/dl, all below; all look like mmol/l", "by 18.02"),
    "mixture": (scaled("glucose", 1 / 18.016, rows=slice(0, 40)), "FAIL", "40 of 200 values (20.0%)", "multiply by 18.02"),
    "months": (scaled("age", 12), "FAIL", "all look like months", "multiply by 0.08333"),
    "ten times": (scaled("temperature", 10), "FAIL", "another power of ten", "multiply by 0.1"),
    "a few": (put("age", "150", slice(0, 5)), "WARN", "5 of 200 values (2.5%) are out of 18 to 110 years, all above; they are clipped", "check the unit"),
    "text": (put("age", "<20", slice(0, 4)), "FAIL", "no number in 4 of 200 rows (4 with < or >)", "missing_codes"),
    "comma": (put("glucose", "12,5", slice(0, 6)), "FAIL", "(6 with a decimal comma)", "correct them"),
    "infinite": (put("glucose", "inf", slice(0, 2)), "FAIL", "(2 infinite)", "correct them"),
    "spelling": (put("smoker", "NEVER ", slice(0, 30)), "FAIL", "1 value outside the categories of the schema (never, past, now), in 30", "correct"),
    "label": (put("died", "7", slice(0, 2)), "FAIL", "column 'died': 1 value outside the categories of the schema (0, 1), in 2 of 200 rows", "correct"),
    "half missing": (put("glucose", "", slice(0, 120)), "WARN", "120 of 200 values (60.0%) not known; the middle of the range", "elsewhere"),
    "all missing": (put("glucose", "?"), "FAIL", "column 'glucose': 200 of 200 values (100.0%) not known", "check the export"),
    "no outcome": (put("died", "", slice(0, 3)), "WARN", "label 'died': 3 of 200 values (1.5%) not known", "no outcome"),
    "constant": (put("age", "40"), "WARN", "one value throughout: 'age'", "check the export"),
    "one class": (put("died", "1"), "FAIL", "all patients have one label: 0 0 (0.0%), 1 200 (100.0%)", "check the label"),
    "nameless": (put("patient_id", " ", slice(0, 3)), "FAIL", "no patient's identifier in 3 of 200 rows", "fill it in"),
    "renamed": (lambda frame: frame.rename(columns={"age": "Age (years)"}), "FAIL", "column 'age' is not in the file; 'Age (years)' may be it", "rename"),
    "no site": (lambda frame: frame.drop(columns="hospital"), "FAIL", "column 'hospital' is not in the file", "add it"),
    "few": (lambda frame: frame.iloc[:40], "WARN", "under 50", "more patients"),
    "repeats": (lambda frame: pd.concat([frame, frame.iloc[:12]]), "WARN", "12 repeats of an earlier record of the same patient", "twice"),
    "two names": (
        lambda frame: pd.concat([frame, frame.iloc[:60].assign(patient_id=lambda part: "q" + part["patient_id"])]),
        "WARN", "120 records are the same as another patient's, label included", "two identifiers",
    ),
    "zeros": (
        lambda frame: pd.concat([frame, frame.iloc[11:18].assign(age="50", patient_id=lambda part: "P" + part["patient_id"].str[1:].str.lstrip("0"))]),
        "WARN", "7 patients with identifiers that differ in case", "one way",
    ),
    "two sites": (
        lambda frame: pd.concat([frame, frame.iloc[:7].assign(age="50", hospital=lambda part: part["hospital"].map({"north": "south", "south": "north"}))]),
        "WARN", "7 patients at several sites", "moved",
    ),
    "both splits": (
        lambda frame: pd.concat([frame.assign(split="train"), frame.iloc[:9].assign(split="test", age="33")]),
        "WARN", "9 patients in several parts of column 'split'", "splits by patient",
    ),
    "one site's": (
        lambda frame: frame.assign(smoker=frame["smoker"].where((frame["hospital"] == "south") | (frame["smoker"] != "past"), "now")),
        "WARN", "column 'smoker': seen at one of 2 sites only: 'past' (at south)", "code it otherwise",
    ),
    "rare": (lambda frame: put("died", "1", slice(0, 8))(put("died", "0")(frame)), "WARN", "few patients have 1 (under 5%, or under 10)", "more patients"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_THING)
def test_each_thing_is_found_and_its_remedy_told(tmp_path: Path, name: str) -> None:
    change, level, what, fix = ONE_THING[name]
    found = found_in(tmp_path, change(table()))
    [one] = [finding for finding in found if what in finding.what]
    assert (one.level, one.exit_code) == (level, 5 if level == "FAIL" else 0) and fix in one.fix
    assert bool(of_level(found, "FAIL")) == (level == "FAIL"), "a warning alone fails nothing"


def test_all_is_said_at_once_and_no_value_of_a_patient(tmp_path: Path) -> None:
    frame = scaled("temperature", 1.8, 32)(scaled("glucose", 1 / 18.016)(table())).rename(columns={"age": "Age", "died": "death"})
    frame = put("smoker", SECRET, slice(3, 4))(put("smoker", "sometimes", slice(20, 35))(frame))
    failed = of_level(found_in(tmp_path, frame), "FAIL")
    assert [(finding.check, finding.what.split("'")[1]) for finding in failed] == [
        ("columns", "age"), ("columns", "died"), ("numbers", "glucose"), ("numbers", "temperature"), ("categories", "smoker"),
    ]  # fmt: skip
    assert "2 values" in failed[-1].what and "'sometimes'" in failed[-1].what  # of fifteen patients
    assert not any(SECRET in finding.what + finding.fix for finding in failed)


def test_values_are_named_only_where_ten_patients_share_them_however_many_rows_they_have(tmp_path: Path) -> None:
    one = table(1).assign(smoker=SECRET)
    found = found_in(tmp_path, pd.concat([table(), *[one.assign(age=str(30 + year)) for year in range(15)]]))
    [failed] = of_level(found, "FAIL")
    assert "in 15 of 215 rows" in failed.what and SECRET not in failed.what


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "got an empty file"),
        ("patient_id,hospital\nM\u00fcller,x\n".encode("latin1"), "expected UTF-8 text"),
        (table().to_csv(index=False).encode()[:300] + b",,,,,,,,\n", "a line with more"),
        (b"patient_id,hospital,died,age,glucose,temperature,smoker\n", "expected at least one row"),
        (b"a,b\n1,2\n", "none of the schema's 7 columns is in the file"),
        (b"\0\1\2" * 40, "none of the schema's 7 columns is in the file"),
    ],
)
def test_files_that_are_no_such_table_are_one_error(tmp_path: Path, content: bytes, what: str) -> None:
    [failed] = of_level(found_in(tmp_path, content), "FAIL")
    assert what in failed.what and failed.exit_code == 5


def test_a_quoted_newline_and_a_column_named_twice(tmp_path: Path) -> None:
    text = table().to_csv(index=False)
    assert not of_level(found_in(tmp_path, text.replace("p0001", '"p\n0001"', 1).encode()), "FAIL")
    twice = found_in(tmp_path, text.replace("smoker", "smoker,age", 1).replace("\n", ",5\n").replace("age,5\n", "age\n", 1).encode())
    assert [finding.what for finding in of_level(twice, "WARN")] == ["two columns are named 'age': the first is read"]


def test_a_permission_is_no_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, names: object) -> None:
        raise PermissionError

    monkeypatch.setattr("shared.tasks.tabular._read_separated", refuse)
    [failed] = of_level(found_in(tmp_path, table()), "FAIL")
    assert "this user may not read it" in failed.what and failed.fix == "change its permissions"


@pytest.mark.slow
@example(values=["18", "abc", ""], label="1")
@example(values=["17"] * 2 + ["30"] * 19, label="1")
@example(values=["17"] * 2 + ["30"] * 18, label="1")
@given(
    values=st.lists(st.sampled_from(["30", "41.5", "17", "300", "", "?", "x", "inf", "1e2"]), min_size=1, max_size=30),
    label=st.sampled_from(["0", "1", "2"]),
)
def test_a_column_fails_exactly_where_the_loader_refuses(tmp_path: Path, values: list[str], label: str) -> None:
    schema = TableSchema(name="t", label=Column(name="ill", type="binary"), columns=(Column(name="age", type="number", low=18, high=110),))
    frame = pd.DataFrame({"age": values, "ill": [label, *["1", "0"] * len(values)][: len(values)]})
    (tmp_path / "t.csv").write_text(frame.to_csv(index=False))
    subject = look_at(task_of(schema), DataSource(path=tmp_path / "t.csv"))
    failed = [finding for finding in check_data(subject) if finding.level == "FAIL" and finding.check != "labels"]
    assert bool(failed) == (subject.cohort is None)


# Units ---------------------------------------------------------------------------------------------------------------------------


def test_conversions_are_those_of_the_textbooks() -> None:
    known = {("degrees C", "temp"): ("degrees F", 98.6, 37.0), ("kg", "weight"): ("lb", 154.3, 70.0), ("mmHg", "sbp"): ("kPa", 16.0, 120.0),
             ("mg/dl", "total cholesterol"): ("mmol/l", 5.0, 193.4), ("umol/l", "creatinine"): ("mg/dl", 1.0, 88.4), ("mmol/l", "Glucose"): ("mg/dl", 90.0, 5.0)}  # fmt: skip
    for (unit, name), (other, value, wanted) in known.items():
        [found] = [conversion for conversion in conversions_to(unit, name) if conversion.unit == other]
        assert found.of(np.array([value]))[0] == pytest.approx(wanted, rel=2e-3)


def test_a_unit_is_proposed_only_where_it_explains_the_values() -> None:
    sure = {"low": 20.0, "high": 600.0, "unit": "mg/dl", "name": "glucose"}
    assert likely_conversion(np.array([5.0, 6.0]), np.array([]), **sure) is None  # too few to tell
    assert likely_conversion(np.array([-5.0, -6.0, -7.0]), np.array([]), **sure) is None
    found = likely_conversion(np.array([4.1, 5.0, 6.2, 9.0]), np.full(20, 110.0), **sure)
    assert found is not None and found.unit == "mmol/l"


def test_likely_columns() -> None:
    spare = ["Patient ID", "sysBP", "Age (years)", "x"]
    assert [likely_column(name, spare) for name in ("patient_id", "age", "sys_bp", "glucose")] == ["Patient ID", "Age (years)", "sysBP", None]


# Other cohorts -------------------------------------------------------------------------------------------------------------------


def tensors(change: Callable[[np.ndarray], np.ndarray] = lambda values: values, **about: object) -> list[Finding]:
    """Findings about 120 signals of two channels."""
    rng = np.random.default_rng(2)
    values = change(rng.uniform(-1, 1, (120, 2, 16)).astype(np.float32))
    fields: dict[str, object] = {"labels": rng.integers(0, 2, 120).astype(np.float32), **about}
    cohort = Cohort(inputs=(values,), patient_of_record=np.arange(120), patient_ids=tuple(f"p{index}" for index in range(120)), **fields)  # type: ignore[arg-type]  # a test's
    schema = (TensorSchema(name="signal", shape=(2, 16), unit="mV", low=-2, high=2),)
    task = dataclasses.replace(TASK, schema=schema, load_cohort=lambda path, options: cohort)
    return list(check_data(look_at(task, DataSource(path=None))))


def nan_in_three(values: np.ndarray) -> np.ndarray:
    values[5:8, 1, 3] = np.nan
    return values


def same_in_five(values: np.ndarray) -> np.ndarray:
    values[60:65] = values[:5]
    return values


@pytest.mark.parametrize(
    ("change", "level", "what"),
    [
        (lambda values: values[:, :1], "FAIL", "records of shape 1 x 16, expected 2 x 16"),
        (lambda values: values.astype(np.float64), "FAIL", "values of type float64, expected float32"),
        (nan_in_three, "FAIL", "NaN or infinite in 3 of 120 records"),
        (lambda values: values * 1000, "FAIL", "of the values are out of -2 to 2 mV"),
        (lambda values: values / 1000, "WARN", "all values lie in a hundredth of the range"),
        (lambda values: np.where(np.arange(120)[:, None, None] < 4, np.float32(0.5), values), "WARN", "4 of 120 records are one value throughout"),
    ],
)
def test_tensors_are_held_against_their_schema(change: Callable[[np.ndarray], np.ndarray], level: str, what: str) -> None:
    assert any(finding.level == level and what in finding.what for finding in tensors(change))


def test_records_alike_in_training_and_test_and_at_two_sites() -> None:
    labels, sites = np.tile([0.0, 1.0], 60).astype(np.float32), np.where(np.arange(120) < 60, "a", "b")
    labels[60:65] = labels[:5]
    test = np.arange(120) >= 60
    [found] = [
        finding for finding in tensors(same_in_five, labels=labels, attributes={"site": sites}, published_test=test) if finding.check == "duplicates"
    ]
    assert found.what == "10 records are the same as another patient's, label included; 10 of them stand in training and test, 10 at several sites"
    assert {finding.level for finding in tensors()} == {"PASS"}


def test_alike_by_chance_is_no_warning(tmp_path: Path) -> None:
    schema = TableSchema(name="t", label=Column(name="ill", type="binary"), columns=tuple(Column(name=name, type="binary") for name in "abc"))
    frame = pd.DataFrame(np.random.default_rng(0).integers(0, 2, (150, 4)).astype(str), columns=[*"abc", "ill"])
    found = [finding for finding in found_in(tmp_path, frame, task_of(schema)) if finding.check == "duplicates"]
    assert [finding.level for finding in found] == ["PASS"] and "as chance would have it" in found[0].what


def test_labels_that_are_several_at_once_or_maps() -> None:
    many = np.tile(np.array([[0.0, 1.0, np.nan], [1.0, 1.0, 0.0]], dtype=np.float32), (60, 1))
    [found] = [finding for finding in tensors(labels=many) if finding.check == "labels"]
    assert found.level == "WARN" and found.what == "2 of 3 labels have one value throughout: number 1, 2"
    [found] = [finding for finding in tensors(labels=np.zeros((120, 1, 4, 4), np.float32)) if finding.check == "labels"]
    assert found.level == "FAIL" and "one label" in found.what
    assert any("infinite labels in 120" in finding.what for finding in tensors(labels=np.full(120, np.inf, np.float32)))


def test_a_loader_that_fails_unforeseen_says_its_type_alone() -> None:
    def load(path: object, options: object) -> Cohort:
        raise ValueError(SECRET)

    subject = look_at(dataclasses.replace(TASK, load_cohort=load), DataSource(path=None))
    [failed] = list(check_data(subject))
    assert "stopped with ValueError" in failed.what and SECRET not in failed.what + failed.fix and failed.exit_code == 5


def test_options_that_a_loader_does_not_know_are_no_bad_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table().to_csv(index=False))
    with pytest.raises(ConfigurationError, match="no option 'depth'"):
        look_at(TASK, DataSource(path=tmp_path / "a.csv", options={"depth": 3}))


# At a site -----------------------------------------------------------------------------------------------------------------------


def at_site(folder: Path, *, patients: int, declared: int, policy: str = "") -> Subject:
    (folder / "a.csv").write_text(table(patients).to_csv(index=False))
    (folder / "site.toml").write_text(
        f'name = "va"\n[cohort]\npath = "a.csv"\ndeclared_size = {declared}\n[policy]\nmax_epsilon = 3.0\nallowed_tasks = ["admissions"]\n{policy}\n'
    )
    return look_at(TASK, DataSource.of(folder / "site.toml", {}))


def test_a_site_is_held_against_its_own_policy(tmp_path: Path) -> None:
    assert not of_level(list(check_data(at_site(tmp_path, patients=200, declared=140))), "FAIL")
    few = of_level(list(check_data(at_site(tmp_path, patients=60, declared=40, policy="min_patients = 100"))), "FAIL")
    assert [("policy.min_patients = 100" in finding.what, finding.exit_code) for finding in few] == [(True, 5), (True, 5)]
    odd = of_level(
        list(check_data(at_site(tmp_path, patients=200, declared=500, policy='allowed_metrics = ["auroc"]\nmin_metric_patients = 90'))), "WARN"
    )
    assert [finding.fix.split(":")[0] for finding in odd] == ["more patients", "correct it"]


def test_a_site_splits_by_its_own_key_and_none_is_made_for_a_check(tmp_path: Path) -> None:
    subject = at_site(tmp_path, patients=200, declared=140)
    list(check_data(subject))
    assert not (tmp_path / "state").exists()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "patient-hash.key").write_bytes(bytes(32))
    [size] = [finding.what for finding in check_data(subject) if finding.check == "size"]
    by_site, by_simulation = (int(held_out_patients(subject.loaded, key).sum()) for key in (bytes(32), SIMULATION_SPLIT_KEY))
    assert f"{by_site} to test on" in size and by_site != by_simulation


@pytest.mark.skipif(not HEART.is_dir(), reason="the UCI heart files are not beside the checkout")
def test_the_four_hospitals(tmp_path: Path) -> None:
    from shared.tasks.heart_disease import heart_disease

    found = list(check_data(look_at(heart_disease(), DataSource(path=HEART))))
    assert not of_level(found, "FAIL")
    told = [finding.what for finding in found]
    assert "not known: chol 10.7%, trestbps 0.1%" in told and "absent 357 (48.2%), present 383 (51.8%)" in told
    assert "486 patients to train on, 254 to test on" in told
    assert any(what.startswith("2 records are the same as another patient's") for what in told)
    shutil.copy(HEART / "processed.va.data", tmp_path)
    assert not of_level(list(check_data(look_at(heart_disease(), DataSource(path=tmp_path / "processed.va.data")))), "FAIL")
