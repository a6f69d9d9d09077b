"""One hospital. Every request of a coordinator ends here: policy first, then ledger, then the cohort, then an answer or a refusal.

The same code answers for a virtual site of a simulation and for a real one; they differ in what `SiteSettings` allows and where noise
comes from. A refusal is an ordinary answer; an exception's own text never leaves.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.cross_check import epsilon_prv
from client.ledger import Ledger, Limit, Spend
from client.local_training import LocalRound, torch_seeded, train_round
from client.noise import KEY_BYTES
from client.policy import Policy
from client.private_probe import probe_model
from client.private_training import Randomness, train_round_private
from shared.cohort import Cohort, held_out_patients, patient_hash
from shared.errors import ConfigurationError, DataError, ProtocolError
from shared.messages import Enrolled, EnrolTask, Evaluated, EvaluateTask, Statistics, Trained, TrainTask
from shared.models import Parameters, Template, get_parameters, predict_in_batches, set_parameters, template_of
from shared.plan import SitePlan, plan_site
from shared.privacy import PrivacyEvent, epsilon_of
from shared.results import SitePrivacy
from shared.seeding import derive_key
from shared.study import Study
from shared.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """What a site is, without its patients.

    Attributes:
        declared_size: training patients, as declared; a simulation declares exact numbers.
        policy: None only for a virtual site, which has nobody to protect.
        ledger_path: file of the ledger of this cohort.
        split_key: keys the hash that fixes each patient's split.
        limit: None: the study's own budget (virtual sites, whose ledger is born and ends with the run).
    """

    name: str
    declared_size: int
    declared_num_patients: int
    declared_num_test: int
    ledger_path: Path
    split_key: bytes
    policy: Policy | None = None
    cohort_id: str = "virtual"

    @property
    def virtual(self) -> bool:
        """True for a site of a simulation without a site file: its noise may be seeded, its counts are exact."""
        return self.policy is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A study that this site has agreed to."""

    run: str
    study: Study
    study_hash: str
    plan: SitePlan
    template: Template


class Site:
    """A hospital's side of every message.

    Args:
        open_cohort: loads the patients; called once, only after policy and ledger have agreed.
        task: the site's own, installed code; a coordinator's must have the same fingerprint.
        model: a model of the task to work with; every message loads its own parameters into it, so virtual sites may share one.
    """

    def __init__(self, settings: SiteSettings, task: Task, open_cohort: Callable[[], Cohort], *, model: nn.Module | None = None) -> None:
        self.settings = settings
        self._task = task
        self._model = model if model is not None else task.model()
        self._open_cohort = open_cohort
        self._cohort: Cohort | None = None
        self._split: dict[tuple[int, int], tuple[Cohort, Cohort]] = {}
        self._ledger: Ledger | None = None
        self._admission: Admission | None = None

    def enrol(self, task: EnrolTask) -> Enrolled:
        """Agree to a study, or refuse it: policy, then model, then budget, then a look at the cohort, to which a real site's ledger is bound.

        Raises:
            ConfigurationError, PolicyRefusedError, BudgetExhaustedError, DataError, LedgerError, ProtocolError: the refusal.
        """
        study = Study.from_table(task.study, source="study")
        if task.task_fingerprint != self._task.fingerprint():
            raise ConfigurationError("task: expected the same code at both sides, got another fingerprint", "install the same version at both sides")
        plan = plan_site(study, self.settings.declared_size)
        if self.settings.policy is not None:
            self.settings.policy.check(study, self._task, plan)
            probe_model(self._task, study)
        if plan.private and not self._already_charged(task.run, plan):
            self.ledger_for(plan).check_room(plan.study_event(), self._limit(plan))
        template = template_of(get_parameters(self._model))
        cohort = self.cohort()
        if plan.private and not self.settings.virtual:
            self.ledger_for(plan).bind_patients([patient_hash(self.settings.split_key, name) for name in cohort.patient_ids])
        self._admission = Admission(run=task.run, study=study, study_hash=study.fingerprint(), plan=plan, template=template)
        return Enrolled(
            name=self.settings.name,
            declared_size=self.settings.declared_size,
            declared_num_patients=self.settings.declared_num_patients,
            declared_num_test=self.settings.declared_num_test,
        )

    def train(self, task: TrainTask, parameters: Parameters) -> tuple[Trained, Parameters, Statistics | None]:
        """Evaluate the parameters received, then train on them: the reply, the update (trained minus received), the statistics.

        Raises:
            ProtocolError: the study was not agreed to here.
            BudgetExhaustedError: the ledger has no room; nothing was trained.
        """
        admission = self._admitted(task)
        train_part, test_part = self._parts(admission.study, task.fold)
        statistics, withheld = self._statistics(test_part, parameters)
        updated = self._train_part(task, admission, train_part, parameters)
        update: Parameters = {name: np.asarray(updated[name] - parameters[name]) for name in parameters}
        reply = Trained(name=self.settings.name, round=task.round, fold=task.fold, withheld=withheld, privacy=self._spent(admission))
        return reply, update, statistics

    def evaluate(self, task: EvaluateTask, parameters: Parameters) -> tuple[Evaluated, Statistics | None]:
        """The statistics of these parameters on the fold's test patients."""
        admission = self._admitted(task)
        _, test_part = self._parts(admission.study, task.fold)
        statistics, withheld = self._statistics(test_part, parameters)
        privacy = self._spent(admission, cross_check=True)
        return Evaluated(name=self.settings.name, round=task.round, fold=task.fold, withheld=withheld, privacy=privacy), statistics

    @property
    def template(self) -> Template:
        """Names, shapes and dtypes of the parameters that this site accepts.

        Raises:
            ProtocolError: no study was agreed to.
        """
        if self._admission is None:
            raise ProtocolError("expected a study that this site has agreed to, got one it has not")
        return self._admission.template

    def close(self) -> None:
        """Release the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def cohort(self) -> Cohort:
        """The site's patients, opened once.

        Raises:
            DataError: the data do not fit the schema, or hold no training patient.
        """
        if self._cohort is None:
            cohort = self._open_cohort()
            if cohort.num_patients == 0:
                raise DataError(f"site {self.settings.name}: expected patients, got none", "check the cohort's path")
            self._cohort = cohort
        return self._cohort

    def ledger_for(self, plan: SitePlan) -> Ledger:
        """The cohort's ledger, opened once."""
        if self._ledger is None or self._ledger.unit != plan.unit:  # opening it again for another unit refuses
            self._ledger = Ledger(self.settings.ledger_path, cohort=self.settings.cohort_id, unit=plan.unit, durable=not self.settings.virtual)
        return self._ledger

    def _admitted(self, task: TrainTask | EvaluateTask) -> Admission:
        admission = self._admission
        if admission is None or (task.run, task.study_hash) != (admission.run, admission.study_hash):
            raise ProtocolError("expected a study that this site has agreed to, got one it has not")
        study = admission.study
        last = study.rounds.count + isinstance(task, EvaluateTask)  # the closing evaluation comes after the last round of training
        if not (1 <= task.round <= last and 1 <= task.fold <= study.evaluation.folds):
            raise ProtocolError("expected a round and fold of the study, got another")
        return admission

    def _already_charged(self, run: str, plan: SitePlan) -> bool:
        charged = {(event.noise_multiplier, event.sample_rate) for event in self.ledger_for(plan).charged().get(run, [])}
        if charged - {(plan.noise_multiplier, plan.sample_rate)}:
            raise ProtocolError("run: expected a name of its own, got that of a run with another noise or sample rate")
        return bool(charged)

    def _limit(self, plan: SitePlan) -> Limit:
        assert plan.epsilon is not None and plan.delta is not None
        policy = self.settings.policy
        return Limit(epsilon=plan.epsilon, delta=plan.delta) if policy is None else Limit(epsilon=policy.max_epsilon, delta=policy.max_delta)

    def _parts(self, study: Study, fold: int) -> tuple[Cohort, Cohort]:
        cohort = self.cohort()
        if (fold, study.evaluation.folds) not in self._split:
            test = held_out_patients(cohort, self.settings.split_key, fold=fold, folds=study.evaluation.folds)
            self._split[fold, study.evaluation.folds] = (cohort.select(~test), cohort.select(test))
        return self._split[fold, study.evaluation.folds]

    def _statistics(self, test_part: Cohort, parameters: Parameters) -> tuple[Statistics | None, str | None]:
        """What may leave, and the rule that keeps the rest; the rule looks at the declared number of test patients, never the exact one."""
        policy = self.settings.policy
        statistics = evaluate_parameters(self._task, test_part, parameters, model=self._model)
        if policy is None:
            return statistics, None
        rules = {name: policy.withholds(self._task, name, num_test=self.settings.declared_num_test) for name in statistics}
        released = {name: value for name, value in statistics.items() if rules[name] is None}
        return released or None, next((rule for rule in rules.values() if rule is not None), None)

    def _train_part(self, task: TrainTask, admission: Admission, train_part: Cohort, parameters: Parameters) -> Parameters:
        model = self._model
        set_parameters(model, parameters)
        local = LocalRound(study=admission.study, task=self._task, round_number=task.round)
        path = ("train", self.settings.name, task.fold, task.round)
        key = derive_key(admission.study.seed, *path) if self._seeded(admission) else os.urandom(KEY_BYTES)
        with torch_seeded(int.from_bytes(key[:4], "big")):
            if admission.plan.private:
                release = self._reserve(task, admission, parameters, key)
                steps = train_round_private(model, train_part, local, plan=admission.plan, randomness=Randomness.from_key(key))
                self.ledger_for(admission.plan).commit(release, steps=steps)
            else:
                train_round(model, train_part, local, rng=np.random.default_rng(int.from_bytes(key, "big")))
        return get_parameters(model)

    def _seeded(self, admission: Admission) -> bool:
        return self.settings.virtual and admission.study.privacy.noise_source == "seeded"

    def _reserve(self, task: TrainTask, admission: Admission, parameters: Parameters, key: bytes) -> str:
        release = release_id(task, parameters, key)
        spend = Spend(release=release, run=task.run, study=admission.study.name, fold=task.fold, round=task.round, event=admission.plan.round_event())
        self.ledger_for(admission.plan).reserve(spend, self._limit(admission.plan), planned=admission.plan.study_event())
        return release

    def _spent(self, admission: Admission, *, cross_check: bool = False) -> SitePrivacy | None:
        plan = admission.plan
        if not plan.private:
            return None
        assert plan.noise_multiplier is not None and plan.delta is not None
        steps = sum(event.steps for event in self.ledger_for(plan).charged().get(admission.run, []))
        return site_privacy(plan, steps, cross_check=cross_check)


def site_privacy(plan: SitePlan, steps: int, *, cross_check: bool) -> SitePrivacy:
    """What `steps` steps of this plan cost, by one accountant, and by the other where `cross_check`."""
    assert plan.noise_multiplier is not None and plan.delta is not None
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=steps)
    return SitePrivacy(
        epsilon=epsilon_of([event], plan.delta),
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        epsilon_cross_check=epsilon_prv([event], plan.delta) if cross_check else None,
    )


def release_id(task: TrainTask, parameters: Parameters, key: bytes) -> str:
    """SHA-256 (hex) of all that determines a round's release at a site."""
    digest = hashlib.sha256(f"{task.run}\n{task.study_hash}\n{task.fold}\n{task.round}\n".encode() + hashlib.sha256(key).digest())
    for name, value in parameters.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def evaluate_parameters(task: Task, test_part: Cohort, parameters: Parameters, *, model: nn.Module) -> Statistics:
    """Every statistic of the task on `test_part` for `model`, once these parameters are in it; zeros where nobody is tested."""
    statistics = {metric.statistic.name: metric.statistic for metric in task.metrics}
    if test_part.num_records == 0:
        return {name: np.zeros(statistic.shape) for name, statistic in statistics.items()}
    set_parameters(model, parameters)
    predictions: NDArray[np.float64] = task.predict(predict_in_batches(model, test_part.inputs)).numpy().astype(np.float64)
    return {name: statistic.summarise(predictions, test_part) for name, statistic in statistics.items()}
