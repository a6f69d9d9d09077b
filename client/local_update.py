"""One round of a site, whichever promise it makes: from the parameters that it received to the update that it releases."""

import numpy as np
from torch import nn

from client.local_training import LocalRound, torch_keyed, train_round
from client.noise import subkey
from client.private_training import Randomness, train_round_private
from client.refinement import refined
from client.releases import Arrays
from shared.cohort import Cohort
from shared.models import Parameters, get_parameters, set_parameters
from shared.plan import SitePlan
from shared.seeding import generator_of


def local_update(
    model: nn.Module, train_part: Cohort, parameters: Parameters, local: LocalRound, *, plan: SitePlan, key: bytes, simulated: bool
) -> tuple[Arrays, int]:
    """Trained minus received, and the steps that it took.

    Args:
        model: to work with; the parameters are loaded into it.
        key: of all the round's randomness.
        simulated: the key follows from a simulation's seed, and noise protects nobody.
    """
    set_parameters(model, parameters)
    with torch_keyed(subkey(key, b"torch")):
        if plan.private:
            randomness = Randomness.simulated(key) if simulated else Randomness.from_key(key)
            steps = train_round_private(model, train_part, local, plan=plan, randomness=randomness)
        else:
            steps = train_round(model, train_part, local, rng=generator_of(key))
    trained = refined(local.task, get_parameters(model), key=subkey(key, b"refine"))
    return {name: np.asarray(trained[name] - parameters[name]) for name in parameters}, steps
