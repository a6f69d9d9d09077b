"""Workers on a Ray cluster: an actor a core, wherever in the cluster it runs, that trains whole blocks.

Flower's own Ray engine gives an actor one message at a time, keeps an actor that died in its pool, and fails
all that it is given from then on; here an actor's death is seen, another takes its place or its blocks go to those that are left, and the
result is the same to the bit, since a block does not depend on who trains it.
"""

import logging
import os
import socket
import sys
import warnings
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from shared.errors import ConfigurationError, WorkerFailedError
from shared.models import Parameters, get_parameters
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.blocks.patients import Patients
from simulations.blocks.trainer import Job, Outcome, make_trainer
from simulations.blocks.training import flat, named
from simulations.blocks.workers import ONE_THREAD, SLOTS, Slot

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
READY_SECONDS = 120.0  # for an actor to import what it needs and take its patients
DEATHS_A_WORKER = 3  # then something is wrong that another actor would not mend


class Worker:
    """An actor's content: trains blocks, and says no more of what went wrong than that a block could not be trained."""

    def __init__(self, study: dict[str, object], fingerprint: str, patients: Patients, block_size: int, stacked: bool) -> None:
        torch.set_num_threads(1)
        task, parsed = resolve_task(str(study["task"])), Study.from_table(study)
        if task.fingerprint() != fingerprint:
            raise ConfigurationError(
                f"task {task.name}: expected the same code on every node of the Ray cluster, got another", "install the same version"
            )
        self._template = get_parameters(task.model())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to patients
            self._trainer = make_trainer(task, parsed, patients, block_size=block_size, stacked=stacked)

    def ready(self) -> None:
        """Return once everything is in place."""

    def train(self, received: NDArray[np.floating], job: Job) -> Outcome | None:
        """The block, or None where it could not be trained; then its sites are trained one after another elsewhere."""
        try:
            return self._trainer.train(job, named(np.array(received), self._template))
        except Exception as error:  # whose text may hold a patient's value
            logger.warning("a block could not be trained: %s", type(error).__name__)
            return None


class RayWorkers:
    """As `workers.Pool`, on a Ray cluster.

    Args:
        address: of the cluster; None: one on this machine alone, which is ended with the workers.
        num_workers: actors; None: one for each CPU that the cluster has.

    Raises:
        ConfigurationError: there is no cluster at `address`, or its nodes have other code.
    """

    def __init__(
        self, task: Task, study: Study, patients: Patients, *, block_size: int, stacked: bool, address: str | None = None, num_workers: int | None = None
    ) -> None:  # fmt: skip
        self._started = not ray.is_initialized()
        if self._started:
            connect(address, num_workers)
        count = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._make = ray.remote(Worker).options(num_cpus=1, runtime_env={"env_vars": ONE_THREAD}).remote
        self._arguments = (study.to_table(), task.fingerprint(), ray.put(patients), block_size, stacked)
        self._actors: list[Any] = [self._make(*self._arguments) for _ in range(count)]
        self._received: Any = None
        self._under_way: dict[Any, tuple[Slot, Any]] = {}  # by Ray's reference: the slot, and the actor that was asked
        self._jobs: dict[Slot, Job] = {}
        self._deaths = 0
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=READY_SECONDS)
        except RayError as error:
            self.close()
            raise ConfigurationError(
                f"--engine ray: expected {count} workers on the cluster within {READY_SECONDS:g} s, got {type(error).__name__}",
                "install this version, with the study's task, on every node, or ask for fewer with --processes",
            ) from None

    def ready(self) -> bool:
        """They are: one that is not made is an error."""
        return True

    @property
    def slots(self) -> list[Slot]:
        """Where blocks can be under way."""
        return [(worker, slot) for slot in range(SLOTS) for worker in range(len(self._actors))]

    def receive(self, received: Parameters) -> None:
        """These are the parameters of the round to come; blocks of an earlier one that nobody waited for are let go."""
        while self._under_way:
            self.wait()
        self._received = ray.put(flat(received))

    def submit(self, slot: Slot, job: Job) -> None:
        """Have an actor train this block."""
        self._jobs[slot] = job
        actor = self._actors[slot[0]]
        self._under_way[actor.train.remote(self._received, job)] = (slot, actor)

    def wait(self) -> tuple[Slot, Outcome | None]:
        """A block that is done, or None where it could not be trained. What an actor that died was asked is asked of another.

        Raises:
            WorkerFailedError: no actor is left, or one after another dies.
        """
        while True:
            [done], _ = ray.wait(list(self._under_way), num_returns=1)
            slot, actor = self._under_way.pop(done)
            try:
                outcome: Outcome | None = ray.get(done)
            except RayError:
                self._replace(slot[0], actor)
                self.submit(slot, self._jobs[slot])
            else:
                return slot, outcome

    def _replace(self, worker: int, dead: Any) -> None:
        """Another actor for this worker: a new one where the cluster has room for it, else one of those that are left."""
        if self._actors[worker] is not dead:  # it was replaced when its other block failed
            return
        self._deaths += 1
        if self._deaths > DEATHS_A_WORKER * len(self._actors):
            raise _no_workers()
        logger.warning("a worker on the Ray cluster died; what it was training is trained by another")
        ray.kill(dead)
        new = self._make(*self._arguments)
        try:
            ray.get(new.ready.remote(), timeout=READY_SECONDS if len(set(self._actors)) == 1 else READY_SECONDS / 6)
        except RayError:
            ray.kill(new)
            left = [actor for actor in self._actors if actor is not dead]
            if not left:
                raise _no_workers() from None
            new = left[worker % len(left)]
        self._actors = [new if actor is dead else actor for actor in self._actors]

    def close(self) -> None:
        """End the actors, and the cluster where it was started for them."""
        for actor in self._actors:
            ray.kill(actor)
        if self._started:
            ray.shutdown()


def _no_workers() -> WorkerFailedError:
    return WorkerFailedError("workers on the Ray cluster: expected one that lives, got none", "look at the cluster's nodes, and resume the run")


def connect(address: str | None, num_workers: int | None) -> None:
    """Have Ray use the cluster at `address`, or one of its own on this machine with as many CPUs.

    Raises:
        ConfigurationError: nobody is there.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}  # an actor's log may hold what a task prints of patients
    if address is None:
        path = os.pathsep.join(filter(None, sys.path))
        ray.init(num_cpus=num_workers, include_dashboard=False, _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
        return
    try:
        _check_listens(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"--ray-address: expected a Ray cluster at {address!r}, found none", "start one with 'ray start --head'") from error


def _check_listens(address: str) -> None:
    """Return where somebody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
