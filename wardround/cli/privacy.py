"""`wardround privacy plan|spent|epsilon`. No torch is imported here."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from shared.privacy import PrivacyEvent

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("plan")
def plan(
    patients: Annotated[
        list[int], typer.Option("--patients", metavar="N", help="Training patients of a site, as declared; repeat for several sites.")
    ],
    epsilon: Annotated[float | None, typer.Option("--epsilon", metavar="E", help="The whole study's budget; the noise is solved from it.")] = None,
    noise: Annotated[float | None, typer.Option("--noise-multiplier", metavar="SIGMA", help="Instead of --epsilon: what this noise costs.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Default: min(1e-4, 1/(10 x smallest site)).")] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="R")] = 30,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Expected batch size under Poisson sampling.")] = 32,
    local_epochs: Annotated[int, typer.Option("--local-epochs")] = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Solve the noise for a budget (or the budget for a noise) at sites of these sizes, before anybody trains."""
    from shared.config import validate
    from shared.plan import plan_site
    from shared.privacy import default_delta
    from shared.study import Study
    from wardround.cli.output import console, number, print_envelope, table

    if min(patients) < 2:
        from shared.errors import ConfigurationError

        raise ConfigurationError(f"--patients: expected at least 2, got {min(patients)}", "give the number of training patients")
    settings: dict[str, object] = {"delta": default_delta(min(patients)) if delta is None else delta}
    settings |= {key: value for key, value in (("epsilon", epsilon), ("noise_multiplier", noise)) if value is not None}
    training = {"batch_size": batch_size, "local_epochs": local_epochs}
    study = validate(Study, {"name": "plan", "task": "plan", "privacy": settings, "training": training, "rounds": {"count": rounds}}, "privacy plan")
    plans = [plan_site(study, size) for size in patients]
    columns = ["patients", "sample rate", "steps", "noise multiplier", "epsilon", "delta"]
    rows = [
        [str(p.declared_size), number(p.sample_rate, 4), str(p.study_event().steps), number(p.noise_multiplier), number(p.epsilon), f"{p.delta:g}"]
        for p in plans
    ]
    console(as_json=as_json).print(table("plan: add or remove one patient", columns, rows))
    if as_json:
        names = ("declared_size", "sample_rate", "steps_per_round", "noise_multiplier", "epsilon", "delta")
        print_envelope({"sites": [{**{name: getattr(p, name) for name in names}, "steps": p.study_event().steps} for p in plans]})


@app.command("epsilon")
def epsilon_of_events(
    event: Annotated[list[str], typer.Option("--event", metavar="SIGMA,Q,STEPS", help="Noise multiplier, sample rate, steps; repeat to compose.")],
    delta: Annotated[float, typer.Option("--delta", metavar="D")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Epsilon of Poisson-sampled Gaussian releases, composed (add or remove one)."""
    from shared.errors import ConfigurationError
    from shared.privacy import epsilon_of
    from wardround.cli.output import console, print_envelope

    if not (math.isfinite(delta) and 0 < delta < 1):
        raise ConfigurationError(f"--delta: expected a number in (0, 1), got {delta}", "for example --delta 1e-5")
    value = epsilon_of([parse_event(text) for text in event], delta)
    console(as_json=as_json).print(f"epsilon {value:.4f} at delta {delta:g} (add or remove one; PLD upper bound)")
    if as_json:
        print_envelope({"epsilon": value, "delta": delta})


def parse_event(text: str) -> "PrivacyEvent":
    """The event in `SIGMA,Q,STEPS`.

    Raises:
        ConfigurationError: it has another form, or numbers that no mechanism has.
    """
    from shared.errors import ConfigurationError
    from shared.privacy import PrivacyEvent

    try:
        noise, rate, steps = text.split(",")
        return PrivacyEvent(noise_multiplier=float(noise), sample_rate=float(rate), steps=int(steps))
    except ValueError:
        raise ConfigurationError(f"--event: expected SIGMA,Q,STEPS such as 1.1,0.05,500, got {text!r}", "three numbers with commas") from None


@app.command("spent")
def spent(
    path: Annotated[Path, typer.Argument(metavar="SITE.TOML|RUN", help="A hospital's site file, or a run's folder.", show_default=False)],
    delta: Annotated[float | None, typer.Option("--delta", help="For a run's ledgers; a site's policy has its own.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what was spent on a cohort, by study, and what remains of a site's limit."""
    from wardround.cli.output import console, number, print_envelope, table
    from wardround.spending import spending_of

    ledgers = spending_of(path, delta=delta)
    terminal = console(as_json=as_json)
    for ledger in ledgers:
        rows = [[study.study, study.run, str(study.rounds), str(study.steps), number(study.epsilon)] for study in ledger.studies]
        terminal.print(
            table(
                f"{ledger.name}: epsilon {ledger.epsilon:.3f} at delta {ledger.delta:g} over all studies",
                ["study", "run", "rounds", "steps", "epsilon alone"],
                rows,
            )
        )
        if ledger.limit is not None:
            terminal.print(f"limit {ledger.limit:g}: a next study is admitted while the total, composed as above, stays within it")
        terminal.print()
    if as_json:
        print_envelope({"ledgers": [ledger.to_table() for ledger in ledgers]})
