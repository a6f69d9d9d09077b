"""What federation is compared with: the same training, without anybody to average with."""

import numpy as np
import pytest
import torch

from client.local_training import LocalRound, torch_keyed, train_round
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.errors import ConfigurationError
from shared.models import get_parameters, initial_parameters, set_parameters
from shared.seeding import derive_key, generator_of
from shared.task import Task, resolve_task
from simulations.baselines import POOLED, pool, run_baselines, train_alone
from simulations.federation import virtual_federation


def split(cohort: Cohort) -> tuple[Cohort, Cohort]:
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    return cohort.select(~test), cohort.select(test)


def statistics(task: Task, cohort: Cohort, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model = task.model()
    set_parameters(model, parameters)
    with torch.no_grad():
        predictions = task.predict(model.eval()(*(torch.from_numpy(values) for values in cohort.inputs))).numpy().astype(np.float64)
    return {metric.statistic.name: metric.statistic.summarise(predictions, cohort) for metric in task.metrics}


@pytest.fixture(scope="module")
def task() -> Task:
    return resolve_task("breast-cancer")


def plain_loop(train: Cohort, task: Task, study, who: str) -> dict[str, np.ndarray]:
    """Training on one cohort with nothing of the baselines' own code but the names of its random streams."""
    model = task.model()
    set_parameters(model, initial_parameters(model, study.seed))
    for number in range(1, study.rounds.count + 1):
        key = derive_key(study.seed, "baseline", who, "none", number)
        with torch_keyed(key):
            train_round(model, train, LocalRound(study=study, task=task, round_number=number), rng=generator_of(key))
    return get_parameters(model)


def test_pooled_is_training_on_the_union_and_local_only_on_each_site(runner, task: Task) -> None:
    study = runner.study(privacy={"unit": "none"}, rounds={"count": 3})
    cohorts = virtual_federation(task, study, None).cohorts
    baselines = run_baselines(cohorts, task, study)
    assert list(baselines) == ["local_only", "pooled"]
    parts = {name: split(cohort) for name, cohort in cohorts.items()}
    union = plain_loop(pool([train for train, _ in parts.values()]), task, study, POOLED)
    everyone = pool([test for _, test in parts.values()])
    assert np.array_equal(baselines["pooled"].models["all"]["score_histogram"], statistics(task, everyone, union)["score_histogram"])
    assert set(baselines["local_only"].models) == set(cohorts)
    for name, (train, test) in parts.items():
        alone = plain_loop(train, task, study, name)
        assert np.array_equal(baselines["local_only"].models[name]["score_histogram"], statistics(task, everyone, alone)["score_histogram"])
        assert np.array_equal(baselines["local_only"].own[name]["score_histogram"], statistics(task, test, alone)["score_histogram"])
        assert np.array_equal(baselines["pooled"].own[name]["score_histogram"], statistics(task, test, union)["score_histogram"])


def test_pool_keeps_patients_of_different_sites_apart(task: Task) -> None:
    cohort = task.synthetic_cohort(30, 1)
    both = pool([cohort, cohort])
    assert both.num_patients == 60 and len(set(both.patient_ids)) == 60
    assert np.array_equal(both.patient_of_record[30:], both.patient_of_record[:30] + 30)
    assert np.array_equal(both.inputs[0][30:], cohort.inputs[0])
    assert both.synthetic


@pytest.mark.slow
def test_a_private_study_has_private_baselines_too(runner, usual, task: Task) -> None:
    run = runner.run(runner.study(), baselines=True)
    result = run.result
    for name in ("federated", "local_only", "pooled", "local_only_private", "pooled_private"):
        assert 0 < result.metrics[name]["auroc"] <= 1, name
    assert set(result.per_site_baselines) == {"local_only", "pooled", "local_only_private", "pooled_private"}
    assert all(set(sites) == {"site-1", "site-2", "site-3"} for sites in result.per_site_baselines.values())
    assert "local_only" not in result.metrics_ci95 and "pooled" in result.metrics_ci95
    assert runner.run(runner.study(), baselines=True).comparable == run.comparable
    assert usual.model() == run.model()  # baselines change nothing of the study
    assert usual.result.metrics["pooled"] == {}


def test_training_alone_privately_is_noisy_and_reproducible(runner, task: Task) -> None:
    cohort = task.synthetic_cohort(80, 1)
    private = runner.study(rounds={"count": 1}, privacy={"noise_multiplier": 1.0})
    first, second = (train_alone(cohort, task, private, who="x") for _ in range(2))
    plain = train_alone(cohort, task, private.replace(privacy={"unit": "none"}), who="x")
    other = train_alone(cohort, task, private, who="y")
    for name in first:
        assert np.array_equal(first[name], second[name])
        assert not np.array_equal(first[name], plain[name])
        assert not np.array_equal(first[name], other[name])


@pytest.mark.slow
def test_a_delta_that_suits_every_site_but_not_the_pool_does_not_end_the_run(runner) -> None:
    """delta < 1/n holds at each of three sites and not for all patients together: the pooled model then keeps the promise of a smaller delta."""
    run = runner.run(runner.study(privacy={"delta": 0.004}, federation={"partition": "iid"}, rounds={"count": 1}), baselines=True)
    assert run.result.outcome == "completed"
    assert run.result.metrics["pooled_private"]["auroc"] is not None


def test_a_cross_validation_has_no_baselines(runner) -> None:
    with pytest.raises(ConfigurationError, match=r"--baselines: expected evaluation.folds = 1, got 2"):
        runner.run(runner.study(evaluation={"folds": 2}, privacy={"unit": "none"}, rounds={"count": 1}), baselines=True)


@pytest.mark.parametrize("strategy", ["ditto", "fedper", "fine-tuning"])
def test_beside_models_of_the_sites_own_each_is_compared_on_its_own_patients(runner, strategy: str) -> None:
    """Without a shared part that learns, as with one site's training repeated, own and lone models would be equal; here both are judged on the same patients."""
    run = runner.run(runner.study(strategy={"name": strategy}, privacy={"unit": "none"}), baselines=True)
    own = run.result.per_site_baselines["local_only"]
    tested = {name: row["num_test"] for name, row in run.result.per_site.items()}
    mean = sum(own[name]["accuracy"] * number for name, number in tested.items()) / sum(tested.values())
    assert run.result.metrics["local_only"]["accuracy"] == pytest.approx(mean, abs=1e-9), "pooled over the sites' own test patients"
    for name, gain in run.result.per_site_gains["local_only"].items():
        assert gain.difference == pytest.approx(run.result.per_site[name]["auroc"] - own[name]["auroc"], abs=2e-3)
