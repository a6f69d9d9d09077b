"""`wardround site check` and `wardround doctor`: PASS, WARN and FAIL lines, each with the fix."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from rich.console import Console

    from client.findings import Finding

NOT_HEALTHY = 4  # exit code where nothing failed, but the site is not (yet) let in
NAME_WIDTH = 12  # of the longest check's name
STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}

SiteKitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of the site's kit.", show_default=False)]
AnyKitArgument = Annotated[
    Path | None, typer.Argument(metavar="[KIT]", help="A site's or the coordinator's kit; without it this machine alone.", show_default=False)
]


def check(kit: SiteKitArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Put every question to the real thing: kit, network, coordinator, cohort, ledger, policy, and one private training step."""
    from client.checks import check_site
    from shared.root_log import root_log_unchanged
    from wardround.quiet import quiet_flower_log

    quiet_flower_log()
    with root_log_unchanged():
        _tell("site", check_site(_folder(kit)), as_json=as_json, debug=debug)


def doctor(kit: AnyKitArgument = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Examine this machine, a site or the coordinator, and say what to do about what is found."""
    from shared.root_log import root_log_unchanged
    from wardround.doctor import examine
    from wardround.quiet import quiet_flower_log

    quiet_flower_log()
    with root_log_unchanged():
        subject, findings = examine(None if kit is None else _folder(kit))
        _tell(subject, findings, as_json=as_json, debug=debug)


def _folder(kit: Path) -> Path:
    from shared.errors import UsageError
    from shared.kit import MANIFEST
    from wardround.kits import coordinator_meant, site_meant

    if not kit.is_dir():
        raise UsageError(
            f"{kit}: expected the folder of a kit, got {'a file' if kit.exists() else 'nothing there'}", "unpack it: 'wardround site init'"
        )
    if not (kit / MANIFEST).is_file() and coordinator_meant(kit):
        raise UsageError(f"{kit}: expected the folder of a kit, found no kit", f"{coordinator_meant(kit)}; or, for a site, {site_meant(kit)}")
    return kit


def _tell(subject: str, findings: "Iterable[Finding]", *, as_json: bool, debug: bool) -> None:
    """Every finding as it comes, then the sum of it; ends the command with the first failure's exit code."""
    import traceback

    from client.checks import why_not_healthy
    from client.findings import exit_code_of
    from wardround.cli.output import console, print_envelope

    terminal, found = console(as_json=as_json), []
    for finding in findings:
        found.append(finding)
        print_finding(finding, terminal)
        if debug and finding.cause is not None:
            traceback.print_exception(finding.cause)
    reasons = why_not_healthy(found)
    code = exit_code_of(found) or (NOT_HEALTHY if reasons else 0)
    terminal.print(_verdict(subject, reasons), style="bold green" if not reasons else "bold red", markup=False)
    if as_json:
        print_envelope(
            {"subject": subject, "healthy": not reasons, "not_healthy": reasons, "findings": [finding.to_table() for finding in found]},
            status="error" if code else "ok",
            exit_code=code,
        )
    if code:
        raise typer.Exit(code)


def _verdict(subject: str, reasons: list[str]) -> str:
    if reasons:
        return f"not healthy: {', '.join(reasons)}"
    healthy = {
        "site": "healthy: registered with the coordinator, and the data can be read",
        "coordinator": "healthy: nothing stands in the coordinator's way",
        "machine": "healthy: this machine can take part; for a kit: wardround doctor KIT",
    }
    return healthy[subject]


def print_finding(finding: "Finding", terminal: "Console") -> None:
    """One finding in lines no wider than the terminal; long paths are not broken."""
    indent = " " * (6 + NAME_WIDTH + 1)
    first, *rest = _wrapped(finding.what, terminal.width - len(indent))
    terminal.print(f"{finding.level}  ", style=STYLES[finding.level], end="")
    terminal.print(f"{finding.check:<{NAME_WIDTH}} {first}", markup=False, soft_wrap=True)
    for line in [*rest, *(_wrapped(f"fix: {finding.fix}", terminal.width - len(indent)) if finding.fix and finding.level != "PASS" else [])]:
        terminal.print(indent + line, markup=False, soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, max(width, 20), break_long_words=False, break_on_hyphens=False)]
    return lines or [""]
