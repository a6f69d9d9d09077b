"""Which other unit a column's values may be in: factors between the units in which hospitals record the same quantity.

Factors of amounts of substance are those of the molar masses (glucose 180.16 g/mol, cholesterol 386.7, creatinine 113.1, ...); others are definitions.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_VALUES = 3  # fewer say nothing about a unit
SHARE_INSIDE = 0.95  # of the values in question, which the right unit brings into the range


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Declared unit = factor * value + offset; `unit` is the one that the values would be in, "" where only a power of ten is meant."""

    unit: str
    factor: float
    offset: float = 0.0

    def of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values in the declared unit."""
        return self.factor * values + self.offset

    def __str__(self) -> str:
        """What to do with each value."""
        return f"multiply by {self.factor:.4g}" + (f" and add {self.offset:.4g}" if self.offset else "")


# What a unit becomes: (from, to, factor, offset). The way back follows.
_UNITS = (
    ("degrees F", "degrees C", 5 / 9, -160 / 9),
    ("K", "degrees C", 1.0, -273.15),
    ("lb", "kg", 0.453592, 0.0),
    ("g", "kg", 0.001, 0.0),
    ("m", "cm", 100.0, 0.0),
    ("inches", "cm", 2.54, 0.0),
    ("mm", "cm", 0.1, 0.0),
    ("kPa", "mmHg", 7.50062, 0.0),
    ("cmHg", "mmHg", 10.0, 0.0),
    ("fraction of 1", "%", 100.0, 0.0),
    ("months", "years", 1 / 12, 0.0),
    ("days", "years", 1 / 365.25, 0.0),
    ("hours", "days", 1 / 24, 0.0),
    ("minutes", "hours", 1 / 60, 0.0),
    ("beats/s", "beats/min", 60.0, 0.0),
    ("s", "ms", 1000.0, 0.0),
    ("V", "mV", 1000.0, 0.0),
    ("uV", "mV", 0.001, 0.0),
    ("g/l", "g/dl", 0.1, 0.0),
    ("mg/l", "mg/dl", 0.1, 0.0),
    ("ml", "l", 0.001, 0.0),
)
# Of a measure (by the column's name): (from, to, factor).
_MEASURES = (
    (r"glucose|sugar|glyc", "mmol/l", "mg/dl", 18.016),
    (r"chol|hdl|ldl", "mmol/l", "mg/dl", 38.67),
    (r"triglyc", "mmol/l", "mg/dl", 88.57),
    (r"urea|bun", "mmol/l", "mg/dl", 2.801),
    (r"calcium", "mmol/l", "mg/dl", 4.008),
    (r"magnes|^mg$", "mmol/l", "mg/dl", 2.431),
    (r"phosph", "mmol/l", "mg/dl", 3.097),
    (r"lactate", "mmol/l", "mg/dl", 9.008),
    (r"uric", "umol/l", "mg/dl", 0.01681),
    (r"creat", "umol/l", "mg/dl", 0.01131),
    (r"bili", "umol/l", "mg/dl", 0.05848),
    (r"h(a)?emoglobin|^hgb$|^hb$", "mmol/l", "g/dl", 1.611),
)
_POWERS_OF_TEN = (10.0, 0.1, 100.0, 0.01, 1000.0, 0.001)
_SPELLINGS = {"c": "degrees c", "°c": "degrees c", "celsius": "degrees c", "f": "degrees f", "°f": "degrees f", "percent": "%", "bpm": "beats/min"}


def conversions_to(unit: str, name: str) -> list[Conversion]:
    """From the units that a column of this name may be in, to the declared one.

    >>> [(found.unit, found.factor) for found in conversions_to("mg/dl", "chol")]
    [('mmol/l', 38.67), ('mg/l', 0.1)]
    """
    wanted = _plain(unit)
    rules = [(one, other, factor, 0.0) for pattern, one, other, factor in _MEASURES if re.search(pattern, name.lower())]
    found = []
    for one, other, factor, offset in (*rules, *_UNITS):
        if _plain(other) == wanted:
            found.append(Conversion(unit=one, factor=factor, offset=offset))
        elif _plain(one) == wanted:
            found.append(Conversion(unit=other, factor=1 / factor, offset=-offset / factor))
    return found


def likely_conversion(
    outside: NDArray[np.float64], inside: NDArray[np.float64], *, low: float, high: float, unit: str, name: str
) -> Conversion | None:
    """The conversion that brings the values `outside` into the range, and nearest to where the others are; None where none does.

    A unit of the same quantity goes before a bare power of ten.

    Args:
        outside: finite values out of [low, high]; `inside`: the column's values within it.
    """
    if len(outside) < FEWEST_VALUES:
        return None
    goal = float(np.median(inside)) if len(inside) > len(outside) / 4 else (low + high) / 2
    powers = [Conversion(unit="", factor=factor) for factor in _POWERS_OF_TEN]
    for candidates in (conversions_to(unit, name), powers):
        fitting = [found for found in candidates if _share_inside(found.of(outside), low, high) >= SHARE_INSIDE]
        if fitting:
            return min(fitting, key=lambda found: abs(float(np.median(found.of(outside))) - goal))
    return None


def _share_inside(values: NDArray[np.float64], low: float, high: float) -> float:
    return float(np.mean((values >= low) & (values <= high)))


def _plain(unit: str) -> str:
    plain = unit.strip().lower().replace("µ", "u").replace("μ", "u")
    return _SPELLINGS.get(plain, plain)
