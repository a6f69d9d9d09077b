"""`wardround data check|fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("check")
def check(
    task: Annotated[str, typer.Option("--task", metavar="T", help="The task that the data are for.")],
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="The cohort: a file or folder.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read a cohort as a site would, and say what was found; exit 5 where it does not fit the task."""
    from shared.task import resolve_task
    from wardround.cli.output import console, print_envelope, table

    cohort = resolve_task(task).load_cohort(data, {})
    rows = [["patients", str(cohort.num_patients)], ["records", str(cohort.num_records)]]
    rows += [[name.replace("_", " "), str(count)] for name, count in cohort.notes.items()]
    terminal = console(as_json=as_json)
    terminal.print(table(f"{data}: fits task {task}", ["", "count"], rows))
    if as_json:
        print_envelope({"num_patients": cohort.num_patients, "num_records": cohort.num_records, **cohort.notes})


@app.command("fetch")
def fetch(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task whose public data to download.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder in which a folder named after the task is made.")] = Path("data"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Download a task's public data from its publisher and check every file against its pinned hash."""
    from wardround.cli.output import console, print_envelope
    from wardround.fetch import fetch_data

    folder = fetch_data(task, out / task)
    terminal = console(as_json=as_json)
    terminal.print(f"data  {folder}", soft_wrap=True)
    terminal.print(f"then: wardround simulate {task} --data {folder}", soft_wrap=True)
    if as_json:
        print_envelope({"folder": str(folder)})
