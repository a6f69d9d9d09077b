"""Which sites are asked in a round."""

import math

from shared.seeding import generator


def sample_sites(names: list[str], *, fraction: float, seed: int, fold: int, round_number: int) -> list[str]:
    """A uniform sample of ceil(fraction x sites) names, sorted; a function of its arguments alone.

    With few hospitals this amplifies no privacy, and no accounting here counts on it.
    """
    ordered = sorted(names)
    count = num_asked(len(ordered), fraction)
    if count >= len(ordered):
        return ordered
    chosen = generator(seed, "sites", fold, round_number).choice(len(ordered), size=count, replace=False)
    return sorted(ordered[index] for index in chosen)


def num_asked(num_sites: int, fraction: float) -> int:
    """Sites that are asked in a round."""
    return max(1, math.ceil(fraction * num_sites - 1e-9))
