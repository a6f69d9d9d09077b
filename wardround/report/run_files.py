"""The files of a run's folder as models, read without the coordinator's code (no torch, no safetensors)."""

import contextlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from shared.attacks import Attack, read_attacks
from shared.clipped_updates import ClippedUpdates, clipped_updates
from shared.errors import StorageError
from shared.files import storage_errors
from shared.results import PrivacyClaim, Record, Result, RoundRecord, StoredStatistics
from shared.study import Study

Model = TypeVar("Model", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run left behind. `claim` and `statistics` are None where the run did not get so far; `task` is as the study file says it."""

    folder: Path
    study: Study
    study_toml: str
    task: str
    result: Result
    rounds: tuple[RoundRecord, ...]
    claim: PrivacyClaim | None
    statistics: StoredStatistics | None
    attacks: tuple[Attack, ...]
    clipped: ClippedUpdates | None = None  # of a simulation whose sites cut values of their updates off before they were masked


def read_run(folder: Path) -> RunFiles:
    """Everything in `folder` that the report shows.

    Raises:
        StorageError: study.toml or result.json is missing, or a file is damaged (a torn last line of rounds.jsonl is not damage).
        ConfigurationError: study.toml is no study.
    """
    result = _read_model(folder / "result.json", Result)
    if result is None:
        if (folder / "run.json").exists():
            raise StorageError(
                f"{folder}: this run was cut off before it wrote its result.json",
                f"go on with 'wardround simulate --resume {folder}', and --data as before",
            )
        raise StorageError(f"{folder}: expected a run's folder, found no result.json in it", "give the folder that simulate printed")
    study_toml = (_read(folder / "study.toml") or b"").decode(errors="replace")
    study = Study.load(folder / "study.toml")
    return RunFiles(
        folder=folder,
        study=study,
        study_toml=study_toml,
        task=str(tomllib.loads(study_toml).get("task", study.task)),
        result=result,
        rounds=_read_rounds(folder / "rounds.jsonl"),
        claim=_read_model(folder / "privacy.json", PrivacyClaim),
        statistics=_read_model(folder / "evaluation.json", StoredStatistics),
        attacks=tuple(read_attacks(folder)),
        clipped=None if study.secure_aggregation is None else read_clipped(folder),
    )


def read_clipped(folder: Path) -> ClippedUpdates | None:
    """What the log of a run's folder says of clipped updates; a line that is none of ours says nothing."""
    return clipped_updates(_messages((_read(folder / "log.jsonl") or b"").split(b"\n")))


def _messages(lines: list[bytes]) -> Iterator[str]:
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("message"), str):
                yield entry["message"]


def _read(path: Path) -> bytes | None:
    with storage_errors(path, "read"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _read_model(path: Path, model: type[Model]) -> Model | None:
    content = _read(path)
    if content is None:
        return None
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        raise StorageError(f"{path}: {place}: {first['msg']}", "restore the file, or run the study again") from None


def _read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    """The complete lines; bytes are split at newlines alone, so that neither a torn character nor U+2028 counts as damage."""
    lines = (_read(path) or b"").split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    records = []
    for number, line in enumerate(lines[: last + 1]):
        try:
            records.append(RoundRecord.model_validate_json(line))
        except ValidationError:
            if number < last:
                raise StorageError(f"{path}: line {number + 1} is damaged", "restore the file, or run the study again") from None
    return tuple(records)
