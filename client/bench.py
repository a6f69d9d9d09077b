"""The one place where work is done at a site: one thread, one piece of work at a time, and never a stale one.

Ledgers are SQLite files of one thread, and a hospital's machine has one accelerator, so all studies take turns. Work for a run is
cancelled by a newer question of the same run, by a stop, and by its own deadline; the same question twice is one piece of work.
"""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.errors import StaleWorkError

T = TypeVar("T")
MAX_WAITING = 8  # questions at once, over all runs


class AskedAgainError(Exception):
    """The same question was asked again so often that this asking is let go; a later one gets the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a run a question stands: later ones make earlier ones stale."""

    run: str
    fold: int = 0
    round: int = 0
    closing: bool = False  # evaluation after the last round

    @property
    def order(self) -> tuple[int, bool, int]:
        """Grows along a run."""
        return self.fold, self.closing, self.round


@dataclass(slots=True, kw_only=True)
class _Work(Generic[T]):
    place: Place
    content: str  # what is asked, as a hash
    deadline: float
    make: Callable[[], T] | None  # None once it has begun, or nobody waits any more
    waiting: list[Future[T]] = field(default_factory=list)  # one for each asking, oldest first
    cancelled: threading.Event = field(default_factory=threading.Event)


class Bench(Generic[T]):
    """Runs work one after another. `check_wanted` is to be called often by what runs; it raises `StaleWorkError` where nobody waits for it any more."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bench")
        self._lock = threading.Lock()
        self._works: list[_Work[T]] = []  # waiting and under way
        self._current: _Work[T] | None = None
        self._closed = False

    def do(self, place: Place, content: str, make: Callable[[], T], *, seconds: float) -> T:
        """What `make()` gives, run on the bench's thread once it is its turn.

        Args:
            content: names the question; the same one, asked again while it is under way, waits for the same result.
            seconds: after so long it is stale, and nobody waits any more, not even for work that does not ask whether it is still wanted.

        At most `MAX_WAITING` wait at once, so that there is always room for a newer question: first the oldest asking of what was asked several times
        is let go, and where there is no such, the oldest question of all.

        Raises:
            StaleWorkError: it was cancelled, its time is over, or too many wait.
            AskedAgainError: a later asking of the same waits in its place.
            whatever `make` raises.
        """
        deadline, answer = time.monotonic() + seconds, Future[T]()
        with self._lock:
            known = next((work for work in self._works if (work.place, work.content) == (place, content) and not work.cancelled.is_set()), None)
            if known is None:
                for work in self._works:
                    if work.place.run == place.run and work.place.order < place.order:
                        work.cancelled.set()
                known = _Work(place=place, content=content, deadline=deadline, make=make)
                self._works.append(known)
                self._thread.submit(self._run, known)
            known.deadline = max(known.deadline, deadline)
            self._make_room()
            known.waiting.append(answer)
        try:
            return answer.result(timeout=seconds)
        except TimeoutError:
            with self._lock:
                if not answer.done():
                    self._let_go(known, answer)
            if answer.done():  # its own error, or it has ended just now
                return answer.result()
            raise StaleWorkError("expected an answer before the deadline, got none") from None

    def _make_room(self) -> None:
        """Let one go where as many wait as may; the lock is held."""
        works = [work for work in self._works if work.waiting]
        if sum(len(work.waiting) for work in works) < MAX_WAITING:
            return
        repeated = next((work for work in works if len(work.waiting) > 1), None)
        work = repeated or works[0]
        answer = work.waiting[0]
        self._let_go(work, answer)
        answer.set_exception(AskedAgainError() if repeated else StaleWorkError("expected fewer questions at once; newer ones came"))

    @staticmethod
    def _let_go(work: _Work[T], answer: Future[T]) -> None:
        """Nobody waits for it here any more; and where nobody does at all, it is not begun. The lock is held."""
        work.waiting.remove(answer)
        if not work.waiting:
            work.cancelled.set()
            work.make = None

    def cancel(self, run: str) -> None:
        """Nothing of `run` goes on, from its next step on."""
        with self._lock:
            for work in self._works:
                if work.place.run == run:
                    work.cancelled.set()

    def check_wanted(self) -> None:
        """Return where the work under way is still wanted; to be called on the bench's thread.

        Raises:
            StaleWorkError: it is not.
        """
        work = self._current
        if work is not None and (work.cancelled.is_set() or time.monotonic() > work.deadline):
            raise StaleWorkError("expected work that is still wanted; a newer task, a stop or the deadline came first")

    @property
    def at(self) -> Place | None:
        """Where the work under way stands."""
        work = self._current
        return None if work is None else work.place

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Cancel everything, do `last` on the bench's thread (a ledger is of one thread), and wait until it has ended; once."""
        with self._lock:
            for work in self._works:
                work.cancelled.set()
            if self._closed:
                return
            self._closed = True
            closing = self._thread.submit(last)
        self._thread.shutdown(wait=True)
        closing.result()

    def _run(self, work: _Work[T]) -> None:
        self._current = work
        try:
            self.check_wanted()
            make, work.make = work.make, None
            if make is None:
                raise StaleWorkError("expected work that somebody waits for")
            result = make()
        except BaseException as error:  # handed to whoever waits
            self._end(work, functools.partial(Future.set_exception, exception=error))
        else:
            self._end(work, functools.partial(Future.set_result, result=result))

    def _end(self, work: _Work[T], tell: Callable[[Future[T]], None]) -> None:
        self._current = None
        with self._lock:
            self._works.remove(work)
            for answer in work.waiting:
                tell(answer)
