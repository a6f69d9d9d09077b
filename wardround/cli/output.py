"""What a command prints: tables and lines for people, or exactly one JSON envelope on stdout with the human text on stderr."""

import json
import sys

from rich.console import Console
from rich.table import Table

from shared.errors import INTERRUPTED_EXIT_CODE, WardroundError

SCHEMA_VERSION = 1
GOES_ON = {
    "simulate": "if a run's folder was printed above, go on with 'wardround simulate --resume FOLDER', and --data as before",
    "sweep": "if a sweep's folder was printed above, go on with 'wardround sweep FOLDER': what is done is kept",
}  # by command
PLAIN_WIDTH = 140  # columns, where the output is no terminal


def console(*, as_json: bool) -> Console:
    """Where human text goes: stdout, or stderr beside an envelope."""
    is_terminal = (sys.stderr if as_json else sys.stdout).isatty()
    return Console(stderr=as_json, highlight=False, emoji=False, width=None if is_terminal else PLAIN_WIDTH)


def print_envelope(data: object, *, status: str = "ok", exit_code: int = 0) -> None:
    """The one JSON object of a command, on stdout."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, "status": status, "exit_code": exit_code, "data": data}, allow_nan=False) + "\n")


def report_error(error: WardroundError, *, as_json: bool) -> int:
    """Print an error as the command line does, and give its exit code."""
    return _report(error.code, error.what, error.remedy, error.exit_code, as_json=as_json)


def report_interruption(verb: str, *, as_json: bool) -> int:
    """Print that somebody ended the command `wardround VERB`, and how it goes on where it does; its exit code."""
    return _report("E130", "interrupted", GOES_ON.get(verb, ""), INTERRUPTED_EXIT_CODE, as_json=as_json)


def _report(code: str, what: str, remedy: str, exit_code: int, *, as_json: bool) -> int:
    stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    stderr.print(f"error {code}: {what}", style="bold red", markup=False)
    if remedy:
        stderr.print(f"  what to do: {remedy}", markup=False)
    if as_json:
        print_envelope({"code": code, "what": what, "remedy": remedy}, status="error", exit_code=exit_code)
    return exit_code


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table: first column left, the others right."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: object) -> str:
    """`0.812 [0.780, 0.841]`, or the number alone."""
    if value is None or not isinstance(interval, list | tuple):
        return number(value)
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
