"""`wardround predict MODEL DATA`: one row a patient."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from wardround.predicting import Predictor

STDOUT = "-"


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder, a .safetensors or an .onnx file.", show_default=False)],
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="A file or folder as for simulate --data, or a site.toml.", show_default=False)
    ] = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The CSV file, its owner's alone to read; - writes to stdout.")
    ] = "predictions.csv",
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Where the model's task is, if not where the study says.")] = None,
    options: Annotated[list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="Option of the task's loader; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict for your own patients, one row each. Data that do not fit the task's schema are refused; nothing is sent."""
    from wardround.cli.data import key_and_value
    from wardround.cli.output import console, print_envelope
    from wardround.plural import plural

    if out == STDOUT and as_json:
        raise typer.BadParameter("- and --json both write to stdout", param_hint="--out")
    terminal = console(as_json=as_json or out == STDOUT)
    terminal.print("loading torch ...", style="dim")
    from wardround.predicting import open_predictor

    predictor = open_predictor(model, data, task=task, options=dict(key_and_value(option) for option in options or []))
    count = _write(predictor, out, force)
    told = f"{plural(count, 'patient')}, {plural(predictor.cohort.num_records, 'record')}"
    terminal.print(f"predicted for {told}: {', '.join(predictor.columns)}", soft_wrap=True, markup=False)
    for note, number in predictor.cohort.notes.items():
        if number:
            terminal.print(f"  {note.replace('_', ' ')}: {number:,}", style="yellow", markup=False)
    if predictor.cohort.synthetic:
        terminal.print("SYNTHETIC patients", style="bold yellow")
    if out != STDOUT:
        terminal.print(f"wrote  {out}: it is of patients and must not leave the hospital", soft_wrap=True, markup=False)
    if as_json:
        print_envelope(
            {
                "predictions": out,
                "task": predictor.task.name,
                "num_patients": count,
                "num_records": predictor.cohort.num_records,
                "columns": list(predictor.columns),
                "labels_read": predictor.labels_read,
                "notes": dict(predictor.cohort.notes),
            }
        )


def _write(predictor: "Predictor", out: str, force: bool) -> int:
    from wardround.predicting import write_rows
    from wardround.private_files import private_file

    if out == STDOUT:
        return write_rows(predictor, sys.stdout)
    with private_file(Path(out), force=force) as file:
        return write_rows(predictor, file)
