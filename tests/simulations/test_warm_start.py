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
from shared.results import FederationClaim, PrivacyClaim, StartedFrom
from shared.task import Task, resolve_task
from shared.whole_promise import WholePromise, whole_promise
from simulations.simulate import execute, prepare, resume_run, start_run
from wardround import simulate
from wardround.attacking import attack_study
from wardround.deploying import export_facts
from wardround.report.model_card import front_matter
from wardround.report.run_files import read_run
from wardround.report.summary import banners
from wardround.trained import read_trained


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


def test_its_claim_begins_with_what_the_other_run_promised(runner, trained: Path) -> None:
    usual = prepare(runner.study(), None)
    folder = start_run(usual, runner.out, start_from=trained)
    execute(usual, folder, baselines=False)
    claim, before = (json.loads((path / "privacy.json").read_text()) for path in (folder.path, trained))
    start = claim["started_from"]
    assert claim["statement"].startswith("This is said of this run's own updates alone, and not of the model that it started with.")
    assert "this one started with" in claim["not_covered"][0] and "add up" in claim["not_covered"][0] and "seeded noise" in claim["not_covered"][0]
    assert (start["unit"], start["protects"], start["epsilon"], start["share"]) == ("patient", False, before["federation"]["epsilon"], 1.0)
    assert "this one started with" not in (trained / "privacy.json").read_text() and before["started_from"] is None
    again = warm_start(usual.task, 7, folder.path).source  # a chain of starts adds up
    assert again.epsilon == pytest.approx(before["federation"]["epsilon"] + claim["federation"]["epsilon"]) and again.unit == "patient"


@pytest.mark.slow
def test_a_start_without_a_promise_leaves_none_to_the_model(runner, trained: Path, tmp_path: Path) -> None:
    """Whoever was a patient of the first run is protected by nothing, and every paper of the second says so."""
    still = prepare(runner.study(training={"learning_rate": 1e-30}, privacy={"unit": "none"}), None)
    first = start_run(still, runner.out, start_from=trained)  # without privacy, though it began with a model that had some
    execute(still, first, baselines=False)
    said = json.loads((first.path / "privacy.json").read_text())
    assert said["unit"] == "none" and "started with" in said["not_covered"][0]
    usual = prepare(runner.study(), None)
    second = start_run(usual, runner.out, start_from=first.path)
    execute(usual, second, baselines=False)
    claim = json.loads((second.path / "privacy.json").read_text())
    assert claim["started_from"]["unit"] == "none" and "which promised nothing" in claim["statement"].partition("differential")[0]
    for path, unit in ((second.path, "none"), (third_from_a_lone_file(runner, trained, tmp_path), "unknown")):
        facts = export_facts(read_trained(path), "onnx")
        assert (facts.privacy_unit, facts.privacy_protects, facts.epsilon, facts.delta) == (unit, False, None, None)
        assert facts.started_from is not None and facts.started_from.unit == unit
        front = front_matter(read_run(path))
        assert "differential-privacy" not in front and "# privacy: none; it started with a model of study" in front
        page = " ".join(f"{banner.title} {banner.text}" for banner in banners(read_run(path)))
        assert "This run started with another run" in page and "100 % of the parameters" in page


def third_from_a_lone_file(runner, trained: Path, tmp_path: Path) -> Path:
    """A private run that started with a model's file without its run."""
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((trained / "model" / "final.safetensors").read_bytes())
    usual = prepare(runner.study(), None)
    folder = start_run(usual, runner.out, start_from=alone)
    execute(usual, folder, baselines=False)
    return folder.path


@pytest.mark.parametrize(
    ("own", "start", "expected"),
    [
        ({}, {}, WholePromise(unit="patient", protects=True, epsilon=5.0, delta=3e-4)),
        ({}, {"protects": False}, WholePromise(unit="patient", protects=False, epsilon=5.0, delta=3e-4)),
        ({"protects": False}, {}, WholePromise(unit="patient", protects=False, epsilon=5.0, delta=3e-4)),
        ({}, {"unit": "record"}, WholePromise(unit="unknown")),
        ({}, {"unit": "unknown", "epsilon": None}, WholePromise(unit="unknown")),
        ({}, {"unit": "none", "epsilon": None}, WholePromise(unit="none")),
        ({"unit": "none"}, {}, WholePromise(unit="none")),
    ],
)
def test_both_promises_are_the_sum_of_two_that_are_for_the_same_unit(own: dict, start: dict, expected: WholePromise) -> None:
    claim = PrivacyClaim.model_construct(
        unit=own.get("unit", "patient"), protects=own.get("protects", True), site_level=None,
        federation=FederationClaim(epsilon=2.0, delta=1e-4, basis="maximum, patients are disjoint by declaration"),
    )  # fmt: skip
    other = StartedFrom(
        **{"study": "s", "sha256": "", "taken": (), "fresh": (), "unit": "patient", "protects": True, "epsilon": 3.0, "delta": 2e-4, **start}
    )
    found = whole_promise(claim, other)
    assert (found.unit, found.protects, found.epsilon) == (expected.unit, expected.protects, expected.epsilon)
    assert found.delta == (None if expected.delta is None else pytest.approx(expected.delta))


def test_a_start_that_shares_a_bias_alone_is_refused_by_its_share(tmp_path: Path) -> None:
    task = resolve_task("breast-cancer")
    file = tmp_path / "model.safetensors"
    shared_bias = initial_parameters(mlp(12, 1, hidden=()), 1)
    file.write_bytes(safetensors.numpy.save(shared_bias, {"wardround": json.dumps({"study": "elsewhere"})}))
    other = dataclasses.replace(task, model=lambda: mlp(30, 1, hidden=()))
    with pytest.raises(ModelMismatchError, match="at least 50% .* shares 0.032 of them \\(0.bias"):
        warm_start(other, 7, file)


@pytest.mark.slow
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
