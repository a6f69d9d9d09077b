"""One piece of work at a time, and never one that nobody waits for any more. Every wait here is for an event, and bounded."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from client.bench import MAX_WAITING, AskedAgainError, Bench, Place
from shared.errors import BudgetExhaustedError, StaleWorkError

WAIT = 8.0  # longer than any test takes; a test that waits so long has failed
ROUND = Place(run="run", fold=1, round=1)


class Step:
    """Work that says when it has begun, and goes on only when told; it asks at every turn whether it is still wanted."""

    def __init__(self, bench: Bench[str], name: str = "done") -> None:
        self.bench, self.name = bench, name
        self.begun, self.go = threading.Event(), threading.Event()
        self.times = 0

    def __call__(self) -> str:
        self.times += 1
        self.begun.set()
        while not self.go.wait(0.005):
            self.bench.check_wanted()
        self.bench.check_wanted()
        return self.name


@pytest.fixture
def bench() -> Iterator[Bench[str]]:
    made: Bench[str] = Bench()
    yield made
    made.close()


@pytest.fixture
def ask(bench: Bench[str]) -> Iterator[Callable[..., Future[str]]]:
    """Ask the bench in a thread of its own."""
    with ThreadPoolExecutor(max_workers=8) as askers:
        yield lambda place, make, content="q", seconds=WAIT: askers.submit(bench.do, place, content, make, seconds=seconds)


def begun(step: Step) -> None:
    assert step.begun.wait(WAIT)


def test_what_is_made_comes_back_and_is_made_on_one_thread(bench: Bench[str]) -> None:
    names = {bench.do(Place(run=run), "q", lambda: threading.current_thread().name, seconds=WAIT) for run in "abc"}
    assert len(names) == 1
    assert threading.current_thread().name not in names


LATER = [Place(run="run", fold=1, round=2), Place(run="run", fold=1, round=1, closing=True), Place(run="run", fold=2, round=0)]


@pytest.mark.parametrize("later", LATER, ids=["round", "closing", "fold"])
def test_a_newer_question_of_the_run_ends_an_older_one(bench: Bench[str], ask: Callable[..., Future[str]], later: Place) -> None:
    old, new = Step(bench), Step(bench, "new")
    first = ask(ROUND, old)
    begun(old)
    second = ask(later, new)
    with pytest.raises(StaleWorkError):
        first.result(WAIT)
    begun(new)
    assert bench.at == later
    new.go.set()
    assert second.result(WAIT) == "new"


@pytest.mark.parametrize("other", [Place(run="other", fold=1, round=9), Place(run="run", fold=1, round=0), Place(run="run")])
def test_neither_another_run_nor_an_older_question_ends_it(bench: Bench[str], ask: Callable[..., Future[str]], other: Place) -> None:
    current = Step(bench)
    first = ask(ROUND, current)
    begun(current)
    second = ask(other, lambda: "second")
    current.go.set()
    assert first.result(WAIT) == "done"
    assert second.result(WAIT) == "second"


def test_the_order_of_places_is_that_of_a_run() -> None:
    run = [Place(run="r"), Place(run="r", fold=1, round=1), Place(run="r", fold=1, round=2), Place(run="r", fold=1, round=2, closing=True),
           Place(run="r", fold=2, round=1), Place(run="r", fold=2, round=2, closing=True)]  # fmt: skip
    assert sorted(run, key=lambda place: place.order) == run
    assert len({place.order for place in run}) == len(run)


def test_a_stop_ends_what_is_under_way_and_what_waits_of_this_run_alone(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    current = Step(bench)
    first = ask(ROUND, current)
    begun(current)
    waiting = Step(bench)
    second, third = ask(ROUND, waiting, "another"), ask(Place(run="other"), lambda: "third")
    # The second stands in the queue or is just about to: a stop reaches what is there, so it is repeated until it has.
    while not first.done() or not second.done():
        bench.cancel("run")
        threading.Event().wait(0.005)
    assert third.result(WAIT) == "third"
    for future in (first, second):
        with pytest.raises(StaleWorkError):
            future.result(WAIT)


def test_after_a_stop_the_same_question_is_new_work(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    old = Step(bench)
    first = ask(ROUND, old)
    begun(old)
    bench.cancel("run")
    assert ask(ROUND, lambda: "again").result(WAIT) == "again"
    with pytest.raises(StaleWorkError):
        first.result(WAIT)


def test_the_deadline_ends_it(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    with pytest.raises(StaleWorkError):
        ask(ROUND, Step(bench), seconds=0.05).result(WAIT)
    assert ask(Place(run="other"), lambda: "free").result(WAIT) == "free"


def test_work_whose_time_is_over_before_its_turn_never_begins(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    current, late = Step(bench), Step(bench)
    first = ask(ROUND, current)
    begun(current)
    with pytest.raises(StaleWorkError):
        ask(Place(run="other"), late, seconds=0.05).result(WAIT)
    current.go.set()
    assert first.result(WAIT) == "done"
    bench.close()
    assert late.times == 0


def test_nobody_waits_beyond_the_deadline_for_work_that_hangs(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    released, hanging = threading.Event(), threading.Event()

    def hang() -> str:
        hanging.set()
        assert released.wait(WAIT)
        return "late"

    stuck = ask(ROUND, hang, seconds=0.05)
    assert hanging.wait(WAIT)
    behind = ask(Place(run="other"), lambda: "never", seconds=0.05)
    for future in (stuck, behind):
        with pytest.raises(StaleWorkError):
            future.result(WAIT)
    released.set()
    assert ask(Place(run="third"), lambda: "goes on").result(WAIT) == "goes on"


def test_the_same_question_twice_is_one_piece_of_work(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    step, started = Step(bench), threading.Barrier(4)

    def same() -> str:
        started.wait(WAIT)
        return bench.do(ROUND, "q", step, seconds=WAIT)

    with ThreadPoolExecutor(max_workers=3) as askers:
        asked = [askers.submit(same) for _ in range(3)]
        started.wait(WAIT)
        begun(step)
        step.go.set()
        assert [future.result(WAIT) for future in asked] == ["done"] * 3
    assert step.times <= 3  # one that came after the end is made anew
    other = Step(bench)
    other.go.set()
    assert ask(ROUND, other, "another content").result(WAIT) == "done"
    assert other.times == 1


@pytest.mark.slow
def test_who_joins_with_more_time_gives_the_work_more_time(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    step = Step(bench)
    first = ask(ROUND, step, seconds=1.5)
    begun(step)
    second = ask(ROUND, step, seconds=WAIT)
    with pytest.raises(StaleWorkError):  # the one who asked first waits no longer
        first.result(WAIT)
    step.go.set()
    assert second.result(WAIT) == "done"
    assert step.times == 1


class OddError(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("error", [ValueError("odd"), BudgetExhaustedError("spent"), TimeoutError("of the work itself"), OddError(), SystemExit(3)])
def test_an_error_reaches_who_asked_and_nobody_else(bench: Bench[str], ask: Callable[..., Future[str]], error: BaseException) -> None:
    def fail() -> str:
        raise error

    hold = Step(bench)
    ask(Place(run="first"), hold)
    begun(hold)
    bad, good = ask(ROUND, fail), ask(Place(run="other"), lambda: "good")
    hold.go.set()
    assert good.result(WAIT) == "good"
    assert bad.exception(WAIT) is error
    assert bench.at is None


def test_close_ends_what_is_under_way(bench: Bench[str], ask: Callable[..., Future[str]]) -> None:
    step = Step(bench)
    asked = ask(ROUND, step)
    begun(step)
    bench.close()
    with pytest.raises(StaleWorkError):
        asked.result(WAIT)


def test_check_wanted_says_nothing_where_nothing_is_under_way(bench: Bench[str]) -> None:
    bench.check_wanted()
    assert bench.at is None


# Many questions ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(bench: Bench[str]) -> Iterator[Callable[..., Future[str]]]:
    """Ask in a thread of its own, and wait until the bench has taken the question."""
    with ThreadPoolExecutor(max_workers=4 * MAX_WAITING) as askers:

        def ask(place: Place, make: Callable[[], str], content: str = "q") -> Future[str]:
            before = waiting(bench)
            asked = askers.submit(bench.do, place, content, make, seconds=WAIT)
            while set(waiting(bench)) <= set(before) and not asked.done():
                threading.Event().wait(0.002)
            return asked

        yield ask


def waiting(bench: Bench[str]) -> list[Future[str]]:
    with bench._lock:
        return [answer for work in bench._works for answer in work.waiting]


def test_who_asks_the_same_again_and_again_lets_go_of_the_oldest_asking(bench: Bench[str], many: Callable[..., Future[str]]) -> None:
    step = Step(bench)
    asked = [many(ROUND, step) for _ in range(3 * MAX_WAITING)]
    for old in asked[: 2 * MAX_WAITING]:
        assert isinstance(old.exception(WAIT), AskedAgainError)
    other = many(Place(run="other"), lambda: "other")
    assert isinstance(asked[2 * MAX_WAITING].exception(WAIT), AskedAgainError)
    step.go.set()
    assert [future.result(WAIT) for future in asked[2 * MAX_WAITING + 1 :]] == ["done"] * (MAX_WAITING - 1)
    assert other.result(WAIT) == "other"
    assert step.times == 1


def test_of_many_different_questions_the_oldest_ends(bench: Bench[str], many: Callable[..., Future[str]]) -> None:
    steps = [Step(bench, str(number)) for number in range(MAX_WAITING + 2)]
    asked = [many(Place(run=f"run-{number}"), step) for number, step in enumerate(steps)]
    for old in asked[:2]:
        assert isinstance(old.exception(WAIT), StaleWorkError)
    for number, step in enumerate(steps[2:], start=2):
        step.go.set()
        assert asked[number].result(WAIT) == str(number)
    assert steps[1].times == 0  # nobody waited for it by its turn


def test_a_repeated_question_goes_before_one_that_was_asked_once(bench: Bench[str], many: Callable[..., Future[str]]) -> None:
    hold = Step(bench)
    first = many(Place(run="first"), hold)
    begun(hold)
    repeated = [many(ROUND, lambda: "twice") for _ in range(MAX_WAITING - 1)]
    last = many(Place(run="last"), lambda: "last")
    assert isinstance(repeated[0].exception(WAIT), AskedAgainError)
    hold.go.set()
    assert first.result(WAIT) == "done"
    assert {future.result(WAIT) for future in repeated[1:]} == {"twice"}
    assert last.result(WAIT) == "last"
