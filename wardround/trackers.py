"""A run's history for TensorBoard or MLflow, where the user has them installed; neither is a dependency."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from server.run_folder import RunFolder
from shared.errors import ConfigurationError
from shared.files import storage_errors
from shared.results import RoundRecord
from shared.study import Study

if TYPE_CHECKING:
    from wardround.run import Run

Target = Literal["tensorboard", "mlflow"]
TARGETS: tuple[Target, ...] = ("tensorboard", "mlflow")
DATABASE = "mlflow.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A number by round; `step` counts rounds over all folds, from 1."""

    name: str
    value: float
    step: int


def export_run(run: "Run", to: str, path: Path) -> Path:
    """Write what a run measured into `path`, made where it is absent, and give the file or folder to open.

    Of every round: each metric of the model that the round began with, of all sites together ("metrics/auroc") and by site ("sites/va/auroc"), epsilon spent
    by site ("epsilon/va") and seconds; of the end: the final metrics by source ("final/federated/auroc"). A number that is not determined is left out.

    Args:
        to: "tensorboard": event files in `path`, a folder of the run's name; "mlflow": a run of the experiment `study`, in a database in `path`.

    Raises:
        ConfigurationError: another target, or its package is not installed.
        StorageError: the run has no result, or `path` cannot be written.
    """
    if to not in TARGETS:
        raise ConfigurationError(f"expected one of {', '.join(map(repr, TARGETS))} to export to, got {to!r}", "give one of them")
    write = _to_tensorboard if to == "tensorboard" else _to_mlflow
    result = run.result  # before anything is written
    final = [
        Point(name=f"final/{source}/{metric}", value=float(value), step=result.rounds_completed)
        for source, values in result.metrics.items()
        for metric, value in values.items()
        if value is not None and math.isfinite(value)
    ]
    points = [*history_points(RunFolder.open(run.path).rounds()), *final]
    with storage_errors(path, "write the export"):
        path.mkdir(parents=True, exist_ok=True)
        return write(run.path.name, run.study, points, path)


def history_points(rounds: list[RoundRecord]) -> Iterator[Point]:
    """The numbers of all rounds."""
    for step, record in enumerate(rounds, start=1):
        values: dict[str, float | None] = {f"metrics/{name}": value for name, value in record.metrics.items()}
        for site in record.sites:
            values |= {f"sites/{site.name}/{name}": value for name, value in (site.metrics or {}).items()}
            values[f"epsilon/{site.name}"] = site.epsilon
        values["seconds"] = record.seconds
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                yield Point(name=name, value=float(value), step=step)


def _installed(module: str, *, package: str) -> Any:  # of somebody else's library, without types
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{package}: expected it to be installed, for an export to it; found {type(error).__name__}: {error}", f"pip install {package}"
        ) from error


def _to_tensorboard(name: str, study: Study, points: list[Point], path: Path) -> Path:
    writer = _installed("torch.utils.tensorboard", package="tensorboard").SummaryWriter(str(path / name))
    try:
        writer.add_text("study.toml", "\n".join(f"    {line}" for line in study.to_toml().splitlines()))  # indented: code in Markdown
        for point in points:
            writer.add_scalar(point.name, point.value, point.step)
    finally:
        writer.close()
    return path / name


def _to_mlflow(name: str, study: Study, points: list[Point], path: Path) -> Path:
    """By MLflow's client alone, which leaves the user's own tracking address and active run as they are."""
    client_class = _installed("mlflow.tracking", package="mlflow").MlflowClient
    entities = _installed("mlflow.entities", package="mlflow")
    client = client_class(tracking_uri=f"sqlite:///{(path / DATABASE).resolve()}")
    experiment = client.get_experiment_by_name(study.name)
    folder = (path / "artifacts").resolve().as_uri()
    number = client.create_experiment(study.name, artifact_location=folder) if experiment is None else experiment.experiment_id
    run = client.create_run(number, run_name=name)
    parameters = [entities.Param(key, value) for key, value in flat(study.to_table())]
    client.log_batch(run.info.run_id, params=parameters)
    metrics = [entities.Metric(point.name, point.value, 0, point.step) for point in points]  # no time: a run's rounds have none
    for start in range(0, len(metrics), 1000):  # MLflow takes no more at once
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(run.info.run_id)
    return path / DATABASE


def flat(table: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The study's values by dotted key.

    >>> list(flat({"seed": 7, "rounds": {"count": 30}}))
    [('seed', '7'), ('rounds.count', '30')]
    """
    if isinstance(table, dict):
        for key, value in table.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(table)
