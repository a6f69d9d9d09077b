"""A run's folder: everything one execution of a study leaves behind. Files appear whole or not at all."""

import functools
import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from shared.errors import ModelMismatchError, StorageError
from shared.files import append_line, json_text, storage_errors, write_atomic
from shared.results import Outcome, PrivacyClaim, Result, RoundRecord, RunStart, StartedFrom, StoredStatistics
from shared.study import Study

if TYPE_CHECKING:  # what only looks into a run's folder need not wait for torch
    from server.strategies.server_optimizer import State
    from shared.models import Parameters

HEADER = "wardround"
RUN_PATTERN = re.compile(r".+-\d{8}T\d{6}Z-[0-9a-f]{4}$")


class Checkpoint:
    """The state after a complete round: parameters, the server optimizer's state, and which round of which fold it is."""

    def __init__(self, *, fold: int, round_number: int, parameters: "Parameters", state: "State") -> None:
        self.fold = fold
        self.round_number = round_number
        self.parameters = parameters
        self.state = state


class RunFolder:
    """The folder of one run, `<study>-<utc time>-<4 hex>`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls, out: Path, study: Study, *, baselines: bool = False, patients_sha256: str | None = None, started_from: StartedFrom | None = None
    ) -> "RunFolder":
        """A new folder in `out` (made if absent) with the resolved study in it, and what the run begins with.

        Raises:
            StorageError: it cannot be written.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = cls(out / f"{study.name}-{stamp}-{secrets.token_hex(2)}")
        with storage_errors(folder.path, "make the run's folder"):
            folder.path.mkdir(parents=True)
            (folder.path / "model").mkdir()
            (folder.path / "checkpoint").mkdir()
        write_atomic(folder.path / "study.toml", study.to_toml())
        start = RunStart(run=folder.path.name, baselines=baselines, patients_sha256=patients_sha256, started_from=started_from)
        write_atomic(folder.path / "run.json", json_text(start.model_dump(mode="json")))
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run.

        Raises:
            StorageError: it is no run's folder.
        """
        if not (path / "study.toml").is_file():
            raise StorageError(f"{path}: expected a run's folder, found no study.toml in it", "give the folder that simulate printed")
        return cls(path)

    @property
    def name(self) -> str:
        """The run's name, whatever the folder is called by now."""
        return self.start.run

    @functools.cached_property
    def start(self) -> RunStart:
        """run.json.

        Raises:
            StorageError: it is missing or damaged.
        """
        try:
            return RunStart.model_validate_json((self.path / "run.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{self.path}: expected a run.json of ours, could not read it ({type(error).__name__})", "restore the folder, or start a new run"
            ) from error

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None where it has not, or was killed."""
        path = self.path / "result.json"
        return Result.model_validate_json(path.read_bytes()).outcome if path.is_file() else None

    @property
    def study(self) -> Study:
        """The study as it was resolved."""
        return Study.load(self.path / "study.toml")

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.path / "report.html"

    def append_round(self, record: RoundRecord) -> None:
        """One more line of rounds.jsonl."""
        append_line(self.path / "rounds.jsonl", record.model_dump_json())

    def rounds(self) -> list[RoundRecord]:
        """The complete lines of rounds.jsonl; a torn last line is left out."""
        try:
            lines = (self.path / "rounds.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(lines):
            try:
                records.append(RoundRecord.model_validate_json(line))
            except ValidationError:
                if number + 1 < len(lines):
                    raise StorageError(
                        f"{self.path}: rounds.jsonl: line {number + 1} is damaged", "restore the file, or run the study again"
                    ) from None
        return records

    def keep_rounds(self, records: list[RoundRecord]) -> None:
        """rounds.jsonl holds exactly these lines: those of a checkpoint from which a run resumes."""
        write_atomic(self.path / "rounds.jsonl", "".join(record.model_dump_json() + "\n" for record in records))

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint: one file, old or new and never neither."""
        tensors = {f"parameters/{name}": np.asarray(value, order="C") for name, value in checkpoint.parameters.items()}
        for part, arrays in checkpoint.state.items():
            tensors.update({f"state/{part}/{name}": np.asarray(value, order="C") for name, value in arrays.items()})
        header = {"fold": checkpoint.fold, "round": checkpoint.round_number, "study": self.study_hash, "parameters": list(checkpoint.parameters)}
        write_atomic(self.path / "checkpoint" / "latest.safetensors", safetensors.numpy.save(tensors, {HEADER: json.dumps(header)}))

    def read_checkpoint(self) -> Checkpoint | None:
        """The last complete round; None where none was completed.

        Raises:
            ModelMismatchError: the checkpoint is another study's, or damaged.
        """
        path = self.path / "checkpoint" / "latest.safetensors"
        if not path.exists():
            return None
        header, tensors = read_tensors(path)
        if header.get("study") != self.study.fingerprint():
            raise ModelMismatchError(
                f"{path}: expected a checkpoint of this study, got another's", "do not edit study.toml of a run; start a new one"
            )
        state: dict[str, dict[str, object]] = {}
        for key, value in tensors.items():
            if key.startswith("state/"):
                _, part, name = key.split("/", 2)
                state.setdefault(part, {})[name] = value
        parameters = {name: tensors[f"parameters/{name}"] for name in header["parameters"]}  # type: ignore[attr-defined]  # as written above
        return Checkpoint(fold=int(str(header["fold"])), round_number=int(str(header["round"])), parameters=parameters, state=state)  # type: ignore[arg-type]  # float64 arrays

    @functools.cached_property
    def study_hash(self) -> str:
        """Fingerprint of the resolved study, read once for all that is written; what is read back is held against the file as it is."""
        return self.study.fingerprint()

    def write_sum_sites(self, fold: int, number: int, sites: Sequence[str]) -> None:
        """Durably keep for which sites' secure sum signatures are asked in this round: they are in no other sum of it."""
        write_atomic(self.path / "checkpoint" / "sum.json", json.dumps({"fold": fold, "round": number, "sites": list(sites)}))

    def sum_sites(self, fold: int, number: int) -> tuple[str, ...]:
        """For which sites' sum signatures were asked in this round; none where they were not.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.path / "checkpoint" / "sum.json"
        try:
            kept = json.loads(path.read_bytes())
            return tuple(map(str, kept["sites"])) if (kept["fold"], kept["round"]) == (fold, number) else ()
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: expected the sites of a sum, got a damaged file", "restore the folder, or start a new run") from error

    def write_model(self, name: str, parameters: "Parameters", header: dict[str, str]) -> None:
        """`model/<name>.safetensors`; the header names study, task and architecture, and neither a time nor the run."""
        tensors = {key: np.asarray(value, order="C") for key, value in parameters.items()}  # safetensors writes memory as it lies
        data = safetensors.numpy.save(tensors, {HEADER: json.dumps({**header, "order": "\n".join(parameters)}, sort_keys=True)})
        write_atomic(self.path / "model" / f"{name}.safetensors", data)

    def read_model(self, name: str, architecture: str) -> "Parameters":
        """The parameters in `model/<name>.safetensors`, in the order of the state.

        Raises:
            ModelMismatchError: it is missing, damaged, or of another study or architecture.
        """
        path = self.path / "model" / f"{name}.safetensors"
        header, tensors = read_tensors(path)
        if (header.get("study_hash"), header.get("architecture")) != (self.study.fingerprint(), architecture):
            raise ModelMismatchError(f"{path}: expected a model of this study and architecture, got another's", "start a new run")
        return {key: tensors[key] for key in str(header["order"]).split("\n")}

    def write_result(self, result: Result) -> None:
        """result.json."""
        write_atomic(self.path / "result.json", json_text(result.model_dump(mode="json")))

    def write_privacy(self, claim: PrivacyClaim) -> None:
        """privacy.json."""
        write_atomic(self.path / "privacy.json", json_text(claim.model_dump(mode="json")))

    def write_statistics(self, statistics: StoredStatistics) -> None:
        """evaluation.json."""
        write_atomic(self.path / "evaluation.json", json.dumps(statistics.model_dump(mode="json")))

    def log_handler(self) -> logging.Handler:
        """A handler that appends to log.jsonl; the caller installs and removes it.

        Raises:
            StorageError: the file cannot be opened.
        """
        with storage_errors(self.path / "log.jsonl", "open"):
            handler = logging.FileHandler(self.path / "log.jsonl", encoding="utf-8")
        handler.setFormatter(JsonLines())
        return handler


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()})


def read_tensors(path: Path) -> "tuple[dict[str, object], Parameters]":
    """Our header and the tensors of a safetensors file.

    Raises:
        ModelMismatchError: it is none of ours, or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ModelMismatchError(f"{path}: expected a safetensors file, could not read it: {error}", "restore it, or run the study again") from error
    if not isinstance(header, dict):
        raise ModelMismatchError(f"{path}: expected a file written by wardround, found no header of ours", "check the path")
    return header, tensors


def find_runs(out: Path) -> list[Path]:
    """The run folders in `out`, oldest first."""
    if not out.is_dir():
        return []
    return sorted((path for path in out.iterdir() if RUN_PATTERN.match(path.name) and (path / "study.toml").is_file()), key=os.path.getmtime)
