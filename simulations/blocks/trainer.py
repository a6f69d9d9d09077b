"""A block of sites trained and evaluated: the part of a round that needs patients, in this process or in a worker's.

S: sites of the block. D: entries of a model's state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.charging import release_key
from client.evaluation import predictions_of
from client.local_training import LocalRound
from client.noise import subkey
from client.refinement import refined
from client.releases import row_digests
from client.sampling import PatientIndex
from shared.cohort import Cohort, IntArray
from shared.distributed_noise import POINTS, DistributedNoise
from shared.metrics import Statistic
from shared.models import Parameters, get_parameters, set_parameters
from shared.secure_sum.setting import SumForm
from shared.study import Study
from shared.task import Task
from simulations.blocks.activations import with_fast_activations
from simulations.blocks.patients import Part, Patients
from simulations.blocks.stacked import StackedModel
from simulations.blocks.training import Records, SharedNoise, SiteWork, block_points, flat, flat_updates, named, train_block

Sums = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A block to train.

    Attributes:
        sites: by number, those with most steps first.
        share_std: of distributed noise, the standard deviation of a site's share, in grid points; None where noise is each site's own.
    """

    round_number: int
    fold: int
    sites: tuple[int, ...]
    share_std: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a block came to.

    Attributes:
        steps: `(S,)`, how many each site took.
        updates: `(S, D)`; under distributed noise each site's noised sum of gradients, in whole grid points.
        digests: `shared.models.arrays_digest` of each update.
        sums: each statistic of the parameters received, `(S, *shape)`; none where they would carry noise.
    """

    steps: IntArray
    updates: NDArray[np.floating]
    digests: tuple[str, ...]
    sums: Sums


class BlockTrainer:
    """Trains blocks of sites of one fold, each one site after another; `StackedTrainer` trains a block at once."""

    def __init__(self, task: Task, study: Study, patients: Patients) -> None:
        self._task = task
        self._study = study
        self._patients = patients
        self._model = task.model()
        self._noise = distributed_noise(task, study)
        self._known: dict[int, tuple[Cohort, PatientIndex]] = {}

    def train(self, job: Job, received: Parameters) -> Outcome:
        """The block, from the parameters received."""
        sums = {} if self._study.noised_statistics else self._evaluate(job.sites, received)
        local = LocalRound(study=self._study, task=self._task, round_number=job.round_number)
        works = [self._work(site, job.fold, job.round_number) for site in job.sites]
        if job.share_std is None:
            steps, updates = self._train(works, received, local)
            return Outcome(steps=steps, updates=updates, digests=row_digests(updates, received), sums=sums)
        assert self._noise is not None
        points = self._points(works, received, local, SharedNoise(noise=self._noise, share_std=job.share_std))
        return Outcome(steps=np.ones(len(works), dtype=np.int64), updates=points, digests=row_digests(points, {POINTS: points[0]}), sums=sums)

    def _train(self, works: list[SiteWork], received: Parameters, local: LocalRound) -> tuple[IntArray, NDArray[np.floating]]:
        """The steps that each site took `(S,)`, and the updates `(S, D)`."""
        from client.local_update import local_update  # Opacus comes with it

        made = [local_update(self._model, work.part, received, local, plan=work.plan, key=work.key, simulated=True) for work in works]
        return np.array([steps for _, steps in made]), np.stack([flat(update) for update, _ in made])

    def _points(self, works: list[SiteWork], received: Parameters, local: LocalRound, shared: SharedNoise) -> NDArray[np.float64]:
        """The noised sums, `(S, d)`."""
        from client.distributed_sum import noised_points  # Opacus comes with it
        from client.local_update import Learner

        learners = [Learner(model=self._model, train_part=work.part, local=local, plan=work.plan, key=work.key, simulated=True) for work in works]
        made = [noised_points(learner, received, shared.noise, share_std=shared.share_std) for learner in learners]
        return np.stack(made).astype(np.float64)

    def _work(self, site: int, fold: int, round_number: int) -> SiteWork:
        patients = self._patients
        if site not in self._known:
            part = patients.training.cohort(site)
            self._known[site] = part, PatientIndex(part)
        part, index = self._known[site]
        key = release_key(self._study.seed, "training", patients.names[site], fold, round_number)
        return SiteWork(
            name=patients.names[site], plan=patients.plans[site], part=part, index=index, start=int(patients.training.starts[site]), key=key
        )  # fmt: skip

    def _evaluate(self, sites: Sequence[int], received: Parameters) -> Sums:
        """Every site's statistics: one pass over the test records of all of them."""
        declared = {metric.statistic.name: metric.statistic for metric in self._task.metrics}
        part = self._patients.test
        tested = _select(part, sites)
        if not len(tested.labels):
            return {name: np.zeros((len(sites), *statistic.shape)) for name, statistic in declared.items()}
        set_parameters(self._model, received)
        together = Cohort(inputs=tested.inputs, labels=tested.labels, patient_of_record=tested.patient_of_record, patient_ids=("",))
        predictions = predictions_of(self._task, self._model, together)
        return {name: _sums_by_site(statistic, predictions, tested) for name, statistic in declared.items()}


class StackedTrainer(BlockTrainer):
    """Trains the sites of a block, at most `block_size`, at once, on a device that holds the records of all sites."""

    def __init__(self, task: Task, study: Study, patients: Patients, *, block_size: int, device: str = "cpu") -> None:
        super().__init__(task, study, patients)
        self._stacked = StackedModel(self._model, block_size, device)
        self._model = with_fast_activations(self._model).to(device)  # which evaluates
        inputs, labels = patients.training.inputs, patients.training.labels
        self._records = Records(inputs=tuple(torch.from_numpy(values).to(device) for values in inputs), labels=torch.from_numpy(labels).to(device))

    def _train(self, works: list[SiteWork], received: Parameters, local: LocalRound) -> tuple[IntArray, NDArray[np.floating]]:
        steps = train_block(self._stacked, received, works, self._records, local)
        updates = flat_updates(self._stacked, received, len(works))
        if self._task.refine is not None:
            for update, work in zip(updates, works, strict=True):
                trained: Parameters = {name: received[name] + value for name, value in named(update, received).items()}
                update[:] = flat(refined(self._task, trained, key=subkey(work.key, b"refine"))) - flat(received)
        return steps, updates

    def _points(self, works: list[SiteWork], received: Parameters, local: LocalRound, shared: SharedNoise) -> NDArray[np.float64]:
        return block_points(self._stacked, received, works, self._records, local, shared)


def distributed_noise(task: Task, study: Study) -> DistributedNoise | None:
    """What the study fixes of distributed noise; None where noise is each site's own."""
    if not study.distributed_noise:
        return None
    num_trainable = sum(parameter.numel() for parameter in task.model().parameters() if parameter.requires_grad)
    return SumForm.of_study(study, num_values=num_trainable, num_trainable=num_trainable).noise


def no_update(task: Task, study: Study) -> NDArray[np.floating]:
    """Zeros in the form of a site's row among the updates of a block."""
    noise = distributed_noise(task, study)
    return np.zeros_like(flat(get_parameters(task.model()))) if noise is None else np.zeros(noise.num_parameters)


def make_trainer(task: Task, study: Study, patients: Patients, *, block_size: int, stacked: bool, device: str = "cpu") -> BlockTrainer:
    """One that trains the sites of a block at once, or one after another, which the CPU does."""
    return StackedTrainer(task, study, patients, block_size=block_size, device=device) if stacked else BlockTrainer(task, study, patients)


def _select(part: Part, sites: Sequence[int]) -> Part:
    """These sites' records, one site after another."""
    spans = [slice(int(part.starts[site]), int(part.starts[site + 1])) for site in sites]
    return Part(
        inputs=tuple(np.concatenate([values[span] for span in spans]) for values in part.inputs),
        labels=np.concatenate([part.labels[span] for span in spans]),
        patient_of_record=np.concatenate([part.patient_of_record[span] for span in spans]),
        starts=np.cumsum([0, *[span.stop - span.start for span in spans]]),
        num_patients=part.num_patients[list(sites)],
    )


def _sums_by_site(statistic: Statistic, predictions: NDArray[np.float64], part: Part) -> NDArray[np.float64]:
    """`(S, *shape)`: the statistic of each site's records."""
    cohorts = [part.cohort(site) for site in range(len(part.num_patients))]
    if statistic.cells is not None:
        size = int(np.prod(statistic.shape))
        offsets = np.repeat(np.arange(len(cohorts)) * size, np.diff(part.starts))
        weights = np.concatenate([cohort.record_weights() for cohort in cohorts])
        counts = np.bincount(offsets + statistic.cells(predictions, part.labels), weights=weights, minlength=len(cohorts) * size)
        return np.asarray(counts, dtype=np.float64).reshape(len(cohorts), *statistic.shape)
    sums = [
        statistic.summarise(predictions[part.starts[site] : part.starts[site + 1]], cohort) if cohort.num_records else np.zeros(statistic.shape)
        for site, cohort in enumerate(cohorts)
    ]
    return np.asarray(sums, dtype=np.float64)
