"""What passes the front door, byte by byte, and that nothing else does: real servers, real TLS, raw sockets."""

import asyncio
import contextlib
import datetime
import http.client
import ipaddress
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given
from hypothesis import strategies as st

from client.app import client_app
from server.front_door import (
    FLEET_PATHS,
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    MAX_OBJECTS,
    PUSH_PATH,
    RETRY_AFTER_SECONDS,
    NginxDoor,
    door_server,
    front_door,
    listening_socket,
    nginx_configuration,
)
from shared.envelope import CHUNK_BYTES
from shared.errors import ConfigurationError, ConnectionFailedError
from simulations.in_process import InProcessGrid

DEADLINE_SECONDS = 60
MAX_BODY = 8 * 2**20
PULL = "/v1/fleet/pull-messages"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

NOT_LET_THROUGH = [
    *(
        "/",
        "",
        "*",
        "/health/",
        "/healthz",
        "/v1",
        "/v1/",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/*",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/favicon.ico",
    ),
    *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/anything", "/v1/control/list-runs", "/v1/control/start-run"),
    *("/v1/control/register-node", "/v1/runtime/acquire-task", "/v1/runtime/push-messages", "/v2/fleet/pull-messages"),
    *(
        f"{PULL}/",
        f"{PULL}//",
        f"{PULL}?a=1",
        f"{PULL}#x",
        f"{PULL};a=1",
        f"{PULL}/.",
        f"{PULL}/..",
        f"{PULL}%00",
        f"{PULL}%20",
        f"{PULL}.json",
    ),
    *("//v1/fleet/pull-messages", "/v1//fleet/pull-messages", "/v1/fleet//pull-messages", "/./v1/fleet/pull-messages", "/v1/fleet/./pull-messages"),
    *(
        "/v1/fleet/x/../pull-messages",
        "/v1/control/../fleet/pull-messages",
        "/v1/fleet/pull-messages/../register-node",
        "/v1/fleet/../control/list-runs",
    ),
    *(
        "/v1/fleet/%70ull-messages",
        "/v1/fleet%2fpull-messages",
        "/v1/fleet%2Fpull-messages",
        "/v1%2ffleet/pull-messages",
        "/%76%31/fleet/pull-messages",
    ),
    *(
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/pull-messages%2f..%2fregister-node",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/pull%2Dmessages",
    ),
    *("/v1\\fleet\\pull-messages", "/v1/fleet\\pull-messages", "/v1/fleet/..\\control", "/V1/fleet/pull-messages", "/v1/Fleet/pull-messages"),
    *("/v1/fleet/PULL-MESSAGES", "/v1/fleet/pull_messages", "v1/fleet/pull-messages", "/v1/fleet/pull-message", "/v1/fleet/pull-messagess"),
    *("https://localhost/v1/fleet/pull-messages", "http://localhost/v1/fleet/pull-messages", "https://localhost/v1/control/list-runs"),
    *(
        "//localhost/v1/fleet/pull-messages",
        "localhost:443",
        "/%2fv1/fleet/pull-messages",
        "/v1/fleet/pull-messages%3f",
        "/v1/fleet/pull-messages%23",
    ),
]
METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post", "Post", "POSTS", "PRI"]


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A CA made for the test, with certificates for localhost."""

    folder: Path
    ca: Path
    certificate: Path
    key: Path

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))


def _pem(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _authority(folder: Path) -> Authority:
    folder.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("a test's CA", "localhost")]
    signed = []
    for name, key, is_ca in zip(names, keys, (True, False), strict=True):
        builder = x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder if is_ca else builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        signed.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    made = Authority(folder=folder, ca=folder / "ca.pem", certificate=folder / "localhost.pem", key=folder / "localhost.key")
    made.ca.write_bytes(signed[0])
    made.certificate.write_bytes(signed[1])
    _pem(made.key, keys[1])
    return made


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it reached the SuperLink's place."""

    method: str
    raw_path: bytes
    headers: dict[str, str]
    body: bytes


@dataclass
class Upstream:
    """An ASGI application in the SuperLink's place: it records all that reaches it and answers what the test says."""

    asked: list[Asked] = field(default_factory=list)
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes | None = None  # None: the request's own
    gate: threading.Event | None = None  # wait for it before the answer
    arrived: int = 0  # requests that came, whole or not
    cut: bool = False  # end in the middle of the answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self.arrived += scope["raw_path"] != b"/health"
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["raw_path"] not in (b"/health", b"/wardround-asks-whether-you-answer"):
            self.asked.append(Asked(method=scope["method"], raw_path=scope["raw_path"], headers=headers, body=body))
        elif scope["raw_path"] == b"/wardround-asks-whether-you-answer":
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        while self.gate is not None and not self.gate.is_set():
            await asyncio.sleep(0.01)
        answer = body if self.body is None else self.body
        length = len(answer) + 1000 if self.cut else len(answer)
        headers = [(b"content-type", b"application/protobuf"), (b"content-length", str(length).encode()), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": self.cut})


@contextlib.contextmanager
def _serving(server: uvicorn.Server, listener: socket.socket) -> Iterator[int]:
    """The server's port, while it runs in a thread with a loop of its own."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        _until(lambda: server.started or not thread.is_alive())
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
        listener.close()
        assert not thread.is_alive()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def _health(client: httpx.Client) -> tuple[str, str]:
    """Status and version that `/health` tells, once its time was found to be now."""
    told = client.get("/health").json()
    now = datetime.datetime.now(datetime.UTC)
    assert abs((datetime.datetime.fromisoformat(told["time"]) - now).total_seconds()) < 5
    assert set(told) == {"status", "wardround", "time"}
    return told["status"], told["wardround"]


@contextlib.contextmanager
def _upstream_serving(app: Upstream, authority: Authority, port: int = 0) -> Iterator[int]:
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    config.load()
    config.ssl = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    config.ssl.load_cert_chain(authority.certificate, authority.key)
    listener = listening_socket("127.0.0.1", port)
    with _serving(uvicorn.Server(config), listener) as taken:
        yield taken


@contextlib.contextmanager
def _door_serving(authority: Authority, upstream_port: int, **options: Any) -> Iterator[int]:
    options = {"version": "1.2.3", "max_body_bytes": MAX_BODY, **options}
    app = front_door(f"https://127.0.0.1:{upstream_port}", options.pop("verify", None) or authority.trusting(), **options)
    with _serving(door_server(app, certificate=authority.certificate, key=authority.key), listening_socket("127.0.0.1", 0)) as port:
        yield port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return _authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def running(authority: Authority) -> Iterator[tuple[Upstream, int]]:
    app = Upstream()
    with _upstream_serving(app, authority) as upstream_port, _door_serving(authority, upstream_port, idle_seconds=2) as port:
        yield app, port


@pytest.fixture
def upstream(running: tuple[Upstream, int]) -> Upstream:
    app, _ = running
    app.__init__()  # type: ignore[misc]  # as new
    return app


@pytest.fixture
def port(running: tuple[Upstream, int]) -> int:
    return running[1]


@pytest.fixture
def client(authority: Authority, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"https://localhost:{port}", verify=authority.trusting(), timeout=DEADLINE_SECONDS, trust_env=False) as made:
        yield made


@contextlib.contextmanager
def _connected(authority: Authority, port: int) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("localhost", port), timeout=DEADLINE_SECONDS) as plain,
        authority.trusting().wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        yield connection


def _raw(authority: Authority, port: int, request: bytes) -> bytes:
    """All bytes of the answer to these bytes, on a connection of its own."""
    with _connected(authority, port) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # the door may close before all was sent
            connection.sendall(request)
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
            while part := connection.recv(65536):
                answer += part
    return answer


def _request(method: str, target: str, *headers: str, body: bytes = b"") -> bytes:
    head = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


@pytest.mark.parametrize("path", [path for path in FLEET_PATHS if path != PUSH_PATH])
def test_what_a_node_needs_passes_unchanged_both_ways(upstream: Upstream, client: httpx.Client, path: str) -> None:
    @given(asked=st.binary(max_size=3000), answered=st.binary(max_size=3000), status=st.sampled_from([200, 400, 404, 500, 503]))
    def passes(asked: bytes, answered: bytes, status: int) -> None:
        upstream.body, upstream.status = answered, status
        response = client.post(path, content=asked)
        assert (response.status_code, response.content) == (status, answered)
        request = upstream.asked.pop()
        assert (request.method, request.raw_path, request.body) == ("POST", path.encode(), asked)
        assert upstream.asked == []

    passes()


def announcement(**changes: Any) -> bytes:
    """What a node says of the reply that it is going to send."""
    told = {"node": 7, "source": 7, "reply_to": "ab" * 32, "root": "cd" * 32, "objects": 5, "messages": 1, "trees": 1} | changes
    InProcessGrid(client_app(lambda context: pytest.fail("nobody is asked")), ["north"])  # Flower's messages ask what run they are of
    head = message_to_proto(Message(RecordDict(), 7, MessageType.TRAIN))
    head.metadata.message_id, head.metadata.reply_to_message_id, head.metadata.src_node_id = "cd" * 32, told["reply_to"], told["source"]
    tree = ObjectTree(object_id=told["root"], children=[ObjectTree(object_id=f"{number:064x}") for number in range(told["objects"] - 1)])
    request = PushMessagesRequest(
        node=Node(node_id=told["node"]), messages_list=[head] * told["messages"], message_object_trees=[tree] * told["trees"]
    )
    return request.SerializeToString()


def test_the_announcement_of_a_reply_passes_unchanged(upstream: Upstream, client: httpx.Client) -> None:
    for body in (announcement(), announcement(objects=1), announcement(objects=MAX_OBJECTS)):
        assert len(body) <= MAX_HEAD_BYTES
        assert client.post(PUSH_PATH, content=body).content == body
        assert upstream.asked.pop().body == body


NO_REPLIES = {
    "nothing": b"", "junk": b"\xff" * 100, "an HTML page": b"<html>", "no reply to anything": {"reply_to": ""}, "another's node": {"source": 8},
    "the SuperLink's own": {"source": 1}, "the parts of another": {"root": "ef" * 32}, "more parts than a message has": {"objects": MAX_OBJECTS + 1},
    "two messages": {"messages": 2}, "two lists of parts": {"trees": 2}, "no message": {"messages": 0}, "no parts": {"trees": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_REPLIES)
def test_the_announcement_of_anything_else_does_not_pass(upstream: Upstream, client: httpx.Client, kind: str) -> None:
    said = NO_REPLIES[kind]
    response = client.post(PUSH_PATH, content=said if isinstance(said, bytes) else announcement(**said))
    assert response.status_code == 400
    assert upstream.arrived == 0


def test_an_announcement_longer_than_any_is_not_read_to_its_end(upstream: Upstream, client: httpx.Client) -> None:
    assert client.post(PUSH_PATH, content=announcement(objects=5000)).status_code == 413
    assert client.post(PUSH_PATH, content=iter([bytes(MAX_HEAD_BYTES), b"x"])).status_code == 413
    assert upstream.arrived == 0
    assert MAX_BODY_BYTES > CHUNK_BYTES + 2**20  # what is sent afterwards passes


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_pass(upstream: Upstream, client: httpx.Client, declared: bool) -> None:
    body = os.urandom(5 * 2**20)
    response = client.post(PULL, content=body if declared else iter([body[:1000], body[1000:]]))
    assert response.content == body and upstream.asked[0].body == body
    assert ("content-length" in upstream.asked[0].headers) == declared


def test_only_the_headers_that_flower_uses_pass(upstream: Upstream, client: httpx.Client) -> None:
    upstream.headers = [(b"set-cookie", b"a=1"), (b"server", b"flower"), (b"x-internal", b"1"), (b"location", b"/elsewhere"), (b"retry-after", b"7")]
    upstream.headers += [(b"flwr-version-incompatibility-message", b"too old"), (b"www-authenticate", b"Basic"), (b"via", b"1.1 x")]
    kept = {"content-type": "application/protobuf", "accept": "application/protobuf", "flwr-public-key": "k", "flwr-signature": "s"}
    kept |= {"flwr-timestamp": "t", "flwr-package-name": "flwr", "flwr-package-version": "1.41.0", "flwr-component-name": "supernode"}
    dropped = {"cookie": "a=1", "authorization": "Bearer x", "x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1", "x-real-ip": "127.0.0.1"}
    dropped |= {"te": "trailers", "x-http-method-override": "DELETE", "flwr-task-token": "x", "flwr-superexec-signature": "x", "x-flwr-client": "cli"}
    dropped |= {
        "user-agent": "me",
        "accept-encoding": "gzip",
        "content-encoding": "gzip",
        "host": "elsewhere",
        "proxy-authorization": "x",
        "origin": "x",
    }
    response = client.post(PULL, content=b"x", headers={**kept, **dropped})
    seen = upstream.asked[0].headers
    assert {name: seen.get(name) for name in kept} == kept
    assert set(seen) - set(kept) == {"host", "content-length"} and seen["host"].startswith("127.0.0.1:")
    client.cookies.clear()
    client.post(PULL, content=b"x")
    assert "cookie" not in upstream.asked[1].headers, "what one was told must not be what another says"
    assert set(response.headers) == {"content-type", "content-length", "retry-after", "flwr-version-incompatibility-message"}


def test_flowers_own_client_loses_no_header_at_the_door(upstream: Upstream, authority: Authority, port: int) -> None:
    """The oracle of the list of headers: what flwr sends, but for what belongs to a single connection."""
    key = ec.generate_private_key(ec.SECP384R1())
    sent: dict[str, str] = {}

    class Watch:
        def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
            sent.update(context.request.headers)
            return call_next(context)

    interceptors = [RuntimeVersionHttpInterceptor("supernode"), NodeAuthHttpInterceptor(key, key.public_key()), Watch()]
    upstream.body = PullMessagesResponse().SerializeToString()
    flower = FleetHttpClient(f"https://localhost:{port}", interceptors=interceptors, verify=authority.trusting())
    try:
        assert flower.PullMessages(PullMessagesRequest()) == PullMessagesResponse()
    finally:
        flower._client.close()
    seen = upstream.asked[0].headers
    of_the_connection = {"host", "connection", "user-agent", "accept-encoding"}
    assert {"flwr-public-key", "flwr-signature", "flwr-timestamp"} <= set(sent)
    assert {name: value for name, value in sent.items() if name not in of_the_connection}.items() <= seen.items()


def test_nothing_else_passes_and_all_get_the_same_answer(upstream: Upstream, authority: Authority, port: int) -> None:
    answers = {path: _raw(authority, port, _request("POST", path, body=b"x")) for path in NOT_LET_THROUGH}
    answers |= {method: _raw(authority, port, _request(method, PULL)) for method in METHODS}
    answers |= {f"{method} /health": _raw(authority, port, _request(method, "/health")) for method in METHODS if method != "GET"}
    not_a_question = {"/health", ""}
    assert upstream.asked == []
    expected = answers["/v1/fleet/anything"]
    assert expected.startswith(b"HTTP/1.1 404 ") and expected.endswith(b'{"detail":"Not Found"}')
    invalid = {name for name, answer in answers.items() if answer.startswith(b"HTTP/1.1 400 ")}
    headless = {name for name in answers if name.startswith("HEAD")}
    assert invalid <= not_a_question, invalid
    assert {name for name, answer in answers.items() if answer != expected} == invalid | headless
    assert {answers[name] for name in headless} == {expected.removesuffix(b'{"detail":"Not Found"}')}


@given(position=st.integers(0, len(PULL)), inserted=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=3))
def test_a_path_that_is_nearly_right_does_not_pass(authority: Authority, running: tuple[Upstream, int], position: int, inserted: str) -> None:
    app, port = running
    app.asked.clear()
    answer = _raw(authority, port, _request("POST", PULL[:position] + inserted + PULL[position:]))
    if position == len(PULL) and inserted == "?":  # an empty query, which is none; what is passed on is the path alone
        assert [asked.raw_path for asked in app.asked] == [PULL.encode()]
        return
    assert answer.startswith(b"HTTP/1.1 404 ") and app.asked == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        _request("POST", PULL, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGVzdA==", "Sec-WebSocket-Version: 13"),
        _request("POST", PULL, "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
        _request("GET", PULL, "Upgrade: websocket", "Connection: Upgrade"),
        _request("POST", PULL, "Transfer-Encoding: chunked", body=b"0\r\n\r\nPOST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\n\r\n"),
        _request("POST", PULL, "Transfer-Encoding: identity"),
        _request("POST", PULL, "Transfer-Encoding: gzip, chunked"),
        _request("POST", PULL, "Content-Length: 5", body=b"x"),
        _request("POST", PULL).replace(b"\r\n\r\n", b"\r\nContent-Length : 3\r\n\r\n"),
        _request("POST", PULL).replace(b"Content-Length: 0", b"Content-Length: -1"),
        _request("POST", PULL).replace(b"Content-Length: 0", b"Content-Length: 0x10"),
        _request("POST", PULL).replace(b" HTTP/1.1", b""),
        _request("POST", PULL).replace(b" HTTP/1.1", b" HTTP/2.0"),
        _request("POST", PULL).replace(b" HTTP/1.1", b" HTTP/1.0"),
        _request("POST", PULL).replace(b" HTTP/1.1", b" HTTP/1.1 HTTP/1.1"),
        _request("POST", f"{PULL} /health"),
        _request("POST", f"{PULL}\t"),
        _request("POST", f"{PULL}\u00e9"),
        _request("POST", PULL, "X: a\nY: b\0"),
        _request("POST", PULL).replace(b"Host: localhost\r\n", b""),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
        b"\r\n" * 10 + b"GARBAGE\r\n\r\n",
        b"A" * 200_000 + b"\r\n\r\n",
    ],
    ids=lambda value: ascii(value[:60])[2:-1],
)
def test_requests_of_two_meanings_do_not_pass(upstream: Upstream, authority: Authority, port: int, request_bytes: bytes) -> None:
    answer = _raw(authority, port, request_bytes)
    assert answer[:13] in (b"HTTP/1.1 404 ", b"HTTP/1.1 400 "), answer[:100]
    assert upstream.asked == []


def test_a_request_hidden_in_a_body_stays_a_body(upstream: Upstream, authority: Authority, port: int) -> None:
    hidden = _request("POST", "/v1/control/list-runs", body=b"x")
    answer = _raw(authority, port, _request("POST", PULL, body=hidden))
    assert [(asked.raw_path, asked.body) for asked in upstream.asked] == [(PULL.encode(), hidden)] and answer.endswith(hidden)


def test_the_superlinks_own_refusal_passes(upstream: Upstream, client: httpx.Client) -> None:
    for status in (401, 403, 409, 418, 500):
        upstream.status, upstream.body = status, b'{"detail":"Invalid SuperNode authentication"}'
        response = client.post(PULL, content=b"x")
        assert (response.status_code, response.content) == (status, upstream.body)


def test_a_redirect_is_neither_followed_nor_told(upstream: Upstream, client: httpx.Client) -> None:
    for status in (301, 302, 307, 308, 304):
        upstream.status, upstream.headers, upstream.body = status, [(b"location", b"/v1/control/list-runs")], b""
        response = client.post(PULL, content=b"x")
        assert response.status_code == 503 and "location" not in response.headers
    assert {asked.raw_path for asked in upstream.asked} == {PULL.encode()}


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_a_body_is_refused(upstream: Upstream, client: httpx.Client, declared: bool) -> None:
    parts = [bytes(2**20)] * (MAX_BODY // 2**20)
    exactly = client.post(PULL, content=b"".join(parts) if declared else iter(parts))
    assert exactly.status_code == 200 and len(upstream.asked.pop().body) == MAX_BODY
    response = client.post(PULL, content=b"".join([*parts, b"x"]) if declared else iter([*parts, b"x"]))
    assert response.status_code == 413 and upstream.asked == []
    assert upstream.arrived == (1 if declared else 2), "a length that was declared is refused before anything is passed on"
    assert client.post(PULL, content=b"x").status_code == 200


@pytest.mark.slow
def test_it_says_503_while_the_superlink_is_down_and_recovers(authority: Authority) -> None:
    app = Upstream()
    with contextlib.ExitStack() as stack:
        with _upstream_serving(app, authority) as upstream_port:
            port = stack.enter_context(_door_serving(authority, upstream_port))
            client = stack.enter_context(httpx.Client(base_url=f"https://localhost:{port}", verify=authority.trusting(), timeout=DEADLINE_SECONDS))
            assert client.post(PULL, content=b"a").status_code == 200
            _until(lambda: _health(client) == ("ok", "1.2.3"))
        for _ in range(3):
            response = client.post(PULL, content=b"b")
            assert response.status_code == 503 and response.headers["retry-after"] == str(RETRY_AFTER_SECONDS)
        _until(lambda: client.get("/health").status_code == 503)
        assert _health(client) == ("starting", "1.2.3")
        with _upstream_serving(app, authority, upstream_port):
            assert client.post(PULL, content=b"c").status_code == 200
            _until(lambda: client.get("/health").status_code == 200)
            assert [asked.body for asked in app.asked] == [b"a", b"c"]


@pytest.mark.slow
def test_a_superlink_with_another_authoritys_certificate_is_never_spoken_to(authority: Authority, tmp_path: Path) -> None:
    other = _authority(tmp_path / "other")
    app = Upstream()
    with (
        _upstream_serving(app, other) as upstream_port,
        _door_serving(authority, upstream_port) as port,
        httpx.Client(base_url=f"https://localhost:{port}", verify=authority.trusting()) as client,
    ):
        assert client.post(PULL, content=b"secret").status_code == 503
        assert client.get("/health").status_code == 503
    assert app.arrived == 0


def test_an_answer_that_breaks_off_is_never_taken_for_a_whole_one(upstream: Upstream, client: httpx.Client) -> None:
    upstream.cut, upstream.body = True, b"half"
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(PULL, content=b"x")
    upstream.cut = False
    assert client.post(PULL, content=b"x").content == b"half"


@pytest.mark.slow
def test_a_slow_client_holds_up_nobody_and_is_let_go(upstream: Upstream, authority: Authority, client: httpx.Client, port: int) -> None:
    with _connected(authority, port) as slow:
        slow.sendall(_request("POST", PULL, body=b"x" * 100)[:-50])
        for _ in range(20):
            assert client.post(PULL, content=b"y").content == b"y"
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert {asked.body for asked in upstream.asked} == {b"y"}


@pytest.mark.slow
def test_a_client_that_trickles_for_ever_is_let_go(upstream: Upstream, authority: Authority, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.front_door.BODY_SECONDS", 0.5)
    with _connected(authority, port) as slow:
        slow.sendall(_request("POST", PULL, body=b"x" * 10_000)[:-9_000])
        slow.settimeout(0.05)
        answer = b""
        for _ in range(int(DEADLINE_SECONDS / 0.05)):
            with contextlib.suppress(TimeoutError):
                answer = slow.recv(4096)
                break
            slow.sendall(b"x")
    assert answer.startswith(b"HTTP/1.1 408 ") and upstream.asked == []


@pytest.mark.slow
def test_more_requests_than_allowed_at_once_are_put_off(authority: Authority) -> None:
    app = Upstream(gate=threading.Event())
    assert app.gate is not None
    with _upstream_serving(app, authority) as upstream_port, _door_serving(authority, upstream_port, max_concurrent=2) as port:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(_connected(authority, port)) for _ in range(2)]
            for connection in connections:
                connection.sendall(_request("POST", PULL, body=b"x"))
            _until(lambda: len(app.asked) == 2)
            third = _raw(authority, port, _request("POST", PULL, body=b"x"))
            assert third.startswith(b"HTTP/1.1 503 ") and b"retry-after: 2" in third
            app.gate.set()
            assert all(connection.recv(4096).startswith(b"HTTP/1.1 200 ") for connection in connections)
        _until(lambda: _raw(authority, port, _request("POST", PULL, body=b"x")).startswith(b"HTTP/1.1 200 "))
    assert len(app.asked) == 3


@pytest.mark.slow
@pytest.mark.parametrize("begun", [b"", b"POST /v1/fleet/pull-mess"])
def test_who_brings_no_whole_head_in_time_is_hung_up_on(authority: Authority, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr("server.front_door.REQUEST_HEAD_SECONDS", 0.3)
    app = Upstream()
    with _upstream_serving(app, authority) as upstream_port, _door_serving(authority, upstream_port) as port:
        assert _raw(authority, port, begun) == b""
        assert _raw(authority, port, _request("POST", PULL, body=b"x")).endswith(b"x")


@pytest.mark.slow
def test_idle_connections_do_not_hold_up_the_end(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with (
        _upstream_serving(Upstream(), authority) as upstream_port,
        contextlib.ExitStack() as clients,
        _door_serving(authority, upstream_port) as port,
    ):
        for used in (False, True):
            connection = clients.enter_context(_connected(authority, port))
            if used:
                connection.sendall(_request("POST", PULL, body=b"x").replace(b"Connection: close\r\n", b""))
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert "timeout graceful shutdown exceeded" not in caplog.text


def test_old_tls_is_refused(authority: Authority, port: int) -> None:
    def version(maximum: ssl.TLSVersion) -> str | None:
        context = authority.trusting()
        with pytest.warns(DeprecationWarning) if maximum < ssl.TLSVersion.TLSv1_2 else contextlib.nullcontext():
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = maximum
        context.set_ciphers("ALL:@SECLEVEL=0")
        with (
            socket.create_connection(("localhost", port), timeout=DEADLINE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            return connection.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3" and version(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        version(ssl.TLSVersion.TLSv1_1)


def test_plain_http_gets_nothing(upstream: Upstream, port: int) -> None:
    connection = http.client.HTTPConnection("localhost", port, timeout=DEADLINE_SECONDS)
    with contextlib.closing(connection), pytest.raises((http.client.BadStatusLine, ConnectionError)):
        connection.request("POST", PULL, b"x")
        connection.getresponse()
    assert upstream.asked == []


def test_the_log_names_what_was_refused_and_no_more(upstream: Upstream, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="server.front_door"):
        client.post(PULL, content=b"secret body", headers={"flwr-signature": "secret signature"})
        client.post("/v1/control/list-runs?token=secret", content=b"secret body", headers={"authorization": "secret"})
        client.post("/" + "a" * 500)
    lines = [record.getMessage() for record in caplog.records if record.name == "server.front_door"]
    assert lines == ["/v1/control/list-runs 404", "/" + "a" * 99 + " 404"]
    assert not [record for record in caplog.records if record.name.startswith("uvicorn.access")]


@pytest.mark.parametrize("upstream", ["http://127.0.0.1:1", "https://127.0.0.1", "https://127.0.0.1:1/", "https://a@b:1", "", "127.0.0.1:1"])
def test_a_wrong_upstream_is_refused(upstream: str, authority: Authority) -> None:
    with pytest.raises(ConfigurationError, match="upstream: expected https://host:port"):
        front_door(upstream, authority.trusting(), version="1")


def test_what_the_server_cannot_start_with_is_named(authority: Authority) -> None:
    with pytest.raises(ConfigurationError, match="expected a certificate and its key"):
        door_server(Upstream(), certificate=authority.key, key=authority.certificate)
    with pytest.raises(ConfigurationError, match="No such file"):
        door_server(Upstream(), certificate=authority.folder / "absent", key=authority.key)
    with listening_socket("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ConnectionFailedError, match=f"127.0.0.1:{number}: expected a free port to listen on"):
            listening_socket("127.0.0.1", number)


def _nginx_door(authority: Authority, **changes: Any) -> NginxDoor:
    values = {"server_names": ("localhost",), "certificate": authority.certificate, "key": authority.key, "upstream": "127.0.0.1:9092"}
    return NginxDoor(**{**values, "upstream_ca": authority.ca, "version": "1.2.3", **changes})


def test_the_nginx_configuration_names_exactly_what_passes(authority: Authority) -> None:
    text = nginx_configuration(_nginx_door(authority, listen=("443", "[::]:443")))
    locations = [line.strip().split()[1:3] for line in text.splitlines() if line.strip().startswith("location") and "@" not in line]
    assert locations == [*(["=", path] for path in FLEET_PATHS), ["=", "/health"], ["/", "{"]]
    assert text.count("{") == text.count("}") and "proxy_ssl_verify on;" in text and "listen [::]:443 ssl;" in text
    assert "register-node" not in text


@pytest.mark.parametrize("name", ["a;b", "a{b", 'a"b', "a\nb", "a$b", "a'b", "", "a\\b", "a#b"])
def test_a_name_that_would_break_the_configuration_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(ConfigurationError, match="nginx: expected letters"):
        nginx_configuration(_nginx_door(authority, server_names=(name,)))


@pytest.fixture
def nginx(authority: Authority, tmp_path: Path) -> Iterator[tuple[Upstream, int]]:
    """A real nginx with our configuration before a real upstream."""
    assert NGINX is not None
    app = Upstream()
    with _upstream_serving(app, authority) as upstream_port:
        with listening_socket("127.0.0.1", 0) as free:
            port = int(free.getsockname()[1])
        (tmp_path / "wardround.conf").write_text(
            nginx_configuration(_nginx_door(authority, listen=(f"127.0.0.1:{port}",), upstream=f"127.0.0.1:{upstream_port}", max_body_bytes=MAX_BODY))
        )
        places = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        whole = f"{user} daemon off; pid {tmp_path}/pid; events {{}} http {{ {places} include {tmp_path}/wardround.conf; }}"
        (tmp_path / "nginx.conf").write_text(whole)
        command = [NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
        tested = subprocess.run([*command, "-t"], check=False, capture_output=True, text=True)
        assert tested.returncode == 0, tested.stderr
        process = subprocess.Popen(command)
        with process:
            try:
                _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))  # it listens before it writes that
                yield app, port
            finally:
                process.terminate()


@needs_nginx
def test_nginx_does_the_same(nginx: tuple[Upstream, int], authority: Authority) -> None:
    upstream, port = nginx
    with httpx.Client(base_url=f"https://localhost:{port}", verify=authority.trusting(), timeout=DEADLINE_SECONDS) as client:
        for path in FLEET_PATHS:
            body = os.urandom(MAX_HEAD_BYTES if path == PUSH_PATH else 2**20)
            response = client.post(path, content=body, headers={"flwr-signature": "s", "cookie": "a=1", "x-forwarded-for": "1.1.1.1"})
            assert response.content == body
            asked = upstream.asked.pop()
            assert (asked.raw_path, asked.body, asked.headers["flwr-signature"]) == (path.encode(), body, "s")
            assert not {"cookie", "x-forwarded-for", "user-agent"} & set(asked.headers)
        assert _health(client) == ("ok", "1.2.3")
        for status in (401, 403, 404, 500, 503):
            upstream.status, upstream.body = status, b"its own words"
            assert (client.post(PULL, content=b"x").status_code, client.post(PULL, content=b"x").content) == (status, b"its own words")
        upstream.status, upstream.body = 200, None
        assert client.post(PULL, content=iter([b"a", b"b"])).content == b"ab"
        upstream.asked.clear()
        assert client.post(PULL, content=bytes(MAX_BODY + 1)).status_code == 413
        assert client.post(PUSH_PATH, content=bytes(MAX_HEAD_BYTES + 1)).status_code == 413
        for path in NOT_LET_THROUGH:
            answer = _raw(authority, port, _request("POST", path, body=b"x"))
            assert answer[:13] in (b"HTTP/1.1 404 ", b"HTTP/1.1 400 ") and upstream.asked == [], path
        for method in METHODS:
            answer = _raw(authority, port, _request(method, PULL))
            assert answer[9:10] == b"4" and answer[9:12] not in (b"401", b"403") and upstream.asked == [], (method, answer)
        assert _raw(authority, port, _request("POST", PULL, "Upgrade: websocket", "Connection: Upgrade")).startswith(b"HTTP/1.1 404 ")
        assert upstream.asked == []


@needs_nginx
def test_nginx_says_503_when_the_superlink_is_down(authority: Authority, tmp_path: Path, nginx: tuple[Upstream, int]) -> None:
    """Here: when somebody without the consortium's certificate answers in its place."""
    _, port = nginx
    configuration = tmp_path / "wardround.conf"
    other = _authority(tmp_path / "other")
    configuration.write_text(configuration.read_text().replace(str(authority.ca), str(other.ca)))
    os.kill(int((tmp_path / "pid").read_text()), 1)
    trusting = authority.trusting()

    def refused() -> bool:
        return httpx.get(f"https://localhost:{port}/health", verify=trusting).status_code == 503

    _until(lambda: all(refused() for _ in range(8)))  # each on a connection of its own: for a moment the worker of before takes some as well
    with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting, timeout=DEADLINE_SECONDS) as client:
        assert _health(client) == ("starting", "1.2.3")
        response = client.post(PULL, content=b"x")
        assert response.status_code == 503 and response.headers["retry-after"] == str(RETRY_AFTER_SECONDS)
