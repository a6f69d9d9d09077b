"""`wardround report RUN`."""

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write report.html of a run anew, from the files in its folder."""
    from server.run_folder import RunFolder
    from wardround.cli.output import console, print_envelope
    from wardround.report import write_report

    path = write_report(RunFolder.open(run).path)
    console(as_json=as_json).print(f"report  {path}", soft_wrap=True)
    if as_json:
        print_envelope({"report": str(path)})
