"""A reply made of objects that no honest site sends is a reply that cannot be read, and nothing more."""

import hashlib
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ConfirmMessageReceivedResponse, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.app import client_app
from server.mailbox import Mailbox
from shared.envelope import CHUNK_BYTES, most_objects
from shared.errors import ProtocolError
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
        self.pulled: list[str] = []
        self.deleted: list[str] = []

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802  # Flower's name
        root, *others = self.objects
        head = message_to_proto(Message(RecordDict(), 7, MessageType.TRAIN))
        head.metadata.message_id, head.metadata.reply_to_message_id = root, "asked"
        tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=item) for item in others])
        return PullAppMessagesResponse(messages_list=[head], message_object_trees=[tree])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        self.pulled.append(request.object_id)
        return PullObjectResponse(object_found=True, object_available=True, object_content=self.objects[request.object_id])

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> ConfirmMessageReceivedResponse:  # noqa: N802
        self.deleted.append(request.message_object_id)
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


def parts(count: int, size: int) -> dict[str, bytes]:
    """A reply of so many objects of so many bytes."""
    contents = [an_object("ArrayChunk", number.to_bytes(4, "big") + bytes(size - 4)) for number in range(count)]
    return {hashlib.sha256(content).hexdigest(): content for content in contents}


def test_a_reply_of_more_objects_than_its_question_allows_is_refused_before_any_is_fetched_and_deleted() -> None:
    box = mailbox(parts(most_objects(1000) + 1, 8))
    client = box._grid._runtime_client
    [(answered, refusal)] = box.pull(["asked"], most_bytes=1000)
    assert answered == "asked" and isinstance(refusal, ProtocolError)
    assert client.pulled == []
    assert client.deleted == [next(iter(client.objects))]


def test_a_reply_of_more_bytes_than_its_question_allows_is_not_fetched_to_its_end() -> None:
    box = mailbox(parts(10, 1000))
    client = box._grid._runtime_client
    [(answered, refusal)] = box.pull(["asked"], most_bytes=2500)
    assert answered == "asked" and isinstance(refusal, ProtocolError)
    assert len(client.pulled) == 3
    assert client.deleted == [next(iter(client.objects))]


def test_an_honest_reply_is_of_as_many_objects_as_its_bytes_need() -> None:
    """Flower's own cut of an array into chunks, as a courier sends it."""
    size = 2 * CHUNK_BYTES + 1
    packed = Array(dtype="uint8", shape=(size,), stype="packed", data=bytes(size))
    content = RecordDict({"envelope": ConfigRecord({"text": "t"}), "packed": ArrayRecord({"packed": packed})})
    assert len(get_all_nested_objects(Message(content, 7, MessageType.TRAIN))) <= most_objects(size)
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == CHUNK_BYTES
