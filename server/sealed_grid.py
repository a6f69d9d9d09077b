"""A grid whose messages are sealed: every task is signed for one site, and only that site's answer to it comes through.

Replies are pulled one by one and handed on before the next is pulled, so a round's memory does not grow with the sites. Nothing of a foreign
error text passes: a reply that failed is replaced by one of our own with a code.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from server.arrivals import NOT_BEGUN, AtWork
from server.live_roster import LiveRoster, public_key
from server.mailbox import Mailbox
from shared.audit import AuditLog, Value
from shared.errors import ConnectionFailedError, NodeRefusedError, ProtocolError, SiteFailedError, StudyStoppedError, WardroundError, fixed_sentence
from shared.messages import JSON, MESSAGE
from shared.pausing import next_pause
from shared.seals import SealedTask, open_reply, packed_message, seal_task

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.1, 1.0
FIRST_PAUSE_SECONDS = 10.0  # before a task is asked again; doubled each time
FAILED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION
ASTRAY = (3, 4, 5)  # flwr's ErrorCode: question or reply is gone, or the node is offline; none of them says anything of the site's work
RETURN_SECONDS = 15.0  # that a site may be offline: heartbeats come every 7 to 10 s, and where the coordinator was away, none was heard
LOOK_SECONDS = 1.0  # how often it is then looked for
NO_DEADLINE = 3600.0
REPLY_MULTIPLE, REPLY_BYTES = 2, 16 * 2**20  # of the question's bytes, and so many more: an update is as large as its model, statistics are few
GRACE_SECONDS = 60.0  # a message lives on for this long beyond its deadline, in Flower's books

OFFLINE = "it is offline"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    message: Message
    task: SealedTask
    most_bytes: int  # of a reply


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asking:
    """Sites that were asked together and one after another are waited for: who has not answered, and the steps of asking and looking."""

    began: int  # time.monotonic_ns()
    until: float  # time.monotonic()
    unanswered: dict[int, Message]
    steps: Iterator[Message | None]


class SealedGrid(Grid):
    """Flower's grid with seals, an audit log, and no site that the roster does not know.

    Args:
        grid: what carries the messages.
        stopped: asked often; True ends every wait with `StudyStoppedError`.
        mailbox: how replies are pulled; None: by the grid itself.
    """

    def __init__(
        self,
        grid: Grid,
        roster: LiveRoster,
        *,
        signer: Ed25519PrivateKey,
        audit: AuditLog,
        stopped: Callable[[], bool] = lambda: False,
        mailbox: Mailbox | None = None,
    ) -> None:
        self._grid = grid
        self._pull = self._pull_all if mailbox is None else mailbox.pull
        self._roster = roster
        self._signer = signer
        self._audit = audit
        self._stopped = stopped
        self._offline: dict[int, float] = {}  # by node: since when, by time.monotonic()
        self._askings: list[_Asking] = []

    def set_run(self, run: Run) -> None:
        """Flower's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's run."""
        return self._grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message as the current API makes it."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online and may take part now.

        Raises:
            StudyStoppedError: somebody stopped the study.
        """
        self._check_stopped()
        return [node_id for node_id in self._online() if self._roster.site_of(node_id) is not None]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: a reply can only be opened by who remembers its task."""
        raise NotImplementedError("a sealed grid sends and receives")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered, as `push_messages`."""
        raise NotImplementedError("a sealed grid sends and receives")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The reply of each site as soon as it is there, until `timeout` seconds have passed; what comes later is lost.

        Raises:
            StudyStoppedError: somebody stopped the study.
        """
        return self._exchange(messages, NO_DEADLINE if timeout is None else timeout, self._check_stopped)

    def until(self, messages: Iterable[Message], *, seconds: float) -> Iterator[Message]:
        """As `send_and_receive`, also once the study was stopped."""
        return self._exchange(messages, seconds, lambda: None)

    def ask(self, messages: Iterable[Message], *, seconds: float, begun: Mapping[int, int] = NOT_BEGUN) -> None:
        """Ask these sites; see `server.arrivals`. For how long one has been at work already, it knows itself."""
        unanswered = {message.metadata.dst_node_id: message for message in messages}
        steps = self._steps(unanswered, seconds, self._check_stopped)
        self._askings.append(_Asking(began=time.monotonic_ns(), until=time.monotonic() + seconds, unanswered=unanswered, steps=steps))

    def arrivals(self) -> Iterator[Message]:
        """The answers as they come, until no question is open.

        Raises:
            StudyStoppedError: somebody stopped the study.
        """
        last = time.monotonic()
        while self._askings:
            idle = True
            for asking in list(self._askings):
                step = list(itertools.islice(asking.steps, 1))
                if not step:
                    self._askings.remove(asking)
                idle = idle and step == [None]
                if step and step[0] is not None:
                    yield step.pop()  # type: ignore[misc]  # no None: as in the mailbox, nothing of a reply is kept here
            if not idle:
                last = time.monotonic()
            else:
                _pause(last, until=min(asking.until for asking in self._askings))

    def at_work(self) -> dict[int, AtWork]:
        """The open questions, by node."""
        now = time.monotonic_ns()
        return {
            node_id: AtWork(message=message, nanoseconds=now - asking.began)
            for asking in self._askings
            for node_id, message in asking.unanswered.items()
        }  # fmt: skip

    def dismiss(self) -> None:
        """No question of `ask` is open any more; what still comes is lost."""
        self._askings.clear()

    def _exchange(self, messages: Iterable[Message], seconds: float, check: Callable[[], None]) -> Iterator[Message]:
        """The replies, with a pause wherever there is none."""
        steps, last = self._steps({message.metadata.dst_node_id: message for message in messages}, seconds, check), time.monotonic()
        until = last + seconds
        for step in steps:
            if step is None:
                _pause(last, until=until)
                continue
            last, found = time.monotonic(), [step]
            del step
            yield found.pop()  # as in the mailbox: nothing of a reply is kept here

    def _steps(self, unanswered: dict[int, Message], seconds: float, check: Callable[[], None]) -> Iterator[Message | None]:
        """The replies; None where there is none yet. Who answered, or is given up, is taken out of `unanswered`.

        A task that is not answered is asked again, ever less often: a message may be lost, and the same task asked twice is one piece of work.

        A site that goes offline is asked again as soon as it is back, and given up where it is not so within `RETURN_SECONDS`.
        """
        started = time.monotonic()
        waiting: dict[str, _Sent] = {}
        until: dict[int, float] = {}  # by node whose task went astray: when it is given up
        astray: set[int] = set()  # those of them that were not asked again yet
        pause, ask_at, look_at = FIRST_PAUSE_SECONDS, started, started
        while unanswered and (left := started + seconds - time.monotonic()) > 0:
            check()
            now = time.monotonic()
            if now >= ask_at or (astray and now >= look_at):
                online = set(self._online()) if waiting or astray else set(unanswered)
                due = unanswered.keys() if now >= ask_at else astray
                sent, failed = self._push([message for node_id, message in unanswered.items() if node_id in online & due], left)
                waiting |= sent
                gone = [node_id for node_id in astray - online if now >= until[node_id]]
                for reply in [*failed, *(self._failure(unanswered[node_id], ConnectionFailedError(OFFLINE)) for node_id in gone)]:
                    del unanswered[reply.metadata.src_node_id]
                    yield reply
                astray = (astray - online) & unanswered.keys()
                pause, ask_at = (2 * pause, now + pause) if now >= ask_at else (pause, ask_at)
                look_at = now + LOOK_SECONDS
            before = len(unanswered)
            for message_id, answer in self._pull(list(waiting), most_bytes=max((sent.most_bytes for sent in waiting.values()), default=0)):
                node_id = waiting[message_id].message.metadata.dst_node_id
                if node_id in unanswered and _went_astray(answer) and now < until.setdefault(node_id, self._return_of(node_id, now)):
                    astray.add(node_id)
                    del waiting[message_id]
                    continue
                opened = [self._open(answer, waiting[message_id])] if unanswered.pop(node_id, None) is not None else []
                del answer
                if opened:
                    yield opened.pop()  # as in the mailbox: nothing of a reply is kept here
            waiting = {key: sent for key, sent in waiting.items() if sent.message.metadata.dst_node_id in unanswered}
            astray &= unanswered.keys()
            if len(unanswered) == before:
                yield None

    def _online(self) -> list[int]:
        """The nodes that the SuperLink takes for online."""
        online = list(self._grid.get_node_ids())
        for node_id in online:
            self._offline.pop(node_id, None)
        return online

    def _return_of(self, node_id: int, now: float) -> float:
        """Until when a node that is offline is waited for; once it was for so long, and has not come back since, not at all, and so it is for who is revoked."""
        if self._roster.site_of(node_id) is None:
            return now
        return self._offline.setdefault(node_id, now) + RETURN_SECONDS

    def _push(self, messages: list[Message], seconds: float) -> tuple[dict[str, _Sent], list[Message]]:
        """Seal and send them: what is waited for, by message id, and failures in the place of those that could not be sent."""
        sent, failed, last = [], [], None
        for message in messages:
            site = self._roster.site_of(message.metadata.dst_node_id)
            if site is None:
                failed.append(self._failure(message, NodeRefusedError("not on the roster, revoked or expired")))
                continue
            packed = packed_message(message.content, like=last)  # a round's messages share their arrays
            last = message.content, packed
            content, task = seal_task(packed, site=site.name, seconds=max(1.0, seconds), signer=self._signer, audit_head=self._audit.head)
            metadata = message.metadata
            sealed = Message(content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id, ttl=seconds + GRACE_SECONDS)
            self._audit.append("task sent", {"site": site.name, "nonce": task.nonce, "content": task.content, **_asked(message.content)})
            most_bytes = REPLY_MULTIPLE * (len(packed.text) + len(packed.arrays)) + REPLY_BYTES
            sent.append((sealed, _Sent(message=message, task=task, most_bytes=most_bytes)))
        ids = self._grid.push_messages([sealed for sealed, _ in sent]) if sent else []
        waiting = {}
        for message_id, (_, item) in zip(ids, sent, strict=True):
            if message_id is None:
                failed.append(self._failure(item.message, SiteFailedError("could not be handed over")))
            else:
                waiting[message_id] = item
        return waiting, failed

    def _pull_all(self, message_ids: Iterable[str], *, most_bytes: int) -> Iterator[tuple[str, Message | ProtocolError | None]]:
        """As a `Mailbox`, from any grid; it holds back nothing."""
        for reply in self._grid.pull_messages(message_ids):
            yield reply.metadata.reply_to_message_id, reply

    def _open(self, reply: Message | ProtocolError | None, sent: _Sent) -> Message:
        """The reply without its seal, from the node that was asked; a failure in its place where it is not that site's answer."""
        site = self._roster.site_of(sent.message.metadata.dst_node_id)
        try:
            if site is None:
                raise NodeRefusedError("revoked or expired meanwhile")
            if isinstance(reply, ProtocolError):
                raise reply
            if _went_astray(reply):
                raise ConnectionFailedError(OFFLINE)
            if reply is None or reply.has_error():
                raise SiteFailedError("the site's courier could not answer")
            opened = open_reply(reply.content, sent.task, site_key=public_key(site))
        except WardroundError as error:
            return self._failure(sent.message, error)
        except Exception:  # the border of the coordinator: bytes that break their reader cost this site its round, and nobody else anything
            logger.warning("site %s: its reply could not be read", sent.task.site, exc_info=logger.isEnabledFor(logging.DEBUG))
            return self._failure(sent.message, ProtocolError("could not be read"))
        details: dict[str, Value] = {"site": site.name, "nonce": sent.task.nonce, "content": opened.content, "audit_head": opened.audit_head}
        self._audit.append("reply received", {**_asked(sent.message.content), **details, **_sizes(opened.record)})
        return self._reply(opened.record, sent.message)

    def _failure(self, message: Message, error: WardroundError) -> Message:
        reason = fixed_sentence(type(error))
        name = self._roster.name_of(message.metadata.dst_node_id)
        logger.warning("site %s: %s (%s)", name, reason, error.what)
        self._audit.append("reply refused", {"site": name, "outcome": "refused", "reason": reason})
        return self._reply(Error(code=FAILED, reason=reason), message)

    @staticmethod
    def _reply(content: RecordDict | Error, message: Message) -> Message:
        return Message(content, reply_to=message)

    def _check_stopped(self) -> None:
        if self._stopped():
            raise StudyStoppedError("the study was stopped", "go on with 'wardround study resume RUN'")


def _pause(since: float, *, until: float) -> None:
    """Until the next look; the last one is `POLL_SECONDS` before the deadline `until`, for what came in time counts."""
    now = time.monotonic()
    pause = next_pause(now - since, shortest=POLL_SECONDS, longest=LONGEST_POLL_SECONDS)
    time.sleep(max(POLL_SECONDS, min(pause, until - POLL_SECONDS - now)))


def _went_astray(reply: object) -> bool:
    """Whether this is Flower's own word that question or reply did not arrive."""
    return isinstance(reply, Message) and reply.has_error() and reply.error.code in ASTRAY


def _asked(content: RecordDict) -> dict[str, Value]:
    """What the audit log says of a task of our own: which, and how many bytes of arrays."""
    message = content[MESSAGE]
    assert isinstance(message, ConfigRecord)
    fields = json.loads(str(message[JSON]))
    return {name: fields[name] for name in ("kind", "run", "study_hash", "round", "fold") if name in fields} | _sizes(content)


def _sizes(content: RecordDict) -> dict[str, Value]:
    arrays = {part: value for part, value in content.items() if isinstance(value, ArrayRecord)}
    return {f"{part}_bytes": sum(len(array.data) for array in value.values()) for part, value in arrays.items()}
