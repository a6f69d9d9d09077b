"""A second opinion on epsilon: Opacus' PRV accountant (Gopi, Lee, Wutschitz 2021), an upper bound by another method and other code."""

import functools
import math
import warnings
from collections.abc import Iterable

import numpy as np

from shared.privacy import PrivacyEvent, epsilon_of, merge_events
from shared.root_log import root_log_unchanged

EPSILON_ERROR = 1e-3  # relative above epsilon 1; added to make PRV's number an upper bound; a smaller one costs time, and memory as epsilon grows


def epsilon_prv(events: Iterable[PrivacyEvent], delta: float) -> float | None:
    """PRV's upper bound on epsilon of all events composed; None where its numerics do not converge (very little noise)."""
    return _epsilon_prv(merge_events(events), delta)


@functools.lru_cache(maxsize=4096)
def _epsilon_prv(events: tuple[PrivacyEvent, ...], delta: float) -> float | None:
    if not events:
        return 0.0
    with root_log_unchanged():
        from opacus.accountants import PRVAccountant  # a second of imports that only the end of a study needs

    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    try:
        error = EPSILON_ERROR * max(1.0, epsilon_of(events, delta))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, OverflowError, MemoryError):
        return None
    return max(0.0, epsilon) if math.isfinite(epsilon) else None
