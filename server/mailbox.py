"""The replies to a run's messages, each as soon as it is whole.

Flower's own grid hands a reply over when its upload has begun, and then waits up to two hours for the rest, and everybody with it. Here an
upload that does not end holds up nobody: it is looked at again at the next pull. Replies are handed on one by one, so that memory holds
one. A reply of more objects or bytes than its question allows is refused as soon as its head is there, and deleted: what is under way of it is then
not taken any more. Private parts of flwr's `HttpGrid` are touched here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from shared.envelope import MAX_MESSAGE_BYTES, most_objects
from shared.errors import ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coming:
    """A reply of which the head is there; `objects` are the ids of its parts, in the order in which they are sent."""

    message_id: str
    objects: tuple[str, ...]


class Mailbox:
    """The replies that come through `grid`."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._coming: dict[str, _Coming] = {}  # by the id of the message that is answered

    def pull(self, message_ids: Iterable[str], *, most_bytes: int = MAX_MESSAGE_BYTES) -> Iterator[tuple[str, Message | ProtocolError | None]]:
        """The id of each of these messages whose reply is there, with the reply; None where it cannot come any more.

        A `ProtocolError` in its place where it is larger than `most_bytes`.
        """
        wanted = list(message_ids)
        client = self._grid._runtime_client
        response = client.PullMessages(PullAppMessagesRequest(message_ids=[item for item in wanted if item not in self._coming]))
        for head, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            objects = tuple(item.object_id for item in iterate_object_tree(tree))
            self._coming[head.metadata.reply_to_message_id] = _Coming(message_id=head.metadata.message_id, objects=objects)
        for answered in [item for item in wanted if item in self._coming]:
            reply: Message | ProtocolError | None
            try:
                reply = self._whole(self._coming[answered], most_bytes)
            except ObjectUnavailableError:
                continue
            except (ObjectPullError, ProtocolError) as error:
                self._confirm(self._coming[answered])
                reply = error if isinstance(error, ProtocolError) else None
            del self._coming[answered]
            found = [(answered, reply)]
            del reply
            yield found.pop()  # who takes it holds the only reference: the next reply may need the room

    def _confirm(self, coming: _Coming) -> None:
        """The SuperLink may delete the reply, or what is there of it."""
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=coming.message_id)
        self._grid._runtime_client.ConfirmMessageReceived(request)

    def _whole(self, coming: _Coming, most_bytes: int) -> Message:
        """The reply; the last part is looked for first, so that an upload under way costs one question."""
        if len(coming.objects) > most_objects(most_bytes):
            raise ProtocolError(f"expected a reply of at most {most_bytes} bytes, got {len(coming.objects)} objects")
        pull = make_pull_object_fn_protobuf(self._grid._runtime_client.PullObject, self._grid.node, self._grid.run.run_id)
        contents, left = {}, most_bytes
        for object_id in reversed(coming.objects):
            contents[object_id] = pull(object_id)
            left -= len(contents[object_id])
            if left < 0:
                raise ProtocolError(f"expected a reply of at most {most_bytes} bytes, got more")
        self._confirm(coming)
        try:
            message = inflate_object_from_contents(coming.message_id, contents)
        except Exception as error:  # the border of the coordinator: objects that break their reader cost their site its reply, and nothing more
            raise ObjectPullError(coming.message_id, type(error).__name__) from None
        if not isinstance(message, Message):
            raise ObjectPullError(coming.message_id, "another object in a message's place")
        return message
