"""Flower's SuperLink answers no other user of this machine; whose a connection is, the kernel says."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from starlette.responses import PlainTextResponse

import server.superlink_process
from server.superlink_process import OwnUserAlone, connected_user

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def connection() -> Iterator[Ends]:
    """Both ends of a connection over loopback: who connected, and who was connected to."""
    with ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = held.enter_context(socket.create_connection(listener.getsockname()))
        accepted, _ = listener.accept()
        held.enter_context(accepted)
        yield client, accepted


def test_the_kernel_names_the_user_of_a_connection(connection: Ends) -> None:
    _, accepted = connection
    assert connected_user(accepted.getpeername(), accepted.getsockname()) == os.geteuid()
    assert connected_user(accepted.getpeername(), ("127.0.0.1", 1)) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a socket another user's")
def test_another_users_connection_is_another_users(connection: Ends) -> None:
    client, accepted = connection
    os.fchown(client.fileno(), 65534, 65534)
    assert connected_user(accepted.getpeername(), accepted.getsockname()) == 65534


def test_a_connection_that_was_given_up_is_nobodys(connection: Ends) -> None:
    """The kernel says 0 of it, whoever's it was: a request sent and left behind must not pass for root's."""
    client, accepted = connection
    peer = accepted.getpeername()
    client.sendall(b"POST")
    client.close()
    assert connected_user(peer, accepted.getsockname()) is None


def test_an_address_that_is_none_of_ipv4_is_nobodys() -> None:
    assert connected_user(("::1", 5), ("::1", 6)) is None
    assert connected_user(("testclient", 5), ("testserver", 6)) is None


@pytest.mark.parametrize(("user", "status"), [(os.geteuid(), 200), (os.geteuid() + 1, 403), (0 if os.geteuid() else 1, 403), (None, 403)])
def test_only_the_own_user_reaches_more_than_the_fleet_api(user: int | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.superlink_process, "connected_user", lambda client, upstream: user)
    assert asked("/v1/fleet/pull-messages") == 200
    for path in ("/v1/control/start-run", "/v1/runtime/pull-messages", "/docs", "/v1/fleet", "/v1/fleetcontrol", "//v1/fleet/x"):
        assert asked(path) == status, path


def asked(path: str) -> int:
    """The status that a POST on this path gets, where what lies behind says 200 to everything."""
    return asyncio.run(_ask(path))


async def _ask(path: str) -> int:
    app = OwnUserAlone(PlainTextResponse("ok"))
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:6") as client:
        return (await client.post(httpx.URL("http://127.0.0.1:6", raw_path=path.encode()))).status_code
