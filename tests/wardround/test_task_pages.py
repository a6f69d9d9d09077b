"""The pages of the tasks say what the code says."""

from pathlib import Path

import pytest

from shared.task import resolve_task, task_names
from tests.wardround.conftest import Command
from wardround.task_page import MARK, task_page, written_page

PAGES = Path(__file__).resolve().parents[2] / "docs" / "tasks"


@pytest.mark.parametrize("name", [name for name in task_names() if ":" not in name])
def test_every_task_has_a_page_that_says_what_the_code_says(name: str) -> None:
    """`wardround task show NAME --page docs/tasks/NAME.md` makes it anew."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page.partition(MARK)[0] == task_page(resolve_task(name)).partition(MARK)[0]
    assert "epsilon" in page.partition(MARK)[2], "below the mark stands what was measured"


def test_what_was_measured_is_kept_when_a_page_is_made_anew(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    assert command("task", "show", "heart-disease", "--page", str(path)).code == 0
    path.write_text(path.read_text().replace("coronary", "corrupted") + "\nMeasured: 1.\n")
    assert written_page(path, resolve_task("heart-disease")).endswith("\nMeasured: 1.\n")
    assert "corrupted" not in written_page(path, resolve_task("heart-disease"))
