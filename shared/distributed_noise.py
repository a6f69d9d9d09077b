"""Distributed noise: under secure aggregation every site adds a share, and what is private is the sum.

Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation". The study says among how
many sites the noise is shared, K, and how many of them may be absent from a sum or collude with the coordinator, m (`missing`). Sites refuse a sum that
may have fewer than max(K, n) - m of the n that begin in it, so at least h = K - m honest shares are in every one. A site adds to its sum of clipped
gradients, on a grid of spacing g, the share round(N(0, s^2)) for each of d entries, s = z L / (g sqrt(h)), with z the noise multiplier and L the
sensitivity of `NoiseGrid`. s follows from what the hospital approved, and from no number of sites that a coordinator says there are.

**Theorem.** To whoever sees the sum, T steps at a site are private as T steps of DP-SGD there with noise multiplier z alone (the theorem of
`client.private_training`), with delta multiplied by exp(k / 2), but for k = 2 T d (h beta(s) + tau + beta(sqrt(h) s)) added to epsilon and
a = 3 T d (h + 1) 2 exp(-R^2 / 2), times 1 + exp(epsilon), added to delta.

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
   over who is sampled are bounded alike, and neighbouring sums are both off by so much: 2 d times it a step. P' <= exp(k/2) P + a on both sides
   turns P(S) <= exp(epsilon) Q(S) + delta into the same of P' and Q' with exp(k) more and what is said of delta.
3. round(N(0, (z L / g)^2)) on the grid is the noise of `client.private_training`.

Against everybody else colluding, the coordinator and all other sites, real or invented, a site has its own share alone: noise multiplier
z / sqrt(h).

Quantisation is in L (both roundings), the shares in the theorem, the missing ones in h. Nothing more is said of sums in which more than `missing` sites
collude or are absent.
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
    """What a study fixes of it: C, the number d of trainable parameters, the expected batch size, among how many sites, and how many may be missing."""

    max_grad_norm: float
    num_parameters: int
    batch_size: int
    sites: int
    missing: int

    @property
    def grid(self) -> NoiseGrid:
        """Of every site's sum."""
        return NoiseGrid.of(self.max_grad_norm, self.num_parameters, share=FINER)

    @property
    def honest(self) -> int:
        """h: shares that are in every sum."""
        return self.sites - self.missing

    def least_in_sum(self, num_sites: int) -> int:
        """Fewest sites that may be in a sum of which so many begin."""
        return max(self.sites, num_sites) - self.missing

    def share_std(self, noise_multiplier: float) -> float:
        """s: standard deviation of a site's share, in grid points."""
        grid = self.grid
        return noise_multiplier * grid.sensitivity / grid.spacing / math.sqrt(self.honest)

    @property
    def most_signal(self) -> int:
        """Grid points at which an entry of a site's own sum is cut off."""
        return math.ceil(ROOM * self.batch_size * self.max_grad_norm / self.grid.spacing)

    def most(self, noise_multiplier: float) -> int:
        """No entry of what a site adds is larger; a share that passes `TAIL` standard deviations, which none does, is not sent."""
        return self.most_signal + math.ceil(TAIL * self.share_std(noise_multiplier)) + 1

    def added(self, noise_multiplier: float, steps: int) -> tuple[float, float]:
        """k and a of the theorem, for so many steps."""
        honest, share = self.honest, self.share_std(noise_multiplier)
        of_shares, of_sum = TAIL**2 / (24 * share**2), TAIL**2 / (24 * honest * share**2)
        tau = 10 * math.fsum(math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, honest))
        entries = steps * self.num_parameters
        return 2 * entries * (honest * of_shares + tau + of_sum), 6 * entries * (honest + 1) * math.exp(-(TAIL**2) / 2)


def check_room(plan: SitePlan, noise: DistributedNoise) -> None:
    """Return where the plan, charged as steps of its own noise multiplier, covers what distributed noise costs at its delta.

    The noise that is added is `MORE` times the plan's; what that saves is held against what the theorem adds.

    Raises:
        ConfigurationError: it does not.
    """
    assert plan.noise_multiplier is not None and plan.delta is not None and plan.epsilon is not None
    added, tails = noise.added(plan.noise_multiplier, plan.planned_steps)
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier * MORE, sample_rate=plan.sample_rate, steps=plan.planned_steps)
    delta = (plan.delta - tails * (1 + math.exp(plan.epsilon))) * math.exp(-added / 2)
    if delta <= 0 or epsilon_of([event], delta) + added > plan.epsilon:
        raise ConfigurationError(
            f"secure_aggregation.noise: expected less than {added:g} to be added to epsilon by {noise.honest} shares and {plan.planned_steps} steps",
            "ask for fewer rounds or sites, or for a larger epsilon; or use noise 'local'",
        )
