"""`wardround privacy spent|verify`: what ledgers say, and whether a run's claim agrees with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.plural import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wardround.spending import Spending, StudySpending

PathArgument = Annotated[
    Path, typer.Argument(metavar="KIT|SITE.TOML|RUN", help="A hospital's kit or its site file, or a run's folder.", show_default=False)
]


def spent(
    path: PathArgument,
    delta: Annotated[float | None, typer.Option("--delta", help="For a run's ledgers; a site's policy has its own.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what was spent on a cohort, by study, and what remains of a site's limit."""
    from wardround.cli.output import console, number, print_envelope, table
    from wardround.spending import site_file_of, spending_of

    ledgers = spending_of(site_file_of(path), delta=delta)
    terminal = console(as_json=as_json)
    for ledger in ledgers:
        shared = any(study.shares is not None for study in ledger.studies)
        columns = ["study", "run", "plan", "rounds", "steps", "epsilon alone", "of the whole plan", *(["if all others collude"] if shared else [])]
        rows = [
            [
                study.study,
                study.run,
                study.state,
                str(study.rounds),
                f"{study.steps}/{study.planned_steps}",
                number(study.epsilon),
                number(study.epsilon_planned),
                *([_if_all_others_collude(study)] if shared else []),
            ]
            for study in ledger.studies
        ]
        terminal.print(table(f"{ledger.name}, {ledger.account} patients", columns, rows))
        for line in _remarks(ledger):
            terminal.print(line)
        terminal.print()
    if as_json:
        print_envelope({"ledgers": [ledger.to_table() for ledger in ledgers]})


def _if_all_others_collude(study: "StudySpending") -> str:
    """Of distributed noise, the second epsilon; of noise in each update, that it is the same."""
    from wardround.cli.output import number

    return "the same" if study.shares is None else number(study.epsilon_if_all_others_collude)


def shares_line(names: "Sequence[str]") -> str:
    """What kind of release plans of distributed noise are."""
    return (
        f"distributed noise: {', '.join(names)}. There the site added a share of the noise, and epsilon is of the sums, as the coordinator sees them; it holds as long as no "
        "more sites are in league than the study says, and against all others together it is more. A limit is held against the first"
    )


def _total(ledger: "Spending") -> str:
    if ledger.epsilon is None:
        return "something was lost, and a repair has charged a whole limit for it"
    together = f"all together: epsilon {ledger.epsilon:.3f} at delta {ledger.delta:g}"
    if ledger.epsilon_filter is None or len(ledger.studies) < 2:
        return together
    return f"{together}, had all been fixed beforehand; at most {ledger.epsilon_filter:.3f} however each was chosen after seeing the others"


def _remarks(ledger: "Spending") -> list[str]:
    lines = [_total(ledger)]
    if ledger.limit is not None and ledger.epsilon_filter is not None:
        lines.append(
            f"limit {ledger.limit:g}: a Renyi filter of order {ledger.order:g} holds {ledger.epsilon_filter:.3f} against it, open plans in full"
        )
    if ledger.remains is not None:
        lines.append(f"room is left for one more study of about epsilon {ledger.remains:.2f}" if ledger.remains > 0.01 else "no room is left")
    shared = [study.study for study in ledger.studies if study.shares is not None]
    if shared:
        lines.append(shares_line(list(dict.fromkeys(shared))))
    standing = sum(study.standing for study in ledger.studies)
    if standing:
        lines.append(f"charged in full and never finished: {plural(standing, 'round')}")
    if any(study.state == "open" for study in ledger.studies) and ledger.limit is not None:
        lines.append("an open plan that will not go on can be ended: wardround ledger close KIT RUN")
    if ledger.refused:
        lines.append(f"turned away for want of room: {plural(ledger.refused, 'study')}")
    if ledger.repairs:
        lines.append(f"repaired {plural(ledger.repairs, 'time')}; see 'wardround ledger verify'")
    return lines


def verify(path: PathArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Compute every epsilon again, from the ledgers' rows, by both accountants; exit code 1 where a claim says less."""
    from shared.errors import ClaimError
    from wardround.cli.output import console, number, print_envelope, table
    from wardround.spending import site_file_of
    from wardround.verification import verify_path

    checks = verify_path(site_file_of(path))
    rows = [
        [
            check.name,
            number(check.claimed, 4),
            number(check.pld, 4),
            number(check.prv, 4),
            number(check.renyi, 4),
            number(check.filter, 4),
            f"{check.delta:g}",
            check.source,
            "yes" if check.agrees else "NO",
        ]
        for check in checks
    ]
    console(as_json=as_json).print(table("computed again", ["what", "said", "PLD", "PRV", "Renyi", "filter", "delta", "from", "holds"], rows))
    wrong = [check.name for check in checks if not check.agrees]
    if wrong:
        raise ClaimError(f"{path}: expected epsilons that cover what was charged, got less for {', '.join(wrong)}", "do not rely on these numbers")
    if as_json:
        print_envelope({"checks": [check.to_table() for check in checks]})
