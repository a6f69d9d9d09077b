"""The pages' templates and their one style sheet; a template is parsed once in a process, since that takes longer than filling it in."""

import functools
from pathlib import Path

import jinja2

_HERE = Path(__file__).parent


def fill_in(name: str, **content: object) -> str:
    """The page: the template `name` of this folder with this content, every text escaped; a name that the content lacks is an error."""
    return _environment().get_template(name).render(style=_style(), **content)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _style() -> str:
    return (_HERE / "style.css").read_text(encoding="utf-8")
