"""What a strategy does at a site under privacy: what is released, how often, and with how much noise."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import client.local_update
from client.app import answer_record
from client.kept_state import KeptState
from client.local_training import LocalRound, record_losses
from client.local_update import Learner
from client.noise import NoiseGrid
from client.strategies.choice import local_rule
from shared.cohort import Cohort
from shared.errors import ProtocolError, StorageError
from shared.messages import CONTROL, EvaluateTask, encode, to_array_record
from shared.models import get_parameters, initial_parameters, set_parameters
from shared.plan import SitePlan
from shared.seeding import derive_key
from shared.study import Study
from shared.task import Task

Studies, Patients, Plans = Callable[..., Study], Callable[..., Cohort], Callable[..., SitePlan]
MAX_LOSS = 1.5


@pytest.fixture
def learn(task: Task, make_study: Studies, make_patients: Patients, make_plan: Plans) -> Callable[..., Learner]:
    """A learner of 30 patients under privacy, with what is named changed."""

    def make(number: int = 0, *, strategy: str = "q-fedavg", cohort: Cohort | None = None, simulated: bool = True, **plan: object) -> Learner:
        options = {"max_loss": MAX_LOSS} if strategy == "q-fedavg" else {}
        changes = {"training": {"local_steps": 2}} if strategy == "scaffold" else {}
        study = make_study(strategy={"name": strategy, **options}, **changes)
        return Learner(
            model=task.model(), train_part=make_patients(30) if cohort is None else cohort, local=LocalRound(study=study, task=task, round_number=1),
            plan=make_plan(**{"steps_per_round": 2, "extra_steps": 1, "expected_batch_size": 30.0, "declared_size": 30, **plan}),
            key=derive_key(5, "rules", number), simulated=simulated,
        )  # fmt: skip

    return make


def sent_loss(learner: Learner, task: Task) -> float:
    made = local_rule(learner.local.study, task).train(learner, {}, initial_parameters(task.model(), 1), {})
    assert made.loss is not None
    return made.loss


def losses(task: Task, cohort: Cohort, study: Study) -> np.ndarray:
    """Of each record, clipped, of the first model."""
    model = task.model()
    set_parameters(model, initial_parameters(model, 1))
    with torch.no_grad():
        found = record_losses(model.eval(), cohort, np.arange(cohort.num_records), task)
    return np.clip(found.double().numpy(), 0, MAX_LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [True, False])
def test_the_loss_is_the_clipped_sum_with_the_noise_of_one_step(task: Task, learn, make_patients: Patients, simulated: bool) -> None:
    """Every unit in every batch (q = 1), so all that varies is noise. 400 draws: the mean is off by 5 standard errors, or the deviation by
    18 %, once in a million."""
    cohort = make_patients(30)
    draws = np.array([sent_loss(learn(number, cohort=cohort, simulated=simulated, noise_multiplier=0.4), task) for number in range(400)])
    std = 0.4 * NoiseGrid.of(MAX_LOSS, 1).sensitivity / 30
    expected = losses(task, cohort, learn().local.study).mean()
    assert abs(draws.mean() - expected) < 5 * std / math.sqrt(len(draws))
    assert 0.82 < draws.std() / std < 1.18


def test_one_unit_moves_the_sum_by_at_most_max_loss(task: Task, learn, make_patients: Patients) -> None:
    """The same key, so the same noise and the same batch but for one patient, whose loss is as large as it can be, or not finite."""
    cohort = make_patients(30)
    without = sent_loss(learn(cohort=cohort.select(np.arange(30) != 4), noise_multiplier=1e-3), task)
    for value in (1e6, np.inf, np.nan):
        inputs = cohort.inputs[0].copy()
        inputs[cohort.patient_of_record == 4] = value
        labels = np.where(cohort.patient_of_record == 4, 1 - np.sign(inputs[:, 0].clip(0)), cohort.labels).astype(np.float32)
        changed = dataclasses.replace(cohort, inputs=(inputs,), labels=labels)
        moved = (sent_loss(learn(cohort=changed, noise_multiplier=1e-3), task) - without) * 30
        assert -0.02 <= moved <= NoiseGrid.of(MAX_LOSS, 1).sensitivity + 0.02
        assert math.isfinite(value) or moved < 0.02, "what is not finite counts as none"


def test_all_records_of_a_patient_count_as_their_mean(task: Task, learn, make_patients: Patients, make_study: Studies) -> None:
    cohort = make_patients(30, most_records=4)
    learner = learn(cohort=cohort, noise_multiplier=1e-4)
    learner.local = dataclasses.replace(learner.local, study=learner.local.study.replace(privacy={"records_per_patient": "all"}))
    by_record = losses(task, cohort, learner.local.study)
    of_patients = [by_record[cohort.patient_of_record == patient].mean() for patient in range(30)]
    assert sent_loss(learner, task) == pytest.approx(np.mean(of_patients), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "steps"), [("q-fedavg", 2), ("scaffold", 1), ("feddyn", 1), ("ditto", 2), ("apfl", 2), ("fedper", 1), ("fedrep", 2), ("fedavg", 1)]
)
def test_a_round_takes_the_steps_that_it_is_charged_for(task: Task, learn, name: str, steps: int) -> None:
    extra = 1 if name in ("q-fedavg", "ditto", "apfl") else 0
    learner = learn(strategy=name, steps_per_round=steps, extra_steps=extra)
    rule = local_rule(learner.local.study, task)
    template = get_parameters(task.model())
    shared = {n: v for n, v in initial_parameters(task.model(), 1).items() if name not in ("fedper", "fedrep") or not n.startswith("2.")}
    made = rule.train(learner, {}, shared, {})
    assert learner.steps == steps
    assert set(made.update) == set(shared) and set(shared) <= set(template)
    assert (made.loss is not None) == (name == "q-fedavg") and bool(made.kept) == rule.keeps


def test_two_trainings_of_a_round_draw_other_batches_and_noise(task: Task, learn) -> None:
    learner, start = learn(strategy="fedavg", extra_steps=0, steps_per_round=1), initial_parameters(task.model(), 1)
    first, again, other = learner.train(start), learner.train(start), learner.train(start, purpose="personal")
    assert all(np.array_equal(first[name], again[name]) for name in start)
    assert all(not np.array_equal(first[name], other[name]) for name in start)


def test_what_is_not_trained_stays_as_it_is_and_may_be_trained_again(task: Task, learn) -> None:
    learner, start = learn(strategy="fedavg", extra_steps=0, steps_per_round=1), initial_parameters(task.model(), 1)
    [first, *rest] = start
    trained = learner.train(start, only=frozenset([first]))
    assert not np.array_equal(trained[first], start[first]) and all(np.array_equal(trained[name], start[name]) for name in rest)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in learner.model.parameters())


def test_what_a_site_keeps_is_made_of_its_update_and_of_what_it_received(task: Task, learn) -> None:
    """Why a control variate is no second release: another site's patients with the same update would keep the same."""
    received = initial_parameters(task.model(), 1)
    control = {name: np.full_like(value, 0.1) for name, value in received.items()}
    for name in ("scaffold", "feddyn"):
        learner = learn(strategy=name, extra_steps=0)
        made = local_rule(learner.local.study, task).train(learner, {}, received, control if name == "scaffold" else {})
        [kept] = made.kept.values()
        training = learner.local.study.training
        for key, update in made.update.items():
            expected = -control[key] - update / (2 * training.learning_rate) if name == "scaffold" else -0.1 * update
            np.testing.assert_allclose(kept[key], expected, rtol=1e-5, atol=1e-7)


# At a hospital -----------------------------------------------------------------------------------------------------------------------


def test_a_site_takes_no_control_that_its_study_does_not_have(make_hospital, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    record = encode(hospital.training(study), parameters=hospital.parameters)
    record[CONTROL] = to_array_record(hospital.parameters)
    with pytest.raises(ProtocolError, match="expected 0 named tensors"):
        answer_record(hospital.site, hospital.training(study), record)
    assert not hospital.charges()


@pytest.mark.parametrize("name", ["ditto", "fedper", "apfl"])
def test_a_site_of_its_own_model_survives_a_restart_and_is_charged_once(make_hospital, make_study: Studies, name: str) -> None:
    hospital, study = make_hospital(max_epsilon=10.0), make_study(strategy={"name": name}, rounds={"count": 3})
    hospital.site.enrol(hospital.enrolment(study))
    sent = {key: value for key, value in hospital.parameters.items() if key in hospital.site.template}
    assert (len(sent) < len(hospital.parameters)) == (name == "fedper")

    def own() -> dict[str, dict[str, np.ndarray]]:
        state = KeptState(hospital.site.settings.releases_path, "run-1").before(1, 99)
        return {group: dict(arrays) for group, arrays in state.items()}

    _, first, _ = hospital.site.train(hospital.training(study, 1), sent)
    kept = own()
    hospital.reopen().enrol(hospital.enrolment(study))
    _, again, _ = hospital.site.train(hospital.training(study, 1), sent)
    assert all(np.array_equal(first[key], again[key]) for key in sent) and len(hospital.charges()) == 1
    assert all(np.array_equal(own()["personal"][key], value) for key, value in kept["personal"].items())
    hospital.site.train(hospital.training(study, 2), sent)
    assert len(hospital.charges()) == 2
    assert any(not np.array_equal(own()["personal"][key], value) for key, value in kept["personal"].items()), "its own model goes on"
    [stored] = {path.stat().st_mode & 0o077 for path in hospital.site.settings.releases_path.glob("*kept*")}
    assert stored == 0, "nobody else reads a site's own model"


def test_fine_tuning_is_charged_before_it_begins_and_once(make_hospital, make_study: Studies, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital, study = (
        make_hospital(max_epsilon=10.0, exact_metrics="true", allowed_metrics='["auroc"]'),
        make_study(strategy={"name": "fine-tuning"}, rounds={"count": 1}),
    )
    hospital.site.enrol(hospital.enrolment(study))
    hospital.site.train(hospital.training(study, 1), hospital.parameters)
    closing = EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=1, fold=1)
    with monkeypatch.context() as patch:
        patch.setattr(client.local_update, "train_round_private", lambda *arguments, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hospital.site.evaluate(closing, hospital.parameters)
    assert [charge.committed for charge in hospital.charges()] == [True, False], "what was reserved stands, though nothing was trained"


def test_damaged_knowledge_of_secure_sums_is_named(make_hospital, make_study: Studies) -> None:
    """Which sum was signed last, and the other sites' keys: without them a site takes part in no sum."""
    hospital, study = make_hospital(), make_study(secure_aggregation={})
    hospital.site.enrol(hospital.enrolment(study))
    folder = hospital.site.settings.releases_path
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(b'run-1').hexdigest()[:32]}-sum.json"
    whole = {"run": "run-1", "masked": [1, 1], "inputs": {}, "signed": [1, 1], "survivors": [], "input": "", "keys": {"north": "ab" * 32}}
    for damaged in ("", "{}", json.dumps({**whole, "keys": {"north": "xy"}}), json.dumps({**whole, "keys": 3}), json.dumps({**whole, "signed": "x"})):
        path.write_text(damaged)
        with pytest.raises(StorageError, match="expected what was masked and signed last in this run"):
            hospital.reopen().enrol(hospital.enrolment(study))
    path.write_text(json.dumps(whole))
    hospital.reopen().enrol(hospital.enrolment(study))
