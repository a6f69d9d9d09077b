"""`wardround privacy explain`: a claim sheet in plain sentences."""

from pathlib import Path

import pytest

from tests.wardround.conftest import Command

HEADINGS = ["What is promised", "How", "Hospital by hospital", "The whole federation", "Covered", "Not covered"]
RUN = ("simulate", "--rounds", "1", "--sites", "2", "--no-baselines", "--json")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
def test_a_run_is_explained(command: Command, simulated: dict[str, object]) -> None:
    run = simulated["run_dir"]
    data = command("privacy", "explain", run, "--json").data
    sections = {section["title"]: section["sentences"] for section in data["sections"]}  # type: ignore[attr-defined]
    assert list(sections) == [*HEADINGS, "If this run was chosen among several", "Assumed"]
    claim = data["claim"]
    assert isinstance(claim, dict)
    assert [sentence.split(":")[0] for sentence in sections["Hospital by hospital"]] == ["At site-1", "At site-2"]
    for site, sentence in zip(claim["sites"].values(), sections["Hospital by hospital"], strict=True):
        assert {site["accountant"], site["cross_check_accountant"]} == {"pld", "prv"}
        assert "PLD" in sentence and "PRV says" in sentence and f"{site['steps']} steps" in sentence and "from a seed" in sentence
    said = words(command("privacy", "explain", run).out)
    assert "it protects nobody" in said and "This run protects its" not in said
    assert "would recognise at most" in said and "(geometric law, 10 on average)" in said
    assert all(words(line)[1:] in said for lines in sections.values() for line in lines)  # but for a capital letter
    assert command("privacy", "explain", run).err == ""


@pytest.mark.slow
def test_fresh_noise_protects(command: Command, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('name = "s"\ntask = "breast-cancer"\n[rounds]\ncount = 1\n[privacy]\nepsilon = 2\nnoise_source = "os"\n'
                                         "patients_overlap = true\n[federation]\nsites = 2\n")  # fmt: skip
    run = command("simulate", "study.toml", "--no-baselines", "--json").data["run_dir"]
    said = words(command("privacy", "explain", run).out)
    assert "This run protects its patients." in said and "protects nobody" not in said
    assert "A patient may be known to several hospitals, says the study" in said and "and forgotten" in said


@pytest.mark.slow
def test_without_privacy_nobody_is_protected(command: Command) -> None:
    run = command(*RUN, "--epsilon", "none").data["run_dir"]
    data = command("privacy", "explain", run, "--json").data
    assert [section["title"] for section in data["sections"]] == ["What is promised", "Not covered"]  # type: ignore[attr-defined]
    assert "Nobody is protected by this run." in command("privacy", "explain", run).out


@pytest.mark.parametrize("lost", ["privacy.json", "result.json"])
def test_a_run_without_a_claim_sheet_is_said_to_have_none(command: Command, simulated: dict[str, object], lost: str) -> None:
    run = Path(str(simulated["run_dir"]))
    (run / lost).unlink()
    outcome = command("privacy", "explain", run)
    assert outcome.code == 1 and lost in outcome.err and "what to do" in outcome.err
