"""The figures of a sweep: what a setting does to utility, how epsilon is spent by round, and the noise that a budget needs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from simulations.sweeps.cell import CellResult
from wardround.report.charts import NUM_COLOURS, Figure, Key, source_css
from wardround.report.svg import Axis, dot, element, join, nice_axis, path, percent, plot, stretched
from wardround.report.wording import compact, interval_text, number, short_setting, source_title, upper_bound
from wardround.sweeping import Row

LOGARITHMIC = ("privacy.epsilon", "privacy.noise_multiplier", "federation.alpha", "federation.sites", "training.learning_rate", "training.batch_size")
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Means by x with their intervals; `across` is a level that does not depend on x."""

    name: str
    css: str
    points: tuple[tuple[float, float, tuple[float, float] | None], ...]
    across: bool = False

    def values(self) -> list[float]:
        """Everything that the y axis must hold."""
        return [end for _, mean, interval in self.points for end in (mean, *(interval or ()))]


def utility_chart(rows: Sequence[Row], setting: str, *, metric: str, title: str) -> Figure | None:
    """The primary metric by `setting`, mean and 95 % interval over the seeds; None where it has fewer than two values.

    Where nothing else varies there is a line for each source; else a line for each combination of the others, of the federated model.
    """
    lines = utility_lines(rows, setting)
    xs = sorted({x for line in lines if not line.across for x, _, _ in line.points})
    if len(xs) < 2:
        return None
    x, place = value_axis(title, xs, logarithmic=setting in LOGARITHMIC and xs[0] > 0)
    spread = [value for line in lines for value in line.values()]
    y = nice_axis(metric, min(spread), max(spread))
    layers = [_level(line, y) for line in lines if line.across]
    layers += [_line(line, place, y) for line in lines if not line.across]
    keys = tuple(Key(css=line.css, text=f"{line.name}, {number(line.points[0][1])}" if line.across else line.name) for line in lines)
    return Figure(svg=plot(x, y, layers, label=f"Line chart of {metric} by {title}, mean over seeds."), keys=keys)


def utility_lines(rows: Sequence[Row], setting: str) -> list[Line]:
    """The lines of `utility_chart`."""
    others = [name for name in rows[0].settings if name != setting]
    numeric = [row for row in rows if _is_number(row.settings[setting])]
    if others:
        return _of_combinations(numeric, setting, others)
    sources = dict.fromkeys(source for row in numeric for source in row.values)
    lines = [_by_setting(numeric, setting, source, name=source_title(source), css=source_css(source)) for source in sources]
    for row in rows:
        if row.settings[setting] == NONE:
            lines += [
                Line(name=f"{source_title(source)}, no privacy", css=f"{source_css(source)} level", points=((0.0, mean, None),), across=True)
                for source in row.values
                if (mean := row.mean(source)) is not None
            ]
    return lines


def _of_combinations(rows: Sequence[Row], setting: str, others: Sequence[str]) -> list[Line]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(", ".join(f"{short_setting(name)} {_text(row.settings[name])}" for name in others), []).append(row)
    styles = [f"c{index + 1}" if len(grouped) <= NUM_COLOURS else "muted" for index in range(len(grouped))]
    return [_by_setting(found, setting, "federated", name=name, css=css) for (name, found), css in zip(grouped.items(), styles, strict=True)]


def _by_setting(rows: Sequence[Row], setting: str, source: str, *, name: str, css: str) -> Line:
    points = [(float(str(row.settings[setting])), mean, row.interval(source)) for row in rows if (mean := row.mean(source)) is not None]
    return Line(name=name, css=css, points=tuple(sorted(points, key=lambda point: point[0])))


def burn_down_chart(results: Sequence[CellResult]) -> Figure | None:
    """Epsilon spent by round at the site that spent most, a line a budget: the runs of a budget differ in nothing that is accounted but sizes."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        budget = result.study.get("privacy.epsilon", result.study.get("privacy.noise_multiplier"))
        points = [(float(round_.round), round_.epsilon) for round_ in result.rounds if round_.epsilon is not None]
        if budget is not None and points:
            known = curves.setdefault(_text(budget), points)
            if points[-1][1] > known[-1][1]:
                curves[_text(budget)] = points
    if not curves:
        return None
    x = nice_axis("Round", 0, max(points[-1][0] for points in curves.values()), num_ticks=6, whole=True)
    y = nice_axis("Epsilon spent", 0, max(points[-1][1] for points in curves.values()))
    drawn, keys = [], []
    for index, (budget, points) in enumerate(curves.items()):
        css = f"c{index % NUM_COLOURS + 1}"
        drawn.append(path([(x.fraction(at), y.fraction(spent)) for at, spent in [(0.0, 0.0), *points]], css=f"line {css}", title=f"budget {budget}"))
        keys.append(Key(css=css, text=f"budget {budget}: {upper_bound(points[-1][1])}"))
    return Figure(svg=plot(x, y, [stretched(drawn)], label="Line chart of epsilon spent by round, a line a budget."), keys=tuple(keys))


def noise_chart(results: Sequence[CellResult], setting: str, *, title: str) -> Figure | None:
    """The noise multiplier that a budget needs, by `setting`, at the site that needs most; a line for each combination of what else decides it."""
    curves: dict[str, dict[float, float]] = {}
    for result in results:
        value = result.settings.get(setting)
        if result.privacy is None or not result.privacy.sites or not _is_number(value):
            continue
        others = [
            f"{name.rpartition('.')[2]} {_text(result.settings[name])}" for name in result.settings if name not in (setting, "seed", "strategy.name")
        ]
        noise = max(site.noise_multiplier for site in result.privacy.sites.values())
        curve = curves.setdefault(", ".join(others) or "noise multiplier", {})
        at = float(str(value))
        curve[at] = max(noise, curve.get(at, 0.0))
    xs = sorted({at for curve in curves.values() for at in curve})
    if len(xs) < 2:
        return None
    x, place = value_axis(title, xs, logarithmic=setting in LOGARITHMIC and xs[0] > 0)
    y = nice_axis("Noise multiplier", 0, max(noise for curve in curves.values() for noise in curve.values()))
    styles = [f"c{index + 1}" if len(curves) <= NUM_COLOURS else "muted" for index in range(len(curves))]
    lines = [
        Line(name=name, css=css, points=tuple((at, noise, None) for at, noise in sorted(curve.items())))
        for (name, curve), css in zip(curves.items(), styles, strict=True)
    ]
    label = f"Line chart of the noise multiplier by {title}."
    return Figure(
        svg=plot(x, y, [_line(line, place, y) for line in lines], label=label), keys=tuple(Key(css=line.css, text=line.name) for line in lines)
    )


def value_axis(title: str, xs: Sequence[float], *, logarithmic: bool) -> tuple[Axis, Callable[[float], float]]:
    """An axis with a tick at every value that was run, and where on it a value stands, in [0, 1]."""
    scale: Callable[[float], float] = math.log if logarithmic else float
    low, high = scale(xs[0]), scale(xs[-1])
    margin = 0.04 * (high - low)
    ticks = tuple((scale(x), compact(x)) for x in xs) if len(xs) <= 12 else tuple((scale(x), compact(x)) for x in xs[:: math.ceil(len(xs) / 10)])
    axis = Axis(title=title, low=low - margin, high=high + margin, ticks=ticks)
    return axis, lambda value: axis.fraction(scale(value))


def _line(line: Line, place: Callable[[float], float], y: Axis) -> Markup:
    drawn = [stretched([path([(place(x), y.fraction(mean)) for x, mean, _ in line.points], css=f"line {line.css}", title=line.name)])]
    for x, mean, interval in line.points:
        if interval is not None:
            ends = (percent(1 - y.fraction(end)) for end in interval)
            drawn.append(element("line", class_=f"whisker thin {line.css}", x1=percent(place(x)), x2=percent(place(x)), y1=next(ends), y2=next(ends)))
        drawn.append(
            dot(place(x), y.fraction(mean), css=f"dot {line.css}", radius=4, title=f"{line.name}: {number(mean)} {interval_text(interval)}".strip())
        )
    return join(drawn)


def _level(line: Line, y: Axis) -> Markup:
    height = y.fraction(line.points[0][1])
    return stretched([path([(0, height), (1, height)], css=f"line {line.css}", title=f"{line.name}: {number(line.points[0][1])}")])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    return compact(float(str(value))) if _is_number(value) else str(value)
