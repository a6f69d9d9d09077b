"""Who takes part in a run: sites are asked to enrol, agree or refuse, come late; and what is believed of what they say of themselves."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.aggregation import MAX_WEIGHT
from server.quorum import LATE, common_error, hold_quorum, is_final, plural_sites
from server.sampler import num_asked
from server.strategies.answers import Member, failure_reason
from server.strategies.q_fedavg import noise_energy
from server.sum_stages import more_sites, sum_form
from server.witness import Witness
from shared.errors import ProtocolError, QuorumLostError, WardroundError
from shared.kit import installed_version
from shared.messages import Content, Enrolled, EnrolTask, Refused, WitnessedHead, decode, encode, plain_text
from shared.models import get_parameters
from shared.pausing import next_pause
from shared.plan import plan_site, shape_site
from shared.strategy_options import QFedAvg
from shared.study import Study
from shared.task import Task

logger = logging.getLogger(__name__)

ENROL_PAUSE_SECONDS, MAX_PAUSE_SECONDS, ENROL_SECONDS, WELCOME_SECONDS = 2.0, 60.0, 60.0, 15.0
WAITING_PAUSE_SECONDS = 5.0  # at most, where everybody waits: so late may a stop be noticed


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


class Enrolment:
    """The sites of one run.

    Attributes:
        enrolled: what each site that agreed said of itself.
        refused: why each other does not take part, as it said or as is known.
        nodes: of the enrolled.
        sum_keys: long-lived Ed25519 keys of the enrolled, where updates are aggregated securely.

    Args:
        run: the run's name.
        witness, membership: as `server.coordinator.Coordinator` has them.
    """

    def __init__(self, study: Study, task: Task, *, run: str, witness: Witness | None, membership: Membership | None) -> None:
        self._study = study
        self._task = task
        self._run = run
        self._witness = witness
        self._membership = membership
        self._asking: dict[int, _Asking] = {}  # by node: those that have not enrolled
        self._told = ""
        self._sum_form = None if study.secure_aggregation is None else sum_form(study, task)
        self.enrolled: dict[str, Enrolled] = {}
        self.refused: dict[str, str] = {}
        self.nodes: dict[str, int] = {}
        self.sum_keys: dict[str, Ed25519PublicKey] = {}

    @property
    def real(self) -> bool:
        """Whether hospitals take part, and not virtual sites."""
        return self._witness is not None or self._membership is not None

    def begin(self, grid: Grid) -> None:
        """Everybody is asked; in a deployment again and again, until all have answered, the quorum is there, or the deadline has passed.

        Raises:
            the error of the sites' own refusals where all refused alike, else QuorumLostError: too few can or will take part.
        """
        began = time.monotonic()
        deadline = began + self._study.rounds.deadline_seconds
        self._ask_to_enrol(
            grid, timeout=min(ENROL_SECONDS, self._study.rounds.deadline_seconds) if self._membership else self._study.rounds.deadline_seconds
        )
        while self._membership is not None and not self._enough() and time.monotonic() < deadline:
            self._note_absent()
            self._tell_waiting()
            time.sleep(next_pause(time.monotonic() - began, shortest=ENROL_PAUSE_SECONDS, longest=WAITING_PAUSE_SECONDS))
            self._asking = {node_id: asking.hurried() for node_id, asking in self._asking.items()}
            self._ask_to_enrol(grid, timeout=max(1.0, min(ENROL_SECONDS, deadline - time.monotonic())))
        self._note_absent()
        logger.info(
            "%s enrolled%s",
            plural_sites(len(self.enrolled)),
            "".join(f"; {name}: {why}" for name, why in sorted(self.refused.items())),
        )
        try:
            hold_quorum(self._study, len(self.enrolled), self.refused, what="enrolment")
            self._hold_sum()
        except WardroundError as error:
            error.remedy += self._open_plans()
            raise

    def _asked_and_needed(self) -> tuple[int, int]:
        """How many of the sites that are enrolled would be asked in a round, and how many a secure sum of them needs."""
        asked = num_asked(len(self.enrolled), self._study.strategy.fraction)
        return asked, 0 if self._sum_form is None else self._sum_form.least_in_sum(asked)

    def _hold_sum(self) -> None:
        """Return where so many sites are enrolled that a round can have a secure sum; else nothing is begun.

        Raises:
            the error of the sites' own refusals where all that refused say alike, else QuorumLostError; it names them.
        """
        asked, needed = self._asked_and_needed()
        if asked >= needed:
            return
        told = "".join(f"; {name}: {reason}" for name, reason in sorted(self.refused.items()))
        kind, remedy = common_error(self.refused, 0)
        if kind is QuorumLostError:
            remedy = more_sites(self._study, asked)
        raise kind(f"enrolment: expected {needed} sites or more in a round, for a secure sum, got {asked}{told}", remedy)

    def _open_plans(self) -> str:
        """What is to be done at hospitals that had agreed when a study ends before it began: their plans count against their limits."""
        if not (self.real and self._study.private and self.enrolled):
            return ""
        names = ", ".join(sorted(self.enrolled))
        return f"; if this run will not go on, its plan is to be ended at {names}: 'wardround ledger close KIT {self._run}'"

    def _enough(self) -> bool:
        """Whether the study may begin: all that are expected, or as many as it requires."""
        assert self._membership is not None
        required = self._study.rounds.require
        asked, needed = self._asked_and_needed()
        if required != "all" and len(self.enrolled) >= required and asked >= needed:
            return True
        undecided = self._membership.expected() - self.enrolled.keys() - {name for name, why in self.refused.items() if is_final(why)}
        return not undecided

    def _tell_waiting(self) -> None:
        told = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.refused.items()))
        if told != self._told:
            logger.info("waiting for sites, %d enrolled; %s", len(self.enrolled), told)
            self._told = told

    def _note_absent(self) -> None:
        """A site that has never answered is named as missing."""
        if self._membership is not None:
            absent = self._membership.expected() - self.enrolled.keys() - self.refused.keys()
            self.refused.update(dict.fromkeys(absent, LATE))

    def welcome(self, grid: Grid) -> bool:
        """Sites that came late, or whose hospital has decided since, join from this round on; a node that is not ready is asked ever less often.

        Whether there may be new ones: nobody joins a simulation.
        """
        if self._membership is None:
            return False
        self._ask_to_enrol(grid, timeout=min(WELCOME_SECONDS, self._study.rounds.deadline_seconds))
        return True

    def _ask_to_enrol(self, grid: Grid, *, timeout: float) -> None:
        key = None if self._witness is None else self._witness.public_key
        content = EnrolTask(
            run=self._run, study=self._study.to_table(), task_fingerprint=self._task.fingerprint(), coordinator_key=key, heads=self.heads(),
            version=None if self._membership is None else installed_version(),
        )  # fmt: skip
        record, known = encode(content), set(self.nodes.values())
        nodes = [node_id for node_id in sorted(grid.get_node_ids()) if node_id not in known and self._asking.get(node_id, NEVER_ASKED).is_due]
        messages = [Message(record, node_id, MessageType.QUERY) for node_id in nodes]
        silent = set(nodes)
        for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
            silent.discard(reply.metadata.src_node_id)
            self._take_enrolment(reply)
        for node_id in silent:
            self._refuse(node_id, LATE)
        self.remember({site.name: site.ledger_head for site in self.enrolled.values()} if messages else {})

    def members(self) -> Iterator[Member]:
        """The enrolled, as they count in the mean."""
        return (self._member(site) for site in self.enrolled.values())

    def _member(self, site: Enrolled) -> Member:
        weight = self._size_of(site) if self._study.strategy.weights == "declared" else 1
        if self._study.secure_aggregation is not None:
            weight = min(weight, self._study.secure_aggregation.max_weight)
        weight = 1 if self._study.distributed_noise else weight
        shape = shape_site(self._study, self._size_of(site))
        return Member(
            name=site.name, node_id=self.nodes[site.name], weight=min(max(1, weight), MAX_WEIGHT), steps=shape.shared_steps,
            batch=shape.expected_batch_size, noise=self._noise_of(site),
        )  # fmt: skip

    def _noise_of(self, site: Enrolled) -> float:
        if not isinstance(self._study.strategy, QFedAvg):
            return 0.0
        model = self._task.model()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        num_parameters = sum(value.size for name, value in get_parameters(model).items() if name in trainable)
        return noise_energy(self._study, plan_site(self._study, self._size_of(site)), num_parameters)

    def _size_of(self, site: Enrolled) -> int:
        """What a site may weigh: what it says now, and no more than what it said when it was approved."""
        signed = None if self._membership is None else self._membership.declared_size(site.name)
        return site.declared_size if signed is None else min(site.declared_size, signed)

    def declared_num_test(self, name: str) -> int:
        """Test patients of a fold, as the site says, and no more than the training patients that it declared when it was approved."""
        enrolled, folds = self.enrolled[name], self._study.evaluation.folds
        tested = enrolled.declared_num_test if folds == 1 else math.ceil(enrolled.declared_num_patients / folds)
        signed = None if self._membership is None else self._membership.declared_size(name)
        return tested if signed is None else min(tested, signed)

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
            taken = content.name in self.enrolled
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
            self.refused.pop(content.name, None)
            self.enrolled[content.name] = content
            if key is not None:
                self.sum_keys[content.name] = key
            self.nodes[content.name] = node_id

    def _key_of(self, site: Enrolled) -> Ed25519PublicKey | None:
        """By which its keys for secure sums are verified: in a deployment it is the one that the roster has."""
        known = None if self._membership is None else self._membership.public_key(site.name)
        if site.sum_key is None or known not in (None, site.sum_key):
            return None
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(site.sum_key))

    def _refuse(self, node_id: int, reason: str, *, name: str | None = None) -> None:
        known = f"node {node_id}" if self._membership is None else self._membership.name_of(node_id)
        self.refused[name or known] = reason
        self._asking[node_id] = self._asking.get(node_id, NEVER_ASKED).after(reason)

    def heads(self) -> dict[str, WitnessedHead]:
        """What the sites' ledgers were last seen to end in, signed."""
        return {} if self._witness is None else self._witness.heads()

    def remember(self, shown: Mapping[str, str | None]) -> None:
        """Keep what the sites' ledgers end in now, by site."""
        if self._witness is not None:
            self._witness.remember({name: head for name, head in shown.items() if head is not None})
