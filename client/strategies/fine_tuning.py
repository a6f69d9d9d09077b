"""Fine-tuning: Wang, Mathews, Kiddon, Eichner, Beaufays, Ramage 2019, "Federated Evaluation of On-device Personalization": FedAvg, and after the last
round every site trains the final model further on its own patients, for itself, and is judged by what comes of it.

Privacy. Its steps are steps of DP-SGD like those of a round, and are part of the study's plan: the metrics of the tuned model leave.
"""

from client.local_update import Learner
from client.strategies.fedavg import FedAvg
from shared.models import Parameters


class FineTuning(FedAvg):
    """As FedAvg in every round."""

    def tuned(self, learner: Learner, final: Parameters) -> Parameters:
        """The site's own model, of the final one."""
        return learner.train(final, purpose="tuning", steps=learner.plan.closing_steps)
