"""`wardround predict`: one row a patient, from data that fit; nothing half-written, and nobody else's to read."""

import csv
import dataclasses
import errno
import os
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from client.data_check import DataSource
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataError, DataMissingError, SchemaError, StorageError
from shared.models import predict_in_batches
from shared.schema import Column, TableSchema
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.biomarker_panel import shipped_panel
from shared.tasks.deidentify_notes import KINDS, NUMBER_OF_TAG, UNKNOWN
from tests.client.test_data_check import table
from tests.wardround.conftest import Command
from tests.wardround.test_data_cli import SCHEMA
from tests.wardround.test_export import altered, untrained
from wardround import predicting, table_rows
from wardround.deploying import torch_session
from wardround.patients import Patients, WholeCohort
from wardround.predicting import MAP_COLUMNS, Predictor, as_columns, column_names, open_patients, open_predictor, predict, write_rows
from wardround.private_files import private_file
from wardround.run import simulate
from wardround.table_rows import TableRows
from wardround.trained import read_trained

NAME = "patient_id"


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a schema, 200 patients (400 records) and the run `run` of one round on them."""
    folder = tmp_path_factory.mktemp("hospital")
    (folder / "admissions.toml").write_text(SCHEMA)
    frame = table()
    twice = pd.concat([frame, frame.assign(glucose=frame["glucose"].sample(frac=1, random_state=4).to_numpy())], ignore_index=True)
    twice.to_csv(folder / "admissions.csv", index=False)
    study = Study.from_table(
        {
            "name": "admissions",
            "task": str(folder / "admissions.toml"),
            "rounds": {"count": 1},
            "training": {"learning_rate": 0.5},
            "privacy": {"unit": "none"},
            "federation": {"sites": 2},
        }
    )
    run = simulate(study, data=folder / "admissions.csv", out=folder)
    shutil.move(run.path, folder / "run")
    return folder


@pytest.fixture
def folder(trained_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, in which commands are run."""
    shutil.copytree(trained_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def expected(folder: Path) -> dict[str, float]:
    """Each patient's prediction by the longest way: every record at once, then the mean of each patient's."""
    trained = read_trained(folder / "run")
    cohort = trained.task.load_cohort(folder / "admissions.csv", {})
    scores = trained.task.predict(predict_in_batches(trained.model, cohort.inputs)).numpy()
    return {name: float(scores[cohort.patient_of_record == index].mean()) for index, name in enumerate(cohort.patient_ids)}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_a_patient_with_the_mean_over_records(command: Command, folder: Path) -> None:
    outcome = command("predict", "run", "admissions.csv")
    assert outcome.code == 0, outcome.err
    found, truth = rows(folder / "predictions.csv"), expected(folder)
    assert list(found[0]) == ["patient", "num_records", "died=1"]
    assert {row["patient"]: row["num_records"] for row in found} == dict.fromkeys(truth, "2")
    assert {row["patient"]: float(row["died=1"]) for row in found} == pytest.approx(truth, abs=1e-5)
    assert stat.S_IMODE((folder / "predictions.csv").stat().st_mode) == 0o600
    by_python = predict(folder / "run", folder / "admissions.csv")
    assert dict(zip(by_python["patient"], by_python["died=1"], strict=True)) == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 399, 1024])
def test_the_size_of_batches_makes_no_difference(trained_folder: Path, batch_size: int) -> None:
    predictor = open_predictor(trained_folder / "run", trained_folder / "admissions.csv")
    largest = 0

    def counting(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        nonlocal largest
        largest = max(largest, len(arrays[0]))
        return predictor.session(arrays)

    counted = Predictor(task=predictor.task, session=counting, patients=predictor.patients, columns=predictor.columns, labels_read=True)
    found = {row.patient: row.values[0] for row in counted.rows(batch_size=batch_size)}
    assert found == pytest.approx(expected(trained_folder), abs=1e-6) and largest <= batch_size


def test_new_patients_need_no_label(command: Command, folder: Path) -> None:
    frame = pd.read_csv(folder / "admissions.csv", dtype=str, keep_default_na=False)
    frame.drop(columns=["died", "hospital"]).to_csv(folder / "new.csv", index=False)
    outcome = command("predict", "run", "new.csv", "--json")
    assert outcome.data["labels_read"] is False
    assert {row["patient"]: float(row["died=1"]) for row in rows(folder / "predictions.csv")} == pytest.approx(expected(folder), abs=1e-5)
    frame.loc[:5, "died"] = ""  # with the schema's file named, a label that is there is not looked at, and nobody without one is left out
    frame.to_csv(folder / "some.csv", index=False)
    assert command("predict", "run", "some.csv", "--task", "admissions.toml", "--out", "some-out.csv", "--json").data["num_records"] == 400


@pytest.mark.slow
def test_where_no_column_names_patients_the_file_s_rows_do(command: Command, folder: Path) -> None:
    schema = (folder / "admissions.toml").read_text().replace(f'patient = "{NAME}"\n', "").replace('site = "hospital"\n', "")
    (folder / "rows.toml").write_text(schema)
    frame = table(20).drop(columns=["died", NAME, "hospital"])
    frame.to_csv(folder / "new.csv", index=False)
    study = Study.from_table(
        {"name": "r", "task": str(folder / "rows.toml"), "rounds": {"count": 1}, "privacy": {"unit": "none"}, "federation": {"sites": 2}}
    )
    run = simulate(study, out=folder).path
    assert command("predict", run, "new.csv").code == 0
    assert [row["patient"] for row in rows(folder / "predictions.csv")] == [f"row {number}" for number in range(1, 21)]


def test_data_that_do_not_fit_are_refused_and_leave_nothing(command: Command, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    frame = table().drop(columns="died")
    wrong = {
        "text.csv": frame.assign(age="old"),
        "unit.csv": frame.assign(glucose=9999),
        "category.csv": frame.assign(smoker="sometimes"),
        "column.csv": frame.drop(columns="age"),
        "empty.csv": frame[:0],
    }
    for name, values in wrong.items():
        values.to_csv(folder / name, index=False)
        outcome = command("predict", "run", name)
        assert outcome.code == 5, (name, outcome.err)
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\x00,")
    assert command("predict", "run", "bytes.csv").code == 5
    assert command("predict", "run", "nowhere.csv").code == 5
    assert command("predict", "run").code == 5, "the task has no data of its own"
    assert {path.name for path in folder.iterdir()} - before == {*wrong, "bytes.csv"}


def test_a_prediction_that_is_no_number_leaves_no_file(trained_folder: Path, tmp_path: Path) -> None:
    found = open_predictor(trained_folder / "run", trained_folder / "admissions.csv")
    calls = []

    def failing(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        calls.append(len(arrays[0]))
        return np.full(len(arrays[0]), 0.5 if len(calls) < 2 else np.nan)

    predictor = Predictor(task=found.task, session=failing, patients=found.patients, columns=found.columns, labels_read=True)
    with pytest.raises(DataError, match="finite"), private_file(tmp_path / "out.csv") as file:
        for row in predictor.rows(batch_size=100):
            file.write(row.patient)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []
    with pytest.raises(DataError), private_file(tmp_path / "out.csv") as file:
        write_rows(predictor, file)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_predicts_nothing_of_a_patient_is_refused_before_data_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = untrained(resolve_task("molecule-generator"))
    monkeypatch.setattr(predicting, "_opened", lambda path, task: (trained.task, torch_session(trained.task, trained.model), None))
    with pytest.raises(ConfigurationError, match="task molecule-generator: .* gives 40 x 64 numbers of another kind"):
        open_predictor("run", "no such file")


def test_a_task_may_say_what_fits_a_row() -> None:
    """The dose of treatment-policy at the last step that there was, and the value that the model believes in at the first."""
    trained, cohort = untrained(resolve_task("treatment-policy")), resolve_task("treatment-policy").synthetic_cohort(20, 3)
    session = torch_session(trained.task, trained.model)
    predictor = Predictor(task=trained.task, session=session, patients=WholeCohort(cohort), columns=trained.task.predicted, labels_read=True)
    values = session(cohort.inputs)[..., :5]
    lengths = cohort.labels[..., 3].sum(axis=1).astype(int)
    assert len(set(lengths.tolist())) > 1, "some died before the last step"
    for place, row in enumerate(predictor.rows()):
        last = lengths[place] - 1
        assert row.values == (pytest.approx(values[place, 0].max()), last, values[place, last].argmax())


def test_entities_of_notes_are_counted_by_kind() -> None:
    """The true tags, taken for predictions, give the entities that the notes were written with."""
    task = resolve_task("deidentify-notes")
    cohort = task.synthetic_cohort(30, 5)
    assert task.row is not None
    found = task.row(np.where(cohort.labels == UNKNOWN, 0, cohort.labels), cohort.inputs)
    tags = cohort.labels[..., 0]
    begun = [(tags == NUMBER_OF_TAG[f"B-{kind}"]).sum(axis=1) for kind in KINDS]  # each true entity begins with one
    assert np.array_equal(found[:, :5], np.stack(begun, axis=1)) and (found[:, 5] <= found[:, 4]).all() and found[:, 5].sum() > 0


def test_a_task_names_what_it_predicts() -> None:
    """Days until death are what survival-breast reads, and no name for a risk."""
    for name, shape, columns in (
        ("survival-breast", (), ("risk_5_years",)), ("molecule-solubility", (), ("Solubility",)),
        ("self-supervised", (3,), ("hidden_error", "last_known_error", "anything_hidden")), ("heart-disease", (), ("disease=present",)),
    ):  # fmt: skip
        assert column_names(resolve_task(name), shape) == columns
    assert (
        column_names(resolve_task("clinical-text"), (5,))[0] == "neoplasms" and column_names(resolve_task("record-autoencoder"), (8,))[2] == "code_1"
    )


HEART_COLUMNS = [column.name for column in resolve_task("heart-disease").schema.columns]  # type: ignore[union-attr]  # a table's


def heart_table(folder: Path, changes: dict[int, dict[str, str]], *, extra: dict[str, str] | None = None, rows: int = 60) -> Path:
    """A CSV of heart-disease's schema with so many synthetic patients, and these cells in these rows (from 1)."""
    schema = resolve_task("heart-disease").schema
    assert isinstance(schema, TableSchema)
    frame = pd.DataFrame({column.name: [_usual(column)] * rows for column in schema.columns}).assign(**(extra or {}))
    for row, cells in changes.items():
        for name, value in cells.items():
            frame.loc[row - 1, name] = value
    path = folder / "patients.csv"
    frame.to_csv(path, index=False)
    return path


def _usual(column: Column) -> str:
    if column.type == "number":
        assert column.low is not None and column.high is not None
        return f"{(column.low * column.high) ** 0.5 if column.scale == 'log' else (column.low + column.high) / 2:.4g}"
    return next(value for value in column.values if value not in column.missing_codes)


def read_heart(path: Path, *, skip: bool = False) -> tuple[Cohort, str]:
    patients = open_patients(resolve_task("heart-disease"), DataSource.of(path, {}), skip_bad_rows=skip)
    assert isinstance(patients, TableRows)
    return patients.cohort(), patients.left_out


def test_rows_that_cannot_be_predicted_for_are_named_and_refused_or_left_out(tmp_path: Path) -> None:
    """One row of sixty would be within what a loader lets pass for training; no value is told."""
    changes = {2: {"age": "99999"}, 7: {"cp": "MARK-71"}, 9: {"chol": "MARK-72"}, 60: dict.fromkeys(HEART_COLUMNS, "")}
    with pytest.raises(
        SchemaError, match="4 of 60 rows cannot be predicted for: row 2 .*'age'.*, row 7 .*'cp'.*, row 9 .*'chol'.*, row 60 .*nothing"
    ) as found:
        read_heart(heart_table(tmp_path, changes))
    assert "MARK" not in str(found.value) and "99999" not in str(found.value) and "--skip-bad-rows" in str(found.value)
    cohort, left_out = read_heart(tmp_path / "patients.csv", skip=True)
    assert cohort.patient_ids == tuple(f"row {number}" for number in range(1, 60) if number not in (2, 7, 9)), "by their place in the file"
    assert "row 7" in left_out and not cohort.notes["records_dropped"] and not cohort.notes["values_clipped"]
    with pytest.raises(SchemaError, match="60 of 60"):
        read_heart(heart_table(tmp_path, {row: {"age": "0"} for row in range(1, 61)}), skip=True)


def scattered(path: Path, num_patients: int, *, per_patient: int = 3) -> Path:
    """A table in which each patient's records lie apart."""
    frame = table(num_patients)
    parts = [frame.assign(glucose=frame["glucose"].sample(frac=1, random_state=number).to_numpy()) for number in range(per_patient)]
    pd.concat(parts, ignore_index=True).to_csv(path, index=False)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("part_bytes", [1, 300, 5000, 2**22])
def test_a_table_is_read_in_parts_and_the_parts_make_no_difference(trained_folder: Path, tmp_path: Path, part_bytes: int) -> None:
    """Parts of one row, of a few, and one of all: the same rows, and the same as the task's own loader gives; in the order of first records."""
    path, trained = scattered(tmp_path / "a.csv", 40), read_trained(trained_folder / "run")
    schema = trained.task.schema
    assert isinstance(schema, TableSchema)
    patients = TableRows(path, schema, part_bytes=part_bytes)
    predictor = Predictor(
        task=trained.task, session=torch_session(trained.task, trained.model), patients=patients, columns=("died",), labels_read=False
    )
    cohort = trained.task.load_cohort(path, {})
    scores = trained.task.predict(predict_in_batches(trained.model, cohort.inputs)).numpy()
    truth = {name: float(scores[cohort.patient_of_record == index].mean()) for index, name in enumerate(cohort.patient_ids)}
    found = list(predictor.rows(batch_size=7))
    assert [row.patient for row in found] == list(truth) and {row.num_records for row in found} == {3}
    assert {row.patient: row.values[0] for row in found} == pytest.approx(truth, abs=1e-6)


def test_a_file_is_never_held_whole(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part has more rows than its bytes allow, in either reading; rows come before the last part is read."""
    path, sizes = scattered(tmp_path / "a.csv", 400, per_patient=1), []
    read = table_rows.csv_parts

    def counting(path: Path, *, part_bytes: int) -> Iterator[pd.DataFrame]:
        for part in read(path, part_bytes=part_bytes):
            sizes.append(len(part))
            yield part

    monkeypatch.setattr(table_rows, "csv_parts", counting)
    monkeypatch.setattr(table_rows, "PART_BYTES", path.stat().st_size // 10)
    trained = read_trained(trained_folder / "run")
    assert isinstance(trained.task.schema, TableSchema)
    patients = TableRows(path, trained.task.schema, part_bytes=path.stat().st_size // 10)
    assert len(sizes) >= 10 and max(sizes) <= 41
    checked = len(sizes)
    predictor = Predictor(
        task=trained.task, session=torch_session(trained.task, trained.model), patients=patients, columns=("died",), labels_read=False
    )
    next(iter(predictor.rows()))
    assert len(sizes) == checked + 1


def test_a_file_that_changes_after_it_was_checked_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    predictor = open_predictor(trained_folder / "run", scattered(tmp_path / "a.csv", 20), task=str(trained_folder / "admissions.toml"))
    scattered(tmp_path / "a.csv", 19)
    with pytest.raises(DataError, match="changed since"):
        list(predictor.rows())


def named_rows(folder: Path, names: list[str], changes: dict[int, dict[str, str]] | None = None) -> tuple[Path, TableSchema]:
    """A CSV of heart-disease's schema with a column of patients' identifiers, every cell in quotation marks, and a schema that names it."""
    schema = resolve_task("heart-disease").schema
    assert isinstance(schema, TableSchema)
    path = heart_table(folder, changes or {}, rows=len(names))
    pd.read_csv(path, dtype=str, keep_default_na=False).assign(**{NAME: names}).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    return path, schema.model_copy(update={"patient": NAME})


def all_zero(patients: Patients) -> Predictor:
    task = resolve_task("heart-disease")
    return Predictor(task=task, session=lambda inputs: np.zeros(len(inputs[0])), patients=patients, columns=("risk",), labels_read=False)


@pytest.mark.parametrize(
    ("names", "changes", "old", "new"),
    [
        ("AABC", {}, '"A"', '"D"'),
        ("ABC", {}, '"B"', '"A"'),
        ("ABC", {2: {"age": "61"}}, '"61"', '"99"'),
        ("ABC", {2: {"age": "99"}}, '"99"', '"61"'),
        ("ABC", {2: {"age": "61"}, 3: {"age": "99"}}, '"61"', '"99"'),
    ],
    ids=["a name", "a name for another's", "a row left out", "a row more", "another row left out"],
)
def test_nobody_is_lost_from_a_file_that_changed_in_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, changes: dict[int, dict[str, str]], old: str, new: str
) -> None:
    """The system says of the file what it said before: whose rows are kept is held against the first reading."""
    monkeypatch.setattr(table_rows, "_version", lambda path: (0, 0, 0, 0))
    path, schema = named_rows(tmp_path, list(names), changes)
    patients = TableRows(path, schema, skip_bad_rows=True)
    assert len(list(all_zero(patients).rows())) == 3 - sum(cells == {"age": "99"} for cells in changes.values()), "unchanged, it is read again"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match="changed since"):
        list(all_zero(patients).rows())
    with pytest.raises(DataError, match="changed since"):
        patients.cohort()


def test_a_value_that_changed_is_found_though_size_and_time_of_writing_are_as_before(tmp_path: Path) -> None:
    path, schema = named_rows(tmp_path, ["A", "B"], {2: {"age": "61"}})
    patients, before = TableRows(path, schema), path.stat()
    with path.open("r+") as file:
        text = file.read().replace('"61"', '"62"')
        file.seek(0)
        file.write(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match="changed since"):
        list(all_zero(patients).rows())


class Miscounted(WholeCohort):
    """Says of everybody that there is one record more."""

    def num_records_of(self, patient: str) -> int:
        return super().num_records_of(patient) + 1


def test_rows_end_with_everybody_or_with_an_error() -> None:
    cohort = resolve_task("heart-disease").synthetic_cohort(3, 1)
    assert len(list(all_zero(WholeCohort(cohort)).rows())) == 3
    without_record = dataclasses.replace(cohort, patient_ids=(*cohort.patient_ids, "nobody"))
    with pytest.raises(DataError, match="expected all records of 4 patients, found all of 3, and of 0 not as many"):
        list(all_zero(WholeCohort(without_record)).rows())
    with pytest.raises(DataError, match="expected all records of 3 patients, found all of 0, and of 3 not as many") as found:
        list(all_zero(Miscounted(cohort)).rows())
    assert cohort.patient_ids[0] not in str(found.value)


@pytest.mark.parametrize("mark", ["\r", "\n", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
def test_an_identifier_with_a_control_character_is_refused_by_its_row(tmp_path: Path, mark: str) -> None:
    """Of "x<CR>victim" a table that is read again would have a row for "victim", whom nobody predicted for."""
    path, schema = named_rows(tmp_path, ["a", f"x{mark}victim", "b"])
    with pytest.raises(SchemaError, match=r"1 of 3 rows .*: row 2 \(a control character in the patient's identifier\)") as found:
        TableRows(path, schema)
    assert "victim" not in str(found.value)
    assert [row.patient for row in all_zero(TableRows(path, schema, skip_bad_rows=True)).rows()] == ["a", "b"]


def test_of_a_loader_s_patients_too(tmp_path: Path) -> None:
    cohort = dataclasses.replace(
        resolve_task("icu-mortality").synthetic_cohort(3, 1), patient_ids=("a", "x\rvictim", "b"), notes={"values_imputed": 7}
    )
    task = altered(resolve_task("icu-mortality"), load_cohort=lambda path, options: cohort)
    with pytest.raises(SchemaError, match="patients with a control character in the patient's identifier: 1") as found:
        open_patients(task, DataSource.of(tmp_path, {}))
    assert "victim" not in str(found.value)
    others = open_patients(task, DataSource.of(tmp_path, {}), skip_bad_rows=True)
    assert others.cohort().patient_ids == ("a", "b") and "control character" in others.left_out and others.notes == {"values_imputed": 7}


def test_identifiers_are_written_as_they_are_and_read_back_as_they_were(tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-2", "@SUM(A1)", 'quo"te', "a,b", "Ä ö"]
    path, schema = named_rows(tmp_path, names)
    with (tmp_path / "out.csv").open("w", newline="") as file:
        assert write_rows(all_zero(TableRows(path, schema)), file) == len(names)
    assert [row["patient"] for row in rows(tmp_path / "out.csv")] == names
    assert len((tmp_path / "out.csv").read_bytes().splitlines()) == len(names) + 1


def test_one_patient_with_a_value_missing_is_predicted_for(tmp_path: Path) -> None:
    """A column without any value is doubtful in data to train on, and nothing unusual in one patient's."""
    patients = open_patients(resolve_task("heart-disease"), DataSource.of(heart_table(tmp_path, {1: {"chol": ""}}, rows=1), {}))
    batches = list(patients.batches(10))
    assert patients.num_patients == 1 and patients.notes["values_imputed"] == 1 and np.isfinite(batches[0].inputs[0]).all()


def test_the_one_table_of_a_folder_that_fits_is_read(tmp_path: Path) -> None:
    """As in the published folder of survival-breast, where a second table says who is tested, and not everybody is in it."""
    heart_table(tmp_path, {})
    (tmp_path / "split.csv").write_text("pid,fold\n1,train\n")
    assert open_patients(resolve_task("heart-disease"), DataSource.of(tmp_path, {})).num_patients == 60
    shutil.copy(tmp_path / "patients.csv", tmp_path / "again.csv")
    with pytest.raises(DataMissingError):
        open_patients(resolve_task("heart-disease"), DataSource.of(tmp_path, {}))


def test_a_label_is_not_looked_at_whether_it_is_there_or_empty(tmp_path: Path) -> None:
    for label in ("present", "", "whatever"):
        assert read_heart(heart_table(tmp_path, {}, extra={"disease": label}))[0].num_patients == 60


def test_a_csv_with_most_columns_of_the_schema_gets_the_schemas_own_error(tmp_path: Path) -> None:
    path = heart_table(tmp_path, {})
    frame = pd.read_csv(path, dtype=str)
    frame.drop(columns="chol").to_csv(path, index=False)
    with pytest.raises(SchemaError, match="'chol'"):
        read_heart(path)
    path.write_text(frame.assign(again=frame["age"]).to_csv(index=False).replace(",again", ",age", 1))
    with pytest.raises(SchemaError, match="one column 'age', found two"):
        read_heart(path)
    path.write_bytes(frame.to_csv(index=False).encode("utf-16"))
    with pytest.raises(SchemaError, match="UTF-8"):
        read_heart(path)


@pytest.mark.slow
def test_records_that_a_loader_leaves_out_are_named_and_refused(tmp_path: Path) -> None:
    panel, task = shipped_panel(), resolve_task("biomarker-panel")
    rng, middles = np.random.default_rng(3), np.array([(marker.low + marker.high) / 2 for marker in panel])
    frame = pd.DataFrame(np.round(middles + rng.normal(size=(40, len(panel))), 3), columns=[marker.name for marker in panel]).astype(str)
    frame = frame.assign(patient=[f"p{index}" for index in range(40)], label="1")
    frame.drop(columns="marker_001").to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(SchemaError, match="marker_001") as narrow:
        open_patients(task, DataSource.of(tmp_path / "c.csv", {}))
    assert "--skip-bad-rows" not in str(narrow.value), "there are no others to predict for"
    frame.loc[[4, 11], "marker_003"] = "MARK-73"
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(SchemaError, match="2 of 40: rows 5, 12") as found:
        open_patients(task, DataSource.of(tmp_path / "a.csv", {}))
    assert "MARK" not in str(found.value)
    patients = open_patients(task, DataSource.of(tmp_path / "a.csv", {}), skip_bad_rows=True)
    assert patients.num_patients == 38 and "rows 5, 12" in patients.left_out
    frame = frame.drop(index=[4, 11])
    frame.loc[:9, "label"] = ""
    frame.to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(SchemaError, match="records without label: 9"):
        open_patients(task, DataSource.of(tmp_path / "b.csv", {}))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_neither_a_file_nor_a_folder_is_no_crash(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataMissingError):
        open_patients(resolve_task("heart-disease"), DataSource.of(tmp_path / kind, {}))


@pytest.mark.parametrize("place", ["run", "run/model", "run/deep/er"])
def test_nothing_of_patients_is_written_into_a_run_s_folder(command: Command, folder: Path, place: str) -> None:
    (folder / place).mkdir(parents=True, exist_ok=True)
    outcome = command("predict", "run/model/final.safetensors", "admissions.csv", "--task", "admissions.toml", "--out", f"{place}/p.csv")
    assert outcome.code == 3 and "outside the run's folder" in outcome.err and not (folder / place / "p.csv").exists()


@pytest.mark.parametrize("nameless", [True, False], ids=["without a name", "with one"])
def test_sigterm_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    with pytest.raises(KeyboardInterrupt), private_file(tmp_path / "out.csv") as file:
        file.write("MARK-74")
        file.flush()
        assert [path.name for path in tmp_path.iterdir()] == [] if nameless else len(list(tmp_path.iterdir())) == 1
        signal.raise_signal(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("force", [False, True])
def test_a_file_system_without_nameless_files_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(os, "link", refused)
    with private_file(tmp_path / "out.csv", force=force) as file:
        file.write("1")
    assert (tmp_path / "out.csv").read_text() == "1" and [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert stat.S_IMODE((tmp_path / "out.csv").stat().st_mode) == 0o600
    with pytest.raises(StorageError, match="expected a new file"), private_file(tmp_path / "other.csv") as file:
        (tmp_path / "other.csv").write_text("another's, made meanwhile")
    assert (tmp_path / "other.csv").read_text() == "another's, made meanwhile" and len(list(tmp_path.iterdir())) == 2


def test_what_goes_wrong_in_the_model_is_not_told_as_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the model") as found, private_file(tmp_path / "out.csv"):
        raise OSError(errno.EIO, "of the model")
    assert not isinstance(found.value, StorageError) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_long_text_in_a_column_nobody_reads_takes_no_memory(tmp_path: Path) -> None:
    """As an array of text of one width, 20,000 rows beside 200,000 letters were 16 GB."""
    path = heart_table(tmp_path, {3: {"note": "x" * 200_000}}, extra={"note": "short"})
    frame = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False)] * 300, ignore_index=True)
    frame.to_csv(path, index=False)
    cohort, _ = read_heart(path)
    assert cohort.num_patients == 18_000 and cohort.attributes["note"].nbytes < 20_000_000
    with pytest.raises(SchemaError, match="row 1 .*'age'"):
        read_heart(heart_table(tmp_path, {1: {"age": "1" * 100_000}}))


def test_what_is_there_is_kept_unless_told_otherwise(command: Command, folder: Path) -> None:
    (folder / "mine.csv").write_text("mine")
    refused = command("predict", "run", "admissions.csv", "--out", "mine.csv")
    assert refused.code == 1 and (folder / "mine.csv").read_text() == "mine"
    assert command("predict", "run", "admissions.csv", "--out", "mine.csv", "--force").code == 0
    assert len(rows(folder / "mine.csv")) == 200 and stat.S_IMODE((folder / "mine.csv").stat().st_mode) == 0o600
    assert command("predict", "run", "admissions.csv", "--out", "no/folder.csv").code == 1
    assert command("predict", "run", "admissions.csv", "--out", ".").code == 1


def test_stdout_has_the_table_alone(command: Command, folder: Path) -> None:
    outcome = command("predict", "run/model/final.safetensors", "admissions.csv", "--task", "admissions.toml", "--out", "-")
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 201 and outcome.out.startswith("patient,num_records,died=1\n")
    assert command("predict", "run", "admissions.csv", "--out", "-", "--json").code == 2


def test_models_that_are_refused(command: Command, folder: Path) -> None:
    from onnx import TensorProto, helper, save

    (folder / "model.pt2").write_bytes(b"PK")
    pickled = command("predict", "model.pt2", "admissions.csv")
    assert pickled.code == 3 and "never loaded" in pickled.err
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [other])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "foreign.onnx")
    foreign = command("predict", "foreign.onnx", "admissions.csv")
    assert foreign.code == 3 and "no header of ours" in foreign.err
    (folder / "cut.onnx").write_bytes((folder / "foreign.onnx").read_bytes()[:20])
    assert command("predict", "cut.onnx", "admissions.csv").code == 3
    unknown = command("predict", "run/model/final.safetensors", "admissions.csv")
    assert unknown.code == 3 and "give it with --task" in unknown.err
    assert command("predict", "run", "admissions.csv", "--task", "heart-disease").code == 3
    assert command("predict", "nothing", "admissions.csv").code == 1
    weights = (folder / "run" / "model" / "final.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(weights[:-3])
    assert command("predict", "cut.safetensors", "admissions.csv", "--task", "admissions.toml").code == 3


def test_onnx_needs_its_package(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert 'pip install "wardround[onnx]"' in command("predict", "model.onnx", "admissions.csv").err


def test_columns_by_shape() -> None:
    breast, beats = resolve_task("breast-cancer"), resolve_task("chest-xray")
    assert column_names(beats, ()) == ("prediction",) and column_names(beats, (3,)) == ("prediction_1", "prediction_2", "prediction_3")
    assert column_names(beats, (4, 4)) == MAP_COLUMNS and "=" in column_names(breast, ())[0]
    maps = torch.tensor([[[0.0, 0.5], [1.0, 0.1]]]).numpy()
    assert as_columns(maps)[0].tolist() == pytest.approx([0.4, 1.0, 0.5])
