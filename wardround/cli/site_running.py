"""`wardround site start|status|stop`."""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.plural import plural

if TYPE_CHECKING:
    from rich.console import Console

    from shared.audit import AuditRow
    from wardround.site_state import SiteState
    from wardround.spending import Spending

NOT_RUNNING = 4  # exit code

SiteKitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of the site's kit.", show_default=False)]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line on stdout, as things happen.")]
Tell = Callable[[str, Mapping[str, object]], None]


def start(kit: SiteKitArgument, as_json: JsonLinesOption = False, debug: DebugOption = False) -> None:
    """Run the site until Ctrl-C or SIGTERM: its daemon, which alone touches patients, and its courier, which alone faces the network."""
    import threading

    from client.hospital import Hospital
    from client.reaching import Coordinator, preflight
    from client.station import run_station
    from shared.root_log import root_log_unchanged
    from wardround.quiet import quiet_flower_log
    from wardround.site_state import site_folder

    tell = _teller(as_json=as_json)
    site_folder(kit)
    with root_log_unchanged():
        hospital = Hospital.open(kit.resolve())
    quiet_flower_log()
    coordinator, stop = Coordinator.of(hospital.manifest, hospital.kit), threading.Event()

    def begun() -> None:
        tell("starting", {"site": hospital.name, "coordinator": coordinator.address})
        for warning in preflight(coordinator, hospital.manifest):
            tell("warning", {"text": warning})

    def observe(event: str, process: str, facts: Mapping[str, object]) -> None:
        tell(event, {"process": process, **facts})

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_station(hospital.kit, stop, begun=begun, observe=observe)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    tell("site stopped", {"site": hospital.name})


def status(kit: SiteKitArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show how the site is: processes, connection, approvals, budget; exit 4 where it does not run."""
    from shared.root_log import root_log_unchanged
    from wardround.cli.output import console, print_envelope

    with root_log_unchanged():
        from wardround.site_state import site_state
    found = site_state(kit)
    code = 0 if found.running else NOT_RUNNING
    _print_state(found, kit, console(as_json=as_json))
    if as_json:
        print_envelope(found.to_table(), status="ok" if found.running else "error", exit_code=code)
    if code:
        raise typer.Exit(code)


def stop(kit: SiteKitArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Stop the running site; what it has agreed to and spent stays, and a study goes on when it is started again."""
    from shared.root_log import root_log_unchanged
    from shared.supervision import stop_instance
    from wardround.cli.output import console, print_envelope

    with root_log_unchanged():
        from wardround.site_state import site_folder
    _, state = site_folder(kit)
    was_running = stop_instance(state)
    console(as_json=as_json).print("stopped" if was_running else "the site was not running", markup=False)
    if as_json:
        print_envelope({"kit": str(kit), "was_running": was_running})


def _teller(*, as_json: bool) -> Tell:
    """Prints an event as it comes: a line of JSON on stdout, or where there is something to say, a line for people."""
    import json
    from datetime import UTC, datetime

    from wardround.cli.output import console

    terminal, seen, told, said = console(as_json=False), set[str](), "", ""

    def tell(event: str, facts: Mapping[str, object]) -> None:
        nonlocal told, said
        if as_json:
            moment = datetime.now(UTC).isoformat(timespec="milliseconds")
            sys.stdout.write(json.dumps({"event": event, "time": moment, **facts}) + "\n")
            sys.stdout.flush()
            return
        again = f"{event} {facts.get('process')}" in seen
        seen.add(f"{event} {facts.get('process')}")
        text, style = line_of(event, facts, again=again)
        waiting = told and event == "exited" and facts.get("process") == "courier"  # it ends and starts until it is let in: said already
        if event in ("unreachable", "reachable") or (event == "ready" and facts.get("process") == "courier"):
            text, told = "" if text == told else text, text if event == "unreachable" else ""
        if event == "answered" and text == said:
            text = ""  # asked again, and answered the same
        elif event == "answered":
            said = text
        if text and not waiting:
            terminal.print(f"{time.strftime('%H:%M:%S')}  {text}", style=style, markup=False, soft_wrap=True)

    return tell


def line_of(event: str, facts: Mapping[str, object], *, again: bool) -> tuple[str, str | None]:
    """What to say of an event, and in which style; an empty text: nothing."""
    process = facts.get("process")
    match event:
        case "warning":
            return f"WARN {facts['text']}", "yellow"
        case "starting":
            return f"starting site {facts['site']}, for the coordinator at {facts['coordinator']}", "dim"
        case "ready":
            what = "listens" if process == "daemon" else f"is connected{_as_node(facts)}"
            return f"{process} {what}{' again' if again else ''}", "green"
        case "unreachable":
            return f"WARN {_problem(str(facts['problem']))}", "yellow"
        case "reachable":
            return "the coordinator answers again", "green"
        case "unwritable":
            return f"WARN {facts['problem']}; until then this site answers no study", "yellow"
        case "writable":
            return "the state folder can be written to again", "green"
        case "answered":
            return _answered(facts)
        case "exited":
            return f"WARN {process} ended ({_how(facts['status'])}); it starts again in {facts['restart_in_seconds']:g} s", "yellow"
        case "site stopped":
            return "stopped", None
        case _:
            return "", None


def _answered(facts: Mapping[str, object]) -> tuple[str, str | None]:
    """What the daemon answered, as its audit log says."""
    reason, run = str(facts.get("reason", "")), facts.get("run", "a study")
    match facts.get("kind"):
        case "refused" if "approval.missing" in reason:
            return f"{run} waits for this hospital's decision: wardround site approve KIT", "bold yellow"
        case "refused":  # what is this site's own fault, its log explains; nobody else may read that
            return f"{run}: refused: {reason}{' state/daemon.log says what to do' if reason.startswith(('E1', 'E5')) else ''}", "yellow"
        case "enrolled":
            return f"{run}: this site takes part", "green"
        case "trained":
            epsilon = facts.get("epsilon")
            return f"{run}: round {facts.get('round')} answered{f', epsilon {epsilon:.2f} so far' if isinstance(epsilon, float) else ''}", None
        case "evaluated":
            return f"{run}: the final model was evaluated", None
        case _:
            return "", None


def _as_node(facts: Mapping[str, object]) -> str:
    return f" as node {facts['node']}" if "node" in facts else ""


def _problem(text: str) -> str:
    """The courier's trouble with the coordinator."""
    if text.startswith("E401 "):
        return (
            "the coordinator does not let this site in: it asks again. After a crash that takes about 20 s; else: is its request approved, "
            "its key revoked, its clock right? Ask the coordinator"
        )
    return f"{text}: the courier tries again" if text[:2] in ("E1", "E4") else f"the coordinator does not answer ({text}): the courier tries again"


def _how(status: object) -> str:
    if isinstance(status, int) and status < 0:
        return f"killed by signal {-status}"
    return f"exit code {status}"


# Status -------------------------------------------------------------------------------------------------------------------------


def _print_state(found: "SiteState", kit: Path, terminal: "Console") -> None:
    from shared.study import SHORT_HASH
    from wardround.cli.output import table

    for line in _heading(found, kit):
        terminal.print(line, markup=False, soft_wrap=True)
    if found.station is not None:
        rows = [[child.name, child.state, str(child.pid or "-"), str(child.restarts)] for child in found.station.children]
        terminal.print(table("", ["process", "state", "pid", "restarts"], rows))
    if found.approved:
        rows = [
            [item.study, item.study_hash[:SHORT_HASH], f"{item.expires:%Y-%m-%d}" if item.holds else f"expired {item.expires:%Y-%m-%d}", item.by]
            for item in found.approved
        ]
        terminal.print(table("\napproved", ["study", "hash", "until", "by"], rows))
    if found.num_pending:
        waiting = f"{plural(found.num_pending, 'study')} {'waits' if found.num_pending == 1 else 'wait'} to be decided"
        terminal.print(f"\n{waiting}: wardround site approve {kit}", style="yellow", markup=False, soft_wrap=True)
    terminal.print()
    for line in _budget(found.spendings):
        terminal.print(line, markup=False)
    if found.last_rows:
        terminal.print("\nlast rows of the audit log", style="bold")
    for row in found.last_rows:
        terminal.print(f"  {row.time[:19].replace('T', ' ')}  {row.event}{_details(row)}"[: terminal.width], markup=False)


def _heading(found: "SiteState", kit: Path) -> list[str]:
    if found.instance is None:
        return [f"{found.name}: not running; start it with: wardround site start {kit}"]
    since = found.instance.started[:16].replace("T", " ")
    running, connection = f"{found.name}: running since {since} UTC (process {found.instance.pid})", found.connection
    if connection is not None and connection.connected:
        return [running, f"connected as node {connection.node} since {connection.since:%Y-%m-%d %H:%M} UTC"]
    return [running, f"NOT CONNECTED{f': {connection.problem}' if connection is not None and connection.problem else ' yet'}"]


def _budget(spendings: "tuple[Spending, ...]") -> list[str]:
    lines = []
    for spending in spendings:
        held = spending.epsilon_filter if spending.epsilon_filter is not None else spending.epsilon
        said = "an unknown part" if held is None else f"epsilon {held:.2f}"
        left = f"; room for about {spending.remains:.2f} more" if spending.remains is not None else ""
        limit = f" of {spending.limit:g}" if spending.limit is not None else ""
        lines.append(f"budget of {spending.account} patients: {said}{limit} is taken{left}")
    return lines or ["budget: nothing was spent yet"]


def _details(row: "AuditRow") -> str:
    shown = [str(row.details[key]) for key in ("kind", "study", "round", "outcome", "reason") if row.details.get(key) is not None]
    return f": {', '.join(shown)}" if shown else ""
