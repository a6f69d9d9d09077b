"""From right guesses in one run to a lower bound on epsilon: by (epsilon, delta)-DP, and by f-DP.

The game: each of m canaries is in or out of the training data by a fair coin of its own. Who sees the release names r of them and says of each
whether it was in; v of these guesses are right. Guesses may depend on the release as they like, but not on the coins. Unit of privacy: one
canary, added or removed. Both bounds reject a promise under which v or more right guesses happen with probability at most 1 - confidence.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2: if the release is (epsilon, delta)-DP, then

    P[V >= v] <= P[W >= v] + 2 m delta alpha,   W ~ Binomial(r, e^epsilon / (1 + e^epsilon)),   alpha = max_{1 <= i <= v} P[v - i <= W < v] / i.

Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-Differential Privacy in One Run" (arXiv:2410.22235), Theorem 3.2 and its algorithm: if the
release is f-DP and exactly r guesses are made, then for every i, with R_i = sum_{l >= i} (l/m) P[V = l] and H_i = sum_{l >= i} ((r - l)/m) P[V = l],

    R_{i+1} <= 1 - f(H_i),   R_i + H_i = (r/m) P[V >= i] <= r/m.

(The event "guess j is right and V >= i + 1" becomes "guess j is wrong and V >= i" where the coin of j alone is turned; average over j, and use
that 1 - f is concave.) Starting from P[V >= v] >= tau, with R_v >= tau v/m and H_v <= tau (r - v)/m, the first gives H_i >= (1 - f)^-1(R_{i+1}) and
R_i - R_{i+1} = (H_i - H_{i+1}) i / (r - i), down to i = 0 (i / (r - i) grows with i, so R is the least where every H is); a sum above r/m is
impossible, so then P[V >= v] < tau.

Here f is of the family G_mu(x) = Phi(Phi^-1(1 - x) - mu) of Gaussian trade-off functions (Dong, Roth and Su 2022). The largest mu that is
rejected becomes the epsilon with delta = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu). So this bound holds for a mechanism whose
trade-off is that of some Gaussian, as a noised sum's is; sub-sampling and composition make it one only nearly, and a bound above a promise
then says that the promise or that shape is wrong. The other bound assumes nothing.

How many to guess must not depend on how well it went. `best_bounds` tries `NUM_TRIES` numbers, each at error (1 - confidence) / NUM_TRIES (Bonferroni), and
keeps the best of each kind. Both kinds reject for large v alone, so at one r the two together err as often as the one with the lower threshold:
P[either bound passes what is true] <= 1 - confidence, and two bounds cost no more than one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from shared.cohort import BoolArray

CONFIDENCE = 0.95
SHARES = (0.2, 0.85)  # of the canaries to guess: few where only the extremes tell, nearly all where every one does
NUM_TRIES = len(SHARES)
LARGEST_EPSILON = 100.0
LARGEST_MU = 50.0
BISECTIONS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Guessed:
    """How guessing went: v right of r guesses on m canaries."""

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        assert 0 <= self.correct <= self.guesses <= self.canaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The two lower bounds on epsilon, and the guessing behind the larger."""

    guessed: Guessed
    epsilon_lower: float
    epsilon_lower_fdp: float


def guess(scores: NDArray[np.float64], inside: BoolArray, *, guesses: int) -> Guessed:
    """Call the guesses/2 highest scores in and as many lowest out. Ties are broken by place, which knows nothing of the coins.

    Args:
        scores: `(m,)`; high where a canary seems to be in.
        inside: `(m,)`; the coins.
        guesses: r, even.
    """
    half = guesses // 2
    order = np.argsort(scores, kind="stable")
    correct = int(inside[order[len(order) - half :]].sum() + (~inside[order[:half]]).sum())
    return Guessed(canaries=len(scores), guesses=2 * half, correct=correct)


def best_bounds(scores: NDArray[np.float64], inside: BoolArray, *, delta: float, confidence: float = CONFIDENCE) -> Bounds:
    """The best bound of each kind over `SHARES`, with `confidence` for all of them together; `guess` says what the arrays are.

    >>> best_bounds(np.arange(100.0), np.arange(100) >= 50, delta=1e-5).epsilon_lower > 3
    True
    """
    each = 1 - (1 - confidence) / NUM_TRIES
    tries = []
    for share in SHARES:
        guessed = guess(scores, inside, guesses=max(2, 2 * round(share * len(scores) / 2)))
        dp = epsilon_lower(guessed, delta=delta, confidence=each)
        tries.append(Bounds(guessed=guessed, epsilon_lower=dp, epsilon_lower_fdp=epsilon_lower_fdp(guessed, delta=delta, confidence=each)))
    best = max(tries, key=lambda bounds: (bounds.epsilon_lower_fdp, bounds.epsilon_lower))
    return Bounds(guessed=best.guessed, epsilon_lower=max(bounds.epsilon_lower for bounds in tries), epsilon_lower_fdp=best.epsilon_lower_fdp)


def epsilon_lower(guessed: Guessed, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon (within 1e-9) for which (epsilon, delta)-DP is rejected; 0 where none is. With delta = 0 and r = v it is ln(x / (1 - x)), x = (1 - confidence)^(1/r).

    >>> round(epsilon_lower(Guessed(canaries=1000, guesses=1000, correct=1000), delta=0.0), 3)
    5.809
    """
    return _largest(lambda epsilon: p_value(guessed, epsilon=epsilon, delta=delta) <= 1 - confidence, LARGEST_EPSILON)


def p_value(guessed: Guessed, *, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of as many right guesses or more under (epsilon, delta)-DP, at most 1 (Steinke et al. 2023, Theorem 5.2)."""
    right = guessed.correct
    if right == 0:
        return 1.0
    accuracy = special.expit(epsilon)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guessed.guesses, accuracy))  # [i - 1] = P[v - i <= W < v]
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, float(stats.binom.sf(right - 1, guessed.guesses, accuracy)) + 2 * guessed.canaries * delta * alpha)


def epsilon_lower_fdp(guessed: Guessed, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """The epsilon at `delta` of the largest mu (within 1e-9) for which mu-Gaussian DP is rejected; 0 where none is. `delta` is above 0."""
    assert delta > 0, "no Gaussian keeps (epsilon, 0)-DP"
    return gaussian_epsilon(_largest(lambda mu: rejects_gaussian(guessed, mu=mu, error=1 - confidence), LARGEST_MU), delta)


def rejects_gaussian(guessed: Guessed, *, mu: float, error: float) -> bool:
    """Whether under mu-Gaussian DP as many right guesses or more have probability below `error` (Mahloujifar et al. 2024)."""
    total, num_guesses, right = guessed.guesses / guessed.canaries, guessed.guesses, guessed.correct
    correct_mass = error * right / guessed.canaries  # R_i, from i = v down
    wrong_mass = error * (num_guesses - right) / guessed.canaries  # H_i
    for i in range(right - 1, -1, -1):
        wrong_before, wrong_mass = wrong_mass, float(special.ndtr(special.ndtri(max(correct_mass, 0.0)) - mu))
        correct_mass += (wrong_mass - wrong_before) * i / (num_guesses - i)
        if correct_mass + wrong_mass > total:
            return True
    return False


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon (within 1e-9) at which mu-Gaussian DP is (epsilon, delta)-DP (Dong, Roth and Su 2022, Corollary 2.13).

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    if mu == 0:
        return 0.0

    def exceeds(epsilon: float) -> bool:
        there = float(special.ndtr(mu / 2 - epsilon / mu))
        return there - math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))) > delta

    return _largest(exceeds, mu**2 / 2 + mu * 40)


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """The largest number in [0, `most`] for which `holds`, which goes from True to False; 0 where it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
