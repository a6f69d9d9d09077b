"""Bounds from guesses hold on mechanisms whose privacy is known exactly, and are not far below it.

Where each canary is told by a mechanism of its own, the number of right guesses is binomial, so how often a bound passes the truth is computed
and not sampled.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulations.attacks.one_run_bounds import (
    CONFIDENCE,
    NUM_TRIES,
    SHARES,
    Guessed,
    best_bounds,
    epsilon_lower,
    epsilon_lower_fdp,
    gaussian_epsilon,
    guess,
    p_value,
    rejects_gaussian,
)

Bound = Callable[..., float]
ERROR = 1 - CONFIDENCE


def right(canaries: int, guesses: int, correct: int) -> Guessed:
    return Guessed(canaries=canaries, guesses=guesses, correct=correct)


def least_rejected(canaries: int, epsilon: float, delta: float) -> int:
    """The least number of right guesses, of all canaries, whose bound passes `epsilon`."""
    return next(v for v in range(canaries + 1) if p_value(right(canaries, canaries, v), epsilon=epsilon, delta=delta) <= ERROR)


@pytest.mark.parametrize("guesses", [1, 10, 1000])
def test_all_right_without_delta_is_the_closed_form(guesses: int) -> None:
    accuracy = ERROR ** (1 / guesses)
    expected = max(0.0, math.log(accuracy / (1 - accuracy)))
    assert epsilon_lower(right(1000, guesses, guesses), delta=0.0) == pytest.approx(expected, abs=1e-6)


def test_the_p_value_is_the_theorem_written_out() -> None:
    """Sums over the binomial, term by term."""
    guesses, correct, canaries, epsilon, delta = 12, 9, 20, 0.8, 1e-3
    accuracy = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max(sum(mass[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = sum(mass[correct:]) + 2 * canaries * delta * alpha
    assert p_value(right(canaries, guesses, correct), epsilon=epsilon, delta=delta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("canaries", [200, 1000])
def test_randomized_response_passes_its_epsilon_once_in_twenty_at_most(epsilon: float, canaries: int) -> None:
    """Each coin is told right with probability e^epsilon / (1 + e^epsilon), exactly epsilon-DP: the theorem is tight, so the alarm is just under 5 %."""
    threshold = least_rejected(canaries, epsilon, 0.0)
    accuracy = 1 / (1 + math.exp(-epsilon))
    alarm = stats.binom.sf(threshold - 1, canaries, accuracy)
    assert alarm <= ERROR < stats.binom.sf(threshold - 2, canaries, accuracy)
    assert epsilon_lower(right(canaries, canaries, threshold), delta=0.0) >= epsilon - 1e-6
    assert epsilon_lower(right(canaries, canaries, threshold - 1), delta=0.0) <= epsilon + 1e-6


@pytest.mark.parametrize("delta", [1e-4, 1e-3])
def test_what_fails_with_probability_delta_passes_its_epsilon_once_in_twenty_at_most(delta: float) -> None:
    """(epsilon, delta)-DP in two ways: each coin is shown with probability delta on its own; or all of them at once."""
    canaries, epsilon = 100, 1.0
    threshold = least_rejected(canaries, epsilon, delta)
    accuracy = 1 / (1 + math.exp(-epsilon))
    assert stats.binom.sf(threshold - 1, canaries, delta + (1 - delta) * accuracy) <= ERROR
    assert delta + (1 - delta) * stats.binom.sf(threshold - 1, canaries, accuracy) <= ERROR


@pytest.mark.parametrize(("mu", "canaries"), [(0.3, 200), (1.0, 200), (0.3, 1000), (2.0, 1000)])
def test_a_gaussian_passes_its_mu_once_in_twenty_at_most(mu: float, canaries: int) -> None:
    """Each coin is told by the side of mu / 2 on which N(0, 1) or N(mu, 1) falls; right with probability Phi(mu / 2)."""
    threshold = next(v for v in range(canaries + 1) if rejects_gaussian(right(canaries, canaries, v), mu=mu, error=ERROR))
    alarm = stats.binom.sf(threshold - 1, canaries, stats.norm.cdf(mu / 2))
    assert alarm <= ERROR
    lower = epsilon_lower_fdp(right(canaries, canaries, threshold), delta=1e-5)
    assert lower >= gaussian_epsilon(mu, 1e-5) - 1e-6


@pytest.mark.parametrize(("mu", "share"), [(0.5, 0.2), (1.0, 0.2), (2.0, 0.2), (1.0, 0.85)])
def test_guessing_by_rank_passes_a_gaussian_once_in_twenty_at_most(mu: float, share: float) -> None:
    """2,000 audits of 200 canaries; at a true rate of 5 % more than 141 alarms come once in 100,000 times."""
    rng, canaries = np.random.default_rng(5), 200
    guesses = 2 * round(share * canaries / 2)
    threshold = next((v for v in range(guesses + 1) if rejects_gaussian(right(canaries, guesses, v), mu=mu, error=ERROR)), guesses + 1)
    alarms = 0
    for _ in range(2000):
        inside = rng.random(canaries) < 0.5
        alarms += guess(rng.normal(size=canaries) + mu * inside, inside, guesses=guesses).correct >= threshold
    assert alarms <= stats.binom.isf(1e-5, 2000, ERROR)


@pytest.mark.parametrize("bound", [epsilon_lower, epsilon_lower_fdp])
@given(guesses=st.integers(1, 60), data=st.data())
@settings(max_examples=25, deadline=None)
def test_more_right_guesses_never_lower_a_bound(bound: Bound, guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, guesses - 1))
    lower = [bound(right(80, guesses, v), delta=1e-4) for v in (correct, correct + 1)]
    assert 0 <= lower[0] <= lower[1] + 1e-7


@pytest.mark.parametrize("bound", [epsilon_lower, epsilon_lower_fdp])
def test_confidence_and_chance(bound: Bound) -> None:
    most = right(500, 200, 180)
    assert bound(most, delta=1e-5, confidence=0.99) < bound(most, delta=1e-5, confidence=0.9)
    assert bound(right(500, 200, 100), delta=1e-5) == 0 == bound(right(500, 200, 0), delta=1e-5)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0, 4.0])
def test_the_fdp_bound_is_the_sharper_on_a_gaussian(mu: float) -> None:
    """Never much below the other, by a quarter above it where there is much to find, and always below the truth here (fixed draws)."""
    rng = np.random.default_rng(3)
    inside = rng.random(1000) < 0.5
    bounds = best_bounds(rng.normal(size=1000) + mu * inside, inside, delta=1e-5)
    assert bounds.epsilon_lower_fdp >= 0.95 * bounds.epsilon_lower > 0
    assert bounds.epsilon_lower_fdp <= gaussian_epsilon(mu, 1e-5)
    assert mu < 1 or bounds.epsilon_lower_fdp > 1.25 * bounds.epsilon_lower


@pytest.mark.parametrize(("mu", "delta"), [(0.2, 1e-5), (1.0, 1e-3), (3.0, 1e-6)])
def test_epsilon_of_a_gaussian_is_where_its_two_tails_meet(mu: float, delta: float) -> None:
    """delta = P[loss > epsilon | in] - e^epsilon P[loss > epsilon | out], by numerical integration of the two densities."""
    epsilon = gaussian_epsilon(mu, delta)
    x = np.linspace(-12, 12 + mu, 400_001)
    excess = np.maximum(stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x), 0)
    assert np.trapezoid(excess, x) == pytest.approx(delta, rel=1e-3)
    assert gaussian_epsilon(0.0, delta) == 0


def test_choosing_how_many_to_guess_is_paid_for() -> None:
    """`best_bounds` is the best over its shares, each at a confidence that leaves 5 % for all together."""
    rng = np.random.default_rng(7)
    inside = rng.random(300) < 0.5
    scores = rng.normal(size=300) + 2 * inside
    guessed = [guess(scores, inside, guesses=2 * round(share * 300 / 2)) for share in SHARES]
    each = 1 - ERROR / NUM_TRIES
    bounds = best_bounds(scores, inside, delta=1e-4)
    assert bounds.epsilon_lower == max(epsilon_lower(one, delta=1e-4, confidence=each) for one in guessed)
    assert bounds.epsilon_lower_fdp == max(epsilon_lower_fdp(one, delta=1e-4, confidence=each) for one in guessed)
    assert bounds.guessed in guessed


def test_guesses_are_the_extremes_and_ties_know_nothing_of_the_coins() -> None:
    inside = np.array([True, False, True, False])
    assert guess(np.array([3.0, 0.0, 2.0, 1.0]), inside, guesses=4).correct == 4
    assert guess(np.array([3.0, 0.0, 1.0, 2.0]), inside, guesses=2).correct == 2
    assert guess(np.zeros(4), inside, guesses=4) == right(4, 4, 2)
