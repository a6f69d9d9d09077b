"""Distributed noise: under secure aggregation every site adds a share, and what is private is the sum.

Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation". The study says among how
many sites the noise is shared, K, how many of them may be absent from a sum, m (`missing`), and how many more may collude with the coordinator, w
(`colluding`). Sites refuse a sum that may have fewer than max(K, n) - m of the n that begin in it, so whoever chooses who is absent, at least
h = K - m - w honest shares are in every one. A site adds to its sum of clipped gradients, on a grid of spacing g, the share round(N(0, s^2)) for each
of d entries, s = z L / (g sqrt(h)), with z the noise multiplier and L the sensitivity of `NoiseGrid`. s follows from what the hospital approved, and
from no number of sites that a coordinator says there are.

**Theorem.** To whoever sees the sums, a step at a site tells no more than a step of DP-SGD there with noise multiplier z: its two laws, with one unit
and without, are each within total variation distance a / T of a pair that the Poisson-subsampled Gaussian of (z, q) dominates. So
`PrivacyEvent(z, q, T)`, which the ledger is charged, bounds T steps by every measure at once: privacy loss distributions, Renyi divergence at every
order, with whatever other studies were charged, and also where fewer steps were taken; delta is a (1 + exp(epsilon)) more, which `check_room` keeps
below the last digit of a delta. It holds where the noise added is r z with r >= `MORE`, and

    sqrt(2 pi) z c <= 1 - 1/r,   c = d (h beta(s) + tau + beta(sqrt(h) s)),   a = 6 T d (h + 1) exp(-R^2 / 2)

Proof. The sum is the sum of all sites' rounded gradient sums, which one unit of one site moves by at most L in L2, plus noise that holds h
independent shares; further shares, of other sites or colluding ones, are independent of it: post-processing. Write N_Z(s^2) for the discrete
Gaussian.

1. round(N(0, s^2)) and N_Z(s^2) have densities whose ratio is between exp(-beta(s)) and exp(beta(s)) at all |x| <= R s, beta(s) = R^2 / (24 s^2):
   the ratio at x is the mean over u uniform on [-1/2, 1/2] of exp(-x u / s^2 - u^2 / (2 s^2)), times the discrete Gaussian's normalisation, which is
   that of the density but for a factor 1 +- 3 exp(-2 pi^2 s^2), nothing for s >= 3. By Jensen the mean is at least exp(-1 / (24 s^2)); leaving
   out exp(-u^2 / (2 s^2)) <= 1, and as a uniform variable on an interval of length 1 has moments below those of a Gaussian of variance 1/12, it
   is at most exp(x^2 / (24 s^4)). Beyond R s each has mass below 2 exp(-R^2 / 2).
2. So h shares are as h draws of N_Z(s^2), but for h beta(s); these as one of N_Z(h s^2), but for tau = 10 sum_{k=1}^{h-1} exp(-2 pi^2 s^2 k / (k + 1))
   (the paper's theorem 1); and that as round(N(0, h s^2)), but for beta(sqrt(h) s). Ratios of independent entries multiply. So the noise of a step, F',
   and the Gaussian one on the grid, F, of multiplier r z, have F'(S) <= exp(c) F(S) + b and F(S) <= exp(c) F'(S) + b for every S, b = a / (3 T).
   Cut F' off at exp(-c) F and exp(c) F, and give what is missing or too much (at most b) back between these: a law within 3 b / 2 of F', whose
   ratio to F is between exp(-c) and exp(c) everywhere, and symmetric as both are. F' is this law from here on; the 3 b / 2, in both of two worlds and
   at every step, are what a is for.
3. Let F_v be F moved by v, |v| <= L, and likewise F'_v. A test of F against F_v with false positives Phi(-s) has at least Phi(s - 1/(r z)) false
   negatives, for rounding is post-processing of a Gaussian mechanism (Dong, Roth, Su 2022). A test of F' against F'_v with false positives Phi(-t),
   t >= 1 / (2 z), has at most exp(c) Phi(-t) of them under F, say Phi(-s); so its false negatives are at least exp(-c) Phi(s - 1/(r z)), and its true
   positives at most exp(c) Phi(1/(r z) - s). To be shown: they are no fewer than the Gaussian's of multiplier z, Phi(t - 1/z). With A = s - 1/(r z) and
   B = t - 1/z it is enough that log Phi(A) - log Phi(B) >= c, or log Phi(-B) - log Phi(-A) >= c. The hazard lambda(y) = phi(y) / Phi(-y) rises and is
   convex (Sampford 1953), and s >= 0 (c is at most lambda(0) / (2 z)), so t - s <= c / lambda(0), and A - B >= (1 - 1/r) / z - c / lambda(0). The two
   differences are the integrals of lambda(-y) and of lambda(y) over [B, A]; where its middle is at most 0 the first is at least (A - B) lambda(0), else
   the second is (Jensen). As lambda(0) = sqrt(2 / pi), (A - B) lambda(0) >= c is the condition. For t < 1 / (2 z) the same follows, for both curves of
   errors are their own inverses. So F' against F'_v is no easier to tell apart than N(0, z^2) against N(1, z^2), in either order.
4. Poisson sampling mixes F'_v with F' alike as it mixes the Gaussians, and keeps the order (Zhu, Dong and Wang 2022, theorem 11), and so does adaptive
   composition (theorem 10), also with releases of other kinds. Every measure above follows from hockey-stick divergences, and rises with them.
5. round(N(0, (z L / g)^2)) on the grid is the noise of `client.private_training`, whose theorem is the case of one share.

Against everybody else colluding, the coordinator and all other sites, real or invented, a site has its own share alone: noise multiplier
z / sqrt(h).

Quantisation is in L (both roundings), the shares in the theorem, the missing and the colluding ones in h. Nothing more is said where more than
`colluding` sites collude.
"""

import math
from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.noise import NoiseGrid
from shared.plan import SitePlan

POINTS = "noised sum of gradients"  # a site's release, by name; no parameter has such a one
TAIL = 15.0  # R: standard deviations within which ratios are bounded
FINER = 2.0**-18  # of C / sqrt(d): the grid's spacing, fine enough that h beta(s) is nothing beside epsilon
MORE = 1.005  # r: the noise that is added, by what is charged, which pays for what shares are more than one Gaussian
LEAST_SHARE = 3.0  # standard deviation of a share in grid points, from which step 1 holds
LAST_DIGIT = 2.0**-53  # of a delta, as a float holds it
LARGEST_EPSILON = 20.0  # of a limit to which a study may be charged, in what is allowed to a; a study's own, where it is larger
ROOM = 2.0  # times the expected batch: an entry of a sum of clipped gradients is cut off there, which moves no two sums further apart


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedNoise:
    """What a study fixes of it: C, the number d of trainable parameters, the expected batch size, among how many sites, how many may be absent, and how
    many of those that are there may collude."""

    max_grad_norm: float
    num_parameters: int
    batch_size: int
    sites: int
    missing: int
    colluding: int = 0

    @property
    def grid(self) -> NoiseGrid:
        """Of every site's sum."""
        return NoiseGrid.of(self.max_grad_norm, self.num_parameters, share=FINER)

    @property
    def honest(self) -> int:
        """h: shares of honest sites that are in every sum."""
        return self.sites - self.missing - self.colluding

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

    def distance(self, noise_multiplier: float) -> float:
        """c of the theorem: how far the noise of a step is from a Gaussian's on the grid, as the logarithm of a ratio, within the tails."""
        honest, share = self.honest, self.share_std(noise_multiplier)
        of_shares, of_sum = TAIL**2 / (24 * share**2), TAIL**2 / (24 * honest * share**2)
        tau = 10 * math.fsum(math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, honest))
        return self.num_parameters * (honest * of_shares + tau + of_sum)

    def tails(self, steps: int) -> float:
        """a of the theorem, for so many steps."""
        return 6 * steps * self.num_parameters * (self.honest + 1) * math.exp(-(TAIL**2) / 2)


def check_room(plan: SitePlan, noise: DistributedNoise) -> None:
    """Return where what the ledger is charged, steps of the plan's own noise multiplier, bounds what distributed noise costs: the theorem's condition.

    The noise that is added is `MORE` times the plan's; what that saves pays for what shares differ from one Gaussian by.

    Raises:
        ConfigurationError: it does not.
    """
    assert plan.noise_multiplier is not None and plan.delta is not None and plan.epsilon is not None
    distance, room = math.sqrt(2 * math.pi) * plan.noise_multiplier * noise.distance(plan.noise_multiplier), 1 - 1 / MORE
    tails = noise.tails(plan.planned_steps) * (1 + math.exp(max(plan.epsilon, LARGEST_EPSILON)))
    if not (noise.share_std(plan.noise_multiplier) >= LEAST_SHARE and distance <= room and tails <= LAST_DIGIT * plan.delta):
        raise ConfigurationError(
            f"secure_aggregation.noise: expected shares that add up to all but a Gaussian (within {room:.3g}), got {distance:.3g} for {noise.honest} shares; "
            f"delta would be {tails:.2g} more",
            "ask for fewer sites, or for a smaller epsilon; or use noise 'local'",
        )
