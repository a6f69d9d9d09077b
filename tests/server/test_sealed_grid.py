"""Only the answer of the site that was asked, to the question that it was asked, comes through the sealed grid; all else is a code, written down."""

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

import server.sealed_grid
from server.live_roster import LiveRoster
from server.provisioning import revoke
from server.sealed_grid import REPLY_BYTES, REPLY_MULTIPLE, SealedGrid
from server.strategies.answers import failure_reason
from shared.audit import AuditLog, verify_audit
from shared.errors import KitError, ProtocolError, SealError, StudyStoppedError, fixed_sentence
from shared.kit import ROSTER, SIGNING_KEY, load_signing_key
from shared.messages import PARAMETERS, Stopped, StopTask, TrainTask, decode, encode
from shared.seals import SealedTask, open_task, seal_reply
from simulations.in_process import InProcessGrid
from tests.gated import to_bytes, to_records
from tests.provisioned import approved, federation, opened

SITES = {"north": 11, "south": 12, "west": 13}
TEXT = "PATIENT TEXT"
UPDATE = {"w": np.arange(4, dtype=np.float32)}
Reply = Callable[["Daemon", Message], Message | None]


@dataclass
class Daemon:
    """What a site does behind its courier: it opens a question and seals an answer. No patients: the gate's own tests have those."""

    name: str
    signer: Ed25519PrivateKey
    coordinator: Ed25519PrivateKey
    heads: Iterator[str] = field(default_factory=lambda: (f"{number:064x}" for number in itertools.count(1)))

    def task(self, message: Message) -> SealedTask:
        return open_task(to_records(to_bytes(message.content)), site=self.name, coordinator=self.coordinator.public_key())[1]

    def answer(self, message: Message, *, record: RecordDict | None = None, signer: Ed25519PrivateKey | None = None) -> RecordDict:
        sealed = record or encode(Stopped(name=self.name), parameters=UPDATE)
        records = seal_reply(sealed, self.task(message), signer=signer or self.signer, audit_head=next(self.heads))
        return to_records(to_bytes(records))


def honest(daemon: Daemon, message: Message) -> Message | None:
    return Message(daemon.answer(message), reply_to=message)


class CarryingGrid(Grid):
    """Carries bytes between coordinator and daemons. A daemon that gives None answers never."""

    def __init__(self, daemons: dict[int, Daemon], replies: dict[str, Reply]) -> None:
        InProcessGrid(lambda message, context: message, [])  # sets what flwr's messages are made with
        self.daemons, self.replies = daemons, replies
        self.sent: dict[str, Message] = {}
        self.refuses_to_send: set[int] = set()

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:
        raise RuntimeError("no run")

    def create_message(self, *arguments: object, **rest: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [*self.daemons, 99]  # and one whom nobody knows

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        ids: list[str | None] = []
        for message in messages:
            assert set(message.content) <= {"envelope", "packed"}  # nothing unsealed is ever handed over
            number = f"message-{len(self.sent) + 1}"
            message.metadata.__dict__["_message_id"] = number
            if message.metadata.dst_node_id in self.refuses_to_send:
                ids.append(None)
            else:
                self.sent[number] = message
                ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for number in message_ids:
            message = self.sent.get(number)
            daemon = None if message is None else self.daemons.get(message.metadata.dst_node_id)
            reply = None if daemon is None or message is None else self.replies.get(daemon.name, honest)(daemon, message)
            if reply is not None:
                del self.sent[number]
                found.append(reply)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


@dataclass
class Rig:
    """A coordinator's sealed grid over three sites."""

    out: Path
    roster: LiveRoster
    grid: SealedGrid
    carrier: CarryingGrid
    audit: AuditLog

    def ask(self, *names: str, timeout: float | None = 5.0) -> dict[str, Message]:
        """The replies of these sites by name, or of all."""
        return {self.roster.name_of(reply.metadata.src_node_id): reply for reply in self.asking(*names, timeout=timeout)}

    def asking(self, *names: str, timeout: float | None = 5.0) -> Iterator[Message]:
        record = encode(TrainTask(run="r", study_hash="h", round=1, fold=1), parameters=UPDATE)
        return self.grid.send_and_receive([Message(record, SITES[name], "train") for name in names or SITES], timeout=timeout)

    def rows(self, event: str) -> list[dict]:
        verify_audit(self.audit.path)
        rows = [json.loads(line) for line in self.audit.path.read_text().splitlines()]
        return [row["details"] for row in rows if row["event"] == event]


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[..., Rig]:
    def make(stopped: Callable[[], bool] = lambda: False, **replies: Reply) -> Rig:
        out = approved(tmp_path, SITES, federation(sites=SITES))
        (tmp_path / "state").mkdir()
        roster, signer = LiveRoster(out / "coordinator", tmp_path / "state"), load_signing_key(out / "coordinator" / SIGNING_KEY)
        roster.remember({site.node_key: SITES[site.name] for site in roster.active()})
        daemons = {SITES[name]: Daemon(name, load_signing_key(tmp_path / name / SIGNING_KEY), signer) for name in SITES}
        carrier = CarryingGrid(daemons, replies)
        audit = AuditLog(tmp_path / "state" / "audit.jsonl", owner="tests", role="coordinator", signer=signer)
        return Rig(out, roster, SealedGrid(carrier, roster, signer=signer, audit=audit, stopped=stopped), carrier, audit)

    return make


def test_sealed_answers_come_through_bit_for_bit(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    replies = rig.ask()
    assert set(replies) == set(SITES)
    for name, reply in replies.items():
        assert decode(reply.content, Stopped) == Stopped(name=name)
        assert reply.content == encode(Stopped(name=name), parameters=UPDATE)
        assert reply.metadata.src_node_id == SITES[name]
    assert [row["site"] for row in rig.rows("task sent")] == list(SITES)
    received = {row["site"]: row for row in rig.rows("reply received")}
    assert received["north"]["audit_head"] == f"{1:064x}"
    assert received["north"]["round"] == 1


def test_each_task_is_for_one_site(make_rig: Callable[..., Rig]) -> None:
    seen: list[Message] = []

    def note(daemon: Daemon, message: Message) -> Message | None:
        seen.append(message)
        return honest(daemon, message)

    rig = make_rig(**dict.fromkeys(SITES, note))
    rig.ask()
    for message, other in itertools.permutations(seen, 2):
        daemon = rig.carrier.daemons[other.metadata.dst_node_id]
        with pytest.raises(SealError, match="signature of the coordinator"):
            daemon.task(message)
    assert len({row["nonce"] for row in rig.rows("task sent")}) == 3
    assert len({row["content"] for row in rig.rows("task sent")}) == 1


def envelope_with(records: RecordDict, **changes: object) -> RecordDict:
    return RecordDict({**records, "envelope": ConfigRecord({**dict(records["envelope"]), **changes})})


def replay() -> Reply:
    """The first answer, given again and again."""
    kept: list[RecordDict] = []

    def answer(daemon: Daemon, message: Message) -> Message:
        kept.append(daemon.answer(message))
        return Message(kept[0], reply_to=message)

    return answer


def with_bytes(records: RecordDict) -> RecordDict:
    arrays = bytearray(records["envelope"]["arrays"])
    arrays[-1] ^= 1
    return envelope_with(records, arrays=bytes(arrays))


FOREIGN = Ed25519PrivateKey.from_private_bytes(b"f" * 32)
LIES: dict[str, tuple[Reply, str]] = {
    "forged": (lambda daemon, message: Message(daemon.answer(message, signer=FOREIGN), reply_to=message), "E107"),
    "signed by the coordinator": (lambda daemon, message: Message(daemon.answer(message, signer=daemon.coordinator), reply_to=message), "E107"),
    "unsigned": (lambda daemon, message: Message(encode(Stopped(name=daemon.name), parameters=UPDATE), reply_to=message), "E102"),
    "altered text": (lambda daemon, message: Message(envelope_with(daemon.answer(message), text=TEXT), reply_to=message), "E107"),
    "altered arrays": (lambda daemon, message: Message(with_bytes(daemon.answer(message)), reply_to=message), "E107"),
    "the question itself": (lambda daemon, message: Message(message.content, reply_to=message), "E107"),
    "junk": (lambda daemon, message: Message(RecordDict({TEXT: ConfigRecord({TEXT: TEXT})}), reply_to=message), "E102"),
    "nothing": (lambda daemon, message: Message(RecordDict(), reply_to=message), "E102"),
    "an error": (lambda daemon, message: Message(Error(code=2, reason=TEXT), reply_to=message), "E101"),
    "undeclared arrays": (
        lambda daemon, message: Message(
            daemon.answer(message, record=RecordDict({**encode(Stopped(name="x")), TEXT * 100: encode(Stopped(name="x"), parameters=UPDATE)[PARAMETERS]})),
            reply_to=message,
        ),
        "E102",
    ),
    "a packed array beside one in the envelope": (
        lambda daemon, message: Message(
            RecordDict({**daemon.answer(message), "packed": ArrayRecord({"packed": Array("uint8", (1,), TEXT, b"x")})}), reply_to=message
        ),
        "E102",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_lie_is_refused_by_code_and_the_others_come_through(make_rig: Callable[..., Rig], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    lie, code = LIES[kind]
    rig = make_rig(north=lie)
    replies = rig.ask()
    assert set(replies) == set(SITES)
    assert replies["north"].has_error()
    assert failure_reason(replies["north"]).startswith(code)
    assert all(decode(replies[name].content, Stopped) for name in ("south", "west"))
    assert [(row["site"], row["reason"][:4]) for row in rig.rows("reply refused")] == [("north", code)]
    assert TEXT not in f"{replies['north'].error}{rig.audit.path.read_text()}{caplog.text}"


def test_a_replayed_answer_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(north=replay())
    assert not rig.ask("north")["north"].has_error()
    second = rig.ask("north")["north"]
    assert failure_reason(second).startswith("E107")


def test_another_site_s_answer_is_none_of_this_site_s(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    south = rig.carrier.daemons[SITES["south"]]
    rig.carrier.replies["north"] = lambda daemon, message: Message(daemon.answer(message, signer=south.signer), reply_to=message)
    replies = rig.ask()
    assert [name for name, reply in replies.items() if reply.has_error()] == ["north"]


# The roster -------------------------------------------------------------------------------------------------------------------------


def test_nobody_but_the_roster_s_sites_is_a_node(make_rig: Callable[..., Rig]) -> None:
    assert list(make_rig().grid.get_node_ids()) == list(SITES.values())


def test_a_site_that_is_revoked_is_asked_nothing(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    take_away(rig, "north")
    assert list(rig.grid.get_node_ids()) == [SITES["south"], SITES["west"]]
    replies = rig.ask()
    assert failure_reason(replies["north"]).startswith("E401")
    assert "north" not in {row["site"] for row in rig.rows("task sent")}


def take_away(rig: Rig, name: str) -> None:
    with opened(rig.out, federation(sites=SITES)) as consortium:
        revoke(consortium, name)


def test_a_site_that_is_revoked_between_question_and_answer_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()

    def revoked(daemon: Daemon, message: Message) -> Message | None:
        take_away(rig, "north")
        return honest(daemon, message)

    rig.carrier.replies["north"] = revoked
    replies = rig.ask("north")
    assert failure_reason(replies["north"]).startswith("E401")
    assert [row["site"] for row in rig.rows("reply refused")] == ["north"]


def test_an_altered_roster_lets_no_answer_through(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    path = rig.out / "coordinator" / ROSTER

    def spoil(daemon: Daemon, message: Message) -> Message | None:
        path.write_bytes(path.read_bytes().replace(b'"north"', b'"south"', 1))
        return honest(daemon, message)

    rig.carrier.replies["north"] = spoil
    with pytest.raises(KitError):
        rig.ask("north")
    assert rig.rows("reply received") == []


# Time -----------------------------------------------------------------------------------------------------------------------------------


def test_who_does_not_answer_is_not_waited_for_beyond_the_deadline(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sealed_grid, "POLL_SECONDS", 0.01)
    rig = make_rig(north=lambda daemon, message: None)
    assert set(rig.ask(timeout=0.2)) == {"south", "west"}
    rig.carrier.replies.clear()
    late = rig.ask("south")  # what north would have said by now is lost, not taken for an answer to this
    assert set(late) == {"south"}


def test_each_answer_comes_as_soon_as_it_is_there(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sealed_grid, "POLL_SECONDS", 0.01)
    ready = threading.Event()
    rig = make_rig(north=lambda daemon, message: honest(daemon, message) if ready.is_set() else None)
    replies = rig.asking()
    first = {rig.roster.name_of(next(replies).metadata.src_node_id) for _ in range(2)}
    assert first == {"south", "west"}
    ready.set()
    assert rig.roster.name_of(next(replies).metadata.src_node_id) == "north"
    assert list(replies) == []


def test_an_answer_is_taken_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    pull = rig.carrier.pull_messages
    rig.carrier.pull_messages = lambda ids: [reply for found in pull(ids) for reply in (found, found)]  # type: ignore[method-assign,misc]
    assert len(list(rig.asking())) == 3


def test_a_stop_ends_the_wait(make_rig: Callable[..., Rig]) -> None:
    stopped: list[bool] = []

    def stop(daemon: Daemon, message: Message) -> Message | None:
        stopped.append(True)
        return None

    rig = make_rig(lambda: bool(stopped), north=stop)
    with pytest.raises(StudyStoppedError):
        rig.ask("north", timeout=None)
    record = encode(StopTask(run="r", study_hash="h"))
    told = [*rig.grid.until([Message(record, SITES["south"], "query")], seconds=5.0)]  # the sites are told of it all the same
    assert decode(told[0].content, Stopped).name == "south"


def test_what_could_not_be_handed_over_is_a_failure_at_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.carrier.refuses_to_send = {SITES["north"]}
    replies = rig.ask()
    assert failure_reason(replies["north"]).startswith("E101")
    assert not replies["south"].has_error()


def offline(daemon: Daemon, message: Message) -> Message:
    return Message(Error(code=5, reason=TEXT), reply_to=message)  # flwr's ErrorCode.NODE_UNAVAILABLE


def test_a_site_that_is_offline_for_a_moment_is_asked_again_as_soon_as_it_is_back(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("POLL_SECONDS", 0.001), ("LOOK_SECONDS", 0.001), ("RETURN_SECONDS", 60.0)):
        monkeypatch.setattr(server.sealed_grid, name, seconds)
    rig, looks = make_rig(north=offline), 0

    def online() -> list[int]:
        nonlocal looks
        looks += 1
        if looks == 3:
            rig.carrier.replies.clear()
        return [*SITES.values()] if looks >= 3 else [SITES["south"], SITES["west"]]

    rig.carrier.get_node_ids = online  # type: ignore[method-assign]
    replies = rig.ask(timeout=30.0)
    assert looks == 3 and not any(reply.has_error() for reply in replies.values()) and set(replies) == set(SITES)
    assert [row["site"] for row in rig.rows("task sent")] == [*SITES, "north"]  # it alone was asked again


def test_a_site_that_stays_offline_is_given_up_and_not_waited_for_a_second_time(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("POLL_SECONDS", 0.001), ("LOOK_SECONDS", 0.001), ("RETURN_SECONDS", 0.05)):
        monkeypatch.setattr(server.sealed_grid, name, seconds)
    rig = make_rig(north=offline)
    rig.carrier.get_node_ids = lambda: [SITES["south"], SITES["west"]]  # type: ignore[method-assign]
    assert failure_reason(rig.ask(timeout=None)["north"]).startswith("E400")
    monkeypatch.setattr(server.sealed_grid, "LOOK_SECONDS", 3600.0)  # whoever waited now would wait for ever
    replies = rig.ask(timeout=None)
    assert failure_reason(replies["north"]).startswith("E400") and not replies["south"].has_error()
    assert TEXT not in f"{replies['north'].error}{rig.audit.path.read_text()}"


def test_answers_arrive_as_they_come_each_opened_against_its_own_task(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """North is slow: others are asked a second time meanwhile, and its answer to the first question is one to that question."""
    monkeypatch.setattr(server.sealed_grid, "POLL_SECONDS", 0.001)
    slow = [True]
    rig = make_rig(north=lambda daemon, message: None if slow else honest(daemon, message))

    def ask(number: int, *names: str) -> None:
        record = encode(TrainTask(run="r", study_hash="h", round=number, fold=1), parameters=UPDATE)
        rig.grid.ask([Message(record, SITES[name], "train", group_id=str(number)) for name in names], seconds=60.0)

    def arrived(count: int) -> list[tuple[str, str]]:
        found = itertools.islice(rig.grid.arrivals(), count)
        return [(rig.roster.name_of(reply.metadata.src_node_id), reply.metadata.group_id) for reply in found if not reply.has_error()]

    ask(1, *SITES)
    assert arrived(2) == [("south", "1"), ("west", "1")]
    assert set(rig.grid.at_work()) == {SITES["north"]}
    ask(2, "south", "west")
    assert arrived(1) == [("south", "2")]
    slow.clear()
    assert sorted(arrived(9)) == [("north", "1"), ("west", "2")]
    assert rig.grid.at_work() == {} and list(rig.grid.arrivals()) == []
    rows = [(row["site"], row["round"]) for row in rig.rows("reply received")]
    assert rows[:3] == [("south", 1), ("west", 1), ("south", 2)] and sorted(rows[3:]) == [("north", 1), ("west", 2)]


def test_an_answer_to_an_earlier_task_does_not_pass_for_one_to_a_later(make_rig: Callable[..., Rig]) -> None:
    first: list[Message] = []

    def old(daemon: Daemon, message: Message) -> Message | None:
        first.append(message)
        return Message(daemon.answer(first[0]), reply_to=message)

    rig = make_rig(north=old)
    for number, refused in ((1, False), (2, True)):
        record = encode(TrainTask(run="r", study_hash="h", round=number, fold=1), parameters=UPDATE)
        rig.grid.ask([Message(record, SITES["north"], "train")], seconds=60.0)
        [reply] = rig.grid.arrivals()
        assert reply.has_error() == refused
    assert failure_reason(reply) == fixed_sentence(SealError)


def test_a_question_is_open_until_its_own_deadline_a_stop_or_its_dismissal(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sealed_grid, "POLL_SECONDS", 0.001)
    stopped: list[bool] = []
    rig = make_rig(lambda: bool(stopped), **dict.fromkeys(SITES, lambda daemon, message: None))
    record = encode(TrainTask(run="r", study_hash="h", round=1, fold=1), parameters=UPDATE)
    rig.grid.ask([Message(record, SITES["north"], "train")], seconds=0.01)
    assert list(rig.grid.arrivals()) == [] == list(rig.grid.at_work())
    rig.grid.ask([Message(record, SITES["south"], "train")], seconds=3600.0)
    stopped.append(True)
    with pytest.raises(StudyStoppedError):
        list(rig.grid.arrivals())
    assert set(rig.grid.at_work()) == {SITES["south"]}
    rig.grid.dismiss()
    assert rig.grid.at_work() == {} and list(rig.grid.arrivals()) == []


def test_push_and_pull_are_not_offered(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    for call in (rig.grid.push_messages, rig.grid.pull_messages):
        with pytest.raises(NotImplementedError):
            call([])


def test_a_reply_may_be_as_large_as_its_question_lets_expect(make_rig: Callable[..., Rig]) -> None:
    seen: list[Message] = []

    def note(daemon: Daemon, message: Message) -> Message | None:
        seen.append(message)
        return honest(daemon, message)

    rig, allowed = make_rig(**dict.fromkeys(SITES, note)), set()
    pull = rig.grid._pull

    def watched(message_ids: Iterable[str], *, most_bytes: int) -> Iterator[tuple[str, Message | ProtocolError | None]]:
        allowed.add(most_bytes)
        for answered, reply in pull(message_ids, most_bytes=most_bytes):
            yield answered, ProtocolError("too large") if answered == "message-1" else reply

    rig.grid._pull = watched  # type: ignore[method-assign]
    replies = rig.ask()
    assert failure_reason(replies["north"]) == fixed_sentence(ProtocolError)
    assert not any(replies[name].has_error() for name in ("south", "west"))
    sizes = {sum(len(message.content["envelope"][key]) for key in ("text", "arrays")) for message in seen}
    assert allowed == {REPLY_MULTIPLE * max(sizes) + REPLY_BYTES}


@pytest.mark.parametrize("seconds", [0.5, 3.0, 12.0, 60.0])
def test_the_last_look_is_just_before_the_deadline_however_long_was_waited(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """What came in time counts: a long pause does not reach over the deadline."""
    clock, pauses = [0.0], []

    def sleep(pause: float) -> None:
        pauses.append(pause)
        clock[0] += pause

    monkeypatch.setattr(server.sealed_grid, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    while clock[0] < seconds:
        looked = clock[0]
        server.sealed_grid._pause(0.0, until=seconds)
    assert seconds - looked <= 1.01 * server.sealed_grid.POLL_SECONDS
    assert min(pauses) >= server.sealed_grid.POLL_SECONDS and max(pauses) <= server.sealed_grid.LONGEST_POLL_SECONDS
