"""The page of `wardround explain`, for the hospital alone: what a model looks at in its patients. No identifier of a patient is on it.

Legend: N patients, F features, T steps, V variables.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from shared.schema import TableSchema
from wardround.plural import plural
from wardround.report.charts import Figure, Key
from wardround.report.document import Block, Document, Drawing, Facts, Heading, Picture, Pictures, Prose, Section
from wardround.report.png import data_address
from wardround.report.summary import Banner
from wardround.report.svg import Axis, dot, element, nice_axis, path, percent, plot, stretched
from wardround.report.templates import fill_in

if TYPE_CHECKING:
    from wardround.explaining import Attributions, Part

FloatArray = NDArray[np.float64]

MOST_ROWS = 15  # of a drawing
MOST_STEPS = 96  # cells along time; longer series are put together
MOST_LETTERS = 30
MOST_TICK_LETTERS = 5
NUM_SHADES = 5
CHANGE, SIZE = "Change of the model's output", "Mean size of the change of the model's output"
DIMENSIONS = ("of the first axis", "of the second axis", "of the third axis")
STAYS = "It shows patients' data, one by one. It was made from files of this hospital, on this machine, and nothing of it was sent."
SYNTHETIC = Banner(title="SYNTHETIC patients.", text="Nothing here says anything about real ones.")
NO_CAUSE = (
    "What moved the model is not what made a patient ill. An attribution says what the model did with an input, beside a patient of whom nothing is "
    "known; it says nothing of what would happen if the input were changed."
)


def explanation_page(found: "Attributions", *, run: str) -> str:
    """The page as HTML."""
    return fill_in("explanation.html.j2", document=explanation_document(found, run=run))


def explanation_document(found: "Attributions", *, run: str) -> Document:
    """What the page says."""
    task, count = found.task, len(found.predictions)
    synthetic = found.cohort.synthetic
    banners = [SYNTHETIC if synthetic else Banner(title="This page is of patients. It must not leave the hospital.", text=STAYS)]
    if found.completeness_gap is not None and found.completeness_gap > 0.05:
        banners.append(Banner(title="The attributions do not add up.", text=_gap_sentence(found)))
    return Document(
        reader="researcher", eyebrow=f"what the model looks at{'' if synthetic else ', for the hospital alone'}", title="Explanation", subtitle=task.title, run=run,
        lead=f"What moves the model's output in {plural(count, 'patient')}, over all of them and in the one with the highest, the median and the lowest prediction.",
        banners=tuple(banners), sections=(_whole(found), *_singles(found), _method(found)), tags=(f"task {task.name}", plural(count, "patient")),
    )  # fmt: skip


def _method(found: "Attributions") -> Section:
    pairs = [(part.name, part.method) for part in found.parts]
    if found.completeness_gap is not None:
        pairs.append(("Adding up", _gap_sentence(found)))
    pairs.append(("What is explained", f"The model's output before it becomes a prediction: {found.words}."))
    sources = "Sundararajan, Taly and Yan 2017 (integrated gradients), Selvaraju et al. 2017 (Grad-CAM); captum."
    return Section(id="method", title="How it was made", blocks=(Prose(text=NO_CAUSE), Facts(pairs=tuple(pairs)), Prose(text=sources, css="note")))


def _gap_sentence(found: "Attributions") -> str:
    return (
        f"Over {found.num_steps} steps, the attributions of a patient add up to the difference from a patient of whom nothing is known, but for "
        f"{found.completeness_gap or 0:.2%} of the mean difference at most."
    )


# All patients ------------------------------------------------------------------------------------------------------------------------


def _whole(found: "Attributions") -> Section:
    """What matters over all patients, by input."""
    blocks = [block for part in found.parts for block in _whole_part(part, many=len(found.parts) > 1)]
    return Section(id="all", title="All patients together", blocks=tuple(blocks))


def _whole_part(part: "Part", *, many: bool) -> list[Block]:
    title = f"Input {part.name}: " if many else ""
    mean = np.abs(part.attributions).mean(axis=0)
    if part.kind == "table":
        return [Drawing(figure=swarm(part), title=_headed(title, "each patient a point"), note="Ordered by the mean size of what it moved.")]
    if part.kind == "series":
        by_variable = Drawing(
            figure=bars(part.names, mean.sum(axis=0), signed=False), title=_headed(title, "by variable"), note="Mean over patients, summed over time."
        )
        return [
            by_variable,
            Drawing(figure=_heat(mean, part.names, signed=False), title=_headed(title, "by variable and step"), note="Darker: moved more."),
        ]
    if part.kind == "signal":
        return [
            Drawing(
                figure=trace(part.values.astype(np.float64).mean(axis=0), mean, signed=False),
                title=_headed(title, "over time"),
                note="The mean trace; darker: moved more.",
            )
        ]
    if part.kind == "tokens":
        names, sizes = by_code(part)
        return [
            Drawing(
                figure=bars(names, sizes, signed=False),
                title=_headed(title, "by code"),
                note="Mean over patients of what was moved by all events of a code.",
            )
        ]
    return [Pictures(caption=_headed(title, "where the model looks, mean of all patients."), pictures=_mean_pictures(part))]


def _headed(head: str, words: str) -> str:
    return f"{head}{words}" if head else f"{words[0].upper()}{words[1:]}"


def by_code(part: "Part") -> tuple[tuple[str, ...], FloatArray]:
    """Each code, and how much it moved, as the mean over patients; 0 is no code."""
    sums: dict[str, float] = {}
    for codes, attributions in zip(part.values, part.attributions, strict=True):
        for code, value in zip(codes, attributions, strict=True):
            if (name := code_name(code)) != "none":
                sums[name] = sums.get(name, 0.0) + abs(float(value)) / len(part.values)
    return tuple(sums), np.array(list(sums.values()))


def code_name(code: NDArray[np.generic]) -> str:
    """The numbers of an event's code, or of each level of it; "none" where all are 0.

    >>> code_name(np.array([512, 7, 0]))
    'code 512/7'
    """
    numbers = [str(number) for number in np.atleast_1d(code).tolist() if number != 0]
    return f"code {'/'.join(numbers)}" if numbers else "none"


# Single patients ---------------------------------------------------------------------------------------------------------------------


def _singles(found: "Attributions") -> list[Section]:
    from wardround.explaining import singles

    return [
        Section(id=f"patient-{title}", title=f"The patient with the {title} prediction", blocks=tuple(_single(found, place)))
        for title, place in singles(found.ranked)
    ]


def _single(found: "Attributions", place: int) -> list[Block]:
    blocks: list[Block] = [Facts(pairs=tuple(_predicted(found, place)))]
    for part in found.parts:
        if len(found.parts) > 1:
            blocks.append(Heading(text=f"Input {part.name}"))
        blocks += _single_part(found, part, place)
    return blocks


def _predicted(found: "Attributions", place: int) -> list[tuple[str, str]]:
    from wardround.predicting import as_columns, column_names

    names = column_names(found.task, found.predictions.shape[1:])
    values = as_columns(found.predictions[place : place + 1])[0]
    pairs = [(name.replace("_", " "), f"{value:.3g}") for name, value in zip(names, values, strict=True)]
    if found.chosen is not None and found.predictions.ndim == 2 and len(pairs) > found.chosen[place]:
        pairs.append(("explained", pairs[int(found.chosen[place])][0]))
    return pairs


def _single_part(found: "Attributions", part: "Part", place: int) -> list[Block]:
    attributions = part.attributions[place]
    if part.kind in ("table", "tokens") and not attributions.any():
        return [Prose(text="Nothing in it moved the output.")]
    if part.kind == "table":
        names = [f"{name}: {_value(found, part, place, index)}" for index, name in enumerate(part.names)]
        return [Drawing(figure=bars(names, attributions), title="What moved the output, and how far", note="The largest first.")]
    if part.kind == "series":
        note = "Red moves the output up, blue down."
        return [
            Drawing(figure=bars(part.names, attributions.sum(axis=0)), title="By variable", note="Summed over time."),
            Drawing(figure=_heat(attributions, part.names, signed=True), title="By variable and step", note=note),
        ]
    if part.kind == "signal":
        note = "Red moves the output up, blue down, behind what was measured."
        return [Drawing(figure=trace(part.values[place].astype(np.float64), attributions), title="Over time", note=note)]
    if part.kind == "tokens":
        names = [f"{index + 1}: {code_name(code)}" for index, code in enumerate(part.values[place])]
        return [Drawing(figure=bars(names, attributions), title="By event", note="Its place, and its code; the largest first.")]
    told = f"Brighter: more of what raises the output ({part.method})." if attributions.any() else f"Nothing in it raises the output ({part.method})."
    return [Pictures(caption=told, pictures=_pictures(found, part, place))]


def _value(found: "Attributions", part: "Part", place: int, index: int) -> str:
    """A value as the file has it, with its unit; else as the model took it."""
    schema = found.task.schema
    if not isinstance(schema, TableSchema):
        return f"{float(part.values[place, index]):.3g}"
    column = schema.columns[index]
    if column.name not in found.cohort.attributes:
        start = sum(len(other.feature_names) for other in schema.columns[:index])
        return "/".join(f"{float(value):.3g}" for value in part.values[place, start : start + len(column.feature_names)])
    text = str(found.cohort.attributes[column.name][place]).strip()
    number = f"{float(text):.6g}" if text.replace(".", "", 1).replace("-", "", 1).isdigit() and "." in text else text
    return f"{number or 'not known'}{f' {column.unit}' if column.unit and number else ''}"


# Drawings ----------------------------------------------------------------------------------------------------------------------------


def _rows(names: Sequence[str], sizes: FloatArray) -> tuple[Axis, list[int]]:
    """The axis of rows, the largest on top, and which they are."""
    order = [int(index) for index in np.argsort(-np.abs(sizes), kind="stable")[:MOST_ROWS]]
    ticks = tuple((len(order) - row - 0.5, _short(names[index])) for row, index in enumerate(order))
    return Axis(title="", low=0, high=len(order), ticks=ticks), order


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _around_zero(values: FloatArray, *, title: str) -> Axis:
    """An axis that covers the values and 0."""
    low, high = min(0.0, float(values.min(initial=0.0))), max(0.0, float(values.max(initial=0.0)))
    axis = nice_axis(title, low, high if high > low else low + 1e-6)
    if max(len(text) for _, text in axis.ticks) <= MOST_TICK_LETTERS:
        return axis
    first = next(place for place, (value, _) in enumerate(axis.ticks) if abs(value) < 1e-12) % 2  # every other one, 0 among them
    return dataclasses.replace(axis, ticks=axis.ticks[first::2])


def bars(names: Sequence[str], values: FloatArray, *, signed: bool = True) -> Figure:
    """Horizontal bars, the largest on top; where `signed`, red to the right and blue to the left. What moved nothing is left out."""
    names, values = [name for name, value in zip(names, values, strict=True) if value], values[values != 0]
    y, order = _rows(names, values)
    x = _around_zero(values[order], title=CHANGE if signed else SIZE)
    drawn = [_zero(x)]
    for row, index in enumerate(order):
        start, end = sorted((x.fraction(0.0), x.fraction(float(values[index]))))
        drawn.append(
            element(
                "rect", element("title", f"{names[index]}: {values[index]:+.3g}"), class_=f"move {_sign(float(values[index]), signed)}",
                x=percent(start), width=percent(end - start), y=percent((row + 0.18) / len(order)), height=percent(0.64 / len(order)),
            )
        )  # fmt: skip
    rest = len(names) - len(order)
    keys = list(_signs(values[order])) if signed else []
    keys += [Key(css="muted", text=f"{rest} others left out")] if rest else []
    label = f"Bars, the largest: {', '.join(_short(names[index]) for index in order[:3])}."
    return Figure(svg=plot(x, y, drawn, label=label, css=f"rows rows-{len(order)}"), keys=tuple(keys))


def _sign(value: float, signed: bool) -> str:
    return ("up" if value > 0 else "down") if signed else "size"


def swarm(part: "Part") -> Figure:
    """A row a feature, a point a patient, where it moved the output to, coloured by how high the value is."""
    assert part.levels is not None
    sizes = np.abs(part.attributions).mean(axis=0)
    y, order = _rows(part.names, sizes)
    x = _around_zero(part.attributions[:, order], title=CHANGE)
    points = [_zero(x)]
    for row, index in enumerate(order):
        for patient, (value, level) in enumerate(zip(part.attributions[:, index], part.levels[:, index], strict=True)):
            spread = (patient * 0.618034) % 1 - 0.5
            points.append(dot(x.fraction(float(value)), 1 - (row + 0.5 + 0.6 * spread) / len(order), css=f"dot {_shade(level)}", radius=3))
    keys = [Key(css="level-0", text="low value"), Key(css=f"level-{NUM_SHADES - 1}", text="high value")]
    keys += [Key(css="level-none", text="category")] if np.isnan(part.levels[:, order]).any() else []
    rest = len(part.names) - len(order)
    keys += [Key(css="muted", text=f"{rest} others left out")] if rest else []
    label = f"A point for each patient; most moved by {', '.join(part.names[index] for index in order[:3])}."
    return Figure(svg=plot(x, y, points, label=label, css=f"rows swarm rows-{len(order)}"), keys=tuple(keys))


def _shade(level: float) -> str:
    return "level-none" if np.isnan(level) else f"level-{min(NUM_SHADES - 1, int((level + 1) / 2 * NUM_SHADES))}"


def _zero(x: Axis) -> Markup:
    return element("line", class_="axis", x1=percent(x.fraction(0.0)), x2=percent(x.fraction(0.0)), y1="0", y2="100%")


def _heat(values: FloatArray, names: Sequence[str], *, signed: bool) -> Figure:
    """Variables by step, `(T, V)` as cells: as strong as what they moved."""
    y, order = _rows(names, np.abs(values).sum(axis=0))
    cells = _together(values[:, order])
    return Figure(svg=_cells(cells, y, num_steps=len(values), rows=len(order), signed=signed), keys=_signs(cells) if signed else ())


def _signs(values: FloatArray) -> tuple[Key, ...]:
    """The legend's lines for what is drawn."""
    keys = (Key(css="up", text="moves the output up"), Key(css="down", text="moves it down"))
    return tuple(key for key, there in zip(keys, ((values > 0).any(), (values < 0).any()), strict=True) if there)


def _together(values: FloatArray) -> FloatArray:
    """Sums over neighbouring steps, so that there are at most `MOST_STEPS`."""
    width = -(-len(values) // MOST_STEPS)
    return np.add.reduceat(values, np.arange(0, len(values), width), axis=0)


def _steps(num_steps: int) -> Axis:
    return nice_axis("Step", 0, num_steps, num_ticks=6, whole=True)


def _cells(cells: FloatArray, y: Axis, *, num_steps: int, rows: int, signed: bool) -> Markup:
    return plot(
        _steps(num_steps), y, _rectangles(cells, signed=signed), label="Cells by step; stronger ones moved the output more.", css=f"rows rows-{rows}"
    )


def _rectangles(cells: FloatArray, *, signed: bool = True) -> list[Markup]:
    """A rectangle for each of `(T, rows)`, as opaque as it is large."""
    most, (steps, rows) = max(float(np.abs(cells).max(initial=0.0)), 1e-12), cells.shape
    return [
        element(
            "rect",
            element("title", f"step {step + 1}: {cells[step, row]:+.3g}"),
            class_=f"move {_sign(float(cells[step, row]), signed)}",
            fill_opacity=f"{abs(cells[step, row]) / most:.2f}",
            x=percent(step / steps),
            width=percent(1 / steps),
            y=percent(row / rows),
            height=percent(0.94 / rows),
        )
        for step in range(steps)
        for row in range(rows)
        if abs(cells[step, row]) > most / 100
    ]


def trace(values: FloatArray, attributions: FloatArray, *, signed: bool = True) -> Figure:
    """Up to eight channels `(C, T)`, each a trace over the cells of what it moved."""
    order = [int(index) for index in np.argsort(-np.abs(attributions).sum(axis=1), kind="stable")[:8]]
    chosen, size = sorted(order), len(order)
    ticks = tuple((size - row - 0.5, f"{index + 1}") for row, index in enumerate(chosen)) if len(values) > 1 else ()
    lines = []
    for row, index in enumerate(chosen):
        low, high = float(values[index].min()), float(values[index].max())
        heights = (values[index] - low) / max(high - low, 1e-9)
        points = [(step / max(1, len(heights) - 1), 1 - (row + 0.9 - 0.8 * float(height)) / size) for step, height in enumerate(heights)]
        lines.append(path(points, css="line all"))
    cells = _together(attributions[chosen].T)
    drawn = [*_rectangles(cells, signed=signed), stretched(lines)]
    y = Axis(title="Channel" if ticks else "", low=0, high=size, ticks=ticks)
    svg = plot(_steps(values.shape[1]), y, drawn, label="Traces over what moved the output.", css=f"rows rows-{max(6, 2 * size)}")
    return Figure(svg=svg, keys=_signs(cells) if signed else ())


# Pictures ----------------------------------------------------------------------------------------------------------------------------


def overlay(grey: FloatArray, heat: FloatArray) -> NDArray[np.uint8]:
    """`(H, W, 3)`: a grey picture in [0, 1] under heat in [0, 1], which hides as much of it as it is strong."""
    import matplotlib

    colours = np.asarray(matplotlib.colormaps["inferno"](heat))[..., :3]
    cover = 0.75 * heat[..., None]
    return np.asarray(np.rint(255 * ((1 - cover) * grey[..., None] + cover * colours)), dtype=np.uint8)


def in_unit(values: FloatArray) -> FloatArray:
    """Values from their least, as 0, to their largest, as 1; all 0 where they are equal."""
    low, high = float(values.min()), float(values.max())
    return np.zeros_like(values) if high - low < 1e-12 else (values - low) / (high - low)


def _strength(values: FloatArray) -> FloatArray:
    return np.abs(values) / max(float(np.abs(values).max()), 1e-12)


def _pictures(found: "Attributions", part: "Part", place: int) -> tuple[Picture, ...]:
    grey, heat = in_unit(part.values[place].astype(np.float64).mean(axis=0)), _strength(part.attributions[place])
    if part.kind == "volume":
        return tuple(
            picture
            for axis, title in enumerate(DIMENSIONS)
            for picture in (
                Picture(title=f"middle {title}", data=_plain(_middle(grey, axis))),
                Picture(title="what it looks at", data=data_address(overlay(_middle(grey, axis), _middle(heat, axis)))),
            )
        )
    shown = [Picture(title="the image", data=_plain(grey)), Picture(title="what it looks at", data=data_address(overlay(grey, heat)))]
    if found.predictions.shape[1:] == grey.shape:
        shown.append(Picture(title="what it marks", data=data_address(overlay(grey, np.clip(found.predictions[place], 0, 1)))))
    return tuple(shown)


def _mean_pictures(part: "Part") -> tuple[Picture, ...]:
    grey = in_unit(part.values.astype(np.float64).mean(axis=(0, 1)))
    heat = in_unit(np.stack([_strength(values) for values in part.attributions]).mean(axis=0))
    if part.kind == "volume":
        return tuple(
            Picture(title=f"middle {title}", data=data_address(overlay(_middle(grey, axis), _middle(heat, axis))))
            for axis, title in enumerate(DIMENSIONS)
        )
    return (Picture(title="mean image", data=_plain(grey)), Picture(title="where it looks", data=data_address(overlay(grey, heat))))


def _middle(values: FloatArray, axis: int) -> FloatArray:
    return np.asarray(np.take(values, values.shape[axis] // 2, axis=axis))


def _plain(grey: FloatArray) -> str:
    return data_address(np.rint(255 * grey).astype(np.uint8))
