"""`wardround site model RUN SITE`: a site's own model as a file."""

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption


def model(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    site: Annotated[str, typer.Argument(metavar="SITE", help="The hospital's site.toml; or a virtual site of the run, by name.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The model, its owner's alone to read; not in the run's folder.")] = Path(
        "own.safetensors"
    ),
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Where the model's task is, if not where the study says.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the site's own model, which a personal strategy left there, for predict, explain and export. Nothing is sent."""
    from wardround.cli.output import console, print_envelope

    terminal = console(as_json=as_json)
    terminal.print("loading torch ...", style="dim")
    from wardround.own_models import write_own_model

    name = write_own_model(run, site, out, task=task, force=force)
    terminal.print(
        f"wrote  {out}: the own model of {name}; it is made of that hospital's patients, and is the hospital's alone", soft_wrap=True, markup=False
    )
    if as_json:
        print_envelope({"model": str(out), "site": name})
