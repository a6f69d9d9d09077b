"""The rows of the report's tables: values as text, strips as drawings. The template lays them out and escapes every name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shared.results import RoundRecord, SiteRound, SiteSummary
from shared.view import View
from wardround.report.charts import change_strip, interval_strip, share_bar, source_css, status_strip, strip_axis, strip_scale
from wardround.report.judged import judged
from wardround.report.run_files import RunFiles
from wardround.report.summary import colluding
from wardround.report.wording import (
    DASH,
    ONE_CLASS,
    compact,
    count,
    finite,
    finite_interval,
    higher_is_better,
    humanise,
    interval_text,
    metric_title,
    needs_two_classes,
    noise_sentence,
    number,
    ordered_sources,
    ranges,
    signed,
    upper_bound,
)

MAX_SUPPORT = 4  # classes whose test patients are written below their number
FEWEST = 10  # test patients of a class; of fewer, numbers describe these patients and no others
DESCRIPTIVE = "descriptive only"
DESCRIPTIVE_NOTE = (
    f"“{DESCRIPTIVE.capitalize()}”: fewer than ten test patients of a class stand behind the row; its numbers describe these patients, and are no "
    "estimate for others. "
)
UNTESTED = "Whether the change at one site is more than chance was not tested in this run."
TESTED = (
    "p: the chance of such a change, either way, if it made no difference which of the two models looked at a patient (exchange test on the site's own test patients, "
    "Noreen 1989; of all sites together by Holm 1979)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A value as text, with a smaller line below it (an interval), and a remark that it must not be read without."""

    text: str
    below: str = ""
    css: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: its heading, cells of text, and one drawing where the table has strips."""

    name: str
    cells: tuple[Cell, ...]
    strip: Markup | None = None
    css: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Column heads and rows. `strip_head` names the column of strips and `scale` is its axis."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    strip_head: str = ""
    scale: Markup | None = None
    note: str = ""


def site_table(run: RunFiles) -> Table:
    """Every site: patients, each metric of the final model with its interval, the primary metric drawn."""
    result, metrics = run.result, metric_names(run)
    primary = result.primary_metric
    summaries = {site.name: site for site in result.sites}
    names = [*summaries, *(name for name in result.per_site if name not in summaries)]
    drawn = [finite(result.per_site.get(name, {}).get(primary)) for name in names]
    intervals = [finite_interval(result.per_site.get(name, {}).get(f"{primary}_ci95")) for name in names]
    axis = strip_axis([value for value in (*drawn, *(end for pair in intervals if pair for end in pair)) if value is not None])
    rows = tuple(
        Row(
            name=name,
            cells=(
                *_size_cells(run, name, summaries.get(name)),
                *(_site_metric(run, name, metric) for metric in metrics),
            ),
            strip=interval_strip(axis, value, interval) if axis else None,
        )
        for name, value, interval in zip(names, drawn, intervals, strict=True)
    )
    heads = ("Patients", "Train", "Test", *(metric_title(metric) for metric in metrics))
    missing = any(cell.text == DASH for row in rows for cell in row.cells)
    classes = next(iter(result.per_site_support.values()), {})
    support = f"Below the test patients, by class: {' + '.join(classes)}. " if 1 < len(classes) <= MAX_SUPPORT else ""
    statistics = "test patients do" if result.evaluation_epsilon is None else "noised statistics do"
    note = f"“{DASH}” means that there is no number: the site did not report it, or its {statistics} not determine it." if missing else ""
    strip_head, scale = (metric_title(primary), strip_scale(axis)) if axis else ("", None)
    noise = "" if result.evaluation_epsilon is None else noise_sentence(result.evaluation_epsilon) + " "
    few = DESCRIPTIVE_NOTE if any(descriptive(run, name) for name in names) else ""
    return Table(heads=heads, rows=rows, strip_head=strip_head, scale=scale, note=noise + support + few + note)


def positives(run: RunFiles, site: str) -> tuple[str, int] | None:
    """The class with the fewest test patients of a site, and how many they are; None where classes are not counted, or carry noise."""
    support = run.result.per_site_support.get(site, {})
    return min(support.items(), key=lambda item: item[1]) if len(support) > 1 else None


def descriptive(run: RunFiles, site: str) -> str:
    """ "descriptive only" where fewer than ten test patients of a class, or in all, stand behind a site's numbers; else nothing."""
    found = positives(run, site)
    if found is not None:
        return DESCRIPTIVE if found[1] < FEWEST else ""
    tested = finite(run.result.per_site.get(site, {}).get("num_test"))
    return DESCRIPTIVE if tested is not None and tested < FEWEST else ""


def metric_names(run: RunFiles) -> list[str]:
    """The metrics of the run, the primary one first."""
    sources = [*run.result.metrics.values(), *(record.metrics for record in run.rounds[-1:])]
    found = dict.fromkeys(name for values in sources for name in values)
    primary = run.result.primary_metric
    return [primary, *(name for name in found if name != primary)]


def _size_cells(run: RunFiles, name: str, site: SiteSummary | None) -> tuple[Cell, ...]:
    mark = descriptive(run, name)
    if site is not None:
        support = run.result.per_site_support.get(name, {})
        by_class = " + ".join(count(number) for number in support.values()) if 1 < len(support) <= MAX_SUPPORT else ""
        return Cell(text=count(site.num_patients)), Cell(text=count(site.num_train)), Cell(text=count(site.num_test), below=by_class, mark=mark)
    tested = finite(run.result.per_site.get(name, {}).get("num_test"))
    return Cell(text=DASH), Cell(text=DASH), Cell(text=DASH if tested is None else count(round(tested)), mark=mark)


def _site_metric(run: RunFiles, site: str, metric: str) -> Cell:
    values = run.result.per_site.get(site, {})
    value = finite(values.get(metric))
    if value is not None:
        return Cell(text=number(value), below=interval_text(finite_interval(values.get(f"{metric}_ci95"))))
    others = any(finite(values.get(name)) is not None for name in metric_names(run))
    undefined = metric in values and needs_two_classes(metric) and others and run.result.evaluation_epsilon is None
    return Cell(text=ONE_CLASS if undefined else DASH, css="absent")


def baseline_table(run: RunFiles) -> Table | None:
    """Federated against every baseline, all metrics with intervals; None where nothing was compared."""
    result, metrics = run.result, metric_names(run)
    sources = ordered_sources(source for source, values in result.metrics.items() if values)
    if len(sources) < 2:
        return None
    primary = result.primary_metric
    values = {source: finite(result.metrics[source].get(primary)) for source in sources}
    intervals = {source: finite_interval(result.metrics_ci95.get(source, {}).get(primary)) for source in sources}
    axis = strip_axis([*(v for v in values.values() if v is not None), *(end for pair in intervals.values() if pair for end in pair)])
    rows = tuple(
        Row(
            name=judged(run.study).title(source),
            cells=tuple(_baseline_cell(run, source, metric) for metric in metrics),
            strip=interval_strip(axis, values[source], intervals[source], css=source_css(source)) if axis else None,
            css="chief" if source == "federated" else "",
        )
        for source in sources
    )
    heads = tuple(metric_title(metric) for metric in metrics)
    return Table(heads=heads, rows=rows, strip_head=metric_title(primary) if axis else "", scale=strip_scale(axis) if axis else None)


def _baseline_cell(run: RunFiles, source: str, metric: str) -> Cell:
    value = finite(run.result.metrics[source].get(metric))
    interval = finite_interval(run.result.metrics_ci95.get(source, {}).get(metric))
    return Cell(text=number(value), below=interval_text(interval), css="" if value is not None else "absent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """What a site has of the federation against a model that it trained alone, site by site; `better` of `compared` sites gained. `test` says how, or that it was not."""

    table: Table
    better: int
    compared: int
    test: str = UNTESTED


def gain_table(run: RunFiles) -> Gains | None:
    """The primary metric at each site: its own model alone, the federated one, the difference. None without that baseline."""
    result, primary = run.result, run.result.primary_metric
    alone = {site: finite(values.get(primary)) for site, values in result.per_site_baselines.get("local_only", {}).items()}
    if not alone:
        return None
    together = {site: finite(result.per_site.get(site, {}).get(primary)) for site in alone}
    axis = strip_axis([value for value in (*alone.values(), *together.values()) if value is not None])
    sign = 1 if higher_is_better(result, primary) else -1
    chances = holm({site: test.p_value for site, test in result.per_site_gains.get("local_only", {}).items()})
    rows, gains = [], []
    for site, before in alone.items():
        after = together[site]
        change = after - before if before is not None and after is not None else None
        gains += [] if change is None else [sign * change]
        css = "" if change is None or round(change, 3) == 0 else "gain" if sign * change > 0 else "loss"
        cells = (Cell(text=number(before)), Cell(text=number(after)), Cell(text=signed(change), css=css, mark=descriptive(run, site)))
        chance = (Cell(text=p_value(chances.get(site))),) if chances else ()
        rows.append(Row(name=site, cells=(*cells, *chance), strip=change_strip(axis, before, after) if axis else None))
    few = DESCRIPTIVE_NOTE if any(descriptive(run, site) for site in alone) else ""
    noise = "" if result.evaluation_epsilon is None else "A change holds the noise of the federation’s metrics. "
    table = Table(
        heads=("Alone, no privacy" if run.study.private else "Alone", judged(run.study).together, "Change", *(("p (Holm)",) if chances else ())),
        rows=tuple(rows),
        strip_head=metric_title(primary) if axis else "",
        scale=strip_scale(axis) if axis else None,
        note=noise + few + (f"“{DASH}”: the site’s own test patients do not determine {metric_title(primary)}." if len(gains) < len(rows) else ""),
    )
    return Gains(table=table, better=sum(round(gain, 3) > 0 for gain in gains), compared=len(gains), test=TESTED if chances else UNTESTED)


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests together: the smallest times their number, and so on; none below one before it (Holm 1979)."""
    adjusted, least = {}, 0.0
    for place, (name, chance) in enumerate(sorted(chances.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, chance * (len(chances) - place)))
        adjusted[name] = least
    return adjusted


def p_value(chance: float | None) -> str:
    """0.012; below what three decimals tell, that."""
    return DASH if chance is None else "< 0.001" if chance < 0.001 else f"{chance:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Patients by site and class, with the classes in the order of the bars' colours."""

    table: Table
    classes: tuple[str, ...]


def partition_table(run: RunFiles) -> Partition | None:
    """How the patients are divided among the sites, by class; None in a deployment, which does not tell."""
    sites = [site for site in run.result.sites if site.classes]
    if not sites:
        return None
    classes = tuple(dict.fromkeys(name for site in sites for name in site.classes or {}))
    largest = max(sum((site.classes or {}).values()) for site in sites)
    rows = []
    for site in sites:
        counts = site.classes or {}
        whole = sum(counts.values())
        cells = tuple(Cell(text=count(counts.get(name, 0)), below=_share(counts.get(name, 0), whole)) for name in classes)
        bar = share_bar([(name, counts.get(name, 0)) for name in classes], whole=largest)
        rows.append(Row(name=site.name, cells=(Cell(text=count(whole)), *cells), strip=bar))
    heads = ("Patients", *(f"Class {name}" if name.isdigit() else name for name in classes))
    return Partition(table=Table(heads=heads, rows=tuple(rows), strip_head="Patients by class"), classes=heads[1:])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}".replace("%", " %") if whole else ""


def privacy_table(run: RunFiles) -> Table | None:
    """What was spent at each site, with the second accountant's number; None without a promise."""
    spent = run.result.privacy.sites
    if run.result.privacy.unit == "none" or not spent:
        return None
    claims = run.claim.sites if run.claim else {}
    together = colluding(run)
    rows = tuple(
        Row(
            name=name,
            cells=(
                Cell(text=upper_bound(site.epsilon)),
                *(() if together is None else (Cell(text=upper_bound(together[name])),)),
                Cell(text=upper_bound(site.epsilon_cross_check)),
                Cell(text=upper_bound(site.epsilon_planned)),
                Cell(text=compact(site.delta)),
                Cell(text=compact(site.noise_multiplier)),
                Cell(text=compact(site.sample_rate)),
                Cell(text=count(site.steps)),
                Cell(text=count(claims[name].declared_size) if name in claims else DASH),
            ),
        )
        for name, site in spent.items()
    )
    more = () if together is None else ("All others together",)
    heads = ("Epsilon", *more, "Cross-check", "Whole plan", "Delta", "Noise multiplier", "Sample rate", "Steps", "Declared size")
    view = View.of(run.study)
    note = (
        f"Epsilon is {view.against}; beside it, against the coordinator and all other sites together. The noise multiplier is that of a sum: a site’s own share is "
        f"{view.share:.3g} times it."
        if view.shared
        else ""
    )
    return Table(heads=heads, rows=rows, note=note)


def absence_table(run: RunFiles) -> Table | None:
    """Sites that gave no update though they were asked, with the rounds and the reasons; None where all answered."""
    names = dict.fromkeys(site.name for record in run.rounds for site in record.sites if site.status not in ("ok", "not asked", "at work"))
    if not names:
        return None
    rows = []
    for name in names:
        seen = [(record, site) for record in run.rounds for site in record.sites if site.name == name]
        absent = [(record, site) for record, site in seen if site.status not in ("ok", "not asked", "at work")]
        num_without = sum(site.status not in ("ok", "not asked") for _, site in seen)
        strip = status_strip([(f"{_place(record)}: {site.status}", site.status) for record, site in seen])
        rows.append(Row(name=name, cells=(Cell(text=f"{num_without} of {len(seen)}"), Cell(text="", below="; ".join(_reasons(absent)))), strip=strip))
    return Table(heads=("Rounds without update", "Rounds and reasons"), rows=tuple(rows), strip_head="By round")


def _place(record: RoundRecord) -> str:
    return f"round {record.round}" if record.fold == 1 else f"fold {record.fold}, round {record.round}"


def _reasons(absent: Sequence[tuple[RoundRecord, SiteRound]]) -> list[str]:
    """ "missing in rounds 3, 7–9: reason", a line for each status, reason and fold."""
    grouped: dict[tuple[str, str, int], list[int]] = {}
    for record, site in absent:
        grouped.setdefault((site.status, site.reason or "no reason given", record.fold), []).append(record.round)
    several = len({record.fold for record, _ in absent}) > 1 or any(record.fold > 1 for record, _ in absent)
    return [
        f"{status} in {f'fold {fold}, ' if several else ''}{'round' if len(rounds) == 1 else 'rounds'} {ranges(rounds)}: {reason}"
        for (status, reason, fold), rounds in grouped.items()
    ]


def notes_table(run: RunFiles) -> Table | None:
    """What reading the data did to them, in counts; None where nothing is noted."""
    notes = run.result.notes
    if not notes:
        return None
    row = Row(name="all sites together", cells=tuple(Cell(text=count(number)) for number in notes.values()))
    return Table(heads=tuple(humanise(name) for name in notes), rows=(row,))


def fold_table(run: RunFiles) -> Table | None:
    """Every fold of a cross-validation with its metrics; None without one."""
    if not run.result.folds:
        return None
    metrics = metric_names(run)
    rows = tuple(
        Row(name=f"Fold {index}", cells=tuple(Cell(text=number(finite(fold.get(metric)))) for metric in metrics))
        for index, fold in enumerate(run.result.folds, start=1)
    )
    return Table(heads=tuple(metric_title(metric) for metric in metrics), rows=rows)
