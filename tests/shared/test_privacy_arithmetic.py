"""Epsilon and noise against closed forms, published-style numbers, another accountant, and the laws that any epsilon obeys."""

import itertools
import math
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr

from shared.errors import ConfigurationError
from shared.privacy import (
    MIN_NOISE_MULTIPLIER,
    PrivacyEvent,
    _bracket,
    _least_noise,
    default_delta,
    epsilon_of,
    merge_events,
    sample_rate_of,
    solve_noise_multiplier,
    steps_per_round,
)

DELTA = 1e-5
EVENTS = st.builds(
    PrivacyEvent,
    noise_multiplier=st.sampled_from([0.6, 1.0, 1.7, 4.3]),
    sample_rate=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
    steps=st.integers(1, 400),
)


def event(noise: float, rate: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian release of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        first = log_ndtr(1 / (2 * noise) - epsilon * noise)
        second = epsilon + log_ndtr(-1 / (2 * noise) - epsilon * noise)
        return float(math.exp(first) - math.exp(second)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 10_000 / noise))


@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (1.0, 1), (1.0, 10), (4.0, 16), (20.0, 1000), (100.0, 25)])
def test_full_batch_epsilon_is_that_of_one_gaussian_with_less_noise(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(steps), DELTA)
    ours = epsilon_of([event(noise, 1.0, steps)], DELTA)
    assert exact * (1 - 1e-9) <= ours <= exact * 1.003 + 1e-3  # an upper bound, and a tight one


@pytest.mark.parametrize("noise", [0.2, 0.25, 0.29])
def test_little_noise_keeps_a_tight_upper_bound_in_bounded_time(noise: float) -> None:
    exact = gaussian_epsilon(noise, DELTA)
    assert exact * (1 - 1e-9) <= epsilon_of([event(noise, 1.0, 1)], DELTA) <= exact * 1.003


@pytest.mark.parametrize(("epsilon", "noise"), [(1, 4.302), (3, 1.764), (8, 0.969)])
def test_solved_noise_is_the_documented_one(epsilon: float, noise: float) -> None:
    assert solve_noise_multiplier(epsilon=float(epsilon), delta=DELTA, sample_rate=0.05, steps=500) == pytest.approx(noise, rel=3e-3)
    assert epsilon_of([event(noise, 0.05, 500)], DELTA) == pytest.approx(epsilon, rel=2e-3)


def test_rounds_compose_to_the_whole_study() -> None:
    """The mistakes of others: a new accountant each round says 2.87 for ever, and the sum over rounds says far too much."""
    rounds = [event(1.0, 0.1, 10)] * 5
    seen = [epsilon_of(rounds[: number + 1], DELTA) for number in range(5)]
    assert seen == pytest.approx([2.87, 3.60, 4.19, 4.70, 5.16], abs=0.03)
    assert epsilon_of([event(1.7, 0.05, 20)] * 25, DELTA) == epsilon_of([event(1.7, 0.05, 500)], DELTA)


def test_studies_compose_across_noise_levels() -> None:
    sweep = [event(solve_noise_multiplier(epsilon=float(target), delta=DELTA, sample_rate=0.05, steps=500), 0.05, 500) for target in (1, 3, 8)]
    assert epsilon_of(sweep, DELTA) == pytest.approx(8.84, rel=0.01)
    assert epsilon_of([sweep[0]] * 5, DELTA) == pytest.approx(2.42, rel=0.01)


@pytest.mark.slow
@settings(max_examples=6)
@given(st.lists(EVENTS, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_order_and_splitting_do_not_matter(events: list[PrivacyEvent], random: object) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    split = [event(e.noise_multiplier, e.sample_rate, part) for e in shuffled for part in (e.steps - e.steps // 3, e.steps // 3)]
    assert merge_events(split) == merge_events(events)
    assert epsilon_of(split, DELTA) == epsilon_of(events, DELTA)


@pytest.mark.slow
@settings(max_examples=5)
@given(EVENTS, st.floats(1.05, 2.0))
def test_more_steps_rate_or_less_noise_costs_more(base: PrivacyEvent, factor: float) -> None:
    now = epsilon_of([base], DELTA)
    slack = 2e-3 * now + 1e-4
    more_steps = event(base.noise_multiplier, base.sample_rate, math.ceil(base.steps * factor))
    more_rate = event(base.noise_multiplier, min(1.0, base.sample_rate * factor), base.steps)
    less_noise = event(base.noise_multiplier / factor, base.sample_rate, base.steps)
    for costlier in (more_steps, more_rate, less_noise):
        assert epsilon_of([costlier], DELTA) >= now - slack
    assert epsilon_of([base], DELTA / 10) >= now - slack
    assert epsilon_of([less_noise], DELTA) > now  # by five per cent or more of noise: strictly
    assert epsilon_of([base, base], DELTA) > now


@pytest.mark.slow
@settings(max_examples=4)
@given(st.sampled_from([0.1, 0.5, 1.0, 3.0, 8.0, 30.0]), st.sampled_from([0.01, 0.16, 1.0]), st.integers(1, 1500), st.sampled_from([1e-4, 1e-6]))
def test_solved_noise_keeps_the_budget_and_wastes_little(epsilon: float, rate: float, steps: int, delta: float) -> None:
    noise = solve_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps)
    reached = epsilon_of([event(noise, rate, steps)], delta)
    assert epsilon * 0.995 - 2e-3 <= reached <= epsilon


@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(0.3, 3), st.sampled_from(["straight", "bent", "a step", "infinite before it"]))
def test_the_search_for_noise_ends_where_halving_does_and_asks_less(root: float, start: float, slope: float, shape: str) -> None:
    asked: list[float] = []

    def excess(place: float) -> float:
        asked.append(place)
        left = (root - place) * slope
        shapes = {"straight": left, "bent": math.expm1(left), "a step": math.copysign(1, left), "infinite before it": left if left < 1 else math.inf}
        return shapes[shape]

    found = _least_noise(excess, start, 1e-3)
    num_asked = len(asked)
    low, high = _bracket(excess, start)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    assert found == max(math.exp(high), MIN_NOISE_MULTIPLIER)
    assert high in asked[:num_asked]
    assert shape != "straight" or num_asked <= len(asked) - num_asked


@pytest.mark.slow
@settings(max_examples=8)
@given(st.lists(EVENTS, min_size=1, max_size=2))
def test_never_above_renyi_accounting(events: list[PrivacyEvent]) -> None:
    """The Renyi bound is valid and looser: a tight numerical bound above it would be wrong."""
    accountant = rdp.RdpAccountant()
    for item in events:
        sampled = dp_accounting.PoissonSampledDpEvent(item.sample_rate, dp_accounting.GaussianDpEvent(item.noise_multiplier))
        accountant.compose(sampled, item.steps)
    assert epsilon_of(events, DELTA) <= accountant.get_epsilon(DELTA) * 1.02


def test_nothing_released_costs_nothing() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([event(1.0, 0.1, 0)], DELTA) == 0.0


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.01, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, -1),
        (1.0, 0.1, 10**18),
    ],
)
def test_events_without_a_theorem_are_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ConfigurationError, match="privacy event: expected noise multiplier >= 0.2"):
        event(noise, rate, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "rate"), [(100.0, 0.01), (100.0, 1e-4), (30.0, 1e-3), (8.0, 1e-4)])
def test_a_budget_that_needs_next_to_no_noise_gets_the_least_there_is(epsilon: float, rate: float) -> None:
    noise = solve_noise_multiplier(epsilon=epsilon, delta=DELTA, sample_rate=rate, steps=1)
    assert MIN_NOISE_MULTIPLIER <= noise < 0.6 and epsilon_of([event(noise, rate, 1)], DELTA) <= epsilon


def test_no_noise_fits_an_impossible_budget() -> None:
    with pytest.raises(ConfigurationError, match="no noise is enough"):
        solve_noise_multiplier(epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=100_000)


def test_public_numbers() -> None:
    assert [default_delta(size) for size in (10, 1000, 100_000)] == [1e-4, 1e-4, 1e-6]
    assert (sample_rate_of(32, 320), sample_rate_of(32, 20)) == (0.1, 1.0)
    for epochs, batch, size in itertools.product((1, 3), (1, 32, 500), (1, 31, 32, 33, 100)):
        steps = steps_per_round(local_epochs=epochs, local_steps=None, batch_size=batch, declared_size=size)
        assert steps * sample_rate_of(batch, size) >= epochs - 1e-9 and (steps // epochs - 1) * sample_rate_of(batch, size) < 1
    assert steps_per_round(local_epochs=5, local_steps=7, batch_size=32, declared_size=100) == 7


@pytest.mark.parametrize("module", ["shared.privacy", "shared.plan", "shared.study"])
def test_arithmetic_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'opacus', 'flwr', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
