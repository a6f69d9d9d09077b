"""What the task of a run says of itself: predictors, outcome, model. Needs torch where the task is known; runs no code that only the study names."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import WardroundError
from wardround.report.model_file import read_final_model
from wardround.report.run_files import RunFiles

if TYPE_CHECKING:  # pandas comes with it
    from shared.schema import Column, Schema

MISSING = {
    "drop": "the record is dropped",
    "impute": "the middle of the declared range",
    "indicator": "the middle of the declared range, with an indicator",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A column as the schema declares it."""

    name: str
    what: str
    missing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """Empty, with the reason in `why_absent`, where the task is not known here."""

    why_absent: str = ""
    fingerprint: str = ""
    modality: str = ""
    source: str = ""
    outcome: str = ""
    predictors: tuple[Predictor, ...] = ()
    model: str = ""


def read_task_facts(run: RunFiles) -> TaskFacts:
    """Of an installed task (see `shared.task.is_installed`), or of a schema file that is there; of none whose model is another than the run's."""
    from shared.task import architecture_hash, is_installed, resolve_task

    name = run.study.task
    if not (is_installed(name) or (name.endswith(".toml") and Path(name).is_file())):
        return TaskFacts(why_absent=f"the task {name!r} is neither installed here nor a schema file that is here")
    try:
        task = resolve_task(name)
    except WardroundError as error:
        return TaskFacts(why_absent=f"the task could not be made here: {error.what}")
    trained, model = read_final_model(run.folder), task.model()
    if trained is not None and trained.header.get("architecture") != architecture_hash(model):
        return TaskFacts(why_absent="the task that is installed here has another model than the run")
    return TaskFacts(
        fingerprint=task.fingerprint(),
        modality=task.modality,
        source=task.source,
        outcome=_outcome(task.schema),
        predictors=_predictors(task.schema),
        model=repr(model),
    )


def _outcome(schema: "Schema") -> str:
    from shared.schema import TableSchema

    return f"{schema.label.name}: {_values(schema.label)}" if isinstance(schema, TableSchema) else ""


def _predictors(schema: "Schema") -> tuple[Predictor, ...]:
    from shared.schema import TableSchema

    if isinstance(schema, TableSchema):
        return tuple(Predictor(name=column.name, what=_values(column), missing=MISSING[column.missing]) for column in schema.columns)
    return tuple(
        Predictor(
            name=tensor.name,
            what=f"tensor {' x '.join(str(size) for size in tensor.shape)}, {tensor.low:g} to {tensor.high:g} {tensor.unit}".rstrip(),
            missing="not declared",
        )
        for tensor in schema
    )


def _values(column: "Column") -> str:
    """The declared range with its unit, or the categories."""
    if column.type == "number":
        return f"{column.low:g} to {column.high:g} {column.unit}".rstrip()
    return ", ".join(column.values)
