"""Pauses between looks: what comes is found late by a share of the time it took at most, with few looks."""

from hypothesis import given
from hypothesis import strategies as st

from shared.pausing import SHARE, next_pause

SHORTEST, LONGEST = 0.3, 3.0


def looks_until(comes: float) -> list[float]:
    """When one looks, up to the first look that finds what comes at that moment."""
    looks = [0.0]
    while looks[-1] < comes:
        looks.append(looks[-1] + next_pause(looks[-1], shortest=SHORTEST, longest=LONGEST))
    return looks


@given(st.floats(0.0, 10_000.0))
def test_what_comes_is_found_soon_for_how_long_it_took(comes: float) -> None:
    assert looks_until(comes)[-1] - comes <= min(max(SHORTEST, SHARE * comes), LONGEST)


@given(st.floats(0.0, 60.0))
def test_looks_are_few(comes: float) -> None:
    """Every 0.3 s at first, ever less often from 3 s on, every 3 s from 30 s on: 48 in a minute, in place of 200."""
    assert len(looks_until(comes)) <= min(2 + comes / SHORTEST, 48)
