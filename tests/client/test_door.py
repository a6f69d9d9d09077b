"""Bytes in, bytes out, over a socket whose other end may lie, hang up or die."""

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.proto.recorddict_pb2 import RecordDict
from google.protobuf.message import DecodeError

from client import door as module
from client.door import LENGTH_BYTES, MAX_BYTES, NO_ANSWER, PIECE, Answer, Door, ask, door_folder
from shared.envelope import MAX_MESSAGE_BYTES
from shared.errors import DoorClosedError
from shared.messages import MAX_JSON_BYTES

WAIT = 8.0
Open = Callable[..., Path]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open a door that answers like this."""
    doors: list[Door] = []

    def open_door(answer: Answer, path: Path = tmp_path / "daemon.sock") -> Path:
        doors.append(made := Door(path, answer))
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return path

    yield open_door
    for made in doors:
        made.shutdown()
        made.server_close()


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(WAIT)
        connection.connect(str(path))
        yield connection


def length(number: int) -> bytes:
    return number.to_bytes(LENGTH_BYTES, "big")


@pytest.mark.parametrize("question", [b"", b"x", b"\0" * 100, os.urandom(3_000_000)], ids=["empty", "one", "zeros", "large"])
def test_the_answer_to_this_question_comes_back(opened: Open, question: bytes) -> None:
    assert ask(opened(lambda got: got[::-1]), question, wait_seconds=WAIT) == question[::-1]


def test_several_are_answered_at_once(opened: Open) -> None:
    together = threading.Barrier(4)

    def answer(question: bytes) -> bytes:
        together.wait(WAIT)  # none is answered before all have asked
        return question * 2

    path = opened(answer)
    with ThreadPoolExecutor(max_workers=4) as askers:
        asked = [askers.submit(ask, path, bytes([number]), wait_seconds=WAIT) for number in range(4)]
        assert [future.result(WAIT) for future in asked] == [bytes([number]) * 2 for number in range(4)]


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0" * 3, length(10), length(10) + b"123", length(MAX_BYTES + 1), length(2**64 - 1) + b"x", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["nothing", "half a length", "no content", "half a content", "too much", "far too much", "another protocol"],
)
def test_a_peer_that_lies_or_vanishes_reaches_no_answer_and_harms_nobody(opened: Open, sent: bytes) -> None:
    asked: list[bytes] = []
    path = opened(lambda got: asked.append(got) or b"fine")
    with connected(path) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # how a door is closed on what was not read
            assert connection.recv(1) == b""
    assert asked == []
    assert ask(path, b"a", wait_seconds=WAIT) == b"fine"


def test_a_peer_that_does_not_wait_for_its_answer_harms_nobody(opened: Open) -> None:
    gone, answered = threading.Event(), threading.Event()

    def answer(question: bytes) -> bytes:
        if question == b"gone":
            assert gone.wait(WAIT)
            answered.set()
        return b"z" * 5_000_000

    path = opened(answer)
    with connected(path) as connection:
        connection.sendall(length(4) + b"gone")
    gone.set()
    assert answered.wait(WAIT)
    assert len(ask(path, b"a", wait_seconds=WAIT)) == 5_000_000


def test_an_error_of_the_daemon_closes_the_door_to_this_question_alone(opened: Open, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(question: bytes) -> bytes:
        if question == b"bad":
            raise ValueError("PATIENT TEXT")
        return b"fine"

    path = opened(answer)
    with pytest.raises(DoorClosedError) as closed:
        ask(path, b"bad", wait_seconds=WAIT)
    assert ask(path, b"a", wait_seconds=WAIT) == b"fine"
    assert "PATIENT" not in f"{closed.value}{capfd.readouterr()}"


def test_a_path_longer_than_a_socket_s_may_be(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 20) / ("name" * 20)
    folder.mkdir(parents=True)
    before = Path.cwd()
    path = opened(lambda got: got, folder / "daemon.sock")
    assert len(os.fsencode(path)) > 107
    assert Path.cwd() == before
    monkeypatch.chdir(folder)  # as the courier does
    assert ask(Path("daemon.sock"), b"a", wait_seconds=WAIT) == b"a"


def test_a_socket_of_an_earlier_life_is_replaced(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    assert ask(opened(lambda got: got, path), b"a", wait_seconds=WAIT) == b"a"


@pytest.mark.parametrize("before", ["nothing", "a socket of an earlier life"])
def test_a_daemon_that_starts_late_is_waited_for(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    path, tried = tmp_path / "daemon.sock", threading.Event()
    if before != "nothing":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
            dead.bind(str(path))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: tried.set() or threading.Event().wait(0.01))
    with ThreadPoolExecutor(max_workers=1) as asker:
        asked = asker.submit(ask, path, b"a", wait_seconds=WAIT)
        assert tried.wait(WAIT)  # it has knocked in vain
        opened(lambda got: got, path)
        assert asked.result(WAIT) == b"a"


def test_a_daemon_that_never_starts_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with pytest.raises(DoorClosedError, match="start the site"):
        ask(tmp_path / "daemon.sock", b"a", wait_seconds=0.0)


@pytest.mark.parametrize("said", [b"", length(5), length(5) + b"abc", length(MAX_BYTES + 1)], ids=["nothing", "a length", "half", "too much"])
def test_a_daemon_that_dies_in_the_middle_is_not_asked_again(tmp_path: Path, said: bytes) -> None:
    path, asked = tmp_path / "daemon.sock", []

    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as dying:
        dying.bind(str(path))
        dying.listen(8)
        dying.settimeout(WAIT)

        def live_once() -> None:
            connection, _ = dying.accept()
            with connection:
                asked.append(connection.recv(LENGTH_BYTES + 1, socket.MSG_WAITALL))
                connection.sendall(said)

        with ThreadPoolExecutor(max_workers=1) as daemon:
            life = daemon.submit(live_once)
            with pytest.raises(DoorClosedError, match="see the daemon's log"):
                ask(path, b"a", wait_seconds=WAIT)
            life.result(WAIT)
        dying.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody knocked again
            dying.accept()
    assert asked == [length(1) + b"a"]


@pytest.mark.slow
def test_200_mb_of_junk_are_taken_in_a_small_multiple_of_that(opened: Open) -> None:
    size, sizes = 200_000_000, []
    path = opened(lambda got: sizes.append(len(got)) or b"")
    junk = bytes(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ask(path, junk, wait_seconds=WAIT) == b""
    assert sizes == [size]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 3 * size


def test_questions_under_way_take_a_bounded_room_and_a_small_one_finds_some(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A courier in foreign hands opens many connections and fills each with as much as one question may be."""
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 5 * PIECE)
    hold, held = threading.Event(), threading.Barrier(3)

    def answer(question: bytes) -> bytes:
        if len(question) == 2 * PIECE:
            held.wait(WAIT)
            assert hold.wait(WAIT)
        return str(len(question)).encode()

    path = opened(answer)
    with ThreadPoolExecutor(max_workers=2) as askers:
        asked = [askers.submit(ask, path, bytes(2 * PIECE), wait_seconds=WAIT) for _ in range(2)]
        held.wait(WAIT)
        with connected(path) as greedy:
            greedy.sendall(length(2 * PIECE))
            with contextlib.suppress(ConnectionResetError):
                assert greedy.recv(1) == b""  # before any of it was taken
        assert ask(path, b"stop", wait_seconds=WAIT) == b"4"
        hold.set()
        assert {future.result(WAIT) for future in asked} == {str(2 * PIECE).encode()}
    assert ask(path, bytes(3 * PIECE), wait_seconds=WAIT) == str(3 * PIECE).encode()  # there is room again


def test_the_largest_message_fits_through_and_no_answer_is_no_record() -> None:
    assert MAX_MESSAGE_BYTES + 2 * MAX_JSON_BYTES < MAX_BYTES < 2**30
    with pytest.raises(DecodeError):
        RecordDict.FromString(NO_ANSWER)


def test_only_who_reaches_the_folder_reaches_the_socket(opened: Open, tmp_path: Path) -> None:
    assert door_folder(tmp_path) == tmp_path / "door"
    path = opened(lambda got: got)
    assert path.stat().st_mode & 0o777 == 0o666
