"""`sweep(...)`: a study over a grid of settings, and what comes of it."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.root_log import root_log_unchanged
from wardround.quiet import quiet_flower_log, switch_off_telemetry
from wardround.studies import base_study, sweep_file

switch_off_telemetry()
with root_log_unchanged():
    from simulations.sweeps.cell import CellResult
    from simulations.sweeps.execution import run_sweep
    from simulations.sweeps.folder import SweepFolder
    from simulations.sweeps.grid import Sweep

if TYPE_CHECKING:
    import pandas as pd

SEED = "seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the seeds of one setting came to: by source, the primary metric of each run."""

    settings: dict[str, object]  # without the seed
    runs: tuple[CellResult, ...]
    values: dict[str, list[float]]

    @property
    def num_runs(self) -> int:
        """How many seeds."""
        return len(self.runs)

    def mean(self, source: str) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values[source]) if self.values.get(source) else None

    def interval(self, source: str) -> tuple[float, float] | None:
        """95 % interval of the mean over the seeds, by Student's t, within the metric's range; None of fewer than two."""
        values = self.values.get(source, [])
        if len(values) < 2:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        low, high, run = statistics.fmean(values) - half, statistics.fmean(values) + half, self.runs[0]
        return low if run.lowest is None else max(low, run.lowest), high if run.highest is None else min(high, run.highest)

    def text(self, source: str) -> str:
        """`0.812 ± 0.010`, or a dash."""
        values = self.values.get(source, [])
        if not values:
            return "-"
        return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def summarise(results: Iterable[CellResult]) -> list[Row]:
    """A row for each setting, in the order of the cells: its runs differ in their seed alone. What does not vary is left out of the settings."""
    done = [result for result in results if result.status == "ok"]
    varied = [name for name in (done[0].settings if done else ()) if name != SEED and len({str(result.settings[name]) for result in done}) > 1]
    grouped: dict[tuple[tuple[str, object], ...], list[CellResult]] = defaultdict(list)
    for result in done:
        grouped[tuple((name, result.settings[name]) for name in varied)].append(result)
    return [Row(settings=dict(key), runs=tuple(runs), values=_by_source(runs)) for key, runs in grouped.items()]


def _by_source(runs: list[CellResult]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for source, metrics in run.metrics.items():
            value = metrics.get(run.primary_metric)
            if value is not None:
                values[source].append(value)
    return dict(values)


def open_sweep(path: Path, *, data: Path | None, out: Path, resume: bool) -> SweepFolder:
    """The folder of the sweep in the file at `path`, new or resumed; or, where `path` is such a folder, that one.

    Raises:
        ConfigurationError: the file does not fit, a cell is no study, or there is nothing to resume.
    """
    if SweepFolder.is_one(path):
        folder = SweepFolder(path)
        folder.check_data(data)
    else:
        file = sweep_file(path)
        sweep = Sweep.load(file)
        base = base_study(sweep, file)
        if not resume:
            return SweepFolder.create(out, sweep, base, data)
        folder = SweepFolder.latest(out, sweep, base)
        folder.check_data(data)
    return folder


def run(
    folder: SweepFolder, *, processes: int | None = None, observe: Callable[[CellResult], None] = lambda result: None,
    engine: Literal["in-process", "ray"] = "in-process", ray_address: str | None = None,
) -> list[CellResult]:  # fmt: skip
    """Run what is left, write the table and the report; what came of all cells. As `run_sweep`."""
    from wardround.report.sweep_page import write_sweep_report

    quiet_flower_log()
    results = run_sweep(folder, processes=processes, observe=observe, engine=engine, ray_address=ray_address)
    write_sweep_report(folder.path)
    return results


class SweepRun:
    """A sweep that was run, read from its folder."""

    def __init__(self, path: str | Path) -> None:
        self._folder = SweepFolder(Path(path))

    def __repr__(self) -> str:
        return f"SweepRun({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self._folder.path

    @property
    def table(self) -> "pd.DataFrame":
        """A row a cell, all settings and metrics as columns."""
        import pandas as pd

        return pd.read_csv(self._folder.write_table())

    @property
    def results(self) -> list[CellResult]:
        """The cells that are done or have failed."""
        return self._folder.results()


def sweep(
    path: str | Path, *, data: str | Path | None = None, out: str | Path = "runs", resume: bool = False, processes: int | None = None,
    observe: Callable[[CellResult], None] = lambda result: None, engine: Literal["in-process", "ray"] = "in-process", ray_address: str | None = None,
) -> SweepRun:  # fmt: skip
    """Run a study once for every combination of a grid's settings.

    Args:
        path: a sweep's TOML file, or the folder of one to go on with.
        data: as for `simulate`.
        resume: go on with the newest folder of this sweep in `out`.
        processes: that run cells; None: one for each core.
        engine, ray_address: "ray" runs cells on a Ray cluster (extra `ray`), as for `simulate`; data must be at the same path on every node.
        observe: called with what came of every cell. A cell that fails is among them, and the others go on.

    Raises:
        WardroundError: what is wrong with the sweep, or where its folder cannot be written.
    """
    folder = open_sweep(Path(path), data=None if data is None else Path(data), out=Path(out), resume=resume)
    run(folder, processes=processes, observe=observe, engine=engine, ray_address=ray_address)
    return SweepRun(folder.path)
