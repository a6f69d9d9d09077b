"""`wardround predict`: one row a patient, from data that fit; nothing half-written, and nobody else's to read."""

import csv
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shared.errors import ConfigurationError
from shared.models import predict_in_batches
from shared.study import Study
from shared.task import resolve_task
from tests.client.test_data_check import table
from tests.wardround.conftest import Command
from tests.wardround.test_data_cli import SCHEMA
from wardround.predicting import MAP_COLUMNS, Predictor, as_columns, column_names, open_predictor, predict
from wardround.run import simulate
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

    counted = Predictor(task=predictor.task, session=counting, cohort=predictor.cohort, columns=predictor.columns, labels_read=True)
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
    from shared.errors import DataError
    from wardround.predicting import write_rows
    from wardround.private_files import private_file

    found = open_predictor(trained_folder / "run", trained_folder / "admissions.csv")
    calls = []

    def failing(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        calls.append(len(arrays[0]))
        return np.full(len(arrays[0]), 0.5 if len(calls) < 2 else np.nan)

    predictor = Predictor(task=found.task, session=failing, cohort=found.cohort, columns=found.columns, labels_read=True)
    with pytest.raises(DataError, match="finite"), private_file(tmp_path / "out.csv") as file:
        for row in predictor.rows(batch_size=100):
            file.write(row.patient)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []
    with pytest.raises(DataError), private_file(tmp_path / "out.csv") as file:
        write_rows(predictor, file)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_a_row_is_not_written(trained_folder: Path) -> None:
    found = open_predictor(trained_folder / "run", trained_folder / "admissions.csv")
    for values, fits in ((np.full((400, 3, 2), 0.25), True), (np.full((400, 3, 2), 7.0), False)):
        predictor = Predictor(task=found.task, session=lambda _, v=values: v, cohort=found.cohort, columns=MAP_COLUMNS, labels_read=True)
        if fits:
            assert next(predictor.rows()).values == (0.25, 0.25, 0.0)
            continue
        with pytest.raises(ConfigurationError, match="which fit a row"):
            next(predictor.rows())


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
