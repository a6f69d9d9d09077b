"""The figures: learning curves, epsilon by round, ROC, calibration, and the small strips that stand in tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from shared.metrics import auroc, calibration_curve, calibration_error, roc_curve
from shared.results import Interval
from wardround.report.history import Curve, epsilon_by_round, fold_curves, site_curves
from wardround.report.run_files import RunFiles
from wardround.report.svg import Axis, dot, element, join, nice_axis, path, percent, plot, share_axis, stretched
from wardround.report.wording import higher_is_better, interval_text, metric_title, number, source_title, upper_bound

NUM_COLOURS = 6  # more lines than that are grey, and the best and the worst are named
LEAST_POINTS = 2  # of a curve; one value is in the summary
MOST_POINTS = 60  # above, the pooled line has no points of its own

Point = tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One line of a legend: the class that draws it, and its name."""

    css: str
    text: str


MIN_GROUP_PATIENTS = 4  # an observed rate of one to three patients is a coin, not a rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing with its legend."""

    svg: Markup
    keys: tuple[Key, ...]


def learning_chart(run: RunFiles) -> Figure | None:
    """The primary metric by model round: all sites together in bold, each site thin; None where fewer than two rounds have a value."""
    metric = run.result.primary_metric
    pooled, sites = fold_curves(run), site_curves(run)
    if all(len(curve.values()) < LEAST_POINTS for curve in pooled):
        return None
    spread = [value for curve in (*pooled, *sites) for value in curve.values()]
    spread += [end for curve in pooled for _, _, interval in curve.points if interval for end in interval]
    x = nice_axis("Rounds of training", 0, max(curve.last_x() for curve in pooled), num_ticks=6, whole=True)
    y = nice_axis(metric_title(metric), min(spread), max(spread))
    if len(pooled) > 1:
        styles = _styles([curve.name for curve in pooled], named=())
        layers, keys = [_lines(pooled, styles, x, y)], _keys(pooled, styles)
    else:
        best, worst = _extremes(sites, higher=higher_is_better(run.result, metric))
        styles = _styles([curve.name for curve in sites], named=(best, worst))
        layers = [_band(pooled[0], x, y), _lines(sites, styles, x, y), _pooled_line(pooled[0], x, y)]
        keys = (Key(css="all", text=f"All sites together {number(pooled[0].last_value())}"), *_keys(sites, styles))
    label = f"Line chart of {metric_title(metric)} by round of training; it ends at {number(pooled[0].last_value())}."
    return Figure(svg=plot(x, y, layers, label=label), keys=keys)


def epsilon_chart(run: RunFiles) -> Figure | None:
    """Epsilon spent after each round, a line a site, and the budget; None where nothing was charged."""
    curves = epsilon_by_round(run)
    if not any(curve.values() for curve in curves):
        return None
    budget = run.study.privacy.epsilon
    highest = max(value for curve in curves for value in curve.values())
    x = nice_axis(
        "Round" if run.study.evaluation.folds == 1 else "Round, over all folds", 0, max(curve.last_x() for curve in curves), num_ticks=6, whole=True
    )
    y = nice_axis("Epsilon spent", 0, max(highest, budget or 0))
    most = max(curves, key=lambda curve: curve.last_value() or 0).name
    styles = _styles([curve.name for curve in curves], named=(most,))
    layers = [_lines(curves, styles, x, y)]
    if budget is not None:
        height = percent(1 - y.fraction(budget))
        layers.append(element("line", class_="budget", x1="0", x2="100%", y1=height, y2=height))
        layers.append(element("text", f"budget {upper_bound(budget)}", class_="budget-label", x="100%", y=height, dy="-7", text_anchor="end"))
    keys = _keys(curves, styles, text=upper_bound, best="most spent")
    of_budget = f" of a budget of {upper_bound(budget)}" if budget is not None else ""
    label = f"Line chart of epsilon spent by round and site; the highest is {upper_bound(highest)}{of_budget}."
    return Figure(svg=plot(x, y, layers, label=label), keys=keys)


def roc_chart(histograms: dict[str, NDArray[np.float64]], title: Callable[[str], str] = source_title) -> Figure | None:
    """ROC curves by source, called by `title`, the first one in bold; None where no source has both classes."""
    x, y = share_axis("False positive rate (1 − specificity)"), share_axis("True positive rate (sensitivity)")
    paths, keys = [], []
    for source, histogram in histograms.items():
        curve = roc_curve(histogram)
        if curve is not None:
            text = f"{title(source)} {number(auroc(histogram))}"
            paths.append(path(list(zip(*curve, strict=True)), css=f"line {source_css(source)}", title=f"{text} (AUROC)"))
            keys.append(Key(css=source_css(source), text=text))
    if not paths:
        return None
    chance = path([(0, 0), (1, 1)], css="chance")
    label = "ROC curves. AUROC: " + "; ".join(key.text for key in keys) + "."
    return Figure(svg=plot(x, y, [stretched([chance, *reversed(paths)])], label=label, css="square"), keys=tuple(keys))


def calibration_chart(histograms: dict[str, NDArray[np.float64]], title: Callable[[str], str] = source_title) -> Figure | None:
    """Observed rate by mean score in ten groups of score, points by number of patients; groups of a few are left out, and None without any."""
    x, y = share_axis("Predicted probability, mean of the group"), share_axis("Observed rate")
    paths, dots, keys = [], [], []
    for source, histogram in histograms.items():
        points = [point for point in calibration_curve(histogram) if point[2] >= MIN_GROUP_PATIENTS]
        if not points:
            continue
        text = f"{title(source)} {number(calibration_error(histogram))}"
        keys.append(Key(css=source_css(source), text=text))
        paths.append(path([(score, rate) for score, rate, _ in points], css=f"line {source_css(source)}", title=f"{text} (calibration error)"))
        if source == "federated":
            dots = [_calibration_dot(point, points) for point in points]
    if not paths:
        return None
    ideal = path([(0, 0), (1, 1)], css="chance")
    label = "Calibration plot. Expected calibration error: " + "; ".join(key.text for key in keys) + "."
    return Figure(svg=plot(x, y, [stretched([ideal, *reversed(paths)]), join(dots)], label=label, css="square"), keys=tuple(keys))


def _calibration_dot(point: tuple[float, float, float], points: Sequence[tuple[float, float, float]]) -> Markup:
    score, rate, patients = point
    radius = 3 + 5 * (patients / max(count for _, _, count in points)) ** 0.5
    title = f"predicted {number(score)}, observed {number(rate)}, {patients:,.0f} patients"
    return dot(score, rate, css="dot federated", radius=round(radius, 1), title=title)


def source_css(source: str) -> str:
    """The class that colours a source alike in every figure and table."""
    known = ("federated", "pooled", "pooled_private", "local_only", "local_only_private")
    return source.replace("_", "-") if source in known else "other"


# In tables ----------------------------------------------------------------------------------------------------------------------


def strip_axis(values: Sequence[float]) -> Axis | None:
    """The axis that all strips of a column share; None without a value."""
    return nice_axis("", min(values), max(values), num_ticks=4) if values else None


def interval_strip(axis: Axis, value: float | None, interval: Interval, *, css: str = "federated") -> Markup:
    """A point with its interval on a line, for a cell of a table."""
    parts = _strip_grid(axis)
    if value is not None and interval is not None:
        low, high = (percent(axis.fraction(end)) for end in interval)
        parts.append(element("line", class_=f"whisker {css}", x1=low, x2=high, y1="50%", y2="50%"))
    if value is not None:
        parts.append(dot(axis.fraction(value), 0.5, css=f"dot {css}", radius=4.5, title=f"{number(value)} {interval_text(interval)}".strip()))
    return element("svg", *parts, class_="strip", aria_hidden="true")


def change_strip(axis: Axis, before: float | None, after: float | None) -> Markup:
    """Two points, before (hollow) and after (filled), joined."""
    parts = _strip_grid(axis)
    if before is not None and after is not None:
        x1, x2 = percent(axis.fraction(before)), percent(axis.fraction(after))
        parts.append(element("line", class_="whisker change", x1=x1, x2=x2, y1="50%", y2="50%"))
    if before is not None:
        parts.append(dot(axis.fraction(before), 0.5, css="dot local-only", radius=4.5, title=f"alone {number(before)}"))
    if after is not None:
        parts.append(dot(axis.fraction(after), 0.5, css="dot federated", radius=4.5, title=f"federated {number(after)}"))
    return element("svg", *parts, class_="strip", aria_hidden="true")


def _strip_grid(axis: Axis) -> list[Markup]:
    return [element("line", class_="grid", x1=percent(axis.fraction(v)), x2=percent(axis.fraction(v)), y1="0", y2="100%") for v, _ in axis.ticks]


def strip_scale(axis: Axis) -> Markup:
    """The numbers of a column of strips, for its head; every other one where they would crowd."""
    ticks = axis.ticks[:: 1 if len(axis.ticks) <= 4 else 2]
    labels = [element("text", text, class_="tick", x=percent(axis.fraction(value)), y="75%", text_anchor="middle") for value, text in ticks]
    return element("svg", *labels, class_="strip scale", aria_hidden="true")


def share_bar(parts: Sequence[tuple[str, float]], *, whole: float) -> Markup:
    """A stacked bar of (title, amount); `whole` is the amount at full width."""
    drawn, start = [], 0.0
    for index, (title, amount) in enumerate(parts):
        width = amount / whole if whole > 0 else 0.0
        css = f"segment c{index % NUM_COLOURS + 1}"
        drawn.append(_block(start, width, css=css, title=f"{title}: {amount:,.0f}"))
        start += width
    return element("svg", *drawn, class_="bar", aria_hidden="true")


def status_strip(statuses: Sequence[tuple[str, str]]) -> Markup:
    """One cell a round: (title, status)."""
    width = 1 / max(1, len(statuses))
    filled = width * (0.92 if len(statuses) <= MOST_POINTS / 2 else 1)  # gaps between cells, where there is room for them
    cells = [_block(index * width, filled, css=f"cell {status.replace(' ', '-')}", title=title) for index, (title, status) in enumerate(statuses)]
    return element("svg", *cells, class_="statuses", aria_hidden="true")


def _block(start: float, width: float, *, css: str, title: str) -> Markup:
    return element("rect", element("title", title), class_=css, x=percent(start), y="0", width=percent(width), height="100%")


# Lines --------------------------------------------------------------------------------------------------------------------------


def _styles(names: Sequence[str], *, named: tuple[str, ...]) -> dict[str, str]:
    """A class by name: a colour each where they are few, else grey, with the best and the worst picked out."""
    if len(names) <= NUM_COLOURS:
        return {name: f"c{index + 1}" for index, name in enumerate(names)}
    picked = dict(zip(named, ("best", "worst"), strict=False))
    return {name: picked.get(name, "muted") for name in names}


def _keys(curves: Sequence[Curve], styles: dict[str, str], *, text: Callable[[float | None], str] = number, best: str = "best") -> tuple[Key, ...]:
    named = [curve for curve in curves if styles[curve.name] != "muted"]
    words = {"best": f"{best}: ", "worst": "worst: "}
    keys = [Key(css=styles[c.name], text=f"{words.get(styles[c.name], '')}{c.name} {text(c.last_value())}") for c in named]
    if len(named) < len(curves):
        keys.append(Key(css="muted", text=f"{len(curves) - len(named)} other {'folds' if curves[0].is_fold else 'sites'}"))
    return tuple(keys)


def _extremes(curves: Sequence[Curve], *, higher: bool) -> tuple[str, str]:
    known = sorted((value, curve.name) for curve in curves if (value := curve.last_value()) is not None)
    if len(known) < 2:
        return "", ""
    low, high = known[0][1], known[-1][1]
    return (high, low) if higher else (low, high)


def _places(curve: Curve, x: Axis, y: Axis) -> list[Point]:
    return [None if value is None else (x.fraction(at), y.fraction(value)) for at, value, _ in curve.points]


def _lines(curves: Sequence[Curve], styles: dict[str, str], x: Axis, y: Axis) -> Markup:
    """Thin lines, the grey ones first; a value between two gaps is a point, for a line cannot show it."""
    ordered = sorted(curves, key=lambda curve: styles[curve.name] != "muted")
    paths, dots = [], []
    for curve in ordered:
        places, title = _places(curve, x, y), f"{curve.name} {number(curve.last_value())}"
        paths.append(path(places, css=f"line site {styles[curve.name]}", title=title))
        dots += [dot(*place, css=f"dot {styles[curve.name]}", radius=2, title=title) for place in _lonely(places)]
    return join([stretched(paths), *dots])


def _lonely(places: Sequence[Point]) -> list[tuple[float, float]]:
    padded = [None, *places, None]
    return [place for before, place, after in zip(padded, padded[1:], padded[2:], strict=False) if place and before is None and after is None]


def _band(curve: Curve, x: Axis, y: Axis) -> Markup:
    """The 95 % interval of the pooled metric as an area; it is broken where a round has none."""
    areas: list[list[tuple[float, float, float]]] = [[]]
    for at, _, interval in curve.points:
        if interval is None:
            areas.append([])
        else:
            areas[-1].append((x.fraction(at), y.fraction(interval[0]), y.fraction(interval[1])))
    drawn = [
        path([*((at, high) for at, _, high in area), *((at, low) for at, low, _ in reversed(area))], css="band", closed=True)
        for area in areas
        if len(area) > 1
    ]
    return stretched(drawn)


def _pooled_line(curve: Curve, x: Axis, y: Axis) -> Markup:
    paths = stretched([path(_places(curve, x, y), css="line all")])
    radius = 3.5 if len(curve.points) <= MOST_POINTS else 6
    css = "dot all" if len(curve.points) <= MOST_POINTS else "dot unseen"
    dots = [
        dot(x.fraction(at), y.fraction(value), css=css, radius=radius, title=f"after round {at}: {number(value)} {interval_text(interval)}".strip())
        for at, value, interval in curve.points
        if value is not None
    ]
    return join([paths, *dots, _end_label(curve, x, y)])


def _end_label(curve: Curve, x: Axis, y: Axis) -> Markup:
    known = [(at, value) for at, value, _ in curve.points if value is not None]
    if not known:
        return Markup("")
    at, value = known[-1]
    return element("text", number(value), class_="end-label", x=percent(x.fraction(at)), y=percent(1 - y.fraction(value)), dx="8", dy="0.32em")
