"""The only thing of the coordinator that is reachable from outside: ten paths of Flower's Fleet API, and `/health`.

Flower serves its Fleet, Control and Runtime APIs on one port, and whoever reaches Control may run code at every hospital. So the SuperLink
listens on loopback, and this proxy lets through what a registered node needs and nothing else:

- POST on a path of `FLEET_PATHS`, compared with the raw bytes that came: no query, no `%2e`, no `//`, no absolute form, no upgrade;
- the headers in `REQUEST_HEADERS` and, on the way back, `RESPONSE_HEADERS`; the body untouched, in a stream, up to a size;
- of the announcements of an upload (`push-messages`) only those of one reply, by the node that asks, of as many objects as a message may have: the
  SuperLink takes one reply to a question, and of every reply at most `MAX_OBJECTS` objects of `MAX_BODY_BYTES`, and keeps them until the study's process
  fetches or refuses them (`server.mailbox`: by the size of the question), 180 s pass without a further one, or the run ends;
- everything else gets one and the same 404.

Registering is not let through: only the coordinator itself registers nodes. The door has no opinion on who may enter: the SuperLink's own
401 and 403 pass (a revoked node must learn of it), and of its own accord it never says either, since Flower's clients end themselves on
them; when the SuperLink does not answer it says 503, upon which they try again. What the door cannot do is hold back a flood; a site on the open
internet lets nginx stand there (`nginx_configuration`).
"""

import asyncio
import contextlib
import json
import logging
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.envelope import MAX_MESSAGE_BYTES, most_objects
from shared.errors import ConfigurationError, ConnectionFailedError

logger = logging.getLogger(__name__)

_FLEET_CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"),
    *("pull-object", "push-object", "confirm-message-received"),
)
FLEET_PATHS = tuple(f"/v1/fleet/{call}" for call in _FLEET_CALLS)
PUSH_PATH = "/v1/fleet/push-messages"
HEALTH_PATH = "/health"

# What flwr's Fleet client sends and reads: content, node authentication, versions. Names are flwr's (supercore/constant.py, common/constant.py).
REQUEST_HEADERS = (
    *("content-type", "accept", "content-length"),
    *("flwr-public-key", "flwr-signature", "flwr-timestamp"),
    *("flwr-package-name", "flwr-package-version", "flwr-component-name"),
)
RESPONSE_HEADERS = ("content-type", "content-length", "content-encoding", "retry-after", "flwr-version-incompatibility-message")

MAX_BODY_BYTES = 8 * 2**20  # Flower's largest object is a chunk of 5 MiB
MAX_OBJECTS = most_objects(MAX_MESSAGE_BYTES)  # of a reply
MAX_HEAD_BYTES = 2**16  # of the announcement of a reply: some 80 for each object
MAX_CONCURRENT, MAX_CONNECTIONS = 64, 1024
RETRY_AFTER_SECONDS = 2
HEALTH_KEPT_SECONDS = 1.0  # so that asking us often does not ask the SuperLink often
KEEP_ALIVE_SECONDS = 75
REQUEST_HEAD_SECONDS = 30.0  # from the connection, or from the last answer's end and its keep-alive, to a whole request head
IDLE_SECONDS, BODY_SECONDS = 30.0, 600.0  # longest silence of a client within a body, and longest time for a whole one
_UPSTREAM_KEEP_ALIVE_SECONDS = 2.0  # less than the 5 s after which the SuperLink hangs up, lest a request meet a connection that is just closing
_UPSTREAM_TIMEOUT = httpx.Timeout(connect=5, read=60, write=60, pool=5)

_BAD_REQUEST = b'{"detail":"Bad Request"}'
_NOT_FOUND = b'{"detail":"Not Found"}'
_TOO_LARGE = b'{"detail":"Content Too Large"}'
_TOO_SLOW = b'{"detail":"Request Timeout"}'
_UNAVAILABLE = b'{"detail":"Service Unavailable"}'

Headers = list[tuple[bytes, bytes]]


class _TooLargeError(Exception):
    """The body is longer than allowed."""


class _NoReplyError(Exception):
    """An upload is announced that is not of one reply."""


class _ClientGoneError(Exception):
    """The client went away, or fell silent, within its body."""


def front_door(
    upstream: str,
    verify: ssl.SSLContext,
    *,
    version: str,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_concurrent: int = MAX_CONCURRENT,
    idle_seconds: float = IDLE_SECONDS,
) -> Starlette:
    """The application; it needs its lifespan (uvicorn runs it), which holds the connections to `upstream`.

    Args:
        upstream: the SuperLink, `https://host:port`, on loopback.
        verify: trusts the consortium's CA, and so the SuperLink's certificate, and nobody else.
        version: of wardround, told at `/health`.
        max_body_bytes: of a request; longer ones get 413.
        max_concurrent: requests passed on at one time; further ones get 503.
        idle_seconds: longest silence of a client within a body, either way.

    Raises:
        ConfigurationError: `upstream` is no such address.
    """
    if not re.fullmatch(r"https://[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}", upstream):
        raise ConfigurationError(f"upstream: expected https://host:port, got {upstream!r}", "give the SuperLink's address on loopback")
    limits = httpx.Limits(max_connections=max_concurrent + 1, keepalive_expiry=_UPSTREAM_KEEP_ALIVE_SECONDS)
    # Not a client: that would keep cookies, and so carry what one site was told into what another asks, and add headers of its own.
    transport = httpx.AsyncHTTPTransport(verify=verify, limits=limits, trust_env=False)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with transport:
            yield

    bounds = _Bounds(max_body_bytes=max_body_bytes, max_concurrent=max_concurrent, idle_seconds=idle_seconds)
    door = Middleware(_Door, upstream=upstream, transport=transport, version=version, bounds=bounds)
    return Starlette(middleware=[door], lifespan=lifespan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """What one client may take of the door; `front_door` says what each is."""

    max_body_bytes: int
    max_concurrent: int
    idle_seconds: float


class _Door:
    """Stands before Starlette's routing, which compares decoded paths; behind it there is no route."""

    def __init__(self, app: ASGIApp, *, upstream: str, transport: httpx.AsyncHTTPTransport, version: str, bounds: _Bounds) -> None:
        self._app = app
        self._upstream = upstream
        self._transport = transport
        self._version = version
        self._bounds = bounds
        self._active = 0
        self._healthy, self._health_until = False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _is_request(scope, "GET", (HEALTH_PATH,)):
            await self._tell_health(send)
        elif not _is_request(scope, "POST", FLEET_PATHS):
            await _refuse(scope, send, 404, _NOT_FOUND)
        elif self._active >= self._bounds.max_concurrent:
            await _refuse(scope, send, 503, _UNAVAILABLE)
        else:
            self._active += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self._active -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the SuperLink and give back its answer, or say why not."""
        headers = _only(scope["headers"], REQUEST_HEADERS)
        if _declared_length(headers) > self._bounds.max_body_bytes:
            await _refuse(scope, send, 413, _TOO_LARGE)
            return
        path = scope["raw_path"].decode("ascii")  # one of FLEET_PATHS, character by character
        started = False
        try:
            body = await self._announcement(receive) if path == PUSH_PATH else self._body(receive, self._bounds.max_body_bytes)
            response = await self._ask("POST", path, headers, body)
            async with contextlib.aclosing(response):
                if not 300 <= response.status_code < 400:
                    started = True
                    await self._answer(response, send)
                    return
            await _refuse(scope, send, 503, _UNAVAILABLE)  # the SuperLink never redirects: something else answers on its port
        except _TooLargeError:
            await _refuse(scope, send, 413, _TOO_LARGE)
        except _NoReplyError:
            await _refuse(scope, send, 400, _BAD_REQUEST)
        except _ClientGoneError:
            await _refuse(scope, send, 408, _TOO_SLOW)
        except (httpx.HTTPError, TimeoutError) as error:
            logger.info("%s: %s", path, type(error).__name__)
            if not started:  # else returning now, with half an answer sent, makes uvicorn cut the connection, which the client takes as a failure
                await _refuse(scope, send, 503, _UNAVAILABLE)

    async def _ask(self, method: str, path: str, headers: Headers, body: AsyncIterator[bytes] | bytes | None) -> httpx.Response:
        """The SuperLink's answer, up to its body. httpx adds Host and, where no length is known, Transfer-Encoding."""
        extensions = {"timeout": _UPSTREAM_TIMEOUT.as_dict()}
        return await self._transport.handle_async_request(
            httpx.Request(method, self._upstream + path, headers=headers, content=body, extensions=extensions)
        )

    async def _announcement(self, receive: Receive) -> bytes:
        """The whole body of a `push-messages`, once it announces one reply."""
        body = b"".join([part async for part in self._body(receive, min(MAX_HEAD_BYTES, self._bounds.max_body_bytes))])
        if not is_one_reply(body):
            raise _NoReplyError
        return body

    async def _body(self, receive: Receive, most_bytes: int) -> AsyncIterator[bytes]:
        """The request's body, as it comes."""
        length, more, deadline = 0, True, time.monotonic() + BODY_SECONDS
        while more:
            try:
                message = await asyncio.wait_for(receive(), min(self._bounds.idle_seconds, max(deadline - time.monotonic(), 0)))
            except TimeoutError:
                raise _ClientGoneError from None
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            part = message.get("body", b"")
            length += len(part)
            if length > most_bytes:
                raise _TooLargeError
            if part:
                yield part
            more = message.get("more_body", False)

    async def _answer(self, response: httpx.Response, send: Send) -> None:
        """The SuperLink's status, permitted headers and bytes."""
        headers = _only(response.headers.raw, RESPONSE_HEADERS)
        await self._send(send, {"type": "http.response.start", "status": response.status_code, "headers": headers})
        async for part in response.aiter_raw():
            await self._send(send, {"type": "http.response.body", "body": part, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        await asyncio.wait_for(send(message), self._bounds.idle_seconds)

    async def _tell_health(self, send: Send) -> None:
        """Whether the SuperLink answers, whatever it says; and the time, for Flower refuses sites whose clock is off."""
        if time.monotonic() >= self._health_until:
            self._health_until = time.monotonic() + HEALTH_KEPT_SECONDS
            try:
                await (await self._ask("GET", HEALTH_PATH, [], None)).aclose()
                self._healthy = True
            except httpx.HTTPError:
                self._healthy = False
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        body = _health_text("ok" if self._healthy else "starting", self._version, moment).encode()
        await _say(send, 200 if self._healthy else 503, body)


def _is_request(scope: Scope, method: str, paths: tuple[str, ...]) -> bool:
    """Whether it is exactly that request, in the bytes that came, with one opinion on its length and none on another protocol."""
    names = {name for name, _ in scope["headers"]}
    plain = (
        scope["http_version"] == "1.1"
        and not scope["query_string"]
        and b"upgrade" not in names
        and not {b"content-length", b"transfer-encoding"} <= names
    )
    return plain and scope["method"] == method and scope["raw_path"] in [path.encode() for path in paths]


def is_one_reply(body: bytes) -> bool:
    """Whether these bytes announce one reply, from the node that says so, with its own parts and not too many of them.

    The SuperLink takes one reply to a question, but as many lists of parts for it as come; and whose node a message is from it does not look at.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    own = metadata.src_node_id == request.node.node_id and tree.object_id == metadata.message_id
    return own and bool(metadata.reply_to_message_id) and sum(1 for _ in iterate_object_tree(tree)) <= MAX_OBJECTS


def _only(headers: Headers, names: tuple[str, ...]) -> Headers:
    """Those of the headers that have one of the names."""
    return [(name.lower(), value) for name, value in headers if name.lower().decode("latin-1") in names]


def _declared_length(headers: Headers) -> int:
    """What Content-Length says (h11 has checked that it is one number); 0 without one."""
    return max((int(value) for name, value in headers if name == b"content-length"), default=0)


async def _refuse(scope: Scope, send: Send, status: int, body: bytes) -> None:
    """Answer in our own name. The path is somebody's invention: it is logged short and escaped."""
    logger.info("%s %d", ascii(scope["raw_path"].decode("latin-1"))[1:-1][:100], status)
    await _say(send, status, body)


async def _say(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _DoorProtocol(H11Protocol):
    """HTTP that also hangs up on who does not bring a whole request head in time; uvicorn alone waits for ever."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._expect_head_within(REQUEST_HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_head_within(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a head came
            self._expect_head_within(None)

    def on_response_complete(self) -> None:
        self._expect_head_within(KEEP_ALIVE_SECONDS + REQUEST_HEAD_SECONDS)
        super().on_response_complete()

    def shutdown(self) -> None:
        """As uvicorn's, but an idle connection does not keep us waiting for the other side's TLS goodbye."""
        super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _expect_head_within(self, seconds: float | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(seconds, self.transport.abort) if seconds is not None else None


class _DoorServer(uvicorn.Server):
    """A server that leaves signals to the program it is a part of: set `should_exit` to end it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def door_server(app: ASGIApp, *, certificate: Path, key: Path, max_connections: int = MAX_CONNECTIONS) -> uvicorn.Server:
    """The server for a front door: `await server.serve(sockets=[listening_socket(host, port)])`; it ends when `should_exit` is set.

    TLS 1.2 or newer, HTTP/1.1 by h11, neither server nor date told, no access log, no signal handlers.

    Raises:
        ConfigurationError: certificate or key cannot be used.
    """
    config = uvicorn.Config(
        app,
        http=_DoorProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    config.load()
    config.ssl = _server_tls(certificate, key)
    return _DoorServer(config)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        ConnectionFailedError: the port is taken, or the address is not this machine's.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=MAX_CONNECTIONS)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # handed on to connections; asyncio sets it on its own sockets alone
        return listening
    except OSError as error:
        raise ConnectionFailedError(
            f"{host}:{port}: expected a free port to listen on, got: {error.strerror}", "choose another port or host"
        ) from error


def _server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(
            f"{certificate}, {key}: expected a certificate and its key, got: {reason}", "make the kit anew, or renew it"
        ) from error
    return context


@dataclass(frozen=True, slots=True, kw_only=True)
class NginxDoor:
    """What an nginx that stands in for the front door needs to know; files by full paths."""

    server_names: tuple[str, ...]
    listen: tuple[str, ...] = ("443",)  # ports, or addresses with ports
    certificate: Path  # with its chain
    key: Path
    upstream: str  # host:port of the SuperLink, on loopback
    upstream_name: str = "localhost"  # a DNS name in its certificate: nginx compares no IP addresses
    upstream_ca: Path
    version: str
    max_body_bytes: int = MAX_BODY_BYTES
    max_concurrent: int = MAX_CONCURRENT


def nginx_configuration(door: NginxDoor) -> str:
    """A file for nginx's http context (`/etc/nginx/conf.d/`) that lets through what `front_door` does; nginx 1.15.3 or newer.

    Raises:
        ConfigurationError: a value would not survive nginx's quoting.
    """
    for path in map(str, (door.certificate, door.key, door.upstream_ca)):  # which stand in quotes
        if not re.fullmatch(r'[^\x00-\x1f\x7f"\\$]+', path):
            raise ConfigurationError(f'nginx: expected a path without ", $ and \\, got {path!r}', "choose another path")
    for value in (*door.server_names, *door.listen, door.upstream, door.upstream_name, door.version):
        if not re.fullmatch(r"[\w./:+@*\[\] -]+", value):
            raise ConfigurationError(f"nginx: expected letters, digits, spaces and ./:+@*[]-, got {value!r}", "choose another name or path")
    passed = [name for name in REQUEST_HEADERS if name != "content-length"]  # which nginx sets itself
    return _NGINX.format(
        listen="\n".join(f"    listen {address} ssl;" for address in door.listen),
        names=" ".join(door.server_names),
        upstream=door.upstream,
        upstream_name=door.upstream_name,
        upstream_ca=door.upstream_ca,
        certificate=door.certificate,
        key=door.key,
        max_body_bytes=door.max_body_bytes,
        max_concurrent=door.max_concurrent,
        headers="\n".join(f"    proxy_set_header {name} $http_{name.replace('-', '_')};" for name in passed),
        fleet="".join(
            _NGINX_CALL.format(path=path, not_found=_NOT_FOUND.decode(), most=MAX_HEAD_BYTES if path == PUSH_PATH else door.max_body_bytes)
            for path in FLEET_PATHS
        ),
        keep_alive=KEEP_ALIVE_SECONDS,
        idle=int(IDLE_SECONDS),
        retry_after=RETRY_AFTER_SECONDS,
        not_found=_NOT_FOUND.decode(),
        unavailable=_UNAVAILABLE.decode(),
        healthy=_health_text("ok", door.version, "$time_iso8601"),
        starting=_health_text("starting", door.version, "$time_iso8601"),
    )


def _health_text(status: str, version: str, moment: str) -> str:
    return json.dumps({"status": status, "wardround": version, "time": moment})


# nginx compares a location with the decoded, tidied path; `$request` is the request line as it came.
_NGINX_CALL = """
    location = {path} {{
        if ($request != "POST {path} HTTP/1.1") {{ return 404 '{not_found}'; }}
        if ($http_upgrade) {{ return 404 '{not_found}'; }}
        client_max_body_size {most};
        proxy_pass https://wardround_superlink{path};
    }}
"""

_NGINX = """# Written by wardround: what stands in for the coordinator's front door. Include it in nginx's http context.
upstream wardround_superlink {{
    server {upstream};
    keepalive 16;
    keepalive_timeout 2s;
}}

limit_conn_zone $server_name zone=wardround:1m;

server {{
{listen}
    server_name {names};
    server_tokens off;
    access_log off;
    merge_slashes off;
    default_type application/json;

    ssl_certificate "{certificate}";
    ssl_certificate_key "{key}";
    ssl_protocols TLSv1.2 TLSv1.3;

    client_max_body_size {max_body_bytes};
    client_header_timeout {idle}s;
    client_body_timeout {idle}s;
    send_timeout {idle}s;
    keepalive_timeout {keep_alive}s;
    limit_conn wardround {max_concurrent};
    limit_conn_status 503;

    proxy_http_version 1.1;
    proxy_ssl_verify on;
    proxy_ssl_verify_depth 2;
    proxy_ssl_trusted_certificate "{upstream_ca}";
    proxy_ssl_name {upstream_name};
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_connect_timeout 5s;
    proxy_read_timeout 60s;
    proxy_send_timeout 60s;
    proxy_next_upstream off;
    proxy_redirect off;
    proxy_max_temp_file_size 0;

    # Only what Flower's client sends; the body's length is nginx's own.
    proxy_pass_request_headers off;
    proxy_set_header Connection "";
    proxy_set_header Host {upstream_name};
{headers}

    # Never 401 or 403 of our own: Flower's clients end themselves on them. On 503 they try again.
    error_page 502 503 504 = @unavailable;
    location @unavailable {{
        add_header Retry-After {retry_after} always;
        return 503 '{unavailable}';
    }}
{fleet}
    # A path that the SuperLink does not have: its 404 says that it answers.
    location = /health {{
        if ($request != "GET /health HTTP/1.1") {{ return 404 '{not_found}'; }}
        proxy_pass_request_body off;
        proxy_set_header Connection "";
        proxy_intercept_errors on;
        error_page 404 = @healthy;
        error_page 500 502 503 504 = @starting;
        proxy_pass https://wardround_superlink/wardround-asks-whether-you-answer;
    }}
    location @healthy {{ return 200 '{healthy}'; }}
    location @starting {{
        add_header Retry-After {retry_after} always;
        return 503 '{starting}';
    }}

    location / {{ return 404 '{not_found}'; }}
}}
"""
