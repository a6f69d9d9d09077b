"""The coordinator's round loop: enrol, then select, train, aggregate, evaluate, checkpoint, until the last round of the last fold."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server.aggregation import MAX_WEIGHT
from server.arrivals import ArrivalGrid, AtWork, ClockedGrid, OpenQuestion, take_open_questions, with_open_questions
from server.blocks import BlockGrid
from server.evaluation import add_statistics, check_statistics, count_tested, evaluate, planned_noise_std
from server.run_folder import Checkpoint, RunFolder
from server.secure_rounds import LATE, ask_stage, sum_setting
from server.secure_sum import STAGES, SecureSum, Stage
from server.strategies.dp_fedavg import SiteNoise
from server.strategies.q_fedavg import noise_energy
from server.strategies.strategy import Answer, FederatedStrategy, Member, config_of, failure_reason
from server.witness import Witness
from shared.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    DataError,
    NotApprovedError,
    PolicyRefusedError,
    ProtocolError,
    QuorumLostError,
    SiteFileError,
    StorageError,
    WardroundError,
)
from shared.kit import installed_version
from shared.messages import (
    MAX_REASON,
    PARAMETERS,
    Content,
    Enrolled,
    EnrolTask,
    EvaluateTask,
    NotCounted,
    Refused,
    Statistics,
    TrainTask,
    WitnessedHead,
    decode,
    encode,
    from_array_record,
    plain_text,
    to_array_record,
)
from shared.models import Parameters, get_parameters, initial_parameters
from shared.personal import personal_names
from shared.plan import plan_site, shape_site
from shared.results import RoundRecord, SitePrivacy, SiteRound
from shared.schedule import learning_rate_at
from shared.site_level import plan_site_level
from shared.study import Cyclic, FedBuff, QFedAvg, Study
from shared.task import Task, architecture_hash

logger = logging.getLogger(__name__)

START = "start"  # the model that a run starts with, where it is not the seed's
ENROL_PAUSE_SECONDS, MAX_PAUSE_SECONDS, ENROL_SECONDS, WELCOME_SECONDS = 2.0, 60.0, 60.0, 15.0
MENDABLE = (
    "E101",
    "E103",
    "E104",
    SiteFileError.code,
    "E5",
    NotApprovedError.code,
    "E8",
    "E4",
)  # refusals that a hospital may mend while the study waits
MOST_TOLD = 500  # sites whose last update did not count and that are told why: all of a round's tasks share one message, of bounded length
MAX_ATTEMPTS = 5  # with on_missing = "wait": how often a missing site is asked again before the deadline


def model_header(study: Study, task: Task) -> dict[str, str]:
    """What a model's file says of itself; `personal` names what stays at the sites, and is in the file as it was before training."""
    model = task.model()
    header = {"study": study.name, "study_hash": study.fingerprint(), "task": task.name, "architecture": architecture_hash(model)}
    personal = personal_names(study.strategy, model)
    return {**header, **({"personal": "\n".join(sorted(personal))} if personal else {})}


def is_final(reason: str) -> bool:
    """Whether a refusal stands however often the site is asked: of policy, budget or protocol."""
    return not reason.startswith(MENDABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """How often a node that has not enrolled was asked, and when it may be asked again."""

    times: int = 0
    due: float = 0.0  # time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.due

    def hurried(self) -> "_Asking":
        """As it was, but due now, unless its answer was final: while everybody waits, nobody is spared."""
        return self if self.due == math.inf else _Asking(times=self.times)

    def after(self, reason: str) -> "_Asking":
        pause = math.inf if is_final(reason) else min(ENROL_PAUSE_SECONDS * 2**self.times, MAX_PAUSE_SECONDS)
        return _Asking(times=self.times + 1, due=time.monotonic() + pause)


NEVER_ASKED = _Asking()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """The final model of a fold and what the sites' test patients say of it."""

    fold: int
    parameters: Parameters
    statistics: dict[str, Statistics]  # by site


@dataclass(slots=True, kw_only=True)
class History:
    """What a run has come to."""

    enrolled: dict[str, Enrolled] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    privacy: dict[str, SitePrivacy] = field(default_factory=dict)
    folds: list[FoldResult] = field(default_factory=list)


class Membership(Protocol):
    """Who may take part in a deployment, where sites come and go."""

    def expected(self) -> frozenset[str]:
        """Names of the sites that may take part now."""

    def name_of(self, node_id: int) -> str:
        """The name of a node's site."""

    def public_key(self, name: str) -> str | None:
        """A site's long-lived Ed25519 key, hex."""

    def declared_size(self, name: str) -> int | None:
        """Training patients of a site, as it declared when it was approved; None where it did not."""


class Coordinator:
    """Runs one study over whatever grid carries its messages, into a run's folder.

    Args:
        observe: called with every round's record as soon as it is on disk.
        witness: remembers the sites' ledgers from run to run; None where the sites are virtual.
        membership: of a deployment: enrolment then waits for its sites, up to the deadline, and one that comes later joins at the next round.
    """

    def __init__(
        self,
        study: Study,
        task: Task,
        folder: RunFolder,
        *,
        observe: Callable[[RoundRecord], None] = lambda record: None,
        witness: Witness | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._witness = witness
        self._membership = membership
        self._asking: dict[int, _Asking] = {}  # by node: those that have not enrolled
        self._nodes: dict[str, int] = {}  # of the enrolled, by name
        self._told = ""
        self._sum_keys: dict[str, Ed25519PublicKey] = {}  # by site, where updates are aggregated securely
        self._study = study
        self._task = task
        self._noise = planned_noise_std(study, task)
        self._folder = folder
        self._observe = observe
        model = task.model()
        self._architecture = architecture_hash(model)
        trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.site_level = plan_site_level(study)
        self._trainable = trainable
        self._strategy = FederatedStrategy(
            study.strategy, seed=study.seed, trainable=trainable, statistics=task.statistics, noised_statistics=study.noised_statistics,
            personal=personal_names(study.strategy, model), local_steps=study.training.local_steps,
            learning_rate=lambda number: learning_rate_at(study.training, number, study.rounds.count), site_noise=self._site_noise(trainable),
        )  # fmt: skip
        self._epsilons: dict[str, float] = {}  # by site, as last told
        self._not_counted: dict[str, NotCounted] = {}  # by site, where the last one asked for did not
        self._open_questions: list[OpenQuestion] = []  # of the checkpoint that a run goes on from: of buffered aggregation
        self._open_models: dict[int, Parameters] = {}  # by round, what they ask about
        self.history = History()

    def _site_noise(self, trainable: frozenset[str]) -> SiteNoise | None:
        """Seeded in a simulation alone: where hospitals are real, by a witness or by membership, its key is the operating system's, whatever a study says.

        Frozen parameters and buffers, which no site moves but in a task's `refine`, are left as they are, without noise.
        """
        plan, study = self.site_level, self._study
        if plan is None:
            return None
        virtual = self._witness is None and self._membership is None
        released = trainable if self._task.refine is None else frozenset(self._task.model().state_dict())
        return SiteNoise(
            max_norm=plan.max_norm, noise_multiplier=plan.noise_multiplier, released=released,
            seed=study.seed if virtual and study.privacy.noise_source == "seeded" else None,
        )  # fmt: skip

    def run(self, grid: Grid) -> History:
        """The whole study, from the last checkpoint in the run's folder where there is one.

        Raises:
            QuorumLostError, BudgetExhaustedError, PolicyRefusedError, DataError: too few sites can or will take part.
            StorageError: the run's folder cannot be written.
        """
        self._enrol(grid)
        start = self._resume()
        self._reopen_folds(grid, start.fold)
        for record in self._folder.rounds():
            self._epsilons |= {site.name: site.epsilon for site in record.sites if site.epsilon is not None}
            self._note_not_counted(record)
        first, waiting = start.fold, [start]
        del start  # it is as large as the model: what runs the fold lets go of it
        for fold in range(first, self._study.evaluation.folds + 1):
            self._run_fold(grid, waiting.pop() if waiting else self._first_checkpoint(fold))
        return self.history

    def _first_checkpoint(self, fold: int) -> Checkpoint:
        return Checkpoint(fold=fold, round_number=0, parameters=self.first_parameters(), state={})

    def first_parameters(self) -> Parameters:
        """What the first round sends: from the study's seed, or what `server.warm_start` put into the run's folder."""
        if self._folder.start.started_from is not None:
            return self._folder.read_model(START, self._architecture)
        return initial_parameters(self._task.model(), self._study.seed)

    def _resume(self) -> Checkpoint:
        checkpoint = self._folder.read_checkpoint()
        if checkpoint is None:
            self._folder.keep_rounds([])
            return self._first_checkpoint(1)
        done = [record for record in self._folder.rounds() if (record.fold, record.round) <= (checkpoint.fold, checkpoint.round_number)]
        self._folder.keep_rounds(done)
        return checkpoint

    def _reopen_folds(self, grid: Grid, before: int) -> None:
        """The folds that an earlier, interrupted execution finished: their models are read back and evaluated again."""
        for fold in range(1, before):
            self._strategy.fold = fold
            parameters = self._folder.read_model(f"fold-{fold}", self._architecture)
            self.history.folds.append(FoldResult(fold=fold, parameters=parameters, statistics=self._close_fold(grid, fold, parameters)))

    def _enrol(self, grid: Grid) -> None:
        """Everybody is asked; in a deployment again and again, until all have answered, the quorum is there, or the deadline has passed."""
        deadline = time.monotonic() + self._study.rounds.deadline_seconds
        self._ask_to_enrol(
            grid, timeout=min(ENROL_SECONDS, self._study.rounds.deadline_seconds) if self._membership else self._study.rounds.deadline_seconds
        )
        while self._membership is not None and not self._enough() and time.monotonic() < deadline:
            self._note_absent()
            self._tell_waiting()
            time.sleep(ENROL_PAUSE_SECONDS)
            self._asking = {node_id: asking.hurried() for node_id, asking in self._asking.items()}
            self._ask_to_enrol(grid, timeout=max(1.0, min(ENROL_SECONDS, deadline - time.monotonic())))
        self._note_absent()
        logger.info(
            "%s enrolled%s",
            _sites(len(self.history.enrolled)),
            "".join(f"; {name}: {why}" for name, why in sorted(self.history.refused.items())),
        )
        self._hold_quorum(len(self.history.enrolled), self.history.refused, what="enrolment")

    def _enough(self) -> bool:
        """Whether the study may begin: all that are expected, or as many as it requires."""
        assert self._membership is not None
        required = self._study.rounds.require
        if required != "all" and len(self.history.enrolled) >= required:
            return True
        undecided = self._membership.expected() - self.history.enrolled.keys() - {name for name, why in self.history.refused.items() if is_final(why)}
        return not undecided

    def _tell_waiting(self) -> None:
        told = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.history.refused.items()))
        if told != self._told:
            logger.info("waiting for sites, %d enrolled; %s", len(self.history.enrolled), told)
            self._told = told

    def _note_absent(self) -> None:
        """A site that has never answered is named as missing."""
        if self._membership is not None:
            absent = self._membership.expected() - self.history.enrolled.keys() - self.history.refused.keys()
            self.history.refused.update(dict.fromkeys(absent, LATE))

    def _welcome(self, grid: Grid) -> None:
        """Sites that came late, or whose hospital has decided since, join from this round on; a node that is not ready is asked ever less often."""
        if self._membership is not None:
            self._ask_to_enrol(grid, timeout=min(WELCOME_SECONDS, self._study.rounds.deadline_seconds))

    def _ask_to_enrol(self, grid: Grid, *, timeout: float) -> None:
        key = None if self._witness is None else self._witness.public_key
        content = EnrolTask(
            run=self._folder.name, study=self._study.to_table(), task_fingerprint=self._task.fingerprint(), coordinator_key=key, heads=self._heads(),
            version=None if self._membership is None else installed_version(),
        )  # fmt: skip
        record, known = encode(content), set(self._nodes.values())
        nodes = [node_id for node_id in sorted(grid.get_node_ids()) if node_id not in known and self._asking.get(node_id, NEVER_ASKED).is_due]
        messages = [Message(record, node_id, MessageType.QUERY) for node_id in nodes]
        silent = set(nodes)
        for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
            silent.discard(reply.metadata.src_node_id)
            self._take_enrolment(reply)
        for node_id in silent:
            self._refuse(node_id, LATE)
        self._remember({site.name: site.ledger_head for site in self.history.enrolled.values()} if messages else {})
        self._strategy.set_members(self._member(site) for site in self.history.enrolled.values())

    def _member(self, site: Enrolled) -> Member:
        weight = self._size_of(site) if self._study.strategy.weights == "declared" else 1
        if self._study.secure_aggregation is not None:
            weight = min(weight, self._study.secure_aggregation.max_weight)
        weight = 1 if self._study.distributed_noise else weight
        shape = shape_site(self._study, self._size_of(site))
        return Member(
            name=site.name, node_id=self._nodes[site.name], weight=min(max(1, weight), MAX_WEIGHT), steps=shape.shared_steps,
            batch=shape.expected_batch_size, noise=self._noise_of(site),
        )  # fmt: skip

    def _noise_of(self, site: Enrolled) -> float:
        if not isinstance(self._study.strategy, QFedAvg):
            return 0.0
        num_parameters = sum(value.size for name, value in get_parameters(self._task.model()).items() if name in self._trainable)
        return noise_energy(self._study, plan_site(self._study, self._size_of(site)), num_parameters)

    def _size_of(self, site: Enrolled) -> int:
        """What a site may weigh: what it says now, and no more than what it said when it was approved."""
        signed = None if self._membership is None else self._membership.declared_size(site.name)
        return site.declared_size if signed is None else min(site.declared_size, signed)

    def _take_enrolment(self, reply: Message) -> None:
        node_id = reply.metadata.src_node_id
        if reply.has_error():
            self._refuse(node_id, failure_reason(reply))
            return
        try:
            content: Content = decode(reply.content, Enrolled, Refused)
        except ProtocolError as error:
            self._refuse(node_id, f"{error.code} {error.what}")
            return
        if self._membership is not None and isinstance(content, Enrolled | Refused) and content.name != self._membership.name_of(node_id):
            self._refuse(node_id, "E102 expected the name on the roster, got another")
        elif isinstance(content, Refused):
            self._refuse(node_id, plain_text(f"{content.code} {content.reason}"), name=content.name)
        elif isinstance(content, Enrolled):
            taken = content.name in self.history.enrolled
            if taken or not 1 <= self._size_of(content) <= MAX_WEIGHT:
                own = f"node {node_id}" if taken else content.name
                expected = "a name of its own" if taken else f"a declared size of 1 to {MAX_WEIGHT}"
                self._refuse(node_id, f"{ProtocolError.code} expected {expected}, got another", name=own)
                return
            secure = self._study.secure_aggregation is not None
            key = self._key_of(content) if secure else None
            if secure and key is None:
                self._refuse(node_id, f"{ProtocolError.code} expected its key for secure sums, as on the roster, got another", name=content.name)
                return
            self.history.refused.pop(content.name, None)
            self.history.enrolled[content.name] = content
            if key is not None:
                self._sum_keys[content.name] = key
            self._nodes[content.name] = node_id

    def _key_of(self, site: Enrolled) -> Ed25519PublicKey | None:
        """By which its keys for secure sums are verified: in a deployment it is the one that the roster has."""
        known = None if self._membership is None else self._membership.public_key(site.name)
        if site.sum_key is None or known not in (None, site.sum_key):
            return None
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(site.sum_key))

    def _refuse(self, node_id: int, reason: str, *, name: str | None = None) -> None:
        known = f"node {node_id}" if self._membership is None else self._membership.name_of(node_id)
        self.history.refused[name or known] = reason
        self._asking[node_id] = self._asking.get(node_id, NEVER_ASKED).after(reason)

    def _run_fold(self, grid: Grid, start: Checkpoint) -> None:
        fold, first, arrays = start.fold, start.round_number + 1, to_array_record(start.parameters)
        self._strategy.fold = fold
        self._strategy.state, self._open_questions, self._open_models = take_open_questions(start.state, start.parameters)
        del start
        for number in range(first, self._study.rounds.count + 1):
            arrays = self._run_round(grid, fold, number, arrays)
        parameters = from_array_record(arrays)
        name = "final" if self._study.evaluation.folds == 1 else f"fold-{fold}"
        self._folder.write_model(name, parameters, model_header(self._study, self._task))
        statistics = self._close_fold(grid, fold, parameters)
        self.history.folds.append(FoldResult(fold=fold, parameters=parameters, statistics=statistics))

    def _run_round(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> ArrayRecord:
        self._welcome(grid)
        started, clock = time.monotonic(), _clock_of(grid)
        train = self._train_in_turn if isinstance(self._study.strategy, Cyclic) else self._train_together
        if isinstance(self._study.strategy, FedBuff):
            train = self._train_as_they_come
        if self._study.secure_aggregation is not None:
            train = self._train_securely
        answers, updated = train(grid, fold, number, arrays)
        self._take_privacy(answers)
        line = self._round_record(fold, number, answers, time.monotonic() - started)
        if clock is not None:
            line = line.model_copy(update={"virtual_seconds": ((_clock_of(grid) or 0) - clock) / 1e9})
        self._folder.append_round(line)
        self._note_not_counted(line)
        state = with_open_questions(self._strategy.state, self._at_work(grid))
        self._folder.write_checkpoint(Checkpoint(fold=fold, round_number=number, parameters=from_array_record(updated), state=state))
        self._observe(line)
        return updated

    def _train_together(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> tuple[dict[str, Answer], ArrayRecord]:
        """All that are sampled train on the same model."""
        record = encode(self._train_task(fold, number), parameters=arrays)
        answers = self._collect(grid, self._strategy.configure_train(number, _arrays(record), config_of(record), grid))
        self._hold_round(number, answers)
        updated, _ = self._strategy.aggregate_train(number, [])
        assert updated is not None
        return answers, updated

    def _train_in_turn(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> tuple[dict[str, Answer], ArrayRecord]:
        """Each trains on what the one before it made; one without a usable update is passed over."""
        answers: dict[str, Answer] = {}
        for name in self._strategy.turns(number):
            record = encode(self._train_task(fold, number), parameters=arrays)
            answers |= self._collect(grid, self._strategy.configure_turn(number, _arrays(record), config_of(record), name))
            updated, _ = self._strategy.aggregate_train(number, [])
            arrays = arrays if updated is None else updated
        self._hold_round(number, answers)
        return answers, arrays

    def _train_securely(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> tuple[dict[str, Answer], ArrayRecord]:
        """All that are sampled train on the same model, and only the sum of their updates is learnt. A sum that fails is begun anew where the study
        waits for who is missing: a site gives the same update again, and nothing more is charged."""
        deadline = time.monotonic() + self._study.rounds.deadline_seconds
        for attempts in reversed(range(MAX_ATTEMPTS if self._study.rounds.on_missing == "wait" else 1)):
            try:
                return self._sum_updates(grid, fold, number, arrays, deadline)
            except (QuorumLostError, ProtocolError) as error:
                if not attempts or time.monotonic() >= deadline:
                    raise QuorumLostError(f"round {number}: {error.what}", error.remedy or MEND) from error
                logger.warning("round %d is begun anew: %s", number, error.what)
        raise AssertionError("there is a last attempt")

    def _sum_updates(
        self, grid: Grid, fold: int, number: int, arrays: ArrayRecord, deadline: float
    ) -> tuple[dict[str, Answer], ArrayRecord]:  # fmt: skip
        task, noise = (
            self._train_task(fold, number),
            {name: self.history.enrolled[name].noise_multiplier or 0.0 for name in self._strategy.sampled(number)},
        )
        secure = SecureSum(sum_setting(self._study, self._task, task, from_array_record(arrays), noise), roster=self._sum_keys)
        answers = {name: Answer(name=name, status="missing", reason=LATE) for name in noise}
        for stage in STAGES:
            if stage == Stage.MASK_INPUT:
                messages = self._strategy.configure_secure(arrays, task, secure)
                self._strategy.take_replies(grid.send_and_receive(messages, timeout=max(0.0, deadline - time.monotonic())))
                assert self._strategy.round is not None
                answers |= {name: self._believed(name, answer) for name, answer in self._strategy.round.answers.items()}
                self._hold_round(number, answers)
            else:
                failed = ask_stage(grid, secure, self._nodes, deadline)
                answers |= failed if stage != Stage.UNMASK else {}  # the last stage takes nobody out of the sum
            secure.close_stage()
        if secure.setting.form.noise is None:
            return answers, self._strategy.aggregate_secure(secure.total)
        return answers, self._strategy.aggregate_gradients(secure.total, spacing=secure.setting.form.noise.grid.spacing)

    def _train_as_they_come(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> tuple[dict[str, Answer], ArrayRecord]:
        """Who is idle trains on this model; the round ends with the last update that the buffer takes, and who is at work then works on.

        A site has the study's deadline from when it was asked. When nobody is at work any more the round ends too, and the quorum decides.
        """
        arriving, deadline = _arriving(grid), self._study.rounds.deadline_seconds
        self._ask_once_more(arriving, fold)
        record = encode(self._train_task(fold, number), parameters=arrays)
        messages = self._strategy.configure_work(number, _arrays(record), config_of(record), self._strategy.idle(number))
        asked = {message.metadata.dst_node_id: message for message in messages}
        left = dict.fromkeys(asked, MAX_ATTEMPTS - 1 if self._study.rounds.on_missing == "wait" else 0)
        arriving.ask(messages, seconds=deadline)
        for reply in arriving.arrivals():
            node_id, answer = reply.metadata.src_node_id, self._strategy.take_arrival(reply)
            del reply  # before the next one is fetched
            if self._strategy.is_full:
                break
            if answer is not None and answer.status == "failed" and left.get(node_id, 0) > 0:
                left[node_id] -= 1
                self._strategy.reopen(answer.name)
                arriving.ask([asked[node_id]], seconds=deadline)
        answers = self._answers_so_far(arriving)
        self._hold_round(number, {name: answer for name, answer in answers.items() if answer.status != "at work"})
        updated, _ = self._strategy.aggregate_train(number, [])
        assert updated is not None
        return answers, updated

    def _ask_once_more(self, grid: ArrivalGrid, fold: int) -> None:
        """Of a run that is resumed: who was at work at the checkpoint is asked the same again, and has done as much of it where that is known."""
        for number, model in sorted(self._open_models.items()):
            begun = {question.name: question.nanoseconds for question in self._open_questions if question.round_number == number}
            record = encode(self._train_task(fold, number), parameters=to_array_record(model))
            messages = self._strategy.configure_work(number, _arrays(record), config_of(record), sorted(begun))
            nodes = {self._nodes[name]: nanoseconds for name, nanoseconds in begun.items() if name in self._nodes}
            grid.ask(messages, seconds=self._study.rounds.deadline_seconds, begun=nodes)
        self._open_questions, self._open_models = [], {}

    def _answers_so_far(self, grid: ArrivalGrid) -> dict[str, Answer]:
        """What came in this round; "missing" are those whose time was over in it, and "at work" who has time left."""
        assert self._strategy.round is not None
        answers = {name: self._believed(name, answer) for name, answer in self._strategy.round.answers.items()}
        late = self._strategy.forget_all_but(grid.at_work())
        answers |= {name: Answer(name=name, status="missing", reason=LATE) for name in late}
        return answers | {name: Answer(name=name, status="at work") for name in self._strategy.at_work}

    def _at_work(self, grid: Grid) -> dict[str, tuple[int, AtWork]]:
        """By site, the round in which it was asked what it has not answered yet, and the question."""
        if not self._strategy.at_work:
            return {}
        working = _arriving(grid).at_work()
        return {name: (question.number, working[self._nodes[name]]) for name, question in self._strategy.at_work.items()}

    def _train_task(self, fold: int, number: int) -> TrainTask:
        return TrainTask(
            run=self._folder.name, study_hash=self._study.fingerprint(), round=number, fold=fold, heads=self._heads(), not_counted=self._told_sites()
        )  # fmt: skip

    def _hold_round(self, number: int, answers: dict[str, Answer]) -> None:
        num_usable = sum(answer.status == "ok" for answer in answers.values())
        self._hold_quorum(num_usable, _reasons(answers), what=f"round {number}")
        self._hold_rule(num_usable, what=f"round {number}")

    def _take_privacy(self, answers: dict[str, Answer]) -> None:
        told = {name: answer.privacy for name, answer in answers.items() if answer.privacy is not None}
        self.history.privacy.update(told)
        self._epsilons.update({name: privacy.epsilon for name, privacy in told.items()})
        self._remember({name: answer.ledger_head for name, answer in answers.items()})

    def _note_not_counted(self, record: RoundRecord) -> None:
        """Which sites' last updates did not count by the coordinator's own judgement, from the rounds on disk alone: a resumed run asks alike."""
        for site in record.sites:
            if site.status in ("failed", "missing") and site.reason is not None:
                self._not_counted[site.name] = NotCounted(fold=record.fold, round=record.round, reason=site.reason[:MAX_REASON])
            elif site.status not in ("not asked", "at work"):
                self._not_counted.pop(site.name, None)

    def _told_sites(self) -> dict[str, NotCounted]:
        return dict(sorted((name, told) for name, told in self._not_counted.items() if name in self.history.enrolled)[:MOST_TOLD])

    def _heads(self) -> dict[str, WitnessedHead]:
        return {} if self._witness is None else self._witness.heads()

    def _remember(self, shown: dict[str, str | None]) -> None:
        if self._witness is not None:
            self._witness.remember({name: head for name, head in shown.items() if head is not None})

    def _collect(self, grid: Grid, messages: list[Message]) -> dict[str, Answer]:
        """The answers of all asked sites; those without one are "missing". With on_missing = "wait" they are asked again until the deadline."""
        assert self._strategy.round is not None
        current = self._strategy.round
        deadline = time.monotonic() + self._study.rounds.deadline_seconds
        attempts = MAX_ATTEMPTS if self._study.rounds.on_missing == "wait" else 1
        for _ in range(attempts):
            answered = {current.asked[name].node_id for name, answer in current.answers.items() if answer.status != "failed"}
            unanswered = [message for message in messages if message.metadata.dst_node_id not in answered]
            remaining = deadline - time.monotonic()
            if not unanswered or remaining <= 0:
                break
            for name in [name for name, answer in current.answers.items() if answer.status == "failed"]:
                del current.answers[name]
            ask = grid.send_in_blocks if isinstance(grid, BlockGrid) else grid.send_and_receive
            self._strategy.take_replies(ask(unanswered, timeout=remaining))
        late = Answer(name="", status="missing", reason=LATE)
        return {name: self._believed(name, current.answers.get(name, late)) for name in current.asked}

    def _believed(self, name: str, answer: Answer) -> Answer:
        """The answer, without its statistics where they could not be those of the patients that this site declared."""
        if answer.statistics is None:
            return answer
        try:
            check_statistics(self._task, answer.statistics, declared=self._declared_num_test(name), noise=self._noise)
        except ProtocolError as error:
            logger.warning("site %s: %s %s; left out of the metrics", name, error.code, error.what)
            return replace(answer, statistics=None, reason=f"{error.code} {error.what}")
        return answer

    def _declared_num_test(self, name: str) -> int:
        """Test patients of a fold, as the site says, and no more than the training patients that it declared when it was approved."""
        enrolled, folds = self.history.enrolled[name], self._study.evaluation.folds
        tested = enrolled.declared_num_test if folds == 1 else math.ceil(enrolled.declared_num_patients / folds)
        signed = None if self._membership is None else self._membership.declared_size(name)
        return tested if signed is None else min(tested, signed)

    def _hold_quorum(self, num_usable: int, reasons: dict[str, str], *, what: str) -> None:
        """Return where the round counts.

        Raises:
            the error of the sites' own refusals where all refused alike (budget, policy, data), else QuorumLostError; it names them.
        """
        rounds = self._study.rounds
        complete = not reasons
        needed = 1 if rounds.require == "all" else rounds.require
        if num_usable >= needed and (complete or rounds.on_missing == "proceed" or rounds.require != "all"):
            return
        told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items())) or "no site answered"
        expected = "all sites" if rounds.require == "all" else _sites(needed)
        kind, remedy = _common_error(reasons, num_usable)
        raise kind(f"{what}: expected usable answers of {expected}, got {num_usable}: {told}", remedy)

    def _hold_rule(self, num_usable: int, *, what: str) -> None:
        """Return where the strategy's own promise holds with so many updates."""
        strategy = self._study.strategy
        if isinstance(strategy, FedBuff) and self._study.rounds.require != "all":
            return  # the study itself says how much of a buffer is enough
        if num_usable < strategy.least_updates:
            raise QuorumLostError(
                f"{what}: strategy {strategy.name} needs at least {strategy.least_updates} usable updates, got {num_usable}",
                "ask more sites, or let the strategy need fewer (tolerated, buffer_size)",
            )

    def _round_record(self, fold: int, number: int, answers: dict[str, Answer], seconds: float) -> RoundRecord:
        refused = {
            name: Answer(name=name, status="missing" if reason == LATE else "refused", reason=reason) for name, reason in self.history.refused.items()
        }
        everyone = {**{name: Answer(name=name, status="not asked") for name in self.history.enrolled}, **refused, **answers}
        total = add_statistics(answer.statistics for _, answer in sorted(answers.items()) if not answer.staleness)  # else of an older model
        evaluation = evaluate(
            self._task,
            total,
            resamples=self._study.evaluation.bootstrap,
            seed=self._study.seed,
            path=("round", fold, number),
            only=self._task.primary_metric,
        )
        return RoundRecord(
            round=number,
            fold=fold,
            evaluated_round=number - 1,
            sites=tuple(self._site_round(name, answer) for name, answer in sorted(everyone.items())),
            metrics=evaluation.metrics,
            metrics_ci95=evaluation.ci95,
            seconds=seconds,
            site_level_epsilon=None if self.site_level is None else self.site_level.epsilon_after((fold - 1) * self._study.rounds.count + number),
        )

    def _site_round(self, name: str, answer: Answer) -> SiteRound:
        metrics = None
        if answer.statistics is not None:
            metrics = evaluate(self._task, answer.statistics, resamples=0, seed=0, path=()).metrics
        return SiteRound(
            name=name,
            status=answer.status,
            reason=answer.reason,
            num_test=self._num_test(name, answer),
            metrics=metrics,
            epsilon=self._epsilons.get(name),
            staleness=answer.staleness,
        )

    def _num_test(self, name: str, answer: Answer) -> int | None:
        """As declared; with cross-validation each fold tests others, so what the released counts say."""
        if self._study.evaluation.folds > 1:
            return count_tested(self._task, answer.statistics or {})
        enrolled = self.history.enrolled.get(name)
        return enrolled.declared_num_test if enrolled else None

    def _close_fold(self, grid: Grid, fold: int, parameters: Parameters) -> dict[str, Statistics]:
        number = self._study.rounds.count
        if isinstance(self._study.strategy, FedBuff):  # at a site, the closing question makes stale what it is still at work on
            _arriving(grid).dismiss()
            self._strategy.forget_all_but(())
        content = EvaluateTask(
            run=self._folder.name, study_hash=self._study.fingerprint(), round=number, fold=fold, heads=self._heads(), not_counted=self._told_sites()
        )  # fmt: skip
        record = encode(content, parameters=parameters)
        messages = self._strategy.configure_evaluate(number, _arrays(record), config_of(record), grid)
        answers = self._collect(grid, messages)
        self._take_privacy(answers)
        for name, reason in sorted(_reasons(answers).items()):
            logger.warning("closing evaluation of fold %d: %s: %s", fold, name, reason)
        if all(answer.status != "ok" for answer in answers.values()):
            self._hold_quorum(0, _reasons(answers), what=f"closing evaluation of fold {fold}")
        return {name: answer.statistics for name, answer in sorted(answers.items()) if answer.statistics is not None}


MEND = "mend the named sites and resume the run, or ask fewer with [rounds] require"
COMMON_ERRORS: tuple[tuple[type[WardroundError], str, str], ...] = (
    (BudgetExhaustedError, "E7", "ask for less (epsilon, rounds), or let the hospitals raise their limits"),
    (NotApprovedError, NotApprovedError.code, "each hospital decides with 'wardround site approve'; then resume the study"),
    (PolicyRefusedError, "E6", "change the study to what the sites' policies allow"),
    (DataError, "E5", "the sites' own logs say what their data lack"),
    (ConfigurationError, "E3", "correct the study, or install the same version at both sides"),
    (StorageError, "E103", "free space, then resume the run"),
    (QuorumLostError, "E102", "if the updates grew without bound, lower training.learning_rate and start a new run"),
)


def _common_error(reasons: dict[str, str], num_usable: int) -> tuple[type[WardroundError], str]:
    """The error of the sites' own reasons and its remedy where no site can go on and all say alike, else `QuorumLostError`."""
    for kind, prefix, remedy in COMMON_ERRORS:
        if num_usable == 0 and reasons and all(reason.startswith(prefix) for reason in reasons.values()):
            return kind, remedy
    return QuorumLostError, MEND


def _arrays(record: RecordDict) -> ArrayRecord:
    arrays = record[PARAMETERS]
    assert isinstance(arrays, ArrayRecord)
    return arrays


def _arriving(grid: Grid) -> ArrivalGrid:
    if not isinstance(grid, ArrivalGrid):
        raise ConfigurationError(
            "strategy fedbuff: expected an engine that hands over answers as they come, got one that waits for all", "choose another strategy here"
        )
    return grid


def _clock_of(grid: Grid) -> int | None:
    """Nanoseconds, where the grid has a clock of its own."""
    return grid.virtual_nanoseconds if isinstance(grid, ClockedGrid) else None


def _sites(number: int) -> str:
    return "1 site" if number == 1 else f"{number} sites"


def _reasons(answers: dict[str, Answer]) -> dict[str, str]:
    return {name: answer.reason or answer.status for name, answer in answers.items() if answer.status != "ok"}
