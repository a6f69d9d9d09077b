"""The ledger never says less than was spent, and no sequence of plans passes the limit, however they were chosen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client.account import Event, Reserve
from client.ledger import Ledger, PlannedStudy
from shared.errors import BudgetExhaustedError, LedgerError, ProtocolError, StorageError
from shared.plan import Limit
from shared.privacy import FILTER_ORDERS, PrivacyEvent, epsilon_of, filter_order, renyi_budget, renyi_divergence, renyi_epsilon

LIMIT = Limit(epsilon=3.0, delta=1e-4)
ROUND = PrivacyEvent(noise_multiplier=4.0, sample_rate=0.2, steps=10)
STUDY = PrivacyEvent(noise_multiplier=4.0, sample_rate=0.2, steps=30)  # epsilon 0.9, three rounds
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def planned(run: str = "run-1", training: PrivacyEvent = STUDY, **changes: Any) -> PlannedStudy:
    return PlannedStudy(**{"run": run, "study": "s", "study_hash": "0" * 64, "training": training, **changes})


def reservation(request: int = 0, event: PrivacyEvent = ROUND, run: str = "run-1", **changes: Any) -> Reserve:
    fields = {"run": run, "account": "training", "fold": 1, "round": 1, "request": f"{request:064x}", "event": Event.of(event), **changes}
    return Reserve.model_validate(fields)


def states(ledger: Ledger) -> list[tuple[bool, int]]:
    return [(charge.committed, charge.event.steps) for charge in ledger.charges()]


Opener = Callable[..., Ledger]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Opener]:
    """Opens a hospital's ledger; what was opened is closed after the test."""
    opened: list[Ledger] = []

    def make(
        name: str = "north", *, limit: Limit | None = LIMIT, signer: Ed25519PrivateKey | None = SIGNER, unit: str = "patient", cohort: str = ""
    ) -> Ledger:
        opened.append(Ledger(tmp_path / "ledgers" / f"{name}.sqlite", cohort=cohort or name, unit=unit, limit=limit, signer=signer))
        return opened[-1]

    yield make
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(begin: Opener) -> Ledger:
    """A hospital's ledger with one study admitted."""
    made = begin()
    made.admit(planned())
    return made


# A round --------------------------------------------------------------------------------------------------------------------------


def test_a_reservation_is_the_full_charge_and_a_commit_lowers_it(ledger: Ledger) -> None:
    row = ledger.reserve(reservation(), again=True)
    assert states(ledger) == [(False, 10)] and ledger.epsilon(1e-4) == epsilon_of([ROUND], 1e-4)
    ledger.commit(row, steps=4, update="a" * 64)
    assert states(ledger) == [(True, 4)] and ledger.epsilon(1e-4) < epsilon_of([ROUND], 1e-4)
    assert ledger.charges()[0].update == "a" * 64


@pytest.mark.parametrize("steps", [11, -1])
def test_a_commit_never_changes_a_charge_to_what_was_not_reserved(ledger: Ledger, steps: int) -> None:
    row = ledger.reserve(reservation(), again=True)
    with pytest.raises(LedgerError, match="expected a reservation of at least"):
        ledger.commit(row, steps=steps, update="a" * 64)
    with pytest.raises(LedgerError, match="expected a reservation of at least"):
        ledger.commit(row + 1, steps=1, update="a" * 64)
    assert states(ledger) == [(False, 10)]


def test_a_second_commit_changes_nothing(ledger: Ledger) -> None:
    row = ledger.reserve(reservation(), again=True)
    ledger.commit(row, steps=10, update="a" * 64)
    ledger.commit(row, steps=0, update="b" * 64)
    assert states(ledger) == [(True, 10)] and ledger.charges()[0].update == "a" * 64


def test_a_seeded_release_is_charged_once_and_one_with_fresh_noise_every_time(ledger: Ledger) -> None:
    first = ledger.reserve(reservation(1), again=False)
    assert ledger.reserve(reservation(1), again=False) == first and states(ledger) == [(False, 10)]
    assert ledger.reserve(reservation(1), again=True) != first and states(ledger) == [(False, 10), (False, 10)]


def test_a_plan_settles_its_rounds_and_no_more(ledger: Ledger) -> None:
    for number in range(3):
        ledger.reserve(reservation(number), again=True)
    with pytest.raises(BudgetExhaustedError, match=r"expected at most the 30 steps .* spare_rounds") as caught:
        ledger.reserve(reservation(9), again=True)
    assert caught.value.exit_code == 7 and len(states(ledger)) == 3


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (reservation(run="another"), ProtocolError),
        (reservation(event=PrivacyEvent(noise_multiplier=9.0, sample_rate=0.2, steps=10)), ProtocolError),
        (reservation(event=PrivacyEvent(noise_multiplier=4.0, sample_rate=0.1, steps=10)), ProtocolError),
        (reservation(account="evaluation"), ProtocolError),
        (reservation(event=PrivacyEvent(noise_multiplier=4.0, sample_rate=0.2, steps=31)), BudgetExhaustedError),
    ],
)
def test_nothing_is_reserved_but_what_was_admitted(ledger: Ledger, entry: Reserve, error: type[Exception]) -> None:
    with pytest.raises(error):
        ledger.reserve(entry, again=True)
    assert states(ledger) == []


# Between plans: the filter ---------------------------------------------------------------------------------------------------------


def test_plans_are_admitted_while_their_divergences_fit_and_a_refusal_is_written_once(begin: Opener) -> None:
    ledger = begin()
    order = filter_order(LIMIT.epsilon, LIMIT.delta)
    fit = int(renyi_budget(LIMIT.epsilon, order=order, delta=LIMIT.delta) / renyi_divergence(STUDY, order))
    for number in range(fit):
        ledger.admit(planned(f"run-{number}"))
    assert fit >= 3
    before = ledger.num_rows
    for _ in range(3):
        with pytest.raises(
            BudgetExhaustedError, match=r"expected at most epsilon 3 at delta 0.0001 .*spent [23].*, with the whole study 3"
        ) as caught:
            ledger.check_room(planned("one more"))
    assert caught.value.exit_code == 7 and ledger.num_rows == before + 1 and [entry.run for entry in ledger.account.refused] == ["one more"]
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(planned("one more"))
    raised = begin(limit=Limit(epsilon=5.0, delta=1e-4))  # the hospital may raise its limit
    raised.admit(planned("one more"))


def test_a_closed_plan_counts_what_it_was_charged_and_an_open_one_in_full(ledger: Ledger) -> None:
    order = filter_order(LIMIT.epsilon, LIMIT.delta)
    full = ledger.account.divergence("training")
    assert full == renyi_divergence(STUDY, order)
    ledger.reserve(reservation(), again=True)
    assert ledger.account.divergence("training") == full
    ledger.close_plan("run-1")
    assert ledger.account.divergence("training") == pytest.approx(renyi_divergence(ROUND, order))
    with pytest.raises(ProtocolError, match="or has closed"):
        ledger.reserve(reservation(2), again=True)
    ledger.admit(planned())  # a run that goes on is admitted again, with what it was charged
    assert ledger.account.divergence("training") == full and states(ledger) == [(False, 10)]


def test_an_admitted_study_is_admitted_once_and_its_name_is_its_own(ledger: Ledger) -> None:
    rows = ledger.num_rows
    ledger.admit(planned())
    assert ledger.num_rows == rows
    for other in (
        planned(training=ROUND),
        planned(study_hash="1" * 64),
        planned(evaluation=PrivacyEvent(noise_multiplier=9.0, sample_rate=1.0, steps=1)),
    ):
        with pytest.raises(ProtocolError, match="got that of a run with another study"):
            ledger.admit(other)


noises = st.sampled_from([1.5, 2.0, 4.0, 8.0])


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.tuples(noises, st.integers(1, 60), st.integers(0, 3), st.booleans(), st.booleans()), min_size=3, max_size=10))
def test_no_sequence_of_plans_passes_the_limit(tmp_path_factory: pytest.TempPathFactory, plans: list[tuple[float, int, int, bool, bool]]) -> None:
    """Any plans, some cut short, some closed: what was charged stays within the limit by the composition of everything."""
    ledger = Ledger(tmp_path_factory.mktemp("l") / "l.sqlite", cohort="c", unit="patient", limit=LIMIT, signer=SIGNER)
    for number, (noise, steps, rounds, commit, close) in enumerate(plans):
        event = PrivacyEvent(noise_multiplier=noise, sample_rate=0.3, steps=steps)
        run = f"run-{number}"
        try:
            ledger.admit(planned(run, PrivacyEvent(noise_multiplier=noise, sample_rate=0.3, steps=steps * 3)))
        except BudgetExhaustedError:
            continue
        for index in range(rounds):
            row = ledger.reserve(reservation(index, event, run), again=True)
            if commit:
                ledger.commit(row, steps=steps // 2, update="a" * 64)
        if close:
            ledger.close_plan(run)
        assert ledger.epsilon(LIMIT.delta) <= LIMIT.epsilon * (1 + 1e-9)
        assert ledger.epsilon(LIMIT.delta) <= ledger.epsilon_filter(LIMIT) * 1.0011  # PLD is rounded up by its grid
    ledger.close()


def test_test_patients_have_a_budget_of_their_own_until_sides_mix(begin: Opener) -> None:
    """A study that fills one account leaves the other free; a cross-validation puts everybody on both sides."""
    order = filter_order(LIMIT.epsilon, LIMIT.delta)
    budget = renyi_budget(LIMIT.epsilon, order=order, delta=LIMIT.delta)
    noise = (order / (2 * 0.7 * budget)) ** 0.5  # seven tenths of the budget
    most = PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)
    apart = begin("apart")
    apart.admit(planned(training=most, evaluation=most))
    with pytest.raises(BudgetExhaustedError, match="evaluation patients"):
        apart.admit(planned("run-2", training=PrivacyEvent(noise_multiplier=1e4, sample_rate=1.0, steps=1), evaluation=most))
    mixed = begin("mixed")
    with pytest.raises(BudgetExhaustedError):
        mixed.admit(planned(training=most, evaluation=most, cross_validated=True))
    moved = begin("moved")
    moved.bind_patients([b"a" * 32, b"b" * 32], test=[True, False], merged=False)
    assert not moved.account.merged
    moved.bind_patients([b"a" * 32, b"b" * 32], test=[False, False], merged=False)
    assert moved.account.merged
    with pytest.raises(BudgetExhaustedError):
        moved.admit(planned(training=most, evaluation=most))


def test_evaluations_compose_and_by_the_bound_that_holds_for_discrete_noise(begin: Opener) -> None:
    ledger = begin()
    release = PrivacyEvent(noise_multiplier=8.0, sample_rate=1.0, steps=1)
    epsilons = []
    for number in range(3):
        ledger.admit(planned(f"run-{number}", evaluation=release))
        ledger.reserve(reservation(number, release, f"run-{number}", account="evaluation"), again=True)
        epsilons.append(ledger.epsilon(1e-4, "evaluation"))
    assert epsilons[0] < epsilons[1] < epsilons[2] and ledger.epsilon(1e-4) == 0
    for count, epsilon in enumerate(epsilons, start=1):
        divergences = [(order, count * order / (2 * 8.0**2)) for order in FILTER_ORDERS]
        best = min(renyi_epsilon(value, order=order, delta=1e-4) for order, value in divergences)
        assert epsilon_of([release] * count, 1e-4) < epsilon == pytest.approx(best, rel=5e-3)


def test_charges_compose_over_studies(ledger: Ledger) -> None:
    other = PrivacyEvent(noise_multiplier=9.0, sample_rate=0.5, steps=20)
    ledger.admit(planned("run-2", other))
    ledger.reserve(reservation(1), again=True)
    ledger.reserve(reservation(2, other, "run-2"), again=True)
    assert ledger.epsilon(1e-4) == epsilon_of([ROUND, other], 1e-4) > max(epsilon_of([ROUND], 1e-4), epsilon_of([other], 1e-4))
    assert ledger.charged("run-2") == [other]


def test_a_simulations_ledger_keeps_plans_but_no_limit(begin: Opener) -> None:
    quick = begin("virtual", limit=None, signer=None)
    quick.admit(planned(training=PrivacyEvent(noise_multiplier=0.5, sample_rate=0.5, steps=100)))
    quick.reserve(reservation(event=PrivacyEvent(noise_multiplier=0.5, sample_rate=0.5, steps=100)), again=False)
    assert quick.epsilon(1e-4) > 100
    with pytest.raises(BudgetExhaustedError):
        quick.reserve(reservation(1, PrivacyEvent(noise_multiplier=0.5, sample_rate=0.5, steps=1)), again=False)


# Whose ledger ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "unit"), [("south", "patient"), ("north", "record")])
def test_a_ledger_of_another_cohort_or_unit_is_refused(begin: Opener, ledger: Ledger, cohort: str, unit: str) -> None:
    with pytest.raises(LedgerError, match=r"expected the ledger of cohort .* got that of 'north' \(add or remove one patient\)"):
        begin("north", cohort=cohort, unit=unit)


def test_a_ledger_of_another_key_is_refused(begin: Opener, ledger: Ledger) -> None:
    for signer in (Ed25519PrivateKey.generate(), None):
        with pytest.raises(LedgerError, match="expected a ledger signed with this site's key"):
            begin("north", signer=signer)


def test_a_restart_finds_what_was_charged(begin: Opener, ledger: Ledger) -> None:
    ledger.reserve(reservation(), again=True)
    head, path = ledger.head, ledger.path
    ledger.close()
    again = begin()
    assert states(again) == [(False, 10)] and again.head == head
    reader = Ledger.read(path)
    assert reader.epsilon(1e-4) == epsilon_of([ROUND], 1e-4)
    with pytest.raises(StorageError, match="readonly"):
        reader.reserve(reservation(2), again=True)
    reader.close()


def test_a_ledger_stays_with_its_patients(ledger: Ledger) -> None:
    """Cohorts grow and shrink; one without a single known patient is another population, and another ledger's."""
    for names in ("ab", "bc", "c"):
        ledger.bind_patients([name.encode() * 32 for name in names], test=[False] * len(names), merged=False)
    with pytest.raises(LedgerError, match="expected the patients that this ledger was begun with, got none of them"):
        ledger.bind_patients([b"x" * 32], test=[False], merged=False)
    ledger.bind_patients([b"a" * 32, b"x" * 32], test=[False, False], merged=False)
    assert ledger.patients() == {letter * 32 for letter in (b"a", b"b", b"c", b"x")}


def test_a_new_name_for_a_cohort_resets_nothing(begin: Opener, ledger: Ledger) -> None:
    """Ledgers of one site lie side by side under one key: a patient is in one of them."""
    ledger.bind_patients([b"a" * 32, b"b" * 32], test=[False, True], merged=False)
    renamed = begin("north-2026")
    with pytest.raises(LedgerError, match="expected patients of no other ledger, got some that are in that of cohort 'north'"):
        renamed.bind_patients([b"b" * 32, b"c" * 32], test=[False, False], merged=False)
    renamed.bind_patients([b"c" * 32], test=[False], merged=False)


def test_a_place_that_cannot_hold_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "ledger.sqlite", tmp_path):
        with pytest.raises(StorageError, match="check free space and permissions"):
            Ledger(path, cohort="c", unit="patient")
