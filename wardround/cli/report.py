"""`wardround report RUN`, and of a sweep's folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.options import DebugOption, JsonOption

Reader = Literal["researcher", "ethics", "it-security", "model-card"]  # as wardround.report.document, which is too heavy for --help


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a sweep's.", show_default=False)],
    reader: Annotated[Reader, typer.Option("--for", help="Whom the report is for.")] = "researcher",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a report anew, from the files in a run's or a sweep's folder: one HTML page, and its content as JSON beside it."""
    import json

    from wardround.cli.output import console, print_envelope

    path = _of_sweep(run, reader) if (run / "sweep.toml").is_file() else _of_run(run, reader)
    console(as_json=as_json).print(f"report  {path}", soft_wrap=True)
    if as_json:
        print_envelope({"report": str(path), "content": json.loads(path.with_suffix(".json").read_bytes())})


def _of_run(run: Path, reader: Reader) -> Path:
    from server.run_folder import RunFolder
    from wardround.report import write_report

    return write_report(RunFolder.open(run).path, reader)


def _of_sweep(sweep: Path, reader: Reader) -> Path:
    """A sweep has runs of many promises, none of which an ethics board, IT security or a model card could be told of as one."""
    from shared.errors import ConfigurationError
    from simulations.sweeps.folder import SweepFolder
    from wardround.report.page import write_content
    from wardround.report.sweep_page import sweep_document, write_sweep_report

    if reader != "researcher":
        raise ConfigurationError(f"{sweep}: expected a run's folder, for a report for {reader}, got a sweep's", "give one run, or leave --for out")
    path = write_sweep_report(sweep)
    write_content(sweep_document(SweepFolder(sweep)), path)
    return path
