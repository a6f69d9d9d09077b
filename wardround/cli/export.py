"""`wardround export RUN`: the final model as a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.options import DebugOption, JsonOption


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a .safetensors file.", show_default=False)],
    format: Annotated[Literal["onnx", "torch-export"], typer.Option("--format", help="ONNX (extra 'onnx'), or PyTorch's .pt2.")] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Default: beside the model; a site's own is never written into a run's folder.", show_default=False
        ),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Where the model's task is, if not where the study says.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the final model for other programs, checked against the one that was trained, with its model card beside it."""
    from wardround.cli.output import console, print_envelope

    terminal = console(as_json=as_json)
    terminal.print("loading torch ...", style="dim")
    from wardround.deploying import NUM_CALLS, TOLERANCE, export_model

    done = export_model(run, format, out=out, task=task, force=force)
    terminal.print(f"model    {done.path}  ({done.num_bytes:,} bytes)", soft_wrap=True, markup=False)
    terminal.print(f"facts    {done.facts_file}", soft_wrap=True, markup=False)
    for card in done.cards:
        terminal.print(f"card     {card}", soft_wrap=True, markup=False)
    inputs = ", ".join(f"{part.name} (batch{''.join(f', {size}' for size in part.shape)}) {part.dtype}" for part in done.facts.inputs)
    terminal.print(f"inputs   {inputs}", soft_wrap=True, markup=False)
    terminal.print(f"check    agrees with the trained model to {done.largest_difference:.1e} (asked: {TOLERANCE:g}) on synthetic patients")
    told = ", ".join(f"{name} {milliseconds:.3f} ms" for name, milliseconds in done.latency_ms.items())
    terminal.print(f"latency  {told}: one patient's record, median of {NUM_CALLS} calls on this machine", soft_wrap=True)
    from wardround.trained import own_models_note

    if note := own_models_note(run):
        terminal.print(note, style="yellow", markup=False, soft_wrap=True)
    if (owner := done.facts.owner) is not None:
        terminal.print(f"whose    {owner.sentence}", style="yellow", markup=False, soft_wrap=True)
        terminal.print("no model card: the run's is of the model that the sites share", style="yellow")
    elif not done.cards:
        terminal.print("no model card: give the run's folder for one", style="yellow")
    if as_json:
        print_envelope(
            {
                "model": str(done.path),
                "facts": str(done.facts_file),
                "cards": [str(card) for card in done.cards],
                "num_bytes": done.num_bytes,
                "largest_difference": done.largest_difference,
                "tolerance": TOLERANCE,
                "latency_ms": done.latency_ms,
                "latency_calls": NUM_CALLS,
                **done.facts.model_dump(mode="json"),
            }
        )
