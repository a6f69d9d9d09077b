"""A simulation from study to result: reproducible to the bit, honest about privacy, and telling how it ended."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import client.local_update
import simulations.blocks.trainer
from client.ledger import reading
from server.run_folder import RunFolder, read_tensors
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import BudgetExhaustedError, ConfigurationError, DataMissingError, ModelMismatchError, PolicyRefusedError, QuorumLostError
from shared.metrics import finish_metrics
from shared.models import set_parameters
from shared.plan import Limit
from shared.privacy import epsilon_of
from shared.results import RoundRecord
from shared.task import Task, architecture_hash, resolve_task
from simulations.baselines import pool
from simulations.blocks.choice import Execution
from simulations.federation import virtual_federation
from simulations.simulate import execute, prepare, resume_run, start_run

pytestmark = pytest.mark.slow  # seconds altogether

HEART = Path(__file__).parents[3] / "shared" / "data" / "fed_heart_disease"
STUDIES = Path(__file__).parents[2] / "studies"


def evaluated(task: Task, cohort: object, parameters: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Metrics of these parameters on these patients in one place, by the task's own model and statistics."""
    model = task.model()
    set_parameters(model, parameters)
    with torch.no_grad():
        outputs = model.eval()(*(torch.from_numpy(values) for values in cohort.inputs))
    predictions = task.predict(outputs).numpy().astype(np.float64)
    return finish_metrics(task.metrics, {metric.statistic.name: metric.statistic.summarise(predictions, cohort) for metric in task.metrics})


# Reproducible ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_seed_is_one_result_to_the_bit_and_another_seed_another(runner) -> None:
    first, second = (runner.run(runner.study()) for _ in range(2))
    assert first.model() == second.model()
    assert first.comparable == second.comparable
    assert first.lines == second.lines
    assert first.result.run != second.result.run
    evaluation, privacy = ((each.folder.path / name).read_bytes() for each in (first,) for name in ("evaluation.json", "privacy.json"))
    assert (second.folder.path / "evaluation.json").read_bytes() == evaluation
    assert (second.folder.path / "privacy.json").read_bytes() == privacy
    plain = [runner.run(runner.study(seed=seed, privacy={"unit": "none"})) for seed in (11, 12)]
    parameters = [read_tensors(run.folder.path / "model" / "final.safetensors")[1] for run in plain]
    assert all(not np.array_equal(parameters[0][name], parameters[1][name]) for name in parameters[0])


def test_the_number_of_threads_and_earlier_draws_change_nothing(runner) -> None:
    first = runner.run(runner.study(privacy={"unit": "none"}))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    torch.rand(17)
    np.random.default_rng().random(3)
    try:
        second = runner.run(runner.study(privacy={"unit": "none"}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert first.model() == second.model()
    assert first.comparable == second.comparable


def test_the_final_metrics_are_those_of_the_final_model_on_all_test_patients(usual) -> None:
    run = usual
    task = resolve_task("breast-cancer")
    parameters = run.folder.read_model("final", architecture_hash(task.model()))
    sites = virtual_federation(task, run.folder.study, None).cohorts
    tests = {name: cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for name, cohort in sites.items()}
    result = run.result
    assert result.metrics["federated"] == evaluated(task, pool(list(tests.values())), parameters)
    assert sum(cohort.num_patients for cohort in sites.values()) == 569
    for site in result.sites:
        own = evaluated(task, tests[site.name], parameters)
        row = result.per_site[site.name]
        assert {name: row[name] for name in own} == own
        assert row["num_test"] == site.num_test == tests[site.name].num_patients
        assert site.num_train + site.num_test == site.num_patients
        assert site.classes is not None and sum(site.classes.values()) == site.num_patients
    low, high = result.metrics_ci95["federated"]["auroc"]
    assert low <= result.metrics["federated"]["auroc"] <= high
    assert (result.outcome, result.rounds_completed, result.synthetic, result.engine) == ("completed", 2, False, "in-process")
    assert len(result.timing.seconds_per_round) == 2 and result.timing.total_seconds > 0


def test_more_rounds_without_privacy_learn_something(runner) -> None:
    run = runner.run(runner.study(privacy={"unit": "none"}, rounds={"count": 8}))
    assert run.result.metrics["federated"]["auroc"] > 0.95


# Privacy --------------------------------------------------------------------------------------------------------------------------


def test_the_epsilon_told_is_that_of_the_ledgers_rows_and_within_the_budget(usual) -> None:
    run = usual
    privacy = run.result.privacy
    assert set(privacy.sites) == {site.name for site in run.result.sites}
    for name, told in privacy.sites.items():
        with reading(run.folder.path / "ledgers" / f"{name}.sqlite") as ledger:
            charges = ledger.charges()
        assert [charge.committed for charge in charges] == [True] * 2
        assert sum(charge.event.steps for charge in charges) == told.steps
        both = {told.accountant: told.epsilon, told.cross_check_accountant: told.epsilon_cross_check}
        assert both["pld"] == epsilon_of([charge.event for charge in charges], told.delta) and told.epsilon == min(both.values())
        assert 2.9 < told.epsilon <= 3.0
        assert told.epsilon_cross_check is not None
        assert told.epsilon_cross_check <= 3.0 * 1.001 and told.epsilon_cross_check == pytest.approx(told.epsilon, rel=0.02)
        assert run.lines[-1]["sites"][int(name[-1]) - 1]["epsilon"] == both["pld"]  # of every round; the second accountant is asked at the end
    claim = run.claim
    assert claim.protects is False and "protects nobody" in claim.statement
    assert {name: site.epsilon for name, site in claim.sites.items()} == {name: site.epsilon for name, site in privacy.sites.items()}
    assert privacy.seeded_noise is True


@pytest.mark.slow
def test_a_smaller_budget_takes_more_noise(runner) -> None:
    noises = [
        [site.noise_multiplier for site in runner.run(runner.study(privacy={"epsilon": epsilon}, rounds={"count": 1})).result.privacy.sites.values()]
        for epsilon in (0.5, 2.0, 8.0)
    ]
    for small, middle, large in zip(*noises, strict=True):
        assert small > middle > large > 0


def test_a_study_by_noise_multiplier_reports_what_that_costs(runner) -> None:
    run = runner.run(runner.study(privacy={"noise_multiplier": 2.0}))
    for site in run.result.privacy.sites.values():
        assert site.noise_multiplier == 2.0
        assert 0 < site.epsilon < 3


def test_without_privacy_nothing_is_promised(runner) -> None:
    run = runner.run(runner.study(privacy={"unit": "none"}))
    assert run.result.privacy.model_dump(exclude_none=True) == {"unit": "none", "seeded_noise": False, "sites": {}}
    assert (run.claim.unit, run.claim.protects, run.claim.sites) == ("none", False, {})
    assert not (run.folder.path / "ledgers").exists()
    assert all(site["epsilon"] is None for line in run.lines for site in line["sites"])


def test_the_unit_may_be_a_record(runner) -> None:
    run = runner.run(runner.study(privacy={"unit": "record"}))
    assert run.result.privacy.unit == run.claim.unit == "record"
    assert "one record" in (run.claim.neighbouring_relation or "")
    assert all(2.9 < site.epsilon <= 3.0 for site in run.result.privacy.sites.values())


@pytest.mark.slow
def test_noise_of_the_operating_system_differs_and_protects(runner) -> None:
    runs = [runner.run(runner.study(privacy={"noise_source": "os"})) for _ in range(2)]
    assert runs[0].model() != runs[1].model()
    for run in runs:
        assert run.result.privacy.seeded_noise is False
        assert run.claim.protects is True and "protects nobody" not in run.claim.statement
        assert {site.noise_source for site in run.claim.sites.values()} == {"os"}


def test_an_omitted_delta_follows_from_the_smallest_declared_size(runner) -> None:
    table = runner.study().to_table()
    del table["privacy"]["delta"]
    study = runner.study().from_table(table)
    run = runner.run(study)
    smallest = min(site.num_train for site in run.result.sites)
    assert {site.delta for site in run.result.privacy.sites.values()} == {min(1e-4, 1 / (10 * smallest))}
    assert run.folder.study.privacy.delta is not None


# Interrupted, failed ---------------------------------------------------------------------------------------------------------------


def interrupt_after(number: int, fold: int = 1):
    def observe(record: RoundRecord) -> None:
        if (record.fold, record.round) == (fold, number):
            raise KeyboardInterrupt

    return observe


def test_an_interrupt_is_told_in_the_result(runner) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.run(runner.study(), observe=interrupt_after(1))
    run = runner.latest()
    result = run.result
    assert (result.outcome, result.rounds_completed) == ("interrupted", 1)
    assert result.metrics["federated"] == {} and result.per_site == {}
    assert all(0 < site.epsilon < 3 for site in result.privacy.sites.values())
    assert not (run.folder.path / "model" / "final.safetensors").exists()
    assert any(json.loads(line)["message"] == "KeyboardInterrupt" for line in (run.folder.path / "log.jsonl").read_text().splitlines())


def test_an_interrupt_in_the_middle_of_training_leaves_the_reservation(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = client.local_update.train_round_private
    calls: list[int] = []

    def interrupted(*arguments: object, **named: object) -> int:
        calls.append(1)
        if len(calls) == 5:  # the second site of the second round
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(client.local_update, "train_round_private", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(runner.study(), execution="sequential")
    run = runner.latest()
    assert run.result.outcome == "interrupted"
    states = {}
    for name in ("site-1", "site-2", "site-3"):
        with reading(run.folder.path / "ledgers" / f"{name}.sqlite") as ledger:
            states[name] = [charge.committed for charge in ledger.charges()]
    assert states == {"site-1": [True, True], "site-2": [True, False], "site-3": [True]}
    whole = runner.run(runner.study(), execution="sequential")
    resumed = runner.run(run.folder.study, resume=run.folder.path, execution="sequential")
    assert resumed.model() == whole.model()
    assert resumed.comparable == whole.comparable


@pytest.mark.parametrize("execution", ["sequential", "blocks"])
def test_a_failure_is_told_in_the_result(runner, monkeypatch: pytest.MonkeyPatch, execution: Execution) -> None:
    def broken(*arguments: object, **named: object) -> int:
        raise RuntimeError("patient 17 has HIV")

    monkeypatch.setattr(client.local_update, "train_round_private", broken)
    monkeypatch.setattr(simulations.blocks.trainer, "train_block", broken)
    with pytest.raises(QuorumLostError, match="E101"):
        runner.run(runner.study(), execution=execution)
    run = runner.latest()
    assert run.result.outcome == "failed"
    assert "HIV" not in (run.folder.path / "result.json").read_text() + (run.folder.path / "privacy.json").read_text()


# Resume ----------------------------------------------------------------------------------------------------------------------------

RESUMED = {
    "fedavg": {},
    "fedadam": {"strategy": {"name": "fedadam"}},
    "a fraction, fedyogi": {"strategy": {"name": "fedyogi", "fraction": 0.4}},
    "three folds": {"evaluation": {"folds": 3}, "privacy": {"unit": "none"}},
}


@pytest.mark.parametrize("kind", list(RESUMED))
def test_a_resumed_run_is_the_uninterrupted_one(runner, kind: str) -> None:
    study = runner.study(**RESUMED[kind])
    folds = study.evaluation.folds
    whole = runner.run(study)
    with pytest.raises(KeyboardInterrupt):
        runner.run(study, observe=interrupt_after(1, fold=min(folds, 2)))
    partial = runner.latest()
    assert partial.result.outcome == "interrupted"
    resumed = runner.run(partial.folder.study, resume=partial.folder.path)
    assert resumed.comparable == whole.comparable
    assert resumed.lines == whole.lines
    for name in ["final"] if folds == 1 else ["fold-1", "fold-2", "fold-3"]:
        assert resumed.model(name) == whole.model(name)
    for name in ("privacy.json", "evaluation.json"):
        assert (resumed.folder.path / name).read_bytes() == (whole.folder.path / name).read_bytes()


@pytest.mark.slow
def test_a_private_cross_validation_resumes_to_the_same_bits(runner) -> None:
    study = runner.study(evaluation={"folds": 3}, strategy={"name": "fedadam"})
    whole = runner.run(study)
    with pytest.raises(KeyboardInterrupt):
        runner.run(study, observe=interrupt_after(1, fold=2))
    partial = runner.latest()
    resumed = runner.run(study, resume=partial.folder.path)
    assert resumed.comparable == whole.comparable
    assert resumed.lines == whole.lines
    assert [resumed.model(f"fold-{fold}") for fold in (1, 2, 3)] == [whole.model(f"fold-{fold}") for fold in (1, 2, 3)]


def test_an_interrupted_cross_validation_counts_only_those_tested(runner) -> None:
    """Two of three folds are done: per site the metrics are of two thirds of its patients, and the n beside them says so."""
    study = runner.study(evaluation={"folds": 3}, privacy={"unit": "none"}, rounds={"count": 1})
    with pytest.raises(KeyboardInterrupt):
        runner.run(study, observe=interrupt_after(1, fold=3))
    result = runner.latest().result
    cohorts = virtual_federation(resolve_task("breast-cancer"), study, None).cohorts
    for name, cohort in cohorts.items():
        tested = sum(int(held_out_patients(cohort, SIMULATION_SPLIT_KEY, fold=fold, folds=3).sum()) for fold in (1, 2))
        assert result.per_site[name]["num_test"] == tested < cohort.num_patients


def test_another_study_cannot_be_resumed_into_a_folder(runner) -> None:
    study = runner.study(privacy={"unit": "none"})
    run = runner.run(study)
    with pytest.raises(ModelMismatchError, match="study that this run began with"):
        resume_run(prepare(study.replace(seed=99), None), run.folder.path)


def test_other_patients_cannot_be_resumed_into_a_folder(runner, tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    bundle = load_breast_cancer(as_frame=True)
    frame = bundle.data.assign(diagnosis=bundle.target.map({0: "malignant", 1: "benign"}))
    study = runner.study(privacy={"unit": "none"})
    frame.iloc[:400].to_csv(tmp_path / "some.csv", index=False)
    frame.iloc[:399].to_csv(tmp_path / "fewer.csv", index=False)
    folder = start_run(prepare(study, tmp_path / "some.csv"), runner.out)
    assert resume_run(prepare(study, tmp_path / "some.csv"), folder.path).name == folder.name
    with pytest.raises(ModelMismatchError, match="patients"):
        resume_run(prepare(study, tmp_path / "fewer.csv"), folder.path)


def test_patients_whose_names_changed_are_others(runner) -> None:
    """The split follows a patient's name: the same records under other names would be trained and tested otherwise."""
    from dataclasses import replace

    federation = virtual_federation(resolve_task("breast-cancer"), runner.study(), None)
    renamed = {
        name: replace(cohort, patient_ids=tuple(f"new-{patient}" for patient in cohort.patient_ids)) for name, cohort in federation.cohorts.items()
    }
    assert replace(federation, cohorts=renamed).fingerprint() != federation.fingerprint()
    assert replace(federation, cohorts=dict(reversed(federation.cohorts.items()))).fingerprint() == federation.fingerprint()


# Every knob runs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_optimizer_and_schedule_runs(runner, optimizer: str, schedule: str) -> None:
    training = {"optimizer": optimizer, "schedule": schedule, "learning_rate": 0.05, "weight_decay": 0.01, "warmup_rounds": 1}
    run = runner.run(runner.study(training=training, privacy={"epsilon": 3.0} if schedule == "cosine" else {"unit": "none"}))
    assert run.result.outcome == "completed"
    assert 0 < run.result.metrics["federated"]["auroc"] <= 1


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_every_strategy_runs_and_differs(runner, usual, strategy: str) -> None:
    run = runner.run(runner.study(strategy={"name": strategy}))
    assert run.result.outcome == "completed"
    assert (run.comparable == usual.comparable) == (strategy == "fedavg")


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "quantity", "shards"])
def test_every_partition_runs(runner, partition: str) -> None:
    run = runner.run(runner.study(federation={"partition": partition, "alpha": 0.2}, privacy={"unit": "none"}, rounds={"count": 1}))
    assert sum(site.num_patients for site in run.result.sites) == 569


def test_cross_validation_tests_every_patient_once(runner) -> None:
    run = runner.run(runner.study(evaluation={"folds": 3}, privacy={"unit": "none"}, rounds={"count": 1}))
    stored = json.loads((run.folder.path / "evaluation.json").read_text())["sources"]["federated"]
    assert np.array(stored["score_histogram"]).sum() == 569
    assert len(run.result.folds) == 3
    assert {name: row["num_test"] for name, row in run.result.per_site.items()} == {site.name: site.num_patients for site in run.result.sites}
    assert run.result.rounds_completed == 1 and len(run.lines) == 3


@pytest.mark.slow
def test_noised_statistics_give_metrics_that_say_so(runner, usual) -> None:
    """One release, at the end: metrics in their range with intervals of the noise, sizes as declared, nothing counted from noise."""
    run = runner.run(runner.study(privacy={"evaluation_epsilon": 20.0}), baselines=True)
    result = run.result
    assert result.evaluation_epsilon == 20.0
    assert all(line["metrics"] == {} and all(site["metrics"] is None for site in line["sites"]) for line in run.lines)
    exact, noised = usual.result, result.metrics["federated"]
    assert noised.keys() == exact.metrics["federated"].keys() and noised != exact.metrics["federated"]
    assert all(value is None or 0 <= value <= 1 for value in noised.values())
    assert noised["auroc"] == pytest.approx(exact.metrics["federated"]["auroc"], abs=0.1)  # 170 test patients, at hardly any privacy
    low, high = result.metrics_ci95["federated"]["auroc"]
    assert 0 <= low <= exact.metrics["federated"]["auroc"] <= high <= 1 and high - low > 0.001
    assert result.metrics_ci95["pooled"]["auroc"] is not None  # baselines are not noised
    assert result.per_site_support == {}
    for site in result.sites:
        row = result.per_site[site.name]
        assert row["num_test"] == site.num_test
        if row["auroc"] is not None and row["auroc_ci95"] is not None:  # a small site: the noise says so
            assert 0 <= row["auroc_ci95"][0] <= row["auroc"] <= row["auroc_ci95"][1] <= 1
    stored = np.array(json.loads((run.folder.path / "evaluation.json").read_text())["sources"]["federated"]["score_histogram"])
    assert stored.min() < 0
    assert exact.evaluation_epsilon is None and exact.per_site_support


@pytest.mark.slow
def test_a_private_cross_validation_stays_within_the_budget(runner) -> None:
    run = runner.run(runner.study(evaluation={"folds": 2}, rounds={"count": 1}))
    assert all(2.9 < site.epsilon <= 3.0 for site in run.result.privacy.sites.values())
    claim = " ".join(run.claim.covered)
    assert "2 rounds" in claim


@pytest.mark.slow
def test_synthetic_patients_are_said_to_be_synthetic(runner, wards) -> None:
    study = wards.study.replace(federation={"sites": 2, "num_patients": 120}, rounds={"count": 1})
    result = runner.run(study).result
    assert result.synthetic is True
    assert sum(site.num_patients for site in result.sites) <= 120


# Hospitals with policies and ledgers of their own ----------------------------------------------------------------------------------


def test_hospitals_answer_for_themselves(runner, wards) -> None:
    run = runner.run(wards.study, data=wards.path)
    result = run.result
    assert [site.name for site in result.sites] == ["north", "south"]
    assert {(site.num_train, site.num_test, site.num_patients) for site in result.sites} == {(60, 25, 85)}  # as declared, not as counted
    assert result.privacy.seeded_noise is False and run.claim.protects is True
    assert {site.noise_source for site in run.claim.sites.values()} == {"os"}
    for name in ("north", "south"):
        with reading(wards.ledger(name)) as ledger:
            assert epsilon_of([charge.event for charge in ledger.charges()], 1e-3) == pytest.approx(result.privacy.sites[name].epsilon, rel=0.02)
            assert ledger.signed and ledger.account.plans[result.run].closed
            assert ledger.head == json.loads((run.folder.path.parent / ".witness" / "heads.json").read_text())[name]


@pytest.mark.slow
def test_statistics_stay_at_home_unless_the_policy_lists_every_metric(runner, wards) -> None:
    assert runner.run(wards.study, data=wards.path).result.metrics["federated"] == {}
    metrics = ["auroc", "accuracy", "auprc", "brier", "calibration_error"]
    for name in ("north", "south"):
        wards.write_policy(name, max_epsilon=40.0, allowed_metrics=metrics[:-1])
    assert runner.run(wards.study, data=wards.path).result.metrics["federated"] == {}
    wards.write_policy("north", max_epsilon=40.0, allowed_metrics=metrics)
    assert runner.run(wards.study, data=wards.path).result.metrics["federated"] == {}
    wards.write_policy("north", max_epsilon=40.0, allowed_metrics=metrics, exact_metrics=True)
    run = runner.run(wards.study, data=wards.path)
    assert set(run.result.metrics["federated"]) == set(metrics)
    assert list(run.result.per_site) == ["north"]
    assert [site["metrics"] is None for site in run.lines[0]["sites"]] == [False, True]
    wards.write_policy("north", max_epsilon=40.0, allowed_metrics=metrics, exact_metrics=True, min_metric_patients=200)
    assert runner.run(wards.study, data=wards.path).result.metrics["federated"] == {}


def test_a_second_run_starts_from_what_is_spent_and_is_refused_when_it_does_not_fit(runner, wards) -> None:
    first = runner.run(wards.study, data=wards.path)
    with pytest.raises(BudgetExhaustedError) as caught:
        runner.run(wards.study, data=wards.path)
    assert "north: E700" in str(caught.value) and "south: E700" in str(caught.value)
    assert caught.value.exit_code == 7
    assert runner.latest().result.outcome == "failed"
    for name in ("north", "south"):
        with reading(wards.ledger(name)) as ledger:
            assert len(ledger.charges()) == 2 and len(ledger.account.refused) == 1
            assert ledger.epsilon(1e-3) == pytest.approx(first.result.privacy.sites[name].epsilon, rel=0.02)
    for name in ("north", "south"):
        wards.write_policy(name, max_epsilon=4.0)
    runner.run(wards.study.replace(privacy={"epsilon": 1.0}), data=wards.path)  # the hospitals have raised their limit
    with reading(wards.ledger("north")) as ledger:
        assert 2.4 < ledger.epsilon(1e-3) <= ledger.epsilon_filter(Limit(epsilon=4.0, delta=1e-3)) <= 4.0


def test_one_hospital_without_room_is_named_and_the_other_goes_on(runner, wards) -> None:
    wards.write_policy("south", max_epsilon=1.0)
    run = runner.run(wards.study, data=wards.path)
    assert list(run.result.privacy.sites) == ["north"]
    assert [(site["name"], site["status"]) for site in run.lines[0]["sites"]] == [("north", "ok"), ("south", "refused")]
    assert run.lines[0]["sites"][1]["reason"].startswith("E600")


@pytest.mark.parametrize(
    "change", [{"allowed_tasks": ["other"]}, {"max_epsilon": 2.0}, {"max_delta": 1e-4}, {"min_patients": 61}], ids=lambda change: next(iter(change))
)
def test_a_policy_that_forbids_is_named(runner, wards, change: dict[str, object]) -> None:
    for name in ("north", "south"):
        wards.write_policy(name, **change)
    with pytest.raises(PolicyRefusedError, match="north: E600") as caught:
        runner.run(wards.study, data=wards.path)
    assert caught.value.exit_code == 6
    assert not wards.ledger("north").exists()


def test_no_privacy_is_refused_by_default_and_may_be_allowed(runner, wards) -> None:
    study = wards.study.replace(privacy={"unit": "none"})
    with pytest.raises(PolicyRefusedError):
        runner.run(study, data=wards.path)
    for name in ("north", "south"):
        wards.write_policy(name, allow_no_privacy=True)
    assert runner.run(study, data=wards.path).claim.unit == "none"


def test_a_hospital_whose_data_are_gone_is_named(runner, wards) -> None:
    (wards.path / "south" / "patients.csv").unlink()
    run = runner.run(wards.study, data=wards.path)
    assert run.lines[0]["sites"][1]["status"] == "refused" and run.lines[0]["sites"][1]["reason"].startswith("E501")
    (wards.path / "north" / "patients.csv").unlink()
    wards.write_policy("north", max_epsilon=40.0)
    with pytest.raises(DataMissingError.__mro__[1]):
        runner.run(wards.study, data=wards.path)


def test_two_hospitals_of_one_name_are_a_mistake(wards) -> None:
    (wards.path / "south" / "site.toml").write_text((wards.path / "north" / "site.toml").read_text())
    with pytest.raises(ConfigurationError, match="name of its own"):
        prepare(wards.study, wards.path)


def test_hospitals_keep_their_split_and_noise_from_run_to_run(runner, wards) -> None:
    """The key is made once; the noise is not the study's to choose, whatever it asks for."""
    for name in ("north", "south"):
        wards.write_policy(name, max_epsilon=40.0)
    assert wards.study.privacy.noise_source == "seeded"
    first = runner.run(wards.study, data=wards.path)
    keys = [(wards.path / name / "state" / "patient-hash.key").read_bytes() for name in ("north", "south")]
    second = runner.run(wards.study, data=wards.path)
    assert [(wards.path / name / "state" / "patient-hash.key").read_bytes() for name in ("north", "south")] == keys
    assert len(set(keys)) == 2
    assert first.model() != second.model()


# Real, named hospitals -------------------------------------------------------------------------------------------------------------


def test_a_study_of_real_hospitals_without_their_data_is_a_data_error(runner) -> None:
    with pytest.raises(DataMissingError) as caught:
        prepare(runner.study().load(STUDIES / "heart-disease.toml"), None)
    assert caught.value.exit_code == 5
    assert "cleveland" in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not HEART.is_dir(), reason=f"needs the files in {HEART} (wardround data fetch heart-disease)")
def test_the_real_hospitals_of_the_heart_study(runner) -> None:
    study = runner.study().load(STUDIES / "heart-disease.toml").replace(rounds={"count": 3}, evaluation={"bootstrap": 50})
    run = runner.run(study, data=HEART)
    sizes = {site.name: site.num_patients for site in run.result.sites}
    assert len(sizes) == 4 and sizes["cleveland"] == 303
    assert run.result.synthetic is False
    assert run.result.metrics["federated"]["auroc"] > 0.5
    assert all(site.epsilon <= 3.0 for site in run.result.privacy.sites.values())
    again = runner.run(study, data=HEART)
    assert again.model() == run.model() and again.comparable == run.comparable


def test_a_folder_can_be_prepared_and_executed_by_hand(runner) -> None:
    setting = prepare(runner.study(privacy={"unit": "none"}), None)
    folder = start_run(setting, runner.out)
    seen: list[RoundRecord] = []
    execute(setting, folder, baselines=False, observe=seen.append)
    assert RunFolder.open(folder.path).rounds() == seen
