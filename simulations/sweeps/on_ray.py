"""The cells of a sweep on a Ray cluster: a task a cell, tried again on another node where one dies."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from shared.errors import WorkerFailedError
from shared.study import Study
from simulations.blocks.ray_workers import connect
from simulations.blocks.workers import ONE_THREAD
from simulations.sweeps.cell import CellResult, run_cell
from simulations.sweeps.folder import SweepFolder
from simulations.sweeps.grid import Cell, Value

RETRIES = 3  # of a cell whose node died


def run_on_ray(folder: SweepFolder, cells: list[Cell], *, address: str | None, processes: int | None) -> Iterator[CellResult]:
    """What comes of each cell, as they finish; what is done is in the sweep's folder.

    Args:
        address: of a cluster, every node of which has this version, the task, and the data at the same path; None: one on this machine alone.
        processes: cells under way at once; None: one for each CPU of the cluster.

    Raises:
        ConfigurationError: there is no cluster at `address`.
    """
    started = not ray.is_initialized()
    if started:
        connect(address, processes)
    try:
        task = ray.remote(_run).options(num_cpus=1, max_retries=RETRIES, runtime_env={"env_vars": ONE_THREAD})
        at_once = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, under_way = deque(cells), dict[Any, Cell]()
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                cell = waiting.popleft()
                data = folder.data_of(cell)
                under_way[task.remote(cell.number, dict(cell.settings), cell.study.to_table(), data and str(data), folder.sweep.baselines)] = cell
            [done], _ = ray.wait(list(under_way), num_returns=1)
            cell = under_way.pop(done)
            try:
                result = CellResult.model_validate_json(ray.get(done))
            except RayError as error:
                result = CellResult.failed(cell, f"{WorkerFailedError.code} its worker on the Ray cluster failed ({type(error).__name__})")
            folder.write(result)
            yield result
    finally:
        if started:
            ray.shutdown()


def _run(number: int, settings: dict[str, Value], study: dict[str, object], data: str | None, baselines: bool) -> str:
    """On a node: the cell's result as JSON."""
    import tempfile

    cell = Cell(number=number, settings=settings, study=Study.from_table(study))
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        return run_cell(cell, None if data is None else Path(data), baselines=baselines, scratch=Path(scratch)).model_dump_json()
