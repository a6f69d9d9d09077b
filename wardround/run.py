"""`simulate(study)` and the run that comes back."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from server.run_folder import RunFolder
from shared.errors import ConfigurationError, DataMissingError, StorageError
from shared.results import MetricValues, Result, RoundRecord, RunPrivacy
from shared.root_log import root_log_unchanged
from shared.study import Study
from wardround.quiet import quiet_flower_log, switch_off_telemetry
from wardround.report import write_report

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One execution of a study, read from its folder."""

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder.open(Path(path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def study(self) -> Study:
        """The study as it was resolved."""
        return self._folder.study

    @property
    def result(self) -> Result:
        """result.json.

        Raises:
            StorageError: the run has none (it is still running, or was killed).
        """
        path = self.path / "result.json"
        if not path.is_file():
            raise StorageError(f"{path}: not found; the run is not finished, or was killed", "resume it with simulate(..., resume=folder)")
        return Result.model_validate_json(path.read_text())

    @property
    def metrics(self) -> dict[str, MetricValues]:
        """Final metrics by source: "federated" and the baselines."""
        return self.result.metrics

    @property
    def privacy(self) -> RunPrivacy:
        """What was spent at each site."""
        return self.result.privacy

    @property
    def history(self) -> "pd.DataFrame":
        """A row a round and site: fold, round, evaluated_round, site, status, reason, epsilon, num_test, and a column a metric."""
        import pandas as pd

        rows = [
            {
                "fold": record.fold,
                "round": record.round,
                "evaluated_round": record.evaluated_round,
                "site": site.name,
                "status": site.status,
                "reason": site.reason,
                "epsilon": site.epsilon,
                "num_test": site.num_test,
                **(site.metrics or {}),
            }
            for record in self._folder.rounds()
            for site in record.sites
        ]
        return pd.DataFrame(rows)

    def report(self) -> Path:
        """Write report.html anew and give its path."""
        return write_report(self.path)

    def export(self, to: Literal["tensorboard", "mlflow"], path: str | Path) -> Path:
        """Write the history and the final metrics for TensorBoard or MLflow into the folder `path`; gives what to open.

        Raises:
            ConfigurationError: that package is not installed; it is no dependency.
            StorageError: the run has no result, or `path` cannot be written.
        """
        from wardround.trackers import export_run

        return export_run(self, to, Path(path))


def check_places(data: Path | None, out: Path) -> None:
    """Look at both places before seconds are spent on imports and data.

    Raises:
        DataMissingError: there is nothing at `data`.
        StorageError: `out` is no folder and cannot become one.
    """
    if data is not None and not data.exists():
        raise DataMissingError(f"{data}: expected data, found nothing", "check the path given with --data")
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{out}: could not make the run's folder: {existing} is not a folder that can be written to", "give another with --out")


def simulate(
    study: Study | str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path = "runs",
    baselines: bool | None = None,
    resume: str | Path | None = None,
    start_from: str | Path | None = None,
    execution: Literal["auto", "blocks", "sequential"] = "auto",
    processes: int | None = None,
    memory: int = 2_000_000_000,
    engine: Literal["in-process", "ray"] = "in-process",
    ray_address: str | None = None,
    device: str = "cpu",
    observe: Callable[[RoundRecord], None] = lambda record: None,
) -> Run:
    """Run a study over virtual sites on this machine, in this process.

    Args:
        study: a study, or its TOML file. With `resume`, the study of that run is meant and this one must equal it.
        data: file or folder of the cohort; or a folder of site files (`*/site.toml`), whose policies and ledgers then hold.
        out: the folder in which the run's folder is made.
        baselines: also train every site alone and all data pooled, without and with the study's privacy. None: no, or as a resumed run began.
        resume: an earlier run's folder, to go on from its last complete round; one that is complete is given back as it is.
        start_from: a run's folder or a model's file, whose tensors a new run starts with where names and shapes agree; the rest is the seed's.
        execution: train many virtual sites at once ("blocks"), one after another ("sequential"), or the first where the study allows it ("auto");
            the results agree but for the rounding of float32.
        processes: that train blocks; None: one for each core where there is enough to do. They make no difference to the result.
        memory: bytes that training in blocks may take at most.
        engine: "ray" trains on a Ray cluster (extra `ray`), with the same result; Ray starts and ends on this machine where no address is given.
        ray_address: of a cluster's head, as `ray.init` takes it; this version and the task must be installed on every node.
        device: where blocks are trained, as torch names it ("cuda"); `memory` is then of that device, and the last digits are its own.
        observe: called with every round's record.

    Raises:
        WardroundError: what is wrong, where, and what to do; nothing was trained where the study, its data or the output folder is at fault.

    >>> run = simulate(Study.load("studies/breast-cancer.toml").replace(rounds={"count": 2}))  # doctest: +SKIP
    """
    if resume is not None and start_from is not None:
        raise ConfigurationError("start_from: expected none with a run to resume, which has its own start, got one", "leave one of the two out")
    switch_off_telemetry()
    check_places(None if data is None else Path(data), Path(out))
    with root_log_unchanged():
        from simulations.simulate import check_baselines, execute, prepare, resume_run, start_run

    quiet_flower_log()
    study = study if isinstance(study, Study) else Study.load(study)
    setting = prepare(study, None if data is None else Path(data))
    if baselines:
        check_baselines(setting)
    if resume is None:
        folder = start_run(setting, Path(out), baselines=bool(baselines), start_from=None if start_from is None else Path(start_from))
    else:
        folder = resume_run(setting, Path(resume))
        baselines = folder.start.baselines if baselines is None else baselines
        if folder.outcome == "completed":
            return Run(folder.path)
    run = Run(folder.path)
    try:
        execute(
            setting, folder, baselines=bool(baselines), observe=observe, execution=execution, memory=memory, processes=processes, engine=engine,
            ray_address=ray_address, device=device,
        )  # fmt: skip
    except BaseException:
        with contextlib.suppress(Exception):  # the report of what there is; what stopped the run says more than why it has none
            run.report()
        raise
    run.report()
    return run
