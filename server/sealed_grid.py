"""A grid whose messages are sealed: every task is signed for one site, and only that site's answer to it comes through.

Replies are pulled one by one and handed on before the next is pulled, so a round's memory does not grow with the sites. Nothing of a foreign
error text passes: a reply that failed is replaced by one of our own with a code.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from server.live_roster import LiveRoster, public_key
from shared.audit import AuditLog, Value
from shared.errors import NodeRefusedError, ProtocolError, SiteFailedError, StudyStoppedError, WardroundError, fixed_sentence
from shared.messages import JSON, MESSAGE
from shared.seals import SealedTask, arrays_digest, content_digest, open_reply, seal_task

POLL_SECONDS = 0.1
FAILED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NO_DEADLINE = 3600.0
GRACE_SECONDS = 60.0  # a message lives on for this long beyond its deadline, in Flower's books

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    message: Message
    task: SealedTask


class SealedGrid(Grid):
    """Flower's grid with seals, an audit log, and no site that the roster does not know.

    Args:
        grid: what carries the messages.
        stopped: asked often; True ends every wait with `StudyStoppedError`.
    """

    def __init__(
        self, grid: Grid, roster: LiveRoster, *, signer: Ed25519PrivateKey, audit: AuditLog, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._grid = grid
        self._roster = roster
        self._signer = signer
        self._audit = audit
        self._stopped = stopped

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
        """The nodes that are online and may take part now."""
        return [node_id for node_id in self._grid.get_node_ids() if self._roster.site_of(node_id) is not None]

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
        seconds = NO_DEADLINE if timeout is None else timeout
        deadline = time.monotonic() + seconds
        waiting: dict[str, _Sent] = {}
        for sent in self._push(messages, seconds):
            if isinstance(sent, Message):
                yield sent
            else:
                waiting[sent.message.metadata.message_id] = sent
        while waiting and time.monotonic() < deadline:
            self._check_stopped()
            before = len(waiting)
            for message_id in list(waiting):
                for reply in self._grid.pull_messages([message_id]):
                    yield self._open(reply, waiting.pop(message_id))
                    del reply
            if len(waiting) == before:
                time.sleep(POLL_SECONDS)

    def _push(self, messages: Iterable[Message], seconds: float) -> Iterator[_Sent | Message]:
        digests: dict[int, bytes] = {}

        def digest(arrays: ArrayRecord) -> bytes:
            if id(arrays) not in digests:
                digests[id(arrays)] = arrays_digest(arrays)
            return digests[id(arrays)]

        for message in messages:
            node_id = message.metadata.dst_node_id
            site = self._roster.site_of(node_id)
            if site is None:
                yield self._failure(message, NodeRefusedError("not on the roster, revoked or expired"))
                continue
            content, task = seal_task(
                message.content, site=site.name, seconds=max(1.0, seconds), signer=self._signer, audit_head=self._audit.head, digest=digest
            )
            sealed = Message(content, node_id, message.metadata.message_type, group_id=message.metadata.group_id, ttl=seconds + GRACE_SECONDS)
            self._audit.append("task sent", {"site": site.name, "nonce": task.nonce, "content": task.content, **_asked(message.content)})
            [message_id] = self._grid.push_messages([sealed])
            if message_id is None:
                yield self._failure(message, SiteFailedError("could not be handed over"))
                continue
            sealed.metadata.__dict__["_message_id"] = message_id
            yield _Sent(message=sealed, task=task)

    def _open(self, reply: Message, sent: _Sent) -> Message:
        """The reply without its seal, from the node that was asked; a failure in its place where it is not that site's answer."""
        site = self._roster.site_of(sent.message.metadata.dst_node_id)
        try:
            if site is None:
                raise NodeRefusedError("revoked or expired meanwhile")
            if reply.has_error():
                raise SiteFailedError("the site's courier could not answer")
            content, seal = open_reply(reply.content, sent.task, site_key=public_key(site))
        except WardroundError as error:
            return self._failure(sent.message, error)
        except Exception:  # the border of the coordinator: bytes that break their reader cost this site its round, and nobody else anything
            logger.warning("site %s: its reply could not be read", sent.task.site, exc_info=logger.isEnabledFor(logging.DEBUG))
            return self._failure(sent.message, ProtocolError("could not be read"))
        details: dict[str, Value] = {"site": site.name, "nonce": sent.task.nonce, "content": content_digest(content), "audit_head": seal.audit_head}
        self._audit.append("reply received", {**_asked(sent.message.content), **details, **_sizes(content)})
        return Message(content, reply_to=sent.message)

    def _failure(self, message: Message, error: WardroundError) -> Message:
        reason = fixed_sentence(type(error))
        name = self._roster.name_of(message.metadata.dst_node_id)
        logger.warning("site %s: %s (%s)", name, reason, error.what)
        self._audit.append("reply refused", {"site": name, "outcome": "refused", "reason": reason})
        return Message(Error(code=FAILED, reason=reason), reply_to=message)

    def _check_stopped(self) -> None:
        if self._stopped():
            raise StudyStoppedError("the study was stopped", "go on with 'wardround study resume RUN'")


def _asked(content: RecordDict) -> dict[str, Value]:
    """What the audit log says of a task of our own: which, and how many bytes of arrays."""
    message = content[MESSAGE]
    assert isinstance(message, ConfigRecord)
    fields = json.loads(str(message[JSON]))
    return {name: fields[name] for name in ("kind", "run", "study_hash", "round", "fold") if name in fields} | _sizes(content)


def _sizes(content: RecordDict) -> dict[str, Value]:
    arrays = {part: value for part, value in content.items() if isinstance(value, ArrayRecord)}
    return {f"{part}_bytes": sum(len(array.data) for array in value.values()) for part, value in arrays.items()}
