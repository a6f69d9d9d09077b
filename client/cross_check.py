"""A second opinion on epsilon: Opacus' PRV accountant (Gopi, Lee, Wutschitz 2021), an upper bound by another method and other code."""

import functools
import warnings
from collections.abc import Iterable

import numpy as np
from opacus.accountants import PRVAccountant

from shared.privacy import PrivacyEvent, merge_events

EPSILON_ERROR = 1e-3  # added to make PRV's number an upper bound; a smaller one costs time


def epsilon_prv(events: Iterable[PrivacyEvent], delta: float) -> float | None:
    """PRV's upper bound on epsilon of all events composed; None where its numerics do not converge (very little noise)."""
    return _epsilon_prv(merge_events(events), delta)


@functools.lru_cache(maxsize=4096)
def _epsilon_prv(events: tuple[PrivacyEvent, ...], delta: float) -> float | None:
    if not events:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR))
    except (RuntimeError, ValueError, OverflowError, MemoryError):
        return None
