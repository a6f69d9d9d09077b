"""A task's page in the documentation, `docs/tasks/<name>.md`: what the code says of it, and below a mark what was measured, which is written by hand."""

from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigurationError
from shared.schema import Column, TableSchema
from shared.subgroups import Subgroup
from shared.task import Task
from wardround.studies import studies_folder

MARK = "<!-- measured -->"  # what follows is kept when the page is made anew


def task_page(task: Task, *, measured: str = "") -> str:
    """The page as Markdown.

    Args:
        measured: what stands below the mark.
    """
    parts = [
        f"# {task.name}\n\n{task.title}.",
        _facts(task),
        "## What a site holds",
        _schema(task),
        *_subgroups(task),
        "## Model",
        f"```\n{task.model()!r}\n```",
        _study(task),
    ]
    return "\n\n".join(part for part in parts if part) + f"\n\n{MARK}\n{measured}"


def written_page(path: Path, task: Task) -> str:
    """The page for `path`, with what is measured taken from the file that is there."""
    measured = path.read_text(encoding="utf-8").partition(MARK)[2].removeprefix("\n") if path.is_file() else ""
    return task_page(task, measured=measured)


def _facts(task: Task) -> str:
    model = task.model()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = [
        ("modality", task.modality), ("metrics", ", ".join(metric.name for metric in task.metrics)), ("primary metric", task.primary_metric),
        ("trainable parameters", f"{trainable:,}"), ("sites of the real data", ", ".join(task.sites)), ("source", task.source),
        ("patients", "come with the package" if task.bundled else "are synthetic without `--data`, and every output says so"),
    ]  # fmt: skip
    return _table(("", ""), [(name, value) for name, value in rows if value])


def _schema(task: Task) -> str:
    loader = (task.load_cohort.__doc__ or "").strip().splitlines()
    said = [] if not loader else [f"Loader: {loader[0].strip()}"]
    if isinstance(task.schema, TableSchema):
        columns = [*task.schema.columns, task.schema.label]
        rows = [
            (f"`{column.name}`", column.type, _range(column), column.unit, "label" if column is task.schema.label else column.missing)
            for column in columns
        ]
        return "\n\n".join([*said, _table(("column", "type", "range or categories", "unit", "missing"), rows)])
    inputs = [
        (f"`{part.name}`", " x ".join(map(str, part.shape)) or "one number", part.dtype, f"{part.low:g} to {part.high:g}", part.unit)
        for part in task.schema
    ]
    return "\n\n".join([*said, _table(("input", "shape", "type", "range", "unit"), inputs)])


def _range(column: Column) -> str:
    return f"{column.low:g} to {column.high:g}" if column.type == "number" else ", ".join(column.values)


def _subgroups(task: Task) -> list[str]:
    return [f"Reports tell apart: {'; '.join(_subgroup(mark) for mark in task.subgroups)}."] if task.subgroups else []


def _subgroup(mark: Subgroup) -> str:
    how = ", ".join(f"{edge:g}" for edge in mark.edges) or ", ".join(mark.names.values())
    return f"{mark.title or mark.attribute}{f' ({how})' if how else ''}"


def _study(task: Task) -> str:
    if task.default_study is None:
        return ""
    path = studies_folder() / task.default_study
    if not path.is_file():
        raise ConfigurationError(f"task {task.name}: default_study: expected a file in {studies_folder()}, found no {task.default_study}", "add it")
    return f"## Study\n\n`wardround simulate --task {task.name}` runs `studies/{task.default_study}`:\n\n```toml\n{path.read_text(encoding='utf-8').strip()}\n```"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
