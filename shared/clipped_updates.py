"""Updates of which a site cut values off before it masked them (`secure_aggregation.max_value`): the line in that site's own log, and a log read back.

The line stays where the site's log is. In a simulation that is the run's log, whose virtual sites are the researcher's own; a coordinator of real
hospitals never has one.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

LINE = "site %s: secure sum of round %d of fold %d: %d of %d values of its update were beyond %g (secure_aggregation.max_value), and clipped to it"
_READ = re.compile(
    r"site (?P<site>\S+): secure sum of round (?P<round>\d+) of fold (?P<fold>\d+): (?P<clipped>\d+) of (?P<values>\d+) values .* beyond (?P<most>\S+) "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedUpdates:
    """What of a run's updates was cut off.

    Attributes:
        sites, rounds: how many had a clipped update; rounds over all folds.
        share: of values, in the update of which most were clipped; in (0, 1].
        max_value: to which.
    """

    sites: int
    rounds: int
    share: float
    max_value: float

    @property
    def sentence(self) -> str:
        """What it means for the model."""
        many = "1 site" if self.sites == 1 else f"{self.sites:,} sites"
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds:,} rounds"
        return (
            f"Updates were clipped: in {rounds}, {many} cut values off at {self.max_value:g} (secure_aggregation.max_value), up to {100 * self.share:.3g} % of an update's. "
            "The model is not what these updates would have made it; raise max_value unless that is meant."
        )


def log_clipped(logger: logging.Logger, site: str, *, fold: int, round_number: int, clipped: int, values: int, max_value: float) -> None:
    """Say in the site's own log that so many values of its update were clipped."""
    logger.warning(LINE, site, round_number, fold, clipped, values, max_value)


def clipped_updates(messages: Iterable[str]) -> ClippedUpdates | None:
    """What the lines of a log say was clipped; None where nothing was. A round that was begun anew counts once.

    >>> clipped_updates([LINE % ("site-1", 2, 1, 5, 10, 0.5), "site-1 was late"])
    ClippedUpdates(sites=1, rounds=1, share=0.5, max_value=0.5)
    """
    found = [match for message in messages if (match := _READ.match(message)) is not None]
    if not found:
        return None
    return ClippedUpdates(
        sites=len({match["site"] for match in found}),
        rounds=len({(match["fold"], match["round"]) for match in found}),
        share=max(int(match["clipped"]) / int(match["values"]) for match in found),
        max_value=float(found[-1]["most"]),
    )
