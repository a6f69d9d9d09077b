"""An HTTPS proxy (CONNECT) that can be told to misbehave."""

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass, field

LINGER_NONE = struct.pack("ii", 1, 0)  # close with a reset, not with a goodbye


@dataclass
class Proxy:
    """Passes bytes between a site and the coordinator.

    Attributes:
        down: refuses everything, and cuts what there is.
        idle_seconds: cuts a connection on which nothing passed for so long, and on which the coordinator spoke last: a question that waits for
            its answer on a busy machine is not idle.
        reset_after: resets a connection after so many bytes from the site.
    """

    down: bool = False
    idle_seconds: float = 60.0
    reset_after: int | None = None
    num_connections: int = 0
    num_cut: int = 0
    _listening: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """For HTTPS_PROXY."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def start(self) -> "Proxy":
        """Serve in threads until `close`."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def close(self) -> None:
        """Cut everything."""
        self._ended.set()
        self._listening.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                site, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(site,), daemon=True).start()

    def _serve(self, site: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.closing(site):
            if self.down:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                piece = site.recv(4096)
                if not piece:
                    return
                head += piece
            host, _, port = head.split()[1].decode().rpartition(":")
            with contextlib.closing(socket.create_connection((host, int(port)), timeout=10)) as coordinator:
                site.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self.num_connections += 1
                self._pass(site, coordinator)

    def _pass(self, site: socket.socket, coordinator: socket.socket) -> None:
        passed, quiet, answered = 0, 0.0, False
        while not self._ended.is_set():
            readable, _, _ = select.select([site, coordinator], [], [], 0.05)
            quiet = 0.0 if readable else quiet + 0.05
            idle = answered and quiet >= self.idle_seconds
            if self.down or idle or (self.reset_after is not None and passed >= self.reset_after):
                self.num_cut += 1
                for end in (site, coordinator):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
                return
            for end in readable:
                data = end.recv(4096)
                if not data:
                    return
                (coordinator if end is site else site).sendall(data)
                passed += len(data) if end is site else 0
                answered = end is coordinator
