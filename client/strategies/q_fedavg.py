"""q-FedAvg: Li, Sanjabi, Beirami, Smith 2020, "Fair Resource Allocation in Federated Learning", algorithm 2, a device's part: with its update a site
sends the loss of the received model on its training patients, by which the coordinator weighs it.

Privacy. The loss is one more step of the plan: units are sampled as for a step of DP-SGD, the loss of each is clipped to [0, max_loss], so that one
unit moves their sum by at most max_loss, and the sum, on a grid, gets Gaussian noise of the plan's noise multiplier times that. It is the release
of `client.private_training` with one entry for d and max_loss for C, and is charged as a step of a round.
"""

import math

import numpy as np
import torch

from client.local_training import record_losses
from client.local_update import Learner, difference
from client.noise import GaussianNoise, KeyedStream, NoiseGrid, SimulatedNoise, subkey
from client.sampling import PatientIndex, physical_size, sample_units
from client.strategies.local_rule import Kept, Made
from shared.cohort import IntArray
from shared.models import Parameters, set_parameters
from shared.strategy_options import QFedAvg as Options

ALL_AT_ONCE = 1024  # records, without privacy


class QFedAvg:
    """As FedAvg, and the loss."""

    keeps = False

    def __init__(self, options: Options) -> None:
        self._max_loss = options.max_loss

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The received model."""
        return received

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        update = difference(learner.train(received), received)
        set_parameters(learner.model, received)
        learner.model.eval()
        return Made(update=update, kept={}, loss=self._private_loss(learner) if learner.plan.private else self._loss(learner))

    def _loss(self, learner: Learner) -> float:
        """The mean over all records."""
        cohort = learner.train_part
        return float(self._losses(learner, np.arange(cohort.num_records), ALL_AT_ONCE).sum()) / max(cohort.num_records, 1)

    def _private_loss(self, learner: Learner) -> float:
        """The noised sum over a Poisson batch, over its expected size; never below zero."""
        plan, privacy, cohort = learner.plan, learner.local.study.privacy, learner.train_part
        assert plan.noise_multiplier is not None
        key = subkey(learner.key, b"loss")
        units = sample_units(cohort, PatientIndex(cohort), plan, privacy.records_per_patient, KeyedStream(subkey(key, b"sampling")))
        size = physical_size(plan.expected_batch_size, privacy.physical_batch_size)
        of_units = (
            [self._losses(learner, records, size).mean() for records in units] if isinstance(units, list) else self._losses(learner, units, size)
        )
        total = math.fsum(map(float, of_units))  # of a patient with all its records, their mean
        noise = (SimulatedNoise if learner.simulated else GaussianNoise)(subkey(key, b"noise"))
        learner.steps += 1
        released = NoiseGrid.of(self._max_loss, 1).release(torch.tensor([total], dtype=torch.float64), noise, plan.noise_multiplier)
        return max(0.0, float(released) / plan.expected_batch_size)

    def _losses(self, learner: Learner, records: IntArray, size: int) -> torch.Tensor:
        """Of each record, `(len(records),)` float64, in [0, max_loss]; computed in batches of one shape, and what is not finite counts as none."""
        parts = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(records), size):
            part = records[start : start + size]
            filled = np.concatenate([part, np.full(size - len(part), part[0])])
            learner.local.still_wanted()
            with torch.no_grad():
                losses = record_losses(learner.model, learner.train_part, filled, learner.local.task)[: len(part)].to(torch.float64)
            parts.append(losses.nan_to_num(nan=0.0).clamp(0.0, self._max_loss))
        return torch.cat(parts)
