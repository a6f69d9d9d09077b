"""One hospital's answers: policy, then ledger, then the cohort; charged before trained; nothing of a patient in a reply or a log."""

import dataclasses
import logging
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from client.admission import SiteSettings
from client.app import client_app
from client.ledger import reading
from client.site import Site
from server.witness import Witness
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, patient_hash
from shared.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    DataError,
    DataMissingError,
    LedgerError,
    ModelRefusedError,
    PolicyRefusedError,
    ProtocolError,
    SchemaError,
)
from shared.messages import (
    Enrolled,
    EnrolTask,
    EvaluateTask,
    NotCounted,
    Refused,
    Trained,
    TrainTask,
    WitnessedHead,
    decode,
    decode_parameters,
    encode,
)
from shared.models import Parameters, initial_parameters, template_of
from shared.plan import plan_site
from shared.privacy import epsilon_of, filter_order, renyi_divergence, renyi_epsilon
from shared.study import Study
from shared.task import Task
from simulations.in_process import InProcessGrid

Hospitals = Callable[..., Any]
Studies = Callable[..., Study]
Patients = Callable[..., Cohort]
JANE = "Jane Doe, born 1931-05-17"


def changes_of(parameters: Parameters) -> np.ndarray:
    return np.concatenate([value.ravel() for value in parameters.values()]).astype(np.float64)


def virtual_site(task: Task, cohort: Cohort, folder: Path, name: str = "a") -> Site:
    settings = SiteSettings(
        name=name,
        declared_size=60,
        declared_num_patients=80,
        declared_num_test=20,
        ledger_path=folder / f"{name}.sqlite",
        releases_path=folder / f"{name}.releases",
        split_key=SIMULATION_SPLIT_KEY,
    )
    return Site(settings, task, lambda: cohort)


def enrol(site: Site, task: Task, study: Study, run: str = "run-1") -> TrainTask:
    """Enrol, and give the first round's message."""
    site.enrol(EnrolTask(run=run, study=study.to_table(), task_fingerprint=task.fingerprint()))
    return TrainTask(run=run, study_hash=study.fingerprint(), round=1, fold=1)


# Enrolment ------------------------------------------------------------------------------------------------------------------------


def test_a_hospital_says_its_declared_sizes_and_no_others(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital = make_hospital()
    answer = hospital.site.enrol(hospital.enrolment(make_study()))
    with reading(hospital.ledger_path) as ledger:
        head = ledger.head
    assert answer == Enrolled(name="north", declared_size=60, declared_num_patients=80, declared_num_test=20, ledger_head=head)


def test_policy_comes_before_the_cohort(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital = make_hospital(csv=None)  # opening the cohort would be a DataMissingError
    for refused in (make_study(privacy={"epsilon": 9.0}), make_study(privacy={"unit": "none"})):
        with pytest.raises(PolicyRefusedError):
            hospital.site.enrol(hospital.enrolment(refused))
    with pytest.raises(ConfigurationError, match="got another fingerprint"):
        hospital.site.enrol(EnrolTask(run="r", study=make_study().to_table(), task_fingerprint="x"))
    with pytest.raises(ConfigurationError, match="study: privacy.epsilon"):
        hospital.site.enrol(
            EnrolTask(run="r", study={**make_study().to_table(), "privacy": {"epsilon": -1}}, task_fingerprint=hospital.task.fingerprint())
        )
    with pytest.raises(DataMissingError):
        hospital.site.enrol(hospital.enrolment(make_study()))


def test_a_real_site_takes_no_study_with_planted_faults(
    make_hospital: Hospitals, make_study: Studies, task: Task, make_patients: Patients, tmp_path: Path
) -> None:
    hospital, study = make_hospital(csv=None), make_study(faults={"sites": 1})
    with pytest.raises(ConfigurationError, match="faults: expected none at a real site") as refused:
        hospital.site.enrol(hospital.enrolment(study))
    assert refused.value.rule == "faults"
    virtual_site(task, make_patients(80), tmp_path).enrol(EnrolTask(run="r", study=study.to_table(), task_fingerprint=task.fingerprint()))


HOSTILE = "E102 \x1b[2Jall is well\u2028" + "x" * 200


def test_a_site_says_once_and_as_plain_text_why_its_update_did_not_count(
    make_study: Studies, task: Task, make_patients: Patients, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, site = make_study(privacy={"unit": "none"}), virtual_site(task, make_patients(80), tmp_path)
    parameters, first = initial_parameters(task.model(), 0), enrol(site, task, study)
    told = NotCounted(fold=1, round=1, reason=HOSTILE)
    with caplog.at_level(logging.WARNING, logger="client"):
        site.train(first, parameters)
        for number in (2, 2, 3):
            site.train(first.model_copy(update={"round": number, "not_counted": told}), parameters)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("site a: its update of round 1 did not count: E102  [2Jall is well ") and said.isprintable()


def test_a_reason_is_short() -> None:
    with pytest.raises(ProtocolError, match="not_counted"):
        long = f'{{"kind":"train","run":"r","study_hash":"h","round":1,"fold":1,"not_counted":{{"fold":1,"round":1,"reason":"{"x" * 301}"}}}}'
        decode(RecordDict({"message": ConfigRecord({"json": long})}), TrainTask)


def test_an_answer_names_run_and_study(make_study: Studies, task: Task, make_patients: Patients, tmp_path: Path) -> None:
    study, site = make_study(privacy={"unit": "none"}), virtual_site(task, make_patients(80), tmp_path)
    first, parameters = enrol(site, task, study), initial_parameters(task.model(), 0)
    trained, _, _ = site.train(first, parameters)
    evaluated, _ = site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=study.rounds.count, fold=1), parameters)
    assert {(answer.run, answer.study_hash) for answer in (trained, evaluated)} == {("run-1", study.fingerprint())}


def test_an_exhausted_budget_is_refused_before_the_cohort_is_opened(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(max_epsilon=2.5), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    for number in (1, 2, 3):
        hospital.site.train(hospital.training(study, number), hospital.parameters)
    (hospital.folder / "patients.csv").unlink()
    with pytest.raises(BudgetExhaustedError, match="expected at most epsilon 2.5"):
        hospital.reopen().enrol(hospital.enrolment(study, run="run-2"))


def test_a_study_that_fits_alone_but_not_on_top_is_refused(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(max_epsilon=4.0), make_study(privacy={"epsilon": 2.0})
    runs = 0
    with pytest.raises(BudgetExhaustedError):
        for runs in range(1, 20):
            hospital.site.enrol(hospital.enrolment(study, run=f"run-{runs}"))
            for number in (1, 2, 3):
                hospital.site.train(hospital.training(study, number, run=f"run-{runs}"), hospital.parameters)
    spent = hospital.epsilon(1e-3)
    assert 3 <= runs <= 8 and 2.0 < spent <= 4.0  # composition is less than addition, and more than the largest


@pytest.mark.slow
def test_an_old_runs_name_does_not_carry_another_study(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    hospital.site.train(hospital.training(study), hospital.parameters)
    with pytest.raises(ProtocolError, match="run: expected a name of its own"):
        hospital.site.enrol(hospital.enrolment(make_study(privacy={"epsilon": 1.0})))
    hospital.reopen().enrol(hospital.enrolment(study))  # the same run goes on after a restart
    hospital.site.train(hospital.training(study, 2), hospital.parameters)


@pytest.mark.parametrize("restart", [False, True])
def test_a_cohort_keeps_one_unit(make_hospital: Hospitals, make_study: Studies, restart: bool) -> None:
    """A patient has several records: what record-level noise promises is not what the ledger's patients were promised."""
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    site = hospital.reopen() if restart else hospital.site
    with pytest.raises(LedgerError, match=r"expected the ledger of cohort 'north' \(add or remove one record\)"):
        site.enrol(hospital.enrolment(make_study(privacy={"unit": "record"}), run="run-2"))
    site.enrol(hospital.enrolment(study))  # and the first study goes on


def test_a_ledger_moved_to_another_site_is_refused(make_hospital: Hospitals, make_study: Studies) -> None:
    north, south = make_hospital(), make_hospital(name="south")
    north.site.enrol(north.enrolment(make_study()))
    north.site.close()
    south.ledger_path.parent.mkdir(exist_ok=True)
    south.ledger_path.write_bytes(north.ledger_path.read_bytes())
    with pytest.raises(LedgerError, match="a ledger is never reused"):
        south.site.enrol(south.enrolment(make_study()))


def test_the_ledger_knows_its_patients_whatever_came_first(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital = make_hospital(allow_no_privacy="true")
    hospital.site.enrol(hospital.enrolment(make_study(privacy={"unit": "none"}), run="plain"))  # opens the cohort, has no ledger
    hospital.site.enrol(hospital.enrolment(make_study()))
    hospital.site.close()
    key = (hospital.folder / "state" / "patient-hash.key").read_bytes()
    database = sqlite3.connect(hospital.ledger_path)
    known = {row[0] for row in database.execute("SELECT hash FROM patient")}
    database.close()
    assert known == {patient_hash(key, f"patient-{index}") for index in range(80)}
    assert b"patient-1" not in hospital.ledger_path.read_bytes()


def test_a_hospital_probes_the_model_itself(make_hospital: Hospitals, make_study: Studies, task: Task) -> None:
    """In a deployment nobody else does."""
    leaking = dataclasses.replace(task, model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)))
    hospital = make_hospital(task=leaking)
    with pytest.raises(ModelRefusedError, match="BatchNorm"):
        hospital.site.enrol(hospital.enrolment(make_study()))


# Rounds ---------------------------------------------------------------------------------------------------------------------------


def test_unknown_studies_rounds_and_folds_are_protocol_errors(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    with pytest.raises(ProtocolError, match="got one it has not"):
        hospital.site.train(hospital.training(study), hospital.parameters)
    with pytest.raises(ProtocolError):
        _ = hospital.site.template
    hospital.site.enrol(hospital.enrolment(study))
    good = hospital.training(study)
    for change in ({"run": "run-2"}, {"study_hash": "x"}, {"round": 0}, {"round": 5}, {"round": -1}, {"fold": 0}, {"fold": 2}):
        with pytest.raises(ProtocolError):
            hospital.site.train(good.model_copy(update=change), hospital.parameters)
        with pytest.raises(ProtocolError):
            hospital.site.evaluate(EvaluateTask(**{**good.model_dump(exclude={"kind", "heads"}), **change}), hospital.parameters)
    with pytest.raises(ProtocolError):  # the model may be evaluated once more after the last round, but not trained
        hospital.site.train(hospital.training(study, 4), hospital.parameters)
    hospital.site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=4, fold=1), hospital.parameters)
    assert hospital.charges() == []


@pytest.mark.slow
def test_a_round_is_charged_and_reported_as_charged(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    told = [hospital.site.train(hospital.training(study, number), hospital.parameters)[0].privacy for number in (1, 2, 3)]
    spends = hospital.charges()
    assert [(item.entry.round, item.committed, item.event.steps) for item in spends] == [(1, True, 2), (2, True, 2), (3, True, 2)]
    assert [spent.steps for spent in told] == [2, 4, 6]
    for number, spent in enumerate(told, start=1):
        assert spent.epsilon == epsilon_of([item.event for item in spends[:number]], 1e-3)
    assert told[2].epsilon <= 2.0 and told[0].epsilon < told[1].epsilon < told[2].epsilon
    reply, _ = hospital.site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=4, fold=1), hospital.parameters)
    spent = reply.privacy
    assert spent.epsilon <= spent.epsilon_cross_check == pytest.approx(spent.epsilon, rel=0.02) and {
        spent.accountant,
        spent.cross_check_accountant,
    } == {"pld", "prv"}
    assert spent.epsilon <= spent.epsilon_planned == pytest.approx(told[2].epsilon)


def test_the_charge_stands_where_training_fails(make_hospital: Hospitals, make_study: Studies, task: Task) -> None:
    fails = [False]

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise RuntimeError(JANE)
        return task.loss(outputs, labels)

    hospital = make_hospital(task=dataclasses.replace(task, loss=loss))
    study = make_study(training={"batch_size": 40})
    hospital.site.enrol(hospital.enrolment(study))
    fails[0] = True
    with pytest.raises(RuntimeError):
        hospital.site.train(hospital.training(study), hospital.parameters)
    spends = hospital.charges()
    assert [(item.committed, item.event.steps) for item in spends] == [(False, 2)]


def test_a_round_asked_again_is_the_identical_update_and_no_new_charge(make_hospital: Hospitals, make_study: Studies) -> None:
    """Also after a restart; the same round on other parameters is another release, and the plan has no steps for it."""
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    first = changes_of(hospital.site.train(hospital.training(study), hospital.parameters)[1])
    again = changes_of(hospital.site.train(hospital.training(study), hospital.parameters)[1])
    hospital.reopen().enrol(hospital.enrolment(study))
    restarted = changes_of(hospital.site.train(hospital.training(study), hospital.parameters)[1])
    assert first.tobytes() == again.tobytes() == restarted.tobytes() and len(hospital.charges()) == 1
    moved = {name: value + 1 for name, value in hospital.parameters.items()}
    for number in (2, 3):
        hospital.site.train(hospital.training(study, number), hospital.parameters)
    with pytest.raises(BudgetExhaustedError, match="spare_rounds"):
        hospital.site.train(hospital.training(study, 3), moved)
    assert len(hospital.charges()) == 3


@pytest.mark.parametrize("spare", [0, 1])
def test_a_round_lost_in_a_crash_stays_charged_and_spare_rounds_plan_for_it(
    make_hospital: Hospitals, make_study: Studies, spare: int, task: Task
) -> None:
    fails = [False]

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise RuntimeError("pulled plug")
        return task.loss(outputs, labels)

    hospital = make_hospital(task=dataclasses.replace(task, loss=loss))
    study = make_study(privacy={"spare_rounds": spare}, training={"batch_size": 40})
    hospital.site.enrol(hospital.enrolment(study))
    hospital.site.train(hospital.training(study), hospital.parameters)
    fails[0] = True
    with pytest.raises(RuntimeError):
        hospital.site.train(hospital.training(study, 2), hospital.parameters)
    fails[0] = False
    hospital.reopen().enrol(hospital.enrolment(study))
    hospital.site.train(hospital.training(study, 2), hospital.parameters)
    if spare:
        hospital.site.train(hospital.training(study, 3), hospital.parameters)
    else:
        with pytest.raises(BudgetExhaustedError):
            hospital.site.train(hospital.training(study, 3), hospital.parameters)
    assert [charge.committed for charge in hospital.charges()] == [True, False, True, *[True] * spare]
    assert hospital.epsilon(1e-3) <= 2.0


def test_the_noise_of_a_plan_passes_the_study_and_the_filter(make_hospital: Hospitals, make_study: Studies) -> None:
    """A study as large as the limit gets the noise to pass the filter; under a wide limit, the noise of its own budget."""
    noises = {}
    for limit in (2.0, 4.0):
        hospital, study = make_hospital(name=f"h{limit:g}", max_epsilon=limit), make_study()
        hospital.site.enrol(hospital.enrolment(study))
        plan = hospital.site._admission.plan
        noises[limit] = plan.noise_multiplier
        order = filter_order(limit, 1e-3)
        assert plan.epsilon <= 2.0 and renyi_epsilon(renyi_divergence(plan.study_event(), order), order=order, delta=1e-3) <= limit
    assert noises[2.0] > noises[4.0] == plan_site(make_study(), 60).noise_multiplier


def test_the_last_evaluation_closes_the_plan(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    hospital.site.train(hospital.training(study), hospital.parameters)
    closing = EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=3, fold=1)
    hospital.site.evaluate(closing, hospital.parameters)
    with reading(hospital.ledger_path) as ledger:
        assert ledger.account.plans["run-1"].closed
    with pytest.raises(ProtocolError, match="closed"):
        hospital.site.train(hospital.training(study, 2), hospital.parameters)
    hospital.site.evaluate(closing, hospital.parameters)  # asked again: an answer, and nothing to pay


# The coordinator as witness -------------------------------------------------------------------------------------------------------


def test_a_site_refuses_to_start_below_what_the_coordinator_saw(make_hospital: Hospitals, make_study: Studies, tmp_path: Path) -> None:
    hospital, study, witness = make_hospital(), make_study(), Witness(tmp_path / "witness")

    def enrolment(run: str) -> EnrolTask:
        return hospital.enrolment(study, run=run).model_copy(update={"coordinator_key": witness.public_key, "heads": witness.heads()})

    answer = hospital.site.enrol(enrolment("run-1"))
    witness.remember({"north": answer.ledger_head})
    hospital.site.close()  # the write-ahead log is folded into the file
    old = hospital.ledger_path.read_bytes()
    hospital.reopen().enrol(enrolment("run-1"))
    task = hospital.training(study).model_copy(update={"heads": witness.heads()})
    reply, _, _ = hospital.site.train(task, hospital.parameters)
    witness.remember({"north": reply.ledger_head})
    assert hospital.charges()[0].entry.witnessed_head == answer.ledger_head
    hospital.site.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{hospital.ledger_path}{suffix}").unlink(missing_ok=True)
    hospital.ledger_path.write_bytes(old)
    with pytest.raises(LedgerError, match="which the coordinator saw last"):
        hospital.reopen().enrol(enrolment("run-2"))
    shutil.rmtree(hospital.folder / "state")
    with pytest.raises(LedgerError, match="which the coordinator saw last"):
        hospital.reopen().enrol(enrolment("run-2"))
    forged = {"north": WitnessedHead(head="0" * 64, signature="0" * 128)}
    with pytest.raises(ProtocolError, match="expected the coordinator's signature"):
        hospital.site.enrol(enrolment("run-3").model_copy(update={"heads": forged}))
    Witness(tmp_path / "witness")  # its memory is read again


def test_a_hospitals_noise_is_never_seeded(make_hospital: Hospitals, make_study: Studies) -> None:
    """Two hospitals alike in everything, asked for seeded noise, answer differently: the noise is the system's."""
    study, answers = make_study(privacy={"noise_source": "seeded"}), []
    for _ in range(2):
        hospital = make_hospital(name=f"north-{len(answers)}")
        hospital.site.enrol(hospital.enrolment(study))
        answers.append(changes_of(hospital.site.train(hospital.training(study), hospital.parameters)[1]))
    assert not np.array_equal(*answers)


def test_statistics_leave_only_by_the_policy(make_hospital: Hospitals, make_study: Studies, task: Task) -> None:
    study = make_study()
    names = str([metric.name for metric in task.metrics]).replace("'", '"')
    for number, (rules, leaves) in enumerate(
        (
            ({}, False),
            ({"allowed_metrics": names}, False),
            ({"allowed_metrics": names, "exact_metrics": "true"}, True),
            ({"allowed_metrics": names, "exact_metrics": "true", "min_metric_patients": 80}, False),
        )
    ):
        hospital = make_hospital(name=f"h{number}", **rules)
        hospital.site.enrol(hospital.enrolment(study))
        _, _, trained = hospital.site.train(hospital.training(study), hospital.parameters)
        _, evaluated = hospital.site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=1, fold=1), hospital.parameters)
        assert (trained is not None) == (evaluated is not None) == leaves


def test_a_seeded_round_again_is_the_same_bits_and_no_new_charge(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    study, cohort = make_study(), make_patients(80, most_records=2)
    answers = []
    for _ in range(2):  # as a resumed simulation: new objects, the same ledger
        site = virtual_site(task, cohort, tmp_path)
        message = enrol(site, task, study)
        answers.append(changes_of(site.train(message, initial_parameters(task.model(), 3))[1]))
        assert len(site.ledger_for(site._admission.plan).charges()) == 1  # type: ignore[union-attr]
        site.close()
    assert np.array_equal(*answers)
    site = virtual_site(task, cohort, tmp_path)
    other = initial_parameters(task.model(), 4)
    site.train(enrol(site, task, study), other)  # other parameters are another release
    assert len(site.ledger_for(site._admission.plan).charges()) == 2  # type: ignore[union-attr]
    site.close()


def test_a_virtual_site_may_take_the_systems_noise(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    study, answers = make_study(privacy={"noise_source": "os"}), []
    for name in ("one", "two"):
        site = virtual_site(task, make_patients(80), tmp_path / name)
        answers.append(changes_of(site.train(enrol(site, task, study), initial_parameters(task.model(), 3))[1]))
        site.close()
    assert not np.array_equal(*answers)


def test_a_virtual_sites_budget_is_the_studys(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    study = make_study(privacy={"noise_source": "os"})
    site = virtual_site(task, make_patients(80), tmp_path)
    message, parameters = enrol(site, task, study), initial_parameters(task.model(), 3)
    for number in (1, 2, 3):
        site.train(message.model_copy(update={"round": number}), parameters)
    moved = {name: value + 1 for name, value in parameters.items()}
    with pytest.raises(BudgetExhaustedError):  # other parameters: another release, another charge, and no room for it
        site.train(message.model_copy(update={"round": 3}), moved)
    site.close()


def test_no_two_sites_rounds_folds_or_steps_share_noise(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    """With a loss that is zero an update is noise alone. Its size is as accounted (0.6 % standard error; 5 of them), and no two are
    correlated beyond 5 / sqrt(n): a false alarm in 100,000; seeds are fixed."""
    silent = dataclasses.replace(
        task, loss=lambda outputs, labels: 0.0 * outputs[:, 0], model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 4000), torch.nn.Linear(4000, 1))
    )
    study = make_study(evaluation={"folds": 2}, training={"local_steps": 1})
    parameters, updates = initial_parameters(silent.model(), 3), []
    for name in ("a", "b"):
        site = virtual_site(silent, make_patients(80), tmp_path, name)
        message = enrol(site, silent, study)
        plan = site._admission.plan  # type: ignore[union-attr]
        for fold in (1, 2):
            for number in (1, 2):
                updates.append(changes_of(site.train(message.model_copy(update={"round": number, "fold": fold}), parameters)[1]))
        site.close()
    std = study.training.learning_rate * plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
    size = updates[0].size
    for update in updates:
        assert update.std() == pytest.approx(std, rel=5 / np.sqrt(2 * size))
    assert np.abs(np.corrcoef(updates) - np.eye(len(updates))).max() < 5 / np.sqrt(size)


def test_the_denominator_and_rate_come_from_the_declared_size(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    site = virtual_site(task, make_patients(500), tmp_path)
    enrol(site, task, make_study())
    plan = site._admission.plan  # type: ignore[union-attr]
    assert (plan.declared_size, plan.sample_rate, plan.expected_batch_size) == (60, pytest.approx(16 / 60), pytest.approx(16))
    site.close()


def test_an_empty_cohort_is_no_site(task: Task, make_patients: Patients, make_study: Studies, tmp_path: Path) -> None:
    site = virtual_site(task, make_patients(5).select(np.zeros(5, dtype=np.bool_)), tmp_path)
    with pytest.raises(DataError, match="expected patients, got none"):
        enrol(site, task, make_study())
    with pytest.raises(ProtocolError):  # and nothing was agreed to
        site.train(TrainTask(run="run-1", study_hash=make_study().fingerprint(), round=1, fold=1), initial_parameters(task.model(), 3))
    site.close()


# What leaves ----------------------------------------------------------------------------------------------------------------------


def ask(site: Site, content: RecordDict, kind: str) -> RecordDict:
    """The site's reply through the Flower app."""
    grid = InProcessGrid(client_app(lambda context: site), ["north"])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, "1")])
    assert isinstance(reply, Message) and not reply.has_error()
    return reply.content


def everything_in(record: RecordDict) -> str:
    """All text and bytes of a reply."""
    parts = [str(value) for fields in record.config_records.values() for value in fields.values()]
    parts += [array.data.decode("latin-1") for group in record.array_records.values() for array in group.values()]
    return "\n".join([*record, *parts])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError(f"row 7: {JANE}", JANE), "E500"),
        (SchemaError(JANE), "E503"),
        (ValueError(JANE), "E101"),
        (KeyError(JANE), "E101"),
        (type(JANE, (Exception,), {"__doc__": JANE})(JANE), "E101"),
    ],
    ids=["DataError", "SchemaError", "ValueError", "KeyError", "class named so"],
)
def test_no_exceptions_text_is_in_a_reply(error: Exception, code: str, task: Task, make_study: Studies, tmp_path: Path) -> None:
    def fail() -> Cohort:
        raise error

    site = Site(virtual_site(task, None, tmp_path).settings, task, fail)  # type: ignore[arg-type]  # no cohort is ever opened
    study = make_study()
    reply = ask(site, encode(EnrolTask(run="r", study=study.to_table(), task_fingerprint=task.fingerprint())), MessageType.QUERY)
    refused = decode(reply, Refused)
    assert refused.code == code and refused.name == "a" and "1931" not in everything_in(reply) and "Jane" not in everything_in(reply)
    site.close()


def test_a_foreign_exceptions_text_is_not_logged(task: Task, make_study: Studies, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pandas and NumPy put the value that they could not convert into their messages, and a run's folder keeps the log."""

    def fail() -> Cohort:
        float(JANE)
        raise AssertionError

    site = Site(virtual_site(task, None, tmp_path).settings, task, fail)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        ask(site, encode(EnrolTask(run="r", study=make_study().to_table(), task_fingerprint=task.fingerprint())), MessageType.QUERY)
    assert "site a: ValueError" in caplog.text and "Jane" not in caplog.text
    site.close()


def test_a_patients_value_in_a_file_is_in_no_reply(make_hospital: Hospitals, make_study: Studies, caplog: pytest.LogCaptureFixture) -> None:
    hospital = make_hospital(csv=f'id,x,y,z,ill\n1,0,0,0,1\n2,"{JANE}",0,0,0\n')
    with caplog.at_level(logging.INFO):
        reply = ask(hospital.site, encode(hospital.enrolment(make_study())), MessageType.QUERY)
    assert decode(reply, Refused).code == "E503" and "Jane" not in everything_in(reply) + caplog.text
    assert "column 'x': expected numbers" in caplog.text  # the hospital's own log says why


def test_a_round_through_the_app(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    assert isinstance(decode(ask(hospital.site, encode(hospital.enrolment(study)), MessageType.QUERY), Enrolled, Refused), Enrolled)
    reply = ask(hospital.site, encode(hospital.training(study), parameters=hospital.parameters), MessageType.TRAIN)
    assert decode(reply, Trained).round == 1 and set(reply) == {"message", "parameters"}
    update = decode_parameters(reply, template_of(hospital.parameters))
    assert changes_of(update).std() > 0 and "patient-" not in everything_in(reply)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"message": ConfigRecord({"json": "{}"})}),
        RecordDict({"message": ConfigRecord({"json": '{"kind":"train"}'}), "parameters": ArrayRecord({})}),
        encode(TrainTask(run="r", study_hash="x", round=1, fold=1)),
    ],
)
@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_nonsense_is_answered_with_a_refusal(record: RecordDict, kind: str, make_hospital: Hospitals) -> None:
    hospital = make_hospital()
    assert decode(ask(hospital.site, record, kind), Refused).code == "E102"


@pytest.mark.parametrize("bad", ["NaN", "shape", "missing"])
def test_other_parameters_are_refused_before_any_charge(bad: str, make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    parameters = dict(hospital.parameters)
    first = next(iter(parameters))
    if bad == "missing":
        parameters.pop(first)
    else:
        parameters[first] = np.full_like(parameters[first], np.nan) if bad == "NaN" else parameters[first][:1]
    reply = ask(hospital.site, encode(hospital.training(study), parameters=parameters), MessageType.TRAIN)
    assert decode(reply, Refused).code == "E102"
    assert hospital.charges() == []
