"""One round of differentially private training at a site. Sampling, clipping, noise and steps meet here, and the guarantee stands here.

Theorem (Abadi et al. 2016, with Poisson sampling as in Mironov et al. 2019; composed numerically, see `shared.privacy`). Let D and D' be
training parts of a site's cohort that differ in one patient, with all of that patient's records (unit "patient"), or in one record (unit
"record"). The update of a round is a function of `steps` releases; each is

    sum over sampled units of clip(gradient, C)  +  N(0, (noise_multiplier C)^2 I)

where every unit is sampled independently with probability q, one record of each sampled patient is taken, and C is `max_grad_norm`. A unit
moves each sum by at most C in L2, so a release is a Poisson-subsampled Gaussian mechanism with parameters (noise_multiplier, q), and the
round is `PrivacyEvent(noise_multiplier, q, steps)`. Division by the public expected batch size, momentum, weight decay, the proximal term
and the optimizer's step see only releases: post-processing.

Assumes: q, steps, C and the denominator come from declared, public numbers (`SitePlan`); no layer mixes records (`private_probe.probe_model`);
noise is drawn from a key that is never used again. Released: the parameters after the last step. Not covered: statistics of evaluation,
refusals, timing, and the low bits of floating-point noise.

Edge cases: an empty batch adds noise to a zero sum and counts as a step; a non-finite gradient of a unit counts as zero; a zero gradient
stays zero; more units than fit in memory are summed in physical batches with noise once at the end.
"""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from client.local_training import LocalRound, record_losses
from client.noise import GaussianNoise
from client.optimizers import ProximalTerm, local_optimizer
from client.sampling import PatientIndex, poisson_sample
from shared.cohort import Cohort, IntArray
from shared.plan import SitePlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomness:
    """Where a round's randomness comes from: which units are sampled, and the noise on their sum."""

    sampling: np.random.Generator
    noise: GaussianNoise

    @classmethod
    def from_key(cls, key: bytes) -> "Randomness":
        """All of a round's randomness from one 32-byte key that is used for this round alone."""
        sampling = np.random.Generator(np.random.Philox(key=int.from_bytes(_subkey(key, b"sampling")[:16], "big")))
        return cls(sampling=sampling, noise=GaussianNoise(_subkey(key, b"noise")))


def _subkey(key: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(purpose, key=key, digest_size=32).digest()


class KeyedNoiseOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus' flat-clipping optimizer with our noise: drawn in float64 from a keyed stream, added before rounding to the gradient's type."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, plan: SitePlan, noise: GaussianNoise) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="mean",
        )
        self._noise = noise

    def add_noise(self) -> None:
        """The clipped sum of the whole batch plus noise becomes the gradient of each parameter."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noised = parameter.summed_grad.to(torch.float64) + self._noise.normal(parameter.summed_grad.shape, std)
            parameter.grad = noised.to(parameter.dtype).view_as(parameter) / self.expected_batch_size


def train_round_private(model: nn.Module, cohort: Cohort, local: LocalRound, *, plan: SitePlan, randomness: Randomness) -> int:
    """Train `model` in place under the theorem above; the number of steps taken comes back, always `plan.steps_per_round`.

    Raises:
        opacus or torch errors where a layer has no per-record gradient; `private_probe.probe_model` finds them before a study starts.
    """
    with wrapped_model(model) as wrapped:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = KeyedNoiseOptimizer(local_optimizer(local.study, trainable, local.round_number), plan=plan, noise=randomness.noise)
        proximal = ProximalTerm(local.study, trainable)
        index = PatientIndex(cohort)
        wrapped.train()
        for _ in range(plan.steps_per_round):
            records = sample_records(cohort, index, plan, randomness.sampling)
            sum_clipped_gradients(wrapped, optimizer, cohort, records, local)
            optimizer.add_noise()
            proximal.add_to_gradients()
            optimizer.original_optimizer.step()
    return plan.steps_per_round


@contextlib.contextmanager
def wrapped_model(model: nn.Module) -> Iterator[GradSampleModule]:
    """The model with Opacus' per-record gradients, for the block; the loss is a sum over records, so a gradient sample is a record's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # expected: a cohort's inputs need no gradient
        wrapped = GradSampleModule(model, loss_reduction="sum", strict=True)
        try:
            yield wrapped
        finally:
            wrapped.to_standard_module()


def sample_records(cohort: Cohort, index: PatientIndex, plan: SitePlan, rng: np.random.Generator) -> IntArray:
    """The records of a Poisson batch over the plan's unit."""
    if plan.unit == "record":
        return poisson_sample(cohort.num_records, plan.sample_rate, rng)
    return index.one_record_each(poisson_sample(index.num_patients, plan.sample_rate, rng), rng)


def sum_clipped_gradients(wrapped: GradSampleModule, optimizer: KeyedNoiseOptimizer, cohort: Cohort, records: IntArray, local: LocalRound) -> None:
    """`summed_grad` of every parameter becomes the sum of clipped gradients over `records`, in physical batches; zero for no record."""
    parameters = optimizer.params
    for parameter in parameters:
        parameter.summed_grad = torch.zeros_like(parameter)
    size = local.study.privacy.physical_batch_size
    for start in range(0, len(records), size):
        wrapped.zero_grad(set_to_none=True)
        record_losses(wrapped, cohort, records[start : start + size], local.task).sum().backward()  # type: ignore[no-untyped-call]  # torch
        zero_non_finite(parameters)
        optimizer.clip_and_accumulate()
        for parameter in parameters:
            parameter.grad_sample = None


def zero_non_finite(parameters: list[nn.Parameter]) -> None:
    """A record whose gradient is not finite anywhere, or whose norm overflows, counts as a zero gradient; that it happened is logged locally."""
    samples: list[torch.Tensor] = [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]  # Opacus sets it
    squares = torch.stack([sample.to(torch.float64).reshape(len(sample), -1).square().sum(dim=1) for sample in samples]).sum(dim=0)
    bad = ~(squares < float(torch.finfo(torch.float32).max))
    if bad.any():
        logger.warning("a gradient was not finite and was counted as zero")
        for sample in samples:
            sample[bad] = 0.0
