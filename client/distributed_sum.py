"""One step of DP-SGD whose noise is shared: a site's sum of clipped gradients, in whole grid points, plus its share of the noise.

The theorem is that of `shared.distributed_noise`. Sampling, clipping and the sum are those of `client.private_training`.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from client.local_training import torch_keyed
from client.local_update import Learner
from client.noise import subkey
from client.private_training import NoisedSum, Randomness, check_untrained, sum_clipped_gradients, untrained_state
from client.record_gradients import record_gradients
from client.sampling import PatientIndex, sample_units
from shared.distributed_noise import DistributedNoise
from shared.models import Parameters, set_parameters


def noised_points(learner: Learner, received: Parameters, noise: DistributedNoise, *, share_std: float) -> NDArray[np.int64]:
    """`(d,)` whole grid points, of the trainable parameters one after another. One step, which is charged.

    Raises:
        ModelRefusedError: a buffer changed.
    """
    model, cohort, plan = learner.model, learner.train_part, learner.plan
    set_parameters(model, received)
    randomness = Randomness.simulated(learner.key) if learner.simulated else Randomness.from_key(learner.key)
    still = untrained_state(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    learner.local.still_wanted()
    with torch_keyed(subkey(learner.key, b"torch")), record_gradients(model) as gradients:
        total = NoisedSum(trainable, gradients, plan=plan, noise=randomness.noise)
        units = sample_units(cohort, PatientIndex(cohort), plan, learner.local.study.privacy.records_per_patient, randomness.sampling)
        sum_clipped_gradients(total, gradients, cohort, units, learner.local)
        points = (total.values / noise.grid.spacing).round_().clamp_(-noise.most_signal, noise.most_signal)
        points += randomness.noise.normal(points.shape, share_std).round_()
    check_untrained(model, still)
    learner.steps += 1
    for parameter in trainable:
        parameter.grad = None
    return np.asarray(points.to(torch.int64).numpy())
