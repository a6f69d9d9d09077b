"""Privacy arithmetic that both sides and the command line share: events, epsilon, and the noise for a budget. No torch.

Theorem used: DP-SGD with Poisson sampling is the adaptive composition of Poisson-subsampled Gaussian mechanisms (Abadi et al. 2016); its
privacy loss distribution is composed numerically and pessimistically (Koskela et al. 2020; Doroshenko et al. 2022) by dp-accounting, so
the epsilon reported is an upper bound. Unit: one patient (or record) added to or removed from a site's training patients. The Gaussian
differential privacy (central limit) accountant under-counts and is never used.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from dp_accounting.pld import privacy_loss_distribution

DELTA_CEILING = 1e-4
LOSS_INTERVAL = 1e-3  # grid of the privacy loss, rounded pessimistically: epsilon comes out at most 0.1 % high
COARSE_BELOW = 0.3  # noise multiplier under which losses grow as 1/noise^2, and the grid with them: as many points, as good relatively
SOLVE_MARGIN = 0.999  # so that the other accountant's upper bound, whose own error is wider, stays within the budget as well
MIN_NOISE_MULTIPLIER = 0.1  # below, epsilon is in the hundreds and says nothing, and its computation takes minutes and gigabytes
MAX_NOISE_MULTIPLIER = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyEvent:
    """`steps` Poisson-subsampled Gaussian releases, each of sensitivity C with noise of standard deviation noise_multiplier x C.

    Neighbouring relation: add or remove one unit (patient or record).
    """

    noise_multiplier: float
    sample_rate: float  # in (0, 1]
    steps: int

    def __post_init__(self) -> None:
        usable = (
            math.isfinite(self.noise_multiplier) and self.noise_multiplier >= MIN_NOISE_MULTIPLIER and 0 < self.sample_rate <= 1 and self.steps >= 0
        )
        if not usable:
            raise ConfigurationError(
                f"privacy event: expected noise multiplier >= {MIN_NOISE_MULTIPLIER}, sample rate in (0, 1], steps >= 0, got {self.noise_multiplier}, {self.sample_rate}, {self.steps}",
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
    composed = None
    interval = _loss_interval(min((event.noise_multiplier for event in events), default=1.0))
    for event in events:
        part = _single_release(event.noise_multiplier, event.sample_rate, interval).self_compose(event.steps)
        composed = part if composed is None else composed.compose(part)
    return 0.0 if composed is None else float(composed.get_epsilon_for_delta(delta))


def _loss_interval(least_noise: float) -> float:
    return min(1.0, LOSS_INTERVAL * max(1.0, (COARSE_BELOW / least_noise) ** 2))


@functools.lru_cache(maxsize=1024)
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

    low, high = _bracket(excess, math.log(_rough_guess(epsilon, delta, sample_rate, steps)))
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return max(math.exp(high), MIN_NOISE_MULTIPLIER)


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
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[order])
    accountant.compose(dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier)))
    tiny = 1e-300  # at any delta epsilon and divergence differ by a constant; at this one epsilon is not cut off at zero
    return max(0.0, float(accountant.get_epsilon(tiny)) - _renyi_margin(order, tiny))


def renyi_epsilon(divergence: float, *, order: float, delta: float) -> float:
    """Epsilon at `delta` that a total Renyi divergence of `order` implies (Canonne, Kamath and Steinke 2020, proposition 12); at least 0."""
    return max(0.0, divergence + _renyi_margin(order, delta))


def renyi_budget(epsilon: float, *, order: float, delta: float) -> float:
    """The total Renyi divergence of `order` that keeps within `epsilon` at `delta`; negative where even nothing would not be within by this order."""
    return epsilon - _renyi_margin(order, delta)


def _renyi_margin(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


FILTER_ORDERS = (*(1 + step / 10 for step in range(1, 100)), *(float(order) for order in range(11, 513)))


def filter_order(epsilon: float, delta: float) -> float:
    """The order at which a Renyi filter for (epsilon, delta) has room for most Gaussian releases; fixed before any of them.

    A Gaussian release costs in proportion to the order, so the best order has the largest budget per order. A limit that is looser in both
    has an order that is no higher, and so has room for every plan that passes the tighter limit at its own order.
    """
    return max(FILTER_ORDERS, key=lambda order: renyi_budget(epsilon, order=order, delta=delta) / order)


def default_delta(smallest_declared_size: int) -> float:
    """min(1e-4, 1 / (10 x smallest declared size)); from declared sizes, never from exact counts."""
    return min(DELTA_CEILING, 1 / (10 * max(smallest_declared_size, 1)))


def sample_rate_of(batch_size: int, declared_size: int) -> float:
    """q = min(1, batch_size / declared size)."""
    return min(1.0, batch_size / declared_size)


def steps_per_round(*, local_epochs: int, local_steps: int | None, batch_size: int, declared_size: int) -> int:
    """Steps a site takes in a round: `local_steps`, or as many as `local_epochs` expected passes need."""
    return local_steps if local_steps is not None else local_epochs * math.ceil(declared_size / min(batch_size, declared_size))
