"""A run that starts with what another learnt: which tensors, in every engine, resumed, and what its claim says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from torch import nn

from server.run_folder import read_tensors
from server.warm_start import warm_start
from shared.errors import ConfigurationError, DataMissingError, ModelMismatchError
from shared.models import initial_parameters, mlp
from shared.task import Task, resolve_task
from simulations.simulate import execute, prepare, resume_run, start_run
from wardround import simulate
from wardround.attacking import attack_study


def wider(task: Task) -> Task:
    """The same inputs and first layer, and an output of another size."""
    return dataclasses.replace(task, model=lambda: mlp(30, 3, hidden=(8,)))


@pytest.fixture
def trained(usual) -> Path:
    return usual.folder.path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return read_tensors(path)[1]


def test_tensors_of_the_same_name_shape_and_type_are_taken_and_the_rest_is_the_seeds(tmp_path: Path) -> None:
    task = dataclasses.replace(resolve_task("breast-cancer"), model=lambda: mlp(30, 1, hidden=(8,)))
    other = initial_parameters(wider(task).model(), 99)
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.numpy.save(other, {"wardround": json.dumps({"study": "elsewhere"})}))
    start = warm_start(task, 7, file)
    seeds = initial_parameters(task.model(), 7)
    assert start.source.taken == ("0.weight", "0.bias") and start.source.fresh == ("2.weight", "2.bias") and start.source.study == "elsewhere"
    for name, value in start.parameters.items():
        np.testing.assert_array_equal(value, other[name] if name in start.source.taken else seeds[name])
    assert list(start.parameters) == list(seeds)


def test_a_model_that_is_not_there_or_shares_nothing_or_is_not_finite_is_refused(tmp_path: Path) -> None:
    task = dataclasses.replace(resolve_task("breast-cancer"), model=lambda: mlp(30, 1, hidden=(8,)))
    file = tmp_path / "model.safetensors"
    for path in (file, tmp_path):
        with pytest.raises(DataMissingError, match="expected a model to start from, found none"):
            warm_start(task, 7, path)
    file.write_bytes(b"no model")
    with pytest.raises(ModelMismatchError, match="could not read it"):
        warm_start(task, 7, file)
    for parameters, said in ((initial_parameters(nn.Linear(4, 1), 1), "shares none"), ({"0.bias": np.full(8, np.nan, np.float32)}, "NaN")):
        file.write_bytes(safetensors.numpy.save(parameters, {"wardround": "{}"}))
        with pytest.raises(ModelMismatchError, match=said):
            warm_start(task, 7, file)


@pytest.mark.parametrize("execution", ["blocks", "sequential"])
def test_the_first_round_sends_what_the_other_run_left(runner, trained: Path, execution: str) -> None:
    last = tensors_of(trained / "model" / "final.safetensors")
    still = prepare(runner.study(training={"learning_rate": 1e-30}, privacy={"unit": "none"}), None)
    folder = start_run(still, runner.out, start_from=trained)
    execute(still, folder, baselines=True, execution=execution)
    for name, value in tensors_of(folder.path / "model" / "final.safetensors").items():
        np.testing.assert_array_equal(value, last[name])
    result = json.loads((folder.path / "result.json").read_text())
    assert sorted(result["started_from"]["taken"]) == sorted(last) and result["started_from"]["fresh"] == []
    assert result["metrics"]["pooled"] == result["metrics"]["federated"], "baselines start where the study starts"


def test_its_claim_says_that_the_other_runs_promise_is_another(runner, trained: Path) -> None:
    usual = prepare(runner.study(), None)
    folder = start_run(usual, runner.out, start_from=trained)
    execute(usual, folder, baselines=False)
    not_covered = json.loads((folder.path / "privacy.json").read_text())["not_covered"]
    assert "this one started with" in not_covered[0] and "both promises" in not_covered[0]
    assert "this one started with" not in (trained / "privacy.json").read_text()


def test_one_that_was_broken_off_before_its_first_round_starts_there_again(runner, trained: Path) -> None:
    usual = prepare(runner.study(), None)
    whole = start_run(usual, runner.out, start_from=trained)
    execute(usual, whole, baselines=False)
    begun = start_run(usual, runner.out, start_from=trained)
    execute(usual, resume_run(usual, begun.path), baselines=False)
    final = "model/final.safetensors"
    assert (begun.path / final).read_bytes() == (whole.path / final).read_bytes() != (trained / final).read_bytes()
    lost = start_run(usual, runner.out, start_from=trained)
    (lost.path / "model" / "start.safetensors").unlink()
    with pytest.raises(ModelMismatchError, match="could not read it"):
        execute(usual, resume_run(usual, lost.path), baselines=False)


def test_a_resumed_run_has_its_own_start_and_an_attack_knows_the_seeds_alone(runner, trained: Path) -> None:
    with pytest.raises(ConfigurationError, match="has its own start"):
        simulate(runner.study(), out=runner.out, resume=trained, start_from=trained)
    begun = start_run(prepare(runner.study(), None), runner.out, start_from=trained)
    with pytest.raises(ConfigurationError, match="started with another run's model"):
        attack_study(runner.study(), ["canary"], run=begun.path)
