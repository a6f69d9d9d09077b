"""`wardround sweep SWEEP`: one study over a grid of settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.cli.simulate import SOURCES

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.sweeps.cell import CellResult


def sweep(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's TOML file, or its folder to go on with it.", show_default=False)],
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The cohort: a file or folder; or a folder of */site.toml.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder in which the sweep's folder is made.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest folder of this sweep in --out.")] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="That run cells; default: one a core.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["in-process", "ray"], typer.Option("--engine", help="Where cells are run: on this machine, or on a Ray cluster (extra 'ray').")
    ] = "in-process",
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", metavar="A", help="Of the cluster; default: one on this machine alone.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a study once for every combination of a grid's settings, in parallel; what a kill leaves is gone on with."""
    if ray_address is not None and engine != "ray":
        raise typer.BadParameter("goes with --engine ray", param_hint="--ray-address")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from wardround.cli.output import console, print_envelope
    from wardround.plural import plural

    terminal = console(as_json=as_json)
    terminal.print("loading torch, Opacus and Flower ...", style="dim")
    from wardround.sweeping import open_sweep, run

    folder = open_sweep(sweep, data=data, out=out, resume=resume)
    waiting = len(folder.waiting())
    terminal.print(f"sweep {folder.sweep.name}: {plural(len(folder.cells), 'cell')}, {len(folder.cells) - waiting} of them done before", style="dim")
    terminal.print(f"sweep  {folder.path}", soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=terminal, transient=True, disable=not terminal.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("cells", total=len(folder.cells), completed=len(folder.cells) - waiting)

        def observe(result: "CellResult") -> None:
            bar.advance(task)
            terminal.print(cell_line(result, len(folder.cells)), markup=False, style="red" if result.status == "failed" else None, soft_wrap=True)

        results = run(folder, processes=processes, observe=observe, engine=engine, ray_address=ray_address)
    failed = [result for result in results if result.status == "failed"]
    print_summary(results, terminal)
    terminal.print(f"\ntable   {folder.path / 'table.csv'}\nreport  {folder.path / 'report.html'}", soft_wrap=True)
    status = "error" if failed else "ok"
    if as_json:
        counts = {"cells": len(folder.cells), "ok": len(results) - len(failed), "failed": [result.number for result in failed]}
        print_envelope({"sweep_dir": str(folder.path), "table": str(folder.path / "table.csv"), **counts}, status=status, exit_code=int(bool(failed)))
    if failed:
        named = ", ".join(str(result.number) for result in failed[:20])
        terminal.print(
            f"\n{plural(len(failed), 'cell')} failed: {named}. Go on with 'wardround sweep {folder.path}', which tries them again.", style="bold red"
        )
        raise typer.Exit(1)


def cell_line(result: "CellResult", num_cells: int) -> str:
    """`cell 7/240  privacy.epsilon 1.0  seed 3  AUROC 0.81  epsilon 0.99`."""
    from wardround.cli.output import number
    from wardround.report.wording import metric_title, upper_bound

    parts = [f"cell {result.number}/{num_cells}", *(f"{name} {value}" for name, value in result.settings.items())]
    if result.status == "failed":
        return "  ".join([*parts, f"FAILED: {result.error}"])
    parts.append(f"{metric_title(result.primary_metric)} {number(result.metrics.get('federated', {}).get(result.primary_metric))}")
    spent = [site.epsilon for site in result.privacy.sites.values()] if result.privacy is not None else []
    return "  ".join([*parts, f"epsilon {upper_bound(max(spent))}" if spent else "no privacy"])


def print_summary(results: "list[CellResult]", terminal: "Console") -> None:
    """A table: the primary metric at every setting but the seed, as mean and standard deviation over the seeds."""
    from wardround.cli.output import table
    from wardround.report.judged import beside_own_models
    from wardround.report.wording import metric_title
    from wardround.sweeping import summarise

    found = [result for result in results if result.status == "ok"]
    if not found:
        return
    rows = summarise(found)
    settings = list(rows[0].settings)
    sources = list(dict.fromkeys(source for row in rows for source in row.values))
    shown = [[*(str(row.settings[name]) for name in settings), *(row.text(source) for source in sources), str(row.num_runs)] for row in rows]
    terminal.print()
    terminal.print(
        table(
            f"{metric_title(found[0].primary_metric)}: mean ± standard deviation over seeds",
            [*settings, *(SOURCES.get(source, source) for source in sources), "runs"],
            shown,
        )
    )
    if own := beside_own_models(str(result.study["strategy.name"]) for result in found):
        terminal.print(f"\n{own}", markup=False, soft_wrap=True)
    if any(result.synthetic for result in found):
        terminal.print("\nSYNTHETIC patients: nothing here says anything about real ones.", style="bold yellow")
