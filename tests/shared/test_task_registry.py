"""Tasks: the shipped ones on their real data, those of a schema file, those of other packages; and models as both sides build them."""

import dataclasses
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cohort import held_out_patients as split_of
from shared.errors import ConfigurationError, DataMissingError, ProtocolError, SchemaError, StorageError, UnknownTaskError
from shared.models import check_parameters, get_parameters, initial_parameters, mlp, predict_in_batches, set_parameters, template_of
from shared.task import Task, architecture_hash, resolve_task, task_names
from shared.tasks.proposal import propose_schema
from shared.tasks.tabular import load_tabular_task

HEART_DATA = Path(__file__).parents[3] / "shared" / "data" / "fed_heart_disease"
SPLIT = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}

SCHEMA_FILE = """
name = "ward"
patient = "id"
{label}
[[columns]]
name = "age"
type = "number"
low = 0
high = 120
[[columns]]
name = "sex"
type = "binary"
categories = ["f", "m"]
missing = "indicator"
[[columns]]
name = "unit"
type = "category"
categories = ["a", "b", "c"]
[model]
hidden = [4]
"""
LABELS = {
    "binary": '[label]\nname = "died"\ntype = "binary"',
    "category": '[label]\nname = "died"\ntype = "category"\ncategories = ["no", "ward", "home"]',
    "number": '[label]\nname = "died"\ntype = "number"\nlow = 0\nhigh = 30',
}
EXPECTED = {"binary": ("auroc", 1, ()), "category": ("accuracy", 3, ()), "number": ("mae", 1, ())}


def write_schema(folder: Path, kind: str) -> Path:
    path = folder / "ward.toml"
    path.write_text(SCHEMA_FILE.format(label=LABELS[kind]))
    return path


def test_breast_cancer_is_the_bundled_569() -> None:
    task = resolve_task("breast-cancer")
    cohort = task.load_cohort(None, {})
    assert (cohort.num_patients, cohort.num_records, int(cohort.labels.sum())) == (569, 569, 212)
    assert len(set(cohort.patient_ids)) == 569 and not cohort.synthetic and cohort.inputs[0].shape == (569, 30)
    assert np.abs(cohort.inputs[0]).max() <= 1 and cohort.notes["values_clipped"] == 0 and cohort.notes["records_dropped"] == 0


@pytest.mark.skipif(not HEART_DATA.is_dir(), reason=f"fed_heart_disease data are not at {HEART_DATA}")
class TestHeartDisease:
    """The four hospitals' files, where they are."""

    def test_rows_and_split_are_flambys(self) -> None:
        cohort = resolve_task("heart-disease").load_cohort(HEART_DATA, {})
        assert cohort.num_patients == cohort.num_records == 740
        test = split_of(cohort, b"any key")
        for site, (num_train, num_test) in SPLIT.items():
            here = cohort.attributes["site"] == site
            assert (int((here & ~test).sum()), int((here & test).sum())) == (num_train, num_test)

    def test_a_hospital_alone_has_the_same_patients_and_split(self) -> None:
        task = resolve_task("heart-disease")
        whole = task.load_cohort(HEART_DATA, {})
        for site, (num_train, num_test) in SPLIT.items():
            alone = task.load_cohort(HEART_DATA / f"processed.{site}.data", {})
            part = whole.select(whole.attributes["site"] == site)
            assert alone.num_patients == num_train + num_test
            assert np.array_equal(alone.inputs[0], part.inputs[0]) and np.array_equal(alone.published_test, part.published_test)

    def test_it_has_no_options(self) -> None:
        with pytest.raises(ConfigurationError, match="its loader has no option 'x'"):
            resolve_task("heart-disease").load_cohort(HEART_DATA, {"x": 1})


def test_heart_disease_without_its_files(tmp_path: Path) -> None:
    task = resolve_task("heart-disease")
    for path in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(DataMissingError):
            task.load_cohort(path, {})
    (tmp_path / "processed.va.data").write_text("1,2,3\n")
    with pytest.raises(SchemaError, match="expected 14 columns"):
        task.load_cohort(tmp_path, {})


@pytest.mark.parametrize("kind", list(LABELS))
def test_a_schema_file_is_a_task(tmp_path: Path, kind: str) -> None:
    task = resolve_task(str(write_schema(tmp_path, kind)))
    metric, num_outputs, _ = EXPECTED[kind]
    assert task.name == "ward" and task.primary_metric == metric and not task.bundled
    cohort = task.synthetic_cohort(60, 3)
    assert cohort.synthetic and cohort.num_patients == 60 and cohort.inputs[0].shape == (60, 6)
    outputs = task.model()(torch.from_numpy(cohort.inputs[0]))
    losses = task.loss(outputs, torch.from_numpy(cohort.labels))
    assert outputs.shape == (60, num_outputs) and losses.shape == (60,) and torch.isfinite(losses).all()
    predictions = task.predict(outputs).detach().numpy().astype(np.float64)
    for statistic in {item.statistic.name: item.statistic for item in task.metrics}.values():
        assert statistic.summarise(predictions, cohort).shape == statistic.shape == task.statistics[statistic.name]


def test_a_schema_file_reads_its_csv(tmp_path: Path) -> None:
    task = load_tabular_task(write_schema(tmp_path, "binary"))
    (tmp_path / "data.csv").write_text("id,age,sex,unit,died,extra\n7,30,f,a,0,x\n8,60,,b,1,x\n7,90,m,c,1,x\n")
    cohort = task.load_cohort(tmp_path / "data.csv", {})
    assert cohort.patient_ids == ("7", "8") and cohort.patient_of_record.tolist() == [0, 1, 0] and cohort.labels.tolist() == [0, 1, 1]
    assert cohort.inputs[0].tolist() == [[-0.5, 0, 0, 1, 0, 0], [0, 0.5, 1, 0, 1, 0], [0.5, 1, 0, 0, 0, 1]]
    with pytest.raises(DataMissingError, match="has no data of its own"):
        task.load_cohort(None, {})


def test_a_loss_does_not_cross_records(tmp_path: Path) -> None:
    for kind in LABELS:
        task = load_tabular_task(write_schema(tmp_path, kind))
        cohort = task.synthetic_cohort(12, 0)
        outputs, labels = torch.randn(12, EXPECTED[kind][1], generator=torch.Generator().manual_seed(0)), torch.from_numpy(cohort.labels)
        alone = torch.cat([task.loss(outputs[index : index + 1], labels[index : index + 1]) for index in range(12)])
        torch.testing.assert_close(task.loss(outputs, labels), alone)


@pytest.mark.parametrize("name", ["breast-cancer", "heart-disease"])
def test_synthetic_patients_are_seeded_and_learnable(name: str) -> None:
    task = resolve_task(name)
    one, same, other = task.synthetic_cohort(300, 1), task.synthetic_cohort(300, 1), task.synthetic_cohort(300, 2)
    assert np.array_equal(one.inputs[0], same.inputs[0]) and not np.array_equal(one.inputs[0], other.inputs[0])
    assert one.num_patients == 300 and 0.2 < one.labels.mean() < 0.8
    signal = np.linalg.lstsq(np.c_[one.inputs[0], np.ones(300)], one.labels, rcond=None)[0]
    guess = np.c_[other.inputs[0], np.ones(300)] @ signal > 0.5
    assert (guess == other.labels).mean() > 0.7  # what is learned of one cohort holds for another


def test_a_proposal_takes_no_range_from_the_data(tmp_path: Path) -> None:
    path = tmp_path / "my table.csv"
    rows = "\n".join(f"p{index},{17.25 + index},{71.5 * index},{'fm'[index % 2]},{index % 2}" for index in range(40))
    path.write_text("patient_id,age,creatinine,sex,died\n" + rows + "\n")
    proposal = propose_schema(path)
    assert proposal.questions == ["age: low and high", "creatinine: low and high"]
    for value in ("17.25", "56.25", "71.5", "2788", "p0", "p39"):
        assert value not in proposal.toml
    table = tomllib.loads(proposal.toml)
    assert table["name"] == "my-table" and table["patient"] == "patient_id" and table["label"]["name"] == "died"
    assert not any("low" in column or "high" in column for column in table["columns"])
    proposal.write(tmp_path / "schema.toml")
    with pytest.raises(ConfigurationError, match="expected low and high, the plausible range known without looking at the data"):
        load_tabular_task(tmp_path / "schema.toml")
    with pytest.raises(StorageError, match="exists already"):
        proposal.write(tmp_path / "schema.toml")
    filled = proposal.toml.replace("# low =  ", "low = 0 ").replace("# high = ", "high = 5000 ")
    (tmp_path / "filled.toml").write_text(filled)
    assert load_tabular_task(tmp_path / "filled.toml").load_cohort(path, {}).num_patients == 40


def test_a_proposal_asks_for_its_label(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("u,v\n1,0\n2,1\n")
    with pytest.raises(ConfigurationError, match="which column is to be predicted"):
        propose_schema(path)
    with pytest.raises(ConfigurationError, match=r"--label: no column 'w'"):
        propose_schema(path, label="w")
    assert tomllib.loads(propose_schema(path, label="v").toml)["label"]["type"] == "binary"


def test_unknown_names_are_answered_with_near_ones() -> None:
    known = ", ".join(task_names())
    with pytest.raises(UnknownTaskError, match=rf"no task 'breast-cancr' \(did you mean 'breast-cancer'\?\); known: {known}"):
        resolve_task("breast-cancr")
    assert set(task_names()) >= {"breast-cancer", "heart-disease"}


def test_a_factory_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wardround_test_tasks.py").write_text(
        "from shared.tasks.breast_cancer import breast_cancer as good\n"
        "ready = good()\n"
        "number = 3\n"
        "def fails():\n    raise RuntimeError('patient Jane Doe')\n"
        "def wrong():\n    return 'a task'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_task("wardround_test_tasks:good").name == resolve_task("wardround_test_tasks:ready").name == "breast-cancer"
    for target, message in (
        ("wrong", "expected a Task, got str"),
        ("number", "expected a Task, got int"),
        ("fails", "its factory raised RuntimeError"),
    ):
        with pytest.raises(ConfigurationError, match=message) as caught:
            resolve_task(f"wardround_test_tasks:{target}")
        assert "Jane" not in str(caught.value)
    for target in ("wardround_test_tasks:absent", "no_such_package:task"):
        with pytest.raises(UnknownTaskError):
            resolve_task(target)
    with pytest.raises(ConfigurationError):
        resolve_task(":x")
    sys.modules.pop("wardround_test_tasks", None)


def test_a_primary_metric_must_be_one_of_the_metrics() -> None:
    task = resolve_task("breast-cancer")
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task) if field.init}
    with pytest.raises(ConfigurationError, match="primary_metric: expected one of auroc"):
        Task(**{**fields, "primary_metric": "dice"})


def test_fingerprints_tell_tasks_apart(tmp_path: Path) -> None:
    path = write_schema(tmp_path, "binary")
    first = load_tabular_task(path).fingerprint()
    assert first == load_tabular_task(path).fingerprint()
    for old, new in (
        ("high = 120", "high = 121"),
        ("hidden = [4]", "hidden = [5]"),
        ('name = "ward"', 'name = "ward2"'),
        ("hidden = [4]", "dropout = 0.1"),
    ):
        path.write_text(SCHEMA_FILE.format(label=LABELS["binary"]).replace(old, new))
        assert load_tabular_task(path).fingerprint() != first


def test_parameters_go_in_and_come_out_whole() -> None:
    model = mlp(5, 2, hidden=(4, 3), dropout=0.1)
    parameters = initial_parameters(model, 7)
    other = mlp(5, 2, hidden=(4, 3), dropout=0.1)
    set_parameters(other, parameters)
    assert all(np.array_equal(value, parameters[name]) for name, value in get_parameters(other).items())
    parameters["0.weight"][:] = 9.0
    assert not (get_parameters(other)["0.weight"] == 9).any() and not (get_parameters(model)["0.weight"] == 9).any()  # copies
    assert architecture_hash(model) == architecture_hash(other) != architecture_hash(mlp(5, 2, hidden=(4, 3)))


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initial_parameters(mlp(5, 2, hidden=(4,)), 7)
    torch.manual_seed(2)
    model = mlp(5, 2, hidden=(4,))
    state = torch.get_rng_state()
    second = initial_parameters(model, 7)
    assert torch.equal(torch.get_rng_state(), state)  # and leave torch's generator as it was
    third = initial_parameters(mlp(5, 2, hidden=(4,)), 8)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not any(np.array_equal(first[name], third[name]) for name in first)


def test_parameters_that_do_not_fit_change_nothing() -> None:
    model = mlp(3, 1)
    before = get_parameters(model)
    with pytest.raises(ProtocolError, match=r"tensor 0.bias: expected finite values"):
        set_parameters(model, {**before, "0.weight": before["0.weight"] + 1, "0.bias": np.array([np.nan], dtype=np.float32)})
    assert all(np.array_equal(value, before[name]) for name, value in get_parameters(model).items())
    with pytest.raises(ProtocolError, match="expected 2 named tensors, got 1"):
        check_parameters({"0.weight": before["0.weight"]}, template_of(before))


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    model = mlp(4, 2, hidden=(3,), dropout=0.5)
    inputs = (np.random.default_rng(0).normal(size=(25, 4)).astype(np.float32),)
    torch.testing.assert_close(predict_in_batches(model, inputs, batch_size=7), predict_in_batches(model, inputs))
    assert predict_in_batches(model, inputs).shape == (25, 2) and not model.training


def test_what_is_made_once_stays_as_it_was_whoever_writes_to_it() -> None:
    task = resolve_task("breast-cancer")
    for make in (task.trial_patients, lambda: task.load_cohort(None, {})):
        first = make()
        before = [values.copy() for values in (*first.inputs, first.labels)]
        for values in (*first.inputs, first.labels):
            values[...] = 0  # as a model may do in place
        again = make()
        assert all(np.array_equal(old, new) for old, new in zip(before, (*again.inputs, again.labels), strict=True))
