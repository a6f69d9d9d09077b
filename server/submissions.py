"""The studies that a coordinator was given: each has a run's folder, and in it `submission.json`, which says how far it is.

A token that comes with a submission makes a retry safe: the second time it names the run that the first time made.
"""

import logging
import re
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from server.run_folder import RUN_PATTERN, RunFolder
from server.status import Failure, StudyState
from shared.config import Settings
from shared.errors import ConfigurationError, StorageError
from shared.files import json_text, write_atomic
from shared.study import Study

COORDINATOR = "WARDROUND_COORDINATOR"  # environment of a study's process: the coordinator's kit
AUDIT = "audit.jsonl"  # in the coordinator's state
SUBMISSION, ENDED, STOP = "submission.json", "ended.json", "stop"  # in a run's folder
UNFINISHED: tuple[StudyState, ...] = ("queued", "waiting for sites", "running")
MAX_RUN = 100  # characters of a run's name
TOKEN_PATTERN = r"^[A-Za-z0-9_-]{8,100}$"


logger = logging.getLogger(__name__)


class Submission(Settings):
    """submission.json."""

    token: str = Field(pattern=TOKEN_PATTERN)
    submitted: AwareDatetime
    state: StudyState = "queued"
    flower_run: int | None = None
    attempts: int = Field(default=0, ge=0, description="times its ServerApp was started since it was submitted, resumed, or completed a round")
    error: Failure | None = None
    resumed: AwareDatetime | None = Field(default=None, description="when it was asked to go on the last time; what its log says before is over")


class Ended(Settings):
    """ended.json: how the ServerApp says the study ended; absent while it has not."""

    state: StudyState
    error: Failure | None = None


class Submissions:
    """The studies in `runs`, one folder each."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def submit(self, study: Study, token: str) -> str:
        """The name of the run that was made for this token, now or before.

        Raises:
            ConfigurationError: the token was used for another study.
            StorageError: the folder cannot be written.
        """
        if not re.fullmatch(TOKEN_PATTERN, token):
            raise ConfigurationError(f"token: expected 8 to 100 letters, digits, '-' and '_', got {len(token)} characters", "choose another")
        for name, submission in self.all().items():
            if submission.token == token:
                if self.folder(name).study.fingerprint() != study.fingerprint():
                    raise ConfigurationError(f"token: expected one of its own, got that of {name}, another study", "choose another")
                return name
        folder = RunFolder.create(self._runs, study)
        self._write(folder.path, Submission(token=token, submitted=datetime.now(UTC)))
        return folder.path.name

    def all(self) -> dict[str, Submission]:
        """Every submission by its run's name, oldest first; one that is damaged is left out, and said in the log: it stops no other."""
        if not self._runs.is_dir():
            return {}
        found = {}
        for path in self._runs.iterdir():
            if RUN_PATTERN.match(path.name) and (path / SUBMISSION).is_file():
                try:
                    found[path.name] = self._read(path)
                except StorageError as error:
                    logger.error("%s", error)
        return dict(sorted(found.items(), key=lambda item: (item[1].submitted, item[0])))

    def get(self, run: str) -> Submission:
        """One submission.

        Raises:
            ConfigurationError: there is none of that name.
        """
        if len(run) > MAX_RUN or not RUN_PATTERN.match(run) or "/" in run or not (self._runs / run / SUBMISSION).is_file():
            known = ", ".join(list(self.all())[-5:]) or "none"
            raise ConfigurationError(
                f"expected a run of this coordinator, got {run[:MAX_RUN]!r}; the last are: {known}", "see 'wardround study list'"
            )
        return self._read(self._runs / run)

    def update(self, run: str, **changes: object) -> Submission:
        """The submission with these fields changed, durably."""
        submission = self.get(run).model_copy(update=changes)
        self._write(self._runs / run, submission)
        return submission

    def path(self, run: str) -> Path:
        """The path of the run's folder."""
        return self._runs / run

    def folder(self, run: str) -> RunFolder:
        """The run's folder."""
        return RunFolder.open(self._runs / run)

    def resume(self, run: str) -> None:
        """A run that was stopped or failed is to go on from its last complete round.

        Raises:
            ConfigurationError: it is completed, or under way.
        """
        submission = self.get(run)
        if submission.state in UNFINISHED or submission.state == "completed":
            raise ConfigurationError(
                f"{run}: expected a run that was stopped or failed, got one that is {submission.state}", "see 'wardround study list'"
            )
        for name in (STOP, ENDED, "result.json"):
            (self._runs / run / name).unlink(missing_ok=True)
        self.update(run, state="queued", attempts=0, error=None, flower_run=None, resumed=datetime.now(UTC))

    def stop(self, run: str) -> None:
        """Ask a run's ServerApp to stop."""
        self.get(run)
        write_atomic(self._runs / run / STOP, "")

    def ended(self, run: str) -> Ended | None:
        """How its ServerApp says it ended; None where it has not."""
        path = self._runs / run / ENDED
        try:
            return Ended.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _read(self, path: Path) -> Submission:
        try:
            return Submission.model_validate_json((path / SUBMISSION).read_bytes())
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{path / SUBMISSION}: expected a submission, got a damaged file", "restore it, or move the run's folder away"
            ) from error

    @staticmethod
    def _write(path: Path, submission: Submission) -> None:
        write_atomic(path / SUBMISSION, json_text(submission.model_dump(mode="json")))
