"""The nouns and verbs of `wardround`."""

from typing import Annotated

import typer

from wardround.cli import (
    attack,
    audit,
    checking,
    coordinator,
    data,
    explain,
    export,
    federation,
    ledger,
    predict,
    privacy,
    report,
    simulate,
    site,
    study,
    sweep,
    task,
)

app = typer.Typer(
    help="Federated learning across hospitals, in rounds, with a promise about privacy that is kept in a ledger.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"wardround {importlib.metadata.version('wardround')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Federated learning across hospitals, in rounds, with a promise about privacy that is kept in a ledger."""


app.command("simulate")(simulate.simulate)
app.command("sweep")(sweep.sweep)
app.command("attack")(attack.attack)
app.command("report")(report.report)
app.command("explain")(explain.explain)
app.command("export")(export.export)
app.command("predict")(predict.predict)
app.command("provision")(federation.provision)
app.command("renew")(federation.renew)
app.command("revoke")(federation.revoke)
app.command("doctor")(checking.doctor)
app.add_typer(site.app, name="site", help="Join a federation as a hospital, run its site, and approve studies.")
app.add_typer(coordinator.app, name="coordinator", help="Run a federation's coordinator.")
app.add_typer(study.app, name="study", help="Look at study files; submit studies to hospitals and watch them.")
app.add_typer(task.app, name="task", help="Look at tasks, or describe your own table as one.")
app.add_typer(data.app, name="data", help="Check data against a task, or fetch public data.")
app.add_typer(privacy.app, name="privacy", help="Plan a budget, and see what was spent.")
app.add_typer(ledger.app, name="ledger", help="Verify, repair or close entries of a hospital's ledger.")
app.add_typer(audit.app, name="audit", help="Verify or export an audit log.")
