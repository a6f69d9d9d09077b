"""`wardround study show|schema|list`, and of studies at a coordinator `submit|list|watch|stop|resume|show|download`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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

    from server.status import StudyState
    from wardround.watching import StudyEnded

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

RUN_HELP = "A run's name, the beginning of one, or 'latest'."

CoordinatorOption = Annotated[Path, typer.Option("--coordinator", metavar="KIT", help="The coordinator's kit.", show_default=False)]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP, show_default=False)]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line on stdout, as things happen.")]
Kind = Literal["study", "site", "task", "result"]


@app.command("show")
def show(
    study: Annotated[
        str | None,
        typer.Argument(metavar="[STUDY|RUN]", help="A study's TOML file or a shipped study; with --coordinator a run.", show_default=False),
    ] = None,
    sites: SitesOption = None,
    rounds: RoundsOption = None,
    epsilon: EpsilonOption = None,
    task: TaskOption = None,
    seed: SeedOption = None,
    coordinator: Annotated[Path | None, typer.Option("--coordinator", metavar="KIT", help="Show a run of this coordinator.")] = None,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the study as a TOML file instead, to begin one of your own with.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the merged study, and where every value came from; with --coordinator KIT a submitted run: state, sites, last metrics, epsilon."""
    from shared.study_tables import flatten
    from wardround.cli.output import console, print_envelope, table
    from wardround.cli.simulate import read_study

    changes = overrides(sites=sites, rounds=rounds, epsilon=epsilon, task=task, seed=seed)
    if as_toml and (coordinator is not None or as_json):
        raise typer.BadParameter("expected neither --coordinator nor --json beside it", param_hint="--toml")
    if coordinator is not None:
        _show_run(coordinator, study, changes, as_json=as_json)
        return
    table_in_file, source = study_table(study, task)
    resolved = read_study(study, task, changes)
    if as_toml:
        typer.echo(resolved.to_toml(), nl=False)
        return
    values = flatten(resolved.to_table())
    in_file, asked = flatten(table_in_file), flatten(changes)
    origins = {key: "command line" if key in asked else Path(source).name if key in in_file else "default" for key in values}
    console(as_json=as_json).print(
        table(f"study {resolved.name}", ["key", "value", "from"], [[key, str(value), origins[key]] for key, value in values.items()])
    )
    if as_json:
        print_envelope({"study": resolved.to_table(), "origins": origins, "fingerprint": resolved.fingerprint()})


def _show_run(coordinator: Path, name: str | None, changes: dict[str, object], *, as_json: bool) -> None:
    from shared.errors import UsageError
    from wardround.cli.output import console, print_envelope
    from wardround.cli.submitted import print_run
    from wardround.deployed_runs import choose_run

    if name is None or changes:
        raise UsageError("--coordinator: expected a run and no changes to its study", f"see 'wardround study list --coordinator {coordinator}'")
    run = choose_run(coordinator, name)
    status = run.status()
    terminal = console(as_json=as_json)
    print_run(run, status, terminal)
    _warn_if_down(coordinator, [status.state], terminal)
    if as_json:
        result = run.result()
        metrics = {} if result is None else result.metrics.get("federated", {})
        print_envelope({**status.model_dump(mode="json"), "metrics": metrics, "run_dir": str(run.path), "study_table": run.study.to_table()})


@app.command("schema")
def schema(of: Annotated[Kind, typer.Option("--of", help="Which file's schema.")] = "study", debug: DebugOption = False) -> None:
    """Print the JSON Schema of a study, site or task file, or of result.json."""
    typer.echo(json.dumps(_model(of).model_json_schema(), indent=2))  # type: ignore[attr-defined]  # a pydantic model


def _model(kind: Kind) -> object:
    from client.policy import SiteFile
    from shared.results import Result
    from shared.study import Study
    from shared.tasks.tabular import TabularTask

    return {"study": Study, "site": SiteFile, "task": TabularTask, "result": Result}[kind]


@app.command("list")
def list_studies(
    coordinator: Annotated[Path | None, typer.Option("--coordinator", metavar="KIT", help="List the runs of this coordinator.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the shipped studies; with --coordinator KIT the submitted ones, newest first, also while no coordinator runs."""
    from shared.study import Study
    from wardround.cli.output import console, print_envelope, table

    if coordinator is not None:
        _list_runs(coordinator, as_json=as_json)
        return
    from wardround.studies import shipped_studies

    studies = [Study.load(path) for path in shipped_studies()]
    console(as_json=as_json).print(
        table("shipped studies", ["name", "task", "purpose"], [[study.name, study.task, study.purpose] for study in studies])
    )
    if as_json:
        print_envelope({"studies": [{"name": study.name, "task": study.task, "purpose": study.purpose} for study in studies]})


def _list_runs(coordinator: Path, *, as_json: bool) -> None:
    from wardround.cli.coordinator import print_studies
    from wardround.cli.output import console, print_envelope
    from wardround.deployed_runs import deployed_runs

    studies, terminal = [run.status() for run in reversed(deployed_runs(coordinator))], console(as_json=as_json)
    print_studies(studies, terminal)
    _warn_if_down(coordinator, [study.state for study in studies], terminal)
    if as_json:
        print_envelope({"studies": [study.model_dump(mode="json") for study in studies]})


def _warn_if_down(coordinator: Path, states: "list[StudyState]", terminal: "Console") -> None:
    """Say that what seems to go on does not."""
    from wardround.deployed_runs import FINISHED, running_instance

    if any(state not in FINISHED for state in states) and running_instance(coordinator) is None:
        terminal.print(f"no coordinator runs, so nothing goes on: wardround coordinator start {coordinator}", style="yellow", markup=False)


@app.command("submit")
def submit(
    coordinator: CoordinatorOption,
    study: StudyArgument = None,
    rounds: RoundsOption = None,
    epsilon: EpsilonOption = None,
    task: TaskOption = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Seed of everything but the hospitals' noise.")] = None,
    token: Annotated[
        str | None, typer.Option("--token", metavar="T", help="Submitted again with the same token, it is the same run; default: a new one.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Then watch it until its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and submit nothing.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Send a study to the hospitals of a running coordinator, or with --dry-run show what it would mean at each."""
    from shared.errors import UsageError
    from wardround import deployment
    from wardround.cli.output import console, print_envelope
    from wardround.cli.simulate import read_study
    from wardround.cli.submitted import print_plan, print_remarks

    if study is None and task is None:
        raise UsageError("expected a study, got none", "give its TOML file or the name of a shipped one: 'wardround study list'")
    terminal = console(as_json=as_json)
    asked = read_study(study, task, overrides(sites=None, rounds=rounds, epsilon=epsilon, task=task, seed=seed))
    plan = deployment.prepare(coordinator, asked)
    if dry_run:
        print_plan(plan, terminal)
        terminal.print("\ndry run: nothing was submitted", style="bold")
        if as_json:
            print_envelope(plan.numbers())
        return
    token = token or deployment.new_token()
    run = deployment.submit(coordinator, plan.deployed.study, token)
    print_remarks(plan, terminal)
    terminal.print(f"submitted as {run}", style="bold", markup=False, soft_wrap=True)
    terminal.print(f"  token {token}: submitting again with it makes no second run", markup=False, soft_wrap=True)
    steps = ["hospitals approve it with: wardround site approve KIT", f"wardround study watch {run} --coordinator {coordinator}"]
    for step in steps[:1] if watch else steps:
        terminal.print(f"  next: {step}", markup=False, soft_wrap=True)
    told: dict[str, object] = {"run": run, "token": token, "study_hash": plan.deployed.study.fingerprint()}
    told |= {"notes": list(plan.deployed.notes), "warnings": list(plan.deployed.warnings), "next": steps}
    if watch:
        if as_json:
            typer.echo(json.dumps({"event": "submitted", **told}))
        _watch(coordinator, run, as_json=as_json)
    elif as_json:
        print_envelope(told)


@app.command("watch")
def watch(
    run: RunArgument,
    coordinator: CoordinatorOption,
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="S", min=0, help="Give up after so many seconds: exit 8.")] = None,
    as_json: JsonLinesOption = False,
    debug: DebugOption = False,
) -> None:
    """Follow a run until its end, a line a round; the exit code is the study's: 0 completed, 1 stopped, else that of what it failed of."""
    _watch(coordinator, run, timeout_seconds=timeout, as_json=as_json)


def _watch(coordinator: Path, name: str, *, timeout_seconds: float | None = None, as_json: bool) -> None:
    from wardround.cli.output import console
    from wardround.cli.submitted import WatchLines
    from wardround.deployed_runs import choose_run
    from wardround.watching import StudyEnded
    from wardround.watching import watch as watch_run

    terminal, run = console(as_json=as_json), choose_run(coordinator, name)
    lines = WatchLines(terminal)
    again = f"wardround study watch {run.name} --coordinator {coordinator}"
    try:
        for event in watch_run(coordinator, run, timeout_seconds=timeout_seconds):
            if as_json:
                typer.echo(event.model_dump_json())
            else:
                lines.tell(event)
            if isinstance(event, StudyEnded):
                if not as_json:
                    _print_next(coordinator, event, terminal)
                raise typer.Exit(event.exit_code)
    except KeyboardInterrupt:
        terminal.print(f"the study goes on without being watched; again: {again}", markup=False, soft_wrap=True)
        raise


def _print_next(coordinator: Path, end: "StudyEnded", terminal: "Console") -> None:
    verb, more = ("download", " --out DIR") if end.state == "completed" else ("resume", "")
    terminal.print(f"  next: wardround study {verb} {end.run} --coordinator {coordinator}{more}", markup=False, soft_wrap=True)


@app.command("stop")
def stop(run: RunArgument, coordinator: CoordinatorOption, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Stop a run; what its rounds have spent stays spent, and 'resume' goes on from the last complete one."""
    _ask(coordinator, run, "stop", "is asked to stop", as_json=as_json)


@app.command("resume")
def resume(run: RunArgument, coordinator: CoordinatorOption, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Have a run that was stopped or failed go on from its last complete round."""
    _ask(coordinator, run, "resume", "goes on from its last complete round", as_json=as_json)


def _ask(coordinator: Path, name: str, verb: str, told: str, *, as_json: bool) -> None:
    from wardround.cli.output import console, print_envelope
    from wardround.deployed_runs import choose_run
    from wardround.deployment import ask

    run = choose_run(coordinator, name)
    ask(coordinator, run.name, verb)
    terminal = console(as_json=as_json)
    terminal.print(f"{run.name} {told}", markup=False, soft_wrap=True)
    terminal.print(f"  next: wardround study watch {run.name} --coordinator {coordinator}", markup=False, soft_wrap=True)
    if as_json:
        print_envelope({"run": run.name})


@app.command("download")
def download(
    run: RunArgument,
    coordinator: CoordinatorOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files; made where absent.", show_default=False)],
    partial: Annotated[bool, typer.Option("--partial", help="Also of a run that is not completed: what there is.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a completed run's model, result, claim sheet and report."""
    from wardround.cli.output import console, print_envelope
    from wardround.deployed_runs import choose_run, download_run

    chosen = choose_run(coordinator, run)
    files = download_run(chosen, out, partial=partial)
    terminal = console(as_json=as_json)
    for path in files:
        terminal.print(f"wrote {path}", markup=False, soft_wrap=True)
    if as_json:
        print_envelope({"run": chosen.name, "out": str(out), "files": [str(path) for path in files]})
