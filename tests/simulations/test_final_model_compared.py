"""The final model on groups of patients, and against a site's own model on the same patients."""

import dataclasses
import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.evaluation import predictions_of
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.metrics import confusion_metrics
from shared.models import initial_parameters, set_parameters
from shared.study import Study
from shared.subgroups import Subgroup
from shared.task import Task, resolve_task
from simulations.baselines import pool, train_alone
from simulations.paired_test import exchange_test, paired_test
from simulations.subgroups import SMALLEST, evaluate_subgroups, suppressed
from tests.simulations.conftest import STUDY
from wardround.report.tables import holm

ACCURACY = confusion_metrics(2)[0]


@pytest.fixture
def task() -> Task:
    return dataclasses.replace(resolve_task("breast-cancer"), subgroups=(Subgroup(attribute="ward"), Subgroup(attribute="not there")))


@pytest.fixture
def cohorts(task: Task) -> dict[str, Cohort]:
    """Two sites; the wards A, B and C have many, some, and fewer than ten test patients."""
    made = {}
    for site, seed in (("one", 1), ("two", 2)):
        cohort = task.synthetic_cohort(200, seed)
        test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
        ward = np.where(np.arange(200) % 3 == 0, "B", "A")
        ward[np.flatnonzero(test)[:3]] = "C"
        made[site] = dataclasses.replace(cohort, attributes={**cohort.attributes, "ward": ward})
    return made


def test_a_group_has_the_metrics_of_its_test_patients_over_all_sites(task: Task, cohorts: dict[str, Cohort]) -> None:
    study = Study.from_table(STUDY)
    parameters = initial_parameters(task.model(), 3)
    found = evaluate_subgroups(task, study, cohorts, parameters)
    assert list(found) == ["ward"] and list(found["ward"]) == ["A", "B", "C"]
    tested = [cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for cohort in cohorts.values()]
    together, ward = pool(tested), np.concatenate([part.attributes["ward"] for part in tested])
    model = task.model()
    set_parameters(model, parameters)
    scores = predictions_of(task, model, together).reshape(-1)
    assert found["ward"]["B"].num_test is None  # with it, the total would tell of C
    for group in ("A",):
        mine, result = ward == group, found["ward"][group]
        assert result.num_test == mine.sum() == sum(result.support.values())
        assert result.metrics["accuracy"] == pytest.approx(np.mean((scores[mine] >= 0.5) == together.labels[mine]))
        assert result.metrics["auroc"] == pytest.approx(roc_auc_score(together.labels[mine], scores[mine]), abs=0.05)  # by bins of the score
        low, high = result.ci95["auroc"]
        assert low <= result.metrics["auroc"] <= high


@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        ({"a": 50, "b": 30}, set()), ({"a": 50, "b": 30, "c": 3}, {"b", "c"}), ({"a": 50, "b": 5, "c": 6}, {"b", "c"}), ({"a": 50, "b": 2, "c": 3}, {"a", "b", "c"}),
        ({"a": 50, "b": 30, "c": 2, "d": 3}, {"b", "c", "d"}), ({"a": 4}, {"a"}),
    ],
)  # fmt: skip
def test_what_is_hidden_is_not_given_away_by_the_total(sizes: dict[str, int], hidden: set[str]) -> None:
    assert suppressed(sizes) == hidden


def test_of_a_few_patients_nothing_is_told(task: Task, cohorts: dict[str, Cohort]) -> None:
    few = evaluate_subgroups(task, Study.from_table(STUDY), cohorts, initial_parameters(task.model(), 3))["ward"]["C"]
    assert few.num_test is None and not few.metrics and not few.support and SMALLEST > 6
    promised = Study.from_table({**STUDY, "privacy": {"epsilon": 3.0, "delta": 1e-4, "evaluation_epsilon": 1.0}})
    assert evaluate_subgroups(task, promised, cohorts, initial_parameters(task.model(), 3)) == {}


def right_and_wrong(one: list[int], other: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Each patient's cell of a confusion matrix, of class 0: 1 where the model is right."""
    parts = np.zeros((2, len(one), 2, 2))
    for which, hits in enumerate((one, other)):
        for patient, hit in enumerate(hits):
            parts[which, patient, 0, 0 if hit else 1] = 1
    return parts[0], parts[1]


def test_the_p_value_is_the_share_of_all_exchanges() -> None:
    one, other = right_and_wrong([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 1, 0])
    found = exchange_test(ACCURACY, one, other, resamples=20_000, rng=np.random.default_rng(0))
    signs = np.array([1, 1, 0, 1, 1, 0, -1, 1])
    every = [abs(sum(sign * coin for sign, coin in zip(signs, coins, strict=True))) for coins in itertools.product((1, -1), repeat=8)]
    assert found.difference == pytest.approx(signs.sum() / 8)
    assert found.p_value == pytest.approx(np.mean([value >= abs(signs.sum()) for value in every]), abs=0.015)  # standard error 0.003


@pytest.mark.slow
def test_without_a_difference_the_test_rejects_as_often_as_it_says() -> None:
    """300 draws at level 0.1: more than 46 rejections (binomial, p < 1e-3) would be a broken test."""
    rng = np.random.default_rng(5)
    rejected = 0
    for _ in range(300):
        one, other = right_and_wrong(list(rng.random(40) < 0.7), list(rng.random(40) < 0.7))
        rejected += exchange_test(ACCURACY, one, other, resamples=99, rng=rng).p_value <= 0.1
    assert 5 <= rejected <= 46


def test_a_model_that_is_better_on_the_same_patients_is_found(task: Task, cohorts: dict[str, Cohort]) -> None:
    cohort, resamples = cohorts["one"], 200
    plain = Study.from_table({**STUDY, "rounds": {"count": 5}, "privacy": {"unit": "none"}})
    good = train_alone(cohort, task, plain, who="site")
    bad = {name: -value if name.startswith("2.") else value for name, value in good.items()}  # the last layer says the opposite
    found = paired_test(task, cohort, good, bad, resamples=resamples, seed=1)
    assert found is not None and found.difference > 0.3 and found.p_value == pytest.approx(1 / (resamples + 1))
    same = paired_test(task, cohort, good, good, resamples=resamples, seed=1)
    assert same is not None and (same.difference, same.p_value) == (0.0, 1.0)
    one_class = cohort.select(np.array([patient for patient, label in enumerate(cohort.labels.reshape(-1)) if label == 1]))
    assert paired_test(task, one_class, good, bad, resamples=resamples, seed=1) is None


@pytest.mark.slow
def test_a_run_with_baselines_tests_every_site(runner, usual) -> None:
    run = runner.run(runner.study(), baselines=True)
    gains = run.result.per_site_gains
    assert set(gains) == {"local_only", "local_only_private"} and set(gains["local_only"]) <= {"site-1", "site-2", "site-3"}
    for site, test in gains["local_only"].items():
        alone = run.result.per_site_baselines["local_only"][site]["auroc"]
        assert test.difference == pytest.approx(run.result.per_site[site]["auroc"] - alone, abs=1e-9)
    assert not usual.result.per_site_gains
    promised = runner.run(runner.study(privacy={"evaluation_epsilon": 1.0}), baselines=True).result
    assert not promised.per_site_gains  # with a site's own metric it would tell the federated model's, which carries noise


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert holm({}) == {}
