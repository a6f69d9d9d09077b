"""FedPer: Arivazhagan, Aggarwal, Singh, Choudhary 2019, "Federated Learning with Personalization Layers": base layers are shared, personalization
layers stay at the site, and both are trained together. FedBN (Li, Jiang, Zhang, Kamp, Dou 2021, "FedBN: Federated Learning on Non-IID Features via
Local Batch Normalization") is the same with the normalisation layers as those that stay.

Privacy. A record's gradient over shared and personal parameters is clipped as one, and both get noise: one release a step, of which the site keeps a
part.
"""

import functools

from client.local_update import Learner, difference
from client.strategies.local_rule import Kept, Made
from shared.models import Parameters, initial_parameters
from shared.personal import personal_names
from shared.study import Study
from shared.task import Task


class FedPer:
    """Some parameters are the site's own. The first are those that follow from the study's seed, the same at every site."""

    keeps = True

    def __init__(self, study: Study, task: Task) -> None:
        self._study = study
        self._task = task

    def judged(self, kept: Kept, received: Parameters) -> Parameters:
        """The received parameters, with the site's own among them, in the model's order."""
        own = kept.get("personal") or self._first
        return {name: received.get(name, own.get(name, value)) for name, value in self._initial.items()}

    def train(self, learner: Learner, kept: Kept, received: Parameters, control: Parameters) -> Made:
        """See `LocalRule.train`."""
        return self.made(learner.train(self.judged(kept, received)), received)

    def made(self, trained: Parameters, received: Parameters) -> Made:
        """The trained model, parted into what is sent and what is kept."""
        return Made(update=difference(trained, received), kept={"personal": {name: trained[name] for name in self.personal}})

    @functools.cached_property
    def personal(self) -> frozenset[str]:
        """Names of the parameters that stay."""
        return personal_names(self._study.strategy, self._task.model())

    @functools.cached_property
    def _initial(self) -> Parameters:
        return initial_parameters(self._task.model(), self._study.seed)

    @property
    def _first(self) -> Parameters:
        return {name: self._initial[name] for name in self.personal}
