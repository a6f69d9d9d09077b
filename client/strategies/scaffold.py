"""SCAFFOLD: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1
with option II for the control variate.

Privacy. A site's new control variate, c_i - c + (x - y_i) / (K eta), is made of its old one, of the coordinator's c, of the number of steps K, the
learning rate eta, and of the update y_i - x that it releases anyway. So it is no second release: the coordinator computes its share of
the mean from the update, nothing but the update is sent, and there is nothing more to clip or to charge. (Option I, a gradient at x on
all patients, would be a second release.) The correction c - c_i is added to gradients after clipping and noise.
"""

import numpy as np

from client.local_update import Learner, difference
from client.optimizers import Correction
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters
from shared.schedule import learning_rate_at


class Scaffold:
    """Gradients are corrected by the difference of the control variates, the coordinator's minus the site's."""

    keeps = True

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The received model."""
        return received

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`; `control` is c, by trainable parameter, and zero where it is empty."""
        study, own = learner.local.study, kept.get("control", {})
        names = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
        common = {name: control.get(name, np.zeros_like(received[name])) for name in names}
        before = {name: own.get(name, np.zeros_like(received[name])) for name in names}
        correction = Correction(learner.model, {name: common[name] - before[name] for name in names})
        update = difference(learner.train(received, terms=(correction,)), received)
        assert study.training.local_steps is not None
        moved = study.training.local_steps * learning_rate_at(study.training, learner.local.round_number, study.rounds.count)
        after = {name: np.asarray(before[name] - common[name] - update[name] / moved, dtype=received[name].dtype) for name in names}
        return Made(update=update, kept={"control": after})
