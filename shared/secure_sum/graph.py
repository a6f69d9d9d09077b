"""Who masks with whom: a random k-regular graph (Bell et al. 2020, section 3), and the k and share threshold t that n sites need.

The graph is the Harary graph on a ring whose places are drawn from public randomness: each site is joined to the k / 2 next on either side. Let C of
the n sites collude with the server and D more drop out, both chosen before the places were drawn. Three things must not happen:

- **a curious neighbourhood**: t of an honest site's k neighbours collude, and so hold its secrets. At most n P[Hypergeometric(n-1, C, k) >= t];
- **a cut**: the honest sites that stay fall apart into two parts, whose sums would be known singly. Going round the ring, two that stay with fewer than
  k/2 removed between them are joined; so with at most one run of k/2 removed places all that stay are on one path, and a cut needs two such
  runs, k removed places in two given blocks: at most n(n-1)/2 P[k given places are all among the C + D removed];
- **a lost secret**: fewer than t of a site's neighbours stay to give shares. At most n P[Hypergeometric(n-1, D, k) > k - t].

`plan_graph` takes the smallest even k for which the first two together stay below 2**-40 and the third below 2**-20, with D = n - T, all that may
drop out above the threshold T, and C as given (`SumSetting.num_colluding`: one in five of the sites that began); t is the largest that it can be.
Tails are whole numbers, exact. Up to 128 sites, and where no k below n - 1 does, the graph is complete and t = T: no secret is lost above the
threshold, none is known to T - 1 sites, and nothing is left to chance; a mask of a million words costs a millisecond.

    n, with T = n // 2 + 1     200  300  500  1000
    k                          120  164  224   306
    t                           41   58   80   110
"""

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

SECURITY_BITS, CORRECTNESS_BITS = 40, 20
SEED_BYTES = 32
COMPLETE_UP_TO = 128  # sites


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """Every site has `degree` neighbours; `share_threshold` of the `degree` + 1 holders (neighbours and the site itself) restore a secret."""

    degree: int
    share_threshold: int


@functools.lru_cache(maxsize=256)
def plan_graph(num_sites: int, threshold: int, num_colluding: int) -> GraphPlan:
    """The graph for `num_sites` sites of which at least `threshold` stay.

    >>> plan_graph(10, 6, num_colluding=2)
    GraphPlan(degree=9, share_threshold=6)
    """
    num_dropped = num_sites - threshold
    degrees = range(2, num_sites - 1, 2) if num_sites > COMPLETE_UP_TO else ()
    for degree in degrees:
        share_threshold = _largest_share_threshold(num_sites, num_dropped, degree)
        if share_threshold and _is_secure(num_sites, num_colluding, num_dropped, degree, share_threshold):
            return GraphPlan(degree=degree, share_threshold=share_threshold)
    return GraphPlan(degree=num_sites - 1, share_threshold=threshold)


def _largest_share_threshold(num_sites: int, num_dropped: int, degree: int) -> int:
    """The largest t with n P[more than k - t neighbours drop out] < 2**-20; 0 where none is."""
    total, tail = math.comb(num_sites - 1, degree), 0
    for dropped in range(degree, -1, -1):
        tail += _ways(num_sites - 1, num_dropped, degree, dropped)
        if num_sites * tail << CORRECTNESS_BITS >= total:  # so many may drop out, and their shares must not be needed
            return degree - dropped
    raise AssertionError("the tail of a distribution comes to one")


def _is_secure(num_sites: int, num_colluding: int, num_dropped: int, degree: int, share_threshold: int) -> bool:
    """Whether a curious neighbourhood or a cut have a probability below 2**-40 together."""
    total = math.comb(num_sites - 1, degree)
    curious = num_sites * sum(_ways(num_sites - 1, num_colluding, degree, found) for found in range(share_threshold, degree + 1))
    removed = num_colluding + num_dropped
    placed = math.comb(num_sites, degree)  # P[k given places are removed] = C(removed, k) / C(n, k)
    cut = math.comb(num_sites, 2) * math.comb(removed, degree)
    return (curious * placed + cut * total) << SECURITY_BITS < total * placed


def _ways(population: int, marked: int, drawn: int, found: int) -> int:
    """In how many ways `drawn` of a population have exactly `found` marked ones among them."""
    return math.comb(marked, found) * math.comb(population - marked, drawn - found)


def neighbours(sites: Iterable[str], *, seed: bytes, degree: int) -> dict[str, tuple[str, ...]]:
    """Each site's neighbours, in order of name; `j` is one of `i`'s exactly where `i` is one of `j`'s.

    Args:
        seed: public; SHA-256 over it and a name orders the ring.
        degree: even, or one less than the number of sites: the complete graph.
    """
    ring = sorted(sites, key=lambda name: hashlib.sha256(b"wardround graph\n" + seed + name.encode()).digest())
    count = len(ring)
    if degree >= count - 1:
        return {name: tuple(sorted(set(ring) - {name})) for name in ring}
    assert degree % 2 == 0
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {name: tuple(sorted(ring[(place + step) % count] for step in steps)) for place, name in enumerate(ring)}
