"""A promise to whole sites: what the coordinator's noise must be, solved before the first round from public numbers alone.

Unit: one site, with all of its patients. Neighbouring relation: zero-out (Ponomareva et al. 2023, "How to DP-fy ML"; Kairouz et al. 2021,
"Practical and Private (Deep) Learning without Sampling or Shuffling"): of two runs, the one has a site's update in every round, the other zeros in its
place. The mechanism and its theorem stand in `server.strategies.dp_fedavg`; each of its releases is a Gaussian mechanism, charged
without any amplification: the sites of a round are a sample of fixed size, which is not Poisson, and with few hospitals hides little.
"""

from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.privacy import PrivacyEvent, epsilon_after_rounds, epsilon_of, epsilon_renyi, solve_noise_multiplier
from shared.study import Study

DELTA_CEILING = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLevelPlan:
    """The whole study's promise to any one site.

    Attributes:
        max_norm: S, to which an update is clipped, in L2.
        noise_multiplier: z; the sum of a round carries noise of standard deviation z S (a little more, for rounding).
        releases: rounds times folds; each releases one sum. A round that is done again after a crash released nothing before.
    """

    max_norm: float
    noise_multiplier: float
    delta: float
    releases: int

    def event(self, releases: int) -> PrivacyEvent:
        """The spend of so many releases; without sampling."""
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=1.0, steps=releases)

    @property
    def epsilon(self) -> float:
        """Of the whole plan, an upper bound."""
        return epsilon_of([self.event(self.releases)], self.delta)

    def epsilon_after(self, releases: int) -> float:
        """Upper bound after so many; what earlier ones came to is kept, so the next costs little."""
        return epsilon_after_rounds(self.event(1), releases, self.delta)

    def epsilon_cross_check(self, releases: int) -> float:
        """Another accountant's upper bound: Renyi divergence, wider than privacy loss distributions."""
        return epsilon_renyi([self.event(releases)], self.delta)


def plan_site_level(study: Study) -> SiteLevelPlan | None:
    """The promise to whole sites that the study asks for, with its noise; None where it asks for none. Its delta must be set.

    Raises:
        ConfigurationError: delta is not set, or no noise fits the budget.
    """
    privacy = study.privacy
    if not study.site_level:
        return None
    alone = privacy.unit == "site"
    delta = privacy.delta if alone else privacy.site_delta
    if delta is None:
        key = "delta" if alone else "site_delta"
        raise ConfigurationError(
            f"privacy.{key}: expected a value by now, got none", "set it, or let the federation derive it from the number of sites"
        )
    assert privacy.max_site_norm is not None
    releases = study.rounds.count * study.evaluation.folds
    noise = privacy.noise_multiplier if alone else None
    if noise is None:
        epsilon = privacy.epsilon if alone else privacy.site_epsilon
        assert epsilon is not None
        noise = solve_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=1.0, steps=releases)
    return SiteLevelPlan(max_norm=privacy.max_site_norm, noise_multiplier=noise, delta=delta, releases=releases)


def default_site_delta(num_sites: int) -> float:
    """min(1e-3, 1 / (10 x sites)).

    At delta = 1 / sites, a mechanism that publishes the whole update of one site, drawn by lot, would keep its promise with epsilon 0. So delta has to be far
    below that, and the ceiling keeps it there for few sites: with eight, 1e-3 is a 125th. It is not the 1e-6 of a study of millions: with few sites there
    is no noise that gives both that and a model, and a promise to one of eight is worth that much less.

    >>> default_site_delta(8), default_site_delta(1000)
    (0.001, 0.0001)
    """
    return min(DELTA_CEILING, 1 / (10 * max(num_sites, 1)))


def check_site_delta(delta: float, num_sites: int, *, key: str = "site_delta") -> None:
    """Raise `ConfigurationError` unless delta < 1 / sites."""
    if delta * num_sites >= 1:
        raise ConfigurationError(
            f"privacy.{key}: expected delta < 1/{num_sites} (sites), for at that a whole site's update might be published, got {delta:g}",
            f"lower it, or omit it: {default_site_delta(num_sites):g}",
        )


def resolve_site_delta(study: Study, num_sites: int) -> Study:
    """The study with the delta of its promise to whole sites filled in, where it makes one and leaves delta out.

    Raises:
        ConfigurationError: its delta is too large for so many sites.
    """
    if not study.site_level:
        return study
    key = "delta" if study.privacy.unit == "site" else "site_delta"
    delta = study.privacy.delta if study.privacy.unit == "site" else study.privacy.site_delta
    if delta is None:
        return study.replace(privacy={key: default_site_delta(num_sites)})
    check_site_delta(delta, num_sites, key=key)
    return study
