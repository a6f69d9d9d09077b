"""Many sites at once, or one after another: a function of task, study, sites and memory alone, so that a run repeated chooses alike."""

import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from shared.errors import ConfigurationError
from shared.models import initial_parameters, set_parameters
from shared.plan import shape_site
from shared.study import Study
from shared.task import Task
from simulations.blocks.layers import NotStackableError
from simulations.blocks.stacked import StackedModel
from simulations.setting import Setting

Execution = Literal["auto", "blocks", "sequential"]
DEFAULT_MEMORY = 2_000_000_000  # bytes
CACHE_BYTES = 24_000_000  # of a block: what one core keeps near; larger blocks gain nothing
MOST_SITES = 256
LEAST_BLOCKS = 2  # a round, so that two processes have something to do
MANY_SITE_ROUNDS = 10_000  # from there on several processes are worth their start
NUM_PROBE_PATIENTS = 6
TOLERANCE = 1e-4
COPIES = 12  # of a site's parameters while it trains: itself, gradient, noise, optimizer, temporaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the sites of a simulation are trained. `block_size` is 1 where one after another; then `reason` says why."""

    block_size: int
    num_workers: int = 0  # processes beside this one; 0: this one trains
    reason: str = ""

    @property
    def blocks(self) -> bool:
        """True where many sites are trained at once."""
        return self.block_size > 1

    def __str__(self) -> str:
        return f"in blocks of up to {self.block_size} sites" if self.blocks else f"one site after another ({self.reason})"


def choose(setting: Setting, execution: Execution, memory: int = DEFAULT_MEMORY, processes: int | None = None) -> Choice:
    """How to run this setting. The number of processes has no effect on the result.

    Raises:
        ConfigurationError: blocks were asked for and cannot be.
    """
    if execution == "sequential":
        return Choice(block_size=1, reason="as asked")
    try:
        choice = Choice(block_size=_block_size(setting, memory), num_workers=_num_workers(setting, processes))
    except NotStackableError as error:
        choice = Choice(block_size=1, reason=str(error))
    if execution == "blocks" and not choice.blocks:
        raise ConfigurationError(f"--execution blocks: expected a study that can be trained many sites at once: {choice.reason}", "use auto")
    return choice


def _block_size(setting: Setting, memory: int) -> int:
    """Sites of a block.

    Raises:
        NotStackableError: there can be none.
    """
    study, task = setting.study, setting.task
    if setting.federation is None:
        raise NotStackableError("every real site answers for itself")
    if study.private and study.privacy.noise_source == "os":
        raise NotStackableError("noise from the operating system is kept site by site")
    sizes = [cohort.num_patients for cohort in setting.federation.cohorts.values()]
    if len(sizes) < 2:
        raise NotStackableError("there is one site")
    if study.privacy.records_per_patient == "all" and any(len(cohort.labels) > cohort.num_patients for cohort in setting.federation.cohorts.values()):
        raise NotStackableError("all records of a patient are clipped as one")
    site_bytes = check_alike(task) * _rows_of(study, max(sizes)) + COPIES * _parameter_bytes(task)
    most = memory // site_bytes
    if most < 2:
        raise NotStackableError(f"two sites at once need {2 * site_bytes / 1e9:.1f} GB of memory")
    return int(max(2, min(math.ceil(len(sizes) / LEAST_BLOCKS), MOST_SITES, most, CACHE_BYTES // site_bytes)))


def _num_workers(setting: Setting, processes: int | None) -> int:
    """One for each core where training takes far longer than their start; none where one process is enough."""
    if processes is not None:
        return processes if processes > 1 else 0
    rounds = setting.study.rounds.count * setting.study.evaluation.folds
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and len(setting.site_names) * rounds >= MANY_SITE_ROUNDS else 0


def _rows_of(study: Study, num_patients: int) -> int:
    """Rows of a padded batch: the expected batch and three standard deviations."""
    expected = shape_site(study, num_patients).expected_batch_size
    return int(min(expected + 3 * expected**0.5, num_patients)) + 1


def _parameter_bytes(task: Task) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in task.model().parameters())


def check_alike(task: Task) -> int:
    """Return where the task's model, stacked, gives every site the outputs that its own parameters give: the bytes a row takes on its way.

    Raises:
        NotStackableError: it cannot be stacked, or does not.
    """
    cohort = task.synthetic_cohort(NUM_PROBE_PATIENTS, 0)
    inputs = tuple(torch.from_numpy(values) for values in cohort.inputs)
    model, stacked = task.model(), StackedModel(task.model(), 2)
    expected = []
    for site in range(2):
        parameters = initial_parameters(model, site)
        set_parameters(model, parameters)
        model.train()
        for name, (span, _) in stacked.spans.items():
            stacked.flat[site, span] = torch.from_numpy(np.array(parameters[name])).reshape(-1)
        with torch.no_grad():
            expected.append(model(*inputs))
    try:
        outputs = stacked(*(torch.cat([values, values]) for values in inputs))
        task.loss(outputs, torch.from_numpy(np.concatenate([cohort.labels, cohort.labels])))
    except NotStackableError:
        raise
    except Exception as error:  # whatever a forward pass may raise that was written for one site's rows
        raise NotStackableError(f"its forward pass fails on the rows of many sites ({type(error).__name__})") from error
    if outputs.shape[0] != 2 * len(inputs[0]) or not torch.allclose(outputs, torch.cat(expected), rtol=TOLERANCE, atol=TOLERANCE):
        raise NotStackableError("its forward pass gives other outputs on the rows of many sites")
    entries = sum(layer.num_entries() for layer in stacked.layers)
    return 2 * 4 * entries // outputs.shape[0]
