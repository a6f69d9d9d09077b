"""How well the final model does on groups of patients: tables with intervals, and the gap between the best and the worst served."""

from collections.abc import Mapping

from shared.results import SubgroupResult
from wardround.report.charts import interval_strip, strip_axis, strip_scale
from wardround.report.document import Block, Grid, Prose
from wardround.report.judged import judged
from wardround.report.run_files import RunFiles
from wardround.report.tables import DESCRIPTIVE, DESCRIPTIVE_NOTE, FEWEST, Cell, Row, Table, descriptive
from wardround.report.wording import count, finite, finite_interval, humanise, interval_text, metric_title, number

TOO_FEW = "Of a group of fewer than ten test patients no number is given, nor of the next smallest where the total would give it away."
MOST_METRICS = 4


def subgroup_blocks(run: RunFiles) -> list[Block]:
    """A table for each attribute by which the task tells patients apart, and what separates the groups; empty where the run holds none."""
    blocks: list[Block] = []
    for attribute, groups in run.result.subgroups.items():
        blocks.append(
            Grid(
                table=_table(run, groups),
                caption=f"{humanise(attribute)}: {judged(run.study).subgroups}, with 95 % intervals",
                corner="Group",
            )
        )
        blocks.append(Prose(text=gap_sentence(run, groups, kind="group"), css="note"))
    return blocks


def worst_site_sentence(run: RunFiles) -> str:
    """How far the worst site is from the best, of those with enough test patients to tell."""
    primary = run.result.primary_metric
    values = {site: finite(found.get(primary)) for site, found in run.result.per_site.items() if not descriptive(run, site)}
    return _gap_sentence(run, {name: value for name, value in values.items() if value is not None}, kind="site")


def gap_sentence(run: RunFiles, groups: Mapping[str, SubgroupResult], *, kind: str) -> str:
    """How far the worst group is from the best, of those with enough patients to tell."""
    primary = run.result.primary_metric
    values = {name: finite(group.metrics.get(primary)) for name, group in groups.items() if _enough(group)}
    return _gap_sentence(run, {name: value for name, value in values.items() if value is not None}, kind=kind)


def _gap_sentence(run: RunFiles, values: Mapping[str, float], *, kind: str) -> str:
    metric = metric_title(run.result.primary_metric)
    if len(values) < 2:
        return f"Fewer than two {kind}s have ten test patients of every class, so no gap between them is given."
    worst, best = min(values, key=lambda name: values[name]), max(values, key=lambda name: values[name])
    return (
        f"{metric} differs by {number(values[best] - values[worst])} between {kind}s with ten test patients of every class: {number(values[worst])} ({worst}) to "
        f"{number(values[best])} ({best}). Intervals overlap more often than not where groups are small; a gap is a reason to look, and no proof."
    )


def _table(run: RunFiles, groups: Mapping[str, SubgroupResult]) -> Table:
    primary = run.result.primary_metric
    metrics = [primary, *(name for name in run.result.metrics.get("federated", {}) if name != primary)][:MOST_METRICS]
    shown = [
        value
        for group in groups.values()
        for value in (finite(group.metrics.get(primary)), *(finite_interval(group.ci95.get(primary)) or ()))
        if value is not None
    ]
    axis = strip_axis(shown)
    rows = []
    for name, group in groups.items():
        value, interval = finite(group.metrics.get(primary)), finite_interval(group.ci95.get(primary))
        below = " + ".join(count(patients) for patients in group.support.values()) if len(group.support) > 1 else ""
        size = (
            Cell(text="not told", css="absent")
            if group.num_test is None
            else Cell(text=count(group.num_test), below=below, mark="" if _enough(group) else DESCRIPTIVE)
        )
        cells = (
            Cell(text=number(finite(group.metrics.get(metric))), below=interval_text(finite_interval(group.ci95.get(metric)))) for metric in metrics
        )
        rows.append(Row(name=name, cells=(size, *cells), strip=interval_strip(axis, value, interval) if axis else None))
    note = (TOO_FEW + " " if any(group.num_test is None for group in groups.values()) else "") + (
        DESCRIPTIVE_NOTE if any(group.num_test is not None and not _enough(group) for group in groups.values()) else ""
    )
    heads = ("Test patients", *(metric_title(metric) for metric in metrics))
    return Table(
        heads=heads, rows=tuple(rows), strip_head=metric_title(primary) if axis else "", scale=strip_scale(axis) if axis else None, note=note.strip()
    )


def _enough(group: SubgroupResult) -> bool:
    """Whether ten test patients of every class stand behind it, or ten in all where classes are not counted."""
    return group.num_test is not None and group.num_test >= FEWEST and all(patients >= FEWEST for patients in group.support.values())
