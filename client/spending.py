"""What a coordinator is told that a site has spent on a study."""

import functools

from client.cross_check import epsilon_prv
from shared.plan import SitePlan
from shared.privacy import PrivacyEvent, epsilon_after_rounds, epsilon_of
from shared.results import SitePrivacy


def site_privacy(plan: SitePlan, steps: int, *, cross_check: bool) -> SitePrivacy:
    """What `steps` steps of this plan cost: the tighter of two upper bounds where `cross_check`, both by other methods and other code."""
    assert plan.noise_multiplier is not None and plan.delta is not None
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=steps)
    pld = epsilon_of([event], plan.delta)
    prv = epsilon_prv([event], plan.delta) if cross_check else None
    prv_is_tighter = prv is not None and prv < pld
    return SitePrivacy(
        epsilon=prv if prv is not None and prv_is_tighter else pld,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        accountant="prv" if prv_is_tighter else "pld",
        epsilon_cross_check=pld if prv_is_tighter else prv,
        cross_check_accountant="pld" if prv_is_tighter else "prv",
        epsilon_planned=plan.epsilon,
    )


@functools.lru_cache(maxsize=4096)
def burn_down(plan: SitePlan, steps: int) -> SitePrivacy:
    """What `steps` steps of this plan cost, for the middle of a simulation: an upper bound that follows from that of the round before."""
    assert plan.noise_multiplier is not None and plan.delta is not None
    rounds, rest = divmod(steps, plan.steps_per_round)
    if rest or rounds >= plan.rounds:  # the whole of it, to the last digit as the plan says
        return site_privacy(plan, steps, cross_check=False)
    return SitePrivacy(
        epsilon=epsilon_after_rounds(plan.round_event(), rounds, plan.delta), delta=plan.delta, noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate, steps=steps, accountant="pld", epsilon_cross_check=None, cross_check_accountant="prv",
        epsilon_planned=plan.epsilon,
    )  # fmt: skip
