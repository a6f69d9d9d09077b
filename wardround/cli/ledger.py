"""`wardround ledger verify|repair|close`."""

import re
from pathlib import Path
from typing import Annotated, cast

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.cli.spent import PathArgument, shares_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

SiteArgument = Annotated[Path, typer.Argument(metavar="KIT|SITE.TOML", help="A hospital's kit, or its site file.", show_default=False)]


@app.command("verify")
def verify(
    path: PathArgument,
    head: Annotated[str | None, typer.Option("--head", metavar="HASH", help="A row that the ledger must hold, as a coordinator saw it.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read every row: hashes, signatures, order, patients. A ledger that does not verify ends with exit code 1."""
    from client.keys import check_ledger_key
    from client.ledger import reading
    from wardround.cli.output import console, print_envelope
    from wardround.spending import ledgers_of, site_file_of

    path, found = site_file_of(path), []
    for file in ledgers_of(path):
        with reading(file) as ledger:
            if path.suffix == ".toml":
                check_ledger_key(path, ledger)
            if head is not None:
                ledger.check_head(head)
            shared = list(dict.fromkeys(plan.entry.study for plan in ledger.account.plans.values() if plan.entry.shares is not None))
            found.append({"ledger": str(file), "rows": ledger.num_rows, "head": ledger.head, "signed": ledger.signed, "distributed_noise": shared})
    for item in found:
        if item["distributed_noise"]:
            console(as_json=as_json).print(shares_line(cast("list[str]", item["distributed_noise"])), soft_wrap=True)
        signed = "every one signed by the site" if item["signed"] else "hash-chained, unsigned (a simulation's)"
        console(as_json=as_json).print(f"{item['ledger']}: {item['rows']} rows verify, {signed}; head {item['head']}")
    if as_json:
        print_envelope({"ledgers": found})


@app.command("repair")
def repair(
    path: SiteArgument,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="HASH", help="The row that a coordinator saw last, where the ledger was put back or lost; repeat."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Mend a ledger that is damaged, lost or put back. What is gone counts as the whole limit: a mended ledger never says less than was spent."""
    from client.keys import signing_key, site_key
    from client.policy import SiteFile
    from client.repair import repair_ledger
    from shared.errors import ConfigurationError
    from wardround.cli.output import console, print_envelope
    from wardround.spending import site_file_of

    path = site_file_of(path)
    site = SiteFile.load(path)
    for text in head or []:
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise ConfigurationError(f"--head: expected the 64 hexadecimal digits of a row, got {text!r}", "copy it from the error that named it")
    signer = signing_key(site_key(path.parent / site.state))
    done = repair_ledger(site.ledger_path(path), cohort=site.name, limit=site.policy.limit, signer=signer, heads=head or [])
    for line in done or ["the ledger verifies; nothing was done"]:
        console(as_json=as_json).print(line)
    if as_json:
        print_envelope({"ledger": str(site.ledger_path(path)), "done": done})


@app.command("close")
def close(
    path: SiteArgument,
    run: Annotated[str, typer.Argument(metavar="RUN", help="As 'wardround privacy spent' shows it.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """End a study that will not go on: what its plan did not use returns to the cohort; what was charged stays charged.

    A coordinator that resumes it all the same asks for what is left of its plan again, and is admitted while there is room.
    """
    from client.keys import open_ledger
    from shared.errors import ConfigurationError
    from wardround.cli.output import console, print_envelope
    from wardround.spending import site_file_of

    ledger = open_ledger(site_file_of(path))
    try:
        plan = ledger.account.plans.get(run)
        if plan is None:
            known = ", ".join(ledger.account.plans) or "none"
            raise ConfigurationError(f"{ledger.path}: expected a run in this ledger, got {run!r}; it has {known}", "see 'wardround privacy spent'")
        ledger.close_plan(run)
    finally:
        ledger.close()
    console(as_json=as_json).print(f"{run}: closed")
    if as_json:
        print_envelope({"run": run, "state": "closed"})
