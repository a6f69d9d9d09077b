"""DP-FedAvg: McMahan, Ramage, Talwar, Zhang 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1 with flat clipping and the
estimator of a fixed denominator; the unit is a whole site. Clipping, sum, noise and account meet here, and the guarantee stands here.

Theorem. Of two runs of a study, let the one have a site's update in every round, and the other zeros in its place: whatever the site sends, and whatever
the others send, which may depend on every model released before (zero-out; Ponomareva et al. 2023). The models of all rounds are a function of one
release a round,

    round(T) + round(Z),    T = sum over sites that answered of clip(update, S),    Z ~ N(0, (noise_multiplier L)^2 I)

with `round` to the nearest multiple of g = `NoiseGrid.spacing` and L = S (1 + 2**-12) + g sqrt(d) for the d numbers of an update. So a run is the
adaptive composition of as many Gaussian mechanisms as it has rounds and folds, each `PrivacyEvent(noise_multiplier, sample_rate=1)`.

Proof. In each round the two sums differ by one clipped update, at most S in L2, arithmetic aside; rounding moves each entry of each sum by g/2 at most,
so the rounded ones differ by at most L. round(T) + round(Z) = round(round(T) + Z), for round(T) is a multiple of g: post-processing of the Gaussian
mechanism on round(T). Division by the number of sites that were asked, which is public and the same in both runs, the server's optimizer, control
variates, and whatever sites and public do with the models see only releases: post-processing. Sites count alike, so no weight is in it.

Arithmetic. Norms and clipped updates are float64 of the numbers that came; the sum is exact to 2**-70 an entry, independent of order, and rounded once.
A clipped norm is at most S (1 + 1e-9), far within the S 2**-12 of room. T and Z on the grid are whole numbers below 2**53: the addition is exact, and the low bits
of a float say no more than its value.

Assumes: the coordinator runs this code and keeps what it must, for it sees every update as it came and the promise is not against it; the noise is
ChaCha20 with a key from the operating system, drawn anew for every release and forgotten; Box-Muller in float64 is taken for exact. Whether a site
was asked, answered or was refused is the same in both runs: participation is public, and no part of the promise, and neither are evaluation
statistics. No amplification is claimed for sampling sites.

Under secure aggregation the coordinator learns T alone, as the decoded sum over the sites that are in it, and each site clips its own update before it is
rounded at random to whole steps and masked (`client.secure_updates.clipped_for_sum`): whatever is drawn, what a site has in T is at most S long in
L2. The theorem holds as it stands: given all roundings, the two sums differ by at most S; the roundings of a site are independent of all else, and a
mixture of pairs that one pair dominates is dominated by it (hockey-stick divergences are jointly convex); a sum of whole steps does not wrap, and in
float64 its last bit is off, which the S 2**-12 of room covers many times over. A sum that comes to nothing, below its threshold or begun anew, released
nothing: the noise is drawn once a round, for the sum that was decoded and checked, and whatever becomes of the model then, for no second one. Every
round is charged for every site, so it makes no difference that a sum needs more sites than one. Assumes beside the above: every site in a sum runs
this code. The coordinator cannot see whether one clips; one that does not has no promise of its own, moves the model further than S, and may undo the
others' promise, for it can bring the sum to where it wraps.

Account first. The plan is solved before the first round (`shared.site_level`), and charged for all rounds and folds. What a round spent is in rounds.jsonl
and its noised model in the checkpoint, on disk, before it is sent to anybody: that is the next round's task, or the closing evaluation. A round that a
crash cuts short before its checkpoint is done again, with noise drawn anew (the same in a seeded simulation); its first release never left, so it is
no second one. One after its checkpoint is read back, and not drawn again.

Edge cases: an update that was refused (not finite, wrong shape, too long for belief), a site that is late, and one that says no count as zero in the sum, and
the denominator stays; a zero update stays zero; of a site's second update in a round nothing is taken.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from server.aggregation import ROWS, ExactMean, FloatArrays, blocks
from shared.errors import ProtocolError
from shared.noise import KEY_BYTES, GaussianNoise, NoiseGrid
from shared.seeding import derive_key


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNoise:
    """The noise of a study's promise to whole sites.

    Attributes:
        max_norm: S.
        noise_multiplier: z.
        released: names of the entries of an update that are summed; others are dropped.
        seed: of a simulation's noise, which protects nobody; None: the operating system's.
    """

    max_norm: float
    noise_multiplier: float
    released: frozenset[str]
    seed: int | None = field(repr=False)

    def key(self, fold: int, round_number: int) -> bytes:
        """The key of one release's noise."""
        return os.urandom(KEY_BYTES) if self.seed is None else derive_key(self.seed, "site-level noise", fold, round_number)


class NoisedMean(ExactMean):
    """The noised sum of clipped updates over the number of sites asked.

    Args:
        num_asked: sites that were asked in this round, whoever answers.
    """

    def __init__(self, noise: SiteNoise, *, num_asked: int, fold: int, round_number: int) -> None:
        super().__init__()
        self._site_noise = noise
        self._num_asked = num_asked
        self._release = (fold, round_number)
        self._taken: set[str] = set()

    @property
    def num_asked(self) -> int:
        """The denominator."""
        return self._num_asked

    @property
    def total_weight(self) -> int:
        """Of the sites asked, so that nothing which is computed with it tells how many answered; 0 before the first update."""
        return self._num_asked if self._taken else 0

    def add(self, update: Mapping[str, NDArray[np.generic]], weight: int, *, site: str = "") -> None:
        """Add one update, clipped; see `ExactMean.add`.

        Raises:
            ProtocolError: one of this site was added before, and nothing more is.
        """
        assert weight == 1
        if site in self._taken:
            raise _second()
        own = {name: np.asarray(value, dtype=np.float64) for name, value in update.items() if name in self._site_noise.released}
        factor = self._factor(math.sqrt(math.fsum(float(np.square(value).sum()) for value in own.values())))
        super().add({name: value * factor for name, value in own.items()}, 1)
        self._taken.add(site)

    def add_rows(
        self, shapes: Mapping[str, tuple[int, ...]], updates: NDArray[np.floating], weights: Sequence[int], *, sites: Sequence[str] = ()
    ) -> list[ProtocolError | None]:  # fmt: skip
        """Add many, a few at a time; see `ExactMean.add_rows`."""
        assert all(weight == 1 for weight in weights)
        own = {name: shape for name, shape in shapes.items() if name in self._site_noise.released}
        kept = np.repeat([name in own for name in shapes], [math.prod(shape) for shape in shapes.values()])
        refusals: list[ProtocolError | None] = []
        for start in range(0, len(updates), ROWS):
            names = sites[start : start + ROWS]
            fresh = [name not in self._taken and name not in names[:place] for place, name in enumerate(names)]
            rows = updates[start : start + ROWS][np.array(fresh)][:, kept].astype(np.float64)
            factors = np.array([self._factor(math.sqrt(float(np.square(row).sum()))) for row in rows])
            judged = iter(super().add_rows(own, rows * factors[:, None], [1] * len(rows)))
            refused = [next(judged) if new else _second() for new in fresh]
            self._taken.update(name for name, refusal in zip(names, refused, strict=True) if refusal is None)
            refusals += refused
        return refusals

    def _factor(self, norm: float) -> float:
        return min(1.0, self._site_noise.max_norm / norm) if 0 < norm < math.inf else 1.0  # what is not finite is refused just after

    def take_mean(self) -> FloatArrays:
        """The release of this round, in the memory of the sum, which is gone with it."""
        return self.release(self.take_sum())

    def release(self, total: FloatArrays) -> FloatArrays:
        """The release of this round, in the memory of `total`: of the named entries that are summed, of which each site's part is at most S long. Its noise
        is drawn here, once."""
        noise, released = self._site_noise, {name: value for name, value in total.items() if name in self._site_noise.released}
        grid = NoiseGrid.of(noise.max_norm, sum(value.size for value in released.values()))
        draws = GaussianNoise(noise.key(*self._release))
        for value in released.values():
            flat = value.reshape(-1)
            for block in blocks(flat.size):  # beside a large model, draws take little memory
                flat[block] = grid.release(torch.from_numpy(flat[block]), draws, noise.noise_multiplier).numpy() / self._num_asked
        return released


def _second() -> ProtocolError:
    return ProtocolError("expected one update of a site in a round, got another")
