"""What a report's numbers are of is said in every caption: one model, or each site's own; and who judged a round of fedbuff."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.results import RoundRecord
from shared.study import Study
from tests.wardround.conftest import Command
from tests.wardround.test_report import MadeUp, build_run, outline, page_of
from wardround.report import write_report
from wardround.report.charts import learning_chart
from wardround.report.history import fold_curves, site_curves
from wardround.report.judged import beside_own_models
from wardround.report.run_files import read_run
from wardround.report.summary import key_numbers
from wardround.report.tables import gain_table
from wardround.report.wording import short_setting

ONE_MODEL = (
    "The model trained together by 4 sites reached",
    "The federated model and baselines",
    "One site alone",
    "the federated model does better than the site’s own",
    "The final model on each site’s own test patients",
    "The federated model on the test patients of all sites",
)
OWN_MODELS = (
    "The 4 sites’ own models (ditto), each on its own test patients, reached",
    "models that each site trained alone, judged likewise, reached",
    "The sites’ own models and baselines",
    "Each site’s own, alone",
    "the site’s own model of the federation does better than the one that it trained alone",
    "Each site’s own final model on its own test patients",
    "The sites’ own models, each on its own site’s test patients",
    "Each point is the sites’ own models",
)


@dataclass(frozen=True, kw_only=True)
class Chosen(MadeUp):
    """A made-up run of another strategy."""

    strategy: str = "ditto"

    def study(self) -> Study:
        """The study that was run."""
        return super().study().replace(strategy={"name": self.strategy})


@pytest.mark.parametrize(("strategy", "said", "unsaid"), [("ditto", OWN_MODELS, ONE_MODEL), ("fedavg", ONE_MODEL, OWN_MODELS)])
def test_every_caption_says_whose_models_were_judged(tmp_path: Path, strategy: str, said: tuple[str, ...], unsaid: tuple[str, ...]) -> None:
    folder = build_run(tmp_path / "run", Chosen(strategy=strategy))
    text = outline(page_of(folder)).text
    assert [words for words in said if words not in text] == []
    assert [words for words in unsaid if words in text] == []
    gains = gain_table(read_run(folder))
    assert gains is not None and f"At {gains.better} of {gains.compared} sites" in text
    card = outline(write_report(folder, "model-card").read_text(encoding="utf-8")).text
    assert ("The final model on all" in card) == ("By the final model at each site" in card) == (strategy == "fedavg")


def _fedbuff(
    folder: Path, *, at_work: dict[tuple[str, int], tuple[str, None]], judged: set[int] | None = None, stale: dict[tuple[str, int], int] | None = None
) -> Path:
    """A made-up run of fedbuff. `judged`: rounds with a value; `stale`: how old the model was that a site answered in a round."""
    build_run(folder, Chosen(strategy="fedbuff", absent=at_work))
    records = [RoundRecord.model_validate_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    lines = []
    for record in records:
        sites = tuple(site.model_copy(update={"staleness": (stale or {}).get((site.name, record.round))}) for site in record.sites)
        known = judged is None or record.round in judged
        changes = {"sites": sites} if known else {"sites": sites, "metrics": {}, "metrics_ci95": {}}
        lines.append(record.model_copy(update=changes).model_dump_json() + "\n")
    (folder / "rounds.jsonl").write_text("".join(lines))
    return folder


AT_WORK = {("cleveland", number): ("at work", None) for number in (2, 3, 5, 8)} | {("hungary", 3): ("at work", None)}


@pytest.mark.slow
def test_sites_at_work_are_not_said_to_have_answered(tmp_path: Path) -> None:
    run = read_run(_fedbuff(tmp_path / "run", at_work=AT_WORK))
    [sites] = [item for item in key_numbers(run) if item.name == "Sites"]
    assert (sites.value, sites.below) == ("4", "2–4 in a round")
    [sites] = [item for item in key_numbers(read_run(build_run(tmp_path / "other", MadeUp()))) if item.name == "Sites"]
    assert sites.below == "all in every round"


def test_rounds_that_nobody_judged_are_no_gaps_and_one_value_is_no_chart(tmp_path: Path) -> None:
    folder = _fedbuff(tmp_path / "run", at_work=AT_WORK, judged={4, 9})
    [curve] = fold_curves(read_run(folder))
    assert [at for at, _, _ in curve.points] == [3, 8, 12] and None not in curve.values()
    assert "With fedbuff a round’s model is judged by the sites that answered it" in outline(page_of(folder)).text
    lone = _fedbuff(tmp_path / "lone", at_work=AT_WORK, judged=set())
    assert learning_chart(read_run(lone)) is None
    assert "Fewer than two rounds have a value of AUROC" in page_of(lone)


def test_a_value_stands_at_the_model_that_it_is_of(tmp_path: Path) -> None:
    folder = _fedbuff(tmp_path / "run", at_work=AT_WORK, stale={("hungary", 7): 4, ("cleveland", 4): 3})
    curves = {curve.name: [at for at, value, _ in curve.points if value is not None] for curve in site_curves(read_run(folder))}
    assert curves["hungary"] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12], "round 7's answer is of the model after round 2"
    assert curves["cleveland"] == [5, 6, 8, 9, 10, 11, 12], "round 4's is of the random one"
    stored = json.loads((folder / "rounds.jsonl").read_text().splitlines()[6])
    told = next(curve for curve in site_curves(read_run(folder)) if curve.name == "hungary")
    [seventh] = [site for site in stored["sites"] if site["name"] == "hungary"]
    assert {at: value for at, value, _ in told.points}[2] == pytest.approx(seventh["metrics"]["auroc"])


@pytest.mark.slow
def test_the_terminal_says_whose_models_the_rows_are(command: Command, tmp_path: Path) -> None:
    table = {"name": "own", "task": "breast-cancer", "rounds": {"count": 1}, "strategy": {"name": "ditto"}, "privacy": {"unit": "none"}}
    (tmp_path / "own.toml").write_text(Study.from_table({**table, "federation": {"sites": 2}, "evaluation": {"bootstrap": 0}}).to_toml())
    alone = command("simulate", "own.toml", "--baselines")
    assert alone.code == 0, alone.err
    rows = [line.split("  ")[0] for line in alone.out.splitlines()]
    assert {"each site's own, federated", "each site's own, alone", "all data pooled"} <= set(rows)
    assert "on its own test patients, federated and alone. These models stay at the sites" in alone.out


def test_strategies_judged_in_two_ways_are_not_put_side_by_side_without_a_word() -> None:
    assert beside_own_models(["fedavg", "ditto", "ditto", "fedper"]).startswith("With ditto, fedper each site’s own model is judged")
    assert beside_own_models(["fedavg", "krum", "fedbuff"]) == ""


@pytest.mark.parametrize(("key", "short"), [("strategy.name", "strategy"), ("training.batch_size", "batch_size"), ("seed", "seed"), ("name", "name")])
def test_a_setting_is_called_as_in_a_sweep_s_file(key: str, short: str) -> None:
    assert short_setting(key) == short


def test_a_shipped_study_can_be_begun_from_as_a_file(command: Command, tmp_path: Path) -> None:
    shown = command("study", "show", "breast-cancer", "--epsilon", "1", "--toml")
    (tmp_path / "mine.toml").write_text(shown.out)
    mine = Study.load(tmp_path / "mine.toml")
    assert mine.privacy.epsilon == 1.0 and mine.to_toml() == shown.out
    assert command("study", "show", "breast-cancer", "--toml", "--json").code == 2
