"""A new folder for every test of the command line: nothing is left in the checkout."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wardround.cli import Outcome, wardround

Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `wardround` with these arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: wardround(capsys, *arguments)
