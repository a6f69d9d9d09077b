"""The Unix socket between courier and daemon: bytes in, bytes out. No torch, no numpy, nothing of a patient.

A question and an answer are each a length (8 bytes, big-endian) and so many bytes: a sealed Flower record. An empty answer means that the
daemon could not even sign a refusal: what came was no sealed task for this site. `NO_ANSWER` means that none is to be sent: the same was asked again.
"""

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.envelope import MAX_MESSAGE_BYTES
from shared.errors import DoorClosedError, ProtocolError

LENGTH_BYTES = 8
MAX_BYTES = MAX_MESSAGE_BYTES + 2**23  # of one message: its arrays, and its text and seal, of which neither has much more than a megabyte
MAX_HELD_BYTES = 2 * MAX_BYTES  # of all questions under way
NO_ANSWER = b"\0"  # no Flower record begins so: who asked the same again meanwhile gets the answer
PIECE = 1 << 20
RETRY_SECONDS = 0.2
DOOR_WAIT_SECONDS = 30.0  # for a daemon that is just starting
DOOR, SOCKET = "door", "daemon.sock"  # folder in a site's state, and the socket in it

Answer = Callable[[bytes], bytes]


def door_folder(state: Path) -> Path:
    """The folder of the daemon's socket, in a site's state."""
    return state / DOOR


def ask(door: Path, question: bytes, *, wait_seconds: float) -> bytes:
    """The daemon's answer. A daemon that is just starting is waited for; one that dies over the question is not asked again.

    Raises:
        DoorClosedError: nobody listened within `wait_seconds`, or the daemon ended in the middle.
    """
    with contextlib.closing(_connect(door, wait_seconds)) as connection:
        try:
            _send(connection, question)
            return _receive(connection)
        except (OSError, ProtocolError) as error:
            raise DoorClosedError(f"{door}: expected the daemon's answer, got {type(error).__name__}", "see the daemon's log") from error


def _connect(door: Path, wait_seconds: float) -> socket.socket:
    deadline = time.monotonic() + wait_seconds
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(door))
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() >= deadline:
                raise DoorClosedError(f"{door}: expected the daemon to listen, got {type(error).__name__}", "start the site") from error
        time.sleep(RETRY_SECONDS)


class Door(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The daemon's end: `answer` is called for every question, each in a thread of its own.

    The socket may be written to by everybody who reaches its folder: the courier may be another system user. The folder above is private.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, door: Path, answer: Answer) -> None:
        self.answer = answer
        self._asking = threading.Semaphore(32)
        self._lock, self._held = threading.Lock(), 0
        with contextlib.suppress(FileNotFoundError):
            door.unlink()  # of an earlier life; the supervisor holds a lock, so nobody listens on it
        before = os.getcwd()
        os.chdir(door.parent)  # the path of a socket has at most 107 bytes
        try:
            super().__init__(door.name, _Question)
            os.chmod(door.name, 0o666)
        finally:
            os.chdir(before)

    @contextlib.contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Room for a question while it is under way; a small one, such as a stop, always finds some.

        Raises:
            ProtocolError: those under way take too much already.
        """
        with self._lock:
            if num_bytes > PIECE and self._held + num_bytes > MAX_HELD_BYTES:
                raise ProtocolError(f"expected at most {MAX_HELD_BYTES} bytes of questions at once, got more")
            self._held += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._held -= num_bytes

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: the courier learns it from its closed connection, and tells the coordinator no more than that."""


class _Question(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Door)
        with server._asking, contextlib.suppress(OSError, ProtocolError):  # the courier is gone, or no courier of ours
            length = _length(self.request)
            with server.holding(length):
                _send(self.request, server.answer(_exactly(self.request, length)))


def _send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(len(payload).to_bytes(LENGTH_BYTES, "big"))
    if payload:  # whoever knows that nothing follows may have answered and hung up by now
        connection.sendall(payload)


def _receive(connection: socket.socket) -> bytes:
    return _exactly(connection, _length(connection))


def _length(connection: socket.socket) -> int:
    length = int.from_bytes(_exactly(connection, LENGTH_BYTES), "big")
    if length > MAX_BYTES:
        raise ProtocolError(f"expected at most {MAX_BYTES} bytes, got {length}")
    return length


def _exactly(connection: socket.socket, length: int) -> bytes:
    pieces, missing = [], length
    while missing:
        piece = connection.recv(min(missing, PIECE))
        if not piece:
            raise ProtocolError(f"expected {length} bytes, got {length - missing}")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
