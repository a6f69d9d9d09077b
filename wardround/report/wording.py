"""How numbers and names are written in the report: never NaN, one style everywhere."""

import math
from collections.abc import Iterable, Sequence

from shared.metrics import BINARY_METRICS, error_metrics
from shared.results import Interval, Result

DASH = "–"
ONE_CLASS = "n/a (one class)"
MINUS = "−"

_METRIC_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "Accuracy",
    "brier": "Brier score",
    "calibration_error": "Calibration error",
    "macro_f1": "Macro F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "c_index": "C-index",
    "td_error": "TD error",
    "outlier_auroc": "Outlier AUROC",
    "entity_f1": "Entity F1",
    "relation_f1": "Relation F1",
}
_LOWER_IS_BETTER = {  # in results of older versions, which do not say
    metric.name for metric in (*BINARY_METRICS, *error_metrics(0, 1)) if not metric.higher_is_better
}
_NEEDS_TWO_CLASSES = {"auroc", "auprc"}

SOURCE_TITLES = {
    "federated": "Federated",
    "local_only": "One site alone",
    "local_only_private": "One site alone, private",
    "pooled": "All data in one place",
    "pooled_private": "All data in one place, private",
}
SOURCE_ORDER = tuple(SOURCE_TITLES)


def metric_title(name: str) -> str:
    """The metric's usual name: "auroc" is AUROC."""
    return _METRIC_TITLES.get(name) or humanise(name)


def source_title(name: str) -> str:
    """What was trained, in words."""
    return SOURCE_TITLES.get(name) or humanise(name)


def ordered_sources(names: Iterable[str]) -> list[str]:
    """Federated first, then the known baselines, then others by name."""
    return sorted(names, key=lambda name: (SOURCE_ORDER.index(name) if name in SOURCE_ORDER else len(SOURCE_ORDER), name))


def short_setting(key: str) -> str:
    """A setting as in a sweep's file: "training.batch_size" is batch_size, and "strategy.name" strategy."""
    table, _, last = key.rpartition(".")
    return table if table and last == "name" else last


def humanise(name: str) -> str:
    """A key as words: "values_imputed" is "Values imputed". A path or module keeps its spelling."""
    if any(mark in name for mark in "/:.\\"):
        return name
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


def higher_is_better(result: Result, metric: str) -> bool:
    """As the task declares it; False for errors that we know in a result of an older version, which does not say."""
    return result.higher_is_better.get(metric, metric not in _LOWER_IS_BETTER)


def needs_two_classes(metric: str) -> bool:
    """True where patients of one class alone leave the metric undefined."""
    return metric in _NEEDS_TWO_CLASSES


def finite(value: object) -> float | None:
    """`value` as a float, or None where it is no finite number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]  # a number, as just checked


def finite_interval(value: object) -> Interval:
    """Both ends of an interval, or None where it has none."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def number(value: float | None) -> str:
    """Three decimals near 1, fewer above: 0.868, 12.3, 1,240. An en dash for what there is not."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    decimals = 3 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def interval_text(interval: Interval) -> str:
    """[0.801, 0.892], or nothing."""
    return f"[{number(interval[0])}, {number(interval[1])}]" if interval else ""


def signed(value: float | None) -> str:
    """A difference with its sign: +0.031."""
    if value is None:
        return DASH
    return f"+{number(value)}" if round(value, 3) > 0 else number(value + 0.0 if round(value, 3) else 0.0)


def compact(value: float | None) -> str:
    """As many digits as tell something: 3, 2.99, 0.0001 as 1e-4. For epsilon, delta, sample rates."""
    if value is None or not math.isfinite(value):
        return DASH
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def upper_bound(value: float | None) -> str:
    """An upper bound with at most three decimals, rounded up, so that what is printed is still a bound."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = math.ceil(value * 1000 - 1e-9) / 1000
    return f"{rounded:,.3f}".rstrip("0").rstrip(".")


def lower_bound(value: float | None) -> str:
    """A lower bound with at most three decimals, rounded down, so that what is printed is still a bound."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = math.floor(value * 1000 + 1e-9) / 1000
    return f"{rounded:,.3f}".rstrip("0").rstrip(".")


def noise_sentence(evaluation_epsilon: float) -> str:
    """What noise in the evaluation statistics means for the metrics."""
    return (
        f"The sites’ statistics carry noise that protects their test patients (epsilon {upper_bound(evaluation_epsilon)}): "
        "the federation’s metrics can be far from the true ones where test patients are few. Their intervals are of that noise alone."
    )


def count(value: int | None) -> str:
    """A whole number with thin groups: 12,400."""
    return DASH if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 3 min 4 s, 2 h 5 min."""
    if not math.isfinite(seconds) or seconds < 0:
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(values: Sequence[int]) -> str:
    """Whole numbers as ranges: 1, 2, 3, 7 is "1–3, 7"."""
    groups: list[list[int]] = []
    for value in sorted(set(values)):
        if groups and value == groups[-1][1] + 1:
            groups[-1][1] = value
        else:
            groups.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}{DASH}{high}" for low, high in groups)
