"""One release is sum of clipped gradients plus noise, over the expected batch size: checked against a loop over patients by hand."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.local_training import LocalRound, record_losses
from client.noise import GaussianNoise, KeyedStream, NoiseGrid
from client.private_training import NoisedSum, Randomness, sum_clipped_gradients, train_round_private
from client.record_gradients import record_gradients
from shared.cohort import Cohort, IntArray
from shared.models import get_parameters, initial_parameters, set_parameters
from shared.plan import SitePlan
from shared.study import Study
from shared.task import Task

KEY = bytes(range(32))
CLIP = 0.7
Rounds = Callable[..., LocalRound]
Plans = Callable[..., SitePlan]
Patients = Callable[..., Cohort]


def flat(parameters: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel().astype(np.float64) for value in parameters.values()])


def fresh_model(task: Task, seed: int = 1) -> torch.nn.Module:
    model = task.model()
    set_parameters(model, initial_parameters(model, seed))
    return model


def gradient(model: torch.nn.Module, cohort: Cohort, record: int, task: Task) -> np.ndarray:
    """One record's gradient, alone, by plain autograd."""
    grads = torch.autograd.grad(record_losses(model, cohort, np.array([record]), task).sum(), [p for p in model.parameters() if p.requires_grad])
    return np.concatenate([grad.detach().numpy().ravel().astype(np.float64) for grad in grads])


def clipped(value: np.ndarray, clip: float = CLIP) -> np.ndarray:
    norm = np.linalg.norm(value)
    return value if norm <= clip else value * clip / norm


def brute_force_sum(model: torch.nn.Module, cohort: Cohort, units: IntArray | list[IntArray], task: Task, clip: float = CLIP) -> np.ndarray:
    """One unit after the other: a record, or the mean over a patient's records."""
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = np.zeros(size)
    for unit in units:
        total += clipped(np.mean([gradient(model, cohort, record, task) for record in np.atleast_1d(unit)], axis=0), clip)
    return total


def noiseless_sum(model: torch.nn.Module, cohort: Cohort, units: IntArray | list[IntArray], local: LocalRound, plan: SitePlan) -> np.ndarray:
    """The sum as the trainer makes it, before rounding and noise."""
    with record_gradients(model) as gradients:
        trainable = [p for p in model.parameters() if p.requires_grad]
        total = NoisedSum(trainable, gradients, plan=plan, noise=GaussianNoise(KEY))
        sum_clipped_gradients(total, gradients, cohort, units, local)
        return total.values.numpy().copy()


def grid_noise(model: torch.nn.Module, plan: SitePlan, steps: int = 1) -> list[np.ndarray]:
    """The noise of each step from the key alone, on the grid."""
    stream = GaussianNoise(KEY)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    grid = NoiseGrid.of(plan.max_grad_norm or 0, size)
    std = (plan.noise_multiplier or 0) * grid.sensitivity
    return [grid.round(stream.normal((size,), std)).numpy() for _ in range(steps)]


def rounded(total: np.ndarray, plan: SitePlan) -> np.ndarray:
    """The sum on its grid."""
    return NoiseGrid.of(plan.max_grad_norm or 0, total.size).round(torch.from_numpy(total)).numpy()


def train(model: torch.nn.Module, cohort: Cohort, local: LocalRound, plan: SitePlan, *, seed: int = 0) -> np.ndarray:
    """The parameters after a private round."""
    randomness = Randomness(sampling=sampling(seed), noise=GaussianNoise(KEY))
    assert train_round_private(model, cohort, local, plan=plan, randomness=randomness) == plan.steps_per_round
    return flat(get_parameters(model))


def sampling(seed: int) -> KeyedStream:
    """A stream to sample from."""
    return KeyedStream(seed.to_bytes(32, "big"))


@pytest.mark.parametrize("clip", [0.05, 0.7, 100.0])
def test_clipping_equals_a_loop_over_patients(clip: float, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    cohort, model = make_patients(40, seed=2), fresh_model(task)
    records = np.arange(cohort.num_records)
    ours = noiseless_sum(model, cohort, records, make_round(), make_plan(max_grad_norm=clip))
    expected = brute_force_sum(model, cohort, records, task, clip)
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-7
    norms = [np.linalg.norm(gradient(model, cohort, record, task)) for record in records]
    assert clip != 0.7 or min(norms) < clip < max(norms)  # some are clipped and some are not


def test_one_step_is_the_release_by_hand(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    cohort, model, plan, local = make_patients(20), fresh_model(task), make_plan(noise_multiplier=1.3, expected_batch_size=12.5), make_round()
    release = (rounded(brute_force_sum(model, cohort, np.arange(20), task), plan) + grid_noise(model, plan)[0]) / 12.5
    before = flat(get_parameters(model))
    after = train(model, cohort, local, plan)
    assert after == pytest.approx(before - local.study.training.learning_rate * release, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("unit", "per_patient"), [("patient", "one"), ("patient", "all"), ("record", "one")])
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_a_round_of_poisson_steps_by_hand(
    unit: str, per_patient: str, strategy: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    """Several steps with momentum, weight decay and proximal term: each release is clipped sum plus noise, and the rest comes after."""
    privacy = {"records_per_patient": per_patient, "unit": unit}
    local = make_round(strategy={"name": strategy}, training={"momentum": 0.5, "weight_decay": 0.01}, privacy=privacy)
    plan = make_plan(unit=unit, sample_rate=0.3, steps_per_round=4, expected_batch_size=9.0)
    cohort, model, by_hand = make_patients(30, most_records=3, seed=3), fresh_model(task), fresh_model(task)
    noise, stream = grid_noise(by_hand, plan, 4), sampling(8)
    start = now = flat(get_parameters(by_hand))
    velocity, mu = np.zeros_like(start), getattr(local.study.strategy, "proximal_mu", 0.0)
    for step in range(4):
        num_units = cohort.num_patients if unit == "patient" else cohort.num_records
        units = np.flatnonzero(stream.uniforms(num_units) <= 0.3)
        if unit == "patient":
            own = [np.flatnonzero(cohort.patient_of_record == patient) for patient in units]
            shares = stream.uniforms(len(own)) if per_patient == "one" else np.zeros(len(own))
            units = own if per_patient == "all" else [records[int(share * len(records))] for records, share in zip(own, shares, strict=True)]
        release = (rounded(brute_force_sum(by_hand, cohort, units, task), plan) + noise[step]) / 9.0
        velocity = 0.5 * velocity * (step > 0) + release + mu * (now - start) + 0.01 * now
        now = now - local.study.training.learning_rate * velocity
        torch.nn.utils.vector_to_parameters(torch.from_numpy(now.astype(np.float32)), by_hand.parameters())
    after = train(model, cohort, local, plan, seed=8)
    assert np.linalg.norm(after - now) <= 2e-5 * np.linalg.norm(now)
    assert (strategy == "fedprox") == (mu > 0)


@pytest.mark.parametrize(("unit", "per_patient"), [("patient", "one"), ("patient", "all"), ("record", "one")])
def test_physical_batches_change_nothing(
    unit: str, per_patient: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    """Also where a patient has more records (up to five) than fit into memory."""
    cohort = make_patients(33, most_records=5)
    plan, privacy = make_plan(unit=unit, sample_rate=0.6, steps_per_round=3), {"unit": unit, "records_per_patient": per_patient}
    results = [train(fresh_model(task), cohort, make_round(privacy={**privacy, "physical_batch_size": size}), plan) for size in (1, 2, 3, 7, 256)]
    for other in results[1:]:
        assert np.linalg.norm(other - results[0]) <= 1e-6 * np.linalg.norm(results[0])


def test_an_empty_batch_still_adds_noise_and_counts(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    plan = make_plan(sample_rate=1e-12, steps_per_round=3)
    model, local = fresh_model(task), make_round()
    noise = np.sum(grid_noise(model, plan, 3), axis=0)
    before = flat(get_parameters(model))
    after = train(model, make_patients(20), local, plan)
    assert after == pytest.approx(before - local.study.training.learning_rate * noise / 20, rel=1e-5, abs=1e-6)


def test_a_site_without_training_patients_releases_noise(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    nobody = make_patients(5).select(np.zeros(5, dtype=np.bool_))
    model, plan, local = fresh_model(task), make_plan(steps_per_round=2), make_round()
    expected = flat(get_parameters(model)) - local.study.training.learning_rate * np.sum(grid_noise(model, plan, 2), axis=0) / 20
    assert train(model, nobody, local, plan) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), size=st.floats(-3, 38), clip=st.sampled_from([1e-6, 1e-3, 0.7, 50.0, 1e6]))
def test_no_patient_contributes_more_than_the_clip(seed: int, size: float, clip: float, task: Task, make_patients: Patients) -> None:
    """Whatever is in a record, up to the largest floats."""
    plan, local = _plan_and_round(task, clip)
    one = make_patients(1, seed=seed)
    extreme = dataclasses.replace(one, inputs=(np.clip(one.inputs[0].astype(np.float64) * 10.0**size, -3e38, 3e38).astype(np.float32),))
    contribution = noiseless_sum(fresh_model(task, seed), extreme, np.array([0]), local, plan)
    assert np.isfinite(contribution).all() and np.linalg.norm(contribution) <= clip * (1 + 1e-9)


def _plan_and_round(task: Task, clip: float) -> tuple[SitePlan, LocalRound]:
    study = Study.from_table({"name": "s", "task": "tiny", "privacy": {"epsilon": 1.0, "delta": 1e-3, "max_grad_norm": clip}})
    plan = SitePlan(
        unit="patient",
        declared_size=9,
        sample_rate=1.0,
        steps_per_round=1,
        expected_batch_size=9.0,
        rounds=1,
        noise_multiplier=1.0,
        max_grad_norm=clip,
    )
    return plan, LocalRound(study=study, task=task, round_number=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_patient", ["one", "all"])
def test_a_patient_without_finite_gradient_counts_as_nothing(
    value: float, per_patient: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients, caplog: pytest.LogCaptureFixture
) -> None:
    cohort, model, local = make_patients(12), fresh_model(task), make_round(privacy={"records_per_patient": per_patient})
    cohort.inputs[0][4, 1] = value
    others = np.delete(np.arange(12), 4)
    units = np.arange(12) if per_patient == "one" else [np.array([record]) for record in range(12)]
    ours = noiseless_sum(model, cohort, units, local, make_plan())
    expected = brute_force_sum(model, cohort, others, task)
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.isfinite(train(model, cohort, local, make_plan(steps_per_round=3))).all()
    assert caplog.messages == ["3 gradients were not finite and were counted as zero"]  # and not whose


def test_the_norm_is_over_all_parameters_together(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """Clipping each tensor to C would let a patient contribute 2 C here (four tensors)."""
    model = fresh_model(task)
    cohort = dataclasses.replace(make_patients(1), inputs=(np.full((1, 3), 3e4, dtype=np.float32),))
    assert np.linalg.norm(noiseless_sum(model, cohort, np.array([0]), make_round(), make_plan())) == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_one_more_unit_moves_the_sum_by_at_most_the_clip(
    unit: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    """A whole step, same noise: adding a patient with all of its records (or one record) moves the released sum by at most C."""
    plan, local = make_plan(unit=unit), make_round(training={"learning_rate": 1.0})
    for seed in range(10):
        whole = make_patients(15, seed=seed)
        without = _without_record(whole, seed) if unit == "record" else whole.select(np.arange(15) != whole.patient_of_record[seed])
        if unit == "patient":  # the added patient has many records, and large ones; the others have one, so all draw the same
            whole = _with_more_records(whole, int(whole.patient_of_record[seed]))
        moved = train(fresh_model(task), whole, local, plan) - train(fresh_model(task), without, local, plan)
        assert 1e-3 < np.linalg.norm(moved) * plan.expected_batch_size <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("per_patient", ["one", "all"])
def test_one_more_patient_moves_the_rounded_sum_by_no_more_than_the_theorem_says(
    per_patient: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    plan, local = make_plan(), make_round(privacy={"records_per_patient": per_patient})
    for seed in range(10):
        cohort, model = make_patients(15, seed=seed), fresh_model(task, seed)
        cohort.inputs[0][0] *= 10.0 ** (3 * seed)
        units = [np.array([record]) for record in range(15)] if per_patient == "all" else np.arange(15)
        whole = rounded(noiseless_sum(model, cohort, units, local, plan), plan)
        moved = np.linalg.norm(whole - rounded(noiseless_sum(model, cohort, units[1:], local, plan), plan))
        spacing = NoiseGrid.of(CLIP, whole.size).spacing
        assert CLIP / 50 < moved <= CLIP * (1 + 1e-9) + spacing * math.sqrt(whole.size)


def _with_more_records(cohort: Cohort, patient: int) -> Cohort:
    inputs, labels = np.full((40, 3), 1e4, dtype=np.float32), np.zeros(40, dtype=np.float32)
    owner = np.concatenate([cohort.patient_of_record, np.full(40, patient)])
    return dataclasses.replace(
        cohort, inputs=(np.concatenate([cohort.inputs[0], inputs]),), labels=np.concatenate([cohort.labels, labels]), patient_of_record=owner
    )


def _without_record(cohort: Cohort, record: int) -> Cohort:
    keep = np.arange(cohort.num_records) != record
    inputs, owner = (cohort.inputs[0][keep],), cohort.patient_of_record[keep]
    return dataclasses.replace(cohort, inputs=inputs, labels=cohort.labels[keep], patient_of_record=owner)


def test_a_patient_with_many_records_weighs_as_one(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    base = make_patients(6)
    many = dataclasses.replace(
        base,
        inputs=(np.concatenate([base.inputs[0], np.repeat(base.inputs[0][:1], 500, axis=0)]),),
        labels=np.concatenate([base.labels, np.repeat(base.labels[:1], 500)]),
        patient_of_record=np.concatenate([base.patient_of_record, np.repeat(base.patient_of_record[:1], 500)]),
    )
    plan, local = make_plan(), make_round()
    assert train(fresh_model(task), many, local, plan) == pytest.approx(train(fresh_model(task), base, local, plan), rel=1e-5, abs=1e-6)


def test_the_sizes_that_scale_come_from_the_plan_alone(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """Empty batches: noise alone. Two cohorts of 5 and 50 patients release the same, so neither denominator nor noise knows the size."""
    plan, local = make_plan(sample_rate=1e-12), make_round()
    assert np.array_equal(train(fresh_model(task), make_patients(5), local, plan), train(fresh_model(task), make_patients(50), local, plan))


def test_a_failed_round_leaves_nothing_for_the_next(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """A model is used again for other messages: gradients of an interrupted round must not be added to the next."""
    cohort, plan = make_patients(20), make_plan(steps_per_round=2)
    model, calls = fresh_model(task), []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(labels))
        if len(calls) == 3:
            raise RuntimeError("the site's disk is gone")
        return task.loss(outputs, labels)

    failing = LocalRound(study=make_round(privacy={"physical_batch_size": 8}).study, task=dataclasses.replace(task, loss=loss), round_number=1)
    with pytest.raises(RuntimeError, match="disk"):
        train(model, cohort, failing, plan)
    set_parameters(model, initial_parameters(model, 1))
    assert np.array_equal(train(model, cohort, make_round(), plan), train(fresh_model(task), cohort, make_round(), plan))


def test_training_goes_on_as_a_plain_module(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    model = fresh_model(task)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    for _ in range(2):
        train(model, make_patients(20), make_round(), make_plan())
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_frozen_parameters_stay(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    model = fresh_model(task)
    first = next(iter(model.parameters())).requires_grad_(False)
    before = first.clone()
    noise = grid_noise(model, make_plan())[0]
    moved = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(model, make_patients(20), make_round(), make_plan(sample_rate=1e-12))
    assert torch.equal(first, before)
    changes = torch.cat([(p.detach() - old).reshape(-1) for p, old in zip([p for p in model.parameters() if p.requires_grad], moved, strict=True)])
    assert changes.numpy() == pytest.approx(-0.3 * noise / 20, rel=1e-4, abs=1e-6)


def test_training_with_little_noise_learns(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    cohort, model = make_patients(300, seed=9), fresh_model(task)
    local = make_round(training={"learning_rate": 2.0})
    start = float(record_losses(model, cohort, np.arange(300), task).detach().mean())
    train(model, cohort, local, make_plan(noise_multiplier=0.5, sample_rate=0.3, steps_per_round=60, expected_batch_size=90.0))
    assert float(record_losses(model, cohort, np.arange(300), task).detach().mean()) < start - 0.1
