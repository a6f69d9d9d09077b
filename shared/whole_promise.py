"""What holds for the model of a run that started with another run's: both promises together, by basic composition (Dwork and Roth 2014, theorem 3.16).

A run's claim is of its own updates. Whoever was a patient of the run before is protected by that run's claim alone, and where it made none, by
nothing, however small the epsilon of the second. So a model has a promise only where every run that went into it made one, for the same unit; it is
the sum of epsilons and the sum of deltas, for a patient of all of them; one of fewer has no less.

Where a run added noise in shares, its epsilon needs that few of its sites are in league, and there is a second one against all of them together
(`shared.distributed_noise`). The sum of the first needs what each of them needs; of a run whose noise is each update's own, both are one number.
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
        colluding: the sum of epsilons against the coordinator and all other sites together; None where it is not known.
        conditions: of `epsilon`, each after "as long as"; none where it holds whoever is in league.
    """

    unit: Unit
    protects: bool = False
    epsilon: float | None = None
    delta: float | None = None
    colluding: float | None = None
    conditions: tuple[str, ...] = ()


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
    theirs = start.epsilon_if_all_others_collude
    return WholePromise(
        unit=own.unit, protects=own.protects and start.protects, epsilon=own.epsilon + start.epsilon, delta=own.delta + start.delta,
        colluding=None if own.colluding is None or theirs is None else own.colluding + theirs,
        conditions=(*start.conditions, *own.conditions),
    )  # fmt: skip


def _of_claim(claim: PrivacyClaim | None) -> WholePromise:
    if claim is None:
        return WholePromise(unit="unknown")
    if claim.unit == "none":
        return WholePromise(unit="none")
    spent = claim.site_level if claim.unit == "site" else claim.federation
    if spent is None:  # no site sent anything
        return WholePromise(unit=claim.unit, protects=claim.protects, epsilon=0.0, delta=0.0, colluding=0.0)
    shared = claim.distributed_noise
    if shared is None:
        return WholePromise(unit=claim.unit, protects=claim.protects, epsilon=spent.epsilon, delta=spent.delta, colluding=spent.epsilon)
    colluding = max(site.epsilon_if_all_others_collude for site in shared.sites.values())
    condition = shared.condition or f"at most {shared.missing} of the sites are absent from a sum or in league with the coordinator"
    return WholePromise(
        unit=claim.unit, protects=claim.protects, epsilon=spent.epsilon, delta=spent.delta, colluding=colluding, conditions=(condition,),
    )  # fmt: skip


def start_sentence(start: StartedFrom, unit: Unit) -> str:
    """Where a run's model came from, and what that run promised, for whoever was a patient there.

    Args:
        unit: of the promise of the run that started; two promises add up where they are for the same.
    """
    share = "" if start.share is None else f", {100 * start.share:.3g} % of the parameters"
    came = f"It started with a model of study {start.study} ({len(start.taken)} of {len(start.taken) + len(start.fresh)} tensors{share})"
    if start.unit == "none":
        return f"{came}, which promised nothing: whoever was a patient there is protected by nothing that stands here."
    if start.unit == "unknown" or start.epsilon is None or start.delta is None:
        return f"{came}; what was promised there is not known: count on nothing for whoever was a patient there."
    seeded = "" if start.protects else ", with seeded noise, which protects nobody"
    both = (
        f"for a {unit} of both, epsilons and deltas add up."
        if start.unit == unit
        else f"this run promises {'nothing' if unit == 'none' else f'something else, to {unit}s'}: the two do not add up, and nothing is promised to a {start.unit} of both."
    )
    return f"{came}, which promised its own {start.unit}s epsilon {rounded_up(start.epsilon)} at delta {start.delta:g}{_needs(start)}{seeded}; {both}"


def _needs(start: StartedFrom) -> str:
    """Against whom the promise of an earlier run holds, where that is not everybody."""
    if start.unit == "site":
        return ", against everybody but the coordinator"
    if not start.conditions:
        return ""
    worst = start.epsilon_if_all_others_collude
    together = "" if worst is None else f" ({rounded_up(worst)} against the coordinator and all other sites together)"
    return f" as long as {in_words(start.conditions)} there{together}"


def in_words(conditions: tuple[str, ...]) -> str:
    """All of them, each once."""
    return ", and ".join(dict.fromkeys(conditions))


def rounded_up(epsilon: float) -> str:
    """Two decimals, never below the number."""
    return f"{-(-epsilon * 100 // 1) / 100:g}"
