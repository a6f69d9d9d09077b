"""What a strategy does at a site in a round: state in, update and state out, as a server optimizer at the coordinator.

Under privacy every training is steps of `client.private_training`, and every one of them is charged, whichever model it trains. What a site keeps
is a function of those releases and of what it received, so by post-processing the site's charge covers it, and every metric of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from client.local_update import Learner
from shared.models import Parameters

Kept = Mapping[str, Parameters]  # by what it is, e.g. {"personal": {...}}; empty before the first round


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a round came to.

    Attributes:
        update: trained minus received, of the shared parameters.
        kept: for the next round; never sent.
        loss: of the received model on the training patients, where the strategy sends it.
    """

    update: Parameters
    kept: Kept
    loss: float | None = None


class LocalRule(Protocol):
    """A strategy's part at a site.

    Attributes:
        keeps: True where a site keeps something between rounds.
    """

    keeps: bool

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The whole model by which this site is judged, before it trains on what it received."""

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """A round.

        Args:
            control: what the coordinator's strategy sent along; empty for most.
        """
