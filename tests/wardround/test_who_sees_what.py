"""Whole runs with masks, with shares of a noise, and with values cut off: what terminal, reports, ledgers and cards say of each."""

import json
from pathlib import Path

import pytest

from client.account import Admit
from client.ledger import reading
from shared.results import PrivacyClaim
from shared.whole_promise import WholePromise, rounded_up, start_sentence, whole_promise
from tests.wardround.conftest import Command
from wardround.report import write_report
from wardround.report.ethics import coin_guessed
from wardround.report.run_files import read_run
from wardround.report.summary import banners
from wardround.report.wording import upper_bound

STUDY = """
name = "sums"
task = "breast-cancer"
rounds = {{count = 2}}
training = {{local_steps = 1, learning_rate = 0.5}}
privacy = {privacy}
secure_aggregation = {secure}
evaluation = {{bootstrap = 0}}
federation = {{sites = 4, partition = "iid"}}
"""
PRIVATE, NONE = "{epsilon = 3.0, delta = 1e-4}", '{unit = "none"}'
DISTRIBUTED = '{noise = "distributed", sites = 4, missing = 1}'


def words(text: str) -> str:
    return " ".join(text.split())


def simulated(command: Command, *, privacy: str = PRIVATE, secure: str = DISTRIBUTED, arguments: tuple[object, ...] = ()) -> tuple[Path, str]:
    """The run's folder and what the terminal showed."""
    Path("study.toml").write_text(STUDY.format(privacy=privacy, secure=secure))
    outcome = command("simulate", "study.toml", "--no-baselines", "--out", "runs", *arguments)
    assert outcome.code == 0, outcome.err
    return max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns), words(outcome.out)


def said_everywhere(command: Command, run: Path) -> dict[str, str]:
    """What every reader is told, in one string each."""
    for reader in ("researcher", "ethics", "model-card"):
        write_report(run, reader)  # type: ignore[arg-type]
    files = ("report.json", "report-ethics.json", "model-card.json", "model-card.md", "privacy.json", "report.html")
    told = {name: words((run / name).read_text()) for name in files}
    return {**told, "explain": words(command("privacy", "explain", run).out), "spent": words(command("privacy", "spent", run).out)}


@pytest.mark.slow
def test_two_epsilons_are_told_wherever_one_is(command: Command) -> None:
    run, shown = simulated(command)
    claim = PrivacyClaim.model_validate_json((run / "privacy.json").read_text())
    assert claim.distributed_noise is not None
    worst = max(site.epsilon_if_all_others_collude for site in claim.distributed_noise.sites.values())
    told = said_everywhere(command, run)
    for reader, text in {**told, "terminal": shown}.items():
        assert any(form in text for form in (upper_bound(worst), rounded_up(worst), f"{worst:.3f}")), f"{reader} does not tell the second epsilon"
        for false in (
            "an attacker who sees every update",
            "or every update that led",
            "noise added at the hospital",
            "adds random noise in proportion",
            "the noise was",
        ):
            assert false not in text, f"{reader} says {false!r}"
        assert "in league" in text, reader
    row = next(site for site in claim.distributed_noise.sites.values())
    assert f"{coin_guessed(row.epsilon_if_all_others_collude, 1e-4)} in 100" in told["report-ethics.json"]
    assert "if all others collude" in told["spent"] and "distributed noise: sums." in told["spent"]
    verified = command("ledger", "verify", run)
    assert verified.code == 0 and "distributed noise: sums." in words(verified.out)
    data = command("privacy", "spent", run, "--json").data
    ledgers = data["ledgers"]
    assert isinstance(ledgers, list) and all(entry["studies"][0]["shares"] == 3 for entry in ledgers)
    by_name = {entry["name"]: entry["studies"][0]["epsilon_if_all_others_collude"] for entry in ledgers}
    assert by_name == pytest.approx({name: site.epsilon_if_all_others_collude for name, site in claim.distributed_noise.sites.items()})


def test_what_is_charged_is_the_plan_s_noise_and_its_row_says_of_what(command: Command) -> None:
    run, _ = simulated(command)
    claim = PrivacyClaim.model_validate_json((run / "privacy.json").read_text())
    for name, site in claim.sites.items():
        with reading(run / "ledgers" / f"{name}.sqlite") as ledger:
            (plan,) = ledger.account.plans.values()
            charged = ledger.account.events("training")
            assert plan.entry.shares == 3 and {event.noise_multiplier for event in charged} == {site.noise_multiplier}
            assert plan.alone(charged[0]).noise_multiplier == pytest.approx(site.noise_multiplier / 3**0.5)  # type: ignore[union-attr]


def test_a_row_of_an_older_version_has_no_shares() -> None:
    table = {
        "run": "r",
        "study": "s",
        "study_hash": "0" * 64,
        "training": {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3},
        "evaluation": None,
    }
    assert Admit.model_validate_json(json.dumps({**table, "limit": None, "coordinator_key": None})).shares is None


@pytest.mark.slow
def test_local_noise_under_masks_and_none_at_all_are_told_apart(command: Command) -> None:
    run, shown = simulated(command, secure="{}")
    assert "each update leaves with its own noise, under masks" in shown and "does not rest on that" in shown and "if all others collude" not in shown
    told = said_everywhere(command, run)
    assert (
        "an attacker who sees every update" in told["explain"] and "under masks" in told["report-ethics.json"] and "in league" not in told["explain"]
    )
    assert "if all others collude" not in told["spent"] and "All others together" not in told["report.html"]
    run, shown = simulated(command, privacy=NONE, secure="{}")
    assert "No privacy for patients: updates are sent without noise, under masks" in shown
    explained = words(command("privacy", "explain", run).out)
    assert "as it was" not in explained and "as it is" not in explained and "verything that left" not in explained and "SecAgg+" in explained


def test_a_model_whose_updates_were_cut_off_says_so(command: Command) -> None:
    run, shown = simulated(command, privacy=NONE, secure="{max_value = 0.001}")
    clipped = "Updates were clipped: in 2 rounds, 4 sites cut values off at 0.001"
    assert clipped in shown
    files = read_run(run)
    assert files.clipped is not None and (files.clipped.sites, files.clipped.rounds) == (4, 2)
    assert any(clipped in banner.text for banner in banners(files)) and clipped in words((run / "report.html").read_text())
    run, shown = simulated(command, privacy=NONE, secure="{}")
    assert "clipped" not in shown and read_run(run).clipped is None


@pytest.mark.slow
def test_a_start_keeps_the_conditions_of_the_promise_before_it(command: Command) -> None:
    first, _ = simulated(command)
    claim = PrivacyClaim.model_validate_json((first / "privacy.json").read_text())
    second, shown = simulated(command, secure="{}", arguments=("--start-from", first))
    after = PrivacyClaim.model_validate_json((second / "privacy.json").read_text())
    start = after.started_from
    assert start is not None and claim.distributed_noise is not None and claim.federation is not None and after.federation is not None
    worst = max(site.epsilon_if_all_others_collude for site in claim.distributed_noise.sites.values())
    assert start.epsilon_if_all_others_collude == worst and start.conditions == (claim.distributed_noise.condition,)
    assert "as long as no site is in league" in shown and "against the coordinator and all other sites together" in shown and "add up" in shown
    both = whole_promise(after, start)
    assert both.epsilon == pytest.approx(claim.federation.epsilon + after.federation.epsilon)
    assert both.colluding == pytest.approx(worst + after.federation.epsilon) and both.conditions == start.conditions
    write_report(second, "model-card")
    card = (second / "model-card.md").read_text()
    assert "as long as no site is in league" in card and upper_bound(both.colluding) in card
    third, shown = simulated(command, privacy=NONE, secure="{}", arguments=("--start-from", second))
    assert "do not add up" in shown and "epsilons and deltas add up" not in shown and third != second


def test_promises_add_up_where_they_are_for_the_same_alone() -> None:
    from shared.results import StartedFrom

    whole = StartedFrom(
        study="s", sha256="", taken=(), fresh=(), unit="site", protects=True, epsilon=8.0, delta=1e-3, epsilon_if_all_others_collude=8.0
    )
    told = start_sentence(whole, "patient")
    assert (
        "against everybody but the coordinator" in told and "something else, to patients" in told and "nothing is promised to a site of both" in told
    )
    assert "add up." in start_sentence(whole, "site") and "do not add up" not in start_sentence(whole, "site")
    older = whole.model_copy(update={"unit": "patient", "epsilon_if_all_others_collude": None})
    claim = PrivacyClaim.model_construct(unit="patient", protects=True, site_level=None, federation=None, distributed_noise=None)
    assert whole_promise(claim, older).colluding is None, "what an older file does not tell is not known"
    assert whole_promise(claim, None) == WholePromise(unit="patient", protects=True, epsilon=0.0, delta=0.0, colluding=0.0)
