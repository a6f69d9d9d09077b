"""A run's reports as HTML pages and JSON: no script, no request, complete in print."""

import json
from pathlib import Path

from shared.files import write_atomic
from shared.view import View
from wardround.report.attacks import attack_blocks
from wardround.report.charts import calibration_chart, epsilon_chart, learning_chart, roc_chart
from wardround.report.document import NAMES, Document, Reader, content
from wardround.report.judged import judged, learning_note
from wardround.report.markdown import markdown
from wardround.report.risk import risk_grid
from wardround.report.run_files import RunFiles, read_run
from wardround.report.statistics import drawable
from wardround.report.subgroups import subgroup_blocks, worst_site_sentence
from wardround.report.summary import banners, federation_sentence, key_numbers, lead, meaning_sentence, shares_by_row, site_level_sentence
from wardround.report.tables import (
    absence_table,
    baseline_table,
    fold_table,
    gain_table,
    notes_table,
    partition_table,
    privacy_table,
    site_table,
)
from wardround.report.templates import fill_in
from wardround.report.wording import metric_title


def write_report(run_folder: Path, reader: Reader = "researcher") -> Path:
    """The path of the reader's page, written into `run_folder` from the files there; its content as JSON stands beside it, and a model card as Markdown.

    Each file is written whole or not at all. A page makes no request and runs no script. What a run has not come to (privacy.json, evaluation.json,
    a final model) is left out with a sentence that says so.

    Raises:
        StorageError: a file of the run is missing or damaged, or the report cannot be written.
        ConfigurationError: the run's study.toml is no study.
        KitError: IT security reads the coordinator's kit around the run, and it is damaged.

    Example:
        write_report(Path("runs/heart-disease-20250101T000000Z-1a2b"), "ethics")
    """
    run = read_run(run_folder)
    document = document_for(run, reader)
    path = run_folder / f"{NAMES[reader]}.html"
    write_content(document, path)
    if reader == "model-card":
        from wardround.report.model_card import front_matter

        write_atomic(path.with_suffix(".md"), front_matter(run) + "\n" + markdown(document))
    write_atomic(path, render(run) if reader == "researcher" else render_document(document))
    return path


def write_content(document: Document, page: Path) -> None:
    """The document as JSON, beside its page."""
    write_atomic(page.with_suffix(".json"), json.dumps(content(document), ensure_ascii=False, allow_nan=False) + "\n")


def document_for(run: RunFiles, reader: Reader) -> Document:
    """The report's content. Each reader's room is imported when it is asked for: the researcher's, which every run writes, needs neither torch nor a kit."""
    if reader == "ethics":
        from wardround.report.ethics import ethics_document

        return ethics_document(run)
    if reader == "it-security":
        from wardround.report.it_security import it_security_document

        return it_security_document(run)
    if reader == "model-card":
        from wardround.report.model_card import model_card_document

        return model_card_document(run)
    from wardround.report.researcher import researcher_document

    return researcher_document(run)


def render(run: RunFiles) -> str:
    """The researcher's page."""
    return fill_in("page.html.j2", **_context(run))


def render_document(document: Document) -> str:
    """Any other reader's page."""
    return fill_in("document.html.j2", document=document)


def _context(run: RunFiles) -> dict[str, object]:
    words = judged(run.study)
    histograms, confusions = drawable(run, "score_histogram"), drawable(run, "confusion")
    return {
        "run": run,
        "result": run.result,
        "study": run.study,
        "task_title": run.result.task_title,
        "metric": metric_title(run.result.primary_metric),
        "banners": banners(run),
        "lead": lead(run),
        "numbers": key_numbers(run),
        "learning": learning_chart(run),
        "learning_note": learning_note(run.study),
        "words": words,
        "epsilon": epsilon_chart(run),
        "roc": roc_chart(histograms, words.title),
        "calibration": calibration_chart(histograms, words.title),
        "risk": risk_grid(run),
        "class_names": dict(enumerate(next(iter(run.result.per_site_support.values()), {}))),
        "confusions": [(words.title(source), shares_by_row(matrix)) for source, matrix in confusions.items()],
        "sites": site_table(run),
        "worst_site": worst_site_sentence(run),
        "subgroups": subgroup_blocks(run),
        "baselines": baseline_table(run),
        "gains": gain_table(run),
        "partition": partition_table(run),
        "folds": fold_table(run),
        "spent": privacy_table(run),
        "meaning": meaning_sentence(run),
        "view": View.of(run.study),
        "federation": federation_sentence(run),
        "whole_hospitals": site_level_sentence(run),
        "absences": absence_table(run),
        "num_unasked": sum(site.status == "not asked" for record in run.rounds for site in record.sites),
        "num_at_work": sum(site.status == "at work" for record in run.rounds for site in record.sites),
        "notes": notes_table(run),
        "measured": attack_blocks(run),
    }
