"""Privacy arithmetic that both sides and the command line share: events, epsilon, and the noise for a budget. No torch.

Theorem used: DP-SGD with Poisson sampling is the adaptive composition of Poisson-subsampled Gaussian mechanisms (Abadi et al. 2016); its
privacy loss distribution is composed numerically and pessimistically (Koskela et al. 2020; Doroshenko et al. 2022) by dp-accounting, so
the epsilon reported is an upper bound. Unit: one patient (or record) added to or removed from a site's training patients. The Gaussian
differential privacy (central limit) accountant under-counts and is never used.
"""

import contextlib
import functools
import heapq
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from dp_accounting import dp_event
    from dp_accounting.pld import privacy_loss_distribution

DELTA_CEILING = 1e-4
GRID = 0.05  # of a step's root mean square privacy loss, rounded pessimistically: epsilon comes out about 0.1 % high
FINEST_GRID, FINEST_GRID_PER_STEP = 1e-7, 2e-12  # on a grid finer than these, cancellation in float64 would add mass that outweighs the precision
MAX_POINTS = 2e4  # of one step's distribution; rare and large losses (little noise, low rate) get a coarser grid
SOLVE_MARGIN = 0.999  # so that the other accountant's upper bound, whose own error is wider, stays within the budget as well
MIN_NOISE_MULTIPLIER = 0.2  # below, epsilon is in the hundreds and says nothing, and its computation takes minutes and gigabytes
MAX_NOISE_MULTIPLIER = 1e6
MAX_STEPS = 100_000_000  # more would take the composition hours and all memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyEvent:
    """`steps` Poisson-subsampled Gaussian releases, each of sensitivity C with noise of standard deviation noise_multiplier x C.

    Neighbouring relation: add or remove one unit (patient or record).
    """

    noise_multiplier: float
    sample_rate: float  # in (0, 1]
    steps: int

    def __post_init__(self) -> None:
        usable = math.isfinite(self.noise_multiplier) and self.noise_multiplier >= MIN_NOISE_MULTIPLIER and 0 < self.sample_rate <= 1
        if not usable or not 0 <= self.steps <= MAX_STEPS:
            raise ConfigurationError(
                f"privacy event: expected noise multiplier >= {MIN_NOISE_MULTIPLIER}, sample rate in (0, 1], steps from 0 to {MAX_STEPS}, "
                f"got {self.noise_multiplier}, {self.sample_rate}, {self.steps}",
                "an event without noise has no epsilon, and one with less has none worth naming",
            )


def merge_events(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """One event per (noise multiplier, sample rate), in sorted order: composition does not depend on order."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=count) for (noise, rate), count in sorted(steps.items()) if count > 0)


def epsilon_of(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Upper bound on epsilon at `delta` of all events composed; 0 for none.

    Args:
        delta: in (0, 1).

    >>> round(epsilon_of([PrivacyEvent(noise_multiplier=4.302, sample_rate=0.05, steps=500)], 1e-5), 2)
    1.0
    """
    return _epsilon_pld(merge_events(events), delta)


@functools.lru_cache(maxsize=65536)
def _epsilon_pld(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    return float(_compose(events).get_epsilon_for_delta(delta)) if events else 0.0


def epsilon_after_rounds(event: PrivacyEvent, rounds: int, delta: float) -> float:
    """Upper bound on epsilon at `delta` of as many rounds of `event` each; what earlier rounds came to is kept, so the next costs little.

    >>> event = PrivacyEvent(noise_multiplier=4.302, sample_rate=0.05, steps=50)
    >>> round(epsilon_after_rounds(event, 10, 1e-5), 2)
    1.0
    """
    return _burn_down(event, delta).after(rounds) if rounds and event.steps else 0.0


@functools.lru_cache(maxsize=256)
def _burn_down(event: PrivacyEvent, delta: float) -> "_BurnDown":
    return _BurnDown(event, delta)


class _BurnDown:
    """Epsilon after one round, two, three: each composed of the one before and one more, always in this order, so that numbers repeat."""

    def __init__(self, event: PrivacyEvent, delta: float) -> None:
        self._delta = delta
        self._round = self._composed = _compose((event,))
        self._epsilons = [float(self._composed.get_epsilon_for_delta(delta))]

    def after(self, rounds: int) -> float:
        """Epsilon after 1, 2, ... rounds."""
        while len(self._epsilons) < rounds:
            self._composed = self._composed.compose(self._round)
            self._epsilons.append(float(self._composed.get_epsilon_for_delta(self._delta)))
        return self._epsilons[rounds - 1]


def delta_of(events: Iterable[PrivacyEvent], epsilon: float) -> float:
    """Upper bound on delta at `epsilon` of all events composed; 0 for none.

    >>> delta_of([PrivacyEvent(noise_multiplier=4.302, sample_rate=0.05, steps=500)], 1.01) < 1e-5
    True
    """
    merged = merge_events(events)
    return float(_compose(merged).get_delta_for_epsilon(epsilon)) if merged else 0.0


def epsilon_of_best(events: Iterable[PrivacyEvent], delta: float, *, mean_runs: float) -> float:
    """Upper bound on epsilon at `delta` of choosing the best of several runs, each of which costs `events`, and releasing that one alone.

    The number of runs must be drawn beforehand and independently of the patients, by the geometric law with mean `mean_runs`: after each
    run, stop with probability 1 / mean_runs (Papernot and Steinke 2022, theorem 2, by dp-accounting's Renyi accountant). The price grows with
    the logarithm of the mean. A fixed number of runs, or one chosen on the way, has no such bound: compose all of them.

    Raises:
        ConfigurationError: `mean_runs` is below 1.

    >>> round(epsilon_of_best([PrivacyEvent(noise_multiplier=4.302, sample_rate=0.05, steps=500)], 1e-5, mean_runs=10), 1)
    2.3
    """
    merged = merge_events(events)
    if not (math.isfinite(mean_runs) and mean_runs >= 1):
        raise ConfigurationError(f"mean number of runs: expected at least 1, got {mean_runs}", "for example --best-of 10")
    if mean_runs == 1 or not merged:
        return epsilon_of(merged, delta)
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    run = dp_event.ComposedDpEvent([dp_event.SelfComposedDpEvent(_as_dp_event(event), event.steps) for event in merged])
    accountant = RdpAccountant()
    with _series_without_warnings():
        accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean_runs, 1))  # shape 1: geometric
    return float(accountant.get_epsilon(delta))


def attack_power(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The largest true positive rate that (epsilon, delta)-DP leaves to any attacker who says "was in" of those who were not at this rate.

    Theorem (Kairouz, Oh, Viswanath 2015, "The Composition Theorem for Differential Privacy", theorem 2.1, after Wasserman and Zhou 2010): a
    mechanism is (epsilon, delta)-DP exactly where every test of "out" against "in" has FPR + e^epsilon FNR >= 1 - delta and
    e^epsilon FPR + FNR >= 1 - delta. So TPR = 1 - FNR is at most e^epsilon FPR + delta, and at most 1 - e^-epsilon (1 - delta - FPR).

    >>> round(attack_power(1.0, 0.0, 0.01), 4)
    0.0272
    """
    steep = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    flat = 1 - math.exp(-epsilon) * (1 - delta - false_positive_rate)
    return max(0.0, min(1.0, steep, flat))


def _as_dp_event(event: PrivacyEvent) -> "dp_event.DpEvent":
    """One step of it."""
    from dp_accounting import dp_event

    return dp_event.PoissonSampledDpEvent(event.sample_rate, dp_event.GaussianDpEvent(event.noise_multiplier))


def _compose(events: tuple[PrivacyEvent, ...]) -> "privacy_loss_distribution.PrivacyLossDistribution":
    """Always the two shortest distributions next: a long history costs seconds where one after the other costs minutes."""
    interval = _loss_interval(events)
    parts = [_single_release(event.noise_multiplier, event.sample_rate, interval).self_compose(event.steps) for event in events]
    queue = [(_num_points(part), index, part) for index, part in enumerate(parts)]  # the index settles ties
    heapq.heapify(queue)
    while len(queue) > 1:
        _, index, first = heapq.heappop(queue)
        _, _, second = heapq.heappop(queue)
        both = first.compose(second)
        heapq.heappush(queue, (_num_points(both), index, both))
    return queue[0][2]


def _num_points(distribution: "privacy_loss_distribution.PrivacyLossDistribution") -> int:
    return int(distribution._pmf_remove.size)  # read for speed alone: the order of composition changes no bound


def _loss_interval(events: tuple[PrivacyEvent, ...]) -> float:
    """Grid of the privacy loss: a twentieth of a step's root mean square loss, which rounding then raises by less than 0.1 %.

    A grid much wider than a step's loss would charge many small steps double; one much narrower costs time for nothing.
    """
    steps = sum(event.steps for event in events)
    variance = sum(event.steps * _loss_variance(event.noise_multiplier, event.sample_rate) for event in events) / steps
    widest = max(_loss_range(event.noise_multiplier, event.sample_rate) for event in events)
    wanted = max(GRID * math.sqrt(variance), widest / MAX_POINTS, FINEST_GRID, FINEST_GRID_PER_STEP * steps)
    return min(1.0, math.exp2(math.floor(2 * math.log2(wanted)) / 2))  # few values, so that distributions are found again in the cache


def _loss_variance(noise_multiplier: float, sample_rate: float) -> float:
    """About that of one step's privacy loss: its chi-square divergence, or the variance without sampling times the sample rate."""
    without_sampling = 1 / noise_multiplier**2
    return min(sample_rate**2 * math.expm1(without_sampling), sample_rate * without_sampling)


def _loss_range(noise_multiplier: float, sample_rate: float) -> float:
    """About the greatest loss of one step that matters: ten standard deviations out."""
    return math.log1p(sample_rate * math.expm1(10 / noise_multiplier + 0.5 / noise_multiplier**2))


@functools.lru_cache(maxsize=128)
def _single_release(noise_multiplier: float, sample_rate: float, interval: float) -> "privacy_loss_distribution.PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution  # a second to import: only where a number is asked for

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=interval, pessimistic_estimate=True
    )


@functools.lru_cache(maxsize=4096)
def solve_noise_multiplier(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise multiplier (within 0.2 %, and never below `MIN_NOISE_MULTIPLIER`) whose `steps` releases cost at most `epsilon` at `delta`.

    Raises:
        ConfigurationError: no noise multiplier up to a million does.
    """

    def excess(log_noise: float) -> float:
        event = PrivacyEvent(noise_multiplier=max(math.exp(log_noise), MIN_NOISE_MULTIPLIER), sample_rate=sample_rate, steps=steps)
        return math.log(max(_epsilon_pld((event,), delta), 1e-12)) - math.log(epsilon * SOLVE_MARGIN)

    return _least_noise(excess, math.log(_rough_guess(epsilon, delta, sample_rate, steps)), 1e-3)


def _least_noise(excess: Callable[[float], float], start: float, tolerance: float) -> float:
    """The least noise whose `excess`, falling in its logarithm, is not positive; the value itself was tried."""
    tried = functools.cache(excess)
    low, high = _bracket(tried, start)
    too_little, enough = _root_between(tried, low, high, tolerance)
    while high - low > tolerance:  # halving, which asks `excess` only of what is not known from what was tried
        middle = (low + high) / 2
        needs_more = middle <= too_little or (middle < enough and tried(middle) > 0)
        low, high = (middle, high) if needs_more else (low, middle)
    while tried(high) > 0:  # as rounding may make it, where `excess` rises for once
        high += tolerance
    return max(math.exp(high), MIN_NOISE_MULTIPLIER)


def _root_between(excess: Callable[[float], float], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """Two places near where the falling `excess` passes zero, tried: above zero at the first, not at the second.

    Where it is almost straight, as epsilon in the noise with both logarithms, they come within half the tolerance in three steps.
    """
    for _ in range(3):
        if high - low <= tolerance / 2 or excess(low) <= 0:
            break
        share = excess(low) / (excess(low) - excess(high)) if math.isfinite(excess(low)) else 0.5
        guess = low + (high - low) * share
        beyond = tolerance / 4 if guess - low < high - guess else -tolerance / 4  # so that the far end comes near, not the near one nearer
        guess = min(max(guess + beyond, low), high)
        low, high = (guess, high) if excess(guess) > 0 else (low, guess)
    return low, high


def _rough_guess(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Central-limit size of the noise, as a place to begin the search and nothing more."""
    return max(0.3, sample_rate * math.sqrt(steps * 2 * math.log(1.25 / delta)) / epsilon)


def _bracket(excess: Callable[[float], float], start: float) -> tuple[float, float]:
    width = 0.1
    low = high = start
    if excess(start) > 0:
        while excess(high) > 0:
            low, high, width = high, high + width, width * 2
            if high > math.log(MAX_NOISE_MULTIPLIER):
                raise ConfigurationError("privacy.epsilon: no noise is enough for this budget", "raise epsilon, or lower rounds or batch_size")
    else:
        floor = math.log(MIN_NOISE_MULTIPLIER)
        while excess(low) <= 0 and low > floor:
            low, high, width = max(low - width, floor), low, width * 2
    return low, high


def renyi_divergence(event: PrivacyEvent, order: float) -> float:
    """Renyi divergence of `order` that `event` costs at most, by dp-accounting (Mironov, Talwar and Zhang 2019); infinite where it cannot say.

    Additive over events, also over events chosen after seeing earlier results (Feldman and Zrnic 2021, theorem 3.1), which epsilon is not.

    Args:
        order: above 1.
    """
    return event.steps * _renyi_of_one_step(event.noise_multiplier, event.sample_rate, order)


@functools.lru_cache(maxsize=65536)
def _renyi_of_one_step(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """At a fractional order at most a bound from the whole orders beside it, for (order - 1) x divergence is convex in the order.

    The series of a fractional order loses its precision where sampling is frequent and noise is large: at order 2.4, rate 0.5 and noise
    multiplier 20 it says fourteen times too much, at 22 infinity. That of a whole order is a finite sum.
    """
    divergence = _renyi_by_series(noise_multiplier, sample_rate, order)
    if order == math.floor(order):
        return divergence
    below = math.floor(order)
    share = order - below
    moment_below = (below - 1) * _renyi_by_series(noise_multiplier, sample_rate, float(below)) if below > 1 else 0.0
    moment_above = below * _renyi_by_series(noise_multiplier, sample_rate, below + 1.0)
    return min(divergence, ((1 - share) * moment_below + share * moment_above) / (order - 1))


def _renyi_by_series(noise_multiplier: float, sample_rate: float, order: float) -> float:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[order])
    with _series_without_warnings():
        accountant.compose(dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier)))
    tiny = 1e-300  # at any delta epsilon and divergence differ by a constant; at this one epsilon is not cut off at zero
    return max(0.0, float(accountant.get_epsilon(tiny)) - _renyi_margin(order, tiny))


@contextlib.contextmanager
def _series_without_warnings() -> Iterator[None]:
    """dp-accounting warns of every order whose series does not converge; such an order is infinite, which is dealt with here."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def renyi_epsilon(divergence: float, *, order: float, delta: float) -> float:
    """Epsilon at `delta` that a total Renyi divergence of `order` implies (Canonne, Kamath and Steinke 2020, proposition 12); at least 0."""
    return max(0.0, divergence + _renyi_margin(order, delta))


def epsilon_renyi(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Upper bound on epsilon at `delta` of all events, by Renyi divergence, least over orders; 0 for none.

    Wider than `epsilon_of`, and true of discrete Gaussian noise in many dimensions as well, of which a privacy loss distribution says nothing.
    """
    from dp_accounting.rdp import RdpAccountant

    merged = merge_events(events)
    if not merged:
        return 0.0
    accountant = RdpAccountant()
    with _series_without_warnings():
        for event in merged:
            accountant.compose(_as_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def renyi_budget(epsilon: float, *, order: float, delta: float) -> float:
    """The total Renyi divergence of `order` that keeps within `epsilon` at `delta`; negative where even nothing would not be within by this order."""
    return epsilon - _renyi_margin(order, delta)


def _renyi_margin(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@functools.lru_cache(maxsize=4096)
def solve_noise_for_budget(*, budget: float, order: float, sample_rate: float, steps: int) -> float:
    """The least noise multiplier (within 0.01 %, never below `MIN_NOISE_MULTIPLIER`) whose `steps` releases pass a Renyi filter with `budget` left.

    Args:
        budget: of Renyi divergence at `order`, as `renyi_budget` says, less what was spent before.
        order: above 1; the filter's own.

    Raises:
        ConfigurationError: the budget is not positive, or no noise multiplier up to a million keeps within it.

    >>> round(solve_noise_for_budget(budget=5.0, order=10.0, sample_rate=1.0, steps=1), 2)  # order / (2 x noise^2) = budget
    1.0
    """
    if not budget > 0:
        raise ConfigurationError(
            f"privacy.epsilon: expected something left of the site's limit, got a budget of {budget:.3g} at order {order:g}",
            "raise the limit, or its delta",
        )

    def excess(log_noise: float) -> float:
        event = PrivacyEvent(noise_multiplier=max(math.exp(log_noise), MIN_NOISE_MULTIPLIER), sample_rate=sample_rate, steps=steps)
        return renyi_divergence(event, order) - budget

    return _least_noise(excess, 0.0, 1e-4)


FILTER_ORDERS = tuple(float(order) for order in range(2, 513))  # whole, for exactness: 1 % of noise at a limit of 10 and 8 % at 100


def filter_order(epsilon: float, delta: float) -> float:
    """The order at which a Renyi filter for (epsilon, delta) has room for most Gaussian releases; fixed before any of them.

    A Gaussian release costs in proportion to the order, so the best order has the largest budget per order. A limit that is looser in both
    has an order that is no higher, and so has room for every plan that passes the tighter limit at its own order.
    """
    return max(FILTER_ORDERS, key=lambda order: renyi_budget(epsilon, order=order, delta=delta) / order)


def default_delta(smallest_declared_size: int) -> float:
    """min(1e-4, 1 / (10 x smallest declared size)); from declared sizes, never from exact counts."""
    return min(DELTA_CEILING, 1 / (10 * max(smallest_declared_size, 1)))


def default_delta_of_sites(declared_sizes: Sequence[int]) -> float:
    """`default_delta` of the smallest site; where that is not below 1/size at the largest, of the largest."""
    delta = default_delta(min(declared_sizes))
    return delta if delta * max(declared_sizes) < 1 else default_delta(max(declared_sizes))


def sample_rate_of(batch_size: int, declared_size: int) -> float:
    """q = min(1, batch_size / declared size)."""
    return min(1.0, batch_size / declared_size)


def steps_per_round(*, local_epochs: int, local_steps: int | None, batch_size: int, declared_size: int) -> int:
    """Steps a site takes in a round: `local_steps`, or as many as `local_epochs` expected passes need."""
    return local_steps if local_steps is not None else local_epochs * math.ceil(declared_size / min(batch_size, declared_size))


EVALUATION_ORDERS = tuple(1 + math.exp(step / 100) for step in range(-500, 1600))  # of Renyi divergence; 1 % apart costs 0.001 % of noise


def evaluation_noise_multiplier(epsilon: float, delta: float, releases: int = 1) -> float:
    """The noise multiplier (within 0.1 % of the least) whose `releases` noised evaluations cost at most `epsilon` at `delta`.

    At a given order alpha the cost releases x alpha / (2 noise_multiplier^2) is within the budget for a noise multiplier that can be written
    down; this is the least over orders.

    Raises:
        ConfigurationError: more than a million would be needed.

    >>> round(evaluation_noise_multiplier(1.0, 1e-5), 2)
    4.05
    """
    budgets = {order: renyi_budget(epsilon, order=order, delta=delta) for order in EVALUATION_ORDERS}
    squares = [releases * order / (2 * budget) for order, budget in budgets.items() if budget > 0]
    noise = max(MIN_NOISE_MULTIPLIER, math.sqrt(min(squares, default=math.inf)) * (1 + 1e-12))  # over rounding
    if noise > MAX_NOISE_MULTIPLIER:
        raise ConfigurationError(
            f"privacy.evaluation_epsilon: expected a budget that a noise multiplier of {MAX_NOISE_MULTIPLIER:g} keeps, got {epsilon:g}", "raise it"
        )
    return noise


def epsilon_if_all_others_collude(plan_noise: float, *, sample_rate: float, steps: int, delta: float, honest: int) -> float:
    """Of a site whose own share is all the noise there is against the coordinator and every other site together."""
    share = PrivacyEvent(noise_multiplier=plan_noise / math.sqrt(honest), sample_rate=sample_rate, steps=steps)
    return epsilon_of([share], delta)
