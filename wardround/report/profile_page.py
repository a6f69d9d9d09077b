"""The page of `wardround data profile`, for the hospital alone, and beside it the aggregate that may be discussed outside."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from client.data_profile import NOT_KNOWN, ROUNDED_TO, Counts, Profile, Variable, aggregate
from shared.files import json_text, make_private, storage_errors, write_atomic
from wardround.plural import plural
from wardround.report.charts import NUM_COLOURS, Figure, Key
from wardround.report.document import Block, Document, Drawing, Facts, Grid, Prose, Section
from wardround.report.summary import Banner
from wardround.report.svg import Axis, element, join, nice_axis, percent, plot
from wardround.report.tables import Cell, Row, Table
from wardround.report.templates import fill_in
from wardround.report.wording import DASH, count

PAGE, AGGREGATE = "profile.html", "profile-aggregate.json"
MOST_BARS = 9  # cells of a drawing; a variable with more categories is a table
MOST_LETTERS = 16  # of a category below an axis
STAYS = (
    "Every number here is exact, also where it counts one patient. Show it to nobody outside; what may be discussed is the file "
    f"{AGGREGATE} beside it."
)
SYNTHETIC = Banner(title="SYNTHETIC patients.", text="Nothing here says anything about real ones.")


def write_profile(profile: Profile, folder: Path, *, source: str, min_cell: int) -> tuple[Path, Path]:
    """The paths of the page and of the aggregate, written into `folder`; what is made is its owner's alone to read.

    Raises:
        StorageError: the folder cannot be made or written to.
    """
    with storage_errors(folder, "make this folder"):
        if not folder.exists():
            make_private(folder)
    page, told = folder / PAGE, folder / AGGREGATE
    write_atomic(page, render_profile(profile_document(profile, source=source, min_cell=min_cell)))
    with storage_errors(page, "make it its owner's alone"):
        page.chmod(0o600)
    write_atomic(told, json_text(aggregate(profile, min_cell=min_cell)))
    return page, told


def render_profile(document: Document) -> str:
    """The page as HTML."""
    return fill_in("profile.html.j2", document=document)


def profile_document(profile: Profile, *, source: str, min_cell: int) -> Document:
    """What the page says."""
    synthetic = profile.synthetic
    banners = [SYNTHETIC if synthetic else Banner(title="This page describes patients. It must not leave the hospital.", text=STAYS)]
    sections = [_sizes(profile), *_missing(profile), _distributions(profile), _told(profile, min_cell)]
    return Document(
        reader="researcher", eyebrow=f"data profile{'' if synthetic else ', for the hospital alone'}", title="Data profile", subtitle=f"Task {profile.task}", run=source,
        lead=_lead(profile), banners=tuple(banners), sections=tuple(sections),
        tags=(plural(profile.num_patients, "patient"), plural(profile.num_records, "record"), *([plural(len(profile.site.cells), "site")] if profile.site else [])),
    )  # fmt: skip


def _lead(profile: Profile) -> str:
    classes = (
        ""
        if profile.label is None
        else ": " + ", ".join(_count_and_share(profile.label.counts, place, name) for place, name in _cells(profile.label))
    )
    return f"{plural(profile.num_patients, 'patient')} with {plural(profile.num_records, 'record')}{classes}. Each counts once below, by the first record."


def _cells(variable: Variable) -> list[tuple[int, str]]:
    return list(enumerate(variable.cells))


def _count_and_share(counts: Counts, place: int, name: str) -> str:
    return f"{count(int(counts[place]))} {name} ({_share(int(counts[place]), int(counts.sum()))})"


def _share(part: int, whole: int) -> str:
    if not whole:
        return DASH
    return "<1%" if 0 < part < whole / 200 else f"{part / whole:.0%}"


# Sections ------------------------------------------------------------------------------------------------------------------------


def _sizes(profile: Profile) -> Section:
    """Patients and labels, by site."""
    blocks: list[Block] = [Facts(pairs=(("Patients", count(profile.num_patients)), ("Records", count(profile.num_records))))]
    if profile.label is not None:
        rows = [("All", profile.label.counts)]
        if profile.site is not None:
            rows += list(zip(profile.site.cells, profile.site.by(profile.label), strict=True))
        table = Table(
            heads=("Patients", *profile.label.cells),
            rows=tuple(_row_of(name, counts, css="chief" if name == "All" and len(rows) > 1 else "") for name, counts in rows),
            note="Below each number, its share of the site's patients.",
        )
        blocks.append(Grid(table=table, caption="Patients by site and label"))
    elif profile.site is not None:
        rows = list(zip(profile.site.cells, profile.site.counts[:, None], strict=True))
        blocks.append(Grid(table=Table(heads=("Patients",), rows=tuple(_row_of(name, counts) for name, counts in rows)), caption="Patients by site"))
    return Section(id="sizes", title="Sizes and labels", blocks=tuple(blocks))


def _row_of(name: str, counts: Counts, *, css: str = "") -> Row:
    whole = int(counts.sum())
    parts = [Cell(text=count(int(part)), below=_share(int(part), whole)) for part in counts] if len(counts) > 1 else []
    return Row(name=name, cells=(Cell(text=count(whole)), *parts), css=css)


def _missing(profile: Profile) -> list[Section]:
    """What is not known, by variable and site; no section where every variable is always known."""
    rows = []
    for variable in profile.variables:
        if NOT_KNOWN in variable.cells and variable.counts[-1]:
            by_site = variable.by(profile.site) if profile.site is not None else np.zeros((len(variable.cells), 0), dtype=np.int64)
            shares = [Cell(text=_share(int(by_site[-1, place]), int(by_site[:, place].sum()))) for place in range(by_site.shape[1])]
            whole = Cell(text=_share(int(variable.counts[-1]), profile.num_patients), below=count(int(variable.counts[-1])))
            rows.append(Row(name=variable.name, cells=(whole, *shares)))
    if not rows:
        return []
    heads = ("All", *(profile.site.cells if profile.site is not None else ()))
    table = Grid(table=Table(heads=heads, rows=tuple(rows)), caption="Share of patients of whom it is not known", corner="Column")
    return [Section(id="missing", title="Missing values", blocks=(table,))]


def _distributions(profile: Profile) -> Section:
    """Every variable, by label and by site."""
    groups = [(words, other) for words, other in (("label", profile.label), ("site", profile.site)) if other is not None]
    blocks: list[Block] = [
        Prose(
            text="Shares are of the patients of each label or site of whom the value is known. Bins divide the schema's public range, not the data's.",
            css="note",
        )
    ]
    for variable in profile.variables:
        blocks += _variable_blocks(variable, groups)
    return Section(id="distributions", title="Distributions", blocks=tuple(blocks))


def _variable_blocks(variable: Variable, groups: Sequence[tuple[str, Variable]]) -> list[Block]:
    title = f"{variable.name}, {variable.unit}" if variable.unit and len(variable.unit) < 40 else variable.name
    notes = [f"{count(int(variable.counts[-1]))} not known"] if NOT_KNOWN in variable.cells and variable.counts[-1] else []
    notes += [f"{count(variable.num_outside)} out of the range, in the outermost bins"] if variable.num_outside else []
    note, blocks = "; ".join(notes), list[Block]()
    for words, other in groups or [("", Variable(name="", cells=("all patients",), of_patient=np.zeros_like(variable.of_patient)))]:
        caption = f"{title} by {words}" if words else title
        known = [place for place, name in _cells(variable) if name != NOT_KNOWN]
        table = variable.by(other)[known]
        if variable.edges or len(known) <= MOST_BARS:
            blocks.append(Drawing(figure=bars(variable, other, table, label=f"Bar chart of {caption}."), title=caption, note=note))
        else:
            blocks.append(Grid(table=_as_table(variable, other, table, note), caption=caption, corner="Value"))
    return blocks


def _as_table(variable: Variable, other: Variable, table: Counts, note: str) -> Table:
    wholes = table.sum(axis=0)
    rows = [
        Row(
            name=variable.cells[place],
            cells=tuple(Cell(text=count(int(n)), below=_share(int(n), int(whole))) for n, whole in zip(counts, wholes, strict=True)),
        )
        for place, counts in enumerate(table)
    ]
    return Table(heads=other.cells, rows=tuple(rows), note=note)


def _told(profile: Profile, min_cell: int) -> Section:
    """What the aggregate beside the page holds."""
    return Section(
        id="aggregate",
        title="What may be discussed outside",
        blocks=(
            Prose(
                text=f"{AGGREGATE} holds the same counts for all sites together, by label, in the same public bins, without any cell below {min_cell} patients: such "
                f"cells are hidden, and further ones with them, so that no small cell follows from a total. What is left is rounded to multiples of {ROUNDED_TO}. It is "
                "no differential privacy, and does not guard against somebody who knows more about these patients: read it before you show it."
            ),
            Prose(
                text=f"{plural(len(profile.variables) + (profile.site is not None), 'table')}; patients in all: {count(profile.num_patients)}, told as a multiple of {ROUNDED_TO}.",
                css="note",
            ),
        ),
    )


# Drawings ------------------------------------------------------------------------------------------------------------------------


def bars(variable: Variable, other: Variable, table: Counts, *, label: str) -> Figure:
    """Grouped bars: each cell's share of every group's patients. More groups than colours: the largest, and the others together."""
    names, table = _folded(other.cells, table)
    wholes = table.sum(axis=0)
    shares = table / np.maximum(wholes, 1)
    num_cells, num_groups = table.shape
    y = nice_axis("Share of patients, %", 0, float(shares.max()) * 100 or 1.0, num_ticks=4)
    x = _bin_axis(variable, num_cells) if variable.edges else _cell_axis(variable, num_cells)
    width = 0.9 / num_cells / num_groups
    drawn = [
        _bar((cell + 0.05) / num_cells + group * width, width, y.fraction(100 * shares[cell, group]), css=f"c{group + 1}",
             title=f"{names[group]}, {variable.cells[cell]}: {table[cell, group]:,} ({shares[cell, group]:.1%})")
        for cell in range(num_cells) for group in range(num_groups)
    ]  # fmt: skip
    keys = tuple(Key(css=f"c{group + 1}", text=f"{name} ({wholes[group]:,})") for group, name in enumerate(names))
    return Figure(svg=plot(x, y, [join(drawn)], label=label), keys=keys)


def _folded(names: Sequence[str], table: Counts) -> tuple[list[str], Counts]:
    """As many groups as there are colours: the last of them is all but the largest."""
    if len(names) <= NUM_COLOURS:
        return list(names), table
    order = np.argsort(-table.sum(axis=0), kind="stable")
    largest, others = np.sort(order[: NUM_COLOURS - 1]), order[NUM_COLOURS - 1 :]
    folded = np.concatenate([table[:, largest], table[:, others].sum(axis=1, keepdims=True)], axis=1)
    return [*(names[place] for place in largest), f"{len(others)} others"], folded


def _bar(start: float, width: float, height: float, *, css: str, title: str) -> Markup:
    return element(
        "rect",
        element("title", title),
        class_=f"segment {css}",
        x=percent(start),
        y=percent(1 - height),
        width=percent(width),
        height=percent(height),
    )


def _bin_axis(variable: Variable, num_cells: int) -> Axis:
    """Ends of bins, every other one."""
    ticks = tuple((place / num_cells, f"{edge:.3g}") for place, edge in enumerate(variable.edges) if place % 2 == 0)
    return Axis(title=variable.unit if len(variable.unit) < 40 else "", low=0.0, high=1.0, ticks=ticks)


def _cell_axis(variable: Variable, num_cells: int) -> Axis:
    most = max(4, MOST_LETTERS * 4 // num_cells)
    names = [name if len(name) <= most else f"{name[: most - 1]}…" for name in variable.cells[:num_cells]]
    return Axis(title="", low=0.0, high=1.0, ticks=tuple(((place + 0.5) / num_cells, name) for place, name in enumerate(names)))
