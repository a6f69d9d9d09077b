"""A report's content apart from its looks: sections of blocks, from which the page, the JSON and the Markdown are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from wardround.report.charts import Figure
from wardround.report.summary import Banner
from wardround.report.tables import Cell, Table

Reader = Literal["researcher", "ethics", "it-security", "model-card"]
Series = Mapping[str, list[tuple[float, float | None]]]
SCHEMA_VERSION = 1
NAMES: dict[Reader, str] = {
    "researcher": "report",
    "ethics": "report-ethics",
    "it-security": "report-it-security",
    "model-card": "model-card",
}  # of files


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """A paragraph. `css` is "" or what it is: "note", "absent-part", "gap", "statement"."""

    kind: ClassVar[str] = "text"
    text: str
    css: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "list"
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names with what they stand for."""

    kind: ClassVar[str] = "facts"
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table under a caption; `corner` heads its first column."""

    kind: ClassVar[str] = "table"
    table: Table
    caption: str
    corner: str = "Site"
    css: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure, and the points that it was drawn from."""

    kind: ClassVar[str] = "figure"
    figure: Figure
    title: str
    note: str = ""
    series: Series = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A small picture as a `data:` address, with what it shows."""

    title: str
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Pictures side by side."""

    kind: ClassVar[str] = "pictures"
    caption: str
    pictures: tuple[Picture, ...]


Block = Prose | Heading | Bullets | Facts | Grid | Drawing | Pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report; `id` is its address on the page."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A report for one reader. `banners` are what must be known before anything else."""

    reader: Reader
    eyebrow: str
    title: str
    subtitle: str
    run: str
    lead: str
    banners: tuple[Banner, ...]
    sections: tuple[Section, ...]
    tags: tuple[str, ...] = ()


def content(document: Document) -> dict[str, object]:
    """The document as JSON: what the page says, without its drawings; of a figure the points, of a picture its title."""
    return {
        "schema_version": SCHEMA_VERSION,
        "reader": document.reader,
        "run": document.run,
        "title": document.title,
        "subtitle": document.subtitle,
        "notices": [{"title": banner.title, "text": banner.text} for banner in document.banners],
        "lead": document.lead,
        "sections": [
            {"id": section.id, "title": section.title, "blocks": [block_content(block) for block in section.blocks]} for section in document.sections
        ],
    }


def block_content(block: Block) -> dict[str, object]:
    """One block as JSON."""
    match block:
        case Prose():
            found: dict[str, object] = {"text": block.text}
        case Heading():
            found = {"text": block.text}
        case Bullets():
            found = {"items": list(block.items)}
        case Facts():
            found = {"facts": [{"name": name, "value": value} for name, value in block.pairs]}
        case Grid():
            rows = [{"name": row.name, "cells": [_cell(cell) for cell in row.cells]} for row in block.table.rows]
            found = {"caption": block.caption, "columns": [block.corner, *block.table.heads], "rows": rows, "note": block.table.note}
        case Drawing():
            found = {"title": block.title, "note": block.note, "legend": [key.text for key in block.figure.keys], "series": dict(block.series)}
        case Pictures():
            found = {"caption": block.caption, "pictures": [picture.title for picture in block.pictures]}
    return {"kind": block.kind, **found}


def _cell(cell: Cell) -> dict[str, str]:
    return {"text": cell.text, **{name: value for name, value in (("below", cell.below), ("mark", cell.mark)) if value}}
