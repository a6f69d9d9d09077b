"""A simulation from study to run folder: virtual sites, the in-process engine, the two unchanged apps, baselines, result."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from client.app import client_app
from client.own_model import own_model
from client.policy import refuse_faults
from client.private_probe import probe_model
from client.site import Site
from server.app import server_app
from server.coordinator import START, Coordinator, model_header
from server.outcome import Baseline, RunOutcome, write_outcome
from server.run_folder import RunFolder
from server.sampler import num_asked
from server.sum_stages import more_sites
from server.warm_start import warm_start
from server.witness import Witness
from shared.errors import ConfigurationError, DataMissingError, ModelMismatchError, WardroundError
from shared.models import Parameters
from shared.personal import personal_names
from shared.plan import plan_site
from shared.results import Outcome, RoundRecord, SubgroupResult
from shared.root_log import root_log_unchanged
from shared.secure_sum.setting import MIN_THRESHOLD, SumForm
from shared.strategy_options import PERSONAL
from shared.study import Study
from shared.task import resolve_task
from simulations.baselines import run_baselines
from simulations.blocks.choice import DEFAULT_MEMORY, Choice, Engine, Execution, choose
from simulations.blocks.engine import BlockEngine, MakeWorkers
from simulations.blocks.workers import Pool
from simulations.faults import check_faults, faulty_sites, with_faults
from simulations.federation import (
    LEDGERS,
    VirtualFederation,
    declared_sizes,
    real_sites,
    releases_folder,
    resolve_delta,
    virtual_federation,
    virtual_sites,
)
from simulations.in_process import RUN_ID, SERVER_NODE_ID, InProcessGrid
from simulations.one_thread import one_thread
from simulations.setting import Setting
from simulations.site_files import site_files
from simulations.subgroups import evaluate_subgroups
from simulations.timed_grid import with_clock

if TYPE_CHECKING:  # Ray is an extra
    from simulations.blocks.ray_workers import RayWorkers

logger = logging.getLogger(__name__)

RAY_ON_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray, which asks nobody for a key, listens on all interfaces
WITNESS = ".witness"  # beside the runs: what the coordinator remembers of real ledgers, from run to run


def prepare(study: Study, data: Path | None) -> Setting:
    """The task, the sites and the resolved study; nothing is written and nothing trained.

    Raises:
        ConfigurationError, ModelRefusedError, DataError, PartitionError: what stands in the way, before any work is done.
    """
    task = resolve_task(study.task)
    probe_model(task, study)
    files = site_files(data)
    if files:
        logger.info("the sites are those of the site files; the study's [federation] is not used")
        refuse_faults(study)
        real = real_sites(files, task)
        check_quorum(study, len(real))
        sizes = [site.settings.declared_size for site in real.values()]
        resolved = resolve_delta(study, sizes)
        if resolved.private or resolved.site_level:
            resolved = resolved.replace(privacy={"noise_source": "os"})  # a hospital's noise is never seeded, whatever a study says
        return Setting(study=resolved, task=task, federation=None, real=real)
    federation = virtual_federation(task, study, data)
    check_quorum(study, len(federation.cohorts))
    check_faults(study, list(federation.cohorts))
    summaries = federation.summaries(task, study)
    declared = declared_sizes([summary.num_train for summary in summaries])
    resolved = resolve_delta(study, declared)
    for summary, size in zip(summaries, declared, strict=True):
        with at_site(summary.name):
            plan_site(resolved, size)
    return Setting(study=resolved, task=task, federation=federation, real={})


def check_quorum(study: Study, num_sites: int) -> None:
    """Raise `ConfigurationError` where the study waits for more sites than there are, or its strategy needs more."""
    if study.rounds.require != "all" and study.rounds.require > num_sites:
        raise ConfigurationError(
            f"rounds.require: expected at most the number of sites, {num_sites}, got {study.rounds.require}", "lower it, or use 'all'"
        )
    asked = num_asked(num_sites, study.strategy.fraction)
    if study.secure_aggregation is not None and asked < (needed := max(MIN_THRESHOLD, study.secure_aggregation.threshold or 0)):
        raise ConfigurationError(
            f"secure_aggregation: expected at least {needed} sites asked in a round, got {asked}",
            more_sites(study, asked),
        )
    if asked < study.strategy.least_updates:
        raise ConfigurationError(
            f"strategy {study.strategy.name}: expected at least {study.strategy.least_updates} sites asked in a round, got {asked}",
            "ask more sites, or let the strategy need fewer (tolerated, buffer_size)",
        )


def check_baselines(setting: Setting) -> None:
    """Raise `ConfigurationError` where baselines cannot be: at real sites, whose patients are not pooled, and in a cross-validation."""
    if setting.federation is None:
        raise ConfigurationError("--baselines: expected virtual sites, got real ones, whose patients are not pooled", "leave it out")
    if setting.study.evaluation.folds > 1:
        raise ConfigurationError(
            f"--baselines: expected evaluation.folds = 1, got {setting.study.evaluation.folds}", "compare with one fold, or leave it out"
        )


@contextlib.contextmanager
def at_site(name: str) -> Iterator[None]:
    """Say at which site a study cannot be planned."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"site {name}: {error.what}", error.remedy) from None


def start_run(setting: Setting, out: Path, *, baselines: bool = False, start_from: Path | None = None) -> RunFolder:
    """A new run's folder in `out` with the resolved study in it.

    Args:
        start_from: the folder of a run or a model's file, to start with its tensors instead of the seed's; see `server.warm_start`.

    Raises:
        DataMissingError, ModelMismatchError: there is none, or none that fits.
        StorageError: the folder cannot be made.
    """
    fingerprint = setting.federation.fingerprint() if setting.federation is not None else None
    if start_from is None:
        return RunFolder.create(out, setting.study, baselines=baselines, patients_sha256=fingerprint)
    personal = personal_names(setting.study.strategy, setting.task.model())
    start = warm_start(setting.task, setting.study.seed, start_from, personal=personal)
    folder = RunFolder.create(out, setting.study, baselines=baselines, patients_sha256=fingerprint, started_from=start.source)
    folder.write_model(START, start.parameters, model_header(setting.study, setting.task))
    return folder


def resume_run(setting: Setting, path: Path) -> RunFolder:
    """The folder of an earlier run of exactly this study on exactly these patients.

    Raises:
        ModelMismatchError: the study or the patients are others.
        StorageError: `path` is no run's folder.
    """
    folder = RunFolder.open(path)
    if folder.study_hash != setting.study.fingerprint():
        raise ModelMismatchError(f"{path}: expected the study that this run began with, got another", "start a new run")
    fingerprint = setting.federation.fingerprint() if setting.federation is not None else None
    if folder.start.patients_sha256 != fingerprint:
        raise ModelMismatchError(f"{path}: expected the patients that this run began with, got others", "give the same --data as before")
    return folder


def execute(
    setting: Setting, folder: RunFolder, *, baselines: bool, observe: Callable[[RoundRecord], None] = lambda record: None,
    execution: Execution = "auto", memory: int = DEFAULT_MEMORY, processes: int | None = None, engine: Engine = "in-process",
    ray_address: str | None = None, device: str = "cpu", plain_baselines: bool = True,
) -> None:  # fmt: skip
    """Run the study into `folder`, from its last checkpoint where there is one; result.json always says how it ended.

    Args:
        execution: many virtual sites at once ("blocks"), one after another ("sequential"), or the first where it can be ("auto").
        memory: bytes that training in blocks may take.
        processes: that train blocks; None: one for each core where there is enough to do, else this one.
        engine: where blocks are trained: on this machine, or on a Ray cluster.
        ray_address: of the cluster; None: one on this machine alone.
        device: where this machine trains blocks, as torch names it; `memory` is then of that device.
        plain_baselines: with baselines, those without privacy too where the study has some.

    Raises:
        WardroundError: what stopped the study; the folder's outcome is then "failed".
        KeyboardInterrupt: passed on; the outcome is "interrupted".
    """
    if baselines:
        check_baselines(setting)
    started = time.monotonic()
    choice = choose(setting, execution, memory, processes, device)
    if engine == "ray":
        choice = choice.on_ray(setting, ray_address, processes)
        _ray_workers(ray_address)  # refused before anything is begun where there is none
    sites = setting.real or virtual_sites(_federation(setting), setting.task, setting.study, folder.path / LEDGERS)
    witness = Witness(folder.path.parent / WITNESS) if setting.real else None
    coordinator = Coordinator(setting.study, setting.task, folder, observe=observe, witness=witness)
    federation = setting.federation
    run = RunOutcome(
        study=setting.study, task=setting.task, coordinator=coordinator, folder=folder, engine=engine, execution=str(choice), sites=setting.summaries(),
        seeded_noise=setting.study.privacy.noise_source == "seeded" and not setting.real,
        synthetic=federation is not None and federation.synthetic, notes={} if federation is None else federation.notes,
    )  # fmt: skip
    rooms = ("simulations", "server") if setting.real else ("simulations", "server", "client", "shared")  # what a real site logs stays with it
    with one_thread(), _logging_to(folder, rooms):
        try:
            logger.info("%s", describe(setting))
            logger.info("run  %s", folder.path)
            logger.info("sites are trained %s", choice)
            if sums := describe_sums(setting.study, len(setting.site_names)):
                logger.info("%s", sums)
            if setting.study.faults is not None:
                bad = sorted(faulty_sites(setting.study, setting.site_names))
                logger.info("faults are planted, %s: %s", setting.study.faults.kind, ", ".join(bad))
            _run_apps(coordinator, sites, setting, choice)
            compared = _baselines(setting, coordinator, folder, plain=plain_baselines) if baselines else {}
            subgroups = _subgroups(setting, coordinator)
        except BaseException as error:
            outcome: Outcome = "failed" if isinstance(error, Exception) else "interrupted"
            logger.warning("%s", error if isinstance(error, WardroundError) else type(error).__name__)
            with contextlib.suppress(WardroundError):  # the folder cannot be written: the first error says more
                write_outcome(run, outcome, {}, seconds=time.monotonic() - started)
            raise
        finally:
            for site in sites.values():
                site.close()
        write_outcome(run, "completed", compared, seconds=time.monotonic() - started, subgroups=subgroups)


def describe(setting: Setting) -> str:
    """One line: what runs, where, under which promise."""
    study = setting.study
    privacy = study.privacy
    budget = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else f"noise multiplier {privacy.noise_multiplier}"
    promised = privacy.delta is not None and privacy.unit != "none"
    promise = f"{budget} for each {privacy.unit} at delta {privacy.delta:g}" if promised else "no privacy"
    if privacy.site_epsilon is not None:
        promise += f", and epsilon {privacy.site_epsilon:g} for each site at delta {privacy.site_delta:g}"
    patients = "synthetic patients" if setting.federation is not None and setting.federation.synthetic else "patients"
    return f"{study.name}: task {setting.task.name} ({patients}), {len(setting.site_names)} sites, {study.rounds.count} rounds, {study.strategy.name}, {promise}"


def describe_sums(study: Study, num_sites: int) -> str:
    """How many sites are in a sum of updates at least, and that the study's threshold is raised where it is; empty where updates are not summed under masks."""
    options = study.secure_aggregation
    if options is None:
        return ""
    asked = num_asked(num_sites, study.strategy.fraction)
    least = SumForm.of_study(study, num_values=1, num_trainable=1).least_in_sum(asked)
    raised = f" (threshold {options.threshold} is raised to it)" if options.threshold is not None and options.threshold < least else ""
    return f"updates are summed under masks: a sum is of at least {least} of the {asked} sites asked{raised}"


def _run_apps(coordinator: Coordinator, sites: dict[str, Site], setting: Setting, choice: Choice) -> None:
    app = client_app(lambda context: sites[str(context.node_config["site"])])
    ordered = {name: sites[name] for name in sorted(sites)}
    context = Context(run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config={})
    if choice.in_process:
        server_app(coordinator)(_wrapped(InProcessGrid(app, ordered), setting, list(ordered)), context)
        return
    engine = BlockEngine(
        app, ordered, setting.task, setting.study, block_size=choice.block_size, stacked=choice.blocks, make_workers=_workers(choice),
        device=choice.device,
    )  # fmt: skip
    with contextlib.closing(engine):
        server_app(coordinator)(_wrapped(engine, setting, list(ordered)), context)


def _wrapped(grid: Grid, setting: Setting, names: list[str]) -> Grid:
    """The grid with the faults and the clock that the study asks for."""
    return with_clock(with_faults(grid, setting.study, names), setting.study, names, virtual=setting.federation is not None)


def _workers(choice: Choice) -> MakeWorkers | None:
    """What starts the processes that train; None where this one does."""
    if choice.engine == "ray":
        return functools.partial(_ray_workers(choice.ray_address), address=choice.ray_address, num_workers=choice.num_workers or None)
    return functools.partial(Pool, num_workers=choice.num_workers) if choice.num_workers else None


def _ray_workers(address: str | None) -> type["RayWorkers"]:
    with ray_imported(address):
        from simulations.blocks.ray_workers import RayWorkers
    return RayWorkers


@contextlib.contextmanager
def ray_imported(address: str | None) -> Iterator[None]:
    """Within it, what uses Ray may be imported.

    Raises:
        ConfigurationError: Ray is not installed.
    """
    if address is None:
        os.environ.setdefault(*RAY_ON_LOOPBACK)  # it is read when Ray is imported
    with root_log_unchanged():
        try:
            yield
        except ModuleNotFoundError as error:
            raise ConfigurationError("--engine ray: expected Ray, found it not installed", "pip install 'wardround[ray]'") from error


def _federation(setting: Setting) -> VirtualFederation:
    assert setting.federation is not None
    return setting.federation


def _subgroups(setting: Setting, coordinator: Coordinator) -> dict[str, dict[str, SubgroupResult]]:
    """Of the final model; real patients are not told apart here, and neither are those of sites with models of their own."""
    if setting.federation is None or isinstance(setting.study.strategy, PERSONAL):
        return {}
    return evaluate_subgroups(setting.task, setting.study, setting.federation.cohorts, coordinator.history.folds[-1].parameters)


def _baselines(setting: Setting, coordinator: Coordinator, folder: RunFolder, *, plain: bool) -> dict[str, Baseline]:
    """Baselines pool patients, so they exist for virtual sites alone; `check_baselines` has refused the rest."""
    federation = _federation(setting)
    logger.info("for comparison: every site alone, and all data pooled")
    final = coordinator.history.folds[-1].parameters
    finals = _own_models(setting, folder, final) if setting.study.own_models else dict.fromkeys(federation.cohorts, final)
    start = coordinator.first_parameters()
    return run_baselines(federation.cohorts, setting.task, setting.study, plain=plain, federated=finals, start=start)


def _own_models(setting: Setting, folder: RunFolder, final: Parameters) -> dict[str, Parameters]:
    """By site; one that never took part has none."""
    found = {}
    for name in _federation(setting).cohorts:
        with contextlib.suppress(DataMissingError):
            releases = releases_folder(folder.path / LEDGERS, name)
            found[name] = own_model(setting.study, setting.task, run=folder.name, releases=releases, final=final)
    return found


@contextlib.contextmanager
def _logging_to(folder: RunFolder, names: tuple[str, ...]) -> Iterator[None]:
    """log.jsonl takes what these rooms log while the block runs."""
    handler = folder.log_handler()
    rooms = [logging.getLogger(name) for name in names]
    levels = [room.level for room in rooms]
    for room in rooms:
        room.addHandler(handler)
        room.setLevel(logging.INFO)
    try:
        yield
    finally:
        for room, level in zip(rooms, levels, strict=True):
            room.removeHandler(handler)
            room.setLevel(level)
        handler.close()
