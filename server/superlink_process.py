"""`python -m server.superlink_process ...`: Flower's SuperLink, with its own options, which answers no other user of this machine.

Flower's Control API has no user authentication: whoever reaches it may start a bundle of their own, which then runs as the coordinator's user, with
its keys. Loopback keeps other machines out, not this one's other users. So every request but those of the Fleet API, which carry a node's signature,
must come over a connection that a process of the coordinator's own user holds; the kernel says whose it is. Not kept out: root, and who has become
this user already.
"""

import os
import socket
import sys
from pathlib import Path

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FLEET = "/v1/fleet/"
CONNECTIONS = Path("/proc/net/tcp")  # a line each: number, local, remote, state, ..., uid (field 7)
ESTABLISHED = "01"  # in any other state the kernel may no longer know whose it was, and says root's

Address = tuple[str, int]


class OwnUserAlone:
    """Answers 403 to what does not come from this process's user."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and (scope["path"].startswith(FLEET) or _is_own(scope))):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await JSONResponse({"detail": "Forbidden"}, status_code=403)(scope, receive, send)


def _is_own(scope: Scope) -> bool:
    client, server = scope["client"], scope["server"]
    return bool(client and server) and connected_user(tuple(client), tuple(server)) == os.geteuid()


def connected_user(client: Address, server: Address) -> int | None:
    """The number of the user whose socket at `client` is connected to `server` now, both on IPv4; None where there is none."""
    try:
        ends = [_hex(client), _hex(server), ESTABLISHED]
        with open(CONNECTIONS) as lines:
            return next((int(fields[7]) for fields in map(str.split, lines) if fields[1:4] == ends), None)
    except OSError:  # no IPv4 address, or a system that does not tell: nobody is known
        return None


def _hex(address: Address) -> str:
    """An address as the kernel writes it: the IPv4 address as a number of this machine's byte order."""
    return f"{int.from_bytes(socket.inet_aton(address[0]), sys.byteorder):08X}:{address[1]:04X}"


def main() -> None:
    """Flower's own program, with one more middleware, outermost."""
    if not CONNECTIONS.exists():
        sys.exit(f"{CONNECTIONS}: expected Linux's table of connections, found none: the SuperLink could not tell whose requests it answers")
    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(OwnUserAlone), *others())
    flower_superlink()


if __name__ == "__main__":
    main()
