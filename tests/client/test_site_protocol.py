"""One hospital's answers: policy, then ledger, then the cohort; charged before trained; nothing of a patient in a reply or a log."""

import dataclasses
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from client.app import client_app
from client.ledger import Ledger
from client.site import Site, SiteSettings
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
from shared.messages import Enrolled, EnrolTask, EvaluateTask, Refused, Trained, TrainTask, decode, decode_parameters, encode
from shared.models import Parameters, initial_parameters, template_of
from shared.privacy import epsilon_of
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
    assert answer == Enrolled(name="north", declared_size=60, declared_num_patients=80, declared_num_test=20)


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
    spent = Ledger.read(hospital.folder / "state" / "ledger.sqlite").epsilon(1e-3)
    assert 3 <= runs <= 8 and 2.0 < spent <= 4.0  # composition is less than addition, and more than the largest


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
    (south.folder / "state" / "ledger.sqlite").write_bytes((north.folder / "state" / "ledger.sqlite").read_bytes())
    with pytest.raises(LedgerError, match="a ledger is never reused"):
        south.site.enrol(south.enrolment(make_study()))


def test_the_ledger_knows_its_patients_whatever_came_first(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital = make_hospital(allow_no_privacy="true")
    hospital.site.enrol(hospital.enrolment(make_study(privacy={"unit": "none"}), run="plain"))  # opens the cohort, has no ledger
    hospital.site.enrol(hospital.enrolment(make_study()))
    hospital.site.close()
    key = (hospital.folder / "state" / "patient-hash.key").read_bytes()
    database = sqlite3.connect(hospital.folder / "state" / "ledger.sqlite")
    known = {row[0] for row in database.execute("SELECT hash FROM patient")}
    database.close()
    assert known == {patient_hash(key, f"patient-{index}") for index in range(80)}
    assert b"patient-1" not in (hospital.folder / "state" / "ledger.sqlite").read_bytes()


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
            hospital.site.evaluate(EvaluateTask(**{**good.model_dump(exclude={"kind"}), **change}), hospital.parameters)
    with pytest.raises(ProtocolError):  # the model may be evaluated once more after the last round, but not trained
        hospital.site.train(hospital.training(study, 4), hospital.parameters)
    hospital.site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=4, fold=1), hospital.parameters)
    assert Ledger.read(hospital.folder / "state" / "ledger.sqlite").spends() == []


def test_a_round_is_charged_and_reported_as_charged(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    told = [hospital.site.train(hospital.training(study, number), hospital.parameters)[0].privacy for number in (1, 2, 3)]
    spends = Ledger.read(hospital.folder / "state" / "ledger.sqlite").spends()
    assert [(item.round, item.state, item.event.steps) for item in spends] == [(1, "committed", 2), (2, "committed", 2), (3, "committed", 2)]
    assert [spent.steps for spent in told] == [2, 4, 6]
    for number, spent in enumerate(told, start=1):
        assert spent.epsilon == epsilon_of([item.event for item in spends[:number]], 1e-3)
    assert told[2].epsilon <= 2.0 and told[0].epsilon < told[1].epsilon < told[2].epsilon
    reply, _ = hospital.site.evaluate(EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=4, fold=1), hospital.parameters)
    assert reply.privacy.epsilon_cross_check == pytest.approx(reply.privacy.epsilon, rel=0.02)


def test_the_charge_stands_where_training_fails(make_hospital: Hospitals, make_study: Studies, task: Task) -> None:
    calls = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(labels))
        if len(labels) != 8 and len(labels) != 1:  # the probe's own batches pass
            raise RuntimeError(JANE)
        return task.loss(outputs, labels)

    hospital = make_hospital(task=dataclasses.replace(task, loss=loss))
    study = make_study(training={"batch_size": 40})
    hospital.site.enrol(hospital.enrolment(study))
    with pytest.raises(RuntimeError):
        hospital.site.train(hospital.training(study), hospital.parameters)
    spends = Ledger.read(hospital.folder / "state" / "ledger.sqlite").spends()
    assert [(item.state, item.event.steps) for item in spends] == [("reserved", 2)]


def test_no_room_no_update(make_hospital: Hospitals, make_study: Studies) -> None:
    """The same round asked again and again is new noise and a new charge, until the hospital's limit."""
    hospital, study = make_hospital(max_epsilon=2.05), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    updates = []
    with pytest.raises(BudgetExhaustedError):
        for _ in range(10):
            updates.append(changes_of(hospital.site.train(hospital.training(study), hospital.parameters)[1]))
    assert len(updates) == 3 and len({update.tobytes() for update in updates}) == 3
    assert Ledger.read(hospital.folder / "state" / "ledger.sqlite").epsilon(1e-3) <= 2.05


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
        (({}, False), ({"allowed_metrics": names}, True), ({"allowed_metrics": names, "min_metric_patients": 80}, False))
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
        assert len(site.ledger_for(site._admission.plan).spends()) == 1  # type: ignore[union-attr]
        site.close()
    assert np.array_equal(*answers)
    site = virtual_site(task, cohort, tmp_path)
    other = initial_parameters(task.model(), 4)
    site.train(enrol(site, task, study), other)  # other parameters are another release
    assert len(site.ledger_for(site._admission.plan).spends()) == 2  # type: ignore[union-attr]
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
    with pytest.raises(BudgetExhaustedError):  # asked again: other noise, another charge, and no room for it
        site.train(message.model_copy(update={"round": 3}), parameters)
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
    assert Ledger.read(hospital.folder / "state" / "ledger.sqlite").spends() == []
