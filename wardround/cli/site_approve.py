"""`wardround site approve`: what is asked of the hospital, and its word on it."""

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import Console

    from client.approvals import Approval, Approvals
    from client.hospital import Hospital
    from wardround.approving import Cost, Question

LABEL_WIDTH = 13

SiteKitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of the site's kit.", show_default=False)]
ChosenStudyArgument = Annotated[
    str | None,
    typer.Argument(metavar="[STUDY]", help="A study that was asked for, by name or beginning of its hash; or its TOML file.", show_default=False),
]


def approve(
    kit: SiteKitArgument,
    study: ChosenStudyArgument = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without a question.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an approval back, from the next task on.")] = False,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="How long, as 180d, or the last day, as 2027-06-30.")] = "180d",
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who says yes; default: the login name, but root's.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a study asks of this hospital, and approve it; without STUDY list what was asked for."""
    from shared.errors import UsageError
    from shared.root_log import root_log_unchanged
    from wardround.cli.output import console

    with root_log_unchanged():
        from client.approvals import Approvals
        from client.hospital import Hospital
        from wardround.approving import find_question, login_name, parse_expiry
        from wardround.site_state import site_folder

        site_folder(kit)
        hospital = Hospital.open(kit)
    approvals, terminal, moment = Approvals(hospital.state, hospital.signer), console(as_json=as_json), parse_expiry(expires)
    if study is None:
        if withdraw or yes:
            raise UsageError(
                f"{'--withdraw' if withdraw else '--yes'}: expected a study with it, got none", "name one; without options they are listed"
            )
        _list(hospital, approvals, terminal, as_json=as_json)
        return
    if by is not None:
        _checked_name(by)
    question = find_question(hospital, study, asked=approvals.pending(), given=approvals.given())
    if withdraw:
        _withdraw(hospital, question, by or login_name() or "root", terminal, as_json=as_json)  # a no needs no name
    else:
        _decide(hospital, question, terminal, yes=yes, expires=moment, by=by, as_json=as_json)


def _who_decides(by: str | None) -> str:
    """The name that stands in approval and audit log: as given, the login's, or asked for where that is root.

    Raises:
        UsageError: it is no name, or there is none and no terminal to ask for it.
    """
    from shared.errors import UsageError
    from wardround.approving import login_name

    name = by if by is not None else login_name()
    if name is None and not sys.stdin.isatty():
        raise UsageError("--by: expected the name of whoever decides, got none: the login is root, which is nobody's name", "give it with --by NAME")
    return _checked_name(typer.prompt("who decides (your name; the login is root)", err=True).strip() if name is None else name)


def _checked_name(name: str) -> str:
    from shared.errors import UsageError

    if not 0 < len(name) <= 100 or not name.isprintable():
        raise UsageError("--by: expected a name of at most 100 printable characters, got another text", "give a shorter name")
    return name


def _list(hospital: "Hospital", approvals: "Approvals", terminal: "Console", *, as_json: bool) -> None:
    from shared.study import SHORT_HASH
    from wardround.cli.output import print_envelope, table

    pending, given = approvals.pending(), approvals.given()
    if pending:
        rows = [[item.study, item.study_hash[:SHORT_HASH], item.task, str(item.rounds), item.promise] for item in pending]
        terminal.print(table("asked for and not decided", ["study", "hash", "task", "rounds", "budget"], rows))
        terminal.print(f"\nlook at one, and decide: wardround site approve {hospital.kit} {pending[0].study}", markup=False, soft_wrap=True)
    else:
        terminal.print("nothing waits to be decided")
    if given:
        rows = [[item.asked.study, item.asked.study_hash[:SHORT_HASH], _until(item), item.by] for item in given]
        terminal.print(table("\napproved", ["study", "hash", "until", "by"], rows))
    advance = hospital.file.approve_in_advance
    if advance is not None:
        terminal.print(
            f"\n{hospital.site_file} approves in advance, until {advance.until}: {', '.join(advance.tasks)}, up to epsilon {advance.max_epsilon:g}",
            markup=False,
            soft_wrap=True,
        )
    if as_json:
        print_envelope({"pending": [item.model_dump(mode="json") for item in pending], "approved": [item.model_dump(mode="json") for item in given]})


def _until(approval: "Approval") -> str:
    from datetime import UTC, datetime

    text = f"{approval.expires:%Y-%m-%d}"
    return text if datetime.now(UTC) < approval.expires else f"expired {text}"


def _withdraw(hospital: "Hospital", question: "Question", by: str, terminal: "Console", *, as_json: bool) -> None:
    from wardround.approving import withdraw
    from wardround.cli.output import print_envelope

    asked = question.asked
    there = withdraw(hospital, asked, by=by)
    terminal.print(f"study {asked.study}: {'its approval is withdrawn, from the next task on' if there else 'it was not approved'}", markup=False)
    if as_json:
        print_envelope({"study": asked.study, "study_hash": asked.study_hash, "withdrawn": there, "by": by})


def _decide(
    hospital: "Hospital", question: "Question", terminal: "Console", *, yes: bool, expires: "datetime", by: str | None, as_json: bool
) -> None:
    import dataclasses

    from shared.errors import UsageError
    from wardround.approving import approve, costs
    from wardround.cli.output import print_envelope

    asked, budget = question.asked, costs(hospital, question.asked)
    print_question(question, budget, terminal, expires=expires, limit=hospital.file.policy.max_epsilon)
    if not yes and not sys.stdin.isatty():
        raise UsageError("expected an answer on a terminal, got no terminal", "read what is asked, then give --yes")
    agreed = yes or typer.confirm("approve?", default=False, err=True)
    who = _who_decides(by) if agreed else None
    if who is not None:
        approve(hospital, asked, by=who, expires=expires)
    terminal.print(f"approved by {who}, until {expires:%Y-%m-%d}" if agreed else "not approved: it stays undecided", style="bold", markup=False)
    if as_json:
        print_envelope(
            {
                "asked": asked.model_dump(mode="json"),
                "budget": [dataclasses.asdict(cost) for cost in budget],
                "remarks": list(question.remarks),
                "approved": agreed,
                "by": who,
                "expires": expires.isoformat() if agreed else None,
            }
        )


def print_question(question: "Question", budget: "list[Cost]", terminal: "Console", *, expires: "datetime", limit: float) -> None:
    """What is asked, line by line, as whoever decides should read it."""
    asked = question.asked
    terminal.print(f"study {asked.study}", style="bold", markup=False)
    for label, text in _lines(question, budget, expires, limit):
        _print_line(label, text, terminal)
    if asked.unit in ("none", "site"):
        terminal.print(f"WITHOUT PRIVACY{'' if asked.unit == 'none' else ' FOR PATIENTS'}: what leaves can tell of single patients", style="bold red")


def _lines(question: "Question", budget: "list[Cost]", expires: "datetime", limit: float) -> list[tuple[str, str]]:
    from client.approvals import installed_code_hash
    from shared.study import SHORT_HASH
    from wardround.plural import plural

    asked = question.asked
    code = (
        "the code installed here, nothing to compare"
        if asked.code_hash == installed_code_hash()
        else "NOT the code installed here: start the site anew, and let it be asked again"
    )
    lines = [
        ("purpose", asked.purpose or "none is given"),
        ("hash", f"{asked.study_hash[:SHORT_HASH]}: the coordinator sees the same in 'study show' and 'study submit --dry-run'; ask by phone"),
        ("", f"in full {asked.study_hash}"),
        ("task", asked.task),
        ("model", f"{plural(asked.num_parameters, 'parameter')}; built from the task installed here, its architecture is {asked.architecture}"),
        ("code", f"{code}, {asked.code_hash}"),
        ("rounds", str(asked.rounds)),
        ("budget", asked.promise),
        *(
            [("", f"epsilon {asked.evaluation_epsilon:g} for each test patient, for metrics with noise")]
            if asked.evaluation_epsilon is not None
            else []
        ),
        *(("leaves" if not number else "", f"- {line}") for number, line in enumerate(asked.leaves)),
        *(("your cohort" if not number else "", _cost_text(cost)) for number, cost in enumerate(budget)),
        *([("", _FILTER.format(limit=limit))] if budget else []),
        *(("note" if not number else "", remark) for number, remark in enumerate(question.remarks)),
    ]
    if question.approval is not None:
        lines.append(("approved", f"by {question.approval.by}, until {_until(question.approval)}; a new approval takes its place"))
    return [*lines, ("expires", f"{expires:%Y-%m-%d %H:%M} UTC, when you approve it now")]


_FILTER = (
    "these are not sums: your ledger holds a bound on all studies together (a Renyi filter), which is above a study's own epsilon, against "
    "max_epsilon = {limit:g}; room is the epsilon of the one further study that it would still let in"
)


def _cost_text(cost: "Cost") -> str:
    left = f"{cost.account} patients: room for about epsilon {cost.before:.2f}"
    if cost.asks is None:
        return f"{left}; what this takes is known when the study is enrolled"
    if cost.after is None:
        return f"{left}: this does NOT FIT, and will be refused"
    return f"{left}; after this about {cost.after:.2f}"


def _print_line(label: str, text: str, terminal: "Console") -> None:
    indent = " " * (2 + LABEL_WIDTH)
    hanging = "  " if text.startswith("- ") else ""
    first, *rest = textwrap.wrap(text, max(terminal.width - len(indent), 20), break_long_words=False, subsequent_indent=hanging) or [""]
    terminal.print(f"  {label:<{LABEL_WIDTH}}{first}", markup=False, soft_wrap=True)
    for line in rest:
        terminal.print(indent + line, markup=False, soft_wrap=True)
