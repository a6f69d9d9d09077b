"""`wardround privacy plan|spent|epsilon|explain`. No torch is imported here."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.cli.spent import spent, verify

if TYPE_CHECKING:
    from rich.table import Table

    from shared.privacy import PrivacyEvent
    from wardround.planning import Planned

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("plan")
def plan(
    patients: Annotated[
        list[int], typer.Option("--patients", metavar="N", help="Training patients of a site, as declared; repeat for several sites.")
    ],
    epsilon: Annotated[float | None, typer.Option("--epsilon", metavar="E", help="The whole study's budget at each site.")] = None,
    noise: Annotated[float | None, typer.Option("--noise-multiplier", metavar="SIGMA", help="Noise over clipping norm.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Default: min(1e-4, 1/(10 x smallest site)).")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="R", help="Default: 30, where it is not solved.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Expected, under Poisson sampling. Default: 32, where it is not solved.")
    ] = None,
    local_epochs: Annotated[int, typer.Option("--local-epochs", help="Expected passes over a site's patients a round.")] = 1,
    spare_rounds: Annotated[int, typer.Option("--spare-rounds", metavar="K", help="Planned beyond R, for rounds that a crash spends in vain.")] = 0,
    limit: Annotated[float | None, typer.Option("--limit", metavar="E", help="A hospital's limit over all studies. Default: this plan's.")] = None,
    parameters: Annotated[int | None, typer.Option("--parameters", metavar="D", help="Trainable parameters: is there signal left?")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Before anybody trains: give all but one of epsilon, noise, rounds, batch size (or all four, for delta), and read the other.

    Epsilon and noise: the most rounds that fit. With rounds too: the largest batch. With the batch size too: the least delta.
    """
    import dataclasses

    from shared.config import validate
    from shared.errors import ConfigurationError
    from wardround.cli.output import console, print_envelope
    from wardround.planning import Question, plan_study

    if min(patients) < 2:
        raise ConfigurationError(f"--patients: expected at least 2, got {min(patients)}", "give the number of training patients")
    options = {"epsilon": epsilon, "noise_multiplier": noise, "delta": delta, "rounds": rounds, "batch_size": batch_size}
    options |= {"local_epochs": local_epochs, "spare_rounds": spare_rounds, "limit": limit, "parameters": parameters}
    given = {name: value for name, value in options.items() if value is not None}
    planned = plan_study(validate(Question, {"patients": tuple(patients), **given}, "privacy plan"))
    for part in _plan_text(planned):
        console(as_json=as_json).print(part)
    if as_json:
        print_envelope(dataclasses.asdict(planned))


def _plan_text(planned: "Planned") -> "list[str | Table]":
    """What a person reads of a plan."""
    from wardround.cli.output import number, table

    site = planned.sites[0]
    answers = {"noise": "noise multipliers", "epsilon": "epsilon", "rounds": f"at most {planned.rounds} rounds"}
    answers |= {"batch_size": f"batch size at most {planned.batch_size}", "delta": f"delta {site.delta:.3g}"}
    columns = ["patients", "sample rate", "steps", "noise multiplier", "epsilon", "epsilon by the filter", "noise for the filter", "delta"]
    rows = [
        [
            *(str(s.declared_size), number(s.sample_rate, 4), str(s.steps), number(s.noise_multiplier), number(s.epsilon)),
            *(number(s.epsilon_filter), number(s.noise_multiplier_filter), f"{s.delta:g}"),
        ]
        for s in planned.sites
    ]
    title = f"plan: {planned.rounds} rounds, batch size {planned.batch_size}; solved: {answers[planned.solved]} (add or remove one patient)"
    return [table(title, columns, rows), *_filter_text(planned), _signal_text(planned)]


def _filter_text(planned: "Planned") -> list[str]:
    outside = [site for site in planned.sites if not site.passes_filter]
    if not outside:
        return ["A hospital's limit is held by a Renyi filter; this plan alone passes it at every site."]
    limits = sorted({f"{site.limit:.3g}" for site in outside})
    text = f"A hospital's limit over all studies (here epsilon {', '.join(limits)}) is held by a Renyi filter of one order, which counts a little higher: "
    if any(site.noise_multiplier_filter is None for site in outside):
        return [text + "no noise passes it for so small a limit; raise the limit, or delta."]
    return [text + "a site with this limit takes the noise in the column 'noise for the filter', which passes both."]


def _signal_text(planned: "Planned") -> str:
    signal = planned.signal
    if signal.ratio is None:
        return (
            f"Signal: with more than {signal.largest_model:,} trainable parameters the noise is larger than all updates together can be "
            "(--parameters D tells more)."
        )
    head = f"Signal: the updates of all steps and sites together are at most {signal.ratio:.3g} times as large as their noise, with {signal.parameters:,} parameters"
    if signal.patients_needed is None:
        return f"{head}. An upper bound: gradients that disagree, or shorter than the clipping norm, make less."
    needed = " and ".join(f"{patients:,}" for patients in signal.patients_needed)
    return (
        f"{head}: the noise drowns the signal. Expect a model that learns little, whatever the rounds. A ratio of 1 needs about {needed} patients "
        f"(sites growing in one proportion, and the batch size with them), or at most {signal.largest_model:,} parameters, or a larger epsilon."
    )


@app.command("epsilon")
def epsilon_of_events(
    event: Annotated[list[str], typer.Option("--event", metavar="SIGMA,Q,STEPS", help="Noise multiplier, sample rate, steps; repeat to compose.")],
    delta: Annotated[float, typer.Option("--delta", metavar="D")],
    best_of: Annotated[
        float | None,
        typer.Option("--best-of", metavar="M", help="The events are one run; the best of a random number of such runs, M on average, is chosen."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Epsilon of Poisson-sampled Gaussian releases, composed (add or remove one)."""
    from shared.errors import ConfigurationError
    from shared.privacy import epsilon_of, epsilon_of_best
    from wardround.cli.output import console, print_envelope

    if not (math.isfinite(delta) and 0 < delta < 1):
        raise ConfigurationError(f"--delta: expected a number in (0, 1), got {delta}", "for example --delta 1e-5")
    events = [parse_event(text) for text in event]
    value = epsilon_of(events, delta)
    best = None if best_of is None else epsilon_of_best(events, delta, mean_runs=best_of)
    terminal = console(as_json=as_json)
    terminal.print(f"epsilon {value:.4f} at delta {delta:g} (add or remove one; PLD upper bound)")
    data: dict[str, object] = {"epsilon": value, "delta": delta}
    if best_of is not None and best is not None:
        terminal.print(
            f"epsilon {best:.4f} at delta {delta:g} for the best of {best_of:g} such runs on average: after each, stop with probability "
            f"{1 / best_of:.3g} (geometric law), and release the best alone (Papernot and Steinke 2022; Renyi upper bound)"
        )
        data |= {"best_of": best_of, "epsilon_best": best, "law": "geometric"}
    if as_json:
        print_envelope(data)


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


@app.command("explain")
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN|SWEEP", help="A run's folder, a sweep's folder, or a sweep's TOML file.", show_default=False)],
    patients: Annotated[
        list[int] | None, typer.Option("--patients", metavar="N", min=1, help="Of a sweep: declared training patients of a site; repeat for several.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a run promises to whom, and what it does not, in plain sentences; or what a sweep would cost on real patients."""
    from wardround.claim_in_words import claim_of, claim_sections
    from wardround.cli.output import console, print_envelope
    from wardround.report.run_files import read_run
    from wardround.sweep_cost import is_sweep, sweep_costs

    if is_sweep(run):
        sections, data = sweep_costs(run, patients or [])
    else:
        files = read_run(run)
        sections, data = claim_sections(files), {"claim": claim_of(files).model_dump(mode="json")}
    terminal = console(as_json=as_json)
    for section in sections:
        terminal.print(section.title, style="bold", markup=False)
        for sentence in section.sentences:
            terminal.print(f"  {sentence[0].upper()}{sentence[1:]}", markup=False)
        terminal.print()
    if as_json:
        print_envelope({**data, "sections": [{"title": section.title, "sentences": list(section.sentences)} for section in sections]})


app.command("spent")(spent)
app.command("verify")(verify)
