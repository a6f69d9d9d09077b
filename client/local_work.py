"""What a site makes in answer to a coordinator, and what of it may leave: under the charge, the policy and the strategy of a study it agreed to."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from client.admission import NOTHING, Admission, SiteSettings
from client.charging import Ask, Charging
from client.distributed_sum import noised_points
from client.evaluation import evaluate_parameters, predictions_of, rounded
from client.evaluation_noise import bounded_statistics, noise_statistics
from client.exact_answers import ExactAnswers
from client.kept_state import KeptState
from client.ledger import Ledger
from client.local_training import LocalRound
from client.local_update import Learner
from client.releases import Arrays, Releases
from client.strategies.fine_tuning import FineTuning
from shared.cohort import Cohort
from shared.distributed_noise import POINTS
from shared.messages import CONTROL, EvaluateTask, Statistics, TrainTask, WitnessedHead
from shared.models import Parameters, set_parameters
from shared.plan import SitePlan
from shared.task import Task

LOSS = "loss of the received model"  # beside the parameters of a release; no parameter has such a name


class LocalWork:
    """What a site makes of what it receives: updates, models of its own, statistics; each charged before it is made, where a promise is kept.

    Args:
        ledger_for: opens the cohort's ledger for a plan.
        still_wanted: called before every training step; raises where the work is stale.
    """

    def __init__(
        self, settings: SiteSettings, task: Task, model: nn.Module, *, ledger_for: Callable[[SitePlan], Ledger], still_wanted: Callable[[], None]
    ) -> None:  # fmt: skip
        self._settings = settings
        self._task = task
        self._model = model
        self._ledger_for = ledger_for
        self._still_wanted = still_wanted

    def judged(self, task: TrainTask | EvaluateTask, admission: Admission, received: Parameters) -> Parameters:
        """The model by which this site is judged."""
        return admission.rule.judged(self.kept_state(admission).before(task.fold, number_of(task)), received)

    def _rules(self, *, exact: bool) -> dict[str, str | None]:
        """For each statistic the rule that keeps it here, or None; rules look at the declared number of test patients, never the exact one."""
        names = {metric.statistic.name for metric in self._task.metrics}
        policy, num_test = self._settings.policy, self._settings.declared_num_test
        return {name: None if policy is None else policy.withholds(self._task, name, num_test=num_test, exact=exact) for name in sorted(names)}

    def count_exact(self, task: TrainTask | EvaluateTask, admission: Admission, received: Parameters, judged: Parameters) -> None:
        """A real site answers exactly about as many models as the approved study has rounds and closing evaluations, and no more; a model that was
        received is another where this site is judged by another."""
        private = admission.plan.private
        exact_statistics = admission.evaluation is None and not all(self._rules(exact=private).values())
        if self._settings.virtual or (private and not exact_statistics):
            return
        study = admission.study
        most = (study.rounds.count + 1) * study.evaluation.folds + study.privacy.spare_rounds
        request = self.ask(task, admission).request({**received, **{f"judged {name}": value for name, value in judged.items()}})
        ExactAnswers(self._settings.releases_path).count(task.run, request, most=most)

    def statistics(self, test_part: Cohort, parameters: Parameters, *, exact: bool) -> tuple[Statistics | None, str | None]:
        """What may leave, and the rule that keeps the rest."""
        rules = self._rules(exact=exact)
        withheld = next((rule for rule in rules.values() if rule is not None), None)
        if all(rules.values()):
            return None, withheld
        statistics = evaluate_parameters(self._task, test_part, parameters, model=self._model)
        step = self._settings.policy.round_counts_to if self._settings.policy is not None else 1
        declared = {metric.statistic.name: metric.statistic for metric in self._task.metrics}
        released = {name: rounded(value, declared[name], step) for name, value in statistics.items() if rules[name] is None}
        return released, withheld

    def noised_statistics(
        self, task: EvaluateTask, admission: Admission, test_part: Cohort, parameters: Parameters
    ) -> tuple[Statistics | None, str | None]:
        assert admission.evaluation is not None
        noise_multiplier = admission.evaluation.noise_multiplier
        rules = self._rules(exact=False)
        withheld = next((rule for rule in rules.values() if rule is not None), None)
        if all(rules.values()):
            return None, withheld

        def make(key: bytes) -> tuple[Arrays, int]:
            set_parameters(self._model, parameters)
            declared = {metric.statistic.name: metric.statistic for metric in self._task.metrics if rules[metric.statistic.name] is None}
            sums = bounded_statistics(declared, test_part, functools.partial(predictions_of, self._task, self._model))
            return dict(noise_statistics(sums, declared, noise_multiplier=noise_multiplier, key=key)), 1

        noised = self.charging(admission).release(self.ask(task, admission), parameters, make)
        return {name: np.asarray(value, dtype=np.float64) for name, value in noised.items()}, withheld

    def update(
        self, task: TrainTask, admission: Admission, train_part: Cohort, parameters: Parameters, control: Parameters, share_std: float | None
    ) -> tuple[Parameters, float | None]:  # fmt: skip
        """The update, and the loss where the strategy sends it."""
        if share_std is not None:
            return self._shared_noise_update(task, admission, train_part, parameters, share_std), None
        state = self.kept_state(admission)

        def make(key: bytes) -> tuple[Arrays, int]:
            learner = self._learner(task, admission, train_part, key)
            made = admission.rule.train(learner, state.before(task.fold, task.round), parameters, control)
            if admission.rule.keeps:
                state.keep(task.fold, task.round, made.kept)
            return {**made.update, **({} if made.loss is None else {LOSS: np.array([made.loss])})}, learner.steps

        released = self._released(self.ask(task, admission), admission, {**parameters, **apart(control)}, make, task.heads)
        loss = released.get(LOSS)
        return {name: released[name] for name in parameters}, None if loss is None else float(loss[0])

    def _shared_noise_update(
        self, task: TrainTask, admission: Admission, train_part: Cohort, parameters: Parameters, share_std: float
    ) -> Parameters:  # fmt: skip
        """The sum of a step's clipped gradients with this site's share of the noise, in whole grid points; float64 holds them exactly."""
        assert admission.secure is not None
        noise = admission.secure.noise
        assert noise is not None and share_std > 0

        def make(key: bytes) -> tuple[Arrays, int]:
            learner = self._learner(task, admission, train_part, key)
            return {POINTS: noised_points(learner, parameters, noise, share_std=share_std).astype(np.float64)}, learner.steps

        return self._released(self.ask(task, admission), admission, request_with_share(parameters, share_std), make, task.heads)

    def tuned(self, task: EvaluateTask, admission: Admission, train_part: Cohort, final: Parameters) -> Parameters:
        """The final model, trained a little further for this site where the strategy says so: charged as training."""
        rule = admission.rule
        if not isinstance(rule, FineTuning):
            return final

        def make(key: bytes) -> tuple[Arrays, int]:
            learner = self._learner(task, admission, train_part, key)
            tuned = rule.tuned(learner, final)
            self.kept_state(admission).keep(task.fold, number_of(task), {"personal": tuned})  # the hospital's, to use
            return tuned, learner.steps

        return self._released(self.ask(task, admission, tuning=True), admission, final, make, task.heads)

    def _learner(self, task: TrainTask | EvaluateTask, admission: Admission, train_part: Cohort, key: bytes) -> Learner:
        local = LocalRound(study=admission.study, task=self._task, round_number=task.round, still_wanted=self._still_wanted)
        simulated = self._settings.seed_of(admission.study) is not None
        return Learner(model=self._model, train_part=train_part, local=local, plan=admission.plan, key=key, simulated=simulated)

    def _released(
        self, ask: Ask, admission: Admission, received: Parameters, make: Callable[[bytes], tuple[Arrays, int]], heads: Mapping[str, WitnessedHead]
    ) -> Parameters:  # fmt: skip
        """What training makes of what was received: charged before, where a promise is made."""
        if not admission.plan.private:
            return self._kept(ask, admission, received, make)
        return self.charging(admission).release(ask, received, make, witnessed=heads.get(self._settings.name))

    def kept_state(self, admission: Admission) -> KeptState:
        return KeptState(self._settings.releases_path, admission.run)

    def ask(self, task: TrainTask | EvaluateTask, admission: Admission, *, tuning: bool = False) -> Ask:
        plan, training = admission.plan, isinstance(task, TrainTask) or tuning
        event = admission.evaluation
        if training:
            event = plan.event(plan.closing_steps if tuning else plan.steps_per_round) if plan.private else None
        return Ask(
            run=task.run, study_hash=task.study_hash, site=self._settings.name, account="training" if training else "evaluation",
            fold=task.fold, round=number_of(task) if tuning else task.round, event=event or NOTHING, tuning=tuning,
        )  # fmt: skip

    def _kept(self, ask: Ask, admission: Admission, parameters: Parameters, make: Callable[[bytes], tuple[Arrays, int]]) -> Parameters:
        """What `make` gives, or the identical update that answered this very request before; nothing is charged without a promise."""
        releases, request, kind = self._releases(admission), ask.request(parameters), ask.kind
        kept = releases.find(ask.run, kind, request) if releases is not None else None
        if kept is None:
            kept, _ = make(ask.key(self._settings.seed_of(admission.study)))
            if releases is not None:
                releases.keep(ask.run, kind, request, kept)
        return kept

    def _releases(self, admission: Admission) -> Releases | None:
        """Where releases are kept that could not be made again; None where their randomness is seeded."""
        return Releases(self._settings.releases_path) if self._settings.seed_of(admission.study) is None else None

    def charging(self, admission: Admission) -> Charging:
        return Charging(ledger=self._ledger_for(admission.plan), releases=self._releases(admission), seed=self._settings.seed_of(admission.study))


def number_of(task: TrainTask | EvaluateTask) -> int:
    """Of the round; the closing evaluation comes after the last."""
    return task.round + isinstance(task, EvaluateTask)


def request_with_share(parameters: Parameters, share_std: float) -> Parameters:
    """What determines a sum with a share of noise: with another share it is another release."""
    return {**parameters, POINTS: np.array([share_std])}


def apart(control: Parameters) -> Parameters:
    """Under names that no parameter has."""
    return {f"{CONTROL} {name}": value for name, value in control.items()}
