"""The report as one HTML page: no script, no request, complete in print."""

import math
from pathlib import Path

import jinja2
import numpy as np
from numpy.typing import NDArray

from shared.files import write_atomic
from shared.metrics import SCORE_HISTOGRAM
from wardround.report.charts import calibration_chart, epsilon_chart, learning_chart, roc_chart
from wardround.report.run_files import RunFiles, read_run
from wardround.report.summary import banners, federation_sentence, key_numbers, lead, meaning_sentence, shares_by_row
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
from wardround.report.wording import metric_title, ordered_sources, source_title

_HERE = Path(__file__).parent


def write_report(run_folder: Path) -> Path:
    """The path of report.html, written whole or not at all into `run_folder` from the files there.

    The page makes no request and runs no script. What a run has not come to (privacy.json, evaluation.json, a final model) is left
    out with a sentence that says so.

    Raises:
        StorageError: a file of the run is missing or damaged, or the report cannot be written.
        ConfigurationError: the run's study.toml is no study.

    Example:
        write_report(Path("runs/heart-disease-20250101T000000Z-1a2b"))
    """
    path = run_folder / "report.html"
    write_atomic(path, render(read_run(run_folder)))
    return path


def render(run: RunFiles) -> str:
    """The HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(style=style, **_context(run))


def _context(run: RunFiles) -> dict[str, object]:
    histograms, confusions = _statistics(run, "score_histogram"), _statistics(run, "confusion")
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
        "epsilon": epsilon_chart(run),
        "roc": roc_chart(histograms),
        "calibration": calibration_chart(histograms),
        "class_names": dict(enumerate(next(iter(run.result.per_site_support.values()), {}))),
        "confusions": [(source_title(source), shares_by_row(matrix)) for source, matrix in confusions.items()],
        "sites": site_table(run),
        "baselines": baseline_table(run),
        "gains": gain_table(run),
        "partition": partition_table(run),
        "folds": fold_table(run),
        "spent": privacy_table(run),
        "meaning": meaning_sentence(run),
        "federation": federation_sentence(run),
        "absences": absence_table(run),
        "num_unasked": sum(site.status == "not asked" for record in run.rounds for site in record.sites),
        "notes": notes_table(run),
    }


def _statistics(run: RunFiles, name: str) -> dict[str, NDArray[np.float64]]:
    """The summed statistic by source, federated first; what is not a finite matrix of counts, or carries noise, is left out."""
    sources = run.statistics.sources if run.statistics else {}
    noised = {"federated"} if run.result.evaluation_epsilon is not None else set()  # it counts nobody, and its curves would be noise
    found = {}
    for source in ordered_sources(sources.keys() - noised):
        values = sources[source].get(name)
        try:
            matrix = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            continue
        fits = matrix.ndim == 2 and (matrix.shape[0] == matrix.shape[1] if name == "confusion" else matrix.shape == SCORE_HISTOGRAM.shape)
        if fits and bool(np.isfinite(matrix).all()) and matrix.min() >= 0 and math.fsum(matrix.ravel()) > 0:
            found[source] = matrix
    return found
