"""For researchers: all results. The page has a template of its own (page.html.j2); this is the same content as a document, for its JSON."""

from wardround.report.attacks import attack_blocks
from wardround.report.charts import calibration_chart, epsilon_chart, learning_chart, roc_chart
from wardround.report.document import Block, Bullets, Document, Drawing, Facts, Grid, Prose, Section
from wardround.report.history import Curve, epsilon_by_round, fold_curves, site_curves
from wardround.report.judged import judged, learning_note
from wardround.report.risk import risk_grid
from wardround.report.run_files import RunFiles
from wardround.report.statistics import calibration_series, drawable, roc_series
from wardround.report.subgroups import subgroup_blocks, worst_site_sentence
from wardround.report.summary import banners, key_numbers, lead, meaning_sentence, site_level_sentence
from wardround.report.tables import absence_table, baseline_table, fold_table, gain_table, notes_table, partition_table, privacy_table, site_table
from wardround.report.wording import metric_title


def researcher_document(run: RunFiles) -> Document:
    """Everything that the researcher's page shows."""
    sections = (
        Section(
            id="numbers",
            title="Key numbers",
            blocks=(Facts(pairs=tuple((n.name, f"{n.value} ({n.below})" if n.below else n.value) for n in key_numbers(run))),),
        ),
        Section(id="training", title="Training", blocks=_training(run)),
        Section(id="comparison", title="Comparison", blocks=_comparison(run)),
        Section(
            id="sites",
            title="Sites",
            blocks=(
                Grid(table=site_table(run), caption=judged(run.study).sites),
                Prose(text=worst_site_sentence(run), css="note"),
                *subgroup_blocks(run),
            ),
        ),
        Section(id="model", title="Final model", blocks=_final_model(run)),
        Section(id="attacks", title="Measured by attack", blocks=tuple(attack_blocks(run))),
        Section(id="privacy", title="Privacy", blocks=_privacy(run)),
        Section(id="data", title="Data", blocks=_data(run)),
        Section(id="study", title="Study", blocks=_study(run)),
    )
    return Document(
        reader="researcher",
        eyebrow="report of a run",
        title=run.result.study,
        subtitle=run.result.task_title,
        run=run.result.run,
        lead=lead(run),
        banners=tuple(banners(run)),
        sections=tuple(section for section in sections if section.blocks),
    )


def _training(run: RunFiles) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if figure := learning_chart(run):
        series = _series([*fold_curves(run), *site_curves(run)])
        blocks.append(
            Drawing(figure=figure, title=f"{metric_title(run.result.primary_metric)} by round", note=learning_note(run.study), series=series)
        )
    if absences := absence_table(run):
        blocks.append(Grid(table=absences, caption="Sites without an update, by round"))
    if folds := fold_table(run):
        blocks.append(Grid(table=folds, caption="Metrics of each fold’s final model", corner="Fold"))
    return tuple(blocks)


def _series(curves: list[Curve]) -> dict[str, list[tuple[float, float | None]]]:
    return {curve.name: [(float(at), value) for at, value, _ in curve.points] for curve in curves}


def _comparison(run: RunFiles) -> tuple[Block, ...]:
    blocks: list[Block] = []
    words = judged(run.study)
    if baselines := baseline_table(run):
        blocks.append(Grid(table=baselines, caption=f"{words.chief} and baselines, with 95 % intervals", corner="Model"))
    if gains := gain_table(run):
        blocks += [
            Prose(text=f"At {gains.better} of {gains.compared} sites {words.gained}."),
            Grid(table=gains.table, caption=f"{metric_title(run.result.primary_metric)} {words.gains}"),
            Prose(text=gains.test, css="note"),
        ]
    return tuple(blocks)


def _final_model(run: RunFiles) -> tuple[Block, ...]:
    histograms = drawable(run, "score_histogram")
    blocks: list[Block] = []
    title = judged(run.study).title
    if roc := roc_chart(histograms, title):
        curves = {title(source): roc_series(histogram) for source, histogram in histograms.items()}
        blocks.append(Drawing(figure=roc, title="ROC curve", series=curves))
    if calibration := calibration_chart(histograms, title):
        points: dict[str, list[tuple[float, float | None]]] = {
            title(source): [(score, rate) for score, rate, _ in calibration_series(histogram)] for source, histogram in histograms.items()
        }
        blocks.append(Drawing(figure=calibration, title="Calibration", series=points))
    if risk := risk_grid(run):
        blocks.append(risk)
    return tuple(blocks)


def _privacy(run: RunFiles) -> tuple[Block, ...]:
    blocks: list[Block] = [Prose(text=sentence) for sentence in (meaning_sentence(run), run.claim.statement if run.claim else "") if sentence]
    if figure := epsilon_chart(run):
        blocks.append(Drawing(figure=figure, title="Epsilon spent by round", series=_series(epsilon_by_round(run))))
    if spent := privacy_table(run):
        blocks.append(Grid(table=spent, caption="Spent at each site"))
    if whole := site_level_sentence(run):
        blocks.append(Prose(text=f"Whole hospitals: {whole}."))
    if run.claim and run.claim.site_level and run.claim.unit != "site":
        blocks.append(Prose(text=run.claim.site_level.statement))
    if run.claim:
        blocks += [
            Prose(text="Covered:"),
            Bullets(items=tuple(run.claim.covered)),
            Prose(text="Not covered:"),
            Bullets(items=tuple(run.claim.not_covered)),
        ]
    return tuple(blocks)


def _data(run: RunFiles) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if partition := partition_table(run):
        blocks.append(Grid(table=partition.table, caption="Patients of each site by class"))
    if notes := notes_table(run):
        blocks.append(Grid(table=notes, caption="What was done to the data when it was read, in counts"))
    return tuple(blocks)


def _study(run: RunFiles) -> tuple[Block, ...]:
    versions = tuple(run.claim.versions.items()) if run.claim else ()
    return (Prose(text=run.study_toml), *((Facts(pairs=versions),) if versions else ()))
