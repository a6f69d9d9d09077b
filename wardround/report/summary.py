"""The report's first screen in words: banners, the lead paragraph, the key numbers; and what an epsilon means."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.privacy import attack_power
from shared.results import Interval
from shared.view import View
from shared.whole_promise import start_sentence
from wardround.plural import plural
from wardround.report.history import fold_curves
from wardround.report.judged import judged
from wardround.report.run_files import RunFiles
from wardround.report.wording import (
    DASH,
    compact,
    count,
    duration,
    finite,
    finite_interval,
    higher_is_better,
    interval_text,
    metric_title,
    noise_sentence,
    number,
    upper_bound,
)

SIMULATION_ENGINES = ("in-process", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """A warning at the head of the page."""

    title: str
    text: str
    css: str = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyNumber:
    """A number with its name and a line below it."""

    name: str
    value: str
    below: str = ""


def banners(run: RunFiles) -> list[Banner]:
    """What a reader must know before any number."""
    result, found = run.result, []
    if result.outcome != "completed":
        text = f"{result.rounds_completed} of {plural(run.study.rounds.count, 'round')} completed; what was not reached is left out below."
        found.append(Banner(title="This run was interrupted." if result.outcome == "interrupted" else "This run failed.", text=text))
    if run.study.faults is not None:
        sites = run.study.faults.sites
        whose = plural(sites, "site") if isinstance(sites, int) else ", ".join(sites)
        text = f"This simulation spoiled answers of {whose} on their way (“{run.study.faults.kind}”), to see what that costs."
        found.append(Banner(title="Faults were planted.", text=text))
    if result.started_from is not None:
        found.append(Banner(title="This run started with another run’s model.", text=start_sentence(result.started_from, result.privacy.unit)))
    if result.synthetic:
        found.append(
            Banner(title="SYNTHETIC patients.", text="No real patient is behind any number on this page; the numbers say nothing about medicine.")
        )
    if result.privacy.unit == "site":
        text = f"The study asked for unit “site”: what is promised is promised to whole hospitals. To the coordinator, {View.of(run.study).plainly}."
        found.append(Banner(title="No promise to patients against the coordinator.", text=text, css="remark"))
    if result.privacy.seeded_noise:
        text = "The noise can be computed again from the study’s seed. Budgets below are what the same study would spend with fresh noise."
        found.append(Banner(title="Seeded noise: this run protects nobody; it is a simulation.", text=text))
    elif result.privacy.unit == "none":
        found.append(
            Banner(
                title="No privacy promise.",
                text=f"The study asked for unit “none”: training was not differentially private; {View.of(run.study).plainly}.",
                css="remark",
            )
        )
    if run.clipped is not None:
        found.append(Banner(title="Updates were clipped before they were summed.", text=run.clipped.sentence))
    return found


def primary(run: RunFiles) -> tuple[float | None, Interval]:
    """The primary metric of the final model and its interval; without a final model, of the last round evaluated."""
    metric = run.result.primary_metric
    value = finite(run.result.metrics.get("federated", {}).get(metric))
    if value is not None:
        return value, finite_interval(run.result.metrics_ci95.get("federated", {}).get(metric))
    known = [(value, interval) for curve in fold_curves(run)[-1:] for _, value, interval in curve.points if value is not None]
    return known[-1] if known else (None, None)


def lead(run: RunFiles) -> str:
    """The result in two or three sentences."""
    result, metric = run.result, metric_title(run.result.primary_metric)
    value, interval = primary(run)
    if value is None:
        return f"No model was evaluated, so there is no {metric} to report."
    final = result.metrics.get("federated", {}).get(result.primary_metric) is not None
    num_sites = len(trained_sites(run))
    together = "together " if num_sites > 1 else ""
    model = f"The model trained {together}by {plural(num_sites, 'site')}" if final else "The last model evaluated before the run ended"
    if run.study.own_models:
        model = f"The {num_sites} sites’ own models ({run.study.strategy.name}), each on its own test patients,"
    sentences = [f"{model} reached {metric} {number(value)}{_interval_words(interval)} on {plural(num_tested(run), 'test patient')}."]
    if run.study.own_models:
        sentences.append("They stay at the sites: no number here is of the shared model in this folder, and none of another hospital’s patients.")
    comparisons = (("local_only", judged(run.study).alone), ("pooled", "one model on all data in one place"))
    compared = [part for source, words in comparisons if (part := _comparison(run, source, words))]
    if compared and final:
        sentences.append(f"For comparison: {'; '.join(compared)}.")
    if result.evaluation_epsilon is not None:
        sentences.append(noise_sentence(result.evaluation_epsilon))
    if not higher_is_better(result, result.primary_metric):
        sentences.append(f"Lower {metric} is better.")
    return " ".join(sentences)


def trained_sites(run: RunFiles) -> set[str]:
    """The sites that gave at least one usable update."""
    return {site.name for record in run.rounds for site in record.sites if site.status == "ok"}


def num_tested(run: RunFiles) -> int:
    """Test patients of all sites that were evaluated; with cross-validation every patient is one."""
    evaluated = [known for values in run.result.per_site.values() if (known := finite(values.get("num_test"))) is not None]
    return round(sum(evaluated)) if evaluated else sum(site.num_test for site in run.result.sites)


def _comparison(run: RunFiles, source: str, words: str) -> str:
    value = finite(run.result.metrics.get(source, {}).get(run.result.primary_metric))
    return f"{words} reached {number(value)}" if value is not None else ""


def _interval_words(interval: Interval) -> str:
    return f" (95 % interval {number(interval[0])} to {number(interval[1])})" if interval else ""


def key_numbers(run: RunFiles) -> list[KeyNumber]:
    """Primary metric, epsilon, sites, patients, rounds, time."""
    result = run.result
    value, interval = primary(run)
    tested = num_tested(run)
    without = "no interval" if result.evaluation_epsilon is None else "with noise; no interval"
    declared = "" if result.engine in SIMULATION_ENGINES else "declared; "
    folds = f"; {run.study.evaluation.folds} folds" if run.study.evaluation.folds > 1 else ""
    trained = trained_sites(run)
    per_round = [seconds for seconds in result.timing.seconds_per_round if math.isfinite(seconds)]
    return [
        KeyNumber(name=metric_title(result.primary_metric), value=number(value), below=interval_text(interval) or without),
        _epsilon_number(run),
        KeyNumber(name="Sites", value=count(len(trained)), below=_answered(run)),
        KeyNumber(
            name="Patients",
            value=count(sum(site.num_patients for site in result.sites if site.name in trained)),
            below=f"{declared}{tested:,} for testing",
        ),
        KeyNumber(name="Rounds", value=count(result.rounds_completed), below=f"of {run.study.rounds.count:,}{folds}"),
        KeyNumber(
            name="Time",
            value=duration(result.timing.total_seconds),
            below=f"{duration(float(np.median(per_round)))} a round" if per_round else "no round completed",
        ),
    ]


def _answered(run: RunFiles) -> str:
    absent = {site.name for record in run.rounds for site in record.sites if site.status not in ("ok", "not asked", "at work")}
    if not run.rounds:
        return "no round completed"
    never = len(run.result.sites) - len(trained_sites(run))
    if never:
        return f"of {len(run.result.sites)}; {never} never took part"
    if absent:
        return f"{len(absent)} missed rounds"
    answered = [sum(site.status == "ok" for site in record.sites) for record in run.rounds]
    return "all in every round" if min(answered) == len(run.result.sites) else f"{_span(answered)} in a round"


def _span(counts: list[int]) -> str:
    return f"{min(counts)}{DASH}{max(counts)}" if min(counts) < max(counts) else str(counts[0])


def _epsilon_number(run: RunFiles) -> KeyNumber:
    budget, sites = run.study.privacy.epsilon, run.result.privacy.sites
    if run.result.privacy.unit == "none":
        return KeyNumber(name="Privacy", value="none", below="no promise was asked for")
    if run.result.privacy.unit == "site" and run.result.privacy.site_level is not None:
        below = f"of {upper_bound(budget)}; for whole hospitals" if budget is not None else "for whole hospitals; noise was given, no budget"
        return KeyNumber(name="Epsilon", value=upper_bound(run.result.privacy.site_level.epsilon), below=below)
    if not sites:
        return KeyNumber(name="Epsilon", value=DASH, below="nothing was charged")
    below = f"of {upper_bound(budget)}; highest site" if budget is not None else "highest site; noise was given, no budget"
    if (together := colluding(run)) is not None:
        below = f"{below}; {upper_bound(max(together.values()))} if all others collude"
    return KeyNumber(name="Epsilon", value=upper_bound(max(site.epsilon for site in sites.values())), below=below)


def colluding(run: RunFiles) -> dict[str, float] | None:
    """By site, epsilon against the coordinator and all other sites together; None where no noise was added in shares, and it is the site's own."""
    shared = run.result.privacy.distributed_noise
    return None if shared is None else {name: site.epsilon_if_all_others_collude for name, site in shared.sites.items()}


FALSE_ALARMS = 0.01  # of the attacker in the sentence below


def federation_sentence(run: RunFiles) -> str | None:
    """What is promised to a patient whichever hospitals know this patient; None without a claim about it."""
    claim = run.claim.federation if run.claim else None
    if claim is None:
        return None
    together = colluding(run)
    others = "" if together is None else f"; {upper_bound(max(together.values()))} against the coordinator and all other sites together"
    return f"epsilon {upper_bound(claim.epsilon)} at delta {compact(claim.delta)}: {claim.basis}{others}"


def site_level_sentence(run: RunFiles) -> str | None:
    """The promise to whole hospitals in numbers; None without one."""
    spent = run.result.privacy.site_level
    return None if spent is None else (
        f"epsilon {upper_bound(spent.epsilon)} at delta {compact(spent.delta)} (whole plan: {upper_bound(spent.epsilon_planned)}), against everybody but the "
        f"coordinator; noise multiplier {compact(spent.noise_multiplier)}, updates clipped to {compact(spent.max_site_norm)}, {plural(spent.rounds, 'round')}"
    )  # fmt: skip


def meaning_sentence(run: RunFiles) -> str:
    """What the largest epsilon means for one patient, or nothing without a promise.

    A test of "was this patient in or out" with false positive rate a has a true positive rate of at most
    min(e^epsilon a + delta, 1 - e^-epsilon (1 - delta - a)): Kairouz, Oh, Viswanath 2015, theorem 2.1.
    """
    privacy, view = run.result.privacy, View.of(run.study)
    if privacy.unit == "none" or not privacy.sites:
        return ""
    name, worst = max(privacy.sites.items(), key=lambda item: item[1].epsilon)
    power = attack_power(worst.epsilon, worst.delta, FALSE_ALARMS)
    condition = "With fresh noise, even" if privacy.seeded_noise else "Even"
    sentence = (
        f"{condition} at the site where most was spent ({name}, epsilon {upper_bound(worst.epsilon)}), {view.attacker}, "
        f"knows all other {privacy.unit}s and wrongly names only 1 in 100 {privacy.unit}s that were not trained on "
        f"would recognise at most {_per_cent_up(power)} of those that were."
    )
    if not (together := colluding(run)):
        return sentence
    whose, most = max(together.items(), key=lambda item: item[1])
    power = attack_power(most, privacy.sites[whose].delta, FALSE_ALARMS)
    return f"{sentence} The coordinator and all other sites together (epsilon {upper_bound(most)} at {whose}) would recognise at most {_per_cent_up(power)}."


def _per_cent_up(share: float) -> str:
    """In per cent, rounded up, for it is a bound."""
    return f"{min(100, math.ceil(share * 100 - 1e-9))} %"


def shares_by_row(matrix: NDArray[np.float64]) -> list[list[tuple[str, float]]]:
    """Each entry of a confusion matrix as count (text) and share of its row in [0, 1]."""
    sums = np.maximum(matrix.sum(axis=1, keepdims=True), 1e-12)
    return [
        [(f"{amount:,.0f}", round(float(share), 3)) for amount, share in zip(row, shares, strict=True)]
        for row, shares in zip(matrix, matrix / sums, strict=True)
    ]
