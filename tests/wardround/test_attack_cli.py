"""`wardround attack`: the envelope, the folder, the gate, and what is refused before anything is trained."""

import json
from pathlib import Path

import pytest

import wardround.attacking
from client.noise import NoiseGrid
from shared.attacks import CanaryAudit, MembershipAttack, read_attacks
from shared.errors import ConfigurationError
from shared.study import Study
from tests.wardround.conftest import Command

STUDY = """
name = "every-patient"
task = "breast-cancer"
[rounds]
count = 2
[training]
learning_rate = 0.5
local_steps = 4
batch_size = 397
[privacy]
epsilon = 2.0
delta = 1e-4
[federation]
sites = 1
partition = "iid"
"""
MEMBERSHIP = MembershipAttack(
    method="loss", seed=0, members=10, non_members=5, num_shadows=0, auroc=0.5, auroc_ci95=(0.4, 0.6), tpr_at_fpr={"0.001": 0.0, "0.01": 0.01},
    roc=[(0.0, 0.0), (1.0, 1.0)], epsilon_claimed=2.0,
)  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study in which every patient is in every batch: there an audit sees most."""
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def test_the_envelope_and_the_folder(command: Command, study: Path) -> None:
    outcome = command("attack", study, "--canaries", "200", "--seed", "4", "--out", "attacks", "--gate", "--json")
    assert outcome.code == 0, outcome.err
    data = outcome.data
    [audit] = data["attacks"]
    assert 0 <= data["epsilon_lower"] <= data["epsilon_lower_fdp"] <= data["epsilon_claimed"] <= 2
    assert {name: audit[name] for name in ("epsilon_lower", "epsilon_claimed", "seed", "canaries")} == {
        "epsilon_lower": data["epsilon_lower"], "epsilon_claimed": data["epsilon_claimed"], "seed": 4, "canaries": 200,
    }  # fmt: skip
    [folder] = Path("attacks").iterdir()
    assert folder.name.startswith("attack-every-patient-") and str(folder) == data["attack_dir"]
    assert sorted(path.name for path in folder.iterdir()) == ["attacks.json", "study.toml"]
    assert [attack.model_dump(mode="json") for attack in read_attacks(folder)] == data["attacks"]
    assert Study.load(folder / "study.toml") == Study.load(study)
    assert "do not contradict" in outcome.err and "200 gradient canaries at site-1" in outcome.err


def test_without_privacy_the_bound_is_large_and_nothing_is_claimed(command: Command, study: Path) -> None:
    data = command("attack", study, "--epsilon", "none", "--json").data
    assert data["epsilon_claimed"] is None and data["epsilon_lower"] > 4.5 and data["epsilon_lower_fdp"] > 8


@pytest.mark.slow  # trains several models
def test_a_run_keeps_what_was_measured_on_it(command: Command, study: Path) -> None:
    run = str(command("simulate", study, "--no-baselines", "--json").data["run_dir"])
    for seed in (1, 2, 1):
        assert command("attack", run, "--canaries", "60", "--seed", seed, "--json").data["attack_dir"] == run
    assert sorted(attack.seed for attack in read_attacks(Path(run))) == [1, 2]
    spent = json.loads((Path(run) / "result.json").read_text())["privacy"]["sites"]["site-1"]
    [audit] = [attack for attack in read_attacks(Path(run)) if attack.seed == 2]
    assert isinstance(audit, CanaryAudit) and audit.epsilon_claimed == spent["epsilon"]
    other = command("attack", run, "--epsilon", "1", "--json")
    assert (other.code, other.data["code"]) == (3, "E300")


@pytest.mark.slow
def test_a_run_on_other_patients_is_not_attacked(command: Command) -> None:
    run = Path(str(command("simulate", "--task", "heart-disease", "--sites", "2", "--rounds", "1", "--json").data["run_dir"]))
    start = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**start, "patients_sha256": "0" * 64}))
    outcome = command("attack", run, "--json")
    assert outcome.code == 3 and "patients" in str(outcome.data["what"])
    assert not (run / "attacks.json").exists()


@pytest.mark.slow
def test_the_gate_fails_where_more_is_found_than_claimed(command: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = NoiseGrid.release
    monkeypatch.setattr(NoiseGrid, "release", lambda grid, total, noise, multiplier: release(grid, total, noise, multiplier / 4))
    outcome = command("attack", study, "--gate", "--json")
    assert (outcome.code, outcome.data["code"]) == (1, "E105")
    assert "claimed epsilon" in str(outcome.data["what"]) and "--seed" in str(outcome.data["remedy"])
    [folder] = Path("runs").iterdir()
    [audit] = read_attacks(folder)
    assert isinstance(audit, CanaryAudit) and audit.exceeds  # what was found is kept
    without = command("attack", study)
    assert without.code == 0 and "More was found than is promised" in without.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epsilon", "none", "--gate"],
        ["--kind", "membership", "--gate"],
        ["--canaries", "3"],
        ["--epsilon", "-1"],
        ["--epsilon", "much"],
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(command: Command, study: Path, arguments: list[str]) -> None:
    outcome = command("attack", study, *arguments, "--json")
    assert outcome.code == 3 and outcome.data["remedy"]
    assert not Path("runs").exists()


def test_a_folder_that_is_no_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = command("attack", "empty", "--json")
    assert (outcome.code, outcome.data["code"]) == (1, "E103")


def test_of_several_attacks_what_does_not_suit_is_named(command: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a stand-in decides what suits: the attacks have tests of their own."""
    measure = wardround.attacking._attack

    def attack(asked: Study, kind: str, **options: object) -> object:
        if kind in ("inversion", "poisoning"):
            raise ConfigurationError(f"{kind}: expected another task")
        return ([MEMBERSHIP], {"attack-membership.png": b"PNG"}) if kind == "membership" else measure(asked, kind, **options)

    monkeypatch.setattr(wardround.attacking, "_attack", attack)
    outcome = command("attack", study, "--kind", "all", "--canaries", "20", "--json")
    assert [attack["kind"] for attack in outcome.data["attacks"]] == ["canary", "membership"]
    assert outcome.data["left_out"] == {kind: f"{kind}: expected another task" for kind in ("inversion", "poisoning")}
    folder = Path(str(outcome.data["attack_dir"]))
    assert (folder / "attack-membership.png").read_bytes() == b"PNG" and len(read_attacks(folder)) == 2
    assert "inversion was left out" in outcome.err and "membership inference" in outcome.err
    alone = command("attack", study, "--kind", "inversion", "--json")
    assert alone.code == 3 and "expected another task" in str(alone.data["what"])


def test_inversion_needs_images(command: Command) -> None:
    outcome = command("attack", "--kind", "inversion", "--json")
    assert outcome.code == 3 and "images" in str(outcome.data["what"])
