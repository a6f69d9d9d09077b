"""`wardround simulate`: a study over virtual sites on this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wardround.cli.options import (
    DebugOption,
    EpsilonOption,
    JsonOption,
    RoundsOption,
    SeedOption,
    SitesOption,
    StudyArgument,
    TaskOption,
    overrides,
    study_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from shared.results import Result
    from shared.study import Study
    from shared.view import View

SOURCES = {
    "federated": "federated",
    "local_only": "each site alone",
    "pooled": "all data pooled",
    "local_only_private": "each site alone, private",
    "pooled_private": "all data pooled, private",
}
OWN_SOURCES = {
    **SOURCES,
    "federated": "each site's own, federated",
    "local_only": "each site's own, alone",
    "local_only_private": "each site's own, alone, private",
}
SHOWN_METRICS = 4
SHOWN_SITES = 30


def simulate(
    study: StudyArgument = None,
    sites: SitesOption = None,
    rounds: RoundsOption = None,
    epsilon: EpsilonOption = None,
    task: TaskOption = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The cohort: a file or folder; or a folder of */site.toml.")] = None,
    seed: SeedOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder in which the run's folder is made.")] = Path("runs"),
    baselines: Annotated[
        bool | None,
        typer.Option("--baselines/--no-baselines", help="Also train each site alone and all data pooled (default: when no study is named)."),
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on from the last complete round of this run's folder.")] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--start-from", metavar="MODEL", help="Start with what fits of this run's final model, or of a model's file.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        Literal["in-process", "ray"], typer.Option("--engine", help="Where sites are trained: on this machine, or on a Ray cluster (extra 'ray').")
    ] = "in-process",
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", metavar="A", help="Of the cluster; default: one on this machine alone.", show_default=False)
    ] = None,
    execution: Annotated[
        Literal["auto", "blocks", "sequential"],
        typer.Option("--execution", help="Train many sites at once, or one after another; auto: at once where the study allows it."),
    ] = "auto",
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="That train; default: one a core where there is enough to do.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="D", help="That trains blocks of sites, as torch names it: cpu, cuda, cuda:1.")] = "cpu",
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="What training may take at most, for example 4G or 500M.")] = "2G",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a study over virtual hospitals on this machine; with no argument, the embedded default study."""
    num_bytes = parse_memory(memory)
    changes = overrides(sites=sites, rounds=rounds, epsilon=epsilon, task=task, seed=seed)
    chosen = resumed_study(resume, study, changes) if resume is not None else read_study(study, task, changes)
    if baselines is None and resume is None:
        baselines = study is None and task is None
    if ray_address is not None and engine != "ray":
        raise typer.BadParameter("goes with --engine ray", param_hint="--ray-address")
    _run(
        chosen, data=data, out=out, baselines=baselines, resume=resume, as_json=as_json,
        how={
            "execution": execution, "processes": processes, "memory": num_bytes, "engine": engine, "ray_address": ray_address, "device": device,
            "start_from": start_from,
        },
    )  # fmt: skip


def parse_memory(text: str) -> int:
    """Bytes of a size such as 4G, 500M or 1000000.

    Raises:
        ConfigurationError: it is none, or not even a megabyte.
    """
    from shared.errors import ConfigurationError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text.strip().upper())
    num_bytes = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if num_bytes < 1_000_000:
        raise ConfigurationError(f"--memory: expected a size of at least 1M, got {text!r}", "for example --memory 4G")
    return num_bytes


def read_study(name: str | None, task: str | None, changes: dict[str, object]) -> "Study":
    """The study named (or shipped), with the options' changes."""
    from shared.study import Study
    from shared.study_tables import merge_tables

    table, source = study_table(name, task)
    study = Study.from_table(table, source=source)
    if name is None:
        changes = {key: value for key, value in changes.items() if key != "task"}
    return Study.from_table(merge_tables(study.to_table(), changes), source=f"{Path(source).name} and the command line") if changes else study


def resumed_study(resume: Path, name: str | None, changes: dict[str, object]) -> "Study":
    """The study of the run to resume.

    Raises:
        ConfigurationError: a study or changes were given as well.
    """
    from server.run_folder import RunFolder
    from shared.errors import ConfigurationError

    if name is not None or changes:
        raise ConfigurationError(
            "--resume: expected no study and no changes to it, since the run has its own, got some", "give --resume and --data alone"
        )
    return RunFolder.open(resume).study


def _run(
    study: "Study", *, data: Path | None, out: Path, baselines: bool | None, resume: Path | None, as_json: bool, how: dict[str, Any]
) -> None:  # fmt: skip
    from shared.view import View
    from wardround.cli.output import console, print_envelope
    from wardround.cli.progress import RoundLines
    from wardround.report.run_files import read_clipped

    terminal = console(as_json=as_json)
    terminal.print("loading torch, Opacus and Flower ...", style="dim")
    from wardround.run import simulate as run_simulation

    lines = RoundLines(study, terminal)
    with lines:
        run = run_simulation(study, data=data, out=out, baselines=baselines, resume=resume, observe=lines.observe, **how)
        result = run.result
        lines.finish(result)
    print_result(result, terminal, view=View.of(run.study), own=run.study.own_models)
    if (clipped := read_clipped(run.path)) is not None:
        terminal.print(f"\n{clipped.sentence}", style="yellow", soft_wrap=True)
    if run.study.own_models:
        terminal.print(
            f"\nThe metrics are of each site's own model on its own test patients{', federated and alone' if result.per_site_baselines else ''}. These models stay at the "
            "sites ('wardround site model RUN SITE' makes one a file); the shared one is in the run's folder, and no metric is of it.",
            markup=False,
            soft_wrap=True,
        )
    terminal.print(f"\nreport  {run.path / 'report.html'}", soft_wrap=True)
    if as_json:
        print_envelope({"run_dir": str(run.path), **result.model_dump(mode="json")})


def print_result(result: "Result", terminal: "Console", *, view: "View", own: bool = False) -> None:
    """The tables at the end of a run. `own`: sites were judged by models of their own."""
    from shared.whole_promise import start_sentence
    from wardround.cli.output import table

    terminal.print()
    columns, rows = metric_rows(result, OWN_SOURCES if own else SOURCES)
    if rows:
        terminal.print(table(f"{result.study}: test patients of {evaluated_sites(result)}", columns, rows))
    else:
        terminal.print("No evaluation statistic came from any site; the lines above say why.")
    terminal.print()
    columns, rows = site_rows(result)
    terminal.print(table("sites", columns, rows[:SHOWN_SITES]))
    if len(rows) > SHOWN_SITES:
        terminal.print(f"... and {len(rows) - SHOWN_SITES} more sites in the report")
    if result.started_from is not None:
        terminal.print(f"\n{start_sentence(result.started_from, result.privacy.unit)}", style="yellow", markup=False, soft_wrap=True)
    if result.synthetic:
        terminal.print("\nSYNTHETIC patients: nothing here says anything about real ones.", style="bold yellow")
    if result.evaluation_epsilon is not None:
        terminal.print(
            f"\nThe sites' statistics carry noise for their test patients (epsilon {result.evaluation_epsilon:g}): intervals are of that noise alone."
        )
    print_view(view, private=result.privacy.unit in ("patient", "record"), terminal=terminal)
    if (whole := result.privacy.site_level) is not None:
        terminal.print(
            f"\nWhole sites: epsilon {whole.epsilon:.2f} at delta {whole.delta:g}, against everybody but the coordinator"
            f"{'; nothing is promised to patients against the coordinator' if result.privacy.unit == 'site' else ''}.", markup=False, soft_wrap=True,
        )  # fmt: skip
    if result.privacy.distributed_noise is not None:
        terminal.print(f"\nDistributed noise. {result.privacy.distributed_noise.statement}", markup=False, soft_wrap=True)
    if result.privacy.seeded_noise:
        terminal.print("\nSeeded noise: this is a simulation and protects nobody. In a deployment each site draws its own noise.", style="yellow")


def print_view(view: "View", *, private: bool, terminal: "Console") -> None:
    """Who sees what of the updates, where they have no noise or leave under masks."""
    if not private:
        terminal.print(f"\nNo privacy for patients: {view.plainly}.", style="yellow", soft_wrap=True)
    elif view.masked and not view.shared:
        terminal.print(
            f"\nSecure aggregation: each update leaves with its own noise, {view.masks}. The promise does not rest on that.", soft_wrap=True
        )


def evaluated_sites(result: "Result") -> str:
    """`all sites`, or the number of sites whose test patients stand behind the metrics."""
    evaluated = sum(any(isinstance(value, float) for value in values.values()) for values in result.per_site.values())
    return "all sites" if evaluated == len(result.sites) else f"{evaluated} of {len(result.sites)} sites"


def metric_rows(result: "Result", titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the metrics by source; the primary metric has its interval."""
    from wardround.cli.output import number, with_interval

    present = {source: values for source, values in result.metrics.items() if values}
    names = [result.primary_metric, *(name for name in next(iter(present.values()), {}) if name != result.primary_metric)][:SHOWN_METRICS]
    rows = []
    for source, values in present.items():
        interval = result.metrics_ci95.get(source, {}).get(result.primary_metric)
        rows.append([titles.get(source, source), with_interval(values.get(names[0]), interval), *(number(values.get(name)) for name in names[1:])])
    return ["", *names], rows


def site_rows(result: "Result") -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the sites: sizes, the primary metric with its interval, epsilon."""
    from wardround.cli.output import number, with_interval

    metric = result.primary_metric
    rows = []
    for site in result.sites:
        values = result.per_site.get(site.name, {})
        value = values.get(metric)
        shown = with_interval(value, values.get(f"{metric}_ci95")) if isinstance(value, float) else "-"
        row = [site.name, str(site.num_patients), str(site.num_train), str(site.num_test), shown]
        spent = result.privacy.sites.get(site.name)
        rows.append([*row, number(spent.epsilon if spent else None, 2), f"{spent.delta:g}" if spent else "-"])
    return ["site", "patients", "train", "test", metric, "epsilon", "delta"], rows
