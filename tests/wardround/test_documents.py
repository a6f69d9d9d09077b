"""What the README and the documents show is run, in a small form."""

import re
import shlex
import sys
import tomllib
import typing
from pathlib import Path

import pytest

from client.policy import SiteFile
from shared.config import validate
from shared.strategy_options import Strategy
from shared.study import Faults, Privacy, SecureAggregation, Study
from shared.study_tables import flatten
from shared.tasks.tabular import TabularTask
from simulations.sweeps.grid import Sweep, cells_of
from tests.wardround.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
HEART = ROOT.parent / "shared" / "data" / "fed_heart_disease"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of this language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    """Every command in the README's shell blocks."""
    lines = [line.split("#")[0].strip() for block in blocks(README, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_readme_command(command: Command, line: str, tmp_path: Path) -> None:
    sweep, _ = blocks(README, "toml")
    (tmp_path / "sweep.toml").write_text(sweep.replace("[1, 2, 3]", "[1]").replace("[4, 8]", "[2]").replace("rounds = [5]", "rounds = [1]"))
    arguments = shlex.split(line)
    assert arguments[0] == "wardround"
    arguments = arguments[1:]
    if arguments[:2] == ["data", "fetch"]:
        pytest.skip("downloads from the publisher")
    if arguments[0] == "simulate":
        arguments += ["--rounds", "1"]
        if "--data" in arguments and not HEART.is_dir():
            pytest.skip("the UCI heart files are not beside the checkout")
        arguments = [str(HEART) if argument == "data/heart-disease" else argument for argument in arguments]
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err


def test_readme_shows_both_commands_and_the_picture() -> None:
    first_screen = README[:3500]
    assert "make demo" in first_screen
    assert "make test" in first_screen
    picture = re.search(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert picture is not None
    assert (ROOT / picture[1]).stat().st_size < 500_000


@pytest.mark.slow
def test_readme_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    study = Study.load(ROOT / "studies" / "breast-cancer.toml").replace(rounds={"count": 1})
    (tmp_path / "studies" / "breast-cancer.toml").write_text(study.to_toml())
    monkeypatch.chdir(tmp_path)
    [snippet] = blocks(README, "python")
    names: dict[str, object] = {}
    exec(snippet, names)  # the README's own words
    [folder] = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").is_file()


def test_readme_study_is_a_study() -> None:
    sweep, text = blocks(README, "toml")
    study = Study.from_table(tomllib.loads(text))
    assert study.privacy.epsilon == 3.0
    assert len(cells_of(validate(Sweep, tomllib.loads(sweep), "README.md"), study)) == 18


def test_site_file_of_the_documents_is_one() -> None:
    [text] = blocks((ROOT / "docs" / "sites.md").read_text(), "toml")
    assert validate(SiteFile, tomllib.loads(text), "docs/sites.md").policy.max_epsilon == 5.0


def test_schema_file_of_the_documents_is_one() -> None:
    [text] = blocks((ROOT / "docs" / "tasks.md").read_text(), "toml")
    assert validate(TabularTask, tomllib.loads(text), "docs/tasks.md").name == "admissions"


@pytest.mark.slow
def test_task_of_the_documents_runs_privately_and_is_short(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [text] = blocks((ROOT / "docs" / "tasks.md").read_text(), "python")
    assert len(text.splitlines()) < 60
    (tmp_path / "my_beats.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = command("simulate", "--task", "my_beats:beat", "--rounds", "3", "--json")
    sys.modules.pop("my_beats", None)
    assert outcome.code == 0, outcome.err
    assert outcome.data["synthetic"] is True
    assert outcome.data["task"] == "beat"


def test_every_key_of_a_study_is_documented() -> None:
    text = (ROOT / "docs" / "studies.md").read_text()
    study = Study.from_table({"name": "x", "task": "x", "privacy": {"epsilon": 1.0}})
    missing = [key for key in flatten(study.to_table()) if f"`{key}`" not in text and f"`{key.split('.')[-1]}`" not in text]
    assert missing == []


def test_every_strategy_and_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "studies.md").read_text()
    [union, *_] = typing.get_args(Strategy)
    members = typing.get_args(union)
    names = [name for member in members for name in typing.get_args(member.model_fields["name"].annotation)]
    assert len(names) == 25 and [name for name in names if f'"{name}"' not in text] == []
    tables = {"strategy": members, "secure_aggregation": (SecureAggregation,), "faults": (Faults,), "privacy": (Privacy,)}
    keys = [f"{table}.{key}" for table, models in tables.items() for model in models for key in model.model_fields if key != "name"]
    assert len(set(keys)) > 45
    assert [key for key in dict.fromkeys(keys) if f"`{key}`" not in text and f"`{key.partition('.')[2]}`" not in text] == []
