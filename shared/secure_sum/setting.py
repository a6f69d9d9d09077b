"""What a round of secure aggregation is, and what it promises; both sides build it from public things and compare its digest.

The protocol is SecAgg+ (Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
algorithm 2, semi-honest) on Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning"), with the consistency check
of the latter's figure 4. n sites begin, T is the threshold, G a graph of degree k over those that advertised keys, t the share threshold (`shared.secure_sum.graph`).

    1 advertise keys   each site: an X25519 key for masks, one for shares, a commitment to its self-mask; signed with its long-lived Ed25519 key
    2 share keys       each site: Shamir shares of its mask key and of its self-mask seed, one pair sealed to each neighbour in G
    3 masked input     y_i = x_i + PRG(b_i) + sum over neighbours j > i of PRG(s_ij) - sum over j < i of PRG(s_ij), modulo a power of two
    4 sign survivors   each site that is in the sum: its signature on the list L of those in the sum, as it was told L
    5 unmask           each site that signed, shown the signatures of T sites (its own counted) on the very L that it signed itself: shares of b_j
                       of neighbours in L, of the mask keys of neighbours that dropped out

What is promised, where X25519, HKDF-SHA256, ChaCha20, ChaCha20-Poly1305 and Ed25519 are what they are believed to be, and SHA-256 hides:

- *A semi-honest server with colluding sites* (Bell et al. 2020, section 3) learns of the others' inputs the sum of those in the sum, and nothing
  else, and only where at least T sites are in it. With a complete graph this holds for up to T - 1 colluding sites (t = T); with a sparse one for
  the share of colluding sites of `graph`, chosen before the graph was drawn, but for a probability below 2**-40 a round. What follows from the sum
  follows: of T sites of which c collude, the sum of the T - c others is known, and if c = T - 1, so is the last one's input. That is no
  attack on the protocol, but the reason for a threshold.
- *An active server that substitutes keys or replays* is refused: keys are signed over run, study, fold, round, the sites that began, threshold,
  encoding, stage and the site's name.
- *An active server that sends sites different models* (Pasquini, Francati, Ateniese 2022, "Eluding Secure Aggregation in Federated Learning via Model
  Inconsistency") gets no sum: masks are drawn from keys that depend on the model that a site trained on, so they cancel between sites with the same
  one alone.
- *An active server that tells different sites different things*, with c colluding sites. An honest site signs one list a round (fold, round), however
  often the round is begun and the site restarted, and gives shares for that list alone, once T of the n sites that began signed it. And it masks one input
  a round on one model at one noise multiplier, whether it signs or not. Two lists for which shares were given have 2T signatures, of at most n + c that
  there can be: n - c honest sites sign one, c sign both.
  *Theorem.* With a complete graph and c < 2T - n, the server learns of the honest sites' inputs in a sum nothing, or the sum over *all* honest sites of
  one list L of T sites or more, which is a sum of T - c terms at least. For: (i) L is the only list. (ii) So honest sites give shares of one secret of
  each site alone, and the other has c < T holders. (iii) Let A be honest sites of L whose inputs would be known apart from those of the other honest
  ones of L. A site that signed L shared masks with all of L, none of which is known, so A is all of them or without any that signed. In the second
  case each of A's sites took the T - c honest ones that signed for none of its T or more, so T <= n - (T - c), which c < 2T - n excludes. (iv) The same
  list may be summed again, by who signed it; every honest site of it then has the same input, whether it signed or not, so the second sum says nothing
  (on another model or at another noise multiplier none who signed takes part).
  With T = n // 2 + 1, c = 0 where n is odd and c <= 1 where it is even; T = 2n/3: c < n/3; T = n: any c < n. Where c is 2T - n or more, two lists
  can be signed, one with a site in it and one without, and with both the server has both secrets of that site: nothing of this holds then.
  A round begun anew among other sites (n and T of its own) is bound by the same signatures: a site that signed puts its input into no other sum of that
  round than one of its list, and two lists that were unmasked need T + T' <= n'' + c signatures, n'' sites having begun in either. So what is summed is of
  one list only as long as T + T' is more than that: those who did not sign the first may be summed in a round that began with them alone, and a server
  may begin with few sites at once. What binds both is the study's own threshold, which holds however few begin: above half of *all* sites there is one list.
  In a sparse graph (i) holds as it stands, and what is unmasked is one list of T sites or more; that fewer than t of a site's neighbours collude and that
  masks join all of L rests on a graph which the server draws here, and is *not* promised against one that draws it unfairly.
- *A malicious site* may give any input within the range, or break the round, which then fails by name (its commitments and the count do not fit);
  a single false share is found out and left aside. It learns nothing.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from shared.distributed_noise import DistributedNoise
from shared.errors import ConfigurationError
from shared.messages import Content, Name, Number
from shared.secure_sum.quantisation import FixedPoint
from shared.study import Study

MIN_THRESHOLD = 3  # of two sites, each knows the other's input from the sum
MAX_SITES = 1000
SITES_PER_COLLUDING = 5

RandomBytes = Callable[[int], bytes]  # n -> n bytes, uniform and independent of all before


def least_threshold(num_sites: int) -> int:
    """The fewest sites that a sum may have in it, of so many that began: more than half, and never under 3.

    >>> [least_threshold(number) for number in (3, 4, 5, 6, 50)]
    [3, 3, 3, 4, 26]
    """
    return max(MIN_THRESHOLD, num_sites // 2 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumForm:
    """What a study fixes of its sums: `num_values` numbers in [-max_value, max_value], and a weight of 1 to `max_weight`, per site.

    An L2 bound on the vector is a `max_value`: no coordinate is larger than the norm.
    """

    num_values: int
    max_value: float
    max_weight: int
    threshold: int = 0  # the study's own, where it has one
    noise: DistributedNoise | None = None  # then values are whole numbers, and how large they are follows from it

    def least_in_sum(self, num_sites: int) -> int:
        """Fewest sites that a sum may have in it, of so many that begin, by the study as by the protocol."""
        return max(self.threshold, least_threshold(num_sites), 0 if self.noise is None else self.noise.least_in_sum(num_sites))

    @classmethod
    def of_study(cls, study: Study, *, num_values: int, num_trainable: int) -> "SumForm":
        """Of updates with so many values, or gradients with so many, in a study that aggregates securely; where sites count alike, no digit is left
        to weights; where the study clips them for a promise to whole sites, none to values beyond that norm."""
        options = study.secure_aggregation
        assert options is not None
        if study.distributed_noise:
            noise = DistributedNoise(
                max_grad_norm=study.privacy.max_grad_norm, num_parameters=num_trainable, batch_size=study.training.batch_size,
                sites=options.sites or 0, missing=options.missing, colluding=options.colluding,
            )  # fmt: skip
            return cls(num_values=num_trainable, max_value=1.0, max_weight=1, threshold=options.threshold or 0, noise=noise)
        max_weight = options.max_weight if study.strategy.weights == "declared" else 1
        max_value = min(options.max_value, study.privacy.max_site_norm or options.max_value)
        return cls(num_values=num_values, max_value=max_value, max_weight=max_weight, threshold=options.threshold or 0)


class SumRound(Content):
    """Which round of which study a sum is of; in every message."""

    run: Name
    study_hash: Name
    fold: Number
    round: Number


@dataclass(frozen=True, kw_only=True)  # without slots, for what is computed once
class SumSetting:
    """One sum: public, and equal at all sides or nothing comes of it.

    Args:
        sites: who began, in order; 3 to `MAX_SITES` different names.
        threshold: the sum has at least so many of them in it.

    Raises:
        ConfigurationError: too few or many sites, or a threshold that is too low or above their number.
    """

    of: SumRound
    sites: tuple[str, ...]
    threshold: int
    form: SumForm
    noise_multiplier: float = 0.0  # of distributed noise, the same at all sites

    def __post_init__(self) -> None:
        if not MIN_THRESHOLD <= len(self.sites) <= MAX_SITES or list(self.sites) != sorted(set(self.sites)):
            raise ConfigurationError(f"sites: expected {MIN_THRESHOLD} to {MAX_SITES} different names in order, got {len(self.sites)} names")
        if not least_threshold(len(self.sites)) <= self.threshold <= len(self.sites):
            raise ConfigurationError(
                f"threshold: expected {least_threshold(len(self.sites))} to {len(self.sites)} of {len(self.sites)} sites, got {self.threshold}",
                "a secure sum has more than half of the sites that began in it, and never fewer than 3",
            )

    @functools.cached_property
    def encoding(self) -> FixedPoint:
        """The fixed point of its inputs."""
        if self.form.noise is not None:
            most = self.form.noise.most(self.noise_multiplier)
            return FixedPoint(num_sites=len(self.sites), max_value=float(most), max_weight=1, levels=most)
        return FixedPoint.finest(num_sites=len(self.sites), max_value=self.form.max_value, max_weight=self.form.max_weight)

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it."""
        form = self.form
        content = [
            self.of.run, self.of.study_hash, self.of.fold, self.of.round, list(self.sites), self.threshold,
            form.num_values, float(form.max_value).hex(), form.max_weight, self.encoding.levels, float(self.noise_multiplier).hex(),
        ]  # fmt: skip
        return hashlib.sha256(b"wardround secure sum\n" + json.dumps(content).encode()).digest()

    @property
    def num_colluding(self) -> int:
        """So many sites may collude with the server where the graph is sparse."""
        return len(self.sites) // SITES_PER_COLLUDING

    def number_of(self, site: str) -> int:
        """The site's place among those that began, from 1: where its shares are values of the polynomials."""
        return self._numbers[site]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.sites, start=1)}
