"""A site's end of Flower's Fleet API: outbound HTTPS, authenticated by the node's key, message by message.

Flower's own SuperNode starts a new Python process for every message and runs whatever code a bundle holds. This speaks the same protocol,
with Flower's own client, and hands each message to a function of ours instead. Private parts of flwr are touched here and in
`server/superlink.py` and `simulations/in_process.py` alone.
"""

import contextlib
import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from shared.errors import ConnectionFailedError, NodeRefusedError

HEARTBEAT_SECONDS = 10.0  # Flower's least: a node that was killed is let in again two of these after its last
RETRY_SECONDS = 0.1  # a connection that was cut while it was idle shows only when it is used, and several may have been
MAX_RETRY_SECONDS = 10.0
SEND_SECONDS = 600.0  # a reply that cannot be handed over for so long is given up: the coordinator asks again, and gets the identical one
TELL_SECONDS = 0.8  # a pause between two tries, from which on it is no mere hiccup
TEMPORARY = (408, 429, 500, 502, 503, 504)

NOT_LET_IN = (
    "after a crash, it is let in again about 20 seconds later; else ask the coordinator whether this site's request was approved, or its key "
    "revoked, and compare the clocks (Flower refuses more than 5 minutes)"
)

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message that came for this site, and the hash of its run's bundle."""

    message: Message
    bundle_hash: str


class Fleet:
    """The connection of one node.

    Args:
        address: host:port of the coordinator.
        verify: trusts the consortium's CA alone.
        stop: set from outside to give up every wait.
        tell: told what keeps the coordinator from answering, when that lasts about a second, and None once it answers.
    """

    def __init__(
        self,
        address: str,
        verify: ssl.SSLContext,
        key: ec.EllipticCurvePrivateKey,
        *,
        stop: threading.Event,
        tell: Callable[[str | None], None] = lambda problem: None,
    ) -> None:
        self._stop = stop
        self._tell = tell
        self._public_key = public_key_to_bytes(key.public_key())
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ]
        self._client = FleetHttpClient(f"https://{address}", interceptors=interceptors, verify=verify)
        self._node: Node | None = None
        self._bundles: dict[int, str] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[int]:
        """This node is online while the block runs; its id.

        Raises:
            NodeRefusedError: the coordinator does not know the key, or still believes an earlier life of this node to be online.
            ConnectionFailedError: it was told to stop before the coordinator answered.
        """
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            node_id = int(self._ask(lambda: self._client.ActivateNode(request)).node_id)
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=node_id)
        beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        beating.start()
        try:
            yield node_id
        finally:
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
            self._client.close()

    def receive(self) -> Received | None:
        """The next message, whole; None where none waits, or where one could not be had: its run has ended, or it is no message.

        Raises:
            NodeRefusedError: the node is let in no more.
            ConnectionFailedError: it was told to stop before the coordinator answered.
        """
        node = self._here()
        response = self._ask(lambda: self._client.PullMessages(PullMessagesRequest(node=node)))
        if not response.messages_list:
            return None
        try:
            return self._whole(node, response)
        except Exception as error:  # one message must not end the courier; a node that is let in no more learns so when it next asks for one
            if self._stop.is_set():
                raise
            logger.warning("a message could not be had: %s", error if isinstance(error, NodeRefusedError) else type(error).__name__)
            return None

    def _whole(self, node: Node, response: PullMessagesResponse) -> Received:
        head, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        run_id = head.metadata.run_id
        pull = make_pull_object_fn_protobuf(lambda request: self._ask(lambda: self._client.PullObject(request)), node, run_id)
        contents = pull_objects([item.object_id for item in iterate_object_tree(tree)], pull_object_fn=pull)
        confirm = make_confirm_message_received_fn_protobuf(
            lambda request: self._ask(lambda: self._client.ConfirmMessageReceived(request)), node, run_id
        )
        confirm(head.metadata.message_id)
        message = inflate_object_from_contents(head.metadata.message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return Received(message=message, bundle_hash=self._bundle_of(run_id))

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply, all of it; a connection that breaks in the middle is taken up again.

        Args:
            seconds: what the answer took, for the coordinator's own statistics.

        Raises:
            ConnectionFailedError: it could not be handed over within `SEND_SECONDS`, or the coordinator wants no more of it.
            NodeRefusedError: the node is let in no more.
        """
        node, until = self._here(), time.monotonic() + SEND_SECONDS
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            head = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=node, messages_list=[message_to_proto(head)], message_object_trees=[tree], clientapp_runtime_list=[seconds]
            )
            response = self._ask(lambda: self._client.PushMessages(request), until)
            push = make_push_object_fn_protobuf(
                lambda item: self._ask(lambda: self._client.PushObject(item), until), node, reply.metadata.run_id, response.session_id
            )
            try:
                push_objects(get_all_nested_objects(reply), push_object_fn=push, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError:
                raise ConnectionFailedError(
                    "coordinator: expected the reply to be taken, got it given up", "is it larger than its question?"
                ) from None

    def _bundle_of(self, run_id: int) -> str:
        if run_id not in self._bundles:
            response = self._ask(lambda: self._client.GetRun(GetRunRequest(node=self._node, run_id=run_id)))
            self._bundles[run_id] = run_from_proto(response.run).fab_hash
        return self._bundles[run_id]

    def _here(self) -> Node:
        assert self._node is not None, "active() comes first"
        return self._node

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._here(), heartbeat_interval=HEARTBEAT_SECONDS)
        while not self._stop.wait(HEARTBEAT_SECONDS * 0.7):
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):
                self._client.SendNodeHeartbeat(request)

    def _ask(self, call: Callable[[], Answer], until: float = math.inf) -> Answer:
        """The answer to a call; while the coordinator cannot be reached, or says that it is busy, it is asked again, up to a time of the monotonic clock."""
        wait, told = RETRY_SECONDS, False
        while True:
            try:
                answer = call()
                if told:
                    self._tell(None)
                return answer
            except httpx.TransportError as error:
                problem = type(error).__name__
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in TEMPORARY:
                    raise NodeRefusedError(
                        f"coordinator: expected this node to be let in, got HTTP {error.response.status_code}", NOT_LET_IN
                    ) from None
                problem = f"HTTP {error.response.status_code}"
            if wait >= TELL_SECONDS:
                self._tell(problem)
                told = True
            if time.monotonic() > until:
                raise ConnectionFailedError(
                    f"coordinator: expected an answer within {SEND_SECONDS:g} seconds, got {problem}", "it is asked for again"
                )
            if self._stop.wait(wait):
                raise ConnectionFailedError(f"coordinator: expected an answer, got {problem}; told to stop", "")
            wait = min(2 * wait, MAX_RETRY_SECONDS)
