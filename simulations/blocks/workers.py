"""Worker processes that train blocks: patients, parameters and updates are files that all of them map, and only a line of text is sent a block.

Workers are no forks of the simulation: they have threads, BLAS and torch of their own, and a script or notebook need not be importable. Where it
is safe they are forks of the first of them, which imports what all need and has done nothing yet. `python -m simulations.blocks.workers FOLDER
NUMBER:JOBS:REPLIES ...` is the first: a number and the ends of two pipes for each.
"""

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
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
from simulations.blocks.trainer import Job, Outcome, Sums, make_trainer, no_update
from simulations.blocks.training import flat, named
from simulations.memory_files import make_folder, remove_folder

logger = logging.getLogger(__name__)

SLOTS = 2  # blocks that a worker holds: one that it trains, and one that is read or waits
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SETTING, RECEIVED, LOG = "setting.json", "received.npy", "log.txt"
READY = b"ready"
FORKS = sys.platform == "linux"  # elsewhere system libraries do not survive it
Slot = tuple[int, int]  # worker, and which of its two


class Pool:
    """`num_workers` processes that train blocks of one fold.

    Raises:
        StorageError: there is no room for the patients.
    """

    def __init__(self, task: Task, study: Study, patients: Patients, *, block_size: int, num_workers: int, stacked: bool) -> None:
        self._template = get_parameters(task.model())
        self._shapes = {metric.statistic.name: metric.statistic.shape for metric in task.metrics} if not study.noised_statistics else {}
        self._row = no_update(task, study)
        needed = patients.num_bytes + num_workers * SLOTS * sum(array.nbytes for array in _results(self._row, self._shapes, block_size).values())
        self._folder = make_folder(needed)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._jobs: list[int] = []  # by worker, where its jobs are written
        self._replies = selectors.DefaultSelector()
        self._busy = 0
        self._starting = set(range(num_workers))
        self._lines: deque[tuple[int, bytes]] = deque()  # worker and reply
        self._begun: dict[int, bytes] = {}  # by worker: a reply's beginning
        try:
            self._write(study, patients, block_size, num_workers, stacked)
            for numbers in [range(num_workers)] if FORKS else [range(number, number + 1) for number in range(num_workers)]:
                self._start(numbers)
        except OSError as error:
            self.close()
            raise StorageError(f"{self._folder}: could not share the patients among processes: {error.strerror}", "use fewer sites") from error

    def _write(self, study: Study, patients: Patients, block_size: int, num_workers: int, stacked: bool) -> None:
        patients.save(self._folder)
        np.save(self._folder / RECEIVED, flat(self._template))
        for worker in range(num_workers):
            for slot in range(SLOTS):
                for name, array in _results(self._row, self._shapes, block_size).items():
                    np.save(self._folder / f"{name}-{worker}-{slot}.npy", array)
        (self._folder / SETTING).write_text(json.dumps({"study": study.to_table(), "block_size": block_size, "stacked": stacked}))
        self._received = np.load(self._folder / RECEIVED, mmap_mode="r+")
        self._results = {
            (worker, slot): _mapped_results(self._folder, self._shapes, worker, slot) for worker in range(num_workers) for slot in range(SLOTS)
        }

    def _start(self, numbers: range) -> None:
        """A process for these workers, which become as many."""
        theirs: list[int] = []
        workers = []
        for number in numbers:
            jobs, write_jobs = os.pipe()
            read_replies, replies = os.pipe()
            self._jobs.append(write_jobs)
            self._replies.register(read_replies, selectors.EVENT_READ, number)
            theirs += [jobs, replies]
            workers.append(f"{number}:{jobs}:{replies}")
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            with open(self._folder / LOG, "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "simulations.blocks.workers", str(self._folder), *workers], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=theirs, env=environment, process_group=0,
                )  # fmt: skip
        finally:
            for end in theirs:
                os.close(end)
        self._processes.append(process)

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
        return [(worker, slot) for slot in range(SLOTS) for worker in range(len(self._jobs))]

    def receive(self, received: Parameters) -> None:
        """These are the parameters of the round to come; blocks of an earlier one that nobody waited for are let go."""
        while self._busy:
            self.wait()
        self._received[:] = flat(received)

    def submit(self, slot: Slot, job: Job) -> None:
        """Have a worker train this block."""
        worker, number = slot
        line = json.dumps({"slot": number, "job": dataclasses.asdict(job)})
        try:
            os.write(self._jobs[worker], line.encode() + b"\n")
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
        """Nothing of what it said is repeated: an exception's own text may hold a patient's value."""
        status = next((f" (exit status {process.returncode})" for process in self._processes if process.poll()), "")
        return WorkerFailedError(
            f"worker {worker}: expected a trained block, got none{status}", "resume the run; with --processes 1 there are no workers"
        )

    def close(self) -> None:
        """End the workers and remove all files."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for end in [*self._jobs, *(key.fd for key in list(self._replies.get_map().values()))]:
            os.close(end)
        self._replies.close()
        remove_folder(self._folder)


def _results(row: NDArray[np.floating], shapes: Mapping[str, tuple[int, ...]], block_size: int) -> dict[str, NDArray[np.generic]]:
    """The arrays of a slot, empty; `row` has the form of an update."""
    return {
        "updates": np.zeros((block_size, len(row)), dtype=row.dtype),
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
        asked = json.loads(line)
        reply: dict[str, object] = {"slot": asked["slot"], "steps": None}
        try:
            outcome = trainer.train(Job(**asked["job"]), named(np.array(received), template))
            into, count = results[asked["slot"]], len(outcome.steps)
            into["updates"][:count] = outcome.updates
            for name, value in outcome.sums.items():
                into[name][:count] = value
            reply |= {"steps": outcome.steps.tolist(), "digests": outcome.digests}
        except Exception as error:  # the sites of this block are trained one after another
            logger.warning("a block could not be trained: %s", type(error).__name__)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def main() -> None:
    """Workers' processes; each ends when nobody holds the other end of its pipe of jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulation decides when it ends
    torch.set_num_threads(1)
    workers = [tuple(map(int, text.split(":"))) for text in sys.argv[2:]]
    own = next((worker for worker in workers[1:] if not os.fork()), workers[0])
    for _, jobs, replies in workers:
        if jobs != own[1]:  # else nobody would see that another ends
            os.close(jobs)
            os.close(replies)
    number, jobs, replies = own
    with open(jobs, "rb") as asked, open(replies, "wb") as answers:
        work(Path(sys.argv[1]), number, answers, iter(asked.readline, b""))
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # the simulation was killed, else it would have ended its workers


if __name__ == "__main__":
    main()
