"""A reply made of objects that no honest site sends is a reply that cannot be read, and nothing more."""

import hashlib
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.app import client_app
from server.mailbox import Mailbox
from simulations.in_process import InProcessGrid

ABSENT = "ab" * 32


@pytest.fixture(autouse=True)
def run_of_flowers() -> None:
    """Flower's messages ask what run they are of; the in-process grid says."""
    InProcessGrid(client_app(lambda context: pytest.fail("nobody is asked")), ["north"])


def an_object(kind: str, body: bytes, children: tuple[str, ...] = ()) -> bytes:
    """As Flower writes one: type, ids of its parts, length, body."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


class Client:
    """Flower's runtime client, with one reply waiting: `objects` by id, the first of them the reply itself."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802  # Flower's name
        root, *others = self.objects
        head = message_to_proto(Message(RecordDict(), 7, MessageType.TRAIN))
        head.metadata.message_id, head.metadata.reply_to_message_id = root, "asked"
        tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=item) for item in others])
        return PullAppMessagesResponse(messages_list=[head], message_object_trees=[tree])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        return PullObjectResponse(object_found=True, object_available=True, object_content=self.objects[request.object_id])

    def ConfirmMessageReceived(self, request: object) -> ConfirmMessageReceivedResponse:  # noqa: N802
        return ConfirmMessageReceivedResponse()


def mailbox(objects: dict[str, bytes]) -> Mailbox:
    run = SimpleNamespace(run_id=1)
    return Mailbox(SimpleNamespace(_runtime_client=Client(objects), run=run, node=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        an_object("RecordDict", b""),
        an_object("Message", b"\xff\xff\xff"),
        an_object("Message", b"", (ABSENT,)),
        an_object("Array", b"PK"),
        an_object("Nonsense", b"x"),
        b"\0",
        b"",
    ],
)
def test_objects_that_make_no_message_are_a_reply_that_cannot_come(content: bytes) -> None:
    found = list(mailbox({hashlib.sha256(content).hexdigest(): content}).pull(["asked"]))
    assert found == [("asked", None)]


def test_an_honest_reply_comes_through() -> None:
    message = Message(RecordDict({"a": ConfigRecord({"b": 3})}), 7, MessageType.TRAIN)
    parts = get_all_nested_objects(message)
    objects = {message.object_id: message.deflate()} | {key: value.deflate() for key, value in parts.items() if key != message.object_id}
    [(answered, reply)] = mailbox(objects).pull(["asked"])
    assert answered == "asked" and reply is not None
    assert reply.content["a"] == ConfigRecord({"b": 3})
