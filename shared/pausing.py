"""How long to pause before looking again: a share of the time already waited, so that what comes is found late by no more than that share."""

SHARE = 0.1


def next_pause(waited: float, *, shortest: float, longest: float) -> float:
    """Seconds until the next look, `SHARE` of the `waited` ones, between `shortest` and `longest`.

    Who waits for seconds is answered at once, and who waits for minutes asks rarely.
    """
    return min(max(shortest, SHARE * waited), longest)
