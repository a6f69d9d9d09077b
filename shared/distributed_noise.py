"""Distributed noise: under secure aggregation every site adds a share, and what is private is the sum.

Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation". K sites begin a sum; at
least K - m of them are in it, or nobody learns it; of those outside and those that collude with the coordinator there are at most m together
(`missing`), so at least h = K - m honest shares are in every sum. A site adds to its sum of clipped gradients, on a grid of spacing g, the share
round(N(0, s^2)) for each of d entries, s = z L / (g sqrt(h)), with z the noise multiplier and L the sensitivity of `NoiseGrid`.

**Theorem.** To whoever sees the sum, T steps at a site are private as T steps of DP-SGD there with noise multiplier z alone (the theorem of
`client.private_training`), but for 2 T d (h beta(s) + tau + beta(sqrt(h) s)) added to epsilon and 3 T d (h + 1) 2 exp(-R^2 / 2) added to delta.

Proof. The sum is the sum of all sites' rounded gradient sums, which one unit of one site moves by at most L in L2, plus noise that holds h
independent shares; further shares, of other sites or colluding ones, are independent of it: post-processing. Write N_Z(s^2) for the discrete
Gaussian.

1. round(N(0, s^2)) and N_Z(s^2) have densities whose ratio is between exp(-beta(s)) and exp(beta(s)) at all |x| <= R s, beta(s) = R^2 / (24 s^2):
   the ratio at x is the mean over u uniform on [-1/2, 1/2] of exp(-x u / s^2 - u^2 / (2 s^2)), times the discrete Gaussian's normalisation, which is
   that of the density but for a factor 1 +- 3 exp(-2 pi^2 s^2), nothing for s >= 3. By Jensen the mean is at least exp(-1 / (24 s^2)); leaving
   out exp(-u^2 / (2 s^2)) <= 1, and as a uniform variable on an interval of length 1 has moments below those of a Gaussian of variance 1/12, it
   is at most exp(x^2 / (24 s^4)). Beyond R s each has mass below 2 exp(-R^2 / 2).
2. So h shares are as h draws of N_Z(s^2), but for h beta(s); these as one of N_Z(h s^2), but for tau = 10 sum_{k=1}^{h-1} exp(-2 pi^2 s^2 k / (k + 1))
   (the paper's theorem 1); and that as round(N(0, h s^2)), but for beta(sqrt(h) s). Ratios of independent entries multiply, ratios of mixtures
   over who is sampled are bounded alike, and neighbouring sums are both off by so much: 2 d times it a step.
3. round(N(0, (z L / g)^2)) on the grid is the noise of `client.private_training`.

Against everybody else colluding, the coordinator and all other sites, a site has its own share alone: noise multiplier z / sqrt(h).

Quantisation is in L (both roundings), the shares in the theorem, the missing ones in h. Nothing is said of sums in which more than `missing` sites
collude or are absent; sites refuse a threshold below h.
"""

import math
from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.noise import NoiseGrid
from shared.plan import SitePlan
from shared.privacy import PrivacyEvent, epsilon_of

TAIL = 13.0  # R: standard deviations within which ratios are bounded
FINER = 2.0**-18  # of C / sqrt(d): the grid's spacing, fine enough that h beta(s) is nothing beside epsilon
MORE = 1.005  # the noise that is added, by what is charged: room for what the theorem adds
ROOM = 2.0  # times the expected batch: an entry of a sum of clipped gradients is cut off there, which moves no two sums further apart


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedNoise:
    """What a study fixes of it: C, the number d of trainable parameters, the expected batch size, and how many sites may be missing."""

    max_grad_norm: float
    num_parameters: int
    batch_size: int
    missing: int

    @property
    def grid(self) -> NoiseGrid:
        """Of every site's sum."""
        return NoiseGrid.of(self.max_grad_norm, self.num_parameters, share=FINER)

    def honest(self, num_sites: int) -> int:
        """h: shares that are in every sum."""
        return num_sites - self.missing

    def share_std(self, num_sites: int, noise_multiplier: float) -> float:
        """s: standard deviation of a site's share, in grid points."""
        grid = self.grid
        return noise_multiplier * grid.sensitivity / grid.spacing / math.sqrt(self.honest(num_sites))

    @property
    def most_signal(self) -> int:
        """Grid points at which an entry of a site's own sum is cut off."""
        return math.ceil(ROOM * self.batch_size * self.max_grad_norm / self.grid.spacing)

    def most(self, num_sites: int, noise_multiplier: float) -> int:
        """No entry of what a site adds is larger; a share that passes `TAIL` standard deviations, which none does, is not sent."""
        return self.most_signal + math.ceil(TAIL * self.share_std(num_sites, noise_multiplier)) + 1

    def added(self, num_sites: int, noise_multiplier: float, steps: int) -> tuple[float, float]:
        """What the theorem adds to epsilon and delta of so many steps."""
        honest, share = self.honest(num_sites), self.share_std(num_sites, noise_multiplier)
        of_shares, of_sum = TAIL**2 / (24 * share**2), TAIL**2 / (24 * honest * share**2)
        tau = 10 * math.fsum(math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, honest))
        entries = steps * self.num_parameters
        return 2 * entries * (honest * of_shares + tau + of_sum), 6 * entries * (honest + 1) * math.exp(-(TAIL**2) / 2)


def check_room(plan: SitePlan, noise: DistributedNoise, num_sites: int) -> None:
    """Return where the plan, charged as steps of its own noise multiplier, covers what distributed noise costs at its delta.

    The noise that is added is `MORE` times the plan's; what that saves is held against what the theorem adds.

    Raises:
        ConfigurationError: it does not.
    """
    assert plan.noise_multiplier is not None and plan.delta is not None and plan.epsilon is not None
    epsilon, delta = noise.added(num_sites, plan.noise_multiplier, plan.planned_steps)
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier * MORE, sample_rate=plan.sample_rate, steps=plan.planned_steps)
    if epsilon_of([event], plan.delta - delta) + epsilon > plan.epsilon:
        raise ConfigurationError(
            f"secure_aggregation.noise: expected less than {epsilon:g} to be added to epsilon by {num_sites} shares and {plan.planned_steps} steps",
            "ask for fewer rounds or sites, or for a larger epsilon; or use noise 'local'",
        )


def epsilon_if_all_others_collude(plan_noise: float, *, sample_rate: float, steps: int, delta: float, honest: int) -> float:
    """Of a site whose own share is all the noise there is against the coordinator and every other site together."""
    share = PrivacyEvent(noise_multiplier=plan_noise / math.sqrt(honest), sample_rate=sample_rate, steps=steps)
    return epsilon_of([share], delta)
