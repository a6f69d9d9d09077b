"""A site's own model as a file that predict, explain and export take, as they take a run's."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from client.own_model import own_model, require_own_models
from client.policy import SiteFile
from client.real_site import releases_folder
from server.run_folder import HEADER, RunFolder
from shared.errors import DataMissingError
from shared.kit import SITE_FILE
from shared.task import architecture_hash
from simulations.federation import LEDGERS
from simulations.federation import releases_folder as virtual_releases
from wardround.private_files import private_file
from wardround.trained import task_of_run


def write_own_model(run: Path, site: str, out: Path, *, task: str | None = None, force: bool = False) -> str:
    """Write the own model of a site, its owner's alone to read; gives the site's name.

    Args:
        run: the run's folder, whose study had a strategy with personal models.
        site: the name of a virtual site of it; or a hospital's site.toml, or the folder with it.
        task: where the task is, if not where the study says.

    Raises:
        ConfigurationError: the strategy leaves sites no model of their own, or `out` is in a run's folder.
        DataMissingError: the site kept none in this run.
        UnknownTaskError: the study's task is not known here, or is code that only the run's files name.
        StorageError: a file is damaged, there already, or cannot be written.
    """
    folder = RunFolder.open(run)
    study = folder.study
    require_own_models(study)
    resolved = task_of_run(study.task, task, run)
    name, releases = _site(run, site)
    architecture = architecture_hash(resolved.model())
    parameters = own_model(study, resolved, run=folder.name, releases=releases, final=folder.read_model("final", architecture))
    tensors = {key: np.asarray(value, order="C") for key, value in parameters.items()}
    header = {
        "study": study.name,
        "study_hash": study.fingerprint(),
        "task": resolved.name,
        "architecture": architecture,
        "order": "\n".join(parameters),
        "own_model_of": name,
        "run": folder.name,
    }
    with private_file(out, force=force) as file:
        file.buffer.write(safetensors.numpy.save(tensors, {HEADER: json.dumps(header, sort_keys=True)}))
    return name


def _site(run: Path, site: str) -> tuple[str, Path]:
    """Its name, and where it keeps what it made."""
    virtual = virtual_releases(run / LEDGERS, site)
    if virtual.is_dir():
        return site, virtual
    path = Path(site) / SITE_FILE if Path(site).is_dir() else Path(site)
    if not path.is_file():
        raise DataMissingError(
            f"{site}: expected a virtual site of this run that kept a model, or a hospital's site.toml, found neither",
            "the sites' names are in the run's report",
        )
    file = SiteFile.load(path)
    return file.name, releases_folder(path, file)
