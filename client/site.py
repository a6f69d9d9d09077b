"""One hospital. Every request of a coordinator ends here: policy first, then ledger, then the cohort, then an answer or a refusal.

The same code answers for a virtual site of a simulation and for a real one; they differ in what `SiteSettings` allows and where noise
comes from. A refusal is an ordinary answer; an exception's own text never leaves.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from torch import nn

from client.charging import Ask, Charging
from client.distributed_sum import noised_points
from client.evaluation import evaluate_parameters, predictions_of, rounded
from client.evaluation_noise import bounded_statistics, noise_statistics
from client.exact_answers import ExactAnswers
from client.kept_state import KeptState
from client.ledger import Ledger, PlannedStudy, begun_mark, check_filter, check_overlap, missing_row, reading
from client.local_training import LocalRound
from client.local_update import Learner
from client.memory_chain import Journal
from client.policy import Policy
from client.private_probe import probe_model
from client.releases import Arrays, Releases
from client.secure_updates import SecureUpdates
from client.spending import burn_down, site_privacy
from client.strategies.choice import local_rule
from client.strategies.fine_tuning import FineTuning
from client.strategies.local_rule import LocalRule
from shared.cohort import Cohort, held_out_patients, patient_hash
from shared.errors import ConfigurationError, DataError, ProtocolError
from shared.messages import (
    CONTROL,
    Enrolled,
    EnrolTask,
    Evaluated,
    EvaluateTask,
    NotCounted,
    Statistics,
    Trained,
    TrainTask,
    WitnessedHead,
    head_statement,
    plain_text,
)
from shared.models import Parameters, Template, arrays_digest, get_parameters, set_parameters, template_of
from shared.personal import personal_names
from shared.plan import Limit, SitePlan, check_delta, plan_site, shape_site, within_filter
from shared.privacy import SOLVE_MARGIN, PrivacyEvent, evaluation_noise_multiplier
from shared.results import SitePrivacy
from shared.secure_sum.messages import SecureTrained, SecureTrainTask, SumReply, SumTask
from shared.secure_sum.setting import SumForm
from shared.seeding import derive_key
from shared.study import Scaffold, Study
from shared.task import Task

logger = logging.getLogger(__name__)


LOSS = "loss of the received model"  # beside the parameters of a release; no parameter has such a name
POINTS = "noised sum of gradients"
NOTHING = PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """What a site is, without its patients.

    Attributes:
        declared_size: training patients, as declared; a simulation declares exact numbers.
        policy: None only for a virtual site, which has nobody to protect.
        ledger_path: file of the ledger of this cohort.
        releases_path: folder of what was released last; only where noise comes from the operating system.
        split_key: keys the hash that fixes each patient's split.
        signer: signs the ledger's rows; None for a virtual site.
        roster_key: what the daemon signs with, as the federation's roster knows it; None outside a deployment.
        journal: of a simulation whose ledgers are in memory until they are closed.
        noise_seed: for tests that compare two runs bit for bit, and settable from Python alone: noise drawn from a seed protects nobody.
    """

    name: str
    declared_size: int
    declared_num_patients: int
    declared_num_test: int
    ledger_path: Path
    releases_path: Path
    split_key: bytes = field(repr=False)
    signer: Ed25519PrivateKey | None = field(default=None, repr=False)
    roster_key: Ed25519PrivateKey | None = field(default=None, repr=False)
    policy: Policy | None = None
    cohort_id: str = "virtual"
    noise_seed: int | None = field(default=None, repr=False)
    journal: Journal | None = field(default=None, repr=False)

    @property
    def virtual(self) -> bool:
        """True for a site of a simulation without a site file: its noise may be seeded, its counts are exact."""
        return self.policy is None

    @property
    def limit(self) -> Limit | None:
        """What the cohort may spend over all studies; a virtual site, whose ledger is born and ends with its run, has none."""
        return None if self.policy is None else self.policy.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A study that this site has agreed to."""

    run: str
    study: Study
    study_hash: str
    plan: SitePlan
    evaluation: PrivacyEvent | None  # of the closing evaluation's noise
    rule: LocalRule
    template: Template  # of the parameters that are shared
    control: Template  # of what the strategy sends beside them
    secure: SecureUpdates | None  # where updates are aggregated securely
    coordinator_key: str | None

    def planned(self) -> PlannedStudy:
        """What it asks of the ledger."""
        return PlannedStudy(
            run=self.run, study=self.study.name, study_hash=self.study_hash, training=self.plan.study_event(), evaluation=self.evaluation,
            cross_validated=self.study.evaluation.folds > 1, coordinator_key=self.coordinator_key,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunRound:
    """A round of training that a virtual site has agreed to and charged."""

    task: TrainTask
    admission: Admission
    charge: int | None  # None: nothing is promised


class Site:
    """A hospital's side of every message.

    Args:
        open_cohort: loads the patients; called once, only after policy and ledger have agreed.
        task: the site's own, installed code; a coordinator's must have the same fingerprint.
        model: a model of the task to work with; every message loads its own parameters into it, so virtual sites may share one.
        still_wanted: called before every training step; raises where the work is stale, and what was reserved then stays charged.
    """

    def __init__(
        self,
        settings: SiteSettings,
        task: Task,
        open_cohort: Callable[[], Cohort],
        *,
        model: nn.Module | None = None,
        still_wanted: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self._still_wanted = still_wanted
        self._task = task
        self._model = model if model is not None else task.model()
        self._open_cohort = open_cohort
        self._cohort: Cohort | None = None
        self._split: dict[tuple[int, int], tuple[Cohort, Cohort]] = {}
        self._ledger: Ledger | None = None
        self._admission: Admission | None = None
        self._heard: NotCounted | None = None

    def enrol(self, task: EnrolTask) -> Enrolled:
        """Agree to a study, or refuse it: policy, then model, then budget, then a look at the cohort, to which a real site's ledger is bound.

        Raises:
            ConfigurationError, PolicyRefusedError, BudgetExhaustedError, DataError, LedgerError, ProtocolError: the refusal.
        """
        study = Study.from_table(task.study, source="study")
        if task.task_fingerprint != self._task.fingerprint():
            raise ConfigurationError("task: expected the same code at both sides, got another fingerprint", "install the same version at both sides")
        policy = self.settings.policy
        if policy is not None:
            policy.check(study, self._task, shape_site(study, self.settings.declared_size))
        plan = plan_site(study, self.settings.declared_size, limit=self.settings.limit)
        if policy is not None:
            policy.check_noise(plan)
            probe_model(self._task, study)
        admission = Admission(
            run=task.run, study=study, study_hash=study.fingerprint(), plan=plan, evaluation=self._evaluation_event(study),
            rule=local_rule(study, self._task), template=self._shared_template(study), control=self._control_template(study), secure=self._secure_updates(task, study, plan),
            coordinator_key=task.coordinator_key,
        )  # fmt: skip
        if plan.private:
            self._admit(admission, task.heads.get(self.settings.name))
        else:
            self.cohort()
        self._admission = admission
        return Enrolled(
            name=self.settings.name,
            declared_size=self.settings.declared_size,
            declared_num_patients=self.settings.declared_num_patients,
            declared_num_test=self.settings.declared_num_test,
            ledger_head=self._head(plan),
            noise_multiplier=plan.noise_multiplier if study.distributed_noise else None,
            sum_key=None if admission.secure is None else self._sum_signer(study).public_key().public_bytes_raw().hex(),
        )

    def _sum_signer(self, study: Study) -> Ed25519PrivateKey:
        """Signs this site's keys for secure sums, the same while a run lasts; a virtual site's follows from the seed, and protects nobody."""
        own = self.settings.roster_key or self.settings.signer
        return own or Ed25519PrivateKey.from_private_bytes(derive_key(study.seed, "key for secure sums", self.settings.name))

    def _secure_updates(self, task: EnrolTask, study: Study, plan: SitePlan) -> SecureUpdates | None:
        if study.secure_aggregation is None:
            return None
        num_values = sum(math.prod(shape) for shape, _ in self._shared_template(study).values())
        num_trainable = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        return SecureUpdates(
            SumForm.of_study(study, num_values=num_values, num_trainable=num_trainable), plan=plan, name=self.settings.name, run=task.run,
            study_hash=study.fingerprint(), signer=self._sum_signer(study), folder=self.settings.releases_path,
            largest_norm=study.strategy.largest_update, seed=self._study_seed(study),
        )  # fmt: skip

    def answer_sum(self, task: SumTask) -> SumReply:
        """The reply to a stage of a secure sum that takes no update.

        Raises:
            ProtocolError, SealError: the refusal; or no study with secure aggregation was agreed to here.
        """
        if self._admission is None or self._admission.secure is None:
            raise ProtocolError("secure sum: expected a study with secure aggregation that this site has agreed to, got another")
        study = self._admission.study
        if not (1 <= task.of.round <= study.rounds.count and 1 <= task.of.fold <= study.evaluation.folds):
            raise ProtocolError("secure sum: expected a round and fold of the study, got another")
        return self._admission.secure.answer(task)

    def train_securely(
        self, task: SecureTrainTask, parameters: Parameters, control: Parameters | None = None
    ) -> tuple[SecureTrained, NDArray[np.uint8], Statistics | None]:  # fmt: skip
        """As `train`, with the update under masks.

        Raises:
            ProtocolError, SealError: also where the update or the request is not one that may be masked; then nothing leaves, and what was charged stays charged.
        """
        admission = self._admitted(task.train)
        if admission.secure is None:
            raise ProtocolError("secure sum: expected a study with secure aggregation, got one without")
        assert admission.study.secure_aggregation is not None
        weighs = admission.study.strategy.weights == "declared" and not admission.study.distributed_noise
        weight = min(self.settings.declared_size, admission.study.secure_aggregation.max_weight) if weighs else 1
        admission.secure.check(task, weight)
        share_std = admission.secure.share_std(task.mask_input) if admission.study.distributed_noise else None
        trained, update, statistics = self._trained_on(task.train, parameters, control, share_std)
        model = arrays_digest({**parameters, **_apart(control or {})})
        masked, payload = admission.secure.mask(task.mask_input, update, task.weight, model=model)
        return SecureTrained(trained=trained, masked=masked), payload, statistics

    def _shared_template(self, study: Study) -> Template:
        personal = personal_names(study.strategy, self._model)
        return {name: form for name, form in template_of(get_parameters(self._model)).items() if name not in personal}

    def _control_template(self, study: Study) -> Template:
        if not isinstance(study.strategy, Scaffold):
            return {}
        trainable = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        return {name: form for name, form in self._shared_template(study).items() if name in trainable}

    def check_room_for(self, studies: Sequence[Study]) -> None:
        """Return where this site's budget covers all of these studies together; nothing is agreed to, and nothing written.

        Raises:
            BudgetExhaustedError: it does not.
            ConfigurationError: no noise fits a study's budget.
        """
        limit, path = self.settings.limit, self.settings.ledger_path
        if limit is None:
            return
        planned = []
        for study in studies:
            plan = plan_site(study, self.settings.declared_size, limit=limit)
            planned.append(PlannedStudy(
                run="", study=study.name, study_hash=study.fingerprint(), training=plan.study_event() if plan.private else NOTHING,
                evaluation=self._evaluation_event(study), cross_validated=study.evaluation.folds > 1,
            ))  # fmt: skip
        if not path.exists():
            check_filter(None, limit, planned)
            return
        with reading(path) as ledger:
            check_filter(ledger.account, limit, planned)

    def _admit(self, admission: Admission, witnessed: WitnessedHead | None) -> None:
        """The ledger agrees to the whole plan: before the cohort is opened that there is room, after it that these are its patients."""
        settings = self.settings
        if witnessed is not None and not settings.virtual:
            self._check_witness(witnessed, admission.coordinator_key)
        if not settings.ledger_path.exists() and not settings.virtual:
            self._check_beginning(witnessed)
        ledger = self.ledger_for(admission.plan)
        self._check_not_put_back(admission, witnessed)
        ledger.check_room(admission.planned())
        hashes, test = self._patients()
        if not settings.virtual:
            ledger.bind_patients(hashes, test=test, merged=admission.study.evaluation.folds > 1)
        ledger.admit(admission.planned())

    def _check_beginning(self, witnessed: WitnessedHead | None) -> None:
        """A ledger is begun only where none was, for patients of no other: nothing is written before that is known."""
        path = self.settings.ledger_path
        if witnessed is not None:
            raise missing_row(path, witnessed.head)
        if not begun_mark(path).exists():  # else opening it will say that it was lost
            check_overlap(path, set(self._patients()[0]))

    def _patients(self) -> tuple[list[bytes], list[bool]]:
        """The keyed hashes of the cohort's patients, and whether each is tested on."""
        cohort, settings = self.cohort(), self.settings
        if settings.virtual:
            return [], []
        test = held_out_patients(cohort, settings.split_key, published=False)
        return [patient_hash(settings.split_key, name) for name in cohort.patient_ids], list(map(bool, test))

    def _check_not_put_back(self, admission: Admission, witnessed: WitnessedHead | None) -> None:
        """Return where a real ledger holds the row that the coordinator saw last: at every task, for `state` may come back from a backup in mid-study.

        Raises:
            LedgerError: it does not; what is charged now would not add to what was spent since.
        """
        if witnessed is not None and admission.plan.private and not self.settings.virtual:
            self._check_witness(witnessed, admission.coordinator_key)
            self.ledger_for(admission.plan).check_head(witnessed.head)

    def _check_witness(self, witnessed: WitnessedHead, key: str | None) -> None:
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key or ""))
            public.verify(bytes.fromhex(witnessed.signature), head_statement(self.settings.name, witnessed.head))
        except (InvalidSignature, ValueError):
            raise ProtocolError("expected the coordinator's signature on the ledger's head, got another") from None

    def train(
        self, task: TrainTask, parameters: Parameters, control: Parameters | None = None
    ) -> tuple[Trained, Parameters, Statistics | None]:  # fmt: skip
        """Evaluate the parameters received, then train on them: the reply, the update (trained minus received), the statistics.

        Args:
            control: what the study's strategy sends beside the parameters.

        Raises:
            ProtocolError: the study was not agreed to here.
            BudgetExhaustedError: the ledger has no room; nothing was trained.
            LedgerError: the ledger was put back to an earlier state since the coordinator saw it.
            NotApprovedError: something would leave without noise, and the study has no more rounds.
        """
        if self._admitted(task).secure is not None:
            raise ProtocolError("expected a request for an update under masks, as the study says, got one for an update in the clear")
        return self._trained_on(task, parameters, control)

    def _trained_on(
        self, task: TrainTask, parameters: Parameters, control: Parameters | None, share_std: float | None = None
    ) -> tuple[Trained, Parameters, Statistics | None]:  # fmt: skip
        admission = self._admitted(task)
        self._check_not_put_back(admission, task.heads.get(self.settings.name))
        judged = self._judged(task, admission, parameters)
        self._count_exact(task, admission, parameters, judged)
        train_part, test_part = self.parts(admission.study, task.fold)
        statistics, withheld = None, None
        if admission.evaluation is None:
            statistics, withheld = self._statistics(test_part, judged, exact=admission.plan.private)
        update, loss = self._update(task, admission, train_part, parameters, control or {}, share_std)
        return self._trained(task, admission, withheld, loss), update, statistics

    def _judged(self, task: TrainTask | EvaluateTask, admission: Admission, received: Parameters) -> Parameters:
        """The model by which this site is judged."""
        return admission.rule.judged(self._kept_state(admission).before(task.fold, _number(task)), received)

    def _trained(self, task: TrainTask, admission: Admission, withheld: str | None, loss: float | None = None) -> Trained:
        privacy, head = self._spent(admission), self._head(admission.plan)
        return Trained(
            name=self.settings.name, run=task.run, study_hash=task.study_hash, round=task.round, fold=task.fold, withheld=withheld,
            privacy=privacy, ledger_head=head, loss=loss,
        )  # fmt: skip

    def begin_round(self, task: TrainTask, digest: str) -> BegunRound:
        """The first half of `train`, of a virtual site that others train together with: agreed to and charged, and nothing trained yet.

        Args:
            digest: `arrays_digest` of the parameters received.

        Raises:
            ProtocolError, BudgetExhaustedError: as `train`.
        """
        admission = self._admitted(task)
        assert (
            self.settings.virtual and self._seed(admission) is not None
        )  # such noise is drawn again where a round is repeated, so no update need be kept
        ask = self._ask(task, admission)
        charge = self._charging(admission).reserve(ask, ask.request_on(digest)) if admission.plan.private else None
        return BegunRound(task=task, admission=admission, charge=charge)

    def end_round(self, begun: BegunRound, *, steps: int, update: str) -> Trained:
        """The second half: the charge is lowered to the steps really taken for the update with this `arrays_digest`."""
        admission = begun.admission
        if begun.charge is not None:
            self.ledger_for(admission.plan).commit(begun.charge, steps=steps, update=update)
        return self._trained(begun.task, admission, None)

    def evaluate(self, task: EvaluateTask, parameters: Parameters) -> tuple[Evaluated, Statistics | None]:
        """The statistics of these parameters on the fold's test patients; with the last fold's, the study ends here.

        Raises:
            ProtocolError: the study was not agreed to here.
            BudgetExhaustedError: the ledger has no room for another noised evaluation.
            LedgerError: the ledger was put back to an earlier state since the coordinator saw it.
            NotApprovedError: something would leave without noise, and the study has no more rounds.
        """
        admission = self._admitted(task)
        self._check_not_put_back(admission, task.heads.get(self.settings.name))
        train_part, test_part = self.parts(admission.study, task.fold)
        judged = self._tuned(task, admission, train_part, self._judged(task, admission, parameters))
        self._count_exact(task, admission, parameters, judged)
        if admission.evaluation is None:
            statistics, withheld = self._statistics(test_part, judged, exact=admission.plan.private)
        else:
            statistics, withheld = self._noised_statistics(task, admission, test_part, judged)
        if admission.plan.private and task.fold == admission.study.evaluation.folds:
            self.ledger_for(admission.plan).close_plan(admission.run)
        privacy, head = self._spent(admission, cross_check=True), self._head(admission.plan)
        reply = Evaluated(
            name=self.settings.name, run=task.run, study_hash=task.study_hash, round=task.round, fold=task.fold, withheld=withheld,
            privacy=privacy, ledger_head=head,
        )  # fmt: skip
        return reply, statistics

    @property
    def template(self) -> Template:
        """Names, shapes and dtypes of the parameters that this site accepts.

        Raises:
            ProtocolError: no study was agreed to.
        """
        if self._admission is None:
            raise ProtocolError("expected a study that this site has agreed to, got one it has not")
        return self._admission.template

    @property
    def control_template(self) -> Template:
        """The same of what the study's strategy sends beside the parameters."""
        return {} if self._admission is None else self._admission.control

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
        settings = self.settings
        if settings.journal is not None and self._ledger is None:
            self._ledger = Ledger.simulated(settings.ledger_path, cohort=settings.cohort_id, unit=plan.unit, journal=settings.journal)
        if self._ledger is None or self._ledger.unit != plan.unit:  # opening it again for another unit refuses
            self._ledger = Ledger(settings.ledger_path, cohort=settings.cohort_id, unit=plan.unit, limit=settings.limit, signer=settings.signer)
        return self._ledger

    def _admitted(self, task: TrainTask | EvaluateTask) -> Admission:
        admission = self._admission
        if admission is None or (task.run, task.study_hash) != (admission.run, admission.study_hash):
            raise ProtocolError("expected a study that this site has agreed to, got one it has not")
        study = admission.study
        last = study.rounds.count + isinstance(task, EvaluateTask)  # the closing evaluation comes after the last round of training
        if not (1 <= task.round <= last and 1 <= task.fold <= study.evaluation.folds):
            raise ProtocolError("expected a round and fold of the study, got another")
        self._hear(task.not_counted.get(self.settings.name))
        return admission

    def _hear(self, told: NotCounted | None) -> None:
        """Say once in the site's own log that an update of this site did not count, and why: its hospital would not learn it otherwise."""
        if told is not None and told != self._heard:
            fold = f" of fold {told.fold}" if told.fold > 1 else ""
            logger.warning("site %s: its update of round %d%s did not count: %s", self.settings.name, told.round, fold, plain_text(told.reason))
            self._heard = told

    def parts(self, study: Study, fold: int) -> tuple[Cohort, Cohort]:
        """The training and the test patients of a fold."""
        cohort = self.cohort()
        if (fold, study.evaluation.folds) not in self._split:
            test = held_out_patients(cohort, self.settings.split_key, fold=fold, folds=study.evaluation.folds, published=self.settings.virtual)
            self._split[fold, study.evaluation.folds] = (cohort.select(~test), cohort.select(test))
        return self._split[fold, study.evaluation.folds]

    def forget_parts(self) -> None:
        """Let go of the copies that `parts` made; it makes them again."""
        self._split.clear()

    # What leaves --------------------------------------------------------------------------------------------------------------

    def _rules(self, *, exact: bool) -> dict[str, str | None]:
        """For each statistic the rule that keeps it here, or None; rules look at the declared number of test patients, never the exact one."""
        names = {metric.statistic.name for metric in self._task.metrics}
        policy, num_test = self.settings.policy, self.settings.declared_num_test
        return {name: None if policy is None else policy.withholds(self._task, name, num_test=num_test, exact=exact) for name in sorted(names)}

    def _count_exact(self, task: TrainTask | EvaluateTask, admission: Admission, received: Parameters, judged: Parameters) -> None:
        """A real site answers exactly about as many models as the approved study has rounds and closing evaluations, and no more; a model that was
        received is another where this site is judged by another."""
        private = admission.plan.private
        exact_statistics = admission.evaluation is None and not all(self._rules(exact=private).values())
        if self.settings.virtual or (private and not exact_statistics):
            return
        study = admission.study
        most = (study.rounds.count + 1) * study.evaluation.folds + study.privacy.spare_rounds
        request = self._ask(task, admission).request({**received, **{f"judged {name}": value for name, value in judged.items()}})
        ExactAnswers(self.settings.releases_path).count(task.run, request, most=most)

    def _statistics(self, test_part: Cohort, parameters: Parameters, *, exact: bool) -> tuple[Statistics | None, str | None]:
        """What may leave, and the rule that keeps the rest."""
        rules = self._rules(exact=exact)
        withheld = next((rule for rule in rules.values() if rule is not None), None)
        if all(rules.values()):
            return None, withheld
        statistics = evaluate_parameters(self._task, test_part, parameters, model=self._model)
        step = self.settings.policy.round_counts_to if self.settings.policy is not None else 1
        declared = {metric.statistic.name: metric.statistic for metric in self._task.metrics}
        released = {name: rounded(value, declared[name], step) for name, value in statistics.items() if rules[name] is None}
        return released, withheld

    def _noised_statistics(
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

        noised = self._charging(admission).release(self._ask(task, admission), parameters, make)
        return {name: np.asarray(value, dtype=np.float64) for name, value in noised.items()}, withheld

    def _update(
        self, task: TrainTask, admission: Admission, train_part: Cohort, parameters: Parameters, control: Parameters, share_std: float | None
    ) -> tuple[Parameters, float | None]:  # fmt: skip
        """The update, and the loss where the strategy sends it."""
        if share_std is not None:
            return self._shared_noise_update(task, admission, train_part, parameters, share_std), None
        state = self._kept_state(admission)

        def make(key: bytes) -> tuple[Arrays, int]:
            learner = self._learner(task, admission, train_part, key)
            made = admission.rule.train(learner, state.before(task.fold, task.round), parameters, control)
            if admission.rule.keeps:
                state.keep(task.fold, task.round, made.kept)
            return {**made.update, **({} if made.loss is None else {LOSS: np.array([made.loss])})}, learner.steps

        released = self._released(self._ask(task, admission), admission, {**parameters, **_apart(control)}, make, task.heads)
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

        request = {**parameters, POINTS: np.array([share_std])}  # with another share it is another release
        return self._released(self._ask(task, admission), admission, request, make, task.heads)

    def _tuned(self, task: EvaluateTask, admission: Admission, train_part: Cohort, final: Parameters) -> Parameters:
        """The final model, trained a little further for this site where the strategy says so: charged as training."""
        rule = admission.rule
        if not isinstance(rule, FineTuning):
            return final

        def make(key: bytes) -> tuple[Arrays, int]:
            learner = self._learner(task, admission, train_part, key)
            return rule.tuned(learner, final), learner.steps

        return self._released(self._ask(task, admission, tuning=True), admission, final, make, task.heads)

    def _learner(self, task: TrainTask | EvaluateTask, admission: Admission, train_part: Cohort, key: bytes) -> Learner:
        local = LocalRound(study=admission.study, task=self._task, round_number=task.round, still_wanted=self._still_wanted)
        simulated = self._seed(admission) is not None
        return Learner(model=self._model, train_part=train_part, local=local, plan=admission.plan, key=key, simulated=simulated)

    def _released(
        self, ask: Ask, admission: Admission, received: Parameters, make: Callable[[bytes], tuple[Arrays, int]], heads: Mapping[str, WitnessedHead]
    ) -> Parameters:  # fmt: skip
        """What training makes of what was received: charged before, where a promise is made."""
        if not admission.plan.private:
            return self._kept(ask, admission, received, make)
        return self._charging(admission).release(ask, received, make, witnessed=heads.get(self.settings.name))

    def _kept_state(self, admission: Admission) -> KeptState:
        return KeptState(self.settings.releases_path, admission.run)

    def _ask(self, task: TrainTask | EvaluateTask, admission: Admission, *, tuning: bool = False) -> Ask:
        plan, training = admission.plan, isinstance(task, TrainTask) or tuning
        event = admission.evaluation
        if training:
            event = plan.event(plan.closing_steps if tuning else plan.steps_per_round) if plan.private else None
        return Ask(
            run=task.run, study_hash=task.study_hash, site=self.settings.name, account="training" if training else "evaluation",
            fold=task.fold, round=_number(task) if tuning else task.round, event=event or NOTHING, tuning=tuning,
        )  # fmt: skip

    def _kept(self, ask: Ask, admission: Admission, parameters: Parameters, make: Callable[[bytes], tuple[Arrays, int]]) -> Parameters:
        """What `make` gives, or the identical update that answered this very request before; nothing is charged without a promise."""
        releases, request, kind = self._releases(admission), ask.request(parameters), ask.kind
        kept = releases.find(ask.run, kind, request) if releases is not None else None
        if kept is None:
            kept, _ = make(ask.key(self._seed(admission)))
            if releases is not None:
                releases.keep(ask.run, kind, request, kept)
        return kept

    def _releases(self, admission: Admission) -> Releases | None:
        """Where releases are kept that could not be made again; None where their randomness is seeded."""
        return Releases(self.settings.releases_path) if self._seed(admission) is None else None

    def _charging(self, admission: Admission) -> Charging:
        return Charging(ledger=self.ledger_for(admission.plan), releases=self._releases(admission), seed=self._seed(admission))

    def _seed(self, admission: Admission) -> int | None:
        """The seed of a simulation's noise; None where it comes from the operating system."""
        return self._study_seed(admission.study)

    def _study_seed(self, study: Study) -> int | None:
        return study.seed if self.settings.virtual and study.privacy.noise_source == "seeded" else self.settings.noise_seed

    def _evaluation_event(self, study: Study) -> PrivacyEvent | None:
        epsilon, delta = study.privacy.evaluation_epsilon, study.privacy.delta
        if epsilon is None:
            return None
        assert delta is not None
        check_delta(delta, self.settings.declared_num_test)
        noise_multiplier = evaluation_noise_multiplier(epsilon * SOLVE_MARGIN, delta, releases=1)
        return within_filter(PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1), self.settings.limit)

    def _head(self, plan: SitePlan) -> str | None:
        """What a coordinator may remember of a real ledger."""
        return self.ledger_for(plan).head if plan.private and not self.settings.virtual else None

    def _spent(self, admission: Admission, *, cross_check: bool = False) -> SitePrivacy | None:
        if not admission.plan.private:
            return None
        steps = self.ledger_for(admission.plan).steps(admission.run)
        if self.settings.virtual and not cross_check:
            return burn_down(admission.plan, steps)
        return site_privacy(admission.plan, steps, cross_check=cross_check)


def _number(task: TrainTask | EvaluateTask) -> int:
    """Of the round; the closing evaluation comes after the last."""
    return task.round + isinstance(task, EvaluateTask)


def _apart(control: Parameters) -> Parameters:
    """Under names that no parameter has."""
    return {f"{CONTROL} {name}": value for name, value in control.items()}
