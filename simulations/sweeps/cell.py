"""One cell of a sweep: its study run in a folder that is gone afterwards, and what a table and its pictures need of it."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.errors import WardroundError
from shared.metrics import Metric
from shared.results import MetricValues, Record, Result, RoundRecord, RunPrivacy
from shared.study import Study
from shared.study_tables import flatten
from simulations.sweeps.grid import Cell

Status = Literal["ok", "failed"]


class RoundOfCell(Record):
    """After `round` rounds: the primary metric pooled over the sites, and the most that a site has spent."""

    round: int
    metric: float | None
    epsilon: float | None


class CellResult(Record):
    """cells/N.json: what came of a cell. Nothing in it depends on when, where or beside which other cells it ran."""

    number: int
    status: Status
    error: str | None = None  # code and sentence
    settings: dict[str, bool | int | float | str]  # what the grid says of it
    study: dict[str, bool | int | float | str]  # as the run resolved it
    synthetic: bool = False
    primary_metric: str = ""
    higher_is_better: bool = True
    lowest: float | None = None  # of the primary metric, where it has a range
    highest: float | None = None
    metrics: dict[str, MetricValues] = Field(default_factory=dict)
    per_site: dict[str, float | None] = Field(default_factory=dict)  # the primary metric on each site's own test patients
    num_patients: int = 0
    num_sites: int = 0
    privacy: RunPrivacy | None = None
    rounds: tuple[RoundOfCell, ...] = ()

    @classmethod
    def failed(cls, cell: Cell, error: str) -> "CellResult":
        """What is known of a cell that came to nothing."""
        return cls(number=cell.number, status="failed", error=error, settings=dict(cell.settings), study=_flat(cell.study))


def run_cell(cell: Cell, data: Path | None, *, baselines: bool, scratch: Path) -> CellResult:
    """Run the cell's study in this process; an error is its result, and only its kind where it is none of ours.

    Args:
        scratch: a folder for the run's files. They are removed, but for those of real sites: what a coordinator knows of ledgers is among them.
    """
    from simulations.simulate import execute, prepare, start_run

    try:
        setting = prepare(_without_intervals(cell.study), data)
        with tempfile.TemporaryDirectory(prefix="cell-", dir=scratch) as folder:
            run = start_run(setting, scratch if setting.real else Path(folder))
            execute(setting, run, baselines=baselines and setting.federation is not None, plain_baselines=False, processes=1)
            result = Result.model_validate_json((run.path / "result.json").read_bytes())
            [primary] = [metric for metric in setting.task.metrics if metric.name == result.primary_metric]
            return _finished(cell, setting.study, result, run.rounds(), primary)
    except WardroundError as error:
        return CellResult.failed(cell, f"{error.code} {error.what}")
    except Exception as error:  # of the task's own code, whose text may hold a patient's value
        return CellResult.failed(cell, f"{WardroundError.code} {type(error).__name__}")


def _without_intervals(study: Study) -> Study:
    """A sweep's intervals are over its seeds; those of one run's test patients cost more than the run."""
    return study.replace(evaluation={"bootstrap": 0})


def _finished(cell: Cell, study: Study, result: Result, rounds: Iterable[RoundRecord], metric: Metric) -> CellResult:
    primary = metric.name
    return CellResult(
        number=cell.number, status="ok", settings=dict(cell.settings), study=_flat(study), synthetic=result.synthetic, primary_metric=primary,
        higher_is_better=metric.higher_is_better, lowest=_end(metric.low), highest=_end(metric.high), metrics={source: values for source, values in result.metrics.items() if values},
        per_site={site: _number(values.get(primary)) for site, values in result.per_site.items()},
        num_patients=sum(site.num_patients for site in result.sites), num_sites=len(result.sites), privacy=result.privacy,
        rounds=tuple(_round(record, primary) for record in rounds if record.fold == 1),
    )  # fmt: skip


def _end(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _round(record: RoundRecord, primary: str) -> RoundOfCell:
    spent = [site.epsilon for site in record.sites if site.epsilon is not None]
    return RoundOfCell(round=record.round, metric=record.metrics.get(primary), epsilon=max(spent, default=None))


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _flat(study: Study) -> dict[str, bool | int | float | str]:
    return {name: value for name, value in flatten(study.to_table()).items() if isinstance(value, bool | int | float | str)}
