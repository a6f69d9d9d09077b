"""`wardround sweep`, its report, and what a sweep would cost on real patients."""

import contextlib
import json
from pathlib import Path

import pytest

from client.ledger import PlannedStudy, check_filter
from shared.errors import BudgetExhaustedError
from shared.plan import Limit, plan_site
from shared.privacy import epsilon_of
from shared.study import Study
from tests.wardround.conftest import Command
from wardround.report.sweep_page import sweep_document, write_sweep_report
from wardround.sweep_cost import cells_at, cost_of
from wardround.sweeping import SweepRun, sweep

CHROMIUM = Path("/usr/bin/chromium")
BASE = """
name = "base"
task = "breast-cancer"
rounds = { count = 1 }
training = { learning_rate = 0.5 }
privacy = { epsilon = 3.0, delta = 1e-4 }
federation = { sites = 2 }
"""
SWEEP = """
name = "tried"
study = "base.toml"
[grid]
epsilon = [1, 4, "none"]
seed = [1, 2]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def done(files: Path) -> SweepRun:
    return sweep(files / "sweep.toml", out=files / "runs", processes=1)


@pytest.mark.slow  # trains several studies
def test_the_command_runs_resumes_and_prints_one_envelope(command: Command, files: Path) -> None:
    first = command("sweep", str(files / "sweep.toml"), "--processes", "1", "--json")
    data = json.loads(first.out)["data"]
    assert first.code == 0 and (data["cells"], data["ok"], data["failed"]) == (6, 6, [])
    assert "cell 1/6" in first.err and "mean ± standard deviation" in first.err
    assert Path(data["table"]).is_file() and (Path(data["sweep_dir"]) / "report.html").is_file()
    again = command("sweep", str(files / "sweep.toml"), "--resume", "--json")
    assert json.loads(again.out)["data"]["sweep_dir"] == data["sweep_dir"] and "6 of them done before" in again.err


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_command_exits_1(command: Command, files: Path) -> None:
    (files / "sweep.toml").write_text(SWEEP.replace('epsilon = [1, 4, "none"]\nseed = [1, 2]', "sites = [9000, 2]"))
    outcome = command("sweep", str(files / "sweep.toml"), "--processes", "1")
    assert outcome.code == 1 and "1 cell failed: 1." in outcome.out and "E303" in outcome.out


@pytest.mark.parametrize(
    ("text", "told"), [(SWEEP.replace("epsilon", "epsilonn"), "epsilonn"), (SWEEP.replace('"base.toml"', '"absent.toml"'), "absent")]
)
def test_what_is_no_sweep_exits_3(command: Command, files: Path, text: str, told: str) -> None:
    (files / "sweep.toml").write_text(text)
    outcome = command("sweep", str(files / "sweep.toml"))
    assert outcome.code == 3 and told in outcome.err and not (files / "runs").exists()


@pytest.mark.slow  # trains several models
def test_the_report_shows_utility_by_epsilon_beside_what_it_is_compared_with(done: SweepRun) -> None:
    document = sweep_document(done._folder)
    titles = [section.title for section in document.sections]
    assert titles == ["Utility", "Privacy"] and "6 of 6 runs done, at 3 settings" in document.lead
    figure, table, _ = document.sections[0].blocks
    assert set(figure.series) == {
        "Federated", "One site alone, private", "All data in one place, private",
        "Federated, no privacy", "One site alone, no privacy", "All data in one place, no privacy",
    }  # fmt: skip
    assert [x for x, _ in figure.series["Federated"]] == [1.0, 4.0] and "PLD" in figure.note and "seeded" in figure.note
    assert [row.name for row in table.table.rows] == ["epsilon 1", "epsilon 4", "epsilon none"]
    burned, needed = document.sections[1].blocks
    assert [key.text.partition(":")[0] for key in burned.figure.keys] == ["budget 1", "budget 4"] and "Noise" in needed.title
    assert len(done.table) == 6 and set(done.table["privacy.epsilon"]) == {"1.0", "4.0", "none"}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: apt-get install chromium")
def test_in_a_browser_the_report_asks_for_nothing_and_prints(done: SweepRun, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    address = write_sweep_report(done.path).as_uri()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=["--no-sandbox"])
        try:
            for width in (1280, 400):
                page = browser.new_page(viewport={"width": width, "height": 900})
                said: list[str] = []
                asked: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(address)
                assert said == [] and [url for url in asked if not url.startswith("data:")] == [address]
                assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), width
                assert page.pdf().startswith(b"%PDF")
                page.close()
        finally:
            browser.close()


@pytest.mark.slow
def test_explain_says_what_the_sweep_would_cost_on_real_patients(command: Command, files: Path) -> None:
    outcome = command("privacy", "explain", str(files / "sweep.toml"), "--patients", "200", "--json")
    [site] = json.loads(outcome.out)["data"]["sites"]
    events = [plan_site(Study.load(files / "base.toml").replace(privacy={"epsilon": epsilon}), 200).study_event() for epsilon in (1, 1, 4, 4)]
    assert (site["private"], site["others"]) == (4, 2)
    assert site["all_runs"] == pytest.approx(epsilon_of(events, 1e-4)) and site["dearest"] == pytest.approx(epsilon_of([events[-1]], 1e-4))
    assert site["dearest"] < site["all_runs"] and site["dearest"] < site["best_of"]
    assert site["limit"] > site["all_runs"] and site["evaluation"] is None
    for epsilon, admitted in ((site["limit"], True), (site["limit"] * 0.998, False)):
        studies = [PlannedStudy(run="", study="s", study_hash="", training=event, evaluation=None) for event in events]
        with contextlib.nullcontext() if admitted else pytest.raises(BudgetExhaustedError):
            check_filter(None, Limit(epsilon=epsilon, delta=1e-4), studies)
    assert "2 runs of them promise nothing" in outcome.err and "baselines" in outcome.err
    assert command("privacy", "explain", str(files / "sweep.toml")).code == 3


@pytest.mark.slow
def test_one_more_run_never_costs_less(files: Path) -> None:
    _, cells = cells_at(files / "sweep.toml")
    costs = [cost_of(cells[:count], 200) for count in range(1, 5)]
    for name in ("dearest", "all_runs", "best_of", "limit"):
        values = [getattr(cost, name) for cost in costs]
        assert values == sorted(values)
