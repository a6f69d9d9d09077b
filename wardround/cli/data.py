"""`wardround data check|profile|fetch`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from client.data_check import Subject

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

DATA_CHECK = 5  # exit code
OptionValue = str | int | float | bool
TaskOption = Annotated[str, typer.Option("--task", metavar="T", help="The task that the data are for.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="The cohort: a file or folder, or a site.toml that names it. Omitted: patients that come with the task."
    ),
]
LoaderOption = Annotated[
    list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="An option of the task's loader; may be given several times.")
]


@app.command("check")
def check(task: TaskOption, data: DataOption = None, options: LoaderOption = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Read a cohort as a site would, and say all that is wrong or odd about it; exit 5 where something is wrong."""
    import traceback

    from client.data_check import check_data
    from wardround.cli.checking import print_finding
    from wardround.cli.output import console, print_envelope

    subject = _subject(task, data, options)
    terminal, found = console(as_json=as_json), []
    for finding in check_data(subject):
        found.append(finding)
        print_finding(finding, terminal)
        if debug and finding.cause is not None:
            traceback.print_exception(finding.cause)
    errors, warnings = (sum(finding.level == level for finding in found) for level in ("FAIL", "WARN"))
    code = DATA_CHECK if errors else 0
    terminal.print(_verdict(task, errors, warnings), style="bold red" if errors else "bold green", markup=False)
    if as_json:
        cohort = subject.cohort
        sizes = {} if cohort is None else {"num_patients": cohort.num_patients, "num_records": cohort.num_records, **cohort.notes}
        print_envelope(
            {"task": task, "fits": not errors, **sizes, "findings": [finding.to_table() for finding in found]},
            status="error" if code else "ok",
            exit_code=code,
        )
    if code:
        raise typer.Exit(code)


@app.command("profile")
def profile(
    task: TaskOption,
    data: DataOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the page and the aggregate; it is made if absent.")] = Path("profile"),
    min_cell: Annotated[int, typer.Option("--min-cell", min=5, metavar="M", help="Fewest patients of whom the aggregate tells.")] = 10,
    options: LoaderOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a page about the patients for the hospital alone, and beside it an aggregate without small cells that may be discussed outside."""
    from client.data_profile import profile_of
    from wardround.cli.output import console, print_envelope
    from wardround.report.profile_page import write_profile

    subject = _subject(task, data, options)
    if subject.error is not None:
        raise subject.error
    file = subject.source.file
    fewest = min_cell if file is None else max(min_cell, file.policy.min_metric_patients)
    name = "the task's own patients" if data is None else data.name
    profile = profile_of(subject.task, subject.loaded)
    page, aggregate = write_profile(profile, out, source=name, min_cell=fewest)
    terminal = console(as_json=as_json)
    stays = " SYNTHETIC patients" if profile.synthetic else " it describes patients and must not leave the hospital"
    terminal.print(f"page       {page}:{stays}", soft_wrap=True, markup=False)
    terminal.print(
        f"aggregate  {aggregate}: no cell below {fewest} patients, rounded; read it before it is shown to anyone", soft_wrap=True, markup=False
    )
    if as_json:
        print_envelope({"page": str(page), "aggregate": str(aggregate), "min_cell": fewest})


def _subject(task: str, data: Path | None, options: list[str] | None) -> "Subject":
    from client.data_check import DataSource, look_at
    from shared.errors import UsageError
    from shared.task import resolve_task

    resolved = resolve_task(task)
    if data is None and not resolved.bundled:
        raise UsageError(f"task {task} has no data of its own", "give the file or folder with --data")
    return look_at(resolved, DataSource.of(data, dict(key_and_value(option) for option in options or [])))


def key_and_value(text: str) -> tuple[str, OptionValue]:
    """What stands on either side of the first `=`, the value typed as TOML would.

    Raises:
        UsageError: there is no key, or no `=`.
    """
    from shared.errors import UsageError

    key, sign, value = text.partition("=")
    if not key or not sign:
        raise UsageError(f"--options: expected KEY=VALUE, got {text!r}", "for example --options tolerance=0.1")
    return key, _typed(value)


def _typed(text: str) -> OptionValue:
    """As TOML would read it: true, 3, 0.5, or a text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _verdict(task: str, errors: int, warnings: int) -> str:
    from wardround.plural import plural

    rest = f"{plural(warnings, 'warning')}" if warnings else "nothing to look at"
    return f"does not fit task {task}: {plural(errors, 'error')}, {plural(warnings, 'warning')}" if errors else f"fits task {task}: {rest}"


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
