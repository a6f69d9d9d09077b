"""Ditto: Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", algorithm 1: beside its part in the shared
model, trained as in FedAvg, a site trains a model of its own, v_k, pulled towards the shared one that it received.

Privacy. The site's own model takes as many steps of DP-SGD as the shared one, and both are charged, so a study's budget is for twice the steps.
"""

from client.local_update import Learner, difference
from client.optimizers import ProximalTerm
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters
from shared.strategy_options import Ditto as Options


class Ditto:
    """v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w)). A site is judged by v_k; before its first round, by the received model."""

    keeps = True

    def __init__(self, options: Options) -> None:
        self._lambda = options.proximal_lambda

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The site's own model."""
        return kept.get("personal") or received

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        update = difference(learner.train(received), received)
        pull = ProximalTerm.to(received, learner.model, self._lambda)
        return Made(update=update, kept={"personal": learner.train(self.judged(kept, received), purpose="personal", terms=(pull,))})
