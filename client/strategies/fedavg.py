"""FedAvg: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, algorithm 1, a client's part; and that of every strategy whose own part is at
the coordinator alone. FedProx' pull is among the study's own terms of training."""

from client.local_update import Learner, difference
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters


class FedAvg:
    """Train what was received, and send the difference."""

    keeps = False

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The received model."""
        return received

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        return Made(update=difference(learner.train(received), received), kept={})
