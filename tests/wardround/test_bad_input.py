"""What a new user gets wrong: each mistake has its message (what, where, what to do), its exit code, and leaves nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wardround.conftest import Command

HEART = Path(__file__).resolve().parents[3] / "shared" / "data" / "fed_heart_disease"
STUDY = 'name = "mine"\ntask = "breast-cancer"\n'
SCHEMA = """
name = "mine"
patient = "patient"
[label]
name = "died"
type = "binary"
[[columns]]
name = "age"
type = "number"
unit = "years"
low = 18
high = 110
[[columns]]
name = "sbp"
type = "number"
low = 60
high = 250
"""

needs_heart = pytest.mark.skipif(not HEART.is_dir(), reason="the UCI heart files are not beside the checkout")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("[privacy]\nepsilon = 3\nepsilom = 2", ["privacy.epsilom", "unknown key", "did you mean 'epsilon'"]),
        ("[privacy]\nepsilon = 'three'", ["privacy.epsilon", "expected a number", "'three'"]),
        ("[privacy]\nepsilon = 0", ["privacy.epsilon", "greater than 0", "got 0"]),
        ("[privacy]\nepsilon = -2.0", ["privacy.epsilon", "greater than 0"]),
        ("[privacy]\nepsilon = nan", ["privacy.epsilon", "finite"]),
        ("[privacy]\nepsilon = inf", ["privacy.epsilon", "finite"]),
        ("[privacy]\nepsilon = true", ["privacy.epsilon", "expected a number"]),
        ("[privacy]\nepsilon = 3\ndelta = 0.5", ["privacy.delta", "less than 0.1"]),
        ("[privacy]\nepsilon = 3\ndelta = 0.09", ["privacy.delta", "expected delta < 1/", "lower it or omit it"]),
        ("[privacy]\nepsilon = 3\nnoise_multiplier = 1", ["privacy", "either epsilon or noise_multiplier", "both"]),
        ("[privacy]\nunit = 'ward'\nepsilon = 3", ["privacy.unit", "'patient', 'record', 'site' or 'none'"]),
        ("[privacy]", ["privacy", "either epsilon or noise_multiplier", "neither"]),
        ("", ["privacy", "expected a value, got none"]),
        ("[privacy]\nepsilon = 3\n[rounds]\ncount = 0", ["rounds.count", "greater than or equal to 1", "got 0"]),
        ("[privacy]\nepsilon = 3\n[rounds]\nrequire = 9", ["rounds.require", "9", "sites"]),
        ("[privacy]\nepsilon = 3\n[training]\nbatch_size = 0", ["training.batch_size", "got 0"]),
        ("[privacy]\nepsilon = 3\n[training]\noptimizer = 'adm'", ["training.optimizer", "'adam'"]),
        ("[privacy]\nepsilon = 3\n[strategy]\nname = 'fedsgd'", ["strategy.name", "'fedavg'", "'fedsgd'"]),
        ("[privacy]\nepsilon = 3\n[strategy]\nname = 'fedadam'\nbeta1 = 0.5", ["strategy.beta1", "did you mean 'beta_1'"]),
        ("[privacy]\nepsilon = 3\n[federation]\nsites = 0", ["federation.sites", "got 0"]),
        ("[privacy]\nepsilon = 3\n[federation]\nsites = 600", ["federation.sites", "569", "at most 56 sites"]),
        ("[privacy]\nepsilon = 3\n[federation]\npartition = 'natural'", ["federation.partition", "hospitals"]),
        ("[privacy]\nepsilon = 3\n[trainin]\n", ["trainin", "did you mean 'training'"]),
        ("[privacy\n", ["not valid TOML"]),
    ],
)  # fmt: skip
def test_study_with_a_mistake_is_refused_before_anything_runs(command: Command, tmp_path: Path, text: str, fragments: list[str]) -> None:
    (tmp_path / "study.toml").write_text(STUDY + text + "\n")
    outcome = command("simulate", "study.toml", "--json")
    assert outcome.code == 3
    message = f"{outcome.data['what']} {outcome.data['remedy']}"
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert outcome.data["remedy"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["simulate", "--epsilon", "0"], 3, "greater than 0"),
        (["simulate", "--epsilon", "nan"], 3, "finite"),
        (["simulate", "--epsilon", "lots"], 3, "'none'"),
        (["simulate", "--sites", "100000"], 3, "at most"),
        (["simulate", "--rounds", "-1"], 3, "rounds.count"),
        (["simulate", "--task", "breast-canser"], 3, "did you mean 'breast-cancer'"),
        (["simulate", "--task", "no.such.module:task"], 3, "no.such"),
        (["simulate", "--task", "shared.study:parse_duration"], 3, "its factory raised TypeError"),
        (["simulate", "brest-cancer"], 3, "did you mean 'breast-cancer'"),
        (["simulate", "absent.toml"], 3, "found none"),
        (["simulate", "heart-disease"], 5, "wardround data fetch heart-disease"),
        (["simulate", "heart-disease", "--data", "absent"], 5, "found nothing"),
        (["simulate", "--resume", "absent"], 1, "expected a run's folder"),
        (["simulate", "--engine", "rey"], 2, "--engine"),
        (["simulate", "--ray-address", "127.0.0.1:6379"], 2, "--engine ray"),
        (["report", "absent"], 1, "expected a run's folder"),
        (["simulate", "--bogus"], 2, "--bogus"),
        (["simulat"], 2, "simulat"),
        (["privacy", "plan", "--patients", "100"], 3, "either epsilon or noise_multiplier"),
        (["privacy", "plan", "--patients", "100", "--epsilon", "inf"], 3, "finite"),
        (["privacy", "plan", "--patients", "1", "--epsilon", "1"], 3, "at least 2"),
        (["privacy", "epsilon", "--event", "0,0.1,5", "--delta", "1e-5"], 3, "noise multiplier >= 0.2"),
        (["privacy", "epsilon", "--event", "1,0.1", "--delta", "1e-5"], 3, "SIGMA,Q,STEPS"),
        (["privacy", "epsilon", "--event", "1,0.1,5", "--delta", "0"], 3, "(0, 1)"),
        (["privacy", "spent", "absent.toml"], 3, "found none"),
        (["data", "fetch", "heart"], 3, "did you mean 'heart-disease'"),
        (["task", "init", "--from", "absent.csv"], 5, "found none"),
    ],
)
def test_command_line_mistake(command: Command, arguments: list[str], code: int, fragment: str) -> None:
    outcome = command(*arguments, *([] if code == 2 else ["--json"]))
    assert outcome.code == code
    assert fragment in outcome.err
    assert "Traceback" not in outcome.err
    if code != 2:
        assert outcome.data["what"]


def test_usage_error_is_an_envelope_as_well(command: Command) -> None:
    outcome = command("simulate", "--bogus", "--json")
    assert outcome.code == 2
    assert outcome.data["code"] == "E200"


def test_debug_shows_the_traceback(command: Command) -> None:
    outcome = command("simulate", "--epsilon", "0", "--debug")
    assert outcome.code == 3
    assert "Traceback" in outcome.err


def heart(folder: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> Path:
    """A copy of the four hospitals with Cleveland's rows changed."""
    shutil.copytree(HEART, folder, copy_function=shutil.copyfile)
    file = folder / "processed.cleveland.data"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("".join(",".join(row) + "\n" for row in change(rows)))
    return folder


def with_column(index: int, value: Callable[[str], str]) -> Callable[[list[list[str]]], list[list[str]]]:
    """A change of one column in every row."""
    return lambda rows: [[*row[:index], value(row[index]), *row[index + 1 :]] for row in rows]


@needs_heart
@pytest.mark.parametrize(
    ("change", "code", "fragment"),
    [
        (lambda rows: [row[:-1] for row in rows], 5, "expected 14 columns"),
        (with_column(0, lambda value: "old"), 5, "column 'age': expected numbers"),
        (with_column(3, lambda value: str(float(value) / 7.5)), 5, "column 'trestbps': expected values from 80 to 220 mmHg"),
        (with_column(3, lambda value: "?"), 5, "column 'trestbps': all 303 values are missing"),
        (with_column(2, lambda value: "9"), 5, "column 'cp': expected one of 1, 2, 3, 4"),
        (with_column(13, lambda value: "sick"), 5, "column 'num': expected numbers"),
        (lambda rows: [], 5, "cleveland"),
        (lambda rows: rows[:1], 3, "fewer at cleveland"),
    ],
    ids=["column missing", "in text", "other unit", "all missing", "unknown category", "label in text", "no patient", "one patient"],
)
def test_hospital_file_with_a_mistake(
    command: Command, tmp_path: Path, change: Callable[[list[list[str]]], list[list[str]]], code: int, fragment: str
) -> None:
    outcome = command("simulate", "heart-disease", "--data", heart(tmp_path / "heart", change), "--json")
    assert outcome.code == code
    assert fragment in str(outcome.data["what"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@needs_heart
def test_site_with_one_class_runs_and_has_no_auroc(command: Command, tmp_path: Path) -> None:
    folder = heart(tmp_path / "heart", lambda rows: [row for row in rows if row[-1] == "0"])
    outcome = command("simulate", "heart-disease", "--data", folder, "--rounds", "1", "--json")
    assert outcome.code == 0
    per_site = outcome.data["per_site"]
    assert isinstance(per_site, dict)
    assert per_site["cleveland"]["auroc"] is None
    assert per_site["hungarian"]["auroc"] is not None


def rows_of(count: int) -> list[str]:
    """A header line and synthetic rows of the schema above."""
    return ["patient,age,sbp,died", *(f"p{index},{40 + index % 40},{110 + index % 60},{index % 2}" for index in range(count))]


@pytest.mark.parametrize(
    ("content", "code", "fragment"),
    [
        (b"", 5, "empty file"),
        (b"patient,age,sbp,died\n", 5, "at least one row"),
        ("\n".join(rows_of(100)).replace("sbp", "SBP ", 1).encode(), 5, "did you mean 'SBP '"),
        ("\n".join(rows_of(100)).replace("sbp", "pressure", 1).encode(), 5, "expected column 'sbp'"),
        ("\n".join(rows_of(100)).encode() + b"\np9,\xe9,100,1\n", 5, "UTF-8"),
        ("\n".join([*rows_of(100), "p1,50,120,1,extra"]).encode(), 5, "same number of fields"),
        ("\n".join([*rows_of(100), ",50,120,1"]).encode(), 5, "column 'patient'"),
        ("\n".join([*rows_of(100), "p101,50,120,2"]).encode(), 5, "column 'died': expected one of 0, 1"),
        ("\n".join([*rows_of(100)[:1], *(f"p{i},50,120," for i in range(50))]).encode(), 5, "label 'died': all 50 values are missing"),
        ("\n".join(rows_of(1)).encode(), 3, "lower federation.min_patients"),
    ],
    ids=["empty", "header only", "renamed in case", "renamed", "not UTF-8", "ragged", "no patient id", "other label", "no label", "one patient"],
)
def test_own_table_with_a_mistake(command: Command, tmp_path: Path, content: bytes, code: int, fragment: str) -> None:
    (tmp_path / "mine.toml").write_text(SCHEMA)
    (tmp_path / "mine.csv").write_bytes(content)
    outcome = command("simulate", "--task", "mine.toml", "--data", "mine.csv", "--json")
    assert outcome.code == code
    assert fragment in f"{outcome.data['what']} {outcome.data['remedy']}"
    assert "p101" not in outcome.err


def test_empty_data_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SCHEMA)
    (tmp_path / "empty").mkdir()
    outcome = command("simulate", "--task", "mine.toml", "--data", "empty", "--json")
    assert (outcome.code, outcome.data["code"]) == (5, "E501")


def test_run_folder_that_cannot_be_written(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = command("simulate", "--out", "file/runs", "--json")
    assert outcome.code == 1
    assert "could not make the run's folder" in str(outcome.data["what"])
    assert "--out" in str(outcome.data["remedy"])


def test_schema_without_ranges_is_refused_by_column(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SCHEMA.replace("low = 18\nhigh = 110\n", ""))
    outcome = command("simulate", "--task", "mine.toml", "--json")
    assert outcome.code == 3
    assert "column 'age': expected low and high" in str(outcome.data["what"])
