"""`wardround data check` and `data profile`, as a hospital calls them."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from client.data_profile import Variable
from tests.client.test_data_check import table
from tests.wardround.conftest import Command
from tests.wardround.test_report import BROWSER_ARGUMENTS, CHROMIUM
from wardround.report.profile_page import bars

SCHEMA = """
name = "admissions"
patient = "patient_id"
site = "hospital"
label = { name = "died", type = "binary" }
columns = [
  { name = "age", type = "number", unit = "years", low = 18, high = 110 },
  { name = "glucose", type = "number", unit = "mg/dl", low = 20, high = 600 },
  { name = "temperature", type = "number", unit = "degrees C", low = 30, high = 43, missing = "indicator" },
  { name = "smoker", type = "category", categories = ["never", "past", "now"] },
]
"""
GIVEN = ("--task", "admissions.toml", "--data", "admissions.csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a schema and 200 patients."""
    (tmp_path / "admissions.toml").write_text(SCHEMA)
    table().to_csv(tmp_path / "admissions.csv", index=False)
    return tmp_path


def test_data_that_fit(command: Command, folder: Path) -> None:
    told = command("data", "check", *GIVEN)
    assert told.code == 0 and told.out.splitlines()[-1] == "fits task admissions.toml: nothing to look at"
    data = command("data", "check", *GIVEN, "--json").data
    assert (data["fits"], data["num_patients"], data["num_records"], data["records_dropped"]) == (True, 200, 200, 0)
    assert {finding["level"] for finding in data["findings"]} == {"PASS"}  # type: ignore[attr-defined]


def test_data_that_do_not_fit_are_told_all_at_once_and_exit_5(command: Command, folder: Path) -> None:
    frame = table().rename(columns={"died": "Died?"})
    frame["glucose"] = [f"{float(value) / 18.016:.2f}" for value in frame["glucose"]]
    frame.to_csv(folder / "admissions.csv", index=False)
    told = command("data", "check", *GIVEN)
    assert told.code == 5 and told.out.splitlines()[-1] == "does not fit task admissions.toml: 2 errors, 1 warning"
    assert "fix: rename 'Died?' to 'died'" in told.out and "fix: multiply by 18.02 to have mg/dl" in told.out
    outcome = command("data", "check", *GIVEN, "--json")
    findings = outcome.data["findings"]
    assert outcome.code == 5 and outcome.data["fits"] is False and "num_patients" not in outcome.data
    assert [finding["exit_code"] for finding in findings if finding["level"] == "FAIL"] == [5, 5]  # type: ignore[attr-defined]


def test_warnings_exit_0(command: Command, folder: Path) -> None:
    table(40).to_csv(folder / "admissions.csv", index=False)
    told = command("data", "check", *GIVEN)
    assert told.code == 0 and "WARN  size" in told.out


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--task", "admissions.toml", "--data", "nowhere.csv"), 5, "expected data, found nothing"),
        (("--task", "admissions.toml"), 2, "no data of its own"),
        (("--task", "nothing", "--data", "admissions.csv"), 3, "no task 'nothing'"),
        ((*GIVEN, "--options", "tolerance=0.1"), 3, "no option 'tolerance'"),
        ((*GIVEN, "--options", "tolerance"), 2, "expected KEY=VALUE"),
        (("--task", "admissions.toml", "--data", "admissions.toml"), 3, "unknown key"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "profile"])
def test_what_cannot_be_looked_at(command: Command, folder: Path, verb: str, arguments: tuple[str, ...], code: int, what: str) -> None:
    told = command("data", verb, *arguments)
    assert told.code == code and what in told.out + told.err
    assert command("data", verb, *arguments, "--json").code == code


def test_a_site_file_names_its_cohort_and_its_policy_the_least_cell(command: Command, folder: Path) -> None:
    (folder / "site.toml").write_text(
        'name = "va"\n[cohort]\npath = "admissions.csv"\ndeclared_size = 140\n'
        '[policy]\nmax_epsilon = 3.0\nallowed_tasks = ["admissions"]\nmin_patients = 150\nmin_metric_patients = 25\n'
    )
    told = command("data", "check", "--task", "admissions.toml", "--data", "site.toml")
    assert told.code == 5 and "policy.min_patients = 150" in told.out
    assert command("data", "profile", "--task", "admissions.toml", "--data", "site.toml", "--json").data["min_cell"] == 25


def test_patients_that_come_with_a_task(command: Command) -> None:
    assert command("data", "check", "--task", "breast-cancer", "--json").data["num_patients"] == 569


def test_the_profile_stays_and_the_aggregate_may_go(command: Command, folder: Path) -> None:
    told = command("data", "profile", *GIVEN, "--out", "about us", "--json").data
    page, aggregate = Path(str(told["page"])), Path(str(told["aggregate"]))
    assert [path.name for path in (page, aggregate)] == ["profile.html", "profile-aggregate.json"]
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and stat.S_IMODE(page.parent.stat().st_mode) == 0o700
    text = page.read_text()
    assert "This page describes patients. It must not leave the hospital." in text and "<script" not in text
    assert not any(f"p{index:04d}" in text + aggregate.read_text() for index in range(200)), "no identifier is on either"
    counts = [count for part in json.loads(aggregate.read_text())["distributions"] for cell in part["cells"] for count in [cell["patients"]]]
    assert counts and all(count >= 10 and count % 5 == 0 for count in counts)
    assert command("data", "profile", *GIVEN, "--min-cell", "4").code == 2
    assert command("data", "profile", *GIVEN, "--out", "admissions.csv").code == 1  # no folder


def test_many_sites_are_drawn_as_the_largest_and_the_others() -> None:
    of_site = np.repeat(np.arange(20), np.arange(20, 0, -1))
    site = Variable(name="site", cells=tuple(f"h{index}" for index in range(20)), of_patient=of_site)
    sex = Variable(name="sex", cells=("0", "1"), of_patient=np.arange(len(of_site)) % 2)
    figure = bars(sex, site, sex.by(site), label="a chart")
    assert [key.text for key in figure.keys] == ["h0 (20)", "h1 (19)", "h2 (18)", "h3 (17)", "h4 (16)", "15 others (120)"]
    assert figure.svg.count("<rect") == 2 * 6


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: apt-get install chromium")
@pytest.mark.parametrize("given", [GIVEN, ("--task", "breast-cancer")], ids=["sites", "thirty columns"])
def test_in_a_browser_the_profile_asks_for_nothing_and_nothing_overflows(command: Command, folder: Path, given: tuple[str, ...]) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    address = Path(str(command("data", "profile", *given, "--json").data["page"])).resolve().as_uri()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=BROWSER_ARGUMENTS)
        try:
            for width in (1280, 400):
                page = browser.new_page(viewport={"width": width, "height": 900})
                said: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, said=said: said.append(request.url))
                page.goto(address)
                assert [line for line in said if not line.startswith("data:")] == [address]
                assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), width
        finally:
            browser.close()
