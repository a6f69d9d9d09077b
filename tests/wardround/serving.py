"""A coordinator's page and control for tests: real routes over real HTTP, in a thread of this process."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from server.front_door import listening_socket
from shared.kit import STATE
from shared.supervision import single_instance


@contextlib.contextmanager
def serving(kit: Path, routes: list[Route]) -> Iterator[None]:
    """This process serves the kit, and these routes at its page's port."""
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off", ws="none"))
    with contextlib.closing(listening_socket("127.0.0.1", 0)) as at, single_instance(kit / STATE) as announce:
        announce({"page": at.getsockname()[1]})
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()
