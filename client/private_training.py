"""One round of differentially private training at a site. Sampling, clipping, noise and steps meet here, and the guarantee stands here.

Theorem (Abadi et al. 2016, with Poisson sampling as in Mironov et al. 2019; composed numerically, see `shared.privacy`). Let D and D' be
training parts of a site's cohort that differ in one patient, with all of that patient's records (unit "patient"), or in one record (unit
"record"). The update of a round is a function of `steps` releases; each is

    round(S) + round(Z),    S = sum over sampled units of clip(gradient, C),    Z ~ N(0, (noise_multiplier L)^2 I)

where every unit is sampled independently with probability q, C is `max_grad_norm`, and a unit's gradient is that of one of the patient's
records, drawn uniformly (`records_per_patient` "one"), the mean over all of the patient's records ("all"), or the record's (unit "record").
`round` goes to the nearest multiple of g = `NoiseGrid.spacing`, and L = C (1 + 2**-12) + g sqrt(d) for d trainable parameters.

Proof. round(S) is a multiple of g, so round(S) + round(Z) = round(round(S) + Z): rounding is post-processing of the Gaussian mechanism on
round(S). One unit moves S by at most C, arithmetic aside (below), and the two roundings move each entry by at most g/2 each, so round(S) by
at most L in L2. Poisson subsampling amplifies any Gaussian mechanism of sensitivity L alike (Zhu, Dong and Wang 2022: its dominating pair
depends on noise / sensitivity and q alone), so a release is dominated by the pair of (noise_multiplier, q), and the round is
`PrivacyEvent(noise_multiplier, q, steps)`. All of the sum and the addition are whole numbers of g below 2**53, so the addition is exact and
the low bits of a float say no more than its value. Division by the public expected batch size, rounding to the parameter's type, momentum,
weight decay, the strategy's terms (of what was received, and of earlier releases) and the optimizer's step see only releases: post-processing.

Arithmetic. A gradient is the float32 numbers that the backward pass gives; norms, clip factors and sums are float64. A clipped norm is at
most C (1 + 1e-9), and a sum of B of them is off by at most B^2 2**-52 C, together below C 2**-13 for B up to 700,000.

Assumes: q, steps, C and the denominator come from declared, public numbers (`SitePlan`). No layer mixes records
(`private_probe.probe_model`): in exact arithmetic a record's gradient depends on that record and the parameters alone. In float32 the shape
of a batch may change its last bits, and parameters chosen for it can make much of a last bit; so every physical batch has one public
shape, a multiple of 16 records, filled up where there are fewer, and kernels are taken to give a row of it the same bits wherever it
stands and whatever the others hold (tested for those of this machine; C 2**-13 of room is left). Masks of dropout come from a generator whose
whole state is drawn from the round's key, so they are independent of who is in a batch. Noise and
sampling come from a key that is never used again, ChaCha20 is taken for random, and Box-Muller in float64 (error about 2**-50 of a draw's
radius) for exact, on a grid that is many orders coarser. Released: the parameters after the last step. Not covered: statistics of
evaluation, refusals, timing.

Edge cases: an empty batch adds noise to a zero sum and counts as a step; a unit without finite gradient counts as zero, whoever it is; a
zero gradient stays zero; more records than fit in memory are summed in physical batches with noise once at the end, and a patient with
more records than that, in pieces, is clipped once all the same; a buffer or frozen parameter that changes, or a forward pass that writes to
a parameter, ends the round with a refusal.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from client.local_training import LocalRound, record_losses
from client.noise import GaussianNoise, KeyedStream, Noise, NoiseGrid, SimulatedNoise, subkey
from client.optimizers import LocalOptimizer, ProximalTerm
from client.record_gradients import RecordGradients, record_gradients
from client.sampling import PatientIndex, physical_size, sample_units, whole_patients
from shared.cohort import Cohort, IntArray
from shared.errors import ModelRefusedError
from shared.plan import SitePlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomness:
    """Where a round's randomness comes from: which units are sampled, and the noise on their sum."""

    sampling: KeyedStream
    noise: Noise

    @classmethod
    def from_key(cls, key: bytes) -> "Randomness":
        """All of a round's randomness from one 32-byte key that is used for this round alone."""
        return cls(sampling=KeyedStream(subkey(key, b"sampling")), noise=GaussianNoise(subkey(key, b"noise")))

    @classmethod
    def simulated(cls, key: bytes) -> "Randomness":
        """The same for a simulation, with its faster noise; `key` comes from a seed."""
        return cls(sampling=KeyedStream(subkey(key, b"sampling")), noise=SimulatedNoise(subkey(key, b"noise")))


class NoisedSum:
    """The sum of clipped gradients of a batch, in float64, and its release: with noise from a keyed stream, on a grid.

    Attributes:
        values: `(d,)` float64, the sum before rounding and noise.

    Args:
        parameters: the trainable ones, d entries in all; `release` sets their `grad`.
        gradients: of the records of the last backward pass.
    """

    def __init__(self, parameters: list[nn.Parameter], gradients: RecordGradients, *, plan: SitePlan, noise: Noise) -> None:
        assert plan.noise_multiplier is not None and plan.max_grad_norm is not None
        self.num_without_gradient = 0
        self.expected_batch_size = plan.expected_batch_size
        self._max_grad_norm = plan.max_grad_norm
        self._noise_multiplier = plan.noise_multiplier
        self._gradients = gradients
        self._noise = noise
        self._parameters = parameters
        size = sum(parameter.numel() for parameter in parameters)
        self._grid = NoiseGrid.of(plan.max_grad_norm, size)
        self.values = torch.zeros(size, dtype=torch.float64)
        self._unit = torch.empty(0, dtype=torch.float64)  # gradient of the unit under way; only where a unit has several records
        self._parts = self._views(self.values)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, [parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def clear(self) -> None:
        """The sum becomes zero."""
        self.values.zero_()

    def clip_and_accumulate(self, num_records: int) -> None:
        """Add the gradient of each of the first `num_records` records of the last backward pass, clipped alone; every record is a unit."""
        norms = self._gradients.norms(self._parameters)[:num_records]
        factors = (self._max_grad_norm / norms).clamp_(max=1.0)
        usable = norms.isfinite()
        rows: torch.Tensor | slice = slice(0, num_records)
        if not usable.all():
            self.num_without_gradient += int((~usable).sum())
            rows, factors = usable.nonzero().squeeze(1), factors[usable]
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            self._gradients.add_weighted_sum(parameter, factors, part, rows)

    def add_to_unit(self, rows: slice, share: float) -> None:
        """Add share x the gradient of each of these records of the last backward pass to the unit under way."""
        if not len(self._unit):
            self._unit = torch.zeros_like(self.values)
        weights = torch.full((rows.stop - rows.start,), share, dtype=torch.float64)
        for parameter, part in zip(self._parameters, self._views(self._unit), strict=True):
            self._gradients.add_weighted_sum(parameter, weights, part, rows)

    def close_unit(self) -> None:
        """Add the gradient of the unit under way, clipped as one, and begin another."""
        norm = float(torch.linalg.vector_norm(self._unit))
        if norm < float("inf"):
            self.values.add_(self._unit, alpha=min(1.0, self._max_grad_norm / norm) if norm else 1.0)
        else:
            self.num_without_gradient += 1
        self._unit.zero_()

    def release(self) -> None:
        """The sum of the whole batch plus noise, over the public expected batch size, becomes the gradient of each parameter."""
        release = self._grid.release(self.values, self._noise, self._noise_multiplier).div_(self.expected_batch_size)
        for parameter, part in zip(self._parameters, self._views(release), strict=True):
            parameter.grad = part.to(parameter.dtype)


def train_round_private(model: nn.Module, cohort: Cohort, local: LocalRound, *, plan: SitePlan, randomness: Randomness) -> int:
    """Train `model` in place under the theorem above; the number of steps taken comes back, always `local.steps` or `plan.shared_steps`.

    Raises:
        ModelRefusedError: a buffer changed; the parameters must not be sent.
        opacus or torch errors where a layer has no per-record gradient; `private_probe.probe_model` finds them before a study starts.
    """
    return sum(1 for _ in private_training_steps(model, cohort, local, plan=plan, randomness=randomness))


def private_training_steps(model: nn.Module, cohort: Cohort, local: LocalRound, *, plan: SitePlan, randomness: Randomness) -> Iterator[None]:
    """What `train_round_private` does, a step at a time; each is one release, and all must be taken before the parameters are sent."""
    still = untrained_state(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = LocalOptimizer(local.study, trainable, local.round_number)
    terms = (ProximalTerm.of_study(local.study, trainable), *local.terms)
    index = PatientIndex(cohort)
    model.train()
    with record_gradients(model) as gradients:
        total = NoisedSum(trainable, gradients, plan=plan, noise=randomness.noise)
        for _ in range(plan.shared_steps if local.steps is None else local.steps):
            local.still_wanted()
            total.clear()
            units = sample_units(cohort, index, plan, local.study.privacy.records_per_patient, randomness.sampling)
            sum_clipped_gradients(total, gradients, cohort, units, local)
            total.release()
            for term in terms:
                term.add_to_gradients()
            optimizer.step()
            yield
    optimizer.zero_grad()
    check_untrained(model, still)
    if total.num_without_gradient:
        logger.warning("%d gradients were not finite and were counted as zero", total.num_without_gradient)


def sum_clipped_gradients(total: NoisedSum, gradients: RecordGradients, cohort: Cohort, units: IntArray | list[IntArray], local: LocalRound) -> None:
    """Add the clipped gradient of every unit to the sum, in physical batches of one shape."""
    size = physical_size(total.expected_batch_size, local.study.privacy.physical_batch_size)
    if isinstance(units, list):
        for patients in whole_patients(units, size):
            _sum_patients(total, gradients, cohort, patients, local, size)
        return
    for start in range(0, len(units), size):
        records = units[start : start + size]
        _backward(gradients, cohort, records, local, size)
        total.clip_and_accumulate(len(records))


def _sum_patients(total: NoisedSum, gradients: RecordGradients, cohort: Cohort, patients: list[IntArray], local: LocalRound, size: int) -> None:
    """Several patients that fit into one physical batch, or one that may not and comes in pieces; each is clipped once, over all its records."""
    if len(patients) == 1:
        [records] = patients
        for start in range(0, len(records), size):
            piece = records[start : start + size]
            _backward(gradients, cohort, piece, local, size)
            total.add_to_unit(slice(0, len(piece)), 1 / len(records))
        total.close_unit()
        return
    _backward(gradients, cohort, np.concatenate(patients), local, size)
    stop = 0
    for records in patients:
        start, stop = stop, stop + len(records)
        total.add_to_unit(slice(start, stop), 1 / len(records))
        total.close_unit()


def _backward(gradients: RecordGradients, cohort: Cohort, records: IntArray, local: LocalRound, size: int) -> None:
    """The gradient of each of these records, in `gradients`, first; after them those of the first again, which fills the batch up to `size`.

    Raises:
        ModelRefusedError: the forward pass wrote to a parameter.
    """
    gradients.forget()
    parameters = dict(gradients.model.named_parameters())
    versions = {name: parameter._version for name, parameter in parameters.items()}
    filled = np.concatenate([records, np.full(size - len(records), records[0])])
    losses = record_losses(gradients.model, cohort, filled, local.task)
    for name, parameter in parameters.items():
        if parameter._version != versions[name]:
            raise ModelRefusedError(
                f"model: {name} is written to by a forward pass, without clipping or noise",
                "use a layer that writes nothing, such as nn.Embedding without max_norm",
            )
    gradients.backward(losses)


def untrained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that training must not change: buffers and frozen parameters, by name."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name: value.detach().clone() for name, value in state.items() if name not in trainable}


def check_untrained(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every buffer and frozen parameter of `model` is bit for bit as it was `before`.

    Raises:
        ModelRefusedError: the first that is not, by its layer.
    """
    after = untrained_state(model)
    for name in {**before, **after}:
        if name not in before or name not in after or not _same_bits(after[name], before[name]):
            layer, _, own = name.rpartition(".")
            raise ModelRefusedError(
                f"model: layer {layer or '(root)'!r} changes {own!r} in training, without clipping or noise",
                "use a layer without running buffers, which writes nothing of what it sees",
            )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
