"""The ledger never says less than was spent: whatever crashes, repeats, races or is damaged."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Ledger, Limit, Spend
from shared.errors import BudgetExhaustedError, LedgerError, StorageError
from shared.privacy import PrivacyEvent, epsilon_of

ROOT = Path(__file__).parents[2]
LIMIT = Limit(epsilon=3.0, delta=1e-4)
EVENT = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.2, steps=10)


def spend(release: str, event: PrivacyEvent = EVENT, run: str = "run-1") -> Spend:
    return Spend(release=release, run=run, study="s", fold=1, round=1, event=event)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "state" / "ledger.sqlite", cohort="north/tiny", unit="patient")
    yield opened
    opened.close()


def fill(ledger: Ledger, event: PrivacyEvent = EVENT, *, run: str = "run-1", limit: Limit = LIMIT) -> int:
    """Reserve rounds until there is no room, each planned as itself; how many there were."""
    for number in range(10_000):
        try:
            ledger.reserve(spend(f"{run}-{event.noise_multiplier}-{number}", event, run), limit, planned=event)
        except BudgetExhaustedError:
            return number
    raise AssertionError("the ledger has no end")


def test_a_reservation_is_the_full_charge_and_a_commit_lowers_it(ledger: Ledger) -> None:
    ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    assert [(item.state, item.event.steps) for item in ledger.spends()] == [("reserved", 10)]
    assert ledger.epsilon(1e-4) == epsilon_of([EVENT], 1e-4)
    ledger.commit("a", steps=4)
    assert [(item.state, item.event.steps) for item in ledger.spends()] == [("committed", 4)]
    assert ledger.epsilon(1e-4) < epsilon_of([EVENT], 1e-4)


@pytest.mark.parametrize("steps", [11, -1])
def test_a_commit_never_changes_a_charge_to_what_was_not_reserved(ledger: Ledger, steps: int) -> None:
    ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    with pytest.raises(LedgerError, match="expected a reservation of at least"):
        ledger.commit("a", steps=steps)
    with pytest.raises(LedgerError, match="got none"):
        ledger.commit("b", steps=1)
    assert ledger.spends()[0].event == EVENT


def test_a_commit_needs_no_room(ledger: Ledger) -> None:
    """After training there is no way back: a commit asks neither limit nor accountant, even in a ledger that is full."""
    reserved = fill(ledger)
    for number in range(reserved):
        ledger.commit(f"run-1-2.0-{number}", steps=10)
    assert {item.state for item in ledger.spends()} == {"committed"}


def test_the_limit_is_never_passed_and_a_refusal_writes_nothing(ledger: Ledger) -> None:
    reserved = fill(ledger)
    events = [EVENT] * reserved
    assert epsilon_of(events, LIMIT.delta) <= LIMIT.epsilon < epsilon_of([*events, EVENT], LIMIT.delta)
    before = ledger.spends()
    with pytest.raises(BudgetExhaustedError, match=r"expected at most epsilon 3 at delta 0.0001 on this cohort; spent 2.*, with this 3") as caught:
        ledger.reserve(spend("one more"), LIMIT, planned=EVENT)
    assert caught.value.exit_code == 7 and ledger.spends() == before
    ledger.reserve(spend("one more"), Limit(epsilon=9.0, delta=1e-4), planned=EVENT)  # the hospital may raise its limit


def test_the_same_release_is_no_new_charge(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    ledger.commit("a", steps=10)
    ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    ledger.commit("a", steps=10)
    assert [item.event for item in ledger.spends()] == [EVENT]


def test_spends_compose_over_studies(ledger: Ledger) -> None:
    other = PrivacyEvent(noise_multiplier=5.0, sample_rate=0.5, steps=20)
    ledger.reserve(spend("a", run="first"), LIMIT, planned=EVENT)
    ledger.reserve(spend("b", other, run="second"), LIMIT, planned=other)
    assert ledger.epsilon(1e-4) == epsilon_of([EVENT, other], 1e-4) > max(epsilon_of([EVENT], 1e-4), epsilon_of([other], 1e-4))
    assert [item.run for item in ledger.spends()] == ["first", "second"]


def test_a_plan_within_the_limit_settles_its_rounds_and_no_more(ledger: Ledger) -> None:
    planned = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.2, steps=50)
    limit = Limit(epsilon=epsilon_of([planned], 1e-4), delta=1e-4)
    for number in range(5):
        ledger.reserve(spend(f"round-{number}"), limit, planned=planned)
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(spend("round-5"), limit, planned=planned)


def test_a_run_that_names_itself_after_another_is_charged_for_both(ledger: Ledger) -> None:
    """A coordinator chooses the run's name. With another mechanism under an old name, the old charge must still count."""
    reserved = fill(ledger, EVENT)
    quiet = PrivacyEvent(noise_multiplier=20.0, sample_rate=0.2, steps=10)
    planned = PrivacyEvent(noise_multiplier=20.0, sample_rate=0.2, steps=2000)
    assert epsilon_of([planned], 1e-4) < LIMIT.epsilon < epsilon_of([EVENT] * reserved + [planned], 1e-4)
    for number in range(200):
        try:
            ledger.reserve(spend(f"again-{number}", quiet, "run-1"), LIMIT, planned=planned)
        except BudgetExhaustedError:
            break
    assert ledger.epsilon(LIMIT.delta) <= LIMIT.epsilon * (1 + 1e-9)


@settings(max_examples=6)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([2.0, 4.0]), st.integers(1, 40), st.integers(1, 400), st.booleans()),
        min_size=3, max_size=8,
    )
)  # fmt: skip
def test_no_order_of_requests_passes_the_limit(tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, float, int, int, bool]]) -> None:
    """Any runs, mechanisms, plans (true or boasting), with commits between."""
    ledger = Ledger(tmp_path_factory.mktemp("l") / "ledger.sqlite", cohort="c", unit="patient", durable=False)
    for number, (run, noise, steps, planned_steps, commit) in enumerate(requests):
        event = PrivacyEvent(noise_multiplier=noise, sample_rate=0.3, steps=steps)
        planned = PrivacyEvent(noise_multiplier=noise, sample_rate=0.3, steps=planned_steps)
        try:
            ledger.reserve(spend(f"{number}", event, run), LIMIT, planned=planned)
        except BudgetExhaustedError:
            continue
        if commit:
            ledger.commit(f"{number}", steps=steps // 2)
        assert ledger.epsilon(LIMIT.delta) <= LIMIT.epsilon * (1 + 1e-9)
    ledger.close()


@pytest.mark.parametrize(("cohort", "unit"), [("south/tiny", "patient"), ("north/tiny", "record")])
def test_a_ledger_of_another_cohort_or_unit_is_refused(ledger: Ledger, tmp_path: Path, cohort: str, unit: str) -> None:
    with pytest.raises(LedgerError, match=r"expected the ledger of cohort .* got that of 'north/tiny' \(add or remove one patient\)"):
        Ledger(tmp_path / "state" / "ledger.sqlite", cohort=cohort, unit=unit)
    assert Ledger(tmp_path / "state" / "ledger.sqlite", cohort="north/tiny", unit="patient").spends() == []


def test_a_restart_finds_what_was_charged(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    ledger.close()
    again = Ledger(tmp_path / "state" / "ledger.sqlite", cohort="north/tiny", unit="patient")
    assert [item.event for item in again.spends()] == [EVENT]
    again.close()
    reader = Ledger.read(tmp_path / "state" / "ledger.sqlite")
    assert reader.epsilon(1e-4) == epsilon_of([EVENT], 1e-4)
    with pytest.raises(StorageError, match="readonly"):
        reader.reserve(spend("b"), LIMIT, planned=EVENT)
    reader.close()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_bytes(b"not a database" * 500),
    "header": lambda path: overwrite(path, 0, b"\0" * 16),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "pages": lambda path: overwrite(path, 4096, b"\xff" * 8192),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_never_taken_for_an_empty_one(ledger: Ledger, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    for number in range(30):
        ledger.reserve(spend(f"{number}", PrivacyEvent(noise_multiplier=9.0, sample_rate=0.01, steps=1)), LIMIT, planned=EVENT)
    ledger.close()  # the write-ahead log is folded into the file
    DAMAGE[damage](path)
    with pytest.raises(LedgerError, match=r"damaged.*restore it from backup") as caught:
        Ledger(path, cohort="north/tiny", unit="patient").reserve(spend("new"), LIMIT, planned=EVENT)
    assert caught.value.code == "E104"


@pytest.mark.parametrize("change", ["noise_multiplier = 0", "noise_multiplier = 'much'", "sample_rate = 2", "steps = -5", "noise_multiplier = 1e999"])
def test_a_row_that_is_no_event_is_damage(ledger: Ledger, tmp_path: Path, change: str) -> None:
    ledger.reserve(spend("a"), LIMIT, planned=EVENT)
    with sqlite3.connect(tmp_path / "state" / "ledger.sqlite") as database:
        database.execute(f"UPDATE spend SET {change}")
    database.close()
    with pytest.raises(LedgerError, match="damaged"):
        ledger.reserve(spend("b"), LIMIT, planned=EVENT)
    with pytest.raises(LedgerError, match="damaged"):
        ledger.epsilon(1e-4)


def test_a_place_that_cannot_hold_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "ledger.sqlite", tmp_path):
        with pytest.raises(StorageError, match="check free space and permissions"):
            Ledger(path, cohort="c", unit="patient")


def test_a_ledger_stays_with_its_patients(ledger: Ledger) -> None:
    """Cohorts grow and shrink; one without a single known patient is another population, and another ledger's."""
    ledger.bind_patients([b"a" * 32, b"b" * 32])
    ledger.bind_patients([b"b" * 32, b"c" * 32])
    ledger.bind_patients([b"c" * 32])
    with pytest.raises(LedgerError, match="expected the patients that this ledger was begun with, got none of them"):
        ledger.bind_patients([b"x" * 32])
    ledger.bind_patients([b"a" * 32, b"x" * 32])


def test_a_simulations_ledger_is_a_ledger(tmp_path: Path) -> None:
    quick = Ledger(tmp_path / "ledger.sqlite", cohort="virtual", unit="patient", durable=False)
    assert fill(quick) > 0
    with pytest.raises(BudgetExhaustedError):
        quick.check_room(EVENT, LIMIT)
    quick.close()


# Other processes ------------------------------------------------------------------------------------------------------------------

SPENDER = """
import sys
from pathlib import Path
from client.ledger import Ledger, Limit, Spend
from shared.errors import BudgetExhaustedError
from shared.privacy import PrivacyEvent
event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.2, steps=10)
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(Path(sys.argv[1]), cohort="c", unit="patient")
count = 0
try:
    while True:
        spend = Spend(release=f"{sys.argv[2]}-{count}", run=sys.argv[2], study="s", fold=1, round=1, event=event)
        ledger.reserve(spend, Limit(epsilon=3.0, delta=1e-4), planned=event)
        count += 1
except BudgetExhaustedError:
    print(count)
"""

OPENERS = """
import multiprocessing, sys
from pathlib import Path
from client.ledger import Ledger

def open_one(path, gate, answers):
    gate.wait()
    try:
        Ledger(path, cohort="c", unit="patient")
        answers.put("opened")
    except Exception as error:
        answers.put(repr(error))

context = multiprocessing.get_context("fork")
for number in range(40):
    gate, answers = context.Barrier(4), context.Queue()
    openers = [context.Process(target=open_one, args=(Path(sys.argv[1]) / f"{number}.sqlite", gate, answers)) for _ in range(4)]
    for opener in openers:
        opener.start()
    print(*sorted({answers.get() for _ in openers}), sep="; ")
    for opener in openers:
        opener.join()
"""

CRASHER = """
import os, signal, sys
from pathlib import Path
from client.ledger import Ledger, Limit, Spend
from shared.privacy import PrivacyEvent
event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.2, steps=10)
ledger = Ledger(Path(sys.argv[1]), cohort="c", unit="patient", durable=sys.argv[2] == "durable")
ledger.reserve(Spend(release="a", run="r", study="s", fold=1, round=1, event=event), Limit(epsilon=3.0, delta=1e-4), planned=event)
if sys.argv[3] == "in a transaction":
    ledger._database.execute("BEGIN IMMEDIATE")
    ledger._database.execute("DELETE FROM spend")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_together_cannot_overspend(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, str(path), name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two", "three")
    ]
    for spender in spenders:
        assert spender.stdout is not None and spender.stdout.readline() == "ready\n"
    for spender in spenders:  # all start at once, also with making the file
        assert spender.stdin is not None
        spender.stdin.write("\n")
        spender.stdin.flush()
    counts = [int(spender.communicate(timeout=120)[0]) for spender in spenders]
    ledger = Ledger.read(path)
    total = len(ledger.spends())
    assert sum(counts) == total and ledger.epsilon(1e-4) <= 3.0 < epsilon_of([EVENT] * (total + 1), 1e-4)
    ledger.close()


@pytest.mark.slow
def test_processes_that_begin_one_ledger_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Without waiting, one in twelve of these 40 begins ended in 'database is locked'."""
    done = subprocess.run([sys.executable, "-c", OPENERS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert set(done.stdout.splitlines()) == {"opened"}


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["durable", "simulation"])
@pytest.mark.parametrize("moment", ["after reserving", "in a transaction"])
def test_a_killed_process_leaves_the_charge(tmp_path: Path, durability: str, moment: str) -> None:
    path = tmp_path / "ledger.sqlite"
    crashed = subprocess.run([sys.executable, "-c", CRASHER, str(path), durability, moment], cwd=ROOT, capture_output=True, check=False)
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr
    ledger = Ledger(path, cohort="c", unit="patient")
    assert [(item.release, item.state, item.event) for item in ledger.spends()] == [("a", "reserved", EVENT)]
    ledger.reserve(spend("a", run="r"), LIMIT, planned=EVENT)  # the same release again: the crashed round is repeated, charged once
    ledger.commit("a", steps=10)
    assert [(item.state, item.event) for item in ledger.spends()] == [("committed", EVENT)]
    ledger.close()
