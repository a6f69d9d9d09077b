"""A new folder for every test of the command line: nothing is left in the checkout."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wardround.cli import Outcome, wardround
from wardround.__main__ import run

Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `wardround` with these arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: wardround(capsys, *arguments)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out, shown = tmp_path_factory.mktemp("made"), io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert run(["simulate", "--rounds", "1", "--sites", "2", "--no-baselines", "--json", "--out", str(out)]) == 0
    made: dict[str, object] = json.loads(shown.getvalue())["data"]
    return made


@pytest.fixture
def simulated(_made: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """What `wardround simulate` of one round at two sites said; its `run_dir` is a copy for this test alone."""
    made = Path(str(_made["run_dir"]))
    return {**_made, "run_dir": str(shutil.copytree(made, tmp_path / "runs" / made.name))}
