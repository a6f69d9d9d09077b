"""Accounting in numbers: seconds for a long history and for solving noise, and three accountants' epsilon side by side.

python benchmarks/accounting.py [--json]
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import dp_accounting
from dp_accounting import rdp
from measuring import finish

from client.cross_check import epsilon_prv
from shared import privacy
from shared.privacy import PrivacyEvent, epsilon_of, filter_order, renyi_budget, renyi_divergence, renyi_epsilon

DELTA = 1e-5
SECONDS_TO_KEEP = 5.0
EVENTS = (  # noise multiplier, sample rate, steps
    (4.302, 0.05, 500),
    (1.764, 0.05, 500),
    (0.969, 0.05, 500),
    (2.991, 0.16, 210),
    (5.0, 0.001, 1000),
    (20.0, 1.0, 30),
    (0.5, 0.01, 1000),
)


CACHED = (
    privacy._epsilon_pld,
    privacy._single_release,
    privacy._renyi_of_one_step,
    privacy.solve_noise_multiplier,
    privacy.solve_noise_for_budget,
)


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """Median of a few runs, each with empty caches."""
    times = []
    for _ in range(repeats):
        for cached in CACHED:
            cached.cache_clear()
        started = time.monotonic()
        action()
        times.append(time.monotonic() - started)
    return statistics.median(times)


def long_history(entries: int = 200) -> list[PrivacyEvent]:
    """As many releases, no two alike."""
    rng = random.Random(1)
    return [PrivacyEvent(noise_multiplier=rng.uniform(2, 30), sample_rate=rng.uniform(0.01, 0.3), steps=rng.randint(20, 500)) for _ in range(entries)]


def epsilon_rdp(event: PrivacyEvent) -> float:
    """By dp-accounting's Renyi accountant, over its own orders."""
    accountant = rdp.RdpAccountant()
    sampled = dp_accounting.PoissonSampledDpEvent(event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier))
    accountant.compose(sampled, event.steps)
    return float(accountant.get_epsilon(DELTA))


def side_by_side(event: PrivacyEvent) -> dict[str, float | None]:
    """Epsilon of one event by every accountant, and what a hospital's filter with just that limit (1 at least) would count."""
    pld = epsilon_of([event], DELTA)
    order = filter_order(max(pld, 1.0), DELTA)
    return {
        "pld": pld,
        "prv": epsilon_prv([event], DELTA),
        "rdp": epsilon_rdp(event),
        "filter": renyi_epsilon(renyi_divergence(event, order), order=order, delta=DELTA),
    }


def solving() -> dict[str, float]:
    """Seconds to solve the noise of a study, by both bounds."""
    order = filter_order(3.0, DELTA)
    budget = renyi_budget(3.0, order=order, delta=DELTA)
    return {
        "by PLD": seconds(lambda: privacy.solve_noise_multiplier(epsilon=3.0, delta=DELTA, sample_rate=0.05, steps=500)),
        "by the filter": seconds(lambda: privacy.solve_noise_for_budget(budget=budget, order=order, sample_rate=0.05, steps=500)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    epsilon_of([PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=1)], DELTA)  # imports
    history = long_history()
    history_seconds, solving_seconds = seconds(lambda: epsilon_of(history, DELTA)), solving()
    data: dict[str, object] = {"history_seconds": history_seconds, "solving_seconds": solving_seconds}
    print(f"a history of {len(history)} different releases: {history_seconds:.2f} s  to reach: under {SECONDS_TO_KEEP:g} s", file=sys.stderr)
    for name, value in solving_seconds.items():
        print(f"noise for epsilon 3, {name}: {value:.3f} s", file=sys.stderr)
    table = {}
    print(f"epsilon at delta {DELTA:g}    PLD      PRV      RDP   filter", file=sys.stderr)
    for noise, rate, steps in EVENTS:
        numbers = side_by_side(PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps))
        table[f"{noise:g},{rate:g},{steps}"] = numbers
        row = "".join("        -" if value is None else f"{value:9.4f}" for value in numbers.values())
        print(f"{noise:6g},{rate:g},{steps:<8}{row}", file=sys.stderr)
    data["epsilon"] = table
    finish(data, as_json=as_json)


if __name__ == "__main__":
    main()
