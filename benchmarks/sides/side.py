"""What every side of the benchmark shares: setting, patients and first model as the driver wrote them, the clock, and a plain loop over sites.

A side is run as `python sides/<side>.py FOLDER`. It reads FOLDER/setting.json, inputs.npy `(S, 250, ...)`, labels.npy `(S, 250)` and initial.npz,
trains, and writes FOLDER/<side>.json. It imports nothing but NumPy and torch, and so runs in every side's environment.
"""

import copy
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import models
import numpy as np
import torch
from numpy.typing import NDArray
from torch import multiprocessing, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """setting.json."""

    workload: str
    private: bool
    sites: int
    rounds: int
    train: int  # patients of a site; those after them are for testing
    batch_size: int
    learning_rate: float
    noise_multiplier: float
    max_grad_norm: float
    processes: int
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Setting":
        """The setting of this folder."""
        return cls(**json.loads((folder / "setting.json").read_text()))


class Patients:
    """All sites' patients, mapped from the files and never copied as a whole."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.inputs = np.load(folder / "inputs.npy", mmap_mode="c")
        self.labels = np.load(folder / "labels.npy", mmap_mode="c")
        self._train = setting.train

    def training(self, site: int) -> TensorDataset:
        """A site's training patients."""
        return TensorDataset(torch.from_numpy(self.inputs[site, : self._train]), torch.from_numpy(self.labels[site, : self._train]))

    def accuracy(self, model: nn.Module) -> float:
        """Share of all sites' test patients that the model classifies rightly."""
        right = 0
        with torch.no_grad():
            for inputs, labels in zip(self.inputs[:, self._train :], self.labels[:, self._train :], strict=True):
                right += int((model(torch.from_numpy(inputs)).argmax(dim=1) == torch.from_numpy(labels)).sum())
        return right / self.labels[:, self._train :].size


@functools.cache
def opened(folder: Path) -> tuple[Setting, Patients]:
    """Setting and patients, once a process."""
    torch.set_num_threads(1)
    setting = Setting.read(folder)
    return setting, Patients(folder, setting)


def first_model(folder: Path, setting: Setting) -> nn.Module:
    """The model with which every side begins."""
    model = models.build(setting.workload, private=setting.private)
    with np.load(folder / "initial.npz") as initial:
        model.load_state_dict({name: torch.from_numpy(initial[name]) for name in model.state_dict()})
    return model


@dataclass(slots=True)
class Clock:
    """Seconds of each round, one after another without a gap."""

    seconds: list[float] = field(default_factory=list)
    first_round_at: float = 0.0  # on the machine's monotonic clock, which the driver reads as well
    _begun: float = field(default_factory=time.monotonic)

    def lap(self) -> None:
        """A round has ended."""
        now = time.monotonic()
        self.seconds.append(now - self._begun)
        self.first_round_at = self.first_round_at or now
        self._begun = now


def write(folder: Path, name: str, clock: Clock, accuracy: float, **more: object) -> None:
    """The side's result."""
    result = {"seconds": clock.seconds, "first_round_at": clock.first_round_at, "accuracy": accuracy, **more}
    (folder / f"{name}.json").write_text(json.dumps(result))


Train = Callable[[torch.Tensor], torch.Tensor]  # parameters received -> the sum of those that the sites trained, `(D,)` both
MakeTrain = Callable[[Path, range], Train]
TrainSite = Callable[[nn.Module, TensorDataset, Setting], None]


def one_by_one(train_site: TrainSite, folder: Path, sites: range) -> Train:
    """Sites one after another, each with a copy of the model that `train_site` trains in place."""
    setting, patients = opened(folder)
    model = first_model(folder, setting)
    data = [patients.training(site) for site in sites]

    def train(received: torch.Tensor) -> torch.Tensor:
        vector_to_parameters(received.clone(), model.parameters())
        total = torch.zeros_like(received)
        for own in data:
            local = copy.deepcopy(model)
            train_site(local, own, setting)
            total += parameters_to_vector(local.parameters()).detach()
        return total

    return train


def run(name: str, make_train: MakeTrain) -> None:
    """Federated averaging with equal weights in as many processes as the setting says, which share parameters and sums."""
    folder = Path(sys.argv[1])
    setting, patients = opened(folder)
    torch.manual_seed(setting.seed)
    model = first_model(folder, setting)
    received = parameters_to_vector(model.parameters()).detach().clone().share_memory_()
    sums = torch.zeros(setting.processes, len(received)).share_memory_()
    spawning = multiprocessing.get_context("spawn")
    barrier = spawning.Barrier(setting.processes)
    arguments = (make_train, folder, received, sums, barrier)
    others = [spawning.Process(target=_train_share, args=(rank, *arguments), daemon=True) for rank in range(1, setting.processes)]
    for process in others:
        process.start()
    clock = _train_share(0, *arguments)
    for process in others:
        process.join()
    vector_to_parameters(received, model.parameters())
    write(folder, name, clock, patients.accuracy(model))


def _train_share(  # type: ignore[no-untyped-def]  # the barrier's class has no public name
    rank: int, make_train: MakeTrain, folder: Path, received: torch.Tensor, sums: torch.Tensor, barrier
) -> Clock:
    """Every round's training at this process' share of the sites; the first process takes the mean."""
    setting, _ = opened(folder)
    bounds: NDArray[np.int64] = np.linspace(0, setting.sites, setting.processes + 1).astype(np.int64)
    torch.manual_seed(setting.seed + rank)
    clock = Clock()
    train = make_train(folder, range(int(bounds[rank]), int(bounds[rank + 1])))
    for _ in range(setting.rounds):
        sums[rank] = train(received)
        barrier.wait()
        if rank == 0:
            torch.sum(sums, dim=0, out=received).div_(setting.sites)
            clock.lap()
        barrier.wait()
    return clock
