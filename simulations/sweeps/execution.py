"""Run what is left of a sweep: each process takes the next cell as soon as it is done with one. A cell's process that dies takes that cell alone with it."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError, StorageError, WorkerFailedError
from shared.supervision import single_instance
from simulations import memory_files
from simulations.blocks.choice import Engine
from simulations.blocks.workers import ONE_THREAD
from simulations.site_files import site_files
from simulations.sweeps.cell import CellResult, run_cell
from simulations.sweeps.folder import SweepFolder
from simulations.sweeps.grid import Cell
from simulations.sweeps.real_ledgers import check_ledgers
from simulations.sweeps.worker import READY

LOG = "log.txt"
TABLE_SECONDS = 2.0  # at least, between writings of the table while cells come in
MOST_OF_TIME = 20  # of the time that it takes
Observer = Callable[[CellResult], None]


def run_sweep(
    folder: SweepFolder, *, processes: int | None = None, observe: Observer = lambda result: None, engine: Engine = "in-process",
    ray_address: str | None = None,
) -> list[CellResult]:  # fmt: skip
    """Run every cell that is not done yet; what came of all of them.

    Args:
        processes: that run cells; None: one for each core. With 1, cells run in this process, one after another.
        observe: called with every cell that is done or has failed.
        engine: "ray" runs cells on a Ray cluster.
        ray_address: of the cluster; None: one on this machine alone.

    Raises:
        BudgetExhaustedError: the sites are real, and their ledgers have no room for all of it.
        WorkerFailedError: process after process ends before its first cell.
        AlreadyRunningError: another process runs this sweep.
        StorageError: the sweep's folder cannot be written.
        KeyboardInterrupt: passed on; what is done is kept.
    """
    with single_instance(folder.path):
        check_ledgers(folder)
        written, pause = time.monotonic(), TABLE_SECONDS
        try:
            for result in _run(folder, folder.waiting(), processes, engine, ray_address):
                observe(result)
                if (now := time.monotonic()) > written + pause:
                    folder.write_table()
                    written = time.monotonic()
                    pause = max(TABLE_SECONDS, MOST_OF_TIME * (written - now))  # a table of many cells takes its time
        finally:
            folder.write_table()
    return folder.results()


def _run(folder: SweepFolder, waiting: list[Cell], processes: int | None, engine: Engine, ray_address: str | None) -> Iterator[CellResult]:
    real = bool(site_files(folder.data))
    if engine == "ray":
        from simulations.simulate import ray_imported

        if real:
            raise ConfigurationError("--engine ray: expected virtual sites, got real ones, which stay where they are", "leave it out")
        with ray_imported(ray_address):
            from simulations.sweeps.on_ray import run_on_ray
        return run_on_ray(folder, waiting, address=ray_address, processes=processes)
    wanted = 1 if real else min(processes or os.cpu_count() or 1, len(waiting))  # a real site answers one at a time
    return _here(folder, waiting) if wanted < 2 else _in_processes(folder, waiting, wanted)


def _here(folder: SweepFolder, waiting: list[Cell]) -> Iterator[CellResult]:
    real = bool(site_files(folder.data))
    with memory_files.folder() as scratch:
        for cell in waiting:
            result = run_cell(cell, folder.data_of(cell), baselines=folder.sweep.baselines, scratch=folder.path if real else scratch)
            folder.write(result)
            yield result


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A process, the ends of its two pipes, and the cell that it runs."""

    process: subprocess.Popen[bytes]
    jobs: int
    replies: int
    cell: Cell
    began: bool = False

    def give(self, cell: Cell) -> None:
        """Have it run this cell; where it has ended, that is seen on its other pipe."""
        self.cell = cell
        with contextlib.suppress(BrokenPipeError):
            os.write(self.jobs, f"{cell.number}\n".encode())

    def close(self) -> None:
        """End the process, and only then its pipes: one that finds its pipe of jobs hung up takes the sweep for dead, and the others' files with it."""
        self.process.kill()
        self.process.wait()
        os.close(self.jobs)
        os.close(self.replies)


def _in_processes(folder: SweepFolder, cells: list[Cell], num_workers: int) -> Iterator[CellResult]:
    waiting, workers, left = deque(cells), selectors.DefaultSelector(), num_workers  # deaths in the beginning, before nothing can be hoped for
    with memory_files.folder() as scratch:
        try:
            for _ in range(num_workers):
                _start(folder, waiting.popleft(), workers, scratch)
            while workers.get_map():
                for key, _ in workers.select():
                    worker: _Worker = key.data
                    said = os.read(worker.replies, 64).splitlines(keepends=True)
                    worker.began = worker.began or READY in said
                    if said and said[-1] == READY:
                        continue
                    if not said:
                        workers.unregister(worker.replies)
                        worker.close()
                        left -= not worker.began
                        if left <= 0:
                            raise WorkerFailedError(
                                f"{folder.path / LOG}: processes of the sweep end before they can run a cell", "read that file; or use --processes 1"
                            )
                    yield _result(folder, worker)
                    if waiting and not said:
                        _start(folder, waiting.popleft(), workers, scratch)
                    elif waiting:
                        worker.give(waiting.popleft())
                    elif said:
                        workers.unregister(worker.replies)
                        worker.close()
        finally:
            for key in list(workers.get_map().values()):
                key.data.close()
            workers.close()


def _start(folder: SweepFolder, cell: Cell, workers: selectors.BaseSelector, scratch: Path) -> None:
    jobs, write_jobs = os.pipe()
    replies, write_replies = os.pipe()
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "simulations.sweeps.worker", str(folder.path), str(scratch), str(jobs), str(write_replies)]
    with open(folder.path / LOG, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(jobs, write_replies), env=environment
        )  # fmt: skip
    os.close(jobs)
    os.close(write_replies)
    worker = _Worker(process=process, jobs=write_jobs, replies=replies, cell=cell)
    workers.register(replies, selectors.EVENT_READ, worker)
    worker.give(cell)


def _result(folder: SweepFolder, worker: _Worker) -> CellResult:
    """What the worker wrote; where it died before, that, in its cell's file."""
    with contextlib.suppress(StorageError):
        written = folder.result(worker.cell.number)
        if worker.process.poll() is None or written.status == "ok":
            return written
    status = worker.process.wait()
    result = CellResult.failed(worker.cell, f"{WorkerFailedError.code} its process ended (exit status {status}{_by_signal(status)})")
    folder.write(result)
    return result


def _by_signal(status: int) -> str:
    return f", {signal.Signals(-status).name}" if status < 0 else ""
