"""`wardround task list|show|init`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from shared.task import Task

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("list")
def list_tasks(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the tasks that can be named in a study."""
    from shared.task import resolve_task, task_names
    from wardround.cli.output import console, print_envelope, table

    tasks = [resolve_task(name) for name in task_names()]
    rows = [[task.name, task.title, task.modality, task.primary_metric] for task in tasks]
    console(as_json=as_json).print(table("tasks", ["name", "problem", "modality", "primary metric"], rows))
    if as_json:
        print_envelope({"tasks": [_about(task) for task in tasks]})


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task's name, 'package.module:factory', or a schema TOML file.", show_default=False)],
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write the task's page (Markdown) there; what stands below its mark is kept.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a task: its columns with units and ranges, model, metrics and source."""
    from shared.schema import TableSchema
    from shared.task import resolve_task
    from wardround.cli.output import console, print_envelope, table

    task = resolve_task(name)
    terminal = console(as_json=as_json)
    if page is not None:
        from shared.files import write_atomic
        from wardround.task_page import written_page

        write_atomic(page, written_page(page, task))
    terminal.print(f"{task.title}\n", style="bold", markup=False)
    if isinstance(task.schema, TableSchema):
        columns = [*task.schema.columns, task.schema.label]
        rows = [
            [c.name, c.type, _range_of(c.low, c.high, c.categories), c.unit, c.missing if c is not task.schema.label else "label"] for c in columns
        ]
        terminal.print(table("columns", ["name", "type", "range or categories", "unit", "missing"], rows))
    about = _about(task)
    terminal.print()
    terminal.print(table("", ["", " "], [[key.replace("_", " "), str(value)] for key, value in about.items() if key != "title"]))
    if as_json:
        schema = (
            task.schema.model_dump(mode="json") if isinstance(task.schema, TableSchema) else [part.model_dump(mode="json") for part in task.schema]
        )
        print_envelope({**about, "schema": schema})


@app.command("init")
def init(
    source: Annotated[Path, typer.Option("--from", metavar="CSV", help="A CSV file with a header line.")],
    label: Annotated[str | None, typer.Option("--label", help="The column to predict.")] = None,
    patient: Annotated[str | None, typer.Option("--patient", help="The column that names the patient.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="The column that names the hospital.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Schema file to write (default: the CSV's name with .toml).")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Propose a schema for your own table: types and units filled in, public ranges left for you."""
    from shared.tasks.proposal import propose_schema
    from wardround.cli.output import console, print_envelope

    proposal = propose_schema(source, label=label, patient=patient, site=site)
    path = out or source.with_suffix(".toml")
    proposal.write(path)
    terminal = console(as_json=as_json)
    terminal.print(f"wrote {path}", soft_wrap=True)
    for line in proposal.questions:
        terminal.print(f"  to fill in: {line}", markup=False)
    command = shlex.join(["wardround", "simulate", "--task", str(path), "--data", str(source)])
    terminal.print(f"then: {command}", soft_wrap=True, markup=False)
    if as_json:
        print_envelope({"schema": str(path), "to_fill_in": proposal.questions})


def _range_of(low: float | None, high: float | None, categories: tuple[str, ...]) -> str:
    return f"{low:g} to {high:g}" if low is not None and high is not None else ", ".join(categories) or "0, 1"


def _about(task: "Task") -> dict[str, object]:
    parameters = sum(parameter.numel() for parameter in task.model().parameters())
    return {
        "name": task.name,
        "title": task.title,
        "modality": task.modality,
        "metrics": [metric.name for metric in task.metrics],
        "primary_metric": task.primary_metric,
        "parameters": parameters,
        "sites": list(task.sites),
        "bundled_data": task.bundled,
        "source": task.source,
        "fingerprint": task.fingerprint(),
    }
