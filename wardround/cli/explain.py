"""`wardround explain RUN --data DIR`: what the model looks at, on a page for the hospital alone."""

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a .safetensors file.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="As for simulate, or a site.toml. Omitted: the task's own patients, else synthetic ones."),
    ] = None,
    patients: Annotated[int, typer.Option("--patients", metavar="N", min=1, help="Patients to look at, at most; drawn by the run's seed.")] = 100,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page, its owner's alone to read; not in the run's folder.")] = Path(
        "explanation.html"
    ),
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Where the model's task is, if not where the study says.")] = None,
    options: Annotated[list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="Option of the task's loader; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what the final model looks at in your own patients: integrated gradients, or Grad-CAM for images, as one local page. Nothing is sent."""
    from wardround.cli.data import key_and_value
    from wardround.cli.output import console, print_envelope
    from wardround.plural import plural

    terminal = console(as_json=as_json)
    terminal.print("loading torch and captum ...", style="dim")
    from wardround.explaining import explain_run

    done = explain_run(run, data, patients=patients, out=out, task=task, options=dict(key_and_value(option) for option in options or []), force=force)
    if done.owner is not None:
        terminal.print(f"model  {done.owner.sentence}", style="yellow", markup=False, soft_wrap=True)
    for part in done.parts:
        terminal.print(f"{part.name}  {part.method}", markup=False, soft_wrap=True)
    if done.completeness_gap is not None:
        terminal.print(f"completeness  attributions add up to the model's output but for {done.completeness_gap:.2%} ({done.num_steps} steps)")
    if done.synthetic:
        terminal.print("SYNTHETIC patients", style="bold yellow")
    stays = "" if done.synthetic else "; it shows patients' data and must not leave the hospital"
    terminal.print(f"page  {done.page}: {plural(done.num_patients, 'patient')}{stays}", soft_wrap=True)
    if as_json:  # counts alone: what the model saw in patients is on the page, and nowhere else
        print_envelope(
            {
                "page": str(done.page),
                "task": done.task,
                "own_model_of": None if done.owner is None else done.owner.site,
                "num_patients": done.num_patients,
                "synthetic": done.synthetic,
                "methods": {part.name: part.method for part in done.parts},
            }
        )
