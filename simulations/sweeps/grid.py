"""A sweep's file: a base study and a grid of settings. Every combination of the grid's values is a cell, a study of its own."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from shared.config import Settings, TomlTable, nearest, read_toml, validate
from shared.errors import ConfigurationError
from shared.study import NAME_PATTERN, Study
from shared.study_tables import merge_tables

Value = bool | int | float | str
SHORT = {
    "epsilon": "privacy.epsilon",
    "strategy": "strategy.name",
    "sites": "federation.sites",
    "partition": "federation.partition",
    "alpha": "federation.alpha",
    "rounds": "rounds.count",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
}  # settings that need not be written out
NO_PRIVACY = "none"
VARIANT = "variant"
MOST_CELLS = 100_000


class Sweep(Settings):
    """A sweep's TOML file.

    Attributes:
        study: the base: a study's TOML file beside the sweep's, or the name of a shipped study; or its tables.
        grid: setting -> values. Settings are named as in a study's file, `training.learning_rate`, or by one of `SHORT`; an epsilon may be "none".
            "variant" goes over the names of `variants`.
        variants: name -> changes of the study, as its own tables; the other settings of the grid change what comes of it.
        baselines: in every cell every site alone, and all data pooled, are trained as well, under the promise of that cell.
    """

    name: str = Field(pattern=NAME_PATTERN)
    study: str | TomlTable
    baselines: bool = True
    grid: dict[str, list[Value]] = Field(min_length=1)
    variants: dict[str, TomlTable] = Field(default_factory=dict)

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: dict[str, list[Value]]) -> dict[str, list[Value]]:
        for name, values in grid.items():
            if not values or len({(type(value) is bool, value) for value in values}) < len(values):
                raise ValueError(f"{name}: expected at least one value, and each once, got {values}")
        full = [SHORT.get(name, name) for name in grid]
        if len(set(full)) < len(full):
            raise ValueError(f"expected each setting once, got {', '.join(grid)}")
        return grid

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        if self.variants and VARIANT not in self.grid:
            raise ValueError(f"[variants] is given, but no grid.variant goes over it: expected variant = {list(self.variants)} in [grid], got none")
        for name in self.grid.get(VARIANT, []):
            if name not in self.variants:
                raise ValueError(f"grid.variant: expected names of [variants], got {name!r}{nearest(str(name), list(self.variants))}")
        return self

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        """The sweep in a TOML file.

        Raises:
            ConfigurationError: it is missing or does not fit.
        """
        return validate(cls, read_toml(path), str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep: its number from 1, what the grid says of it, and its study."""

    number: int
    settings: Mapping[str, Value]  # by the full names
    study: Study

    def __str__(self) -> str:
        return f"cell {self.number} ({', '.join(f'{name} = {value}' for name, value in self.settings.items())})"


def cells_of(sweep: Sweep, base: Study) -> list[Cell]:
    """All cells, the last setting of the grid changing first.

    Raises:
        ConfigurationError: a setting is none, or a combination is no study; it names the cell.
    """
    num_cells = 1
    for values in sweep.grid.values():
        num_cells *= len(values)
    if num_cells > MOST_CELLS:
        raise ConfigurationError(f"sweep {sweep.name}: grid: expected at most {MOST_CELLS:,} cells, got {num_cells:,}", "sweep over less")
    return list(_cells(sweep, base))


def _cells(sweep: Sweep, base: Study) -> Iterator[Cell]:
    names = [SHORT.get(name, name) for name in sweep.grid]
    table = base.to_table()
    for number, values in enumerate(itertools.product(*sweep.grid.values()), start=1):
        settings = dict(zip(names, values, strict=True))
        try:
            varied = merge_tables(table, sweep.variants[str(settings[VARIANT])]) if VARIANT in settings else table
            study = Study.from_table(merge_tables(varied, _changes(settings)), source="study")
        except ConfigurationError as error:
            told = ", ".join(f"{name} = {value}" for name, value in settings.items())
            raise ConfigurationError(f"sweep {sweep.name}: cell {number} ({told}): {error.what}", error.remedy) from None
        yield Cell(number=number, settings=settings, study=study)


def _changes(settings: Mapping[str, Value]) -> TomlTable:
    """`{"privacy.epsilon": 1.0}` as `{"privacy": {"epsilon": 1.0}}`."""
    changes: dict[str, object] = {}
    for name, value in settings.items():
        if name == VARIANT:
            continue
        if name == "privacy.epsilon" and value == NO_PRIVACY:
            name, value = "privacy.unit", "none"
        table, _, key = name.rpartition(".")
        if not table:
            changes[key] = value
        else:
            inner = changes.setdefault(table, {})
            assert isinstance(inner, dict)
            inner[key] = value
    return changes
