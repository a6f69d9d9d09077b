"""Metrics as functions of additive statistics, so that sums over sites give the pooled value exactly.

A site sends a fixed-shape sum to which each patient adds at most `sensitivity` (L2 norm; add/remove one patient); the server adds the
sums and finishes. A mean of per-site AUROCs is not the AUROC of all patients; the AUROC of the summed histograms is.

Legend: N records, B score bins, K classes, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import ConfigurationError

FloatArray = NDArray[np.float64]

NUM_BINS = 512  # half below and half above the threshold 0.5
MAX_LOGIT = 12.0
NOISED_WIDTHS = (128, 32, 32, *[8] * 16, 32, 32, 128)  # bins that share a draw of noise: steps of 0.375 in logit up to 3, of 1.5 up to 6, the rest
CALIBRATION_GROUPS = 10
RISK_EDGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # between bands of risk
NOISE_REACH = 12.0  # standard deviations
ROUNDING = 1e-9  # relative: of sums of floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A fixed-shape sum over patients.

    Attributes:
        summarise: (predictions, cohort) -> float64 of `shape`. A patient's records share a weight of 1.
        sensitivity: largest L2 norm that one patient adds.
        is_counts: True when every entry counts patients, so that resampling the entries is a bootstrap over patients.
        noised_widths: numbers of neighbouring entries along the last axis that share one draw where noise is added, and so are told apart no
            more; powers of two that sum to the axis; empty: a draw each. One patient's `sensitivity` holds for their sums too.
        cells: for a sum to which a record adds its weight in one entry: (predictions, labels) -> `(N,)`, that entry's flat index. With it,
            the sums of many sites are made at once; it must say what `summarise` does.
        agrees: whether the entries of an exact sum agree with each other, as those of a sum over patients do; None: any that are not negative.
    """

    name: str
    shape: tuple[int, ...]
    summarise: Callable[[FloatArray, Cohort], FloatArray]
    sensitivity: float = 1.0
    is_counts: bool = True
    noised_widths: tuple[int, ...] = ()
    agrees: Callable[[FloatArray], bool] | None = None
    cells: Callable[[FloatArray, NDArray[np.generic]], NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        fits = not self.noised_widths or (sum(self.noised_widths) == self.shape[-1] and all(w > 0 and w & (w - 1) == 0 for w in self.noised_widths))
        if not fits or not 0 < self.sensitivity < math.inf:
            raise ConfigurationError(
                f"statistic {self.name}: expected a sensitivity above 0 and noised_widths that are powers of two and sum to the last axis, got others"
            )

    @property
    def num_draws(self) -> int:
        """Draws of noise, where noise is added."""
        return math.prod((*self.shape[:-1], len(self.noised_widths)) if self.noised_widths else self.shape)

    def could_be(self, total: FloatArray, *, patients: int, noise_std: float = 0.0) -> bool:
        """Whether `total` could be the sum over at most so many patients.

        A patient adds at most `sensitivity` (L2 norm), so n patients at most n times that; where entries count patients, they add up to at most
        n. Noise of a known size moves both: of a normal draw, twelve standard deviations are left in 1e-33 of all cases, and a site whose
        own limit asks for up to twice the noise of the plan still has six.

        Args:
            noise_std: of each draw of noise; 0 where the sum is exact, and its entries must then not be negative, and must agree.
        """
        reach = NOISE_REACH * noise_std * math.sqrt(self.num_draws)
        most = self.sensitivity * patients * (1 + ROUNDING) + reach
        if not np.isfinite(total).all() or np.abs(total).max(initial=0.0) > most or float(np.linalg.norm(total)) > most:
            return False
        if self.is_counts and total.sum() > patients * (1 + ROUNDING) + reach:
            return False
        return noise_std > 0 or bool(total.min(initial=0.0) >= 0 and (self.agrees is None or self.agrees(total)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number finished from a summed statistic.

    Attributes:
        finish: gives None where the sum does not determine the metric (one class only). With noise, entries may be below zero.
        low, high: the metric's range; noise takes nothing out of it.
    """

    name: str
    statistic: Statistic
    finish: Callable[[FloatArray], float | None]
    higher_is_better: bool = True
    low: float = -math.inf
    high: float = math.inf

    def of(self, total: FloatArray) -> float | None:
        """The metric of a sum, exact or noised: a finite number within its range, or None."""
        try:
            with np.errstate(all="ignore"):
                value = self.finish(total)
        except (ArithmeticError, ValueError):  # such as the root of a noised sum below zero, in a task's own metric
            return None
        return None if value is None or not math.isfinite(value) else min(max(value, self.low), self.high)


def finish_metrics(metrics: Sequence[Metric], totals: dict[str, FloatArray]) -> dict[str, float | None]:
    """Every metric whose statistic is among `totals`."""
    return {metric.name: metric.of(totals[metric.statistic.name]) for metric in metrics if metric.statistic.name in totals}


def bootstrap_interval(metric: Metric, total: FloatArray, *, resamples: int, rng: np.random.Generator) -> tuple[float, float] | None:
    """95 % percentile interval of a metric by resampling patients from a summed count statistic, or None.

    Conditional on the number of patients of each class for a two-row histogram would be narrower; this resamples all patients, as a
    bootstrap over a pooled file would (Efron 1979). None where the statistic does not count patients, or under two patients. Not for sums
    with noise: it would leave the noise out.
    """
    count = round(float(total.sum()))
    if not metric.statistic.is_counts or count < 2 or resamples == 0 or total.min() < 0:
        return None
    draws = rng.multinomial(count, (total / total.sum()).ravel(), size=resamples).reshape(resamples, *total.shape)
    values = [value for draw in draws if (value := metric.of(draw.astype(np.float64))) is not None]
    if len(values) < resamples / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def noise_interval(metric: Metric, total: FloatArray, *, std: float, draws: int, rng: np.random.Generator) -> tuple[float, float] | None:
    """How far the noise in `total`, of known size, may have moved the metric: about 95 %, of the noise alone, and cut to the metric's range.

    Drawn again and again on top of the sum, noise of the same size moves the metric about as far as it has moved it already. Where that
    leaves most draws without a value the sum says nothing, and the interval is the whole range. None where the metric has no value.

    Args:
        std: of the noise on each entry, or on each group of entries that shares a draw.
    """
    value, widths = metric.of(total), metric.statistic.noised_widths
    if value is None or draws == 0:
        return None
    shape = (*total.shape[:-1], len(widths)) if widths else total.shape
    moved = []
    for _ in range(draws):
        noise = rng.normal(scale=std, size=shape)
        moved.append(metric.of(total + (np.repeat(noise / np.array(widths), widths, axis=-1) if widths else noise)))
    known = [other for other in moved if other is not None]
    if len(known) < draws / 2:
        return (metric.low, metric.high) if math.isfinite(metric.low) and math.isfinite(metric.high) else None
    reach = 1.96 * math.sqrt(float(np.mean((np.array(known) - value) ** 2)))
    return max(metric.low, value - reach), min(metric.high, value + reach)


# Two classes: a histogram of scores per class -----------------------------------------------------------------------------------


def score_histogram(scores: FloatArray, cohort: Cohort) -> FloatArray:
    """`(2, B)`: patients by class (row) and bin of their score, equal steps of logit in [-12, 12], an edge at score 0.5.

    Args:
        scores: `(N,)` probabilities of the positive class.
    """
    counts = np.bincount(score_cells(scores, cohort.labels), weights=cohort.record_weights(), minlength=2 * NUM_BINS)
    return np.asarray(counts, dtype=np.float64).reshape(2, NUM_BINS)


def score_cells(scores: FloatArray, labels: NDArray[np.generic]) -> NDArray[np.int64]:
    """`(N,)`: the entry of each record in the flattened histogram."""
    return labels.astype(np.int64).reshape(-1) * NUM_BINS + bin_of_score(scores)


def bin_of_score(scores: FloatArray) -> NDArray[np.int64]:
    """Bin of each score; scores of 0.5 and above are in the upper half, and a non-finite score counts as 0."""
    finite = np.where(np.isfinite(scores), scores, 0.0).astype(np.float64)
    clipped = np.clip(finite, 1e-12, 1 - 1e-12)
    logit = np.log(clipped) - np.log1p(-clipped)
    bins = np.floor((logit / MAX_LOGIT + 1) * NUM_BINS / 2).astype(np.int64)
    bins = np.where(finite >= 0.5, np.maximum(bins, NUM_BINS // 2), np.minimum(bins, NUM_BINS // 2 - 1))
    return np.asarray(np.clip(bins, 0, NUM_BINS - 1))


def bin_scores() -> FloatArray:
    """`(B,)`: the score at the middle of each bin."""
    logit = (np.arange(NUM_BINS) + 0.5) / NUM_BINS * 2 * MAX_LOGIT - MAX_LOGIT
    return np.asarray(1 / (1 + np.exp(-logit)))


_BIN_SCORES = bin_scores()
_GROUP_OF_BIN = np.minimum((_BIN_SCORES * CALIBRATION_GROUPS).astype(np.int64), CALIBRATION_GROUPS - 1)


def roc_curve(histogram: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """False and true positive rates `(B + 1,)` each, from the highest threshold down; None with one class only."""
    negatives, positives = histogram
    if positives.sum() <= 0 or negatives.sum() <= 0:
        return None
    false_rate = np.concatenate([[0.0], np.cumsum(negatives[::-1]) / negatives.sum()])
    true_rate = np.concatenate([[0.0], np.cumsum(positives[::-1]) / positives.sum()])
    return false_rate, true_rate


def auroc(histogram: FloatArray) -> float | None:
    """Area under the ROC curve; a tie within a bin counts one half (Mann-Whitney)."""
    curve = roc_curve(histogram)
    return None if curve is None else float(np.clip(np.trapezoid(curve[1], curve[0]), 0, 1))


def average_precision(histogram: FloatArray) -> float | None:
    """Area under the precision-recall curve as a step function (as scikit-learn's)."""
    negatives, positives = histogram
    if positives.sum() <= 0:
        return None
    true_positives = np.cumsum(positives[::-1])
    predicted = true_positives + np.cumsum(negatives[::-1])
    precision = np.clip(np.divide(true_positives, predicted, out=np.zeros_like(predicted), where=predicted > 0), 0, 1)
    return float((precision * positives[::-1]).sum() / positives.sum())


def binary_accuracy(histogram: FloatArray) -> float | None:
    """Share of patients on the right side of score 0.5."""
    total = histogram.sum()
    right = histogram[0, : NUM_BINS // 2].sum() + histogram[1, NUM_BINS // 2 :].sum()
    return float(right / total) if total > 0 else None


def brier_score(histogram: FloatArray) -> float | None:
    """Mean squared error of the scores, each taken at the middle of its bin (error below 0.012)."""
    total = histogram.sum()
    return float((histogram[0] * _BIN_SCORES**2 + histogram[1] * (1 - _BIN_SCORES) ** 2).sum() / total) if total > 0 else None


def calibration_curve(histogram: FloatArray) -> list[tuple[float, float, float]]:
    """(mean score, observed rate, patients) of each of ten equal groups of score that has patients."""
    counts = histogram.sum(axis=0)
    patients, scores, positives = (
        np.bincount(_GROUP_OF_BIN, weights=weights, minlength=CALIBRATION_GROUPS) for weights in (counts, counts * _BIN_SCORES, histogram[1])
    )
    present = np.flatnonzero(patients > 0)
    score, rate = np.clip(scores[present] / patients[present], 0, 1), np.clip(positives[present] / patients[present], 0, 1)
    return [(float(a), float(b), float(c)) for a, b, c in zip(score, rate, patients[present], strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskBand:
    """Patients whose score is from `low` to under `high`: how many, their mean score (0 of none), and how many are positive."""

    low: float
    high: float
    patients: float
    mean: float
    positives: float


def risk_bands(histogram: FloatArray) -> list[RiskBand]:
    """Patients by bands of risk, with `RISK_EDGES` between them; a score counts as the middle of its bin."""
    edges = (0.0, *RISK_EDGES, 1.0)
    band = np.searchsorted(RISK_EDGES, _BIN_SCORES, side="right")
    counts = histogram.sum(axis=0)
    patients, scores, positives = (
        np.bincount(band, weights=weights, minlength=len(edges) - 1) for weights in (counts, counts * _BIN_SCORES, histogram[1])
    )
    return [
        RiskBand(low=low, high=high, patients=float(number), mean=float(total / number) if number > 0 else 0.0, positives=float(positive))
        for low, high, number, total, positive in zip(edges[:-1], edges[1:], patients, scores, positives, strict=True)
    ]


def calibration_error(histogram: FloatArray) -> float | None:
    """Expected calibration error over ten equal groups of score."""
    points = calibration_curve(histogram)
    total = sum(count for _, _, count in points)
    return sum(abs(score - rate) * count for score, rate, count in points) / total if total > 0 else None


SCORE_HISTOGRAM = Statistic(name="score_histogram", shape=(2, NUM_BINS), summarise=score_histogram, noised_widths=NOISED_WIDTHS, cells=score_cells)
BINARY_METRICS = (
    Metric(name="auroc", statistic=SCORE_HISTOGRAM, finish=auroc, low=0, high=1),
    Metric(name="accuracy", statistic=SCORE_HISTOGRAM, finish=binary_accuracy, low=0, high=1),
    Metric(name="auprc", statistic=SCORE_HISTOGRAM, finish=average_precision, low=0, high=1),
    Metric(name="brier", statistic=SCORE_HISTOGRAM, finish=brier_score, higher_is_better=False, low=0, high=1),
    Metric(name="calibration_error", statistic=SCORE_HISTOGRAM, finish=calibration_error, higher_is_better=False, low=0, high=1),
)


# Several classes: a confusion matrix --------------------------------------------------------------------------------------------


def confusion_metrics(num_classes: int) -> tuple[Metric, ...]:
    """Accuracy and macro F1 over K classes, from a `(K, K)` confusion matrix (row: true class, column: highest score)."""

    def summarise(scores: FloatArray, cohort: Cohort) -> FloatArray:
        counts = np.bincount(cells(scores, cohort.labels), weights=cohort.record_weights(), minlength=num_classes**2)
        return np.asarray(counts, dtype=np.float64).reshape(num_classes, num_classes)

    def cells(scores: FloatArray, labels: NDArray[np.generic]) -> NDArray[np.int64]:
        predicted = np.nan_to_num(scores, nan=0.0).argmax(axis=1)
        return np.asarray(labels.astype(np.int64).reshape(-1) * num_classes + predicted)

    statistic = Statistic(name="confusion", shape=(num_classes, num_classes), summarise=summarise, cells=cells)
    return (
        Metric(name="accuracy", statistic=statistic, finish=confusion_accuracy, low=0, high=1),
        Metric(name="macro_f1", statistic=statistic, finish=macro_f1, low=0, high=1),
    )


def confusion_accuracy(matrix: FloatArray) -> float | None:
    """Share on the diagonal."""
    counted = matrix.sum()
    return float(matrix.trace() / counted) if counted > 0 else None


def macro_f1(matrix: FloatArray) -> float | None:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    counts = zip(matrix.diagonal().tolist(), matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist(), strict=True)
    f1 = [min(max(2 * hits / max(of_class + given, 1e-12), 0.0), 1.0) for hits, of_class, given in counts if of_class > 0]
    return sum(f1) / len(f1) if f1 else None


# A number: clipped error sums ---------------------------------------------------------------------------------------------------


def error_metrics(low: float, high: float) -> tuple[Metric, ...]:
    """MAE, RMSE and R2 of a number with declared range [low, high], in its own unit.

    Values are clipped to the range and scaled to [0, 1], so each entry of the sum (patients, absolute error, squared error, label,
    squared label) moves by at most 1 and the L2 sensitivity is sqrt(5).
    """
    span = high - low

    def summarise(predictions: FloatArray, cohort: Cohort) -> FloatArray:
        predicted = (np.clip(np.nan_to_num(predictions.reshape(-1), nan=low), low, high) - low) / span
        label = (np.clip(cohort.labels.astype(np.float64).reshape(-1), low, high) - low) / span
        error = np.abs(predicted - label)
        terms = np.stack([np.ones_like(label), error, error**2, label, label**2])
        return np.asarray(terms @ cohort.record_weights())

    statistic = Statistic(name="errors", shape=(5,), summarise=summarise, sensitivity=5**0.5, is_counts=False, agrees=_errors_agree)
    return (
        Metric(name="mae", statistic=statistic, finish=lambda sums: _ratio(sums[1] * span, sums[0]), higher_is_better=False, low=0, high=span),
        Metric(name="rmse", statistic=statistic, finish=lambda sums: _root(_ratio(sums[2], sums[0]), span), higher_is_better=False, low=0, high=span),
        Metric(name="r2", statistic=statistic, finish=_r2, high=1),
    )


def _errors_agree(sums: FloatArray) -> bool:
    """Whether sums of 1, x, x^2, y, y^2 over patients are of x and y in [0, 1]: squares are smaller, and not smaller than of equal parts."""
    count, *parts = sums
    slack = ROUNDING * max(count, 1.0)
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    return all(square <= value + slack and value <= count + slack and value**2 <= (count + slack) * (square + slack) for value, square in pairs)


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator > 0 else None


def _root(value: float | None, scale: float) -> float | None:
    return None if value is None else float(max(value, 0.0) ** 0.5 * scale)


def _r2(sums: FloatArray) -> float | None:
    count, _, squared_error, label, squared_label = sums
    spread = squared_label - label**2 / count if count > 0 else 0.0
    return float(1 - squared_error / spread) if spread > 1e-12 else None
