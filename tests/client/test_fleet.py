"""A message that cannot be had costs the courier that message, and not its connection."""

import ssl
import threading
from collections.abc import Callable

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node

from client.app import client_app
from client.fleet import Fleet
from shared.certificates import new_node_key
from shared.errors import NodeRefusedError
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
