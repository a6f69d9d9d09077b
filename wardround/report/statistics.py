"""Summed statistics of evaluation.json as arrays, where something can be drawn from them."""

import math

import numpy as np
from numpy.typing import NDArray

from shared.metrics import SCORE_HISTOGRAM, calibration_curve, roc_curve
from wardround.report.charts import MIN_GROUP_PATIENTS
from wardround.report.run_files import RunFiles
from wardround.report.wording import ordered_sources


def drawable(run: RunFiles, name: str) -> dict[str, NDArray[np.float64]]:
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


def roc_series(histogram: NDArray[np.float64]) -> list[tuple[float, float | None]]:
    """The corners of a ROC curve, each once; empty with one class."""
    curve = roc_curve(histogram)
    return [] if curve is None else list(dict.fromkeys(zip(curve[0].tolist(), curve[1].tolist(), strict=True)))


def calibration_series(histogram: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """(mean score, observed rate, patients) of each group of score with as many patients as the figure asks for."""
    return [point for point in calibration_curve(histogram) if point[2] >= MIN_GROUP_PATIENTS]
