"""Worker processes that train blocks: patients, parameters and updates are files that all of them map, and only a line of text is sent a block.

A worker is a process of its own and no fork: it has threads, BLAS and torch of its own, and a script or notebook need not be importable.
`python -m simulations.blocks.workers FOLDER NUMBER` is one; jobs come on its standard input and replies leave on a pipe of their own.
"""

import contextlib
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import StorageError, WorkerFailedError
from shared.models import Parameters, get_parameters
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.blocks.patients import Patients
from simulations.blocks.trainer import Outcome, Sums, make_trainer
from simulations.blocks.training import flat, named

logger = logging.getLogger(__name__)

MEMORY_FILES = Path("/dev/shm")
SLOTS = 2  # blocks that a worker holds: one that it trains, and one that is read or waits
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SETTING, RECEIVED, LOG = "setting.json", "received.npy", "log.txt"
READY = b"ready"
Slot = tuple[int, int]  # worker, and which of its two


class Pool:
    """`num_workers` processes that train blocks of one fold.

    Raises:
        StorageError: there is no room for the patients.
    """

    def __init__(self, task: Task, study: Study, patients: Patients, *, block_size: int, num_workers: int, stacked: bool) -> None:
        self._template = get_parameters(task.model())
        self._shapes = {metric.statistic.name: metric.statistic.shape for metric in task.metrics} if not study.noised_statistics else {}
        needed = patients.num_bytes + num_workers * SLOTS * sum(array.nbytes for array in _results(self._template, self._shapes, block_size).values())
        in_memory = os.access(MEMORY_FILES, os.W_OK) and shutil.disk_usage(MEMORY_FILES).free > 2 * needed
        self._folder = Path(tempfile.mkdtemp(prefix="wardround-", dir=MEMORY_FILES if in_memory else None))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._replies = selectors.DefaultSelector()
        self._busy = 0
        self._starting = set(range(num_workers))
        self._lines: deque[tuple[int, bytes]] = deque()  # worker and reply
        self._begun: dict[int, bytes] = {}  # by worker: a reply's beginning
        try:
            self._write(study, patients, block_size, num_workers, stacked)
            for number in range(num_workers):
                self._start(number)
        except OSError as error:
            self.close()
            raise StorageError(f"{self._folder}: could not share the patients among processes: {error.strerror}", "use fewer sites") from error

    def _write(self, study: Study, patients: Patients, block_size: int, num_workers: int, stacked: bool) -> None:
        patients.save(self._folder)
        np.save(self._folder / RECEIVED, flat(self._template))
        for worker in range(num_workers):
            for slot in range(SLOTS):
                for name, array in _results(self._template, self._shapes, block_size).items():
                    np.save(self._folder / f"{name}-{worker}-{slot}.npy", array)
        (self._folder / SETTING).write_text(json.dumps({"study": study.to_table(), "block_size": block_size, "stacked": stacked}))
        self._received = np.load(self._folder / RECEIVED, mmap_mode="r+")
        self._results = {
            (worker, slot): _mapped_results(self._folder, self._shapes, worker, slot) for worker in range(num_workers) for slot in range(SLOTS)
        }

    def _start(self, number: int) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "simulations.blocks.workers", str(self._folder), str(number), str(writing)]
        with open(self._folder / LOG, "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing,), env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            )  # fmt: skip
        os.close(writing)
        self._processes.append(process)
        self._replies.register(reading, selectors.EVENT_READ, number)

    def ready(self) -> bool:
        """Whether all have started.

        Raises:
            WorkerFailedError: one ended instead.
        """
        while self._starting and self._read(timeout=0):
            pass
        return not self._starting

    @property
    def slots(self) -> list[Slot]:
        """Where blocks can be under way."""
        return [(worker, slot) for slot in range(SLOTS) for worker in range(len(self._processes))]

    def receive(self, received: Parameters) -> None:
        """These are the parameters of the round to come; blocks of an earlier one that nobody waited for are let go."""
        while self._busy:
            self.wait()
        self._received[:] = flat(received)

    def submit(self, slot: Slot, round_number: int, fold: int, sites: list[int]) -> None:
        """Have a worker train this block."""
        worker, number = slot
        line = json.dumps({"slot": number, "round": round_number, "fold": fold, "sites": sites})
        pipe = self._processes[worker].stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except OSError:
            raise self._failed(worker) from None
        self._busy += 1

    def wait(self) -> tuple[Slot, Outcome | None]:
        """A block that is done, or None where it could not be trained; its arrays are used again once its slot is.

        Raises:
            WorkerFailedError: a worker ended.
        """
        while not self._lines:
            self._read()
        worker, line = self._lines.popleft()
        self._busy -= 1
        reply = json.loads(line)
        slot, steps = (worker, int(reply["slot"])), np.array(reply["steps"] or [], dtype=np.int64)
        if reply["steps"] is None:
            return slot, None
        results, count = self._results[slot], len(steps)
        sums: Sums = {name: results[name][:count] for name in self._shapes}
        return slot, Outcome(steps=steps, updates=results["updates"][:count], digests=tuple(reply["digests"]), sums=sums)

    def _read(self, timeout: float | None = None) -> bool:
        """Whether a worker has said something, for which it waits; whole lines are kept, and the beginning of one until the rest has come."""
        said = self._replies.select(timeout)
        for key, _ in said:
            worker = int(key.data)
            part = os.read(key.fd, 65_536)
            if not part:
                raise self._failed(worker)
            *lines, self._begun[worker] = (self._begun.get(worker, b"") + part).split(b"\n")
            if READY in lines:
                self._starting.discard(worker)
            self._lines += [(worker, line) for line in lines if line != READY]
        return bool(said)

    def _failed(self, worker: int) -> WorkerFailedError:
        status = self._processes[worker].poll()  # and nothing of what it said: an exception's own text may hold a patient's value
        return WorkerFailedError(
            f"worker {worker}: expected a trained block, got none (exit status {status})", "resume the run; with --processes 1 there are no workers"
        )

    def close(self) -> None:
        """End the workers and remove all files."""
        for key in list(self._replies.get_map().values()):
            os.close(key.fd)
        self._replies.close()
        for process in self._processes:
            process.kill()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _results(template: Parameters, shapes: Mapping[str, tuple[int, ...]], block_size: int) -> dict[str, NDArray[np.generic]]:
    """The arrays of a slot, empty."""
    sample = flat(template)
    return {
        "updates": np.zeros((block_size, len(sample)), dtype=sample.dtype),
        **{name: np.zeros((block_size, *shape)) for name, shape in shapes.items()},
    }


def _mapped_results(folder: Path, shapes: Mapping[str, tuple[int, ...]], worker: int, slot: int) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(np.load(folder / f"{name}-{worker}-{slot}.npy", mmap_mode="r+")) for name in ("updates", *shapes)}


# A worker -----------------------------------------------------------------------------------------------------------------------


def work(folder: Path, number: int, replies: BinaryIO, jobs: Iterator[bytes]) -> None:
    """Train the blocks that are asked for, until there are no more jobs."""
    setting = json.loads((folder / SETTING).read_text())
    study = Study.from_table(setting["study"])
    task = resolve_task(study.task)
    template = get_parameters(task.model())
    trainer = make_trainer(task, study, Patients.mapped(folder), block_size=setting["block_size"], stacked=setting["stacked"])
    shapes = {metric.statistic.name: metric.statistic.shape for metric in task.metrics} if not study.noised_statistics else {}
    results = [_mapped_results(folder, shapes, number, slot) for slot in range(SLOTS)]
    received = np.load(folder / RECEIVED, mmap_mode="r")
    replies.write(READY + b"\n")
    replies.flush()
    for line in jobs:
        job = json.loads(line)
        reply: dict[str, object] = {"slot": job["slot"], "steps": None}
        try:
            outcome = trainer.train(job["round"], job["fold"], job["sites"], named(np.array(received), template))
            into, count = results[job["slot"]], len(outcome.steps)
            into["updates"][:count] = outcome.updates
            for name, value in outcome.sums.items():
                into[name][:count] = value
            reply |= {"steps": outcome.steps.tolist(), "digests": outcome.digests}
        except Exception as error:  # the sites of this block are trained one after another
            logger.warning("a block could not be trained: %s", type(error).__name__)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def main() -> None:
    """A worker's process; it ends when nobody holds the other end of its standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulation decides when it ends
    torch.set_num_threads(1)
    with open(int(sys.argv[3]), "wb") as replies:
        work(Path(sys.argv[1]), int(sys.argv[2]), replies, iter(sys.stdin.buffer.readline, b""))


if __name__ == "__main__":
    main()
