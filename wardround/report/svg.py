"""Inline SVG that is as wide as its box while text and points keep their size.

A plot's own viewport is the area between the axes; labels stand outside it (`overflow: visible`, margins by the style sheet). Points,
bars and labels are placed in per cent; paths live in a nested SVG of 1000 x 1000 units that is stretched, with strokes that do not scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

UNITS = 1000  # of the nested SVG, each way


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear axis from `low` to `high`, with the ticks that are drawn."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()

    def fraction(self, value: float) -> float:
        """Where `value` stands between the ends, in [0, 1]."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def nice_axis(title: str, low: float, high: float, *, num_ticks: int = 5, whole: bool = False) -> Axis:
    """An axis that covers `low` to `high`, with ticks at round numbers; `whole` keeps the ends and ticks at integers."""
    span = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0  # what differs by rounding alone is one value
    step = _round_step(span / num_ticks)
    if whole:
        step = max(1.0, math.ceil(step))
        first, last = low, max(high, low + 1)
    else:
        first, last = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        last = last if last > first else first + step
    begin, end = math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((index * step, f"{index * step:.{decimals}f}") for index in range(begin, end + 1))
    return Axis(title=title, low=first, high=last, ticks=ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def share_axis(title: str) -> Axis:
    """0 to 1 in quarters."""
    return Axis(title=title, low=0.0, high=1.0, ticks=((0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1")))


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """`<tag ...>children</tag>`, escaped but for `Markup`; `text_anchor` is written text-anchor, None is left out.

    >>> element("text", "a < b", text_anchor="end")
    Markup('<text text-anchor="end">a &lt; b</text>')
    """
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items() if value is not None)
    return Markup(f"<{tag}{written}>{''.join(escape(child) for child in children)}</{tag}>")


def join(parts: Sequence[Markup]) -> Markup:
    """The parts one after the other."""
    return Markup("").join(parts)


def percent(fraction: float) -> str:
    """0.5 is "50%"."""
    return f"{round(fraction * 100, 2):g}%"


def path_data(points: Sequence[tuple[float, float] | None]) -> str:
    """The path through fractions (x right, y up); None leaves a gap. Points that fall together are written once."""
    written, pen_down, previous = [], False, (-1, -1)
    for point in points:
        if point is None:
            pen_down = False
            continue
        place = (round(point[0] * UNITS), round((1 - point[1]) * UNITS))
        if not pen_down or place != previous:
            written.append(f"{'L' if pen_down else 'M'}{place[0]} {place[1]}")
        pen_down, previous = True, place
    return "".join(written)


def path(points: Sequence[tuple[float, float] | None], *, css: str, title: str = "", closed: bool = False) -> Markup:
    """A line, or a filled area where `closed`."""
    children = [element("title", title)] if title else []
    return element("path", *children, class_=css, d=path_data(points) + ("Z" if closed else ""), vector_effect="non-scaling-stroke")


def stretched(paths: Sequence[Markup]) -> Markup:
    """The nested SVG for paths."""
    return element(
        "svg", *paths, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%", overflow="visible", class_="paths"
    )


def dot(x: float, y: float, *, css: str, radius: float = 3, title: str = "") -> Markup:
    """A point at fractions (x right, y up)."""
    children = [element("title", title)] if title else []
    return element("circle", *children, class_=css, cx=percent(x), cy=percent(1 - y), r=radius)


def plot(x: Axis, y: Axis, layers: Sequence[Markup], *, label: str, css: str = "") -> Markup:
    """Axes, grid and `layers`; `label` tells in a sentence what is to be seen."""
    grid = [element("line", class_="grid", x1="0", x2="100%", y1=percent(1 - y.fraction(v)), y2=percent(1 - y.fraction(v))) for v, _ in y.ticks]
    across = [
        element("text", text, class_="tick", x=percent(x.fraction(value)), y="100%", dy="1.5em", text_anchor="middle") for value, text in x.ticks
    ]
    up = [
        element("text", text, class_="tick", x="0", y=percent(1 - y.fraction(value)), dx="-8", dy="0.32em", text_anchor="end")
        for value, text in y.ticks
    ]
    baseline = element("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%")
    titles = [
        element("text", x.title, class_="axis-title", x="50%", y="100%", dy="3em", text_anchor="middle"),
        element("text", y.title, class_="axis-title", x="0", y="0", dx="-36", dy="-14", text_anchor="start"),
    ]
    return element("svg", *grid, baseline, *across, *up, *titles, *layers, class_=f"plot {css}".strip(), role="img", aria_label=label)
