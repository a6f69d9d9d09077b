"""`wardround coordinator start|status|stop`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.plural import plural

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import Console

    from server.federation_file import FederationFile
    from server.status import CoordinatorStatus, StudyStatus
    from wardround.attending import Happening

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The coordinator's kit: the folder that provision made.", show_default=False)]
STATES = {"waiting for sites": "waiting"}  # in a table
SHOWN_OF_ERROR = 150  # characters
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line on stdout, as things happen.")]


@app.command("start")
def start(kit: KitArgument, as_json: JsonLinesOption = False, debug: DebugOption = False) -> None:
    """Run the coordinator until Ctrl-C or SIGTERM: sites connect, submitted studies run, and the page is served on this machine."""
    import logging

    from server.federation_file import FederationFile
    from shared.kit import FEDERATION
    from shared.root_log import root_log_unchanged
    from wardround.attending import SERVICE, Attendant, ProcessLog, Ready, Starting, Stopped
    from wardround.deployed_runs import coordinator_folder
    from wardround.quiet import quiet_flower_log

    began, tell = time.monotonic(), _teller(as_json=as_json)
    folder = coordinator_folder(kit).resolve()
    file = FederationFile.load(folder / FEDERATION)
    with root_log_unchanged():
        from server.service import Service
    quiet_flower_log()
    service = Service(folder)
    attendant, processes, log = Attendant(service.status, tell), ProcessLog(tell), logging.getLogger(SERVICE)
    log.addHandler(processes)
    log.setLevel(logging.INFO)
    log.propagate = False  # what it says is told here, once

    def ready() -> None:
        seconds, page = time.monotonic() - began, f"http://127.0.0.1:{file.coordinator.page_port}"
        tell(Ready(address=address_of(file), page=page, num_sites=len(file.sites), seconds=round(seconds, 1)))
        attendant.start()

    try:
        service.run(begun=lambda: tell(Starting(federation=file.name, kit=str(kit))), ready=ready)
    finally:
        attendant.stop()
        log.removeHandler(processes)
        log.propagate = True
    tell(Stopped())


@app.command("status")
def status(kit: KitArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the running coordinator's sites and studies; exit 4 where none runs."""
    from wardround.cli.output import console, print_envelope
    from wardround.deployed_runs import coordinator_status

    found = coordinator_status(kit)
    print_status(found, console(as_json=as_json))
    if as_json:
        print_envelope(found.model_dump(mode="json"))


@app.command("stop")
def stop(kit: KitArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Stop the running coordinator; studies go on from their last complete round when it is started again."""
    from shared.kit import STATE
    from shared.supervision import stop_instance
    from wardround.cli.output import console, print_envelope
    from wardround.deployed_runs import coordinator_folder

    was_running = stop_instance(coordinator_folder(kit) / STATE)
    console(as_json=as_json).print("stopped" if was_running else "no coordinator was running", markup=False)
    if as_json:
        print_envelope({"kit": str(kit), "was_running": was_running})


def address_of(file: "FederationFile") -> str:
    """Where sites connect."""
    host = file.coordinator.hosts[0]
    return f"https://{f'[{host}]' if ':' in host else host}:{file.coordinator.port}"


def _teller(*, as_json: bool) -> "Callable[[Happening], None]":
    """Prints an event as it comes: a line of JSON on stdout, or a line for people."""
    import sys

    from wardround.cli.output import console

    terminal = console(as_json=False)

    def tell(event: "Happening") -> None:
        if as_json:
            sys.stdout.write(event.model_dump_json() + "\n")
            sys.stdout.flush()
        else:
            _print_event(event, terminal)

    return tell


def _print_event(event: "Happening", terminal: "Console") -> None:
    from wardround.attending import ProcessEnded, Ready, SiteChanged, Starting, Stopped, StudyChanged, Warned

    now = f"{time.strftime('%H:%M:%S')}  "
    match event:
        case Starting():
            terminal.print(f"{now}starting the coordinator of {event.federation}: Flower's SuperLink and SuperExec, front door, page", style="dim")
        case Ready():
            terminal.print(f"{now}ready: sites connect to {event.address}, page at {event.page}", markup=False, soft_wrap=True)
        case SiteChanged():
            style = {"online": "green", "offline": "yellow"}.get(event.state)
            terminal.print(f"{now}site {event.site}: {event.state}", style=style, markup=False)
        case StudyChanged():
            progress = f", round {event.round}/{event.rounds}" if event.round else ""
            terminal.print(f"{now}study {event.run}: {event.state}{progress}", markup=False, soft_wrap=True)
            if event.error is not None:
                terminal.print(f"{now}  {event.error.code}: {event.error.what}", style="red", markup=False, soft_wrap=True)
        case Warned():
            terminal.print(f"{now}WARN {event.text}", style="yellow", markup=False, soft_wrap=True)
        case ProcessEnded():
            terminal.print(f"{now}WARN process {event.process} ended ({event.status})", style="yellow", markup=False, soft_wrap=True)
        case Stopped():
            terminal.print(f"{now}stopped", markup=False)


def print_status(found: "CoordinatorStatus", terminal: "Console") -> None:
    """The tables of sites and studies."""
    from wardround.cli.output import table

    online = sum(site.state == "online" for site in found.sites)
    terminal.print(
        f"{found.federation}: running since {_time(found.started)}, {online} of {plural(len(found.sites), 'site')} online, quorum {found.quorum}"
    )
    for warning in found.warnings:
        terminal.print(f"WARN {warning}", style="yellow", markup=False)
    rows = [[site.name, site.state, _time(site.last_contact), _text(site.declared_size), f"{site.expires:%Y-%m-%d}" if site.expires else "-"]
            for site in found.sites]  # fmt: skip
    terminal.print()
    terminal.print(table("sites", ["site", "state", "last contact", "declared size", "approved until"], rows))
    terminal.print()
    print_studies(list(found.studies), terminal)


def print_studies(studies: "list[StudyStatus]", terminal: "Console") -> None:
    """A table of runs, in the order given; of why one failed only the beginning, for `study show` has it all."""
    import textwrap

    from wardround.cli.output import table

    if not studies:
        terminal.print("no study was submitted yet: wardround study submit STUDY --coordinator KIT", markup=False)
        return
    rows = [
        [study.run, STATES.get(study.state, study.state), f"{study.round}/{study.rounds}", _last_metric(study), _spent(study)] for study in studies
    ]
    terminal.print(table("studies", ["run", "state", "round", "metric", "epsilon"], rows))
    for study in studies:
        if study.error is not None:
            why = textwrap.shorten(f"{study.run}: {study.error.code} {study.error.what}", SHOWN_OF_ERROR, placeholder=" ...")
            terminal.print(why, style="yellow", markup=False)


def _last_metric(study: "StudyStatus") -> str:
    value = study.history[-1].value if study.history else None
    return "-" if value is None or study.metric is None else f"{study.metric.upper()} {value:.2f}"


def _spent(study: "StudyStatus") -> str:
    spent = [site.epsilon for site in study.sites if site.epsilon is not None]
    if not spent:
        return "-"
    return f"{max(spent):.2f}" + (f"/{study.epsilon_asked:g}" if study.epsilon_asked else "")


def _time(moment: "datetime | None") -> str:
    """In the time zone of whoever reads it."""
    return "-" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _text(value: object) -> str:
    return "-" if value is None else str(value)
