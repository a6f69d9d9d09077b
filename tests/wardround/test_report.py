"""The report: complete, self-contained, escaped, honest about what is absent; and readable in a real browser."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.errors import StorageError
from shared.metrics import BINARY_METRICS, NUM_BINS, SCORE_HISTOGRAM, bin_of_score, bootstrap_interval, confusion_metrics, finish_metrics
from shared.results import PrivacyClaim, Result, RoundRecord, RunPrivacy, SiteClaim, SitePrivacy, SiteRound, SiteSummary, StoredStatistics, Timing
from shared.study import Study
from wardround.report import write_report

HOSTILE = "<script>alert(1)</script>"
CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "link", "br", "hr", "img", "input"}
SHAPES = {"rect", "circle", "line", "path"}


# A run's folder, made up ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """A run that never was: plausible numbers, from which every file of its folder follows."""

    sites: Sequence[str] = ("cleveland", "hungary", "switzerland", "va-long-beach")
    rounds: int = 12
    folds: int = 1
    epsilon: float | None = 3.0
    task: str = "heart-disease"
    outcome: str = "completed"
    synthetic: bool = True
    seeded_noise: bool = True
    baselines: bool = True
    classes: int = 2
    one_class: Sequence[str] = ()
    absent: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)  # (site, round) -> status and reason
    seed: int = 3

    def study(self) -> Study:
        """The study that was run."""
        privacy = {"unit": "none"} if self.epsilon is None else {"unit": "patient", "epsilon": self.epsilon}
        table = {"name": "heart-disease", "task": self.task, "purpose": "Risk of coronary disease at four hospitals", "privacy": privacy}
        return Study.from_table({**table, "rounds": {"count": self.rounds}, "evaluation": {"folds": self.folds}})

    def size(self, site: str) -> int:
        """Patients of a site."""
        return 80 + 37 * (list(self.sites).index(site) % 7)

    def statistic(self, site: str, skill: float) -> dict[str, np.ndarray]:
        """What the site's test patients say of a model of this skill (distance of the two classes in logit)."""
        rng = np.random.default_rng([self.seed, list(self.sites).index(site), round(skill * 1000)])
        num_test = round(self.size(site) * 0.3)
        if self.classes > 2:
            true = rng.integers(0, self.classes, num_test)
            predicted = np.where(rng.random(num_test) < skill / 3, true, rng.integers(0, self.classes, num_test))
            matrix = np.zeros((self.classes, self.classes))
            np.add.at(matrix, (true, predicted), 1)
            return {"confusion": matrix}
        positive = np.zeros(num_test, dtype=int) if site in self.one_class else (rng.random(num_test) < 0.45).astype(int)
        score = 1 / (1 + np.exp(-(rng.normal(0, 1.2, num_test) + skill * (positive - 0.5))))
        histogram = np.zeros((2, NUM_BINS))
        np.add.at(histogram, (positive, bin_of_score(score)), 1)
        return {"score_histogram": histogram}

    def metrics(self, statistic: dict[str, np.ndarray]) -> dict[str, float | None]:
        """Every metric of a sum."""
        return finish_metrics(BINARY_METRICS if self.classes == 2 else confusion_metrics(self.classes), statistic)

    def interval(self, statistic: dict[str, np.ndarray], name: str) -> tuple[float, float] | None:
        """The metric's interval."""
        found = BINARY_METRICS if self.classes == 2 else confusion_metrics(self.classes)
        metric = next(metric for metric in found if metric.name == name)
        return bootstrap_interval(metric, statistic[metric.statistic.name], resamples=60, rng=np.random.default_rng(1))

    @property
    def primary(self) -> str:
        """The primary metric."""
        return "auroc" if self.classes == 2 else "accuracy"


def build_run(folder: Path, made: MadeUp) -> Path:
    """All files of the run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _files(made).items():
        (folder / name).write_text(text.replace(NAMELESS, folder.name) if name == "result.json" else text, encoding="utf-8")
    return folder


_made: dict[str, dict[str, str]] = {}  # by the run's repr: many tests begin from the same one
NAMELESS = "the run of no folder"


def _files(made: MadeUp) -> dict[str, str]:
    """Name and text of each file; the run is called `NAMELESS`."""
    if repr(made) not in _made:
        records = [_round(made, fold, number) for fold in range(1, made.folds + 1) for number in range(1, made.rounds + 1)]
        result = _result(made, NAMELESS, records)
        _made[repr(made)] = {
            "study.toml": made.study().to_toml(),
            "rounds.jsonl": "".join(record.model_dump_json() + "\n" for record in records),
            "result.json": result.model_dump_json(),
            "privacy.json": _claim(made, result).model_dump_json(),
            "evaluation.json": _stored(made).model_dump_json(),
        }
    return _made[repr(made)]


def _skill(made: MadeUp, number: int, site: str = "") -> float:
    return 2.4 * (1 - np.exp(-number / 4)) + 0.15 * (len(site) % 3)


def _total(made: MadeUp, skill: float) -> dict[str, np.ndarray]:
    parts = [made.statistic(site, skill) for site in made.sites]
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def _epsilon(made: MadeUp, number: int) -> float | None:
    return None if made.epsilon is None else made.epsilon * 0.995 * (number / (made.rounds * made.folds)) ** 0.6


def _round(made: MadeUp, fold: int, number: int) -> RoundRecord:
    lines = []
    for site in made.sites:
        status, reason = made.absent.get((site, number), ("ok", None))
        values = made.metrics(made.statistic(site, _skill(made, number - 1, site) + 0.1 * fold)) if status == "ok" else None
        spent = _epsilon(made, number + made.rounds * (fold - 1))
        lines.append(SiteRound(name=site, status=status, reason=reason, num_test=round(made.size(site) * 0.3), metrics=values, epsilon=spent))
    total = _total(made, _skill(made, number - 1) + 0.1 * fold)
    interval = {made.primary: made.interval(total, made.primary)}
    return RoundRecord(
        round=number, fold=fold, evaluated_round=number - 1, sites=tuple(lines), metrics=made.metrics(total), metrics_ci95=interval, seconds=0.41
    )


SOURCES = {"federated": 2.4, "local_only": 1.7, "pooled": 2.7, "local_only_private": 1.0, "pooled_private": 2.2}


def _stored(made: MadeUp) -> StoredStatistics:
    sources = SOURCES if made.baselines else {"federated": 2.4}
    return StoredStatistics(sources={name: {k: v.tolist() for k, v in _total(made, skill).items()} for name, skill in sources.items()})


def _result(made: MadeUp, name: str, records: list[RoundRecord]) -> Result:
    done = made.outcome == "completed"
    totals = {source: _total(made, skill) for source, skill in SOURCES.items()} if done else {}
    kept = {source: total for source, total in totals.items() if made.baselines or source == "federated"}
    metrics = {source: made.metrics(kept[source]) if source in kept else {} for source in SOURCES}
    ci95 = {source: {m: made.interval(total, m) for m in metrics[source]} for source, total in kept.items() if not source.startswith("local")}
    alone = {site: made.metrics(made.statistic(site, 1.7)) for site in made.sites}
    spent = _epsilon(made, made.rounds * made.folds)
    return Result(
        run=name, study="heart-disease", task=made.task, task_title=made.task, notes={"records_dropped": 2, "values_imputed": 31},
        engine="in-process", seed=7, outcome=made.outcome, synthetic=made.synthetic,
        sites=[_summary(made, site) for site in made.sites], rounds_completed=made.rounds, primary_metric=made.primary,
        metrics=metrics, metrics_ci95=ci95, per_site={site: _site_values(made, site) for site in made.sites} if done else {},
        per_site_support={site: {"no disease": 20, "disease": 11} for site in made.sites} if done and made.classes == 2 else {},
        per_site_baselines={"local_only": alone} if made.baselines and done else {},
        folds=[made.metrics(_total(made, 2.3 + 0.1 * fold)) for fold in range(1, made.folds + 1)] if made.folds > 1 and done else [],
        privacy=RunPrivacy(
            unit="none" if spent is None else "patient", seeded_noise=made.seeded_noise and spent is not None,
            sites={} if spent is None else {site: _spent(made, site, spent) for site in made.sites},
        ),
        timing=Timing(total_seconds=42.3, seconds_per_round=[record.seconds for record in records]),
    )  # fmt: skip


def _site_values(made: MadeUp, site: str) -> dict[str, object]:
    statistic = made.statistic(site, 2.4)
    values: dict[str, object] = dict(made.metrics(statistic))
    return {**values, "num_test": round(made.size(site) * 0.3), **{f"{m}_ci95": made.interval(statistic, m) for m in values}}


def _summary(made: MadeUp, site: str) -> SiteSummary:
    size = made.size(site)
    names = ["no disease", "disease"] if made.classes == 2 else [str(index) for index in range(made.classes)]
    shares = [1.0, 0.0] if site in made.one_class else [1 + (index + len(site)) % 3 for index in range(made.classes)]
    counts = [round(size * share / sum(shares)) for share in shares]
    return SiteSummary(
        name=site,
        num_patients=size,
        num_train=size - round(size * 0.3),
        num_test=round(size * 0.3),
        classes=dict(zip(names, counts, strict=True)),
    )


def _spent(made: MadeUp, site: str, epsilon: float) -> SitePrivacy:
    return SitePrivacy(
        epsilon=epsilon,
        delta=1e-4,
        noise_multiplier=1.3172,
        sample_rate=32 / made.size(site),
        steps=7 * made.rounds,
        epsilon_cross_check=epsilon * 0.998,
    )


def _claim(made: MadeUp, result: Result) -> PrivacyClaim:
    private = result.privacy.unit != "none"
    sites = {
        name: SiteClaim(**site.model_dump(include=set(SiteClaim.model_fields)), declared_size=made.size(name), noise_source="seeded")
        for name, site in result.privacy.sites.items()
    }
    return PrivacyClaim(
        unit=result.privacy.unit,
        neighbouring_relation="add or remove one patient of a site's training patients" if private else None,
        mechanism="DP-SGD: gradients of each unit clipped to L2 norm 1, summed, Gaussian noise added" if private else None,
        sampling="Poisson: every training patient independently in every step" if private else None,
        composition="privacy loss distributions composed numerically over all steps" if private else None,
        statement="The noise of this simulation was seeded and can be drawn again." if private else "This run promises no differential privacy.",
        protects=private and not result.privacy.seeded_noise,
        covered=["the model updates that each site sent"] if private else [],
        not_covered=["numbers of patients at each site", "evaluation metrics on test patients: exact sums, without noise"],
        accountants=["dp-accounting PLD (add/remove one)", "Opacus PRV (cross-check)"] if private else [],
        sites=sites,
        versions={"flwr": "1.41.0", "torch": "2.13.0", "opacus": "1.6.0", "dp-accounting": "0.6.0", "numpy": "2.4.0"},
    )


MANY = MadeUp(
    sites=tuple(f"hospital-{index:02d}" for index in range(1, 51)),
    rounds=60,
    absent={
        **{("hospital-07", number): ("missing", "E801 A site's answer did not come before the deadline.") for number in (3, 4, 5, 20)},
        **{("hospital-19", number): ("failed", "E101 The site's own code failed; its log says why.") for number in range(30, 61)},
        **{("hospital-33", number): ("refused", "E700 A ledger has no room left for what was asked.") for number in range(50, 61)},
        **{("hospital-40", number): ("not asked", None) for number in range(1, 61, 3)},
    },
)
SAMPLES = {
    "usual": MadeUp(absent={("hungary", 4): ("missing", "E801 A site's answer did not come before the deadline.")}),
    "many": MANY,
    "hostile": MadeUp(sites=(HOSTILE, "a-very-long-name-of-a-hospital-that-somebody-wanted-spelt-out-in-full"), task=f'x"{HOSTILE}'),
    "one": MadeUp(sites=("alone",), rounds=1, baselines=False),
    "folds": MadeUp(folds=3),
    "several-classes": MadeUp(classes=4, epsilon=None, synthetic=False),
    "one-class": MadeUp(one_class=("switzerland",), synthetic=False, seeded_noise=False),
    "interrupted": MadeUp(outcome="interrupted", rounds=5),
}


@pytest.fixture(name="usual")
def _usual(tmp_path: Path) -> Path:
    return build_run(tmp_path / "usual", SAMPLES["usual"])


def page_of(folder: Path) -> str:
    """The report's text."""
    return write_report(folder).read_text(encoding="utf-8")


# What is on the page -------------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Keeps open tags to see that each is closed in order; collects text, tags and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES, f"<{tag}/> is open for HTML"
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += data


def outline(page: str) -> Outline:
    """The page, parsed to its end."""
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_page_is_well_formed_self_contained_and_names_every_site(tmp_path: Path, name: str) -> None:
    page = page_of(build_run(tmp_path / name, SAMPLES[name]))
    parsed = outline(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(site in parsed.text for site in SAMPLES[name].sites)
    assert not re.search(r"\b(NaN|nan|inf|Infinity|None|Undefined)\b", parsed.text)
    assert not re.search(r"(?<![a-z])(NaN|nan|inf|None)(?![a-z])", " ".join(re.findall(r'="([^"]*)"', page)))
    assert "://" not in page
    assert "script" not in parsed.tags
    assert "default-src 'none'" in page


def test_links_lead_to_sections(usual: Path) -> None:
    page = page_of(usual)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(outline(page).ids)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    page = page_of(build_run(tmp_path / "run", SAMPLES["hostile"]))
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert HOSTILE in outline(page).text


@pytest.mark.slow
def test_banners_say_what_protects_nobody(tmp_path: Path) -> None:
    page = page_of(build_run(tmp_path / "both", SAMPLES["usual"]))
    assert "SYNTHETIC patients" in page
    assert "Seeded noise: this run protects nobody; it is a simulation" in page
    plain = page_of(build_run(tmp_path / "neither", SAMPLES["one-class"]))
    assert "SYNTHETIC" not in plain
    assert "Seeded noise" not in plain
    assert "No privacy promise" in page_of(build_run(tmp_path / "none", SAMPLES["several-classes"]))


def test_key_numbers_are_those_of_the_result(usual: Path) -> None:
    text = outline(page_of(usual)).text
    result = Result.model_validate_json((usual / "result.json").read_text())
    low, high = result.metrics_ci95["federated"]["auroc"] or (0, 0)
    assert f"{result.metrics['federated']['auroc']:.3f}" in text
    assert f"[{low:.3f}, {high:.3f}]" in text
    assert "2.985" in text  # epsilon of the highest site
    assert "budget 3" in text
    assert f"{sum(site.num_patients for site in result.sites):,}" in text


def test_learning_curve_ends_with_the_final_model(usual: Path) -> None:
    page = page_of(usual)
    final = Result.model_validate_json((usual / "result.json").read_text()).metrics["federated"]["auroc"]
    assert f"<title>after round 12: {final:.3f}" in page
    assert "<title>after round 1: " in page
    assert "<title>after round 0: " not in page


def test_the_json_beside_the_page_holds_the_curves(usual: Path) -> None:
    result = Result.model_validate_json((usual / "result.json").read_text())
    content = json.loads(write_report(usual).with_suffix(".json").read_text(encoding="utf-8"))
    blocks = {section["id"]: section["blocks"] for section in content["sections"]}
    series = blocks["training"][0]["series"]
    assert series["All sites together"][-1] == [12, result.metrics["federated"]["auroc"]]
    assert set(series) == {"All sites together", *(site.name for site in result.sites)}
    [roc, calibration, risk] = blocks["model"]
    assert roc["series"]["Federated"][0] == [0, 0] and roc["series"]["Federated"][-1] == [1, 1]
    assert len(calibration["series"]["Federated"]) >= 2
    assert sum(int(row["cells"][0]["text"].replace(",", "")) for row in risk["rows"]) == sum(site["num_test"] for site in result.per_site.values())
    assert [row["name"] for row in blocks["sites"][0]["rows"]] == [site.name for site in result.sites]


@pytest.mark.slow
def test_absent_sites_are_named_with_rounds_and_reason(tmp_path: Path) -> None:
    text = outline(page_of(build_run(tmp_path / "run", MANY))).text
    assert "missing in rounds 3–5, 20: E801 A site's answer did not come before the deadline." in text
    assert "failed in rounds 30–60: E101" in text
    assert "refused in rounds 50–60: E700" in text
    assert "20 times a site was not asked" in text


@pytest.mark.slow
def test_all_present_is_said(tmp_path: Path) -> None:
    assert "Every site that was asked gave an update in every round." in page_of(build_run(tmp_path / "run", SAMPLES["folds"]))


def test_site_of_one_class_is_not_applicable(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", SAMPLES["one-class"])
    row = re.search(r'<th scope="row"><span>switzerland</span></th>.*?</tr>', page_of(folder)[page_of(folder).index('id="sites"') :], re.S)
    assert row is not None
    assert row[0].count("n/a (one class)") == 2  # AUROC and AUPRC; accuracy, Brier and calibration have values
    assert "NaN" not in row[0]


def test_non_finite_numbers_are_dashes(usual: Path) -> None:
    table = json.loads((usual / "result.json").read_text())
    table["per_site"]["hungary"]["accuracy"] = float("nan")
    table["per_site"]["hungary"]["auroc_ci95"] = [float("nan"), float("inf")]
    (usual / "result.json").write_text(json.dumps(table))
    page = page_of(usual)
    assert "NaN" not in page
    assert not re.search(r"\bnan\b|\binf\b", outline(page).text)


@pytest.mark.parametrize(("name", "sentence"), [("privacy.json", "wrote no claim sheet"), ("evaluation.json", "stored no evaluation")])
def test_a_missing_file_is_a_sentence(usual: Path, name: str, sentence: str) -> None:
    assert sentence not in page_of(usual)
    (usual / name).unlink()
    assert sentence in outline(page_of(usual)).text


def test_statistics_that_cannot_be_drawn_are_left_out(usual: Path) -> None:
    stored = {"schema_version": 1, "sources": {"federated": {"score_histogram": [[1, 2], [3]], "errors": [1, 2, 3, 4, 5]}}}
    (usual / "evaluation.json").write_text(json.dumps(stored))
    assert "nothing from which a curve" in outline(page_of(usual)).text


def test_metrics_with_noise_are_said_to_carry_it(usual: Path) -> None:
    """No interval, no curve of the federated model, no count of patients by class, and no claim that a class is missing."""
    exact = outline(page_of(usual)).text
    assert "carry noise" not in exact
    table = json.loads((usual / "result.json").read_text())
    table |= {"evaluation_epsilon": 1.5, "per_site_support": {}}
    table["metrics_ci95"]["federated"] = dict.fromkeys(table["metrics_ci95"]["federated"])
    for row in table["per_site"].values():
        row |= {name: None for name in row if name.endswith("_ci95")}
    table["per_site"]["hungary"]["auroc"] = None  # noise has wiped a class out
    (usual / "result.json").write_text(json.dumps(table))
    stored = json.loads((usual / "evaluation.json").read_text())
    stored["sources"] = {"federated": stored["sources"]["federated"]}
    (usual / "evaluation.json").write_text(json.dumps(stored))
    page = page_of(usual)
    text = outline(page).text
    assert text.count("The sites’ statistics carry noise that protects their test patients (epsilon 1.5)") == 2  # beside the result, and the sites'
    assert "with noise; no interval" in text
    assert "statistics carry noise, from which no curve is drawn" in text and "ROC curve" not in text
    assert "n/a (one class)" not in text and "its noised statistics do not determine it" in text
    assert "Below the test patients, by class" not in text
    assert "A change holds the noise of the federation’s metrics." in text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", SAMPLES["interrupted"])
    text = outline(page_of(folder)).text
    assert "This run was interrupted." in text
    assert "The last model evaluated before the run ended" in text
    (folder / "rounds.jsonl").unlink()
    assert "No round was completed." in outline(page_of(folder)).text


def test_torn_last_line_is_ignored_and_a_damaged_one_is_not(usual: Path) -> None:
    whole = page_of(usual)
    with (usual / "rounds.jsonl").open("ab") as file:
        file.write('{"round": 13, "fold": 1, "reason": "é'.encode()[:-1])
    assert page_of(usual) == whole
    lines = (usual / "rounds.jsonl").read_bytes().split(b"\n")
    (usual / "rounds.jsonl").write_bytes(b"\n".join([lines[0][:40], *lines[1:]]))
    with pytest.raises(StorageError, match="line 1 is damaged"):
        write_report(usual)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"found no result\.json"):
        write_report(tmp_path)


def test_folds_and_confusion_have_their_tables(tmp_path: Path) -> None:
    folds = outline(page_of(build_run(tmp_path / "folds", SAMPLES["folds"]))).text
    assert all(f"Fold {fold}" in folds for fold in (1, 2, 3))
    classes = outline(page_of(build_run(tmp_path / "classes", SAMPLES["several-classes"]))).text
    assert "Confusion matrix, Federated" in classes
    assert "predicted 3" in classes


def test_the_report_depends_on_the_files_alone(usual: Path) -> None:
    assert page_of(usual) == page_of(usual)


def test_meaning_of_epsilon_bounds_every_test() -> None:
    from shared.privacy import attack_power

    assert attack_power(0.0, 0.0, 0.01) == pytest.approx(0.01)
    assert attack_power(1.0, 1e-4, 0.01) == pytest.approx(np.e * 0.01 + 1e-4)
    assert attack_power(60.0, 0.0, 0.01) <= 1
    for epsilon in (0.1, 1.0, 3.0, 8.0):  # randomised response attains the region's corner and never passes its border
        keep = np.exp(epsilon) / (1 + np.exp(epsilon))
        assert attack_power(epsilon, 0.0, 1 - keep) == pytest.approx(keep)


@pytest.mark.slow
def test_rendering_imports_nothing_heavy(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", MANY)
    heavy = "{'torch', 'pandas', 'matplotlib', 'scipy', 'flwr', 'ray', 'opacus'} & set(sys.modules)"
    code = f"import sys, pathlib; from wardround.report import write_report; write_report(pathlib.Path(sys.argv[1])); assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parents[2])


def test_statistic_shape_is_the_metrics() -> None:
    assert SAMPLES["usual"].statistic("hungary", 1.0)["score_histogram"].shape == SCORE_HISTOGRAM.shape


# In a browser --------------------------------------------------------------------------------------------------------------------

BROWSER_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: apt-get install chromium")
@pytest.mark.parametrize("name", SAMPLES)
def test_in_a_browser_nothing_is_asked_for_and_nothing_overflows(tmp_path: Path, name: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    address = write_report(build_run(tmp_path / name, SAMPLES[name])).as_uri()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=BROWSER_ARGUMENTS)
        try:
            for width in (1280, 400):
                page = browser.new_page(viewport={"width": width, "height": 900}, java_script_enabled=True)
                said: list[str] = []
                asked: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(address)
                assert said == []
                assert [url for url in asked if not url.startswith("data:")] == [address]
                assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), width
                assert page.evaluate("[...document.querySelectorAll('svg.plot')].every(svg => svg.getBoundingClientRect().width > 150)")
                page.close()
        finally:
            browser.close()
