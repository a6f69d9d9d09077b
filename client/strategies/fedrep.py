"""FedRep: Collins, Hassani, Mokhtari, Shakkottai 2021, "Exploiting Shared Representations for Personalized Federated Learning", algorithm 1: in a
round a site first trains its head on the representation as received, and then the representation under the new head.

Privacy. Both are steps of DP-SGD over the parameters that they train, and together as many as a round of FedAvg has.
"""

from client.local_update import Learner
from client.strategies.fedper import FedPer
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters
from shared.strategy_options import FedRep as Options
from shared.study import Study
from shared.task import Task


class FedRep(FedPer):
    """As FedPer, one part after the other."""

    def __init__(self, options: Options, study: Study, task: Task) -> None:
        super().__init__(study, task)
        self._share = options.head_share

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        steps = learner.plan.shared_steps
        for_head = min(max(1, round(self._share * steps)), steps - 1)
        head = learner.train(self.judged(kept, received), purpose="head", only=self.personal, steps=for_head)
        return self.made(learner.train(head, only=frozenset(received), steps=steps - for_head), received)
