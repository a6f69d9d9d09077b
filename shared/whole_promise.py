"""What holds for the model of a run that started with another run's: both promises together, by basic composition (Dwork and Roth 2014, theorem 3.16).

A run's claim is of its own updates. Whoever was a patient of the run before is protected by that run's claim alone, and where it made none, by
nothing, however small the epsilon of the second. So a model has a promise only where every run that went into it made one, for the same unit; it is
the sum of epsilons and the sum of deltas, for a patient of all of them; one of fewer has no less.
"""

from dataclasses import dataclass
from typing import Literal

from shared.results import PrivacyClaim, StartedFrom

Unit = Literal["patient", "record", "site", "none", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePromise:
    """What is promised to whoever was a patient of any run that went into a model.

    Attributes:
        unit: "none": nothing is promised to somebody; "unknown": a claim is not at hand, or the claims are for different units.
        protects: there is a promise, and no part of its noise was seeded.
        epsilon, delta: sums over the runs; None where there is no promise.
    """

    unit: Unit
    protects: bool = False
    epsilon: float | None = None
    delta: float | None = None


def whole_promise(claim: PrivacyClaim | None, start: StartedFrom | None) -> WholePromise:
    """The promise of a run with this claim that started with `start`, or from its seed.

    >>> whole_promise(None, None).unit
    'unknown'
    """
    own = _of_claim(claim)
    if start is None:
        return own
    if "none" in (own.unit, start.unit):
        return WholePromise(unit="none")
    if own.unit != start.unit or own.epsilon is None or own.delta is None or start.epsilon is None or start.delta is None:
        return WholePromise(unit="unknown")
    return WholePromise(unit=own.unit, protects=own.protects and start.protects, epsilon=own.epsilon + start.epsilon, delta=own.delta + start.delta)


def _of_claim(claim: PrivacyClaim | None) -> WholePromise:
    if claim is None:
        return WholePromise(unit="unknown")
    if claim.unit == "none":
        return WholePromise(unit="none")
    spent = claim.site_level if claim.unit == "site" else claim.federation
    if spent is None:  # no site sent anything
        return WholePromise(unit=claim.unit, protects=claim.protects, epsilon=0.0, delta=0.0)
    return WholePromise(unit=claim.unit, protects=claim.protects, epsilon=spent.epsilon, delta=spent.delta)


def start_sentence(start: StartedFrom) -> str:
    """Where a run's model came from, and what that run promised, for whoever was a patient there."""
    share = "" if start.share is None else f", {100 * start.share:.3g} % of the parameters"
    came = f"It started with a model of study {start.study} ({len(start.taken)} of {len(start.taken) + len(start.fresh)} tensors{share})"
    if start.unit == "none":
        return f"{came}, which promised nothing: whoever was a patient there is protected by nothing that stands here."
    if start.unit == "unknown" or start.epsilon is None or start.delta is None:
        return f"{came}; what was promised there is not known: count on nothing for whoever was a patient there."
    seeded = "" if start.protects else ", with seeded noise, which protects nobody"
    return (
        f"{came}, which promised its own {start.unit}s epsilon {rounded_up(start.epsilon)} at delta {start.delta:g}{seeded}; for a {start.unit} of both, "
        "epsilons and deltas add up."
    )


def rounded_up(epsilon: float) -> str:
    """Two decimals, never below the number."""
    return f"{-(-epsilon * 100 // 1) / 100:g}"
