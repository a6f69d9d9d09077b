"""The gate of a real hospital: what is no question of the coordinator's gets nothing, what is gets a sealed answer, and everything is written down."""

import errno
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

import client.gate
import client.local_update
import shared.audit
from client.approvals import Approvals
from client.courier import MAX_AT_ONCE
from client.door import NO_ANSWER
from client.gate import MOST_SECONDS
from client.ledger import reading
from client.local_training import LocalRound
from shared.kit import installed_version
from shared.messages import (
    JSON,
    MAX_NAME,
    MESSAGE,
    PARAMETERS,
    STATISTICS,
    Enrolled,
    Evaluated,
    NotCounted,
    Refused,
    Stopped,
    Trained,
    TrainTask,
    decode,
    encode,
    to_array_record,
)
from shared.models import Parameters
from tests.gated import STUDY, GatedSite, enrolment, gated, study, to_bytes

pytestmark = pytest.mark.slow  # seconds altogether

FOREIGN = Ed25519PrivateKey.from_private_bytes(b"f" * 32)
WAIT = 8.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[GatedSite]:
    """A hospital that has approved the small study."""
    made = gated(tmp_path)["north"]
    made.approve(study())
    yield made
    made.gate.close()


def same(first: Parameters, second: Parameters) -> bool:
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def refused(answer: object) -> str:
    """The code and reason of a refusal."""
    assert isinstance(answer, Refused), answer
    return f"{answer.code} {answer.reason}"


def spent(site: GatedSite) -> float:
    with reading(site.hospital.file.ledger_path(site.hospital.site_file)) as ledger:
        return ledger.epsilon(1e-3)


def test_a_study_from_enrolment_to_its_last_evaluation(site: GatedSite) -> None:
    asked = study()
    enrolled = site.enrol(asked)
    assert isinstance(enrolled, Enrolled)
    assert (enrolled.declared_size, enrolled.declared_num_test) == (140, 50)
    updates = []
    for number in (1, 2, 3):
        trained, record, _ = site.train(asked, number)
        assert isinstance(trained, Trained)
        updates.append(site.update_of(record))
    evaluated, record, _ = site.evaluate(asked)
    assert isinstance(evaluated, Evaluated)
    assert evaluated.privacy is not None
    assert evaluated.privacy.epsilon <= asked.privacy.epsilon
    assert list(record[STATISTICS]) == ["score_histogram"]
    assert not same(updates[0], updates[1])
    events = [(row["event"], row["details"].get("kind")) for row in site.audit()[1:]]
    assert events[:3] == [("task received", "enrol"), ("study approved", None), ("answer sent", "enrolled")]
    assert events[3:] == [pair for kind, sent in [("train", "trained")] * 3 + [("evaluate", "evaluated")] for pair in (("task received", kind), ("answer sent", sent))]  # fmt: skip


def test_the_audit_log_says_what_left(site: GatedSite) -> None:
    site.enrol(study())
    question, task = site.sealed(encode(TrainTask(run="run-1", study_hash=study().fingerprint(), round=1, fold=1), parameters=site.parameters))
    answer = site.gate.answer(question)
    opened = site.opened(answer, task)
    came, left = site.last("task received"), site.last("answer sent")
    assert (came["nonce"], came["content"], came["bytes"]) == (task.nonce, task.content, len(question))
    assert left["content"] == opened.content
    assert left["parameters"]["bytes"] == sum(len(array.data) for array in opened.record[PARAMETERS].values())
    assert left["epsilon"] == decode(opened.record, Trained).privacy.epsilon
    assert opened.audit_head == site.audit()[-1]["hash"]  # the row of this very answer is what the coordinator remembers


# What is no question ---------------------------------------------------------------------------------------------------------------


def stopping() -> RecordDict:
    return encode(TrainTask(run="run-1", study_hash="h", round=1, fold=1))


def altered(content: bytes) -> bytes:
    at = content.index(b'"round":1') + 8
    return content[:at] + b"2" + content[at + 1 :]


NOT_QUESTIONS: dict[str, Callable[[GatedSite], bytes]] = {
    "nothing": lambda site: b"",
    "junk": lambda site: b"\xff" * 1000,
    "a pickle": lambda site: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07PATIENT\x94.",
    "unsealed": lambda site: to_bytes(stopping()),
    "no records": lambda site: to_bytes(RecordDict()),
    "an empty seal": lambda site: to_bytes(RecordDict({"envelope": ConfigRecord({"text": "t", "seal": "", "arrays": b""})})),
    "forged": lambda site: site.sealed(stopping(), signer=FOREIGN)[0],
    "signed by the site itself": lambda site: site.sealed(stopping(), signer=site.hospital.signer)[0],
    "for another site": lambda site: site.sealed(stopping(), site="south")[0],
    "altered": lambda site: altered(site.sealed(stopping())[0]),
    "undeclared arrays": lambda site: site.sealed(RecordDict({**stopping(), "PATIENT TEXT": to_array_record(site.parameters)}))[0],
    "cut off": lambda site: site.sealed(stopping())[0][:-5],
}


@pytest.mark.parametrize("kind", NOT_QUESTIONS)
def test_what_is_no_question_of_the_coordinator_s_gets_nothing_and_is_written_down(site: GatedSite, kind: str) -> None:
    content = NOT_QUESTIONS[kind](site)
    before = len(site.audit())
    assert site.gate.answer(content) == b""
    rows = site.audit()
    assert len(rows) == before + 1
    assert rows[-1]["event"] == "task refused"
    assert rows[-1]["details"]["bytes"] == len(content)
    assert rows[-1]["details"]["reason"].startswith(("E107 ", "E102 "))
    assert "PATIENT" not in site.audit_path().read_text()


def test_a_question_is_answered_once(site: GatedSite) -> None:
    question, task = site.sealed(encode(enrolment(study())))
    assert site.opened(site.gate.answer(question), task)
    assert site.gate.answer(question) == b""
    assert "E107" in site.last("task refused")["reason"]


def test_a_replay_at_the_same_moment_is_answered_once(site: GatedSite) -> None:
    question, _ = site.sealed(encode(enrolment(study())))
    together = threading.Barrier(4)

    def ask() -> bytes:
        together.wait(WAIT)
        return site.gate.answer(question)

    with ThreadPoolExecutor(max_workers=4) as askers:
        answers = [future.result(WAIT) for future in [askers.submit(ask) for _ in range(4)]]
    assert sorted(map(bool, answers)) == [False, False, False, True]


def test_a_question_of_an_earlier_life_of_the_daemon_is_a_replay_and_charges_nothing(site: GatedSite) -> None:
    """Whoever recorded round 1's signed task plays it back once the site is at round 3 and was started anew: it would train again."""
    asked = study(privacy={**STUDY["privacy"], "spare_rounds": 3})
    site.approve(asked)
    site.enrol(asked)
    content = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=1, fold=1)
    question, task = site.sealed(encode(content, parameters=site.parameters))
    first = site.update_of(site.opened(site.gate.answer(question), task).record)
    site.started_anew()
    assert site.gate.answer(question) == b""  # also while its update is still kept
    for number in (2, 3):
        assert isinstance(site.train(asked, number)[0], Trained)
    before, rows = spent(site), len(site.audit())
    for _ in range(2):
        site.started_anew()
        assert site.gate.answer(question) == b""
        assert "E107" in site.last("task refused")["reason"]
    assert spent(site) == before
    assert len(site.audit()) == rows + 2
    again, record, _ = site.train(asked, 1)  # the same asked with a nonce of its own is no replay, and has its price
    assert isinstance(again, Trained) and spent(site) > before
    assert not same(first, site.update_of(record))


def test_a_question_that_was_received_is_a_replay_even_where_it_was_never_answered(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon is killed in training; its charge stands, and the recorded task cannot make another."""
    site.enrol(study())
    question, _ = site.sealed(encode(TrainTask(run="run-1", study_hash=study().fingerprint(), round=1, fold=1), parameters=site.parameters))

    def killed(*arguments: object, **rest: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(client.local_update, "train_round_private", killed)
        site.gate.answer(question)
    before = spent(site)
    assert site.started_anew().gate.answer(question) == b""
    assert spent(site) == before


@settings(max_examples=25)
@given(content=st.binary(max_size=200))
def test_random_bytes_get_nothing(junk_site: GatedSite, content: bytes) -> None:
    assert junk_site.gate.answer(content) == b""


@pytest.fixture(scope="module")
def junk_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatedSite]:
    made = gated(tmp_path_factory.mktemp("junk"))["north"]
    yield made
    made.gate.close()


SIGNED_ODDITIES = [
    '{"kind":"train"}', '{"kind":"train","run":"r","study_hash":"h","round":1,"fold":1,"more":"PATIENT TEXT"}', '{"kind":"none"}', "", "[" * 100_000,
    f'{{"kind":"train","run":"{"r" * 900_000}","study_hash":"h","round":1,"fold":1}}',
    f'{{"kind":"train","run":"{"r" * (MAX_NAME + 1)}","study_hash":"h","round":1,"fold":1}}',
    '{"kind":"train","run":"r","study_hash":"h","round":99999999999999999999,"fold":1}',
    f'{{"kind":"stop","run":"r","study_hash":"{"h" * 501}"}}', '{"kind":"train","run":"","study_hash":"h","round":1,"fold":1}',
    '{"kind":"refused","name":"n","code":"E101","reason":"r"}', '{"kind":"enrol","run":"r","study":{},"task_fingerprint":""}',
    '{"kind":"enrol","run":"r","study":{"name":5,"task":["PATIENT TEXT"]},"task_fingerprint":""}',
    f'{{"kind":"enrol","run":"r","study":{{"name":"n","task":"t","deep":{"[" * 5000}{"]" * 5000}}},"task_fingerprint":""}}', "\x00", "x" * 1_100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", SIGNED_ODDITIES, ids=range(len(SIGNED_ODDITIES)))
def test_whatever_the_coordinator_signs_the_answer_is_a_sealed_refusal_that_is_written_down(site: GatedSite, text: str) -> None:
    question, task = site.sealed(RecordDict({MESSAGE: ConfigRecord({JSON: text})}))
    record = site.opened(site.gate.answer(question), task).record
    assert refused(decode(record, Refused)).startswith(("E102", "E305", "E3"))
    assert site.last("answer sent")["outcome"] == "refused"
    assert "PATIENT" not in site.audit_path().read_text()


# What is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.0.1", "v" * MAX_NAME, None])
def test_another_version_is_named_beside_the_site_s_own(site: GatedSite, version: str | None) -> None:
    reason = refused(site.enrol(study(), version=version))
    assert reason.startswith("E305")
    assert f"wardround {version}" in reason
    if version != "v" * MAX_NAME:  # else the sentence is cut off
        assert installed_version() in reason


def test_a_task_that_is_not_allowed_is_never_imported(site: GatedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_by_a_coordinator.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for task in ("planted_by_a_coordinator:task", str(tmp_path / "schema.toml"), "heart-disease"):
        asked = study(task=task)
        assert "policy.allowed_tasks" in refused(site.enrol(asked))
    assert "planted_by_a_coordinator" not in sys.modules


def test_a_study_with_planted_faults_is_refused_and_nobody_is_asked_to_approve_it(site: GatedSite) -> None:
    asked = study(faults={"sites": 1, "kind": "nan"})
    site.approve(asked)
    reason = refused(site.enrol(asked))
    assert reason.startswith("E300") and reason.endswith("Rule: faults.")
    hospital = site.hospital
    assert Approvals(hospital.state, hospital.signer).pending() == []
    assert not hospital.file.ledger_path(hospital.site_file).exists()


def test_the_daemon_s_log_says_why_an_update_did_not_count(site: GatedSite, caplog: pytest.LogCaptureFixture) -> None:
    asked = study()
    site.enrol(asked)
    told = NotCounted(fold=1, round=1, reason="E102 tensor w: expected finite values")
    task = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=2, fold=1, not_counted=told)
    with caplog.at_level(logging.WARNING, logger="client"):
        assert isinstance(site.ask(task, site.parameters), Trained)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["site north: its update of round 1 did not count: E102 tensor w: expected finite values"]
    assert site.last("task received")["round"] == 2


def test_what_nobody_approved_is_refused_and_remembered(site: GatedSite) -> None:
    asked = study(purpose="another")
    assert "approval.missing" in refused(site.enrol(asked))
    assert "E102" in refused(site.train(asked)[0])
    hospital = site.hospital
    pending = Approvals(hospital.state, hospital.signer).pending()
    assert [item.study_hash for item in pending] == [asked.fingerprint()]
    assert pending[0].purpose == "another"
    assert not hospital.file.ledger_path(hospital.site_file).exists()  # neither ledger nor cohort was touched
    site.approve(asked)
    assert isinstance(site.enrol(asked), Enrolled)
    assert Approvals(hospital.state, hospital.signer).pending() == []


def test_a_withdrawn_approval_holds_from_the_next_round_on(site: GatedSite) -> None:
    asked = study()
    site.enrol(asked)
    assert isinstance(site.train(asked, 1)[0], Trained)
    before = spent(site)
    hospital = site.hospital
    Approvals(hospital.state, hospital.signer).withdraw(asked.fingerprint())
    assert "approval.missing" in refused(site.train(asked, 2)[0])
    assert "approval.missing" in refused(site.started_anew().train(asked, 2)[0])
    assert spent(site) == before


def test_a_study_of_one_run_is_none_of_another(site: GatedSite) -> None:
    site.enrol(study())
    assert refused(site.train(study(), run="run-2")[0]).startswith("E102")
    assert refused(site.train(study(seed=4))[0]).startswith("E102")


def test_a_model_of_another_shape_is_refused(site: GatedSite) -> None:
    site.enrol(study())
    before = spent(site)
    task = TrainTask(run="run-1", study_hash=study().fingerprint(), round=1, fold=1)
    for parameters in (None, {}, {**site.parameters, "PATIENT TEXT": site.parameters["0.bias"]}, dict(list(site.parameters.items())[:2])):
        assert refused(site.ask(task, parameters)).startswith("E102")
    assert spent(site) == before


# What changes under way --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("max_epsilon = 5.0", "max_epsilon = 1.0", "policy.max_epsilon"),
        ('allowed_tasks = ["breast-cancer"]', 'allowed_tasks = ["heart-disease"]', "policy.allowed_tasks"),
        ("declared_size = 140", "declared_size = 19", "policy.min_patients"),
        ("exact_metrics = true", "exact_metrics = false", "approval.altered"),
    ],
)
def test_a_changed_site_file_holds_from_the_next_question_on(site: GatedSite, before: str, after: str, rule: str) -> None:
    asked = study()
    site.enrol(asked)
    assert isinstance(site.train(asked, 1)[0], Trained)
    site.edit(before, after)
    assert rule in refused(site.train(asked, 2)[0])
    assert site.last("site file read again")
    site.edit(after, before)
    assert isinstance(site.train(asked, 2)[0], Trained)


def test_while_the_site_file_does_not_fit_nothing_is_done(site: GatedSite) -> None:
    asked = study()
    site.enrol(asked)
    for broken in ('name = "south"', "name = ", '"PATIENT TEXT" = 5\nname = "north"', 'name = "north"\noptions = 5'):
        site.edit('name = "north"', broken)
        answer, _, content = site.train(asked)
        assert refused(answer).startswith("E112")
        assert b"PATIENT" not in content
        site.edit(broken, 'name = "north"')
    assert isinstance(site.train(asked)[0], Trained)
    assert "PATIENT" not in site.audit_path().read_text()


def test_a_daemon_that_starts_anew_goes_on_and_gives_the_identical_update_again(site: GatedSite) -> None:
    asked = study()
    site.enrol(asked)
    first = site.update_of(site.train(asked, 1)[1])
    site.started_anew()
    answer, record, _ = site.train(asked, 2)
    assert isinstance(answer, Trained)
    second, before = site.update_of(record), spent(site)
    assert not same(first, second)
    site.started_anew()
    assert same(site.update_of(site.train(asked, 2)[1]), second)
    assert same(site.update_of(site.train(asked, 2)[1]), second)
    assert spent(site) == before
    assert isinstance(site.evaluate(asked)[0], Evaluated)


def test_a_damaged_memory_of_what_was_agreed_to_is_said(site: GatedSite) -> None:
    site.enrol(study())
    [path] = (site.kit / "state" / client.gate.STUDIES).iterdir()
    path.write_text("{")
    site.started_anew()
    assert refused(site.train(study())[0]).startswith("E103")
    assert isinstance(site.enrol(study()), Enrolled)  # agreed to once more, it is whole again
    assert isinstance(site.train(study())[0], Trained)


def test_more_runs_than_are_kept_open(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.gate, "MAX_OPEN_RUNS", 1)
    other = study(purpose="another")
    site.approve(other)
    site.enrol(study())
    site.enrol(other, "run-2")
    assert isinstance(site.train(study())[0], Trained)
    assert isinstance(site.train(other, run="run-2")[0], Trained)


def endless(begun: threading.Event) -> Callable[..., int]:
    """Training that ends only where nobody wants it any more."""

    def train(model: object, part: object, local: LocalRound, **rest: object) -> int:
        begun.set()
        while True:
            local.still_wanted()

    return train


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "newer round", "deadline"])
def test_training_that_nobody_waits_for_ends(site: GatedSite, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    asked, begun = study(), threading.Event()
    site.enrol(asked)
    with monkeypatch.context() as patched, ThreadPoolExecutor(max_workers=1) as courier:
        patched.setattr(client.local_update, "train_round_private", endless(begun))
        seconds = 2.0 if how == "deadline" else WAIT
        task = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=1, fold=1)
        trained = courier.submit(site.ask, task, site.parameters, seconds=seconds)
        assert begun.wait(WAIT)
        patched.undo()
        if how == "stop":
            assert isinstance(site.stop(asked), Stopped)
        elif how == "newer round":
            assert isinstance(site.train(asked, 2)[0], Trained)
        assert refused(trained.result(WAIT)).startswith("E802")
    assert isinstance(site.train(asked, 3)[0], Trained)


def test_no_question_is_worked_on_longer_than_a_day_whatever_it_says(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    given, do = [], site.gate._bench.do

    def watched(*arguments: Any, seconds: float) -> RecordDict:
        given.append(seconds)
        return do(*arguments, seconds=seconds)

    monkeypatch.setattr(site.gate._bench, "do", watched)
    assert isinstance(site.ask(enrolment(study()), seconds=1e7), Enrolled)
    assert isinstance(site.ask(enrolment(study()), seconds=5), Enrolled)
    assert given == [MOST_SECONDS, 5] == [86_400, 5]


@pytest.mark.slow
def test_however_often_a_long_question_is_asked_a_stop_gets_through(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator signs one task many times, with all the seconds in the world; the site's courier has a bounded number of hands."""
    asked, begun = study(), threading.Event()
    site.enrol(asked)
    task = TrainTask(run="run-1", study_hash=asked.fingerprint(), round=1, fold=1)
    content = encode(task, parameters=site.parameters)
    with monkeypatch.context() as patched, ThreadPoolExecutor(max_workers=MAX_AT_ONCE) as courier:
        patched.setattr(client.local_update, "train_round_private", endless(begun))
        sealed = [site.sealed(content, seconds=1e7) for _ in range(4 * MAX_AT_ONCE)]
        answers = [courier.submit(site.gate.answer, question) for question, _ in sealed]
        assert begun.wait(WAIT)
        assert courier.submit(site.stop, asked).result(WAIT) == Stopped(name="north")
        late = time.monotonic() + WAIT
        while wait(answers, timeout=0.2).not_done and time.monotonic() < late:
            site.stop(asked)  # a hand that had taken its question before, and asked after the stop, has begun anew
        told = [future.result(0) for future in answers]
    let_go = [answer for answer in told if answer == NO_ANSWER]
    assert len(let_go) >= len(sealed) - 2 * MAX_AT_ONCE
    for answer, (_, kept) in zip(told, sealed, strict=True):
        if answer != NO_ANSWER:  # asked before or after the stop: training that ended with it
            assert decode(site.opened(answer, kept).record, Refused, Trained)


# A full disk ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1], ids=["nothing can be written", "only that the task came"])
def test_what_cannot_be_written_down_does_not_leave(site: GatedSite, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    asked = study()
    site.enrol(asked)
    before, written = spent(site), shared.audit._write_whole
    left = iter(range(rows))

    def full(file: int, content: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, content)

    with monkeypatch.context() as patched:
        patched.setattr(shared.audit, "_write_whole", full)
        answer, record, _ = site.train(asked)
        assert refused(answer).startswith("E103")
        assert not any(isinstance(part, ArrayRecord) for part in record.values())
    assert (spent(site) == before) == (rows == 0)  # what could not even be received was not begun
    assert isinstance(site.train(asked)[0], Trained)
    assert site.audit()


def test_junk_on_a_full_disk_gets_nothing_either(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shared.audit, "_write_whole", full)
        assert site.gate.answer(b"junk") == b""
    assert site.audit()
