"""The report of a sweep, from the files in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.files import write_atomic
from simulations.sweeps.cell import CellResult
from simulations.sweeps.folder import SweepFolder
from wardround.plural import plural
from wardround.report.document import Block, Document, Drawing, Grid, Prose, Section, Series
from wardround.report.judged import beside_own_models
from wardround.report.summary import Banner
from wardround.report.sweep_charts import burn_down_chart, noise_chart, utility_chart, utility_lines
from wardround.report.tables import Cell, Table
from wardround.report.tables import Row as TableRow
from wardround.report.templates import fill_in
from wardround.report.wording import (
    DASH,
    compact,
    humanise,
    interval_text,
    metric_title,
    number,
    ordered_sources,
    short_setting,
    source_title,
    upper_bound,
)
from wardround.sweeping import SEED, Row, summarise

TITLES = {
    "privacy.epsilon": "Epsilon, the budget of the whole study at each site",
    "federation.sites": "Number of sites",
    "federation.alpha": "Alpha (smaller: sites differ more)",
    "training.batch_size": "Expected batch size",
    "rounds.count": "Rounds",
}
MOST_FIGURES = 8
SAME_PATIENTS = (
    "Intervals are 95 % intervals of the mean over seeds, by Student's t. A seed draws the first model, the batches and the noise, and the division of one cohort "
    "where sites are virtual; the patients are the same in all runs, so an interval says nothing about other patients."
)
SEVERAL = (
    "Each point is one promise, for one run. All runs together are no such promise: on real patients every run is a release, and choosing among them is one "
    "more (Papernot and Steinke 2022). 'wardround privacy explain' says what this sweep would cost."
)


def write_sweep_report(path: Path) -> Path:
    """The path of report.html in the sweep's folder, written from the cells that are done.

    Raises:
        StorageError: a file of the sweep is damaged, or the report cannot be written.
    """
    folder = SweepFolder(path)
    report = path / "report.html"
    write_atomic(report, fill_in("document.html.j2", document=sweep_document(folder)))
    return report


def sweep_document(folder: SweepFolder) -> Document:
    """What the report says."""
    results = folder.results()
    done = [result for result in results if result.status == "ok"]
    rows = summarise(done)
    sections = [*_utility(rows, done), *_privacy(done), *_failed(results)] if done else _failed(results)
    return Document(
        reader="researcher", eyebrow="report of a sweep", title=folder.sweep.name, subtitle=_subtitle(done), run=folder.path.name,
        lead=_lead(folder, done, rows), banners=_banners(folder, results), sections=tuple(sections),
        tags=tuple(f"{setting.rpartition('.')[2]}: {', '.join(_text(value) for value in values)}" for setting, values in folder.sweep.grid.items()),
    )  # fmt: skip


def _subtitle(done: Sequence[CellResult]) -> str:
    tasks = dict.fromkeys(str(result.study["task"]) for result in done)
    return ", ".join(tasks) or "no cell is done"


def _lead(folder: SweepFolder, done: Sequence[CellResult], rows: Sequence[Row]) -> str:
    runs = f"{len(done)} of {plural(len(folder.cells), 'run')} done, at {plural(len(rows), 'setting')}"
    means = [(mean, row) for row in rows if (mean := row.mean("federated")) is not None]
    if not means:
        return f"{runs}."
    metric, better = metric_title(done[0].primary_metric), max if done[0].higher_is_better else min
    best_mean, best = better(means, key=lambda item: item[0])
    interval = best.interval("federated")
    others = [row for _, row in means if row is not best]
    if interval is None or any(_overlap(interval, row.interval("federated")) for row in others):
        return f"{runs}. {metric} of the federation is between {number(min(mean for mean, _ in means))} and {number(max(mean for mean, _ in means))} in the mean over seeds."
    return (
        f"{runs}. {metric} of the federation is best, {number(best_mean)} in the mean over {plural(best.num_runs, 'seed')}, with {_settings(best)}."
    )


def _overlap(one: tuple[float, float], other: tuple[float, float] | None) -> bool:
    return other is None or (one[0] <= other[1] and other[0] <= one[1])


def _banners(folder: SweepFolder, results: Sequence[CellResult]) -> tuple[Banner, ...]:
    found = []
    if any(result.synthetic for result in results):
        found.append(Banner(title="SYNTHETIC patients.", text="Nothing here says anything about real ones."))
    failed = [result.number for result in results if result.status == "failed"]
    if failed:
        found.append(
            Banner(
                title=f"{plural(len(failed), 'cell')} failed.",
                text="They are named below; the sweep's folder, given to 'wardround sweep', tries them again.",
            )
        )
    if len(results) < len(folder.cells):
        found.append(Banner(title="Not finished.", text=f"{plural(len(folder.cells) - len(results), 'cell')} are still to be run.", css="remark"))
    if own := beside_own_models(str(result.study["strategy.name"]) for result in results):
        found.append(Banner(title="Models of the sites’ own.", text=own, css="remark"))
    if any(result.privacy is not None and result.privacy.sites for result in results):
        found.append(Banner(title="One promise a run.", text=SEVERAL, css="remark"))
    return tuple(found)


def _utility(rows: Sequence[Row], done: Sequence[CellResult]) -> list[Section]:
    metric, blocks = metric_title(done[0].primary_metric), []
    for setting in list(rows[0].settings)[:MOST_FIGURES]:
        title = TITLES.get(setting, humanise(setting.rpartition(".")[2]))
        figure = utility_chart(rows, setting, metric=metric, title=title)
        if figure is not None:
            series: Series = {line.name: [(x, mean) for x, mean, _ in line.points] for line in utility_lines(rows, setting)}
            blocks.append(
                Drawing(figure=figure, title=f"{metric} by {title.partition(',')[0].partition(' (')[0].lower()}", note=_how(done), series=series)
            )
    table: Block = Grid(table=_table(rows), caption=f"{metric}, mean over seeds, with 95 % intervals", corner="Setting")
    return [Section(id="utility", title="Utility", blocks=(*blocks, table, Prose(text=SAME_PATIENTS, css="note")))]


def _how(done: Sequence[CellResult]) -> str:
    """How the points were accounted."""
    sites = [site for result in done if result.privacy is not None for site in result.privacy.sites.values()]
    if not sites:
        whole = any(result.privacy is not None and result.privacy.site_level is not None for result in done)
        return (
            "No run promises patients privacy; where a run promises whole hospitals some, its claim sheet says what."
            if whole
            else "No run promises privacy."
        )
    accountants = " and ".join(sorted({site.accountant.upper() for site in sites}))
    rates, deltas = sorted({site.sample_rate for site in sites}), sorted({site.delta for site in sites})
    between = [f"{compact(values[0])} to {compact(values[-1])}" if len(values) > 1 else compact(values[0]) for values in (rates, deltas)]
    return (
        f"Every epsilon: DP-SGD with Poisson sampling of {done[0].study['privacy.unit']}s at each site (rate {between[0]}), composed over all steps by {accountants}, at delta "
        f"{between[1]}{'; the noise is seeded, so this simulation itself protects nobody' if any(result.privacy and result.privacy.seeded_noise for result in done) else ''}."
    )


def _table(rows: Sequence[Row]) -> Table:
    sources = ordered_sources({source for row in rows for source in row.values})
    heads = (*(source_title(source) for source in sources), "Worst site", "Runs", "Noise multiplier", "Epsilon spent")
    return Table(heads=heads, rows=tuple(_row(row, sources) for row in rows))


def _row(row: Row, sources: Sequence[str]) -> TableRow:
    cells = [Cell(text=number(row.mean(source)), below=interval_text(row.interval(source))) for source in sources]
    worst = [
        min(known) if run.higher_is_better else max(known)
        for run in row.runs
        if (known := [value for value in run.per_site.values() if value is not None])
    ]
    sites = [site for run in row.runs if run.privacy is not None for site in run.privacy.sites.values()]
    noise = sorted({site.noise_multiplier for site in sites})
    cells += [
        Cell(text=number(sum(worst) / len(worst)) if worst else DASH, below="mean over seeds" if worst else ""),
        Cell(text=str(row.num_runs)),
        Cell(
            text=f"{compact(noise[0])} to {compact(noise[-1])}" if len(noise) > 1 else compact(noise[0]) if noise else "none",
            below="over sites" if len(noise) > 1 else "",
        ),
        Cell(
            text=upper_bound(max(site.epsilon for site in sites)) if sites else "no privacy",
            below=f"delta {compact(max(site.delta for site in sites))}" if sites else "",
        ),
    ]
    return TableRow(name=_settings(row), cells=tuple(cells))


def _privacy(done: Sequence[CellResult]) -> list[Section]:
    blocks: list[Block] = []
    burn = burn_down_chart(done)
    if burn is not None:
        note = "Of the site that spends most. A round is charged in full before it begins; what is drawn is what was charged after it."
        blocks.append(Drawing(figure=burn, title="Epsilon spent by round", note=note))
    for setting in done[0].settings:
        if setting in (SEED, "strategy.name"):
            continue
        title = TITLES.get(setting, humanise(setting.rpartition(".")[2]))
        figure = noise_chart(done, setting, title=title)
        if figure is not None:
            note = "At the site that needs most: its noise is solved from the budget, its sample rate and all its steps."
            blocks.append(
                Drawing(figure=figure, title=f"Noise that the budget needs, by {title.partition(',')[0].partition(' (')[0].lower()}", note=note)
            )
    return [Section(id="privacy", title="Privacy", blocks=tuple(blocks))] if blocks else []


def _failed(results: Sequence[CellResult]) -> list[Section]:
    failed = [result for result in results if result.status == "failed"]
    if not failed:
        return []
    rows = tuple(
        TableRow(name=f"cell {result.number}", cells=(Cell(text=_pairs(result.settings)), Cell(text=result.error or ""))) for result in failed
    )
    table = Grid(table=Table(heads=("Setting", "What failed"), rows=rows), caption="Cells that came to nothing", corner="Cell", css="left-cells")
    return [Section(id="failed", title="Failed", blocks=(table,))]


def _settings(row: Row) -> str:
    return _pairs(row.settings) or "the study as it is"


def _pairs(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{short_setting(name)} {_text(value)}" for name, value in settings.items())


def _text(value: object) -> str:
    return compact(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
