"""One hospital. Every request of a coordinator ends here: policy first, then ledger, then the cohort, then an answer or a refusal.

The same code answers for a virtual site of a simulation and for a real one; they differ in what `SiteSettings` allows and where noise
comes from. A refusal is an ordinary answer; an exception's own text never leaves.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from torch import nn

from client.admission import NOTHING, Admission, SiteSettings, evaluation_event
from client.ledger import Ledger, PlannedStudy, begun_mark, check_filter, check_overlap, missing_row, reading
from client.local_work import LocalWork, apart
from client.private_probe import probe_model
from client.secure_updates import SecureUpdates
from client.spending import burn_down, site_privacy
from client.strategies.choice import local_rule
from shared.cohort import Cohort, held_out_patients, patient_hash
from shared.errors import ConfigurationError, DataError, ProtocolError
from shared.messages import (
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
from shared.models import Parameters, Template, arrays_digest, get_parameters, template_of
from shared.personal import personal_names
from shared.plan import SitePlan, plan_site, shape_site
from shared.results import SitePrivacy
from shared.secure_sum.messages import SecureTrained, SecureTrainTask, SumReply, SumTask
from shared.secure_sum.setting import SumForm
from shared.seeding import derive_key
from shared.strategy_options import Scaffold
from shared.study import Study
from shared.task import Task

logger = logging.getLogger(__name__)


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
        self._task = task
        self._model = model if model is not None else task.model()
        self._open_cohort = open_cohort
        self._cohort: Cohort | None = None
        self._split: dict[tuple[int, int], tuple[Cohort, Cohort]] = {}
        self._ledger: Ledger | None = None
        self._admission: Admission | None = None
        self._work = LocalWork(settings, task, self._model, ledger_for=self.ledger_for, still_wanted=still_wanted)
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
            run=task.run, study=study, study_hash=study.fingerprint(), plan=plan, evaluation=evaluation_event(study, self.settings),
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
            largest_norm=study.strategy.largest_update, max_site_norm=study.privacy.max_site_norm, seed=self.settings.seed_of(study),
            sum_with=None if self.settings.policy is None else self.settings.policy.sum_with,
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
        share_std = self.check_sum(task)
        trained, update, statistics = self._trained_on(task.train, parameters, control, share_std)
        secured, payload = self.mask(task, trained, update, model=arrays_digest({**parameters, **apart(control or {})}))
        return secured, payload, statistics

    def check_sum(self, task: SecureTrainTask) -> float | None:
        """Return where an update may be made for this request and masked, before anything is trained or charged: the standard deviation of this
        site's share of the noise, in grid points, where noise is added in shares.

        Raises:
            ProtocolError: it may not.
        """
        study, secure = self._admitted(task.train).study, self._secure(task)
        assert study.secure_aggregation is not None
        weighs = study.strategy.weights == "declared" and not study.distributed_noise
        secure.check(task, min(self.settings.declared_size, study.secure_aggregation.max_weight) if weighs else 1)
        return secure.share_std(task.mask_input) if study.distributed_noise else None

    def mask(self, task: SecureTrainTask, trained: Trained, update: Parameters, *, model: str) -> tuple[SecureTrained, NDArray[np.uint8]]:
        """What leaves of an update that was made and charged, and what is told of it.

        Args:
            model: `arrays_digest` of what it was trained on.

        Raises:
            ProtocolError, SealError: it is not one that may be masked; nothing leaves.
        """
        masked, payload = self._secure(task).mask(task.mask_input, update, task.weight, model=model)
        return SecureTrained(trained=trained, masked=masked), payload

    def _secure(self, task: SecureTrainTask) -> SecureUpdates:
        secure = self._admitted(task.train).secure
        if secure is None:
            raise ProtocolError("secure sum: expected a study with secure aggregation, got one without")
        return secure

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
                evaluation=evaluation_event(study, self.settings), cross_validated=study.evaluation.folds > 1,
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
        judged = self._work.judged(task, admission, parameters)
        self._work.count_exact(task, admission, parameters, judged)
        train_part, test_part = self.parts(admission.study, task.fold)
        statistics, withheld = None, None
        if admission.evaluation is None:
            statistics, withheld = self._work.statistics(test_part, judged, exact=admission.plan.private)
        update, loss = self._work.update(task, admission, train_part, parameters, control or {}, share_std)
        return self._trained(task, admission, withheld, loss), update, statistics

    def _trained(self, task: TrainTask, admission: Admission, withheld: str | None, loss: float | None = None) -> Trained:
        privacy, head = self._spent(admission), self._head(admission.plan)
        return Trained(
            name=self.settings.name, run=task.run, study_hash=task.study_hash, round=task.round, fold=task.fold, withheld=withheld,
            privacy=privacy, ledger_head=head, loss=loss,
        )  # fmt: skip

    def begin_round(self, task: TrainTask, digest: str) -> BegunRound:
        """The first half of `train`, of a virtual site that others train together with: agreed to and charged, and nothing trained yet.

        Of `train_securely` it is the part between `check_sum` and `mask`.

        Args:
            digest: `arrays_digest` of the parameters received; of a share of noise too, where there is one (`request_with_share`).

        Raises:
            ProtocolError, BudgetExhaustedError: as `train`.
        """
        admission = self._admitted(task)
        assert (
            self.settings.virtual and self.settings.seed_of(admission.study) is not None
        )  # such noise is drawn again where a round is repeated, so no update need be kept
        ask = self._work.ask(task, admission)
        charge = self._work.charging(admission).reserve(ask, ask.request_on(digest)) if admission.plan.private else None
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
        judged = self._work.tuned(task, admission, train_part, self._work.judged(task, admission, parameters))
        self._work.count_exact(task, admission, parameters, judged)
        if admission.evaluation is None:
            statistics, withheld = self._work.statistics(test_part, judged, exact=admission.plan.private)
        else:
            statistics, withheld = self._work.noised_statistics(task, admission, test_part, judged)
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
        self._hear(task.not_counted)
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
