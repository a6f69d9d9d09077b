"""A trained model read back from a run's folder or from a .safetensors file: its task, the module with the weights in it, and what was promised."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from server.run_folder import RunFolder, read_tensors
from shared.errors import ModelMismatchError, StorageError, UnknownTaskError, WardroundError
from shared.files import storage_errors
from shared.models import Parameters, set_parameters
from shared.results import PrivacyClaim
from shared.task import Task, architecture_hash, is_installed, resolve_task, task_names
from wardround.report.model_file import FINAL
from wardround.report.run_files import RunFiles, read_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose a site's own model is: the site, and the run that left it there (empty where the file does not say)."""

    site: str
    run: str = ""

    @property
    def sentence(self) -> str:
        """For people, on one line."""
        run = f", left there by run {self.run}" if self.run else ""
        return f"the own model of site {self.site}{run}: it is made of that hospital's patients, and is the hospital's alone"

    @classmethod
    def of(cls, header: Mapping[str, str]) -> "Owner | None":
        """As a file's header says; None of a shared model. A name is a line without control characters, whoever wrote the file."""
        site = header.get("own_model_of")
        return None if site is None else cls(site=_one_line(site), run=_one_line(header.get("run", "")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model in evaluation mode, with the weights of the file `source`.

    Attributes:
        study, study_hash: as the file's header says them.
        sha256: hex, of the file.
        run: the files of its run; None where the file stands alone.
        owner: whose own model it is; None of a model that is shared.
    """

    task: Task
    model: nn.Module = field(repr=False)
    source: Path
    study: str
    study_hash: str
    sha256: str
    run: RunFiles | None = field(default=None, repr=False)
    owner: Owner | None = None

    @property
    def claim(self) -> PrivacyClaim | None:
        """The run's claim sheet; None where it is not known."""
        return None if self.run is None else self.run.claim


OWN_MODELS = (
    "The sites of this run were judged by models of their own, which stay there ({strategy}): this is the shared model alone, and no metric of the run "
    "is of it. A hospital has its own by 'wardround site model'."
)


def own_models_note(path: Path) -> str:
    """What is to be known of the model of the run in this folder where sites have models of their own; empty else."""
    study = RunFolder.open(path).study if path.is_dir() else None
    return OWN_MODELS.format(strategy=study.strategy.name) if study is not None and study.own_models else ""


def read_trained(path: Path, *, task: str | None = None) -> Trained:
    """The final model of the run in the folder `path`, or the model in the .safetensors file `path`.

    Args:
        task: in place of the task that the study or the file names; it must be the same task, found in another place.

    Raises:
        StorageError: `path` is no run's folder, or the run has no final model (it is still running, or was killed).
        ModelMismatchError: the model is another task's or another architecture's, or a site's own in a run's folder, or the file is damaged.
        UnknownTaskError: the task is not known here, or is code that only the run or the file names.
    """
    if not path.exists():
        raise StorageError(f"{path}: expected a run's folder or a model's file, found nothing", "give the folder that simulate printed")
    if path.is_dir():
        return _of_run(path, task)
    header, parameters = read_tensors(path)
    found = {str(key): str(value) for key, value in header.items()}
    resolved = _task_of_file(found.get("task", ""), task, path)
    return _trained(resolved, path, found, {key: parameters[key] for key in found.get("order", "").split("\n") if key in parameters})


def _of_run(folder: Path, task: str | None) -> Trained:
    opened = RunFolder.open(folder)
    run = read_run(folder)
    file = folder / FINAL
    if not file.is_file():
        raise StorageError(
            f"{file}: not found; the run ended as {run.result.outcome!r} and has no final model",
            f"go on with 'wardround simulate --resume {folder}', and --data as before",
        )
    header = {str(key): str(value) for key, value in read_tensors(file)[0].items()}
    resolved = task_of_run(run.study.task, task, folder)
    _check_task(resolved, header.get("task", ""), file)
    if (owner := Owner.of(header)) is not None:
        raise ModelMismatchError(
            f"{file}: expected the model that the sites share, got {owner.sentence}",
            "restore the run's model; keep the site's own elsewhere, and give its file",
        )
    parameters = opened.read_model("final", architecture_hash(resolved.model()))
    return _trained(resolved, file, header, parameters, run=run)


def task_of_run(named: str, given: str | None, folder: Path) -> Task:
    """The task given, or the one that the study of the run in `folder` names, where that is installed (`shared.task.is_installed`) or a schema file.

    Raises:
        UnknownTaskError: it is other code, which is not imported; or it is not known here.
    """
    if given is None and ":" in named and not named.endswith(".toml") and not is_installed(named):
        raise UnknownTaskError(
            f"{folder}: its study's task {named!r} is code that nothing but the run's own files names, so it was not run",
            f"if you know that code, say so: --task {shlex.quote(_one_line(named))}",
        )
    return resolve_task(given or named)


def _task_of_file(named: str, given: str | None, path: Path) -> Task:
    """The task given, or the one that the file names: built in or installed, for a file alone shall not say what code is run.

    Raises:
        ModelMismatchError: the file names another task than the one given.
        UnknownTaskError: it names one that is not installed here.
    """
    if given is None and named not in task_names():
        raise UnknownTaskError(
            f"{path}: its task {named!r} is not installed here", "give it with --task: 'package.module:factory', or its schema's TOML file"
        )
    resolved = resolve_task(given or named)
    _check_task(resolved, named, path)
    return resolved


def _one_line(text: str) -> str:
    """As a terminal can be shown it, whoever wrote it."""
    return "".join(character if character.isprintable() else " " for character in text)


def _check_task(task: Task, named: str, path: Path) -> None:
    if task.name != named:
        raise ModelMismatchError(f"{path}: expected a model of task {task.name}, got one of task {named!r}", "give the model's own task with --task")


def _trained(task: Task, file: Path, header: dict[str, str], parameters: Parameters, *, run: RunFiles | None = None) -> Trained:
    model = task.model()
    if header.get("architecture") != architecture_hash(model):
        raise ModelMismatchError(
            f"{file}: expected the architecture that task {task.name} has here, got another", "install the version of the task that trained it"
        )
    personal = header.get("personal", "").split()
    if personal:
        raise ModelMismatchError(
            f"{file}: expected a whole model, got one of which {', '.join(personal[:3])} stayed at the sites (strategy of study {header.get('study')})",
            "each site has the whole of its own by 'wardround site model RUN SITE'; a strategy that shares the whole model leaves one that everybody can use",
        )
    try:
        set_parameters(model, parameters)
    except WardroundError as error:
        raise ModelMismatchError(f"{file}: {error.what}", "restore it, or run the study again") from None
    with storage_errors(file, "read"):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Trained(
        task=task, model=model.eval(), source=file, study=header.get("study", ""), study_hash=header.get("study_hash", ""), sha256=sha256, run=run,
        owner=Owner.of(header),
    )  # fmt: skip
