"""Who sees what of a site's training, in words: the one place that decides what a report, a terminal or a claim sheet may say of an epsilon.

An epsilon is about what somebody sees. With noise added at the site it is about each update, whoever sees it; with distributed noise
(`shared.distributed_noise`) about sums alone, and there is a second one for those who can take the other shares away; without noise there is none,
and secure aggregation is all there is.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How what a site trains leaves it.

    Attributes:
        noise: where there is noise for patients: in each update, or, as shares of the sites, in their sum.
        masked: updates leave under masks (secure aggregation), so that the coordinator sees sums.
        sites, missing, colluding: of noise in the sum: among how many sites it is shared, how many of them may be absent, which sites see to, and how
            many more in league with who sees it.
    """

    noise: Literal["none", "update", "sum"]
    masked: bool
    sites: int = 0
    missing: int = 0
    colluding: int = 0

    @classmethod
    def of(cls, study: Study) -> "View":
        """That of a study's training patients."""
        options = study.secure_aggregation
        if options is not None and study.distributed_noise:
            return cls(noise="sum", masked=True, sites=options.sites or 0, missing=options.missing, colluding=options.colluding)
        return cls(noise="update" if study.private else "none", masked=options is not None)

    @property
    def shared(self) -> bool:
        """The noise is that of a sum, of which a site adds a share."""
        return self.noise == "sum"

    @property
    def honest(self) -> int:
        """Shares of honest sites that are in every sum."""
        return self.sites - self.missing - self.colluding

    @property
    def condition(self) -> str:
        """What an epsilon of sums needs, after "as long as"."""
        few = f"at most {self.colluding} of the {self.sites} sites are" if self.colluding > 1 else f"at most one of the {self.sites} sites is"
        return f"{few if self.colluding else 'no site is'} in league with the coordinator"

    @property
    def against(self) -> str:
        """Against whom an epsilon holds, in few words: nothing where it is against everybody."""
        return f"against whoever sees sums of updates alone, as long as {self.condition}" if self.shared else ""

    @property
    def evidence(self) -> str:
        """What an attacker has seen."""
        return "every sum of updates" if self.shared else "every update"

    @property
    def released(self) -> str:
        """What an epsilon that a site has spent is an upper bound for."""
        return "what the sums tell of a site’s patients that it was part of" if self.shared else "everything a site has released"

    @property
    def attacker(self) -> str:
        """Who it is that an epsilon is about."""
        return f"an attacker who sees {self.evidence} and is in league with {self._few}" if self.shared else f"an attacker who sees {self.evidence}"

    @property
    def _few(self) -> str:
        """Sites that may be in league with an attacker."""
        return f"{self.colluding} of the {self.sites} sites at most" if self.colluding else "no site"

    @property
    def masks(self) -> str:
        """What masks keep from the coordinator."""
        return "under masks: the coordinator learns sums over more than half of the hospitals asked, and no single update"

    def leaving(self, numbers: str) -> str:
        """What leaves a hospital in a round. `numbers`: how many, such as ", 513 numbers"."""
        if self.shared:
            return (
                f"one sum of its patients’ clipped gradients{numbers}, with the hospital’s share of the noise, under masks: the coordinator learns the sum over "
                f"the hospitals, in which {self.honest} shares or more make up the whole noise; alone, a share is {self.share:.2g} times it"
            )
        noise = "with noise added at the hospital, before they leave" if self.noise == "update" else "without noise"
        return f"one update{numbers}, {noise}{f', {self.masks}' if self.masked else ''}"

    @property
    def in_short(self) -> str:
        """The same for a line of a table."""
        if self.shared:
            return "with a share of the noise (differential privacy of the sum), under masks"
        return ("with noise (differential privacy)" if self.noise == "update" else "WITHOUT NOISE") + (
            ", under masks: sums alone are seen" if self.masked else ""
        )

    @property
    def remark(self) -> str:
        """What whoever decides on a study must know of its epsilon; nothing where it is of each update."""
        return (
            f"the promise is about sums: it holds {self.against}; against all other sites together a site has its own share of the noise alone"
            if self.shared
            else ""
        )

    @property
    def plainly(self) -> str:
        """What a study without noise sends."""
        return "updates are sent without noise, under masks: the coordinator sees sums alone" if self.masked else "every update is sent as it is"

    @property
    def share(self) -> float:
        """A site's noise, by that of a sum."""
        return 1 / math.sqrt(self.honest)

    def steps(self, unit: str) -> str:
        """How the promise is kept, step by step."""
        noise = (
            "and adds its share of a random noise that is in proportion to that maximum. What leaves is under masks, and only the sum over "
            "the hospitals can be read; it has the whole noise."
            if self.shared
            else f"and adds random noise in proportion to that maximum. Only the result leaves{', under masks' if self.masked else ''}."
        )
        return (
            f"In every step of training each hospital draws lots which of its {unit}s are looked at; cuts down what any single {unit} can change to one maximum "
            f"that is the same for all; adds up; {noise}"
        )

    def bounds(self, unit: str) -> str:
        """What an epsilon bounds, and what not."""
        if self.shared:
            what = (
                f"The first epsilon bounds what anybody who sees sums of updates, as the coordinator does, can learn about a single {unit}, in league with "
                f"{self._few}, whatever else they know and however much they compute; the second, what the coordinator and all other hospitals can learn "
                "together."
            )
        else:
            what = (
                f"Epsilon bounds what anybody can learn about a single {unit} from what left the hospitals, whatever else they know and however much they "
                "compute."
            )
        return f"{what} It is no bound on what the model says about people in general, and none on what leaves a hospital by another way."

    def size(self, noise_multiplier: float, unit: str) -> str:
        """How large the noise was."""
        times = f"{noise_multiplier:.3g} times what one {unit} can change in a step"
        if not self.shared:
            return f"the noise was {times}"
        return f"the noise in a sum was at least {times}, of which the hospital’s own share is {self.share * noise_multiplier:.3g} times"
