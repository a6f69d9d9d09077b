"""A study's process whose audit log has no room for one more row: it ends by name, tells its exit code, and goes on where it was once there is room."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from server.live_roster import LiveRoster
from server.submissions import COORDINATOR, STOP, Submission, Submissions
from shared.audit import AuditLog, verify_audit
from shared.errors import StorageError
from shared.files import make_private
from shared.kit import RUNS, SIGNING_KEY, STATE, load_signing_key, verify_kit
from shared.results import RoundRecord
from shared.study import Study
from tests.provisioned import joined, provisioned

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SITES = {"north": 11, "south": 12}
ROUNDS = 6
SOME_ROUNDS = 12_000  # bytes of audit log: enrolment and a few rounds, and not all six
STUDY = {
    "name": "full", "task": "breast-cancer", "seed": 3, "rounds": {"count": ROUNDS, "deadline": "30s"},
    "training": {"learning_rate": 0.3, "batch_size": 16}, "privacy": {"unit": "none"}, "evaluation": {"bootstrap": 0},
}  # fmt: skip


def child(root: Path, run: str, largest: int) -> int:
    """What Flower starts for a study, over a grid whose sites answer at once; no file may grow beyond so many bytes. Its exit code."""
    from flwr.app import Message

    import server.deployed_run
    from shared.errors import WardroundError
    from shared.messages import Enrolled, EnrolTask, Evaluated, EvaluateTask, Stopped, StopTask, Trained, TrainTask, decode, decode_parameters, encode
    from shared.models import get_parameters, template_of
    from shared.seals import open_task
    from shared.task import resolve_task
    from tests.gated import to_bytes, to_records
    from tests.server.test_sealed_grid import CarryingGrid, Daemon

    template = template_of(get_parameters(resolve_task("breast-cancer").model()))

    def answer(daemon: Daemon, message: Message) -> Message:
        opened, _ = open_task(to_records(to_bytes(message.content)), site=daemon.name, coordinator=daemon.coordinator.public_key())
        asked = decode(opened, EnrolTask, TrainTask, EvaluateTask, StopTask)
        if isinstance(asked, EnrolTask):
            record = encode(Enrolled(name=daemon.name, declared_size=100, declared_num_patients=150, declared_num_test=50))
        elif isinstance(asked, TrainTask):
            moved = {name: value * np.float32(0.01 * asked.round) for name, value in decode_parameters(opened, template).items()}
            record = encode(
                Trained(name=daemon.name, run=asked.run, study_hash=asked.study_hash, round=asked.round, fold=1, privacy=None), parameters=moved
            )
        elif isinstance(asked, EvaluateTask):
            record = encode(Evaluated(name=daemon.name, run=asked.run, study_hash=asked.study_hash, round=asked.round, fold=1, privacy=None))
        else:
            record = encode(Stopped(name=daemon.name))
        return Message(daemon.answer(message, record=record), reply_to=message)

    coordinator = root / "kits" / "coordinator"
    signer = load_signing_key(coordinator / SIGNING_KEY)
    daemons = {number: Daemon(name, load_signing_key(root / name / SIGNING_KEY), signer) for name, number in SITES.items()}
    server.deployed_run.Mailbox = lambda grid: None  # type: ignore[assignment,misc]
    os.environ[COORDINATOR] = str(coordinator)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        server.deployed_run.run_deployed(CarryingGrid(daemons, dict.fromkeys(SITES, answer)), run)  # type: ignore[arg-type]
    except WardroundError as error:
        return error.exit_code
    return 0


class Coordinator:
    """A coordinator's kit with two sites on its roster, and an audit log that is larger than any other of its files."""

    def __init__(self, root: Path) -> None:
        self.root, self.kit = root, root / "kits" / "coordinator"
        provisioned(root / "kits")
        provisioned(root / "kits", requests=[joined(root / "kits", name, root / name) for name in SITES])
        make_private(self.kit / STATE)
        roster = LiveRoster(self.kit, self.kit / STATE)
        roster.remember({site.node_key: SITES[site.name] for site in roster.active()})
        self.log = AuditLog(
            self.kit / STATE / "audit.jsonl",
            owner=verify_kit(self.kit).federation,
            role="coordinator",
            signer=load_signing_key(self.kit / SIGNING_KEY),
        )
        while self.size < 100_000:
            self.log.append("padding", {f"text {number}": "x" * 500 for number in range(20)})
        self.submissions = Submissions(self.kit / RUNS)

    @property
    def size(self) -> int:
        return self.log.path.stat().st_size

    def run(self, run: str, *, room: int | None = None) -> tuple[int, Submission]:
        """A study's process with so many bytes of room in the audit log: its exit code, and the submission as the coordinator then has it."""
        largest = resource.RLIM_INFINITY if room is None else self.size + room
        program = "import sys; from pathlib import Path; from tests.server.test_study_on_a_full_disk import child; sys.exit(child(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))"
        done = subprocess.run(
            [sys.executable, "-c", program, str(self.root), run, str(largest)],
            cwd=ROOT, check=False, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        ended = self.submissions.ended(run)
        assert ended is not None, done.stderr[-3000:]
        return done.returncode, self.submissions.update(run, state=ended.state, error=ended.error)

    def rounds(self, run: str) -> list[RoundRecord]:
        return self.submissions.folder(run).rounds()

    def lengths(self, event: str) -> list[int]:
        lines = self.log.path.read_bytes().splitlines(keepends=True)
        return [len(line) for line in lines if json.loads(line)["event"] == event]


def test_a_study_whose_log_is_full_ends_by_name_and_is_resumed(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path)
    run = coordinator.submissions.submit(Study.from_table(STUDY), "disturbed")
    code, submission = coordinator.run(run, room=SOME_ROUNDS)
    assert (code, submission.state) == (StorageError("").exit_code, "failed") == (1, "failed")
    assert submission.error is not None and submission.error.code == StorageError.code
    assert "audit.jsonl" in submission.error.what and "free space" in submission.error.remedy
    before = coordinator.rounds(run)
    assert 0 < len(before) < ROUNDS
    verify_audit(coordinator.log.path)

    coordinator.submissions.resume(run)
    code, submission = coordinator.run(run)
    assert (code, submission.state, submission.error) == (0, "completed", None)
    after = coordinator.rounds(run)
    assert after[: len(before)] == before  # not asked for again
    assert [record.round for record in after] == list(range(1, ROUNDS + 1))
    verify_audit(coordinator.log.path)


def test_a_study_that_is_stopped_on_a_full_disk_is_stopped_and_nobody_is_told_what_is_not_written_down(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path)
    run = coordinator.submissions.submit(Study.from_table(STUDY), "stopped-token")
    (coordinator.submissions.path(run) / STOP).touch()
    assert coordinator.run(run)[1].state == "stopped"
    [begun], told = coordinator.lengths("study begun"), len(coordinator.lengths("task sent"))
    assert told == len(SITES)
    coordinator.submissions.resume(run)
    (coordinator.submissions.path(run) / STOP).touch()
    code, submission = coordinator.run(run, room=begun + 100)
    assert (code, submission.state, submission.error) == (0, "stopped", None)
    assert len(coordinator.lengths("task sent")) == told
