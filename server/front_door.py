"""The only thing of the coordinator that is reachable from outside: ten paths of Flower's Fleet API, and `/health`.

Flower serves its Fleet, Control and Runtime APIs on one port, and whoever reaches Control may run code at every hospital. So the SuperLink
listens on loopback, and this proxy lets through what a registered node needs and nothing else:

- POST on a path of `FLEET_PATHS`, compared with the raw bytes that came: no query, no `%2e`, no `//`, no absolute form, no upgrade;
- the headers in `REQUEST_HEADERS` and, on the way back, `RESPONSE_HEADERS`; the body untouched, in a stream, up to a size;
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
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import h11
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.errors import ConfigurationError, ConnectionFailedError

logger = logging.getLogger(__name__)

_FLEET_CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"),
    *("pull-object", "push-object", "confirm-message-received"),
)
FLEET_PATHS = tuple(f"/v1/fleet/{call}" for call in _FLEET_CALLS)
HEALTH_PATH = "/health"

# What flwr's Fleet client sends and reads: content, node authentication, versions. Names are flwr's (supercore/constant.py, common/constant.py).
REQUEST_HEADERS = (
    *("content-type", "accept", "content-length"),
    *("flwr-public-key", "flwr-signature", "flwr-timestamp"),
    *("flwr-package-name", "flwr-package-version", "flwr-component-name"),
)
RESPONSE_HEADERS = ("content-type", "content-length", "content-encoding", "retry-after", "flwr-version-incompatibility-message")

MAX_BODY_BYTES = 64 * 2**20
MAX_CONCURRENT, MAX_CONNECTIONS = 64, 1024
RETRY_AFTER_SECONDS = 2
HEALTH_KEPT_SECONDS = 1.0  # so that asking us often does not ask the SuperLink often
KEEP_ALIVE_SECONDS = 75
REQUEST_HEAD_SECONDS = 30.0  # from the connection, or from the last answer's end and its keep-alive, to a whole request head
IDLE_SECONDS = 30.0  # longest silence of a client within a body
_UPSTREAM_TIMEOUT = httpx.Timeout(connect=5, read=60, write=60, pool=5)

_NOT_FOUND = b'{"detail":"Not Found"}'
_TOO_LARGE = b'{"detail":"Content Too Large"}'
_TOO_SLOW = b'{"detail":"Request Timeout"}'
_UNAVAILABLE = b'{"detail":"Service Unavailable"}'

Headers = list[tuple[bytes, bytes]]


class _TooLargeError(Exception):
    """The body is longer than allowed."""


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
    limits = httpx.Limits(max_connections=max_concurrent + 1, max_keepalive_connections=max_concurrent)
    client = httpx.AsyncClient(base_url=upstream, verify=verify, timeout=_UPSTREAM_TIMEOUT, limits=limits, follow_redirects=False, trust_env=False)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    door = Middleware(
        _Door, client=client, version=version, max_body_bytes=max_body_bytes, max_concurrent=max_concurrent, idle_seconds=idle_seconds
    )
    return Starlette(middleware=[door], lifespan=lifespan)


class _Door:
    """Stands before Starlette's routing, which compares decoded paths; behind it there is no route."""

    def __init__(
        self, app: ASGIApp, *, client: httpx.AsyncClient, version: str, max_body_bytes: int, max_concurrent: int, idle_seconds: float
    ) -> None:
        self._app = app
        self._client = client
        self._version = version
        self._max_body_bytes = max_body_bytes
        self._max_concurrent = max_concurrent
        self._idle_seconds = idle_seconds
        self._active = 0
        self._healthy, self._health_until = False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _is_request(scope, "GET", (HEALTH_PATH,)):
            await self._tell_health(send)
        elif not _is_request(scope, "POST", FLEET_PATHS):
            await _refuse(scope, send, 404, _NOT_FOUND)
        elif self._active >= self._max_concurrent:
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
        if _declared_length(headers) > self._max_body_bytes:
            await _refuse(scope, send, 413, _TOO_LARGE)
            return
        path = scope["raw_path"].decode("ascii")  # one of FLEET_PATHS, character by character
        started = False
        try:
            request = self._client.build_request("POST", path, content=self._body(receive), headers=[*headers, (b"accept-encoding", b"identity")])
            response = await self._client.send(request, stream=True)
            async with contextlib.aclosing(response):
                if not response.is_redirect and response.status_code >= 200:
                    started = True
                    await self._answer(response, send)
                    return
            await _refuse(scope, send, 503, _UNAVAILABLE)  # the SuperLink never redirects: something else answers on its port
        except _TooLargeError:
            await _refuse(scope, send, 413, _TOO_LARGE)
        except _ClientGoneError:
            await _refuse(scope, send, 408, _TOO_SLOW)
        except (httpx.HTTPError, TimeoutError) as error:
            logger.info("%s: %s", path, type(error).__name__)
            if not started:  # else returning now, with half an answer sent, makes uvicorn cut the connection, which the client takes as a failure
                await _refuse(scope, send, 503, _UNAVAILABLE)

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """The request's body, as it comes."""
        length = 0
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), self._idle_seconds)
            except TimeoutError:
                raise _ClientGoneError from None
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            part = message.get("body", b"")
            length += len(part)
            if length > self._max_body_bytes:
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
        await asyncio.wait_for(send(message), self._idle_seconds)

    async def _tell_health(self, send: Send) -> None:
        """Whether the SuperLink answers, whatever it says."""
        if time.monotonic() >= self._health_until:
            self._health_until = time.monotonic() + HEALTH_KEPT_SECONDS
            try:
                await self._client.get(HEALTH_PATH, timeout=5)
                self._healthy = True
            except httpx.HTTPError:
                self._healthy = False
        body = json.dumps({"status": "ok" if self._healthy else "starting", "wardround": self._version}).encode()
        await _say(send, 200 if self._healthy else 503, body)


def _is_request(scope: Scope, method: str, paths: tuple[str, ...]) -> bool:
    """Whether it is exactly that request, in the bytes that came."""
    plain = not scope["query_string"] and not any(name == b"upgrade" for name, _ in scope["headers"])
    return plain and scope["method"] == method and scope["raw_path"] in [path.encode() for path in paths]


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
