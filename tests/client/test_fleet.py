"""A message that cannot be had costs the courier that message, and not its connection."""

import ssl
import threading
from collections.abc import Callable

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

import client.fleet
from client.app import client_app
from client.courier import Carrier
from client.door import NO_ANSWER
from client.fleet import Fleet, Received
from shared.certificates import new_node_key
from shared.errors import ConnectionFailedError, NodeRefusedError
from simulations.in_process import InProcessGrid

Pull = Callable[[PullObjectRequest], PullObjectResponse]


def http_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://localhost/v1/fleet/pull-object")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def run_has_ended(request: PullObjectRequest) -> PullObjectResponse:
    raise http_error(409)


PULLS: dict[str, Pull] = {
    "its run has ended": run_has_ended,
    "an object is gone": lambda request: PullObjectResponse(object_found=False),
    "an object is no message": lambda request: PullObjectResponse(object_found=True, object_available=True, object_content=b"RecordDict  0\0"),
    "an object is nothing": lambda request: PullObjectResponse(object_found=True, object_available=True, object_content=b""),
}


class Client:
    """Flower's Fleet client, with one message waiting."""

    def __init__(self, pull: Pull | None) -> None:
        self.PullObject = pull

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:  # noqa: N802  # Flower's name
        if self.PullObject is None:
            raise http_error(403)
        head = message_to_proto(Message(RecordDict(), 7, MessageType.TRAIN))
        head.metadata.message_id = "ab" * 32
        return PullMessagesResponse(messages_list=[head], message_object_trees=[ObjectTree(object_id="ab" * 32)])

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:  # noqa: N802
        raise http_error(503)

    def ConfirmMessageReceived(self, request: object) -> None: ...  # noqa: N802


def fleet(key: ec.EllipticCurvePrivateKey, pull: Pull | None) -> Fleet:
    InProcessGrid(client_app(lambda context: pytest.fail("nobody is asked")), ["north"])  # Flower's messages ask what run they are of
    made = Fleet("localhost:1", ssl.create_default_context(), key, stop=threading.Event())
    made._client.close()
    made._client, made._node = Client(pull), Node(node_id=7)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("what", PULLS)
def test_a_message_that_cannot_be_had_is_none(what: str) -> None:
    assert fleet(new_node_key(), PULLS[what]).receive() is None


def test_a_node_that_is_let_in_no_more_learns_of_it() -> None:
    with pytest.raises(NodeRefusedError, match="HTTP 403"):
        fleet(new_node_key(), None).receive()


def test_a_reply_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that is always too busy to take replies would hold a hand of the courier for each of them."""
    monkeypatch.setattr(client.fleet, "SEND_SECONDS", 0.0)
    held = fleet(new_node_key(), None)
    with pytest.raises(ConnectionFailedError, match="HTTP 503"):
        held.send(Message(RecordDict(), 7, MessageType.TRAIN), 1.0)


def test_a_reply_that_was_refused_under_way_is_said_and_not_sent_to_its_end() -> None:
    held = fleet(new_node_key(), None)
    pushed: list[PushObjectRequest] = []
    reply = Message(RecordDict({str(number): ConfigRecord({"a": bytes([number])}) for number in range(40)}), 7, MessageType.TRAIN)

    def take(request: PushMessagesRequest) -> PushMessagesResponse:
        wanted = [item.object_id for item in iterate_object_tree(request.message_object_trees[0])]
        return PushMessagesResponse(objects_to_push=wanted, session_id="s")

    held._client.PushMessages = take
    held._client.PushObject = lambda request: pushed.append(request) or PushObjectResponse(stored=len(pushed) < 3)  # type: ignore[func-returns-value]
    with pytest.raises(ConnectionFailedError, match="given up"):
        held.send(reply, 1.0)
    assert len(pushed) < 10


class Sending:
    """A fleet that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, reply: Message, seconds: float) -> None:
        self.sent.append(reply)


def test_a_question_that_was_let_go_gets_no_reply_not_even_an_error() -> None:
    fleet(new_node_key(), None)
    kept, answers = Sending(), iter([NO_ANSWER, b"", NO_ANSWER])
    carrier = Carrier(fleet=kept, ask=lambda question: next(answers), bundle="b")  # type: ignore[arg-type]
    for _ in range(3):
        carrier._answer(Received(message=Message(RecordDict(), 7, MessageType.TRAIN), bundle_hash="b"))
    assert [reply.has_error() for reply in kept.sent] == [True]
