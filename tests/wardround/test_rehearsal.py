"""A study rehearsed with hospitals' own site files: their policies and ledgers hold, and the printout says what each kept back."""

import json
from pathlib import Path

import pytest

from tests.wardround.conftest import Command

SCHEMA = """
name = "stay"
patient = "patient"
[label]
name = "died"
type = "binary"
[[columns]]
name = "age"
type = "number"
low = 18
high = 110
"""
SITE = """
name = "{name}"
[cohort]
path = "cohort.csv"
declared_size = 100
declared_test_size = 40
[policy]
max_epsilon = 2.0
max_delta = 1e-3
allowed_tasks = ["stay"]
allowed_metrics = [{metrics}]
exact_metrics = true
"""
ALL = '"auroc", "accuracy", "auprc", "brier", "calibration_error"'
STUDY = 'name = "rehearsal"\ntask = "stay.toml"\n[rounds]\ncount = 2\n[privacy]\nepsilon = 1.0\n'


def make_site(folder: Path, name: str, metrics: str) -> None:
    """A hospital's folder: site file and 140 synthetic patients."""
    folder.mkdir(parents=True)
    rows = [f"{name}-{index},{20 + index % 80},{int(index % 80 > 40)}" for index in range(140)]
    (folder / "cohort.csv").write_text("patient,age,died\n" + "\n".join(rows) + "\n")
    (folder / "site.toml").write_text(SITE.format(name=name, metrics=metrics))


@pytest.fixture
def rehearsal(tmp_path: Path) -> Path:
    """A study, its schema, and two hospitals, one of which lets only some metrics out."""
    (tmp_path / "stay.toml").write_text(SCHEMA)
    (tmp_path / "study.toml").write_text(STUDY)
    make_site(tmp_path / "sites" / "north", "north", ALL)
    make_site(tmp_path / "sites" / "south", "south", '"auroc"')
    return tmp_path


@pytest.mark.slow
def test_policies_and_ledgers_hold_until_the_budget_is_spent(command: Command, rehearsal: Path) -> None:
    first = command("simulate", "study.toml", "--data", "sites")
    assert first.code == 0
    assert "test patients of 1 of 2 sites" in first.out
    assert first.out.count("south: no statistics: policy.allowed_metrics: score_histogram also gives accuracy") == 1
    assert "protects nobody" not in first.out
    codes = [command("simulate", "study.toml", "--data", "sites", "--json").code for _ in range(7)]
    assert codes[-1] == 7
    spent = command("privacy", "spent", "sites/north/site.toml", "--json").data["ledgers"]
    assert isinstance(spent, list)
    assert spent[0]["epsilon"] <= spent[0]["limit"] == 2.0
    assert len(spent[0]["studies"]) == 1 + codes.count(0)


@pytest.mark.slow
def test_the_folder_of_one_site_is_that_site(command: Command, rehearsal: Path) -> None:
    outcome = command("simulate", "study.toml", "--data", "sites/north", "--json")
    assert outcome.code == 0
    assert [site["name"] for site in outcome.data["sites"]] == ["north"]  # type: ignore[attr-defined]  # a list of tables
    assert (rehearsal / "sites" / "north" / "state" / "ledgers" / "north.sqlite").is_file()


@pytest.mark.slow
def test_a_lost_key_is_not_made_anew_beside_a_ledger(command: Command, rehearsal: Path) -> None:
    assert command("simulate", "study.toml", "--data", "sites").code == 0
    key = rehearsal / "sites" / "north" / "state" / "patient-hash.key"
    assert key.stat().st_mode & 0o077 == 0
    key.unlink()
    outcome = command("simulate", "study.toml", "--data", "sites", "--json")
    assert (outcome.code, outcome.data["code"]) == (1, "E104")
    assert not key.exists()


def test_a_policy_refusal_is_told_with_its_exit_code(command: Command, rehearsal: Path) -> None:
    assert command("simulate", "study.toml", "--data", "sites", "--epsilon", "none", "--json").code == 6
    assert command("simulate", "study.toml", "--data", "sites", "--epsilon", "3", "--json").code == 6


def test_real_sites_have_no_baselines(command: Command, rehearsal: Path) -> None:
    outcome = command("simulate", "study.toml", "--data", "sites", "--baselines", "--json")
    assert (outcome.code, outcome.data["code"]) == (3, "E300")


@pytest.mark.slow
def test_a_number_as_label_learns_at_the_default_settings(command: Command, tmp_path: Path) -> None:
    label = 'type = "number"\nlow = 0\nhigh = 40\nunit = "days"\n'
    (tmp_path / "los.toml").write_text(SCHEMA.replace('type = "binary"\n', label).replace('"stay"', '"los"'))
    rows = [f"p{index};{20 + index % 80};{(20 + index % 80) / 4 + index % 3:.1f}".replace(".", ",") for index in range(400)]
    (tmp_path / "los.csv").write_text("patient;age;died\n" + "\n".join(rows) + "\n")
    for epsilon in ("3", "none"):
        outcome = command("simulate", "--task", "los.toml", "--data", "los.csv", "--epsilon", epsilon, "--json")
        assert outcome.code == 0
        metrics = outcome.data["metrics"]
        assert isinstance(metrics, dict)
        assert metrics["federated"]["mae"] < 3.0
        assert metrics["federated"]["r2"] > 0.6


@pytest.mark.slow
def test_a_finished_run_is_resumed_as_it_is(command: Command) -> None:
    data = command("simulate", "--rounds", "1", "--sites", "2", "--json").data
    run = Path(str(data["run_dir"]))
    before = (run / "result.json").read_bytes()
    renamed = run.rename(run.with_name("renamed"))
    again = command("simulate", "--resume", renamed, "--json")
    assert again.code == 0
    assert (renamed / "result.json").read_bytes() == before


@pytest.mark.slow
def test_a_hospitals_ledger_is_shown_computed_again_and_verified(command: Command, rehearsal: Path) -> None:
    study = (rehearsal / "study.toml").read_text()
    (rehearsal / "study.toml").write_text(study + "evaluation_epsilon = 1.0\n")
    assert command("simulate", "study.toml", "--data", "sites").code == 0
    [training, evaluation] = command("privacy", "spent", "sites/north/site.toml", "--json").data["ledgers"]  # type: ignore[misc]
    assert (training["account"], evaluation["account"]) == ("training", "evaluation")
    for account in (training, evaluation):
        assert 0 < account["epsilon"] <= account["epsilon_filter"] <= account["limit"] and account["remains"] > 0
        assert account["studies"][0]["state"] == "closed"
    checks = command("privacy", "verify", "sites/north/site.toml", "--json").data["checks"]
    assert [check["agrees"] for check in checks] == [True, True]  # type: ignore[attr-defined, union-attr, index]
    [run] = [path for path in (rehearsal / "runs").iterdir() if not path.name.startswith(".")]
    checks = command("privacy", "verify", run, "--json").data["checks"]
    assert [(check["name"], check["source"], check["agrees"]) for check in checks] == [("north", "claim", True), ("south", "claim", True)]  # type: ignore[index, union-attr, attr-defined]
    for words in (("privacy", "spent"), ("privacy", "verify"), ("ledger", "verify"), ("ledger", "repair")):
        by_file = command(*words, "sites/north/site.toml", "--json").data
        assert command(*words, "sites/north", "--json").data == command(*words, "sites/north/state", "--json").data == by_file
    [ledger] = command("ledger", "verify", "sites/north/site.toml", "--json").data["ledgers"]  # type: ignore[misc]
    assert ledger["signed"] is True and ledger["rows"] > 5


@pytest.mark.slow
def test_a_claim_that_says_less_than_was_charged_is_found(command: Command) -> None:
    run = Path(str(command("simulate", "--rounds", "2", "--sites", "2", "--json").data["run_dir"]))
    assert command("privacy", "verify", run).code == 0
    claim = (run / "privacy.json").read_text()
    sites = json.loads(claim)["sites"]
    epsilon = sites["site-1"]["epsilon"]
    (run / "privacy.json").write_text(claim.replace(str(epsilon), str(epsilon / 2)))
    outcome = command("privacy", "verify", run, "--json")
    assert (outcome.code, outcome.data["code"]) == (1, "E105") and "site-1" in str(outcome.data["what"])


@pytest.mark.slow
def test_a_ledger_that_is_gone_is_missed_by_every_command(command: Command, rehearsal: Path) -> None:
    assert command("simulate", "study.toml", "--data", "sites").code == 0
    ledger = rehearsal / "sites" / "north" / "state" / "ledgers" / "north.sqlite"
    ledger.unlink()
    for words in (("privacy", "spent"), ("privacy", "verify"), ("ledger", "verify"), ("ledger", "close")):
        extra = ["run"] if words[1] == "close" else []
        outcome = command(*words, "sites/north/site.toml", *extra, "--json")
        assert (outcome.code, outcome.data["code"]) == (1, "E104"), words
    refused = command("simulate", "study.toml", "--data", "sites/north", "--json")
    assert refused.code == 8 and "E104" in str(refused.data["what"]) and not ledger.exists()
    assert command("ledger", "repair", "sites/north/site.toml", "--head", "xyz", "--json").code == 3
    assert command("ledger", "repair", "sites/north/site.toml", "--json").code == 0
    assert command("privacy", "spent", "sites/north/site.toml").code == 0


@pytest.mark.slow
def test_a_renamed_site_is_told_its_former_name_and_leaves_no_ledger(command: Command, rehearsal: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert command("simulate", "study.toml", "--data", "sites").code == 0
    path = rehearsal / "sites" / "north" / "site.toml"
    path.write_text(path.read_text().replace('name = "north"', 'name = "nord"'))
    outcome = command("simulate", "study.toml", "--data", "sites/north")
    assert outcome.code == 8 and "in that of cohort 'north' beside it" in caplog.text
    assert sorted(file.name for file in (path.parent / "state" / "ledgers").glob("*.sqlite")) == ["north.sqlite"]
    assert "beside it there are ledgers of north" in command("privacy", "spent", path).err


def test_remedies_name_the_key_of_the_site_file(command: Command, rehearsal: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = rehearsal / "sites" / "north" / "site.toml"
    text = path.read_text()
    path.write_text(text.replace("cohort.csv", "nope.csv"))
    assert command("simulate", "study.toml", "--data", "sites/north").code == 5
    assert "correct [cohort] path in" in caplog.text  # the hospital's own log
    (rehearsal / "file").write_text("")
    path.write_text(text.replace("[cohort]", 'state = "../../file"\n[cohort]'))
    outcome = command("simulate", "study.toml", "--data", "sites/north")
    assert outcome.code == 1 and "correct 'state' in the site file" in outcome.err
