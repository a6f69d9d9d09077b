"""Counted things."""


def plural(value: int, noun: str) -> str:
    """ "1 site", "2 sites"; y becomes ies."""
    if value == 1:
        return f"1 {noun}"
    return f"{value:,} {noun[:-1]}ies" if noun.endswith("y") else f"{value:,} {noun}s"
