"""Enrolment in a deployment: sites come late, mend what was wrong, or never come; a node speaks for its own site alone."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Context, Message

import server.enrolment
from client.app import client_app
from server.coordinator import Coordinator, History
from server.enrolment import MAX_PAUSE_SECONDS, NEVER_ASKED
from server.quorum import LATE, is_final
from server.run_folder import RunFolder
from shared.errors import DeadlineMissedError, NotApprovedError, PolicyRefusedError, QuorumLostError, StorageError, fixed_sentence
from shared.messages import Enrolled, EnrolTask, Refused, decode, encode
from shared.results import RoundRecord
from shared.schema import Column, TableSchema
from shared.study import Study
from shared.task import Task
from shared.tasks.tabular import synthetic_cohort
from simulations.federation import VirtualFederation, virtual_sites
from simulations.in_process import FIRST_SITE_NODE_ID, InProcessGrid

SITES = ("north", "south", "west")
NODES = {name: FIRST_SITE_NODE_ID + index for index, name in enumerate(SITES)}
SCHEMA = TableSchema(
    name="tiny", label=Column(name="ill", type="binary"),
    columns=(Column(name="x", type="number", low=-3, high=3), Column(name="y", type="number", low=0, high=10)),
)  # fmt: skip
STUDY = {
    "name": "tiny", "task": "tiny", "seed": 3, "rounds": {"count": 3, "deadline": "20s"}, "training": {"learning_rate": 0.3, "batch_size": 16},
    "privacy": {"unit": "none"}, "evaluation": {"bootstrap": 0},
}  # fmt: skip
Enrolment = Callable[[str, int], Enrolled | Refused | None]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator looks again after a hundredth of a second, not after two."""
    monkeypatch.setattr(server.enrolment, "ENROL_PAUSE_SECONDS", 0.01)


@dataclass
class Members:
    """Who is expected."""

    names: set[str] = field(default_factory=lambda: set(SITES))
    signed: dict[str, int] = field(default_factory=dict)  # declared sizes

    def expected(self) -> frozenset[str]:
        return frozenset(self.names)

    def public_key(self, name: str) -> str | None:
        raise AssertionError("asked for only where updates are aggregated securely")

    def declared_size(self, name: str) -> int | None:
        return self.signed.get(name)

    def name_of(self, node_id: int) -> str:
        return next((name for name, known in NODES.items() if known == node_id), f"node {node_id}")


class ComingAndGoing(InProcessGrid):
    """A grid whose nodes are online from their `since`-th look on."""

    def __init__(self, app: Callable[[Message, Context], Message], since: dict[str, int]) -> None:
        super().__init__(app, SITES)  # type: ignore[arg-type]
        self.since, self.looks = since, 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return [node_id for name, node_id in NODES.items() if self.looks >= self.since.get(name, 1)]


@dataclass
class Deployment:
    """A study over three virtual sites, whose enrolment a test may speak for: (site, how many times it was asked before) -> answer, or the true one."""

    task: Task
    out: Path
    members: Members = field(default_factory=Members)
    since: dict[str, int] = field(default_factory=dict)
    enrolment: Enrolment = lambda name, times: None
    observe: Callable[[RoundRecord], None] = lambda record: None
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SITES, 0))
    records: list[RoundRecord] = field(default_factory=list)

    def run(self, **rounds: object) -> History:
        study = Study.from_table({**STUDY, "rounds": {**STUDY["rounds"], **rounds}})  # type: ignore[dict-item]
        cohorts = {name: synthetic_cohort(SCHEMA, 40, seed=index) for index, name in enumerate(SITES)}
        folder = RunFolder.create(self.out, study)
        sites = virtual_sites(VirtualFederation(cohorts=cohorts, synthetic=True, notes={}), self.task, study, folder.path / "ledgers")
        app = client_app(lambda context: sites[str(context.node_config["site"])])

        def answer(message: Message, context: Context) -> Message:
            name = str(context.node_config["site"])
            if message.metadata.message_type != "query":
                return app(message, context)
            assert decode(message.content, EnrolTask).version is not None
            self.asked[name] += 1
            said = self.enrolment(name, self.asked[name])
            return app(message, context) if said is None else Message(encode(said), reply_to=message)

        def take(record: RoundRecord) -> None:
            self.records.append(record)
            self.observe(record)

        self.grid = ComingAndGoing(answer, self.since)
        self.coordinator = Coordinator(study, self.task, folder, observe=take, membership=self.members)
        try:
            return self.coordinator.run(self.grid)
        finally:
            for site in sites.values():
                site.close()

    def statuses(self, number: int) -> dict[str, str]:
        return {site.name: site.status for site in self.records[number - 1].sites}


@pytest.fixture
def deployment(task: Task, tmp_path: Path) -> Deployment:
    return Deployment(task, tmp_path / "runs")


def refusing(kind: type[Exception], *, of: str = "west", times: float = math.inf) -> Enrolment:
    """This site refuses so many times."""
    code, sentence = fixed_sentence(kind).split(" ", 1)  # type: ignore[arg-type]
    return lambda name, asked: Refused(name=name, code=code, reason=sentence) if name == of and asked <= times else None


def test_a_study_that_requires_all_begins_when_the_last_has_come(deployment: Deployment) -> None:
    deployment.since = {"south": 3, "west": 5}
    history = deployment.run()
    assert set(history.enrolled) == set(SITES)
    assert history.refused == {}
    assert deployment.grid.looks >= 5
    assert deployment.statuses(1) == dict.fromkeys(SITES, "ok")
    assert deployment.asked == dict.fromkeys(SITES, 1)  # who has enrolled is not asked again


@pytest.mark.slow
@pytest.mark.parametrize(("on_missing", "goes_on"), [("proceed", True), ("abort", False)])
def test_who_never_comes_is_named_after_a_bounded_wait(deployment: Deployment, on_missing: str, goes_on: bool) -> None:
    deployment.since = {"west": 10**9}
    started = time.monotonic()
    if goes_on:
        history = deployment.run(deadline="300ms", on_missing=on_missing)
        assert history.refused == {"west": LATE}
        assert deployment.statuses(1)["west"] == "missing"
    else:
        with pytest.raises(QuorumLostError, match=f"west: {DeadlineMissedError.code}"):
            deployment.run(deadline="300ms", on_missing=on_missing)
        assert deployment.records == []
    assert 0.3 <= time.monotonic() - started < 10


def test_a_quorum_that_is_not_reached_ends_the_study_and_names_who_is_missing(deployment: Deployment) -> None:
    deployment.since = {"north": 10**9, "west": 10**9}
    with pytest.raises(QuorumLostError) as lost:
        deployment.run(deadline="200ms", require=2)
    assert lost.value.exit_code == 8
    assert all(f"{name}: {LATE}" in lost.value.what for name in ("north", "west"))
    assert "south:" not in lost.value.what


def test_with_a_quorum_the_study_begins_early_and_a_late_site_joins_at_the_next_round(deployment: Deployment) -> None:
    deployment.since = {"west": 10**9}

    def let_west_come(record: RoundRecord) -> None:
        deployment.grid.since = {}

    deployment.observe = let_west_come
    history = deployment.run(require=2)
    first = deployment.statuses(1)
    assert (first.pop("west"), set(first.values())) == ("missing", {"ok"})
    assert deployment.statuses(2) == dict.fromkeys(SITES, "ok")
    assert set(history.enrolled) == set(SITES)
    assert history.refused == {}


@pytest.mark.parametrize("error", [NotApprovedError, StorageError, DeadlineMissedError])
def test_what_a_hospital_may_mend_is_asked_again_until_it_is(deployment: Deployment, error: type[Exception]) -> None:
    deployment.enrolment = refusing(error, times=3)
    history = deployment.run()
    assert deployment.asked["west"] == 4
    assert set(history.enrolled) == set(SITES)
    assert history.refused == {}
    assert deployment.statuses(1) == dict.fromkeys(SITES, "ok")


def test_a_hospital_that_decides_during_the_study_joins_then(deployment: Deployment) -> None:
    approved: list[bool] = []
    refuse = refusing(NotApprovedError)
    deployment.enrolment = lambda name, times: None if approved else refuse(name, times)
    deployment.observe = lambda record: approved.append(True)
    deployment.run(require=2)
    assert deployment.statuses(1)["west"] == "refused"
    assert deployment.statuses(3)["west"] == "ok"


def test_a_final_refusal_is_not_asked_again_and_nobody_waits_for_it(deployment: Deployment) -> None:
    deployment.enrolment = refusing(PolicyRefusedError)
    started = time.monotonic()
    history = deployment.run()  # a deadline of 20 s is not waited for
    assert time.monotonic() - started < 10
    assert deployment.asked["west"] == 1
    assert history.refused == {"west": fixed_sentence(PolicyRefusedError)}
    assert deployment.statuses(1)["west"] == "refused"


def test_a_site_that_is_revoked_meanwhile_is_not_waited_for(deployment: Deployment) -> None:
    deployment.since = {"west": 10**9}
    look = deployment.members.expected

    def shrinking() -> frozenset[str]:
        if deployment.grid.looks > 2:
            deployment.members.names.discard("west")
        return look()

    deployment.members.expected = shrinking  # type: ignore[method-assign]
    started = time.monotonic()
    history = deployment.run(on_missing="proceed")
    assert time.monotonic() - started < 10
    assert set(history.enrolled) == {"north", "south"}


@pytest.mark.parametrize("claimed", ["north", "nobody", "west "])
def test_a_node_that_claims_another_name_is_refused_under_its_own(deployment: Deployment, claimed: str) -> None:
    lie = Enrolled(name=claimed, declared_size=40, declared_num_patients=60, declared_num_test=20)
    deployment.enrolment = lambda name, times: lie if name == "west" else None
    history = deployment.run()
    assert set(history.enrolled) == {"north", "south"}
    assert history.refused.keys() == {"west"}
    assert history.refused["west"].startswith("E102")
    assert deployment.asked["west"] == 1
    assert deployment.statuses(1)["north"] == "ok"


def test_a_node_that_refuses_in_another_s_name_harms_itself_alone(deployment: Deployment) -> None:
    deployment.enrolment = lambda name, times: Refused(name="north", code="E600", reason="No.") if name == "west" else None
    history = deployment.run()
    assert set(history.enrolled) == {"north", "south"}
    assert history.refused.keys() == {"west"}


@pytest.mark.parametrize("declared_size", [0, -5])
def test_a_site_of_nobody_does_not_enrol(deployment: Deployment, declared_size: int) -> None:
    lie = Enrolled(name="west", declared_size=declared_size, declared_num_patients=60, declared_num_test=20)
    deployment.enrolment = lambda name, times: lie if name == "west" else None
    started = time.monotonic()
    history = deployment.run()  # its answer is final: a deadline of 20 s is not waited for
    assert time.monotonic() - started < 10
    assert set(history.enrolled) == {"north", "south"}
    assert history.refused.keys() == {"west"}


def test_which_refusals_are_final() -> None:
    final = {"E100", "E102", "E107", "E300", "E305", "E600", "E700"}
    mendable = {"E101", "E103", "E104", "E401", "E403", "E501", "E503", "E601", "E801", "E802"}
    assert {code for code in final | mendable if is_final(f"{code} A sentence.")} == final


def test_a_node_that_is_not_ready_is_asked_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.enrolment, "ENROL_PAUSE_SECONDS", 2.0)
    asking, pauses = NEVER_ASKED, []
    assert asking.is_due
    for _ in range(8):
        before = time.monotonic()
        asking = asking.after(LATE)
        pauses.append(asking.due - before)
        assert not asking.is_due
        assert asking.hurried().is_due
    assert pauses == pytest.approx([2, 4, 8, 16, 32, *[MAX_PAUSE_SECONDS] * 3], abs=0.5)
    final = asking.after(fixed_sentence(PolicyRefusedError))
    assert final.due == math.inf
    assert not final.hurried().is_due


def test_a_site_weighs_no_more_than_the_size_that_was_approved(deployment: Deployment) -> None:
    """Who declares a billion patients would otherwise be the model; who declares fewer than were approved is believed."""
    deployment.members.signed = {"north": 40, "south": 10**6}
    deployment.enrolment = lambda name, asked: (
        Enrolled(name=name, declared_size=10**9, declared_num_patients=10**9, declared_num_test=5) if name == "north" else None
    )
    with pytest.raises(QuorumLostError):  # north's site has not enrolled in truth, and refuses to train
        deployment.run(on_missing="abort")
    weights = {name: member.weight for name, member in deployment.coordinator._strategy._members.items()}
    declared = {name: site.declared_size for name, site in deployment.coordinator.history.enrolled.items()}
    assert weights["north"] == 40
    assert weights["south"] == declared["south"] < 10**6
    assert weights["west"] == declared["west"]  # the roster says nothing of it


def test_a_site_tests_no_more_patients_than_were_approved_to_train_on(deployment: Deployment) -> None:
    """Who declares a billion test patients at enrolment would otherwise be believed a billion counts."""
    deployment.run()
    coordinator = deployment.coordinator
    true = {name: coordinator._enrolment.declared_num_test(name) for name in SITES}
    deployment.members.signed = {"north": 28}
    boast = Enrolled(name="north", declared_size=10**9, declared_num_patients=2 * 10**9, declared_num_test=10**9)
    coordinator.history.enrolled["north"] = boast
    assert coordinator._enrolment.declared_num_test("north") == 28
    assert {name: coordinator._enrolment.declared_num_test(name) for name in ("south", "west")} == {name: true[name] for name in ("south", "west")}
