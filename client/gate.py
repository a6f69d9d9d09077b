"""The gate of a hospital: what comes in, what is decided, what leaves.

A question passes, in this order: the coordinator's seal, its freshness, the audit log, the version, the hospital's approval, and then the site's
own policy, ledger and trainer. The answer is written down before it is sealed and handed back. Nothing passes outward but the declared
keys of `shared.messages`.
"""

import contextlib
import functools
import hashlib
import logging
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from client.app import answer_record, refusal
from client.approvals import Approvals, Asked, what_is_asked
from client.bench import AskedAgainError, Bench, Place
from client.door import NO_ANSWER
from client.hospital import AUDIT, Hospital
from client.policy import refuse_faults
from client.real_site import open_site
from client.site import Site
from shared.audit import AuditLog, Value
from shared.cohort import Cohort
from shared.errors import (
    PolicyRefusedError,
    ProtocolError,
    SealError,
    SiteFileError,
    StorageError,
    VersionMismatchError,
    WardroundError,
    describe_exception,
)
from shared.files import storage_errors, write_atomic
from shared.kit import installed_version
from shared.messages import (
    MASKED,
    PARAMETERS,
    STATISTICS,
    Content,
    Enrolled,
    EnrolTask,
    Evaluated,
    EvaluateTask,
    Refused,
    Stopped,
    StopTask,
    Trained,
    TrainTask,
    decode,
    encode,
)
from shared.seals import SealedTask, open_task, packed_message, seal_reply
from shared.secure_sum.messages import (
    AdvertisedKeys,
    AdvertiseKeysTask,
    SecureTrained,
    SecureTrainTask,
    SharedKeys,
    ShareKeysTask,
    SignedSurvivors,
    SignSurvivorsTask,
    SumMessage,
    Unmasked,
    UnmaskTask,
)
from shared.study import NAME_PATTERN, Study
from shared.task import Task, resolve_task

Details = dict[str, Value]
Asking = EnrolTask | TrainTask | SecureTrainTask | EvaluateTask | AdvertiseKeysTask | ShareKeysTask | SignSurvivorsTask | UnmaskTask
MOST_SECONDS = 86_400.0  # that a question is worked on, whatever it says itself; a longer round is not of this world, and is asked again
RECEIVED = "task received"  # the event in the audit log that names a question's nonce
MAX_OPEN_RUNS = 4
STUDIES = "studies"  # folder in a site's state: what was agreed to, so that a daemon that starts again goes on

logger = logging.getLogger(__name__)


class Gate:
    """Answers the coordinator's questions for one hospital.

    Args:
        noise_seed: for tests alone, see `SiteSettings`.
    """

    def __init__(self, hospital: Hospital, *, noise_seed: int | None = None) -> None:
        self._hospital = hospital
        self._written = hospital.site_file.stat().st_mtime_ns  # site.toml, when it was read
        self._noise_seed = noise_seed
        self.audit = AuditLog(hospital.state / AUDIT, owner=hospital.name, role="site", signer=hospital.signer)
        self._approvals = Approvals(hospital.state, hospital.signer, hospital.file.approve_in_advance)
        self._bench: Bench[RecordDict] = Bench()
        self._lock = threading.Lock()
        self._nonces = {_short(str(details.get("nonce"))) for details in self.audit.details_of(RECEIVED)}
        self._runs: OrderedDict[str, _OpenRun] = OrderedDict()  # used on the bench's thread alone
        self._cohorts: dict[str, Cohort] = {}

    def answer(self, question: bytes) -> bytes:
        """The sealed answer to a sealed question; empty where it is no question of the coordinator's to this site.

        A question is answered once: its nonce is in the audit log before anything is done for it, so that a question of an earlier life of this
        daemon is known as one. `NO_ANSWER` where the same was asked again, with a new nonce, and a later asking gets the answer.
        """
        try:
            record, task = open_task(_parse(question), site=self._hospital.name, coordinator=self._hospital.coordinator_key)
            self._check_fresh(task)
        except WardroundError as error:
            with contextlib.suppress(WardroundError):  # on a full disk, too, it gets nothing
                self._log("task refused", {"outcome": "refused", "reason": f"{error.code} {describe_exception(error)[1]}", "bytes": len(question)})
            return b""
        try:
            reply = self._reply(record, task, len(question))
        except AskedAgainError:
            return NO_ANSWER
        return bytes(recorddict_to_proto(reply).SerializeToString())

    def close(self) -> None:
        """Stop what is under way, and release ledgers."""
        self._bench.close(self._close_sites)

    def _close_sites(self) -> None:
        for run in self._runs.values():
            run.site.close()
        self._runs.clear()

    def _reply(self, record: RecordDict, task: SealedTask, num_bytes: int) -> RecordDict:
        asked: Content | None = None
        try:
            asked = decode(
                record, EnrolTask, TrainTask, SecureTrainTask, EvaluateTask, StopTask, AdvertiseKeysTask, ShareKeysTask, SignSurvivorsTask, UnmaskTask
            )
            self._log(RECEIVED, _came(asked, task, num_bytes))
            content = self._decide(asked, record, task)
        except AskedAgainError:
            raise
        except Exception as error:  # the border of the site: nothing of an exception may pass it but a code
            content = refusal(self._hospital.name, error)
        try:
            head = self.audit.append("answer sent", _leaves(content, asked))
        except WardroundError as error:  # what cannot be written down does not leave
            content, head = refusal(self._hospital.name, error), self.audit.head
        return seal_reply(content, task, signer=self._hospital.signer, audit_head=head)

    def _decide(self, asked: Content, record: RecordDict, task: SealedTask) -> RecordDict:
        if isinstance(asked, StopTask):
            self._bench.cancel(asked.run)
            return encode(Stopped(name=self._hospital.name))
        assert isinstance(asked, Asking)
        place = Place(run=asked.run) if isinstance(asked, EnrolTask) else _place(asked)
        return self._bench.do(place, task.content, functools.partial(self._work, asked, record), seconds=min(task.seconds, MOST_SECONDS))

    def _check_fresh(self, task: SealedTask) -> None:
        with self._lock:
            if _short(task.nonce) in self._nonces:
                raise SealError("expected a task asked for the first time, got one again (a replay)")
            self._nonces.add(_short(task.nonce))  # which takes less memory than its row on the disk

    def _log(self, event: str, details: Details) -> None:
        self.audit.append(event, details)

    # On the bench's thread -----------------------------------------------------------------------------------------------------

    def _work(self, asked: Asking, record: RecordDict) -> RecordDict:
        self._read_again()
        if isinstance(asked, EnrolTask):
            run = self._enrol(asked)
            return encode(run.enrolled)
        run = self._open_run(_where(asked).run)
        self._approvals.check(run.asked)  # an approval may have been withdrawn, or have expired
        return answer_record(run.site, asked, record)

    def _read_again(self) -> None:
        """A site.toml that was changed holds from the next task on: every study is then agreed to anew, under what it says now.

        Raises:
            SiteFileError: it does not fit, and nothing is done until it does.
        """
        written = self._hospital.site_file.stat().st_mtime_ns
        if written != self._written:
            try:
                self._hospital = Hospital.open(self._hospital.kit)
            except WardroundError as error:  # a key of site.toml, misspelled, is the hospital's own text
                raise SiteFileError(error.what, error.remedy) from None
            self._approvals = Approvals(self._hospital.state, self._hospital.signer, self._hospital.file.approve_in_advance)
            self._close_sites()
            self._cohorts.clear()
            self._log("site file read again", {"sha256": hashlib.sha256(self._hospital.site_file.read_bytes()).hexdigest()})
            self._written = written

    def _enrol(self, asked: EnrolTask) -> "_OpenRun":
        if asked.version != installed_version():
            versions = f"wardround {asked.version} at the coordinator, {installed_version()} at the site"
            raise VersionMismatchError(f"expected the same version, got {versions}", "install the same version at both sides", rule=versions)
        study = Study.from_table(asked.study, source="study")
        refuse_faults(study)  # before anybody is asked to approve it
        allowed = self._hospital.file.policy.allowed_tasks
        if study.task not in allowed:  # before anything is imported by that name
            rule = "policy.allowed_tasks"
            raise PolicyRefusedError(f"{rule}: expected one of {', '.join(allowed)}, got {study.task!r}", "ask the hospital", rule=rule)
        task = resolve_task(study.task)
        wanted = what_is_asked(study, task, self._hospital.file)
        try:
            how = self._approvals.check(wanted)
        except WardroundError:
            self._approvals.remember(wanted)
            raise
        self._log("study approved", {"study": study.name, "study_hash": wanted.study_hash, "run": asked.run, "how": how})
        site = self._site(asked.run, task)
        try:
            run = _OpenRun(site=site, enrolled=site.enrol(asked), asked=wanted)
            self._keep(asked)
        except BaseException:
            site.close()
            raise
        self._runs[asked.run] = run
        self._runs.move_to_end(asked.run)
        while len(self._runs) > MAX_OPEN_RUNS:
            self._runs.popitem(last=False)[1].site.close()
        return run

    def _site(self, run: str, task: Task) -> Site:
        known = self._runs.pop(run, None)
        if known is not None:
            known.site.close()
        file, path = self._hospital.file, self._hospital.site_file
        return open_site(
            path, file, task, opened=self._cohorts, still_wanted=self._bench.check_wanted, noise_seed=self._noise_seed,
            roster_key=self._hospital.signer,
        )  # fmt: skip

    def _open_run(self, name: str) -> "_OpenRun":
        """A run that was agreed to; where the daemon was started anew since, it is agreed to again, under policy, approval and ledger of today."""
        if name not in self._runs:
            path = self._agreed(name)
            if not path.exists():
                raise ProtocolError("expected a study that this site has agreed to, got one it has not")
            self._enrol(_read_agreed(path))
        self._runs.move_to_end(name)
        return self._runs[name]

    def _keep(self, asked: EnrolTask) -> None:
        path = self._agreed(asked.run)
        with storage_errors(path, "keep a study", remedy="check free space and permissions of the state folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, asked.model_dump_json())

    def _agreed(self, run: str) -> Path:
        return self._hospital.state / STUDIES / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenRun:
    """A run that the site has agreed to."""

    site: Site
    enrolled: Enrolled
    asked: Asked


def _read_agreed(path: Path) -> EnrolTask:
    try:
        with storage_errors(path, "read a study", remedy="check the permissions of the state folder"):
            return EnrolTask.model_validate_json(path.read_bytes())
    except ValidationError:
        raise StorageError(f"{path}: expected a study that was agreed to, got a damaged file", "delete it, and submit the study anew") from None


def _parse(question: bytes) -> RecordDict:
    try:
        return recorddict_from_proto(RecordDictProto.FromString(question))
    except (DecodeError, ValueError, TypeError, KeyError):
        raise ProtocolError("expected Flower records, got other bytes") from None


def _place(asked: TrainTask | SecureTrainTask | EvaluateTask | SumMessage) -> Place:
    where = _where(asked)
    return Place(run=where.run, fold=where.fold, round=where.round, closing=isinstance(asked, EvaluateTask))


def _where(asked: Content) -> Any:
    """What says which run and round this is of."""
    if isinstance(asked, SumMessage):
        return asked.of
    return asked.train if isinstance(asked, SecureTrainTask) else asked


def _came(asked: Content, task: SealedTask, num_bytes: int) -> Details:
    """What the audit log says of a question."""
    details: Details = {"kind": _kind(asked), "nonce": task.nonce, "content": task.content, "bytes": num_bytes, "audit_head": task.audit_head}
    for name in ("run", "study_hash", "round", "fold"):
        if hasattr(_where(asked), name):
            details[name] = getattr(_where(asked), name)
    if isinstance(asked, EnrolTask):
        study = asked.study.get("name")
        details["study"] = study if isinstance(study, str) and re.fullmatch(NAME_PATTERN, study) else "?"
    return details


def _leaves(content: RecordDict, asked: Content | None) -> Details:
    """What the audit log says of an answer: names, shapes, bytes, hash, epsilon."""
    reply = decode(content, Enrolled, Trained, SecureTrained, Evaluated, Stopped, Refused, AdvertisedKeys, SharedKeys, SignedSurvivors, Unmasked)
    details: Details = {"kind": _kind(reply), "outcome": "ok", "content": packed_message(content).content}
    for name in ("run", "study_hash", "round", "fold"):
        if asked is not None and hasattr(_where(asked), name):
            details[name] = getattr(_where(asked), name)
    if isinstance(reply, Refused):
        details |= {"outcome": "refused", "reason": f"{reply.code} {reply.reason}"}
    told = reply.trained if isinstance(reply, SecureTrained) else reply
    if isinstance(told, Trained | Evaluated) and told.privacy is not None:
        details |= {"epsilon": told.privacy.epsilon, "delta": told.privacy.delta, "steps": told.privacy.steps}
    for part in (PARAMETERS, MASKED, STATISTICS):
        arrays = content.get(part)
        if isinstance(arrays, ArrayRecord):
            details[part] = {
                "names": len(arrays),
                "shapes": [f"{name} {list(array.shape)} {array.dtype}"[:200] for name, array in list(arrays.items())[:50]],
                "bytes": sum(len(array.data) for array in arrays.values()),
            }
    return details


def _short(nonce: str) -> str:
    """Half of it: 128 bits are as good as unique."""
    return nonce[:32]


def _kind(content: Content) -> str:
    return str(type(content).model_fields["kind"].default)
