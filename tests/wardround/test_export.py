"""`wardround export`: what is written agrees with what was trained, or is not written; and it says nothing of a machine or a patient."""

import hashlib
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from shared.errors import ConfigurationError, ModelMismatchError, StorageError
from shared.study import Study
from shared.task import Task, resolve_task, task_names
from tests.wardround.conftest import Command
from wardround import deploying
from wardround.deploying import (
    Deployed,
    check_agreement,
    export_facts,
    export_model,
    exported_bytes,
    onnx_session,
    portable,
    read_onnx_facts,
    torch_session,
)
from wardround.run import simulate
from wardround.trained import Trained, read_trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a private run of one round; tests that alter one take a copy."""
    study = Study.load(ROOT / "studies" / "breast-cancer.toml").replace(rounds={"count": 1}, federation={"sites": 2})
    return simulate(study, out=tmp_path_factory.mktemp("runs")).path


def untrained(task: Task) -> Trained:
    """A model as it is before its first round, in place of a trained one."""
    torch.manual_seed(5)
    return Trained(task=task, model=task.model().eval(), source=Path("final.safetensors"), study="s", study_hash="h", sha256="0" * 64)


@pytest.mark.slow
def test_onnx_agrees_and_says_what_it_is(command: Command, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    data = command("export", "run", "--json").data
    path = folder / "model" / "final.onnx"
    assert data["model"] == str(path.relative_to(tmp_path)) and float(str(data["largest_difference"])) <= 1e-4
    assert {file.name for file in path.parent.iterdir()} == {
        "final.safetensors", "final.onnx", "final.onnx.json", "final.model-card.html", "final.model-card.md",
    }  # fmt: skip
    content = path.read_bytes()
    for word in (b"/site-packages/", b"stack_trace", str(ROOT).encode(), str(tmp_path).encode(), b"pkg.torch"):
        assert word not in content
    facts = read_onnx_facts(path, content)
    trained = read_trained(folder)
    assert facts.weights_sha256 == hashlib.sha256(trained.source.read_bytes()).hexdigest()
    assert (facts.task, facts.task_fingerprint) == ("breast-cancer", trained.task.fingerprint())
    claim = json.loads((folder / "privacy.json").read_text())
    assert (facts.epsilon, facts.privacy_unit, facts.privacy_protects) == (claim["federation"]["epsilon"], "patient", False)
    latency = data["latency_ms"]
    assert isinstance(latency, dict) and set(latency) == {"torch", "onnxruntime"} and min(latency.values()) > 0
    direct, session = torch_session(trained.task, trained.model), onnx_session(content)
    patients = trained.task.synthetic_cohort(300, 9).inputs
    for size in (1, 3, 300):
        batch = tuple(values[:size] for values in patients)
        np.testing.assert_allclose(session(batch), direct(batch), atol=1e-6)
    again = command("predict", path, "--out", "predictions.csv", "--json")
    assert again.data["num_patients"] == 569
    path.write_bytes(content.replace(b"breast", b"bxeast"))
    assert command("predict", path, "--out", "others.csv").code == 3
    path.write_bytes(content + b"\0" * 8)
    altered = command("predict", path, "--out", "others.csv")
    assert altered.code == 3 and not (tmp_path / "others.csv").exists()


@pytest.mark.slow
def test_torch_export_holds_no_example_and_no_source(run: Path, tmp_path: Path) -> None:
    done = export_model(run, "torch-export", out=tmp_path / "deep" / "model.pt2")
    assert done.largest_difference <= 1e-6 and set(done.latency_ms) == {"torch", "torch-export"}
    with zipfile.ZipFile(done.path) as archive:
        sizes = {name.partition("/")[2]: archive.getinfo(name).file_size for name in archive.namelist()}
        assert sizes["data/sample_inputs/model.pt"] == 0
        whole = b"".join(archive.read(name) for name in archive.namelist())
        facts = json.loads(archive.read(next(name for name in archive.namelist() if name.endswith("wardround.json"))))
    assert b"stack_trace" not in whole and b"site-packages" not in whole
    assert (
        facts["task"] == "breast-cancer" and json.loads(done.facts_file.read_text())["sha256"] == hashlib.sha256(done.path.read_bytes()).hexdigest()
    )
    program = torch.export.load(io.BytesIO(done.path.read_bytes())).module()
    assert program(torch.zeros(1, 30)).shape == (1,) and program(torch.zeros(50, 30)).shape == (50,)
    with pytest.raises(Exception, match="expected a new file"):
        export_model(run, "torch-export", out=done.path)
    export_model(run, "torch-export", out=done.path, force=True)


def test_what_does_not_agree_is_not_written(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deploying, "TOLERANCE", -1.0)
    outcome = command("export", run, "--format", "torch-export", "--out", "model.pt2")
    assert outcome.code == 3 and "expected an exported model that agrees" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("changed", "agrees"),
    [(lambda p: p + 5e-5, True), (lambda p: p + 2e-4, False), (lambda p: p * np.nan, False), (lambda p: p[:, None], False), (lambda p: p[:1], False)],
)
def test_agreement_is_to_1e_4_in_value_and_shape(changed: object, agrees: bool) -> None:
    patients = (np.linspace(0, 1, 16, dtype=np.float32),)

    def direct(arrays: deploying.Arrays) -> np.ndarray:
        return arrays[0]

    def session(arrays: deploying.Arrays) -> np.ndarray:
        return changed(arrays[0])  # type: ignore[operator]

    if agrees:
        assert 4e-5 < check_agreement(direct, session, patients, task="t") <= 1e-4
        return
    with pytest.raises(ConfigurationError, match="expected an exported model that agrees"):
        check_agreement(direct, session, patients, task="t")


class Reading(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 1)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.layer(series)[0][:, -1])
        return output


@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN])
def test_recurrent_layers_of_opacus_become_plain_ones(kind: type[nn.Module]) -> None:
    options = {"nonlinearity": "relu"} if kind is DPRNN else {}
    model = Reading(kind(5, 4, num_layers=2, bidirectional=True, batch_first=True, **options), 8).eval()
    series = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(1))
    plain = portable(Deployed(model, torch.sigmoid), (series,))
    assert isinstance(plain.model.layer, nn.RNNBase)  # type: ignore[union-attr]
    torch.testing.assert_close(plain(series), torch.sigmoid(model(series)), atol=1e-6, rtol=0)
    assert type(model.layer) is kind, "the model itself is as it was"


class Looking(nn.Module):
    """Opacus' own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = DPMultiheadAttention(8, 2), nn.Linear(8, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        steps = values.transpose(0, 1)
        output: torch.Tensor = self.head(self.attention(steps, steps, steps)[0].mean(dim=0))
        return output


@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_attention_of_opacus_exports(format: deploying.Format) -> None:
    base = resolve_task("breast-cancer")
    task = altered(base, model=Looking)
    trained = untrained(task)
    patients = (np.random.default_rng(3).normal(size=(16, 5, 8)).astype(np.float32),)
    facts = export_facts(trained, format)
    data = exported_bytes(task, trained.model, facts, patients)
    session = onnx_session(data) if format == "onnx" else deploying._program_session(data)
    assert check_agreement(torch_session(task, trained.model), session, patients, task=task.name) <= 1e-4


def altered(task: Task, **changes: object) -> Task:
    """The task with other fields."""
    from dataclasses import fields

    return Task(**({field.name: getattr(task, field.name) for field in fields(task) if field.init} | changes))  # type: ignore[arg-type]


class Odd(nn.Module):
    """Goes a way that depends on the numbers, as no exporter follows."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values if float(values.sum()) > 0 else -values


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": lambda: nn.Sequential(nn.Linear(30, 4), Odd(), nn.Linear(4, 1))}, r"layer '1' \(Odd\)"),
        ({"predict": lambda outputs: torch.sigmoid(outputs[:, 0]) if float(outputs.sum()) > 0 else outputs[:, 0]}, "its forward or its predict"),
    ],
)
def test_what_cannot_be_exported_names_its_layer(changes: dict[str, object], named: str) -> None:
    task = altered(resolve_task("breast-cancer"), **changes)
    trained = untrained(task)
    with pytest.raises(ConfigurationError, match=named):
        exported_bytes(task, trained.model, export_facts(trained, "torch-export"), task.synthetic_cohort(16, 0).inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", task_names())
def test_every_task_exports_to_onnx(name: str) -> None:
    task = resolve_task(name)
    trained = untrained(task)
    patients = task.synthetic_cohort(deploying.NUM_SYNTHETIC, 0).inputs
    facts = export_facts(trained, "onnx")
    session = onnx_session(exported_bytes(task, trained.model, facts, patients))
    assert check_agreement(torch_session(task, trained.model), session, patients, task=name) <= 1e-4
    assert [part.shape for part in facts.inputs] == [values.shape[1:] for values in patients]


def test_a_package_that_is_missing_is_named_with_its_extra(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = command("export", run)
    assert outcome.code == 3 and 'pip install "wardround[onnx]"' in outcome.err
    assert command("predict", "model.onnx", "data").code == 3


def test_runs_that_cannot_be_exported(command: Command, run: Path, tmp_path: Path) -> None:
    told = command("export", "nowhere", "--format", "torch-export")
    assert told.code == 1 and "found nothing" in told.err
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    wrong = command("export", "run", "--format", "torch-export", "--task", "heart-disease")
    assert wrong.code == 3 and "got one of task 'breast-cancer'" in wrong.err
    (folder / "model" / "final.safetensors").unlink()
    told = command("export", "run", "--format", "torch-export")
    assert told.code == 1 and "no final model" in told.err and "--resume run" in told.err
    (folder / "result.json").unlink()
    told = command("export", "run", "--format", "torch-export", "--json")
    assert told.code == 1 and "cut off" in str(told.data["what"])
    (tmp_path / "empty").mkdir()
    assert command("export", "empty", "--format", "torch-export").code == 1
    assert command("export", run, "--format", "pickle").code == 2


@pytest.mark.parametrize("there", ["m.pt2", "m.pt2.json", "m.model-card.html", "m.model-card.md"])
def test_none_of_the_four_files_is_replaced_unless_told(run: Path, tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / there).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "exported_bytes", lambda *_: pytest.fail("something was run before all four were looked at"))
        with pytest.raises(StorageError, match=f"{there}: expected a new file"):
            export_model(run, "torch-export", out=tmp_path / "m.pt2")
    assert [file.name for file in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


def test_beside_a_model_that_stands_alone_nothing_is_replaced_either(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    shutil.copy(run / "model" / "final.safetensors", alone)
    (tmp_path / "alone.pt2").write_text("mine")
    with pytest.raises(StorageError, match="expected a new file"):
        export_model(alone, "torch-export")
    assert (tmp_path / "alone.pt2").read_text() == "mine"
    export_model(alone, "torch-export", force=True)


def test_our_header_on_another_graph_is_another_model(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    facts = export_facts(untrained(resolve_task("breast-cancer")), "onnx")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 5]) for name in ("other", "prediction")]
    graph = helper.make_graph([helper.make_node("Identity", ["other"], ["prediction"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key=deploying.HEADER, value=facts.model_dump_json())
    with pytest.raises(ModelMismatchError, match="inputs that its header names"):
        read_onnx_facts(tmp_path / "fake.onnx", model.SerializeToString())
