"""Pre-training by masked reconstruction: what is hidden, that nothing hidden reaches the encoder, the loss, the metrics, and what fine-tuning takes."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.private_probe import probe_model
from server.run_folder import RunFolder
from server.warm_start import warm_start
from shared.errors import ConfigurationError, DataMissingError, ModelMismatchError
from shared.models import get_parameters, initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import Task, resolve_task
from shared.tasks.icu_mortality import HOURS_PER_STEP, NUM_STEPS
from shared.tasks.icu_series import series_inputs
from shared.tasks.icu_stays import NUM_VARIABLES
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.self_supervised import (
    ERRORS,
    METRICS,
    MOST_ERROR,
    SHOWN_WEIGHT,
    MaskedReconstruction,
    as_if_unmeasured,
    error_sums,
    fixed_quarter,
    load_cohort,
    reconstruction_loss,
    synthetic_cohort,
)
from simulations.blocks.choice import check_alike

STUDY = Path(__file__).resolve().parents[2] / "studies" / "self-supervised.toml"
TASK = resolve_task("self-supervised")


def started(seed: int) -> MaskedReconstruction:
    model = MaskedReconstruction()
    set_parameters(model, initial_parameters(model, seed))
    return model


def tensors(num_patients: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    series, described = (torch.from_numpy(values) for values in synthetic_cohort(num_patients, seed).inputs)
    return series, described


def test_a_hidden_measurement_is_as_one_that_nobody_took() -> None:
    """The series of fewer measurements, made by the loader, is the oracle."""
    stays = synthetic_stays(25, 1)
    rng = np.random.default_rng(0)
    shown = rng.random((25, NUM_STEPS, NUM_VARIABLES)) < 0.6
    kept = shown[stays.stay, np.minimum(stays.minute // (60 * HOURS_PER_STEP), NUM_STEPS - 1), stays.variable]
    fewer = replace(stays, stay=stays.stay[kept], variable=stays.variable[kept], minute=stays.minute[kept], value=stays.value[kept])
    expected = series_inputs(fewer, HOURS_PER_STEP)[0]
    whole = torch.from_numpy(series_inputs(stays, HOURS_PER_STEP)[0])
    assert np.allclose(as_if_unmeasured(whole, torch.from_numpy(shown).float()).numpy(), expected, atol=1e-6)
    assert np.allclose(as_if_unmeasured(whole, torch.ones(NUM_STEPS, NUM_VARIABLES)).numpy(), whole.numpy(), atol=1e-6)
    assert not np.allclose(whole.numpy(), expected, atol=0.1)


def test_nothing_that_is_hidden_reaches_the_encoder() -> None:
    """A hidden value may change as it likes: only what is judged against it changes, by just the difference of squares."""
    series, described = tensors(30, 2)
    places = (fixed_quarter() > 0).expand(30, -1, -1)
    measured = series[..., NUM_VARIABLES : 2 * NUM_VARIABLES] > 0
    hidden = places & measured
    changed = series.clone()
    changed[..., :NUM_VARIABLES][hidden] += 1.0
    model, seen = started(1).eval(), []
    model.recurrent.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        before, after = model(series, described), model(changed, described)
    # a later step that was not measured carries the true value in the loader's series; it is made anew from what is shown
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(before[:, 1], after[:, 1])


def test_the_fixed_quarter_is_spread_evenly() -> None:
    quarter = fixed_quarter()
    assert quarter.shape == (NUM_STEPS, NUM_VARIABLES) and (quarter.sum(dim=0) == NUM_STEPS / 4).all()
    assert set(quarter.sum(dim=1).tolist()) <= {NUM_VARIABLES // 4, NUM_VARIABLES // 4 + 1}


def test_errors_are_means_over_what_was_hidden_and_the_loss_counts_the_rest_too() -> None:
    series, described = tensors(12, 3)
    model = started(2).eval()
    kept: list[torch.Tensor] = []
    model.reconstruction.register_forward_hook(lambda module, inputs, output: kept.append(output))
    outputs = model(series, described)
    values, measured = series[..., :NUM_VARIABLES], series[..., NUM_VARIABLES : 2 * NUM_VARIABLES]
    for row in range(12):
        squares = (kept[0][row] - values[row]).square()[measured[row] > 0]
        hidden = fixed_quarter()[measured[row] > 0] > 0
        weights = torch.where(hidden, 1.0, SHOWN_WEIGHT)
        assert torch.isclose(outputs[row, 1], squares[hidden].mean(), atol=1e-5)
        assert torch.isclose(outputs[row, 0], (squares * weights).sum() / weights.sum(), atol=1e-5)
    assert torch.equal(reconstruction_loss(outputs, torch.ones(12)), outputs[:, 0])


def test_a_record_without_measurements_has_no_error() -> None:
    series, described = tensors(2, 3)
    series[0] = torch.cat([torch.zeros(NUM_STEPS, 2 * NUM_VARIABLES), torch.ones(NUM_STEPS, NUM_VARIABLES)], dim=1)
    model = started(1)
    outputs = model(series, described)
    outputs[:, 0].sum().backward()
    assert outputs[0].tolist() == [0, 0, 0, 0] and outputs[1, 3] == 1
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_training_hides_by_chance_and_evaluation_does_not() -> None:
    series, described = tensors(40, 4)
    model = started(3)
    model.train()
    first, second = (model(series, described).detach() for _ in range(2))
    assert not torch.allclose(first[:, 0], second[:, 0])
    together = predict_in_batches(model, (series.numpy(), described.numpy()))
    alone = predict_in_batches(model, (series[7:8].numpy(), described[7:8].numpy()))
    assert torch.allclose(together[7:8], alone, atol=1e-6)


def test_metrics_are_bounded_and_agree() -> None:
    cohort = synthetic_cohort(4, 1)
    sums = error_sums(np.array([[0.2, 0.4, 1], [np.nan, np.inf, 1], [100, -1, 1], [3, 3, 0]]), cohort)
    assert np.allclose(sums, [3, (0.2 + 2 * MOST_ERROR) / MOST_ERROR, (0.4 + MOST_ERROR) / MOST_ERROR])
    one = cohort.select(np.array([0]))
    for predictions in ([[1e9, 1e9, 1]], [[0, 0, 1]], [[np.nan, 1, 0]]):
        assert np.linalg.norm(error_sums(np.array(predictions, dtype=float), one)) <= ERRORS.sensitivity
    skill, error = (metric.of(np.array([10.0, 1.0, 2.0])) for metric in METRICS)
    assert skill == 0.5 and error == MOST_ERROR / 10
    assert [metric.of(np.zeros(3)) for metric in METRICS] == [None, None]
    assert ERRORS.could_be(np.array([10.0, 1.0, 2.0]), patients=10) and not ERRORS.could_be(np.array([10.0, 11.0, 2.0]), patients=20)


def test_labels_tell_nothing_of_how_a_stay_ended() -> None:
    assert not synthetic_cohort(50, 0).labels.any() and resolve_task("icu-mortality").synthetic_cohort(50, 0).labels.any()


def test_data_and_options_are_those_of_icu_mortality(tmp_path: Path) -> None:
    """The same loader; its bad files are tried in test_task_icu_series.py."""
    with pytest.raises(DataMissingError):
        load_cohort(None, {})
    with pytest.raises(DataMissingError):
        load_cohort(tmp_path, {})
    with pytest.raises(ConfigurationError, match="hours"):
        load_cohort(tmp_path, {"hours": 3})


@pytest.mark.slow
def test_it_trains_in_blocks_and_with_privacy() -> None:
    assert check_alike(TASK).held > 0  # raises where it cannot be stacked
    probe_model(TASK, Study.load(STUDY))


def test_fine_tuning_takes_the_encoder_and_nothing_else(tmp_path: Path) -> None:
    mortality = resolve_task("icu-mortality")
    trained = get_parameters(started(9))
    folder = RunFolder.create(tmp_path, Study.load(STUDY), baselines=False, patients_sha256=None)
    folder.write_model("final", trained, {"study": "self-supervised"})
    start = warm_start(mortality, 7, folder.path)
    assert start.source.taken == tuple(name for name in trained if name.startswith("recurrent."))
    assert start.source.fresh == ("head.weight", "head.bias")
    assert all(np.array_equal(start.parameters[name], trained[name]) for name in start.source.taken)
    with pytest.raises(ModelMismatchError, match="shares none"):
        warm_start(resolve_task("breast-cancer"), 7, folder.path)


def learned(task: Task, steps: int) -> tuple[float, float]:
    """The skill at others before and after so many steps on 500 synthetic stays."""
    train, test = task.synthetic_cohort(500, 1), task.synthetic_cohort(300, 2)
    model = started(0)
    untrained = copy.deepcopy(model)
    inputs, rng = [torch.from_numpy(values) for values in train.inputs], np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(0, 500, size=64))
            optimizer.zero_grad()
            task.loss(model(*(values[rows] for values in inputs)), torch.zeros(64)).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    metric = task.metrics[0]
    skills = [
        metric.of(metric.statistic.summarise(task.predict(predict_in_batches(each, test.inputs)).numpy().astype(np.float64), test))
        for each in (untrained, model)
    ]
    return float(skills[0] or 0), float(skills[1] or 0)


@pytest.mark.slow
def test_it_learns_from_synthetic_stays() -> None:
    """From far worse than the last known value to better than it; seeded."""
    before, after = learned(TASK, 200)
    assert before < -0.3 and after > 0.02
