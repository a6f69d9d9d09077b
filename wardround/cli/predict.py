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
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A file or folder as for simulate --data, or a site.toml; omitted: the patients that the task brings along.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The CSV file, its owner's alone to read; - writes to stdout.")
    ] = "predictions.csv",
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Where the model's task is, if not where the study says.")] = None,
    options: Annotated[list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="Option of the task's loader; repeatable.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Predict for the others where rows do not fit, and name them; else all are refused.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict for your own patients, one row each. Data that do not fit the task's schema are refused; nothing is sent.

    A table that fits the schema is checked from end to end, then predicted for in parts, however large it is; other data are read whole first.
    """
    from wardround.cli.data import key_and_value
    from wardround.cli.output import console, print_envelope
    from wardround.plural import plural

    if out == STDOUT and as_json:
        raise typer.BadParameter("- and --json both write to stdout", param_hint="--out")
    terminal = console(as_json=as_json or out == STDOUT)
    terminal.print("loading torch ...", style="dim")
    from wardround.predicting import LEFT_OUT, open_predictor
    from wardround.private_files import refuse_in_run

    if out != STDOUT:
        refuse_in_run(Path(out))
    chosen = dict(key_and_value(option) for option in options or [])
    predictor = open_predictor(model, data, task=task, options=chosen, skip_bad_rows=skip_bad_rows)
    count = _write(predictor, out, force)
    patients = predictor.patients
    whose = f" of task {predictor.task.name}'s own data, for no DATA was given" if data is None else ""
    told = f"{plural(count, 'patient')}, {plural(patients.num_records, 'record')}{whose}"
    from wardround.trained import own_models_note

    if note := own_models_note(model):
        terminal.print(note, style="yellow", markup=False, soft_wrap=True)
    if predictor.owner is not None:
        terminal.print(f"model  {predictor.owner.sentence}", style="yellow", markup=False, soft_wrap=True)
    terminal.print(f"predicted for {told}: {', '.join(predictor.columns)}", soft_wrap=True, markup=False)
    if patients.left_out:
        terminal.print(f"LEFT OUT  {patients.left_out}", style="bold yellow", markup=False, soft_wrap=True)
    for note, number in patients.notes.items():
        if number and not note.startswith(LEFT_OUT):  # which was said
            terminal.print(f"  {note.replace('_', ' ')}: {number:,}", style="yellow", markup=False)
    if patients.synthetic:
        terminal.print("SYNTHETIC patients", style="bold yellow")
    if out != STDOUT:
        stays = "" if patients.synthetic else ": it is of patients and must not leave the hospital"
        terminal.print(f"wrote  {out}{stays}", soft_wrap=True, markup=False)
    if as_json:
        print_envelope(
            {
                "predictions": out,
                "task": predictor.task.name,
                "own_model_of": None if predictor.owner is None else predictor.owner.site,
                "num_patients": count,
                "num_records": patients.num_records,
                "columns": list(predictor.columns),
                "labels_read": predictor.labels_read,
                "left_out": patients.left_out,
                "notes": dict(patients.notes),
            }
        )


def _write(predictor: "Predictor", out: str, force: bool) -> int:
    from wardround.predicting import write_rows
    from wardround.private_files import private_file

    if out == STDOUT:
        return write_rows(predictor, sys.stdout)
    with private_file(Path(out), force=force) as file:
        return write_rows(predictor, file)
