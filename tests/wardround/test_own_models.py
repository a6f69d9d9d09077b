"""`wardround site model`: what a personal strategy left at a site, as a model that every other command takes."""

import json
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from server.run_folder import read_tensors
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ModelMismatchError
from shared.models import predict_in_batches
from shared.study import Study
from simulations.simulate import prepare
from tests.wardround.conftest import Command
from wardround.report.markdown import markdown
from wardround.report.model_card import model_card_document
from wardround.report.run_files import read_run
from wardround.run import simulate
from wardround.trained import Owner, read_trained

STRATEGIES = ("ditto", "apfl", "fedper", "fine-tuning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with models of the sites' own; tests that alter it take a copy."""
    return simulate(study_of("ditto"), out=tmp_path_factory.mktemp("own")).path


def study_of(strategy: str, **privacy: object) -> Study:
    """Two rounds over three sites."""
    return Study.from_table(
        {
            "name": "own", "task": "breast-cancer", "seed": 5, "rounds": {"count": 2}, "training": {"learning_rate": 0.5, "local_steps": 3},
            "strategy": {"name": strategy}, "privacy": privacy or {"unit": "none"}, "evaluation": {"bootstrap": 0},
            "federation": {"sites": 3, "partition": "dirichlet", "alpha": 0.5},
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("private", [False, True])
def test_a_site_s_file_is_the_model_by_which_it_was_judged(command: Command, tmp_path: Path, strategy: str, private: bool) -> None:
    study = study_of(strategy, **({"epsilon": 8.0, "delta": 1e-4} if private else {}))
    run = simulate(study, out=tmp_path)
    federation = prepare(study, None).federation
    assert federation is not None
    result, found = json.loads((run.path / "result.json").read_text()), []
    for name, cohort in federation.cohorts.items():
        out = tmp_path / f"{name}.safetensors"
        outcome = command("site", "model", run.path, name, "--out", out, "--json")
        assert outcome.code == 0 and outcome.data["site"] == name and stat.S_IMODE(out.stat().st_mode) == 0o600, outcome.err
        own = read_trained(out)
        tested = cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY, published=False))
        risk = own.task.predict(predict_in_batches(own.model, tested.inputs)).numpy()
        assert result["per_site"][name]["accuracy"] == pytest.approx(float(((risk >= 0.5) == tested.labels).mean()), abs=1e-9)
        assert result["per_site"][name]["brier"] == pytest.approx(float(np.square(risk - tested.labels).mean()), abs=2e-3), "a sum over a grid"
        found.append(out.read_bytes())
    assert len(set(found)) == 3, "each site has another"


def test_what_has_no_own_model_is_refused_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    shared = simulate(study_of("fedavg"), out=tmp_path).path
    assert "expected one with models of the sites' own" in (outcome := command("site", "model", shared, "site-1")).err and outcome.code == 3
    own = simulate(study_of("ditto"), out=tmp_path).path
    assert command("site", "model", own, "site-9").code == 5
    assert command("site", "model", own, "site-1", "--out", own / "model" / "own.safetensors").code == 3
    for path in (own / "ledgers" / "site-1.releases").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert command("site", "model", own, "site-1").code == 1
    for path in (own / "ledgers" / "site-1.releases").iterdir():
        path.unlink()
    assert command("site", "model", own, "site-1").code == 5
    assert not list(tmp_path.glob("**/own.safetensors"))


def test_predict_takes_it_and_says_whose_the_run_s_model_is(command: Command, tmp_path: Path) -> None:
    run = simulate(study_of("fedper"), out=tmp_path).path
    assert "wardround site model" in command("predict", run).err
    assert command("site", "model", run, "site-2", "--out", "own.safetensors").code == 0
    outcome = command("predict", "own.safetensors")
    assert outcome.code == 0, outcome.err


SAID = "the own model of site site-2, left there by run {run}: it is made of that hospital's patients, and is the hospital's alone"


@pytest.mark.slow
@pytest.mark.parametrize(("format", "file"), [("onnx", "own.onnx"), ("torch-export", "own.pt2")])
def test_whoever_uses_it_is_told_whose_it_is(command: Command, made: Path, tmp_path: Path, format: str, file: str) -> None:
    """From file to file: nothing of it is anybody else's to read, and nothing forgets whose it is."""
    assert command("site", "model", made, "site-2").code == 0
    header, _ = read_tensors(tmp_path / "own.safetensors")
    assert (header["own_model_of"], header["run"]) == ("site-2", made.name)
    said = SAID.format(run=made.name)
    assert said in (outcome := command("predict", "own.safetensors", "--json")).err and outcome.data["own_model_of"] == "site-2"
    outcome = command("export", "own.safetensors", "--format", format, "--json")
    assert said in outcome.err and outcome.data["own_model_of"] == "site-2" and outcome.data["cards"] == []
    for path in (tmp_path / file, tmp_path / f"{file}.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    facts = json.loads((tmp_path / f"{file}.json").read_text())
    assert (facts["own_model_of"], facts["own_model_run"], facts["privacy_unit"]) == ("site-2", made.name, "unknown")
    assert command("export", "own.safetensors", "--format", format).code == 1, "what is there is not replaced"
    if format == "onnx":
        assert said in command("predict", file, "--out", "again.csv").out
    else:
        assert command("export", "own.safetensors", "--format", format, "--force").code == 0


def test_the_page_of_explain_says_whose_model_it_explains(command: Command, made: Path, tmp_path: Path) -> None:
    assert command("site", "model", made, "site-2").code == 0
    outcome = command("explain", "own.safetensors", "--patients", "5", "--json")
    assert outcome.code == 0 and outcome.data["own_model_of"] == "site-2" and SAID.format(run=made.name) in outcome.err
    assert f"own model of site site-2, run {made.name}" in (tmp_path / "explanation.html").read_text()
    assert command("explain", made, "--patients", "5", "--out", "shared.html", "--json").data["own_model_of"] is None
    assert "own model of site" not in (tmp_path / "shared.html").read_text()


def test_it_is_not_exported_into_a_run_s_folder_nor_taken_for_the_run_s_model(command: Command, made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    assert command("site", "model", run, "site-2").code == 0
    before = sorted(run.rglob("*"))
    refused = command("export", "own.safetensors", "--format", "torch-export", "--out", run / "model" / "final.pt2")
    assert refused.code == 3 and "outside the run's folder" in refused.err and sorted(run.rglob("*")) == before
    assert "own model of" not in markdown(model_card_document(read_run(run)))
    shutil.copy(tmp_path / "own.safetensors", run / "model" / "final.safetensors")
    with pytest.raises(ModelMismatchError, match="expected the model that the sites share, got the own model of site site-2"):
        read_trained(run)
    assert command("export", "run", "--format", "torch-export").code == 3
    assert "the own model of site site-2" in markdown(model_card_document(read_run(run))).replace("\\", "")


def test_a_name_from_a_file_is_one_line_of_a_terminal() -> None:
    owner = Owner.of({"own_model_of": "north\x1b[2J\nevil", "run": "r\r"})
    assert owner is not None and owner.sentence.isprintable() and Owner.of({"task": "t"}) is None


# Whose code is run ----------------------------------------------------------------------------------------------------------------------


FACTORY = """
from pathlib import Path

from shared.task import resolve_task

Path("this code was run").touch()


def breasts():
    return resolve_task("breast-cancer")
"""
USES = (
    ("site", "model", "run", "site-1", "--out"),
    ("predict", "run", "--out"),
    ("export", "run", "--format", "torch-export", "--out"),
    ("explain", "run", "--patients", "5", "--out"),
)


@pytest.fixture
def foreign(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run whose study names code that lies in the folder in which commands are run."""
    run = Path(shutil.copytree(made, tmp_path / "run"))
    (tmp_path / "from_elsewhere.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    study = run / "study.toml"
    study.write_text(study.read_text().replace('task = "breast-cancer"', 'task = "from_elsewhere:breasts"'))
    final = run / "model" / "final.safetensors"
    hashes = [Study.load(path).fingerprint().encode() for path in (made / "study.toml", study)]
    assert hashes[0] != hashes[1] and final.read_bytes().count(hashes[0]) == 1
    final.write_bytes(final.read_bytes().replace(*hashes))
    return run


@pytest.mark.parametrize("use", USES, ids=lambda use: use[0])
def test_code_that_only_a_run_s_files_name_is_run_when_somebody_says_so(
    command: Command, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: tuple[str, ...]
) -> None:
    monkeypatch.delitem(sys.modules, "from_elsewhere", raising=False)
    refused = command(*use, "out")
    assert refused.code == 3 and "--task from_elsewhere:breasts" in refused.err and "'from_elsewhere:breasts' is code that nothing but" in refused.err
    assert "from_elsewhere" not in sys.modules and not (tmp_path / "this code was run").exists() and not (tmp_path / "out").exists()
    done = command(*use, "out", "--task", "from_elsewhere:breasts")
    assert done.code == 0 and (tmp_path / "this code was run").exists() and (tmp_path / "out").exists(), done.err
    monkeypatch.delitem(sys.modules, "from_elsewhere", raising=False)


def test_what_came_with_this_installation_needs_no_word(command: Command, tmp_path: Path) -> None:
    study = study_of("fedavg").replace(task="shared.tasks.breast_cancer:normalised", rounds={"count": 1})
    assert command("predict", simulate(study, out=tmp_path).path).code == 0


@pytest.mark.parametrize(
    "named", ["webbrowser:get", "shared.tasks.breast_cancer.os:getcwd", "shared.tasks:breast_cancer", "shared.tasks.a:b.c", "sharedxtasks.a:b"]
)
def test_what_only_looks_like_it_does(command: Command, foreign: Path, named: str) -> None:
    study = foreign / "study.toml"
    study.write_text(study.read_text().replace("from_elsewhere:breasts", named))
    assert f"--task {named}" in command("predict", "run").err
