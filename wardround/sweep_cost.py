"""What a sweep would cost on real patients, where every run of it is a release. No torch is imported here."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError
from shared.plan import plan_site
from shared.privacy import (
    SOLVE_MARGIN,
    PrivacyEvent,
    default_delta_of_sites,
    epsilon_of,
    epsilon_of_best,
    evaluation_noise_multiplier,
    filter_order,
    renyi_budget,
    renyi_divergence,
)
from shared.study import Study
from simulations.sweeps.grid import Cell, Sweep, cells_of
from wardround.claim_in_words import Section
from wardround.plural import plural
from wardround.report.wording import compact, upper_bound
from wardround.studies import base_study, is_sweep_file, shipped_sweeps, sweep_file


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCost:
    """What a site with `patients` training patients would be charged.

    Attributes:
        private, others: cells that promise something, and cells that promise nothing.
        dearest: epsilon of the run that costs most, alone.
        all_runs: of all private runs, composed.
        limit: the least limit of a hospital whose filter has room for all of them; it adds up at one Renyi order, and so asks for more.
        evaluation: the same for its test patients, where studies promise them something.
        best_of: of releasing only the best run, where each run's setting is drawn at random from the grid and the number of runs, `mean_runs` on
            average, by the geometric law (Papernot and Steinke 2022, theorem 2); None without a private cell.
    """

    patients: int
    delta: float
    private: int
    others: int
    dearest: float | None
    all_runs: float | None
    limit: float | None
    evaluation: float | None
    best_of: float | None
    mean_runs: int


def is_sweep(path: Path) -> bool:
    """Whether `path` is a sweep's folder, a sweep's file, or the name of a shipped sweep."""
    if path.exists() or len(path.parts) > 1:
        return (path / "sweep.toml").is_file() or is_sweep_file(path)
    return any(path.name == file.stem for file in shipped_sweeps())


def cells_at(path: Path) -> tuple[Sweep, list[Cell]]:
    """The sweep in the file or folder at `path`, and its cells.

    Raises:
        ConfigurationError: it does not fit.
    """
    file = path / "sweep.toml" if path.is_dir() else sweep_file(path)
    sweep = Sweep.load(file)
    return sweep, cells_of(sweep, base_study(sweep, file))


def cost_of(cells: Sequence[Cell], patients: int) -> SweepCost:
    """What these cells would cost a site of this declared size, each run once.

    Raises:
        ConfigurationError: a cell's delta, or its budget, does not fit such a site.
    """
    private = [_with_delta(cell.study, patients) for cell in cells if cell.study.private]
    events = [plan_site(study, patients).study_event() for study in private]
    delta = max((study.privacy.delta or 0.0 for study in private), default=default_delta_of_sites([patients]))
    tests = [evaluation_event(study) for study in private if study.privacy.evaluation_epsilon is not None]
    mean_runs = max(1, len(private))
    dearest = max(set(events), key=lambda event: epsilon_of([event], delta), default=None)
    return SweepCost(
        patients=patients, delta=delta, private=len(private), others=len(cells) - len(private),
        dearest=None if dearest is None else epsilon_of([dearest], delta), all_runs=epsilon_of(events, delta) if events else None,
        limit=least_limit(events, delta) if events else None, evaluation=least_limit(tests, delta) if tests else None,
        best_of=epsilon_of_best([_above(events)], delta, mean_runs=mean_runs) if events else None, mean_runs=mean_runs,
    )  # fmt: skip


def least_limit(events: Sequence[PrivacyEvent], delta: float) -> float:
    """The least epsilon, within a thousandth of it, that a hospital's filter at this delta must allow to admit all of these events."""

    def admits(epsilon: float) -> bool:
        order = filter_order(epsilon, delta)
        return sum(renyi_divergence(event, order) for event in events) <= renyi_budget(epsilon, order=order, delta=delta)

    low, high = 0.0, 1.0
    while not admits(high):
        low, high = high, 2 * high
    while high - low > 5e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if admits(middle) else (middle, high)
    return high


def evaluation_event(study: Study) -> PrivacyEvent:
    """What the closing evaluation of a study charges its test patients."""
    epsilon, delta = study.privacy.evaluation_epsilon, study.privacy.delta
    assert epsilon is not None and delta is not None
    return PrivacyEvent(noise_multiplier=evaluation_noise_multiplier(epsilon * SOLVE_MARGIN, delta, releases=1), sample_rate=1.0, steps=1)


def _above(events: Sequence[PrivacyEvent]) -> PrivacyEvent:
    """One that costs at least what each of these does, at every Renyi order: whichever setting is drawn, it bounds the run."""
    return PrivacyEvent(
        noise_multiplier=min(event.noise_multiplier for event in events), sample_rate=max(event.sample_rate for event in events),
        steps=max(event.steps for event in events),
    )  # fmt: skip


def _with_delta(study: Study, patients: int) -> Study:
    return study if study.privacy.delta is not None else study.replace(privacy={"delta": default_delta_of_sites([patients])})


BASELINES = (
    "The baselines of each run (every site alone, all data pooled) are not in these numbers: on real patients each is another release under the same budget. Over "
    "site files there are none."
)


def explain_sweep(sweep: Sweep, costs: Sequence[SweepCost]) -> list[Section]:
    """The costs in sentences."""
    sections = [Section(title=f"Sweep {sweep.name} on real patients", sentences=(_what(costs),))]
    sections += [Section(title=f"A hospital with {plural(cost.patients, 'training patient')}", sentences=_site(cost)) for cost in costs]
    if sweep.baselines:
        sections.append(Section(title="Baselines", sentences=(BASELINES,)))
    sections.append(Section(title="Without this price", sentences=(
        "Sweep on public or synthetic patients, or on those of a hospital that takes no part, and run one study with what was found there.",
        "A simulation's ledgers are born and end with it: on patients that are real and not yours to release, the numbers above are what it would have cost.",
    )))  # fmt: skip
    return sections


def _what(costs: Sequence[SweepCost]) -> str:
    cost = costs[0]
    others = (
        f" {plural(cost.others, 'run')} of them {'promises' if cost.others == 1 else 'promise'} nothing: with these there is no bound at all."
        if cost.others
        else ""
    )
    return f"{plural(cost.private + cost.others, 'run')}. Each is a release to whoever sees its models or its metrics, and choosing among them is one more.{others}"


def _site(cost: SweepCost) -> tuple[str, ...]:
    if cost.dearest is None or cost.all_runs is None or cost.best_of is None or cost.limit is None:
        return ("No run promises anything.",)
    return (
        f"The dearest run alone: epsilon {upper_bound(cost.dearest)} at delta {compact(cost.delta)}.",
        f"All {plural(cost.private, 'private run')}: epsilon {upper_bound(cost.all_runs)}. A hospital's ledger adds up by a stricter rule, which holds whatever comes "
        f"next: a sweep over its site file begins only where its limit is at least {upper_bound(cost.limit)}, or what is left of it.",
        (
            f"Its test patients: a limit of at least {upper_bound(cost.evaluation)}."
            if cost.evaluation is not None
            else "Its test patients are promised nothing: with every run exact sums over them leave, and no number here covers that."
        ),
        f"Only the best of several: epsilon {upper_bound(cost.best_of)}, where each run's setting is drawn at random from the private part of the grid, the "
        f"number of runs is drawn beforehand by the geometric law with mean {cost.mean_runs}, and all but the best stay secret (Papernot and Steinke 2022). "
        "Any other way of choosing has the price of all runs; so has this one where that is less.",
    )


def sweep_costs(path: Path, patients: Sequence[int]) -> tuple[list[Section], dict[str, object]]:
    """What the sweep at `path` would cost sites of these declared sizes, in sentences and in numbers.

    Raises:
        ConfigurationError: no size was given: what a run costs depends on it; or the sweep does not fit.
    """
    if not patients:
        raise ConfigurationError(
            "privacy explain: expected the declared number of training patients of a site, got none", "give --patients N, once for each site"
        )
    sweep, cells = cells_at(path)
    costs = [cost_of(cells, number) for number in patients]
    return explain_sweep(sweep, costs), {"sites": [dataclasses.asdict(cost) for cost in costs]}
