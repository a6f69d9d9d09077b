"""A hospital of a provisioned federation behind its gate, and the coordinator's side of every question to it."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from client.approvals import Approvals, what_is_asked
from client.gate import Gate
from client.hospital import AUDIT, Hospital
from shared.audit import verify_audit
from shared.kit import SIGNING_KEY, SITE_FILE, installed_version, load_signing_key
from shared.messages import (
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
    decode_parameters,
    encode,
)
from shared.models import Parameters, initial_parameters, template_of
from shared.seals import Opened, SealedTask, open_reply, packed_message, seal_task
from shared.study import Study
from shared.task import Task, resolve_task
from tests.provisioned import approved, federation

TASK, NUM_PATIENTS = "breast-cancer", 200
STUDY = {
    "name": "tests", "task": TASK, "seed": 3, "rounds": {"count": 3}, "training": {"learning_rate": 0.3, "batch_size": 16, "local_steps": 2},
    "privacy": {"epsilon": 2.0, "delta": 1e-3, "max_grad_norm": 0.7, "noise_source": "os"}, "evaluation": {"bootstrap": 0},
}  # fmt: skip
SITE = """\
name = "{name}"
[cohort]
path = "patients.csv"
declared_size = 140
declared_test_size = 50
[policy]
max_epsilon = {max_epsilon}
max_delta = 1e-3
allowed_tasks = ["breast-cancer"]
allowed_metrics = ["auroc", "accuracy", "auprc", "brier", "calibration_error"]
exact_metrics = true
"""
Answer = Enrolled | Trained | Evaluated | Stopped | Refused


@cache
def patients(count: int = NUM_PATIENTS) -> str:
    """Real patients, bundled with scikit-learn, as the task's CSV file."""
    from sklearn.datasets import load_breast_cancer

    bundle = load_breast_cancer(as_frame=True)
    frame = bundle.data.astype(str).iloc[:count]
    frame["diagnosis"] = bundle.target.map({0: "malignant", 1: "benign"})
    return str(frame.to_csv(index=False))


@cache
def the_task() -> Task:
    """The bundled task."""
    return resolve_task(TASK)


@dataclass(kw_only=True)
class GatedSite:
    """One hospital, its gate, and the key of its coordinator."""

    kit: Path
    coordinator: Ed25519PrivateKey
    gate: Gate
    parameters: Parameters = field(default_factory=lambda: initial_parameters(the_task().model(), 3))

    @property
    def hospital(self) -> Hospital:
        """As its kit says now."""
        return Hospital.open(self.kit)

    def started_anew(self, **changes: Any) -> "GatedSite":
        """The site after its daemon was started again on the same state."""
        self.gate.close()
        self.gate = Gate(self.hospital, **changes)
        return self

    def edit(self, before: str, after: str) -> None:
        """Change site.toml."""
        path = self.kit / SITE_FILE
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))

    def approve(self, study: Study) -> str:
        """Somebody at the hospital says yes; the study's hash comes back."""
        hospital = self.hospital
        asked = what_is_asked(study, the_task(), hospital.file)
        Approvals(hospital.state, hospital.signer).approve(asked, by="tests", expires=datetime.now(UTC) + timedelta(days=1))
        return asked.study_hash

    def sealed(self, record: RecordDict, *, site: str = "north", seconds: float = 60.0, **changes: Any) -> tuple[bytes, SealedTask]:
        """The bytes of a question, and what to hold its answer against."""
        records, task = seal_task(packed_message(record), site=site, seconds=seconds, **{"signer": self.coordinator, **changes})
        return to_bytes(records), task

    def opened(self, answer: bytes, task: SealedTask) -> Opened:
        """A sealed answer, opened as the coordinator does."""
        assert answer, "the gate gave nothing"
        return open_reply(to_records(answer), task, site_key=load_signing_key(self.kit / SIGNING_KEY).public_key())

    def ask(self, content: Content, parameters: Parameters | None = None, **changes: Any) -> Answer:
        """A question all the way: sealed, answered, opened."""
        return self.ask_whole(content, parameters, **changes)[0]

    def ask_whole(self, content: Content, parameters: Parameters | None = None, **changes: Any) -> tuple[Answer, RecordDict, bytes]:
        """As `ask`, with the arrays and the bytes that left."""
        question, task = self.sealed(encode(content, parameters=parameters), **changes)
        answer = self.gate.answer(question)
        record = self.opened(answer, task).record
        return decode(record, Enrolled, Trained, Evaluated, Stopped, Refused), record, answer

    def update_of(self, record: RecordDict) -> Parameters:
        """The update in an answer."""
        return decode_parameters(record, template_of(self.parameters))

    def enrol(self, study: Study, run: str = "run-1", **changes: Any) -> Answer:
        """Ask it to take part."""
        return self.ask(enrolment(study, run, **changes))

    def train(self, study: Study, number: int = 1, run: str = "run-1") -> tuple[Answer, RecordDict, bytes]:
        """Ask it for a round."""
        return self.ask_whole(TrainTask(run=run, study_hash=study.fingerprint(), round=number, fold=1), self.parameters)

    def evaluate(self, study: Study, run: str = "run-1") -> tuple[Answer, RecordDict, bytes]:
        """Ask for the closing evaluation."""
        return self.ask_whole(EvaluateTask(run=run, study_hash=study.fingerprint(), round=study.rounds.count, fold=1), self.parameters)

    def stop(self, study: Study, run: str = "run-1") -> Answer:
        """Ask it to stop."""
        return self.ask(StopTask(run=run, study_hash=study.fingerprint()))

    def audit_path(self) -> Path:
        """The file of its audit log."""
        return self.kit / "state" / AUDIT

    def audit(self) -> list[dict[str, Any]]:
        """Every row of its audit log, which verifies."""
        verify_audit(self.audit_path())
        return [json.loads(line) for line in self.audit_path().read_text().splitlines()]

    def last(self, event: str) -> dict[str, Any]:
        """The details of the last row of this event."""
        return [row["details"] for row in self.audit() if row["event"] == event][-1]


def gated(root: Path, *, names: tuple[str, ...] = ("north",), max_epsilon: float = 5.0) -> dict[str, GatedSite]:
    """Hospitals of one federation, each with the bundled patients; their gates are open."""
    out = approved(root, names, federation(sites=dict.fromkeys(("north", "south", *names))))
    coordinator = load_signing_key(out / "coordinator" / SIGNING_KEY)
    sites = {}
    for name in names:
        (root / name / SITE_FILE).write_text(SITE.format(name=name, max_epsilon=max_epsilon))
        (root / name / "patients.csv").write_text(patients())
        sites[name] = GatedSite(kit=root / name, coordinator=coordinator, gate=Gate(Hospital.open(root / name)))
    return sites


def study(**changes: Any) -> Study:
    """The small private study with changes."""
    return Study.from_table({**STUDY, **changes})


def enrolment(asked: Study, run: str = "run-1", **changes: Any) -> EnrolTask:
    """The request to take part."""
    fields = {"run": run, "study": asked.to_table(), "task_fingerprint": the_task().fingerprint(), "version": installed_version()}
    return EnrolTask(**{**fields, **changes})


def to_bytes(records: RecordDict) -> bytes:
    """As they go over the socket."""
    return bytes(recorddict_to_proto(records).SerializeToString())


def to_records(content: bytes) -> RecordDict:
    """As they come from the socket."""
    return recorddict_from_proto(RecordDictProto.FromString(content))
