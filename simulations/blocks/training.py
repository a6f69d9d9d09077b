"""One round of local training at many sites at once: the arithmetic of `client.private_training` and `client.local_training`, stacked.

Each site draws its batches and its noise from its own key, exactly as it does alone, so a site's update is the one it would have made alone
up to the order of floating-point sums. Batches are padded to the longest of the step; a padded row weighs nothing.

For simulations only: sums and noise are in the model's own type, float32 as a rule, where a hospital's are in float64.

S: sites of the block, those with most steps first. B: rows of a site in a step. N: records of all sites.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.local_training import LocalRound, round_batches
from client.noise import KeyedStream, NoiseGrid, SimulatedNoise, standard_normals, subkey
from client.optimizers import LocalOptimizer, ProximalTerm
from client.sampling import PatientIndex, physical_size, poisson_batches, sample_units
from shared.cohort import Cohort, IntArray
from shared.distributed_noise import DistributedNoise
from shared.models import Parameters
from shared.plan import SitePlan, shape_site
from shared.seeding import generator_of
from shared.study import Study
from simulations.blocks.dropout import Masks
from simulations.blocks.stacked import StackedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteWork:
    """What one site does in a round.

    Attributes:
        part: its training patients.
        start: where its records begin among those of all sites.
        key: of all its randomness in this round.
    """

    name: str
    plan: SitePlan
    part: Cohort
    index: PatientIndex
    start: int
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The training records of all sites, one after another."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNoise:
    """Distributed noise of one round: what the study fixes of it, and the standard deviation of every site's share, in grid points."""

    noise: DistributedNoise
    share_std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batches:
    """The batches of all sites: how many records each has in each step, `(steps, S)`, and which."""

    counts: IntArray
    records: list[IntArray]  # a step: the records of all sites, site after site

    def padded(self, step: int, num_active: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`(S B,)` indices of records and `(S, B)` whether a row is one of its site's."""
        counts = self.counts[step, :num_active]
        mask = np.arange(max(int(counts.max(initial=0)), 1)) < counts[:, None]
        rows = np.zeros(mask.shape, dtype=np.int64)
        rows[mask] = self.records[step]
        return torch.from_numpy(rows.reshape(-1)).to(device), torch.from_numpy(mask).to(device)


def train_block(stacked: StackedModel, received: Parameters, sites: list[SiteWork], records: Records, local: LocalRound) -> IntArray:
    """Train each site's row of `stacked.flat` in place, from the parameters received; the steps that each site took, `(S,)`.

    Args:
        sites: at most as many as `stacked` has, those with most steps first.
    """
    private = local.study.private
    flat, gradients = nn.Parameter(stacked.flat[: len(sites)], requires_grad=False), stacked.gradients[: len(sites)]
    _start_from(stacked, received)
    steps = np.array([steps_of(local.study, site.part.num_records, site.plan.declared_size) for site in sites])
    batches = _draw(sites, local, steps)
    optimizer = LocalOptimizer(local.study, [flat], local.round_number)
    proximal = ProximalTerm.of_study(local.study, [flat])
    noise = _BlockNoise(sites, gradients, local) if private else None
    masks = _masks(stacked, sites, records, local)
    done = len(sites)  # sites from here on have taken all their steps
    finished = flat[done:].clone()
    flat.grad = gradients
    for step in range(int(steps.max(initial=0))):
        active = int((steps > step).sum())
        if active < done:
            finished, done = torch.cat([flat[active:done].clone(), finished]), active
            gradients[done:] = 0.0
        local.still_wanted()
        stacked.use(active)
        rows, mask = batches.padded(step, active, flat.device)
        if masks is not None:
            masks.draw(batches.counts[step, :active].tolist(), mask.shape[1])
        _sum_gradients(stacked, records, rows, mask, local)
        if noise is not None:
            noise.release(gradients[:active])
        proximal.add_to_gradients()
        optimizer.step()
        flat[done:] = finished
    return steps


def block_points(
    stacked: StackedModel, received: Parameters, sites: list[SiteWork], records: Records, local: LocalRound, shared: SharedNoise
) -> NDArray[np.float64]:  # fmt: skip
    """`client.distributed_sum.noised_points` of every site, `(S, d)`: whole grid points, in the order of `stacked.flat`. One step each.

    The noise is each site's own to the bit; the sum below it is in the model's own type.

    Args:
        sites: as of `train_block`.
    """
    _start_from(stacked, received)
    batches = _draw(sites, local, np.ones(len(sites), dtype=np.int64))
    masks = _masks(stacked, sites, records, local)
    local.still_wanted()
    stacked.use(len(sites))
    rows, mask = batches.padded(0, len(sites), stacked.flat.device)
    if masks is not None:
        masks.draw(batches.counts[0].tolist(), mask.shape[1])
    _sum_gradients(stacked, records, rows, mask, local)
    noise, totals = shared.noise, stacked.gradients[: len(sites)].cpu().to(torch.float64)
    points = totals.div_(noise.grid.spacing).round_().clamp_(-noise.most_signal, noise.most_signal)
    for row, site in zip(points, sites, strict=True):
        row += SimulatedNoise(subkey(site.key, b"noise")).normal(row.shape, shared.share_std).round_()
    return points.numpy()


def _start_from(stacked: StackedModel, received: Parameters) -> None:
    for name, (span, _) in stacked.spans.items():
        stacked.flat[:, span] = torch.from_numpy(np.array(received[name], order="C")).reshape(1, -1)


def _masks(stacked: StackedModel, sites: list[SiteWork], records: Records, local: LocalRound) -> Masks | None:
    """What draws the masks of dropout; None where nothing is dropped."""
    if not stacked.dropouts:
        return None
    stacked.use(1)
    calls = stacked.dropped(*(values[:1] for values in records.inputs))
    stacked.use(len(sites))
    most = local.study.privacy.physical_batch_size
    sizes = [physical_size(site.plan.expected_batch_size, most) if local.study.private else None for site in sites]
    return Masks(calls, [site.key for site in sites], physical=sizes, like=stacked.flat)


def _sum_gradients(stacked: StackedModel, records: Records, rows: torch.Tensor, mask: torch.Tensor, local: LocalRound) -> None:
    """The sum of every site's gradients: each clipped to C with privacy, else their mean."""
    outputs = stacked(*(values.index_select(0, rows) for values in records.inputs))
    losses = local.task.loss(outputs, records.labels.index_select(0, rows))
    stacked.backward(losses)
    if not local.study.private:
        own = mask.to(losses.dtype)
        stacked.write_weighted_sums(own / own.sum(dim=1, keepdim=True).clamp(min=1))
        return
    norms = stacked.squared_norms().sqrt_()
    usable = norms.isfinite()
    if not usable.all():
        stacked.drop((~usable).nonzero().squeeze(1))
    factors = (local.study.privacy.max_grad_norm / norms).clamp_(max=1.0).nan_to_num_(nan=0.0)
    stacked.write_weighted_sums(factors.view(mask.shape) * mask)


class _BlockNoise:
    """Every site's own noise, on the grid of all; its bits are drawn on the host, whatever device the sums are on."""

    def __init__(self, sites: list[SiteWork], gradients: torch.Tensor, local: LocalRound) -> None:
        size, device = gradients.shape[1], gradients.device
        self._streams = [SimulatedNoise(subkey(site.key, b"noise")) for site in sites]
        self._grid = NoiseGrid.of(local.study.privacy.max_grad_norm, size)
        self._bits = np.empty((len(sites), 2 * ((size + 1) // 2)), dtype=np.int32)
        self._bytes = [row.data.cast("B") for row in self._bits]
        self._normals = torch.empty(len(sites), 2 * ((size + 1) // 2), device=device)
        self._size = size
        multipliers = torch.tensor([[site.plan.noise_multiplier or 0.0] for site in sites], dtype=torch.float64)
        self._stds = (multipliers * (self._grid.sensitivity / self._grid.spacing)).to(device)
        self._scales = (self._grid.spacing / torch.tensor([[site.plan.expected_batch_size] for site in sites], dtype=torch.float64)).to(device)

    def release(self, totals: torch.Tensor) -> None:
        """In place: `totals`, `(S, d)`, rounded to the grid, plus noise rounded to it, over each site's expected batch size."""
        active = len(totals)
        for row, stream in zip(self._bytes[:active], self._streams, strict=False):
            stream.fill_bytes(row)
        normals = standard_normals(torch.from_numpy(self._bits[:active]).to(totals.device), self._normals[:active])[:, : self._size]
        noise = normals.to(totals.dtype).mul_(self._stds[:active].to(totals.dtype)).round_()
        totals.div_(self._grid.spacing).round_().add_(noise).mul_(self._scales[:active].to(totals.dtype))


def _draw(sites: list[SiteWork], local: LocalRound, steps: IntArray) -> _Batches:
    """Every site's batches, as it draws them alone."""
    several = local.study.privacy.unit == "patient" and any(site.index.several_records for site in sites)
    step, site, records = _draw_one_by_one(sites, local) if several or not local.study.private else _draw_at_once(sites, steps)
    num_steps = int(steps.max(initial=0))
    counts = np.bincount(step * len(sites) + site, minlength=num_steps * len(sites)).reshape(num_steps, len(sites))
    return _Batches(counts=counts, records=np.split(records, np.cumsum(counts.sum(axis=1))[:-1]))


def _draw_at_once(sites: list[SiteWork], steps: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Poisson batches of sites whose units have one record each: step, site, and record among those of all sites, in this order."""
    by_patient = [site.index.first_records if site.plan.unit == "patient" else np.arange(site.part.num_records) for site in sites]
    num_units = np.array([len(first) for first in by_patient])
    streams = [KeyedStream(subkey(site.key, b"sampling")) for site in sites]
    step, site, unit = poisson_batches(num_units, [site.plan.sample_rate for site in sites], steps, streams)
    records = np.concatenate(by_patient)[(np.cumsum(num_units) - num_units)[site] + unit]
    if (there := records >= 0).all():
        return step, site, records + np.array([work.start for work in sites])[site]
    return step[there], site[there], (records + np.array([work.start for work in sites])[site])[there]


def _draw_one_by_one(sites: list[SiteWork], local: LocalRound) -> tuple[IntArray, IntArray, IntArray]:
    drawn = [_records_by_step(site, local) for site in sites]
    step = np.concatenate([steps for steps, _ in drawn])
    records = np.concatenate([records + site.start for site, (_, records) in zip(sites, drawn, strict=True)])
    site = np.repeat(np.arange(len(sites)), [len(steps) for steps, _ in drawn])
    order = np.argsort(step, kind="stable")
    return step[order], site[order], records[order]


def _records_by_step(site: SiteWork, local: LocalRound) -> tuple[IntArray, IntArray]:
    """Which records of the site are in which step, in the order of the steps, `(n,)` each."""
    if not local.study.private:
        return _joined(round_batches(site.part.num_records, local.study, generator_of(site.key)))
    stream = KeyedStream(subkey(site.key, b"sampling"))
    batches = []
    for _ in range(site.plan.steps_per_round):
        units = sample_units(site.part, site.index, site.plan, local.study.privacy.records_per_patient, stream)
        assert isinstance(units, np.ndarray)  # several records of a patient, clipped as one, are not for blocks
        batches.append(units)
    return _joined(batches)


def _joined(batches: list[IntArray]) -> tuple[IntArray, IntArray]:
    steps = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    return steps, np.concatenate([*batches, np.empty(0, dtype=np.int64)])


def steps_of(study: Study, num_records: int, declared_size: int) -> int:
    """How many steps a site takes in a round, whatever it draws; those of a block should end together."""
    if study.private:
        return shape_site(study, declared_size).steps_per_round
    training = study.training
    return training.local_steps if training.local_steps and num_records else training.local_epochs * math.ceil(num_records / training.batch_size)


def flat_updates(stacked: StackedModel, received: Parameters, num_sites: int) -> NDArray[np.floating]:
    """Trained minus received, `(S, D)`: the arrays of the model's state, one after another; what is not trained has not moved."""
    columns, trained = [], stacked.flat[:num_sites].cpu().numpy()
    for name, value in received.items():
        if name in stacked.spans:
            span, _ = stacked.spans[name]
            columns.append(trained[:, span] - value.reshape(-1))
        else:
            columns.append(np.zeros((num_sites, value.size), dtype=value.dtype))
    return np.concatenate(columns, axis=1)


def named(row: NDArray[np.floating], template: Parameters) -> Parameters:
    """A flat row as named arrays, which are views of it."""
    named, start = {}, 0
    for name, value in template.items():
        named[name] = row[start : start + value.size].reshape(value.shape)
        start += value.size
    return named


def flat(parameters: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
    """All arrays, one after another."""
    return np.concatenate([value.reshape(-1) for value in parameters.values()])
