"""A document as Markdown (CommonMark with GitHub's tables), for where a model card is shown; drawings are left to the page."""

import re

from wardround.report.document import Block, Bullets, Document, Drawing, Facts, Grid, Heading, Pictures, Prose
from wardround.report.tables import Cell, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def markdown(document: Document) -> str:
    """The whole text, from the title on; every name is text and no mark-up, whatever is in it."""
    parts = [f"# {escape(document.title)}", escape(document.subtitle)]
    parts += [f"> **{escape(banner.title)}** {escape(banner.text)}" for banner in document.banners]
    parts.append(escape(document.lead))
    for section in document.sections:
        parts += [f"## {escape(section.title)}", *(text for block in section.blocks if (text := _block(block)))]
    parts.append(escape(f"Made by Wardround from the files of run {document.run}."))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    r"""The text on one line, with a backslash before what Markdown or HTML would take for more.

    >>> escape("a|b <i>")
    'a\\|b \\<i\\>'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _block(block: Block) -> str:
    match block:
        case Prose():
            return f"*{escape(block.text)}*" if block.css == "gap-part" else escape(block.text)
        case Heading():
            return f"### {escape(block.text)}"
        case Bullets():
            return "\n".join(f"- {escape(item)}" for item in block.items)
        case Facts():
            return "\n".join(f"- **{escape(name)}:** {escape(value)}" for name, value in block.pairs)
        case Grid():
            return _table(block.table, block.caption, block.corner)
        case Drawing() | Pictures():
            return ""


def _table(table: Table, caption: str, corner: str) -> str:
    heads = [escape(head) for head in (corner, *table.heads)]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(' --- ' for _ in heads)}|"]
    lines += [f"| {' | '.join([escape(row.name), *map(_cell, row.cells)])} |" for row in table.rows]
    note = f"\n\n{escape(table.note)}" if table.note else ""
    return f"{escape(caption)}:\n\n" + "\n".join(lines) + note


def _cell(cell: Cell) -> str:
    below = cell.below if cell.below.startswith("[") or not cell.text else f"({cell.below})" if cell.below else ""
    return escape(" ".join(part for part in (cell.text, below, f"({cell.mark})" if cell.mark else "") if part))
