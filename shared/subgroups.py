"""By what patients are told apart in a report: sex, age band, scanner. A task marks it; what a patient belongs to is one of the cohort's attributes."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.config import Settings

NOT_KNOWN = "not known"
MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", ".")


class Subgroup(Settings):
    """An attribute of patients, and its groups: its values, or the bands between `edges` where it is a number.

    >>> age = Subgroup(attribute="age", edges=(50, 65))
    >>> age.groups_of(["49", "50.0", "65", "?"]).tolist()
    ['under 50', '50 to under 65', '65 and over', 'not known']
    """

    attribute: str = Field(min_length=1)
    title: str = Field(default="", description="in reports; the attribute where there is none")
    edges: tuple[float, ...] = Field(default=(), strict=False, description="of a number: where one band ends and the next begins")
    names: dict[str, str] = Field(default_factory=dict, description="value -> what a report calls it")

    @model_validator(mode="after")
    def _check_edges(self) -> "Subgroup":
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"subgroup {self.attribute!r}: expected edges that grow, got {list(self.edges)}")
        if self.edges and self.names:
            raise ValueError(f"subgroup {self.attribute!r}: expected edges or names, got both")
        return self

    def groups_of(self, values: Sequence[str]) -> NDArray[np.str_]:
        """The group of each patient, `(P,)`."""
        return np.array([self._group(str(value).strip()) for value in values], dtype=np.str_)

    def _group(self, value: str) -> str:
        number = _number(value)
        if self.edges:
            return NOT_KNOWN if number is None else self._bands()[sum(number >= edge for edge in self.edges)]
        text = f"{number:g}" if number is not None else value  # 1.0 and 1 are one group
        return NOT_KNOWN if value in MISSING else self.names.get(text, text)

    def _bands(self) -> list[str]:
        between = [f"{low:g} to under {high:g}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return [f"under {self.edges[0]:g}", *between, f"{self.edges[-1]:g} and over"]

    def ordered(self, groups: Sequence[str]) -> list[str]:
        """Groups as a report lists them: bands from below, named values as they are named, others by name, and last who is not known."""
        first = self._bands() if self.edges else list(self.names.values())
        places = {name: place for place, name in enumerate(first)}
        return sorted(set(groups), key=lambda name: (name == NOT_KNOWN, places.get(name, len(first)), name))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
