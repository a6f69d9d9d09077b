"""What a coordinator's kit holds about its studies, read from files: also when no coordinator runs, and without torch.

`server.submissions` owns these files and writes them; here they are only read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import httpx
from pydantic import BaseModel, ValidationError

from server.status import CoordinatorStatus, StudyState, StudyStatus, study_status
from server.submissions import SUBMISSION, Submission
from shared.errors import ConfigurationError, ConnectionFailedError, KitError, StorageError
from shared.files import storage_errors, write_atomic
from shared.kit import MANIFEST, RUNS, STATE, read_manifest
from shared.results import Result, RoundRecord, RunStart
from shared.study import Study
from shared.supervision import Instance, read_instance
from wardround.kits import coordinator_meant

if TYPE_CHECKING:
    from server.run_folder import RunFolder

STUDY_FILE, ROUNDS, RESULT, START, LOG = "study.toml", "rounds.jsonl", "result.json", "run.json", "log.jsonl"
FINISHED: tuple[StudyState, ...] = ("completed", "failed", "stopped", "interrupted")
DOWNLOADED = (RESULT, "privacy.json", "evaluation.json", ROUNDS, STUDY_FILE)
MODEL, REPORT = "model", "report.html"
LATEST = "latest"
STATUS_SECONDS = 10.0

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedRun:
    """A submitted study: its folder, and how far it was when its submission was read."""

    path: Path
    submission: Submission

    @classmethod
    def read(cls, path: Path) -> "DeployedRun":
        """The run in this folder, as it is now.

        Raises:
            StorageError: its submission.json is missing or damaged.
        """
        submission = _read_model(path / SUBMISSION, Submission)
        if submission is None:
            raise StorageError(f"{path / SUBMISSION}: expected a submission, found none", "give a run of 'wardround study list --coordinator KIT'")
        return cls(path=path, submission=submission)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def state(self) -> StudyState:
        """How far it is."""
        return self.submission.state

    @property
    def study(self) -> Study:
        """The study as it was submitted."""
        return Study.load(self.path / STUDY_FILE)

    def rounds(self) -> list[RoundRecord]:
        """The complete rounds; a torn last line is left out.

        Raises:
            StorageError: another line is damaged.
        """
        with storage_errors(self.path, "read", remedy="check its permissions"):
            content = (self.path / ROUNDS).read_bytes() if (self.path / ROUNDS).exists() else b""
        return [parse_round(line, self.path) for line in complete_lines(content)]

    def result(self) -> Result | None:
        """result.json; None before the run has ended for the first time.

        Raises:
            StorageError: it is damaged.
        """
        return _read_model(self.path / RESULT, Result)

    def status(self) -> StudyStatus:
        """The same words as the coordinator's status and page have for it."""
        submission = self.submission
        folder = cast("RunFolder", self)  # of a run's folder it asks path, study and rounds(), and the real one brings torch
        return study_status(folder, submission.state, submitted=submission.submitted, error=submission.error)


def complete_lines(content: bytes) -> list[bytes]:
    """The lines that end with a newline: what is being written does not yet."""
    return content.split(b"\n")[:-1]


def parse_round(line: bytes, folder: Path) -> RoundRecord:
    """A complete line of rounds.jsonl.

    Raises:
        StorageError: it is damaged.
    """
    try:
        return RoundRecord.model_validate_json(line)
    except ValidationError:
        raise StorageError(f"{folder / ROUNDS}: a line is damaged", "restore the file, or run the study again") from None


def coordinator_folder(kit: Path) -> Path:
    """`kit`, when it is a coordinator's; neither dates nor other files are looked at, so that what was done can still be read.

    Raises:
        KitError: it is none, damaged, or a site's.
    """
    meant = coordinator_meant(kit)
    if meant and not (kit / MANIFEST).is_file():
        raise KitError(f"{kit}: expected the coordinator's kit, found no kit", meant)
    site = read_manifest(kit).site
    if site is not None:
        raise KitError(f"{kit}: expected the coordinator's kit, got that of site {site}", meant or "give the coordinator's folder")
    return kit


def deployed_runs(kit: Path) -> list[DeployedRun]:
    """Every submitted study of this coordinator, oldest first.

    Raises:
        KitError: `kit` is no coordinator's kit.
        StorageError: a submission is damaged.
    """
    runs = coordinator_folder(kit) / RUNS
    if not runs.is_dir():
        return []
    with storage_errors(runs, "read", remedy="run this as the user that started the coordinator"):
        folders = [path for path in runs.iterdir() if (path / SUBMISSION).is_file()]
    return sorted(map(DeployedRun.read, folders), key=lambda run: (run.submission.submitted, run.name))


def choose_run(kit: Path, name: str) -> DeployedRun:
    """The run of this name, of this beginning of a name where only one has it, or the one submitted last for "latest".

    Raises:
        ConfigurationError: there is none, or several begin so.
    """
    runs = deployed_runs(kit)
    if name == LATEST and runs:
        return runs[-1]
    exact = [run for run in runs if run.name == name]
    found = exact or [run for run in runs if name and run.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    remedy = f"see 'wardround study list --coordinator {kit}'"
    if found:
        raise ConfigurationError(f"expected one run, got {len(found)} that begin with {name!r}: {_names(found)}", "give more of the name")
    raise ConfigurationError(f"expected a run of this coordinator, got {name!r}; the last are: {_names(runs) or 'none'}", remedy)


def _names(runs: list[DeployedRun]) -> str:
    return ", ".join(run.name for run in runs[-5:])


def running_instance(kit: Path) -> Instance | None:
    """The coordinator that serves this kit now; None where none does, or one has only just begun."""
    instance = read_instance(coordinator_folder(kit) / STATE)
    return instance if instance is not None and "page" in instance.ports else None


def coordinator_status(kit: Path) -> CoordinatorStatus:
    """What the running coordinator says of itself.

    Raises:
        ConnectionFailedError: none runs, or it does not answer.
    """
    instance = running_instance(kit)
    if instance is None:
        raise ConnectionFailedError(f"{kit}: expected a running coordinator, found none", f"run 'wardround coordinator start {kit}'")
    address = f"http://127.0.0.1:{instance.ports['page']}/status.json"
    try:
        response = httpx.get(address, timeout=STATUS_SECONDS, trust_env=False)
        return CoordinatorStatus.model_validate_json(response.raise_for_status().content)
    except (httpx.HTTPError, ValidationError) as error:
        raise ConnectionFailedError(
            f"{address}: expected the coordinator's status, got {type(error).__name__}", "see whether it is of this version, or stop and start it"
        ) from error


def download_run(run: DeployedRun, out: Path, *, partial: bool = False) -> list[Path]:
    """Copy the run's files into `out` (made where absent) with a new report; gives what was written. The same run may be copied there again.

    Args:
        partial: also where the run is not completed; then what there is.

    Raises:
        ConfigurationError: it is not completed.
        StorageError: `out` holds another run's files, or cannot be written.
    """
    if run.state != "completed" and not partial:
        remedy = "resume it" if run.state in FINISHED else "wait for its end"
        raise ConfigurationError(
            f"{run.name}: expected a completed run, got one that is {run.state}", f"{remedy}, or take what there is with --partial"
        )
    sources = [run.path / START, *(run.path / name for name in DOWNLOADED), *sorted((run.path / MODEL).glob("*.safetensors"))]
    _check_free(out, run)
    with storage_errors(out, "make the folder"):
        (out / MODEL).mkdir(parents=True, exist_ok=True)
    written = []
    for source in sources:  # run.json first: it says whose folder this is
        if source.is_file():
            with storage_errors(source, "read", remedy="check its permissions"):
                content = source.read_bytes()
            target = out / source.relative_to(run.path)
            write_atomic(target, content)
            written.append(target)
    return written + _report(run, out)


def _check_free(out: Path, run: DeployedRun) -> None:
    """Nothing in `out` would be overwritten that is not of this run."""
    start = _read_model(out / START, RunStart)
    ours = start is not None and start.run == run.name
    taken = [name for name in (START, *DOWNLOADED, REPORT, MODEL) if (out / name).exists()]
    if taken and not ours:
        whose = "files of an unknown run" if start is None else f"those of another run, {start.run}"
        raise StorageError(f"{out}: expected a new folder, or the files of {run.name}, found {whose}: {', '.join(taken)}", "give another with --out")


def _report(run: DeployedRun, out: Path) -> list[Path]:
    """A new report, not the one in the run's folder, which may be older than its result; none where the run has no result yet."""
    if not (run.path / RESULT).is_file():
        return []
    from wardround.report.page import render
    from wardround.report.run_files import read_run

    write_atomic(out / REPORT, render(read_run(run.path)))
    return [out / REPORT]


def _read_model(path: Path, model: type[Model]) -> Model | None:
    with storage_errors(path, "read", remedy="check its permissions"):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return model.model_validate_json(content)
    except ValidationError:
        raise StorageError(f"{path}: expected a file of ours, got a damaged one", "restore it, or move its folder away") from None
