"""The canary audit: the study's own training, canaries where they belong, and bounds that are near what a prototype found."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

import simulations.simulate
from client.noise import NoiseGrid
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError
from shared.models import mlp
from shared.study import Study
from shared.task import resolve_task
from simulations.attacks.canaries import (
    TABLE,
    audit,
    canary_task,
    gradient_canaries,
    largest_site,
    record_canaries,
    run_with_canaries,
    with_canaries,
    wrong_labels,
)
from simulations.setting import Setting
from simulations.simulate import prepare
from tests.simulations.conftest import Runner, Wards

ONE_SITE = {
    "name": "one-site",
    "task": "breast-cancer",
    "rounds": {"count": 2},
    "training": {"learning_rate": 0.5, "batch_size": 56, "local_steps": 71},  # 142 steps at q = 0.14
    "privacy": {"noise_multiplier": 2.0, "delta": 1e-4},
    "federation": {"sites": 1, "partition": "iid"},
}
TIGHT = {
    "rounds": {"count": 2},
    "training": {"local_steps": 4, "batch_size": 397},
    "privacy": {"epsilon": 2.0, "delta": 1e-4},
}  # every patient, always


def study(**changes: object) -> Study:
    return Study.from_table(ONE_SITE).replace(**changes)


def setting_of(**changes: object) -> Setting:
    return prepare(study(**changes), None)


# What it finds -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise_multiplier", "least", "least_fdp", "claimed"), [(None, 4.8, 8.3, None), (1.0, 2.2, 3.0, 10.47), (2.0, 1.0, 1.3, 3.52)]
)
def test_numbers_of_the_prototype(noise_multiplier: float | None, least: float, least_fdp: float, claimed: float | None) -> None:
    """1,000 Dirac canaries, 142 steps at q = 0.14; the draws are fixed."""
    privacy = {"unit": "none"} if noise_multiplier is None else {"noise_multiplier": noise_multiplier}
    found = audit(study(privacy=privacy))
    assert found.epsilon_lower >= least and found.epsilon_lower_fdp >= least_fdp
    assert (found.steps, found.noise_multiplier, found.canaries) == (142, noise_multiplier, 1000)
    assert found.epsilon_claimed == (None if claimed is None else pytest.approx(claimed, abs=0.01))
    assert not found.exceeds


@pytest.mark.slow
def test_an_audit_is_its_seed() -> None:
    first, again, other = (audit(study(**TIGHT), canaries=500, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert other.correct != first.correct  # other coins, other noise; the draws are fixed


@pytest.mark.slow
def test_an_honest_study_alarms_once_in_twenty_at_most() -> None:
    """40 audits where the audit is at its sharpest (no sampling); at a true rate of 5 % more than 7 alarms come once in 1,000 times."""
    alarms = [audit(study(**TIGHT), seed=seed).exceeds for seed in range(40)]
    assert sum(alarms) <= stats.binom.isf(1e-3, 40, 0.05)


# The study's own path ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_claim_and_the_plan_are_the_runs_own(runner: Runner) -> None:
    """Three sites: what the audit holds its bound against is what a plain run of the study says it spent at that site."""
    asked = runner.study()
    found, spent = audit(asked, canaries=50), runner.run(asked).result.privacy.sites
    own = spent[found.site]
    assert (found.epsilon_claimed, found.noise_multiplier, found.sample_rate) == (own.epsilon, own.noise_multiplier, own.sample_rate)
    assert (found.steps, found.delta) == (own.steps, own.delta)
    assert found.site == largest_site(prepare(asked, None))


def test_canaries_are_trained_on_and_others_stay_where_they_were() -> None:
    setting = setting_of()
    cohort = gradient_canaries(setting, 30).cohorts["site-1"]
    canaries = gradient_canaries(setting, 30).candidates.select(np.arange(0, 30, 3))
    together = with_canaries(cohort, canaries)
    test = held_out_patients(together, SIMULATION_SPLIT_KEY)
    assert np.array_equal(test[: cohort.num_patients], held_out_patients(cohort, SIMULATION_SPLIT_KEY))
    assert not test[cohort.num_patients :].any()
    numbers = together.inputs[-1]
    assert numbers[: cohort.num_records].max() == 0 and numbers[cohort.num_records :].tolist() == list(range(1, 31, 3))
    assert together.patient_ids[cohort.num_patients :] == canaries.patient_ids and len(set(together.patient_ids)) == together.num_patients


def test_a_canarys_gradient_is_its_own_coordinate_alone() -> None:
    """And a patient's is what it is without canaries, with nothing there."""
    task = resolve_task("breast-cancer")
    cohort = task.synthetic_cohort(4, 1)
    inputs, labels = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(cohort.labels)
    wrapped = canary_task(task, 5, norm=70.0)
    model = wrapped.model().train()
    for row, number in enumerate([0, 3, 0, 5]):
        losses = wrapped.loss(model(inputs, torch.tensor([0, 3, 0, 5])), labels)
        grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(losses[row], list(model.parameters())), strict=True))
        table = grads.pop(TABLE)
        if number:
            assert table[number - 1] == 70 and table.abs().sum() == 70
            assert all((grad == 0).all() for grad in grads.values())
        else:
            assert (table == 0).all()
            alone = torch.autograd.grad(task.loss(model.patients(inputs), labels)[row], list(model.patients.parameters()))
            assert all(torch.allclose(grad, other) for grad, other in zip(grads.values(), alone, strict=True))


def test_in_evaluation_the_model_is_the_tasks_own() -> None:
    task = resolve_task("breast-cancer")
    inputs = torch.from_numpy(task.synthetic_cohort(4, 1).inputs[0])
    model = canary_task(task, 5, norm=1.0).model().eval()
    assert torch.equal(model(inputs, torch.arange(4)), model.patients(inputs))


@pytest.mark.slow
def test_the_scores_are_the_mechanisms() -> None:
    """Nobody in: noise of the plan's standard deviation, by chi-square. Everybody in, and in every batch: one clipping norm a step beside it."""
    setting = setting_of(**TIGHT)
    canaries = gradient_canaries(setting, 400)
    [size] = [summary.num_train for summary in setting.summaries()]
    none = run_with_canaries(setting, canaries, np.zeros(400, dtype=np.bool_), site="site-1")
    everyone = run_with_canaries(setting, canaries, np.ones(400, dtype=np.bool_), site="site-1")
    assert none.privacy is not None and none.steps == everyone.steps == 8
    unit = 0.5 / size  # learning rate over the expected batch: what a gradient of norm 1 does to a parameter
    std = none.privacy.noise_multiplier * NoiseGrid.of(1.0, 31 + 400).sensitivity * math.sqrt(8) * unit
    total = ((none.scores / std) ** 2).sum()
    assert min(stats.chi2.cdf(total, 400), stats.chi2.sf(total, 400)) > 1e-6
    assert np.allclose(everyone.scores - none.scores, 8 * unit, rtol=1e-3)  # the noise is the same: one seed


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimizer": "adam", "learning_rate": 0.01}},
        {"training": {"momentum": 0.9, "weight_decay": 0.01}},
        {"strategy": {"name": "fedprox"}},
        {"privacy": {"unit": "record"}},
        {"privacy": {"records_per_patient": "all"}},
        {"privacy": {"noise_source": "os"}},
        {"evaluation": {"folds": 2}},
    ],
    ids=lambda changes: "-".join(str(value) for table in changes.values() for value in table.values()),
)
def test_any_study_can_be_audited(changes: dict[str, dict[str, object]]) -> None:
    tables = {"rounds": {"count": 2}, "training": {"local_steps": 10}, "privacy": {"noise_multiplier": 0.4}}
    for name, table in changes.items():
        tables[name] = {**tables.get(name, {}), **table}
    found = audit(study(**tables), canaries=300)
    assert found.steps == 20 * tables.get("evaluation", {}).get("folds", 1)
    assert found.epsilon_claimed is not None and 0.2 < found.epsilon_lower <= found.epsilon_lower_fdp < found.epsilon_claimed


# Record canaries -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_record_canaries_are_seen_where_a_model_learns_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide network without privacy tells which wrongly labelled patients it saw; with privacy it does not."""
    task = resolve_task("breast-cancer")
    wide = dataclasses.replace(task, model=lambda: mlp(30, 1, hidden=(256,)))
    monkeypatch.setattr(simulations.simulate, "resolve_task", lambda name: wide)
    long = {"rounds": {"count": 4}, "training": {"local_steps": None, "local_epochs": 15, "learning_rate": 1.0, "batch_size": 16}}
    plain = audit(study(**long, privacy={"unit": "none"}), canaries=100, kind="record")
    private = audit(study(**long, privacy={"epsilon": 2.0}), canaries=100, kind="record")
    assert plain.epsilon_lower > 0.2 > 0.1 > private.epsilon_lower


def test_record_canaries_are_the_tasks_patients_with_the_wrong_label() -> None:
    setting = setting_of()
    made = record_canaries(setting, 40, seed=3)
    original = setting.task.synthetic_cohort(40, 0)
    assert made.candidates.num_patients == made.candidates.num_records == 40
    assert [values.dtype for values in made.candidates.inputs] == [values.dtype for values in original.inputs]
    assert set(np.unique(made.candidates.labels)) == {0, 1}
    assert made.cohorts is setting.federation.cohorts if setting.federation else False


@pytest.mark.parametrize("labels", [np.array([0.0, 1, 1, 0], dtype=np.float32), np.array([0, 1, 2, 1, 3]), np.array([0.5, 1.5, 9.0])])
def test_every_wrong_label_is_another_that_occurs(labels: np.ndarray) -> None:
    wrong = wrong_labels(labels)
    assert (wrong != labels).all() and set(wrong) <= set(labels) and wrong.dtype == labels.dtype
    assert len(set(zip(labels.tolist(), wrong.tolist(), strict=True))) == len(set(labels.tolist()))


# Refusals ----------------------------------------------------------------------------------------------------------------------------------


def test_no_canary_enters_a_real_ledger(wards: Wards) -> None:
    with pytest.raises(ConfigurationError, match="virtual"):
        audit(wards.study, wards.path)
    assert not list(wards.path.glob("*/state"))


def test_too_few_canaries() -> None:
    with pytest.raises(ConfigurationError, match="--canaries: expected at least 20"):
        audit(study(), canaries=5)
