"""FedDyn: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama 2021, "Federated Learning Based on Dynamic Regularization", algorithm 1, a
device's part. A site's local gradient, grad L_k(theta_k), is kept as the paper's sum of earlier updates, so it is made of releases alone."""

import numpy as np

from client.local_update import Learner, difference
from client.optimizers import Correction, ProximalTerm
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters
from shared.strategy_options import FedDyn as Options


class FedDyn:
    """Minimises L_k(theta) - <g_k, theta> + alpha/2 |theta - theta_received|^2, and then moves g_k by -alpha (theta_k - theta_received)."""

    keeps = True

    def __init__(self, options: Options) -> None:
        self._alpha = options.alpha

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The received model."""
        return received

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        names = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
        own = kept.get("gradient", {})
        gradient = {name: own.get(name, np.zeros_like(received[name])) for name in names}
        pull = ProximalTerm.to(received, learner.model, self._alpha)
        linear = Correction(learner.model, {name: -value for name, value in gradient.items()})
        update = difference(learner.train(received, terms=(pull, linear)), received)
        return Made(update=update, kept={"gradient": {name: np.asarray(gradient[name] - self._alpha * update[name]) for name in names}})
