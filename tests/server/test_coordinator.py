"""The round loop over the real apps: quorum, deadline, refusals by name, kill and resume to the same bits, one site as centralised training."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from torch import nn

import server.asking
import server.coordinator
import server.enrolment
import simulations.in_process
from client.local_training import LocalRound, torch_keyed, train_round
from client.noise import subkey
from server.aggregation import MAX_WEIGHT
from server.evaluation import add_statistics
from server.run_folder import RunFolder, read_tensors
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.errors import BudgetExhaustedError, DataError, PolicyRefusedError, ProtocolError, QuorumLostError
from shared.messages import (
    MAX_NUMBER,
    MAX_REASON,
    Enrolled,
    EnrolTask,
    EvaluateTask,
    NotCounted,
    Refused,
    Statistics,
    Trained,
    TrainTask,
    decode,
    decode_statistics,
    encode,
)
from shared.metrics import finish_metrics
from shared.models import Parameters, get_parameters, initial_parameters, set_parameters
from shared.results import RoundRecord
from shared.seals import packed_message
from shared.seeding import derive_key, generator_of
from shared.task import Task
from simulations.baselines import pool

MakeRig = Callable[..., "object"]


def name_of(context: Context) -> str:
    return str(context.node_config["site"])


def refusing(name: str, code: str, reason: str = "No.", *, kind: str = "train", from_round: int = 1) -> Callable:
    """The site of this name answers these messages with a refusal; the others answer as they are."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        if (
            name_of(context) == name
            and message.metadata.message_type == kind
            and (not message.metadata.group_id or int(message.metadata.group_id) >= from_round)
        ):
            return Message(encode(Refused(name=name, code=code, reason=reason)), reply_to=message)
        return app(message, context)

    return tamper


def all_of(*tampers: Callable) -> Callable:
    def tamper(app: Callable, message: Message, context: Context) -> Message:
        answer = app
        for each in tampers:
            answer = (lambda inner, outer: lambda message, context: outer(inner, message, context))(answer, each)
        return answer(message, context)

    return tamper


def statuses(record: RoundRecord) -> dict[str, str]:
    return {site.name: site.status for site in record.sites}


def reasons(record: RoundRecord) -> dict[str, str]:
    return {site.name: site.reason for site in record.sites if site.reason}


def lines(folder: RunFolder) -> list[dict]:
    """rounds.jsonl but for the seconds."""
    found = [json.loads(line) for line in (folder.path / "rounds.jsonl").read_text().removesuffix("\n").split("\n")]
    for line in found:
        assert line.pop("seconds") >= 0
    return found


def statistics_of(task: Task, cohort: Cohort, parameters: Parameters) -> Statistics:
    """Every statistic of these parameters on these patients, in one piece."""
    model = task.model()
    set_parameters(model, parameters)
    with torch.no_grad():
        outputs = model.eval()(*(torch.from_numpy(values) for values in cohort.inputs))
    predictions = task.predict(outputs).numpy().astype(np.float64)
    return {metric.statistic.name: metric.statistic.summarise(predictions, cohort) for metric in task.metrics}


def final(folder: RunFolder, name: str = "final") -> bytes:
    return (folder.path / "model" / f"{name}.safetensors").read_bytes()


# A whole study --------------------------------------------------------------------------------------------------------------------


def test_a_study_runs_to_its_last_round(make_rig: MakeRig) -> None:
    rig = make_rig()
    folder = rig.new_folder()
    history = rig.run(folder)
    assert [record.round for record in rig.records] == [1, 2, 3]
    assert folder.rounds() == rig.records
    assert [record.evaluated_round for record in rig.records] == [0, 1, 2]
    for record in rig.records:
        assert statuses(record) == {"site-1": "ok", "site-2": "ok", "site-3": "ok"}
        assert 0 <= record.metrics["auroc"] <= 1
    assert len(history.folds) == 1 and set(history.folds[0].statistics) == set(rig.cohorts)
    header, tensors = read_tensors(folder.path / "model" / "final.safetensors")
    assert {name: header[name] for name in ("study", "task", "study_hash")} == {
        "study": "tiny",
        "task": "tiny",
        "study_hash": rig.study.fingerprint(),
    }
    assert all(np.array_equal(tensors[name], value) for name, value in history.folds[0].parameters.items())


def test_two_runs_are_the_same_bits_and_another_seed_is_not(make_rig: MakeRig) -> None:
    def run(**changes: object) -> tuple[bytes, list[dict]]:
        rig = make_rig(**changes)
        folder = rig.new_folder()
        rig.run(folder)
        _, tensors = read_tensors(folder.path / "model" / "final.safetensors")
        return b"".join(tensors[name].tobytes() for name in sorted(tensors)), lines(folder)

    assert run() == run()
    assert run()[0] != run(seed=4)[0]


def test_the_closing_metrics_are_those_of_all_test_patients_in_one_place(make_rig: MakeRig, task: Task) -> None:
    rig = make_rig()
    history = rig.run(rig.new_folder())
    fold = history.folds[0]
    tests = [cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for cohort in rig.cohorts.values()]
    together = statistics_of(task, pool(tests), fold.parameters)
    summed = add_statistics(fold.statistics.values())
    assert finish_metrics(task.metrics, summed) == finish_metrics(task.metrics, together)
    assert summed["score_histogram"].sum() == sum(test.num_patients for test in tests)


def test_round_metrics_are_of_the_model_that_was_received(make_rig: MakeRig, task: Task) -> None:
    rig = make_rig()
    rig.run(rig.new_folder())
    start = initial_parameters(task.model(), rig.study.seed)
    for site in rig.records[0].sites:
        test = rig.cohorts[site.name].select(held_out_patients(rig.cohorts[site.name], SIMULATION_SPLIT_KEY))
        assert site.num_test == test.num_patients
        assert site.metrics == finish_metrics(task.metrics, statistics_of(task, test, start))


def test_one_site_equals_centralised_training(make_rig: MakeRig, task: Task) -> None:
    """FedAvg of one site is the plain training loop, to the rounding of the update (a float32 difference) in each round."""
    rig = make_rig(sizes=(120,), rounds={"count": 8}, training={"local_epochs": 2, "momentum": 0.5})
    federated = rig.run(rig.new_folder()).folds[0].parameters
    cohort = rig.cohorts["site-1"]
    train = cohort.select(~held_out_patients(cohort, SIMULATION_SPLIT_KEY))
    model = task.model()
    set_parameters(model, initial_parameters(model, rig.study.seed))
    for number in range(1, 9):
        key = derive_key(rig.study.seed, "training", "site-1", 1, number)
        with torch_keyed(subkey(key, b"torch")):
            train_round(model, train, LocalRound(study=rig.study, task=task, round_number=number), rng=generator_of(key))
    for name, value in get_parameters(model).items():
        np.testing.assert_allclose(federated[name], value, rtol=2e-6, atol=2e-7)
        assert not np.allclose(value, initial_parameters(task.model(), rig.study.seed)[name], rtol=1e-2)


def test_equal_weights_and_declared_weights(make_rig: MakeRig) -> None:
    """The first round's model is the start plus the mean of the sites' updates, weighted as the study says."""
    updates: dict[str, dict[str, np.ndarray]] = {}

    def watch(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            updates[name_of(context)] = {name: array.numpy().astype(np.float64) for name, array in reply.content["parameters"].items()}
        return reply

    for weights in ("declared", "equal"):
        rig = make_rig(tamper=watch, rounds={"count": 1}, strategy={"weights": weights})
        history = rig.run(rig.new_folder())
        weight = {name: history.enrolled[name].declared_size if weights == "declared" else 1 for name in rig.cohorts}
        start = initial_parameters(rig.task.model(), rig.study.seed)
        for key, value in history.folds[0].parameters.items():
            mean = sum(weight[name] * updates[name][key] for name in updates) / sum(weight.values())
            np.testing.assert_allclose(value, start[key] + mean, rtol=1e-6, atol=1e-7)


# Sites that refuse, fail or are late ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("require", "on_missing", "goes_on"), [("all", "proceed", True), ("all", "abort", False), ("all", "wait", False)])
def test_all_are_required_unless_the_study_proceeds(make_rig: MakeRig, require: str, on_missing: str, goes_on: bool) -> None:
    rig = make_rig(tamper=refusing("site-2", "E101", "Broken.", from_round=2), rounds={"require": require, "on_missing": on_missing})
    folder = rig.new_folder()
    if goes_on:
        rig.run(folder)
        assert [statuses(record)["site-2"] for record in folder.rounds()] == ["ok", "refused", "refused"]
        assert reasons(folder.rounds()[1]) == {"site-2": "E101 Broken."}
    else:
        with pytest.raises(QuorumLostError, match=r"round 2: .*all sites, got 2: site-2: E101 Broken\."):
            rig.run(folder)
        assert len(folder.rounds()) == 1
        assert not (folder.path / "model" / "final.safetensors").exists()


@pytest.mark.parametrize("on_missing", ["proceed", "wait", "abort"])
@pytest.mark.parametrize("require", [1, 2, 3])
def test_a_quorum_of_k_goes_on_with_k_whatever_on_missing_says(make_rig: MakeRig, require: int, on_missing: str) -> None:
    rig = make_rig(tamper=refusing("site-1", "E101"), rounds={"require": require, "on_missing": on_missing})
    if require <= 2:
        rig.run(rig.new_folder())
        assert len(rig.records) == 3
    else:
        with pytest.raises(QuorumLostError, match="expected usable answers of 3 sites, got 2: site-1: E101"):
            rig.run(rig.new_folder())


def test_a_round_with_fewer_updates_than_the_strategy_needs_does_not_count(make_rig: MakeRig) -> None:
    """Trimmed mean of two updates would leave nothing in the middle, so it is no round, whatever the quorum."""
    rig = make_rig(tamper=refusing("site-2", "E101", from_round=2), rounds={"require": 1}, strategy={"name": "trimmed-mean"})
    folder = rig.new_folder()
    with pytest.raises(QuorumLostError, match="round 2: strategy trimmed-mean needs at least 3 usable updates, got 2"):
        rig.run(folder)
    assert len(folder.rounds()) == 1


def test_a_quorum_larger_than_the_federation_is_named_before_any_round(make_rig: MakeRig) -> None:
    rig = make_rig(rounds={"require": 4})
    with pytest.raises(QuorumLostError, match="enrolment: expected usable answers of 4 sites, got 3"):
        rig.run(rig.new_folder())
    assert rig.records == []


REFUSALS = {
    "budget": (["E700", "E700", "E700"], BudgetExhaustedError),
    "policy": (["E600", "E600", "E600"], PolicyRefusedError),
    "data": (["E501", "E503", "E500"], DataError),
    "mixed": (["E700", "E600", "E700"], QuorumLostError),
    "own code": (["E101", "E101", "E101"], QuorumLostError),
}


@pytest.mark.parametrize("kind", list(REFUSALS))
@pytest.mark.parametrize("message_type", ["query", "train"])
def test_when_all_refuse_the_error_is_theirs_and_names_them(make_rig: MakeRig, kind: str, message_type: str) -> None:
    codes, expected = REFUSALS[kind]
    tamper = all_of(*(refusing(f"site-{index}", code, f"Reason {index}.", kind=message_type) for index, code in enumerate(codes, start=1)))
    rig = make_rig(tamper=tamper)
    with pytest.raises(expected) as caught:
        rig.run(rig.new_folder())
    assert type(caught.value) is expected
    for index, code in enumerate(codes, start=1):
        assert f"site-{index}: {code} Reason {index}." in str(caught.value)


def test_a_refusal_among_usable_answers_is_a_lost_quorum(make_rig: MakeRig) -> None:
    rig = make_rig(tamper=refusing("site-1", "E700"), rounds={"on_missing": "abort"})
    with pytest.raises(QuorumLostError) as caught:
        rig.run(rig.new_folder())
    assert caught.value.exit_code == 8


def test_a_site_that_refuses_to_enrol_is_named_in_every_round(make_rig: MakeRig) -> None:
    rig = make_rig(tamper=refusing("site-3", "E600", "Not allowed.", kind="query"))
    rig.run(rig.new_folder())
    for record in rig.records:
        assert statuses(record) == {"site-1": "ok", "site-2": "ok", "site-3": "refused"}
        assert reasons(record) == {"site-3": "E600 Not allowed."}


def test_an_app_that_raises_costs_its_site_alone(make_rig: MakeRig) -> None:
    def tamper(app: Callable, message: Message, context: Context) -> Message:
        if name_of(context) == "site-2" and message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise RuntimeError("patient 17 has HIV")
        return app(message, context)

    rig = make_rig(tamper=tamper)
    folder = rig.new_folder()
    rig.run(folder)
    assert [statuses(record)["site-2"] for record in rig.records] == ["ok", "failed", "ok"]
    assert reasons(rig.records[1]) == {"site-2": "E101 The site's app failed."}
    assert "HIV" not in (folder.path / "rounds.jsonl").read_text()


def test_two_sites_of_one_name_are_one_site(make_rig: MakeRig) -> None:
    def tamper(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "query" and name_of(context) == "site-2":
            return Message(encode(decode(reply.content, Enrolled).model_copy(update={"name": "site-1"})), reply_to=message)
        return reply

    rig = make_rig(tamper=tamper)
    rig.run(rig.new_folder())
    assert statuses(rig.records[0]) == {"node 3": "refused", "site-1": "ok", "site-3": "ok"}
    assert "a name of its own" in reasons(rig.records[0])["node 3"]


@pytest.mark.parametrize("size", [0, -5, MAX_WEIGHT + 1, 1_000_000_000])
def test_a_site_that_claims_a_size_that_cannot_be_does_not_enrol(make_rig: MakeRig, size: int) -> None:
    """Its weight would be that claim."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "query" and name_of(context) == "site-2":
            return Message(encode(decode(reply.content, Enrolled).model_copy(update={"declared_size": size})), reply_to=message)
        return reply

    rig = make_rig(tamper=tamper)
    rig.run(rig.new_folder())
    assert [statuses(record)["site-2"] for record in rig.records] == ["refused"] * 3
    assert reasons(rig.records[0])["site-2"] == "E102 expected a declared size of 1 to 10000000, got another"


# What a site is told of an update that did not count ------------------------------------------------------------------------------


def spoiling(name: str, rounds: tuple[str, ...]) -> Callable:
    """In these rounds the site of this name answers with nothing."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        spoiled = name_of(context) == name and message.metadata.message_type == "train" and message.metadata.group_id in rounds
        return Message(RecordDict(), reply_to=message) if spoiled else reply

    return tamper


Told = tuple[str, str, int, tuple[int, int, str] | None]


def listening(told: list[Told]) -> Callable:
    """Who was asked for what in which round, and what it was told of its last update that did not count."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind != "query":
            task = decode(message.content, TrainTask, EvaluateTask)
            word = task.not_counted
            told.append((name_of(context), kind, task.round, None if word is None else (word.fold, word.round, word.reason)))
        return app(message, context)

    return tamper


def empty_reason() -> str:
    with pytest.raises(ProtocolError) as refused:
        decode(RecordDict(), Trained)
    return f"{refused.value.code} {refused.value.what}"


EMPTY = empty_reason()


def own_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "client.site"]


def test_a_site_is_told_once_why_its_update_did_not_count(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Told] = []
    rig = make_rig(tamper=all_of(listening(told), spoiling("site-2", ("2",))), rounds={"count": 4})
    with caplog.at_level(logging.WARNING, logger="client"):
        rig.run(rig.new_folder())
    heard = [(name, kind, number, word) for name, kind, number, word in told if word is not None]
    assert heard == [("site-2", "train", 3, (1, 2, EMPTY))], "no other hospital is told, and none but once"
    assert len(told) == 3 * 5
    assert own_log(caplog) == [f"site site-2: its update of round 2 did not count: {EMPTY}"]


def test_after_the_last_round_the_closing_evaluation_tells_it(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig(tamper=spoiling("site-2", ("3",)))
    with caplog.at_level(logging.WARNING, logger="client"):
        rig.run(rig.new_folder())
    assert own_log(caplog) == [f"site site-2: its update of round 3 did not count: {EMPTY}"]


def test_its_own_refusal_a_site_knows(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Told] = []
    rig = make_rig(tamper=all_of(listening(told), refusing("site-2", "E101", "Broken.")))
    with caplog.at_level(logging.WARNING, logger="client"):
        rig.run(rig.new_folder())
    assert all(word is None for *_, word in told) and own_log(caplog) == []


def die_after_round_two(record: RoundRecord) -> None:
    if record.round == 2:
        raise Killed


def test_a_resumed_run_asks_what_it_asked_before(make_rig: MakeRig) -> None:
    """The same question twice is one piece of work at a site only where it is the same in every character."""
    whole, after = [], []
    rig = make_rig(tamper=all_of(listening(whole), spoiling("site-2", ("1", "2"))), rounds={"count": 4})
    rig.run(rig.new_folder())
    rig.tamper, folder = spoiling("site-2", ("1", "2")), rig.new_folder()
    with pytest.raises(Killed):
        rig.run(folder, die_after_round_two)
    rig.tamper = listening(after)
    rig.run(folder)
    assert after == [entry for entry in whole if entry[2] > 2]


def test_who_is_told_something_alone_is_sent_the_very_same_arrays(make_rig: MakeRig) -> None:
    """Each of two spoilt sites hears of itself alone; the parameters are one object for all, and packed for the wire they are the same bytes."""
    sent: list[Message] = []

    def carry(app: Callable, message: Message, context: Context) -> Message:
        sent.append(message)
        return app(message, context)

    rig = make_rig(tamper=all_of(carry, spoiling("site-3", ("1",)), spoiling("site-2", ("1",))))
    rig.run(rig.new_folder())
    second = [message for message in sent if message.metadata.message_type == "train" and message.metadata.group_id == "2"]
    words = [decode(message.content, TrainTask).not_counted for message in second]
    assert sum(word is None for word in words) == len(words) - 2
    assert len({id(message.content["parameters"]) for message in second}) == 1
    packed, last = [], None
    for message in second:
        last = message.content, packed_message(message.content, like=last)
        packed.append(last[1])
        assert packed[-1] == packed_message(message.content)
    assert len({id(one.arrays) for one in packed}) == 1 and len({one.content for one in packed}) == 2  # both were spoilt alike


def test_the_longest_task_can_be_read() -> None:
    reason = NotCounted(fold=1, round=MAX_NUMBER, reason='"' * MAX_REASON)
    task = TrainTask(run="r", study_hash="h", round=1, fold=1, not_counted=reason)
    assert decode(encode(task), TrainTask) == task


class Clock:
    """Time that passes only when a site is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (server.coordinator, server.enrolment, server.asking, simulations.in_process):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def slow(self, name: str, *, kind: str = "train", rounds: tuple[str, ...] = ("2",), seconds: float = 700.0) -> Callable:
        def tamper(app: Callable, message: Message, context: Context) -> Message:
            reply = app(message, context)
            if name_of(context) == name and message.metadata.message_type == kind and (kind == "query" or message.metadata.group_id in rounds):
                self.now += seconds
            return reply

        return tamper


def test_the_deadline_drops_late_sites_by_name(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(tamper=Clock(monkeypatch).slow("site-3"))
    rig.run(rig.new_folder())
    assert [statuses(record)["site-3"] for record in rig.records] == ["ok", "missing", "ok"]
    assert reasons(rig.records[1]) == {"site-3": "E801 A site's answer did not come before the deadline."}
    assert rig.records[1].seconds == 700.0


def test_a_late_site_takes_no_part_in_the_mean(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    late = make_rig(tamper=Clock(monkeypatch).slow("site-3", rounds=("1", "2", "3")))
    refused = make_rig(tamper=refusing("site-3", "E101"))
    without_it, dropped = (rig.run(rig.new_folder()).folds[0].parameters for rig in (refused, late))
    assert all(np.array_equal(dropped[name], without_it[name]) for name in without_it)


def test_a_late_site_aborts_a_study_that_wants_all(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(tamper=Clock(monkeypatch).slow("site-3"), rounds={"on_missing": "abort"})
    with pytest.raises(QuorumLostError, match=r"round 2: .*site-3: E801"):
        rig.run(rig.new_folder())


def test_a_site_that_is_late_to_enrol_is_missed_by_name(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent site counts as one that is not there: a study that wants all does not start without it, and one that proceeds says so."""
    rig = make_rig(tamper=Clock(monkeypatch).slow("site-3", kind="query"), rounds={"on_missing": "abort"})
    with pytest.raises(QuorumLostError, match=r"enrolment: .*all sites, got 2: node 4: E801"):
        rig.run(rig.new_folder())
    rig = make_rig(tamper=Clock(monkeypatch).slow("site-3", kind="query"))
    rig.run(rig.new_folder())
    assert statuses(rig.records[0])["node 4"] == "missing"
    assert reasons(rig.records[0])["node 4"].startswith("E801")


def test_waiting_asks_again_and_takes_the_answer(make_rig: MakeRig) -> None:
    asked: list[str] = []

    def flaky(app: Callable, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            asked.append(name_of(context))
            if name_of(context) == "site-2" and asked.count("site-2") < 3:
                return Message(Error(code=1, reason="x"), reply_to=message)
        return app(message, context)

    rig = make_rig(tamper=flaky, rounds={"on_missing": "wait"})
    flaky_folder = rig.new_folder()
    rig.run(flaky_folder)
    assert asked == ["site-1", "site-2", "site-3", "site-2", "site-2"]
    assert statuses(rig.records[1]) == {"site-1": "ok", "site-2": "ok", "site-3": "ok"}
    steady = make_rig(rounds={"on_missing": "wait"})
    folder = steady.new_folder()
    steady.run(folder)
    assert final(folder) == final(flaky_folder)


def test_waiting_ends(make_rig: MakeRig) -> None:
    """A site that never works is asked a bounded number of times."""
    asked: list[str] = []

    def broken(app: Callable, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and name_of(context) == "site-2":
            asked.append("site-2")
            return Message(Error(code=1, reason="x"), reply_to=message)
        return app(message, context)

    rig = make_rig(tamper=broken, rounds={"on_missing": "wait"})
    with pytest.raises(QuorumLostError, match="site-2: E101"):
        rig.run(rig.new_folder())
    assert 2 <= len(asked) <= 10


def test_waiting_does_not_outlast_the_deadline(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rig = make_rig(tamper=clock.slow("site-2", rounds=("1",)), rounds={"on_missing": "wait"})
    with pytest.raises(QuorumLostError, match="site-2: E801"):
        rig.run(rig.new_folder())
    assert clock.now == 700.0


def test_hostile_text_in_a_refusal_does_not_break_the_record_of_rounds(make_rig: MakeRig) -> None:
    """A site's words are one line without control characters, however long."""
    reason = "a\u2028b\u2029c\x85d\x1ce\x0bf\x0cg\nh\r\ni<script>\ud7ff" + "x" * 200
    rig = make_rig(tamper=refusing("site-2", "E101", reason))
    folder = rig.new_folder()
    rig.run(folder)
    assert folder.rounds() == rig.records
    told = str(reasons(folder.rounds()[0])["site-2"])
    assert told.isprintable() and len(told) == len(f"E101 {reason}")
    assert "i<script>" in told


def test_a_site_that_withholds_its_statistics_takes_part_all_the_same(make_rig: MakeRig, task: Task) -> None:
    def withhold(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if name_of(context) == "site-2" and "statistics" in reply.content:
            del reply.content["statistics"]
        return reply

    rig = make_rig(tamper=withhold)
    history = rig.run(rig.new_folder())
    metrics = {site.name: site.metrics for site in rig.records[0].sites}
    assert metrics["site-2"] is None and metrics["site-1"] is not None
    assert statuses(rig.records[0])["site-2"] == "ok"
    assert set(history.folds[0].statistics) == {"site-1", "site-3"}


@pytest.mark.parametrize("value", [-1.0, 1e300, np.nan])
def test_nonsense_statistics_cost_their_site_and_not_the_run(make_rig: MakeRig, value: float) -> None:
    def spoil(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if name_of(context) == "site-2" and "statistics" in reply.content:
            shapes = {"score_histogram": (2, 512)}
            statistics = decode_statistics(reply.content, shapes, signed=False)
            assert statistics is not None
            spoiled = {name: np.where(array > 0, value, array) for name, array in statistics.items()}
            reply.content["statistics"] = encode(EnrolTask(run="", study={}, task_fingerprint=""), statistics=spoiled)["statistics"]
        return reply

    rig = make_rig(tamper=spoil)
    rig.run(rig.new_folder())
    assert [statuses(record)["site-2"] for record in rig.records] == ["failed"] * 3
    assert rig.records[2].metrics["auroc"] is not None


def test_a_site_that_is_missing_at_the_close_is_named(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig(tamper=refusing("site-2", "E101", "Broken.", kind="evaluate"))
    with caplog.at_level(logging.WARNING, logger="server"):
        history = rig.run(rig.new_folder())
    assert set(history.folds[0].statistics) == {"site-1", "site-3"}
    assert [record.getMessage() for record in caplog.records] == ["closing evaluation of fold 1: site-2: E101 Broken."]


def test_only_sampled_sites_are_asked(make_rig: MakeRig) -> None:
    rig = make_rig(strategy={"fraction": 0.5}, rounds={"count": 6})
    rig.run(rig.new_folder())
    for record in rig.records:
        assert sorted(statuses(record).values()) == ["not asked", "ok", "ok"]
    assert len({tuple(sorted(statuses(record).items())) for record in rig.records}) > 1


# Kill and resume ------------------------------------------------------------------------------------------------------------------

PRIVATE = {"unit": "patient", "epsilon": 5.0, "delta": 1e-4}
RESUMED_STUDIES: dict[str, dict[str, object]] = {
    "fedavg": {},
    "fedadam": {"strategy": {"name": "fedadam"}},
    "fedavgm, adam": {"strategy": {"name": "fedavgm"}, "training": {"optimizer": "adam", "learning_rate": 0.01, "schedule": "cosine"}},
    "fedyogi, private, a fraction": {"strategy": {"name": "fedyogi", "fraction": 0.5}, "privacy": PRIVATE, "rounds": {"count": 4}},
    "three folds": {"evaluation": {"folds": 3}, "strategy": {"name": "fedadam"}},
    "three folds, private": {"evaluation": {"folds": 3}, "privacy": PRIVATE},
}


class Killed(BaseException):
    """What no handler of ours catches, as a kill is not caught."""


def kill_at(rig: object, folder: RunFolder, where: str, fold: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until it dies at this point of this round."""

    def observer(record: RoundRecord) -> None:
        if where == "observer" and (record.fold, record.round) == (fold, number):
            raise Killed

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        if where == "second site" and message.metadata.message_type == "train" and name_of(context) == "site-2":
            task = decode(message.content, TrainTask)
            if (task.fold, task.round) == (fold, number):
                raise Killed
        return app(message, context)

    with monkeypatch.context() as patch:
        if where in ("before the checkpoint", "before the round's line"):
            method = {"before the checkpoint": "write_checkpoint", "before the round's line": "append_round"}[where]
            real = getattr(RunFolder, method)

            def dying(self: RunFolder, value: object) -> None:
                if (value.fold, getattr(value, "round_number", None) or value.round) == (fold, number):
                    raise Killed
                real(self, value)

            patch.setattr(RunFolder, method, dying)
        rig.tamper = tamper
        with pytest.raises(Killed):
            rig.run(folder, observer)
        rig.tamper = None


@pytest.mark.parametrize("where", ["observer", "second site", "before the checkpoint", "before the round's line"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if "private" in kind else kind for kind in RESUMED_STUDIES])
def test_a_killed_run_resumes_to_the_same_bits(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, kind: str, where: str) -> None:
    changes = RESUMED_STUDIES[kind]
    folds = 3 if "folds" in str(changes) else 1
    whole = make_rig(**changes)
    whole_folder = whole.new_folder()
    whole_history = whole.run(whole_folder)
    rig = make_rig(**changes)
    folder = rig.new_folder()
    kill_round = 2
    if where == "second site" and "fraction" in str(changes):  # a round in which site-2 is asked
        kill_round = next(record.round for record in whole.records if statuses(record)["site-2"] == "ok")
    kill_at(rig, folder, where, min(folds, 2), kill_round, monkeypatch)
    history = rig.run(folder)
    assert lines(folder) == lines(whole_folder)
    for model in ["final"] if folds == 1 else ["fold-1", "fold-2", "fold-3"]:
        assert final(folder, model) == final(whole_folder, model)
    assert history.privacy == whole_history.privacy
    for mine, theirs in zip(history.folds, whole_history.folds, strict=True):
        assert mine.fold == theirs.fold
        assert {site: {n: v.tobytes() for n, v in s.items()} for site, s in mine.statistics.items()} == {
            site: {n: v.tobytes() for n, v in s.items()} for site, s in theirs.statistics.items()
        }


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_stays_as_it_was(make_rig: MakeRig) -> None:
    rig = make_rig(privacy=PRIVATE)
    folder = rig.new_folder()
    first = rig.run(folder)
    before = final(folder), lines(folder)
    again = rig.run(folder)
    assert rig.records == []
    assert (final(folder), lines(folder)) == before
    assert again.privacy == first.privacy


def test_a_run_killed_twice_still_ends_the_same(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_rig(rounds={"count": 4}, strategy={"name": "fedadam"})
    whole_folder = whole.new_folder()
    whole.run(whole_folder)
    rig = make_rig(rounds={"count": 4}, strategy={"name": "fedadam"})
    folder = rig.new_folder()
    kill_at(rig, folder, "second site", 1, 1, monkeypatch)
    assert folder.read_checkpoint() is None
    kill_at(rig, folder, "before the checkpoint", 1, 3, monkeypatch)
    rig.run(folder)
    assert final(folder) == final(whole_folder)
    assert lines(folder) == lines(whole_folder)


def test_a_kill_between_two_folds_loses_neither(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_rig(evaluation={"folds": 2}, rounds={"count": 2})
    whole_folder = whole.new_folder()
    whole.run(whole_folder)
    for moment in ("before", "after"):
        rig = make_rig(evaluation={"folds": 2}, rounds={"count": 2})
        folder = rig.new_folder()
        real = RunFolder.write_model

        def dying(self: RunFolder, *arguments: object, moment: str = moment, real: Callable = real) -> None:
            if moment == "after":
                real(self, *arguments)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "write_model", dying)
            with pytest.raises(Killed):
                rig.run(folder)
        rig.run(folder)
        assert lines(folder) == lines(whole_folder)
        assert [final(folder, f"fold-{fold}") for fold in (1, 2)] == [final(whole_folder, f"fold-{fold}") for fold in (1, 2)]


@pytest.mark.slow
def test_a_resumed_round_is_charged_once(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(privacy=PRIVATE)
    folder = rig.new_folder()
    kill_at(rig, folder, "second site", 1, 2, monkeypatch)  # site-1 has trained round 2, site-3 has not
    history = rig.run(folder)
    plans = {name: -(-history.enrolled[name].declared_size // 16) * 3 for name in rig.cohorts}
    assert {name: privacy.steps for name, privacy in history.privacy.items()} == plans
    assert all(privacy.epsilon <= 5.0 for privacy in history.privacy.values())


def test_the_rest_of_a_resumed_run_may_be_asked_from_inside_its_folder(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume .` is the same run as `--resume runs/name`: the ledger must know it again."""
    rig = make_rig(privacy=PRIVATE)
    folder = rig.new_folder()
    kill_at(rig, folder, "observer", 1, 2, monkeypatch)
    monkeypatch.chdir(folder.path)
    inside = RunFolder.open(Path())
    assert inside.name == folder.name
    rig.run(inside)
    assert len(inside.rounds()) == 3


def test_a_parameter_without_axes_trains_and_resumes(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learnable temperature, shape (): NumPy makes scalars of such arrays at every turn."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs) * self.temperature

    for strategy in ("fedavg", "fedadam"):
        rigs = [make_rig(strategy={"name": strategy}) for _ in range(2)]
        for rig in rigs:
            rig.task = replace(rig.task, model=Scaled)
        whole, resumed = rigs
        whole_folder, folder = whole.new_folder(), resumed.new_folder()
        whole.run(whole_folder)
        kill_at(resumed, folder, "observer", 1, 2, monkeypatch)
        history = resumed.run(folder)
        assert final(folder) == final(whole_folder)
        assert history.folds[0].parameters["temperature"].shape == ()
        assert float(history.folds[0].parameters["temperature"]) != 1.5


def test_cross_validation_tests_every_patient_once(make_rig: MakeRig) -> None:
    rig = make_rig(evaluation={"folds": 3}, rounds={"count": 1})
    history = rig.run(rig.new_folder())
    assert [fold.fold for fold in history.folds] == [1, 2, 3]
    for name, cohort in rig.cohorts.items():
        assert sum(fold.statistics[name]["score_histogram"].sum() for fold in history.folds) == cohort.num_patients


def test_rounds_of_later_folds_say_how_many_were_tested(make_rig: MakeRig) -> None:
    rig = make_rig(evaluation={"folds": 3}, rounds={"count": 1})
    rig.run(rig.new_folder())

    def tested(cohort: Cohort, fold: int) -> int:
        return int(held_out_patients(cohort, SIMULATION_SPLIT_KEY, fold=fold, folds=3).sum())

    for record in rig.records:
        assert {site.name: site.num_test for site in record.sites} == {name: tested(cohort, record.fold) for name, cohort in rig.cohorts.items()}


# Counts that a site claims ------------------------------------------------------------------------------------------------------------


def boasting(name: str, times: float) -> Callable:
    """This site's statistics are those of so many times its patients, all of them on the wrong side."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if name_of(context) == name and "statistics" in reply.content:
            sums = {key: array.numpy()[:, ::-1] * times for key, array in reply.content["statistics"].items()}
            reply.content["statistics"] = encode(Refused(name="x", code="E100", reason=""), statistics=sums)["statistics"]
        return reply

    return tamper


def test_a_claim_of_more_patients_than_declared_is_left_out_of_the_metrics_and_named(make_rig: MakeRig) -> None:
    honest, lying, without = make_rig(), make_rig(tamper=boasting("site-2", 1000.0)), make_rig(tamper=refusing("site-2", "E600", kind="evaluate"))
    histories = [rig.run(rig.new_folder()) for rig in (honest, lying, without)]
    for true, told in zip(honest.records, lying.records, strict=True):
        assert statuses(told) == dict.fromkeys(lying.cohorts, "ok")  # its update was as good as any
        assert list(reasons(told)) == ["site-2"] and reasons(told)["site-2"].startswith("E102 statistic score_histogram: expected a sum over at most")
        metrics = {site.name: site.metrics for site in told.sites}
        assert metrics == {site.name: site.metrics for site in true.sites} | {"site-2": None}
        assert told.metrics != true.metrics
    assert set(histories[1].folds[0].statistics) == {"site-1", "site-3"}
    for key, value in histories[0].folds[0].parameters.items():
        assert np.array_equal(value, histories[1].folds[0].parameters[key])
    final_metrics = [
        finish_metrics(rig.task.metrics, add_statistics(history.folds[0].statistics.values()))
        for rig, history in zip((lying, without), histories[1:], strict=True)
    ]
    assert final_metrics[0] == final_metrics[1]


@pytest.mark.slow
def test_a_claim_is_held_to_each_fold_s_share(make_rig: MakeRig) -> None:
    """With five folds a fifth of the patients is tested at a time: all of them at once are too many."""
    assert not reasons(make_rig_record(make_rig, 1.0))
    assert list(reasons(make_rig_record(make_rig, 5.0))) == ["site-2"]


def make_rig_record(make_rig: MakeRig, times: float) -> RoundRecord:
    rig = make_rig(sizes=(60, 100, 50), tamper=boasting("site-2", times), rounds={"count": 1}, evaluation={"folds": 5})
    rig.run(rig.new_folder())
    return rig.records[0]
