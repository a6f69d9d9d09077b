"""Many sites at once, or one after another: a function of task, study, sites and memory alone, so that a run repeated chooses alike."""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from shared.errors import ConfigurationError
from shared.models import initial_parameters, set_parameters
from shared.plan import shape_site
from shared.strategy_options import PERSONAL, Cyclic, FedBuff, FedDyn, QFedAvg, Scaffold
from shared.study import Study
from shared.task import Task
from simulations.blocks.layers import NotStackableError
from simulations.blocks.stacked import StackedModel
from simulations.setting import Setting

Execution = Literal["auto", "blocks", "sequential"]
Engine = Literal["in-process", "ray"]
DEFAULT_MEMORY = 2_000_000_000  # bytes
CACHE_BYTES = 24_000_000  # of a block, worked on at a time: what one core keeps near; larger blocks gain nothing
FRESH_BYTES = 32 * 2**20  # larger tensors are handed back to the operating system at every step, and come back page by page
MOST_SITES = 256
LEAST_BLOCKS = 2  # a round, so that two processes have something to do
MANY_SITE_ROUNDS, MANY_SLOW_SITE_ROUNDS = 10_000, 500  # from there on several processes are worth their start: in blocks, and one after another
SITES_A_JOB = 4  # that a process trains one after another before it is asked again
TOLERANCE = 1e-4
SITE_BY_SITE = (*PERSONAL, Scaffold, FedDyn, QFedAvg, Cyclic, FedBuff)  # strategies with a part at each site that is not FedAvg's, or an order
COPIES = 12  # of a site's parameters while it trains: itself, gradient, noise, optimizer, temporaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the sites of a simulation are trained: at once, a block of `block_size` at a time, or one after another; then `reason` says why."""

    block_size: int
    num_workers: int = 0  # processes beside this one; 0: this one trains
    reason: str = ""
    device: str = "cpu"
    engine: Engine = "in-process"
    ray_address: str | None = None

    @property
    def in_process(self) -> bool:
        """True where this process trains, one site after another, as a message comes."""
        return not self.blocks and not self.num_workers and self.engine == "in-process"

    def on_ray(self, setting: Setting, address: str | None, processes: int | None) -> "Choice":
        """The same on a Ray cluster, with as many workers as it has CPUs where `processes` is None.

        Raises:
            ConfigurationError: the sites are real, or keep their noise to themselves: they stay in this process; or a device was named for it.
        """
        if self.device != "cpu":
            raise ConfigurationError(
                "--device: expected none with --engine ray, whose workers train on their CPUs, got one", "leave one of the two out"
            )
        if setting.federation is None or _noise_of_its_own(setting.study):
            raise ConfigurationError(
                "--engine ray: expected virtual sites with seeded noise, got others, which no other machine may see", "leave it out"
            )
        if one_by_one(setting.study):
            raise ConfigurationError(
                f"--engine ray: expected a study whose sites are trained together, got {_own_part(setting.study)}", "leave it out"
            )
        return replace(self, engine="ray", ray_address=address, num_workers=processes or 0)

    @property
    def blocks(self) -> bool:
        """True where many sites are trained at once."""
        return not self.reason

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"in blocks of up to {self.block_size} sites{where}" if self.blocks else f"one site after another ({self.reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that a row takes on its way through a model: in all, at a time, and in the largest tensor."""

    held: int
    near: int
    largest: int


def choose(
    setting: Setting, execution: Execution, memory: int = DEFAULT_MEMORY, processes: int | None = None, device: str = "cpu"
) -> Choice:  # fmt: skip
    """How to run this setting. The number of processes has no effect on the result.

    Args:
        device: as torch names it; what is not "cpu" trains blocks of as many sites as `memory`, its own, allows, and this process feeds it alone.

    Raises:
        ConfigurationError: blocks were asked for, or a device, and cannot be.
    """
    if device != "cpu":
        return _on_device(setting, execution, memory, processes, device)
    try:
        if execution == "sequential":
            raise NotStackableError("as asked")
        choice = Choice(block_size=_block_size(setting, memory), num_workers=_num_workers(setting, processes, MANY_SITE_ROUNDS))
    except NotStackableError as error:
        choice = Choice(block_size=SITES_A_JOB, num_workers=_num_workers(setting, processes, MANY_SLOW_SITE_ROUNDS), reason=str(error))
    if execution == "blocks" and not choice.blocks:
        raise ConfigurationError(f"--execution blocks: expected a study that can be trained many sites at once: {choice.reason}", "use auto")
    return choice


def _on_device(setting: Setting, execution: Execution, memory: int, processes: int | None, device: str) -> Choice:
    if execution == "sequential" or (processes or 1) > 1:
        raise ConfigurationError(
            f"--device {device}: expected blocks that one process feeds, got --execution sequential or several processes", "leave them out"
        )
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises of a name, a build or a driver
        raise ConfigurationError(
            f"--device {device}: expected a device that torch can use here, got another ({type(error).__name__})", "use cpu, cuda, or cuda:1"
        ) from None
    try:
        return Choice(block_size=_block_size(setting, memory, cached=False), device=device)
    except NotStackableError as error:
        raise ConfigurationError(f"--device {device}: expected a study that can be trained many sites at once: {error}", "use cpu") from None


def _block_size(setting: Setting, memory: int, *, cached: bool = True) -> int:
    """Sites of a block: as many as memory allows, and on a CPU no more than its caches serve well.

    Raises:
        NotStackableError: there can be none.
    """
    study, task = setting.study, setting.task
    if setting.federation is None:
        raise NotStackableError("every real site answers for itself")
    if _noise_of_its_own(study):
        raise NotStackableError("noise from the operating system is kept site by site")
    if one_by_one(study):
        raise NotStackableError(_own_part(study))
    sizes = [cohort.num_patients for cohort in setting.federation.cohorts.values()]
    if len(sizes) < 2:
        raise NotStackableError("there is one site")
    if study.privacy.records_per_patient == "all" and any(len(cohort.labels) > cohort.num_patients for cohort in setting.federation.cohorts.values()):
        raise NotStackableError("all records of a patient are clipped as one")
    footprint, num_rows, fixed = check_alike(task), _rows_of(study, max(sizes)), COPIES * _parameter_bytes(task)
    site_bytes = footprint.held * num_rows + fixed
    most = memory // site_bytes
    if most < 2:
        raise NotStackableError(f"two sites at once need {2 * site_bytes / 1e9:.1f} GB of memory")
    if not cached:
        return min(len(sizes), most)
    fast = min(CACHE_BYTES // (footprint.near * num_rows + fixed), FRESH_BYTES // (footprint.largest * num_rows))
    return int(max(2, min(math.ceil(len(sizes) / LEAST_BLOCKS), MOST_SITES, most, fast)))


def _num_workers(setting: Setting, processes: int | None, many: int) -> int:
    """One for each core where training takes far longer than their start; none where one process is enough, or a site keeps what no other may see."""
    if setting.federation is None or _noise_of_its_own(setting.study) or one_by_one(setting.study):
        return 0
    if processes is not None:
        return processes if processes > 1 else 0
    rounds = setting.study.rounds.count * setting.study.evaluation.folds
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and len(setting.site_names) * rounds >= many else 0


def one_by_one(study: Study) -> bool:
    """Whether each site must answer for itself."""
    return isinstance(study.strategy, SITE_BY_SITE)


def _own_part(study: Study) -> str:
    match study.strategy:
        case FedBuff():
            own = "whose sites train at times of their own"
        case Cyclic():
            own = "whose sites train in turn"
        case _:
            own = "which has a part of its own at each site"
    return f"strategy {study.strategy.name}, {own}"


def _noise_of_its_own(study: Study) -> bool:
    return study.private and study.privacy.noise_source == "os"


def _rows_of(study: Study, num_patients: int) -> int:
    """Rows of a padded batch: the expected batch and three standard deviations."""
    expected = shape_site(study, num_patients).expected_batch_size
    return int(min(expected + 3 * expected**0.5, num_patients)) + 1


def _parameter_bytes(task: Task) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in task.model().parameters())


def check_alike(task: Task) -> Footprint:
    """Return where the task's model, stacked, gives every site the outputs that its own parameters give: the bytes a row takes on its way.

    Raises:
        NotStackableError: it cannot be stacked, or does not.
    """
    cohort = task.trial_patients()
    inputs = tuple(torch.from_numpy(values) for values in cohort.inputs)
    model, stacked = task.model(), StackedModel(task.model(), 2)
    expected = []
    for site in range(2):
        parameters = initial_parameters(model, site)
        set_parameters(model, parameters)
        model.train()
        for layer in model.modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.eval()
        for name, (span, _) in stacked.spans.items():
            stacked.flat[site, span] = torch.from_numpy(np.array(parameters[name])).reshape(-1)
        with torch.no_grad():
            expected.append(model(*inputs))
    try:
        outputs = stacked.without_dropout(*(torch.cat([values, values]) for values in inputs))
        task.loss(outputs, torch.from_numpy(np.concatenate([cohort.labels, cohort.labels])))
    except NotStackableError:
        raise
    except Exception as error:  # whatever a forward pass may raise that was written for one site's rows
        raise NotStackableError(f"its forward pass fails on the rows of many sites ({type(error).__name__})") from error
    if outputs.shape[0] != 2 * len(inputs[0]) or not torch.allclose(outputs, torch.cat(expected), rtol=TOLERANCE, atol=TOLERANCE):
        raise NotStackableError("its forward pass gives other outputs on the rows of many sites")
    num_rows, largest = outputs.shape[0], max(value.numel() for layer in stacked.layers for call in layer.calls for value in call)
    return Footprint(
        held=2 * 4 * sum(layer.num_entries() for layer in stacked.layers) // num_rows,
        near=2 * 4 * sum(layer.num_near() for layer in stacked.layers) // num_rows,
        largest=4 * largest // num_rows,
    )
