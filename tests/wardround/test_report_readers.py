"""The reports for other readers: the same content on page and in JSON, bounds that are bounds, nothing invented, and what was measured by attack."""

import base64
import hashlib
import importlib.metadata
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from server.run_folder import RunFolder
from shared.attacks import Attack, CanaryAudit, InversionAttack, MembershipAttack, PoisoningAttack, add_attacks
from shared.audit import AuditLog
from shared.certificates import fingerprint_of, read_certificate
from shared.errors import ConfigurationError, KitError, StorageError
from shared.kit import CA_CERTIFICATE, MANIFEST, RUNS, SERVER_CERTIFICATE, SIGNING_KEY, STATE, load_signing_key
from shared.results import FederationClaim, PairedTest, Result, SubgroupResult
from tests.provisioned import approved
from tests.wardround.conftest import Command
from tests.wardround.test_report import BROWSER_ARGUMENTS, CHROMIUM, HOSTILE, SAMPLES, MadeUp, build_run, outline, page_of
from wardround.claim_in_words import claim_sections
from wardround.report import write_report
from wardround.report.attacks import bound_curve
from wardround.report.document import Reader
from wardround.report.ethics import coin_guessed, recognised
from wardround.report.markdown import escape
from wardround.report.png import picture_array, png
from wardround.report.run_files import read_run
from wardround.report.tables import gain_table
from wardround.report.task_facts import read_task_facts
from wardround.report.tripod import GAP, PARTS, tripod_items
from wardround.report.wording import higher_is_better, lower_bound
from wardround.run import Run

READERS: tuple[Reader, ...] = ("researcher", "ethics", "it-security", "model-card")
DEPLOYED = MadeUp(synthetic=False, seeded_noise=False)
PICTURE = np.linspace(0, 1, 48).reshape(6, 8)


def canary(*, found: float = 1.0, claimed: float | None = 3.0) -> CanaryAudit:
    """An audit that found so much."""
    return CanaryAudit(
        canary="gradient", site="va-long-beach", seed=0, canaries=1000, guesses=400, correct=260, steps=142, noise_multiplier=1.0, sample_rate=0.14,
        delta=1e-4, epsilon_lower=found, epsilon_lower_fdp=found, epsilon_claimed=claimed,
    )  # fmt: skip


ATTACKS: list[Attack] = [
    canary(),
    MembershipAttack(
        method="lira", seed=0, members=300, non_members=150, num_shadows=16, auroc=0.571, auroc_ci95=(0.53, 0.61), tpr_at_fpr={"0.001": 0.004, "0.01": 0.023},
        roc=[(0.0, 0.0), (0.01, 0.023), (0.5, 0.6), (1.0, 1.0)], epsilon_claimed=3.0,
    ),
    InversionAttack(
        protection="none", seed=0, num_records=1, psnr=27.5, ssim=0.91, originals=[PICTURE.tolist()], reconstructions=[np.stack([PICTURE] * 3, axis=2).tolist()]
    ),
    PoisoningAttack(
        method="backdoor", strategy="fedavg", seed=0, sites=4, attackers=1, metric="auroc", clean=0.84, attacked=0.83, trigger_success=0.96,
        trigger_success_clean=0.1,
    ),
]  # fmt: skip


@pytest.fixture(name="usual")
def _usual(tmp_path: Path) -> Path:
    return build_run(tmp_path / "usual", SAMPLES["usual"])


def texts(value: object) -> Iterator[str]:
    """Every sentence and cell of a report's JSON, without keys, drawings and addresses."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("kind", "id", "series", "schema_version", "reader"):
                yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def report_of(folder: Path, reader: Reader) -> tuple[str, dict[str, object]]:
    """Page and JSON."""
    path = write_report(folder, reader)
    return path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def flat(text: str) -> str:
    """With every run of white space as one space."""
    return " ".join(text.split())


# All readers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["usual", "hostile", "several-classes", "interrupted"])
def test_page_is_self_contained_and_says_what_its_json_says(tmp_path: Path, name: str, reader: Reader) -> None:
    folder = build_run(tmp_path / name, SAMPLES[name])
    add_attacks(folder, ATTACKS)
    page, content = report_of(folder, reader)
    parsed = outline(page)
    assert parsed.open == [] and "script" not in parsed.tags
    assert "://" not in page and "default-src 'none'" in page
    assert HOSTILE not in page
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(parsed.ids) and len(parsed.ids) == len(set(parsed.ids))
    assert not re.search(r"\b(NaN|nan|Infinity|None|Undefined)\b", parsed.text)
    assert content["reader"] == reader and content["run"] == name
    if reader != "researcher":  # whose page has words of its own
        shown = flat(parsed.text + " ".join(re.findall(r'alt="([^"]*)"', page)))
        assert [text for text in texts(content) if flat(text) not in shown] == []


@pytest.mark.slow
def test_banners_stand_on_every_page(usual: Path) -> None:
    for reader in READERS:
        page, content = report_of(usual, reader)
        assert "SYNTHETIC patients" in page and "Seeded noise: this run protects nobody" in page
        assert len(content["notices"]) == 2  # type: ignore[arg-type]  # a list


@pytest.mark.slow
def test_a_reader_asks_for_one_command(usual: Path, command: Command) -> None:
    outcome = command("report", str(usual), "--for", "ethics", "--json")
    assert outcome.code == 0
    assert outcome.data["report"] == str(usual / "report-ethics.html")
    assert outcome.data["content"] == json.loads((usual / "report-ethics.json").read_text())
    assert command("report", str(usual), "--for", "nobody").code == 2


@pytest.mark.slow
def test_a_sweep_has_a_report_for_researchers_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text('name = "small"\nstudy = "breast-cancer"\n[grid]\nrounds = [1]\n')
    assert command("sweep", "small.toml", "--out", "sweeps").code == 0
    [sweep] = (tmp_path / "sweeps").iterdir()
    (sweep / "report.html").unlink()
    outcome = command("report", sweep, "--json")
    assert outcome.data["report"] == str(sweep / "report.html") and (sweep / "report.html").is_file()
    assert outcome.data["content"]["title"] == "small"  # type: ignore[index]  # a dict
    assert command("report", sweep, "--for", "ethics").code == 3


def test_a_damaged_attacks_file_is_named(usual: Path) -> None:
    (usual / "attacks.json").write_text("[]")
    with pytest.raises(StorageError, match=r"attacks\.json"):
        write_report(usual)


# Few patients --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positives", "marked"), [(9, True), (10, False)])
def test_under_ten_of_a_class_is_descriptive_only(usual: Path, positives: int, marked: bool) -> None:
    table = json.loads((usual / "result.json").read_text())
    table["per_site_support"] = {site: {"no disease": 40, "disease": 40} for site in table["per_site_support"]}
    table["per_site_support"]["hungary"]["disease"] = positives
    (usual / "result.json").write_text(json.dumps(table))
    page = page_of(usual)
    assert page.count('<small class="mark">descriptive only</small>') == (2 if marked else 0)  # sites, and gains
    row = re.search(r'<th scope="row"><span>hungary</span></th>.*?</tr>', page[page.index('id="sites"') :], re.S)
    assert row is not None and ("descriptive only" in row[0]) == marked
    assert ("“Descriptive only”: fewer than ten" in page) == marked


def test_the_worst_site_is_sought_among_those_with_enough_patients(usual: Path) -> None:
    table = json.loads((usual / "result.json").read_text())
    names = list(table["per_site"])
    for rank, name in enumerate(names):
        table["per_site"][name]["auroc"] = 0.5 + rank / 10
        table["per_site_support"][name] = {"no disease": 40, "disease": 3 if rank == 0 else 40}
    table["metrics"]["federated"]["auroc"] = 0.75
    (usual / "result.json").write_text(json.dumps(table))
    text = outline(report_of(usual, "model-card")[0]).text
    assert f"Worst site: {names[1]}, AUROC 0.600" in text
    assert "0.150 from that of all sites together. 1 site with fewer than ten" in text


def test_where_lower_is_better_the_best_site_is_not_called_the_worst_nor_a_gain_a_loss(usual: Path) -> None:
    """By what the task declares, which the result says, whatever the metric is called."""
    text = (usual / "result.json").read_text().replace('"auroc', '"perplexity')
    table = json.loads(text) | {"higher_is_better": {"perplexity": False}}
    names = list(table["per_site"])
    for rank, name in enumerate(names):
        table["per_site"][name]["perplexity"] = 10.0 + rank
        table["per_site_support"][name] = {"no disease": 40, "disease": 40}
        table["per_site_baselines"]["local_only"][name]["perplexity"] = 20.0
    table["metrics"]["federated"]["perplexity"] = 11.0
    (usual / "result.json").write_text(json.dumps(table))
    assert f"Worst site: {names[-1]}, Perplexity {10 + len(names) - 1:.1f}" in outline(report_of(usual, "model-card")[0]).text
    page = page_of(usual)
    assert "Lower Perplexity is better." in outline(page).text
    gains = gain_table(read_run(usual))
    assert gains is not None and {row.cells[2].css for row in gains.table.rows} == {"gain"} and gains.better == len(names)


def test_a_result_of_an_older_version_still_knows_the_usual_errors(usual: Path) -> None:
    older = read_run(with_result(usual, higher_is_better={})).result
    assert [higher_is_better(older, name) for name in ("auroc", "mae", "brier", "c_index")] == [True, False, False, True]


def with_result(folder: Path, **changes: object) -> Path:
    """The run, its result changed."""
    result = Result.model_validate_json((folder / "result.json").read_bytes())
    (folder / "result.json").write_text(result.model_copy(update=changes).model_dump_json())
    return folder


def test_no_test_is_claimed_for_a_change_at_one_site_where_none_was_made(usual: Path) -> None:
    assert "was not tested in this run" in outline(page_of(usual)).text


def test_the_test_of_each_site_is_shown_for_all_of_them_together(usual: Path) -> None:
    sites = list(read_run(usual).result.per_site_baselines["local_only"])
    chances = {site: 0.2 / (place + 1) for place, site in enumerate(sites)}
    gains = {site: PairedTest(difference=0.01, p_value=chance, num_test=50, resamples=500) for site, chance in chances.items()}
    text = outline(page_of(with_result(usual, per_site_gains={"local_only": gains}))).text
    assert "p (Holm)" in text and "Holm 1979" in text and "not tested" not in text
    least = min(chances.values())
    assert f"{least * len(sites):.3f}" in text


def test_groups_are_shown_with_their_gap_and_few_patients_are_not(usual: Path) -> None:
    def group(auroc: float, *support: int) -> SubgroupResult:
        return SubgroupResult(
            num_test=sum(support),
            support={"absent": support[0], "present": support[1]},
            metrics={"auroc": auroc},
            ci95={"auroc": (auroc - 0.05, auroc + 0.05)},
        )

    groups = {"female": group(0.81, 60, 30), "male": group(0.88, 50, 40), "other": group(0.95, 30, 3)}
    hidden = SubgroupResult(num_test=None, support={}, metrics={}, ci95={})
    folder = with_result(usual, subgroups={"sex": {**groups, "not known": hidden}})
    for text in (outline(page_of(folder)).text, outline(write_report(folder, "model-card").read_text()).text):
        assert "0.070 between groups" in text and "0.810 (female) to 0.880 (male)" in text  # the small one is no part of the gap
        assert "not told" in text and "fewer than ten" in text and "descriptive only" in text
    assert "this run stored nothing by subgroup" not in write_report(folder, "model-card").read_text()


# Ethics --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 2.995, 8.0, 15.0])
def test_what_can_be_guessed_is_what_the_extreme_mechanism_gives_away(epsilon: float, delta: float) -> None:
    """With chance delta it tells the truth and says so, else it answers truly with chance e^eps / (1 + e^eps): (epsilon, delta)-private, and no less."""
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    right = delta + (1 - delta) * keep
    assert 100 * right <= float(coin_guessed(epsilon, delta)) + 1e-9 <= 100 * right + 0.2
    flagged = min(1.0, 0.01 / ((1 - delta) * (1 - keep)))  # of those of whom it says "in" without being sure, so many are named
    assert 100 * (delta + (1 - delta) * keep * flagged) <= float(recognised(epsilon, delta)) + 1e-9


@pytest.mark.slow
def test_where_hospitals_share_patients_the_promise_is_of_all_of_them(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", SAMPLES["usual"])
    alone = read_run(folder)
    claim = alone.claim
    assert claim is not None
    composed = FederationClaim(epsilon=7.5, delta=4e-4, basis="composition, patients may be shared")
    (folder / "privacy.json").write_text(claim.model_copy(update={"federation": composed}).model_dump_json())
    (folder / "study.toml").write_text(alone.study.replace(privacy={"patients_overlap": True}).to_toml())
    text = flat(outline(write_report(folder, "ethics").read_text()).text)
    assert f"at most {coin_guessed(7.5, 4e-4)} times in 100" in text and "what all of them spent counts for each" in text
    worst = max(site.epsilon for site in alone.result.privacy.sites.values())
    assert f"at most {coin_guessed(worst, 1e-4)} times in 100" not in text


@pytest.mark.slow
def test_ethics_says_the_promise_of_every_site_and_every_tested_sentence(usual: Path) -> None:
    text = flat(outline(report_of(usual, "ethics")[0]).text)
    run = read_run(usual)
    for name in run.result.privacy.sites:
        assert f"For any one patient of {name} (n = " in text
    assert text.count(f"guesses the coin rightly at most {coin_guessed(2.985, 1e-4)} times in 100") == 4
    assert "with fresh noise the same study would promise" in text
    for section in claim_sections(run):
        assert all(flat(sentence) in text for sentence in section.sentences), section.title
    assert run.study.purpose in text


@pytest.mark.slow
def test_ethics_of_real_noise_sets_no_condition(tmp_path: Path) -> None:
    text = outline(report_of(build_run(tmp_path / "run", DEPLOYED), "ethics")[0]).text
    assert "with fresh noise" not in text and "The promise:" in text


def test_ethics_without_privacy_promises_nothing(tmp_path: Path) -> None:
    text = outline(report_of(build_run(tmp_path / "run", SAMPLES["several-classes"]), "ethics")[0]).text
    assert "No patient was promised anything" in text and "Nobody is protected by this run." in text
    assert "guesses the coin" not in text


@pytest.mark.slow
def test_ethics_says_what_was_measured_or_that_nothing_was(usual: Path) -> None:
    before = outline(report_of(usual, "ethics")[0]).text
    assert "No attack was carried out on this run" in before and "wardround attack" in before
    add_attacks(usual, ATTACKS)
    after = outline(report_of(usual, "ethics")[0]).text
    assert "No attack was carried out" not in after
    assert "260 of 400 guesses were right" in after and "epsilon is therefore at least 1; promised is at most 3." in after
    assert "told 300 patients who were from 150 who were not" in after and "57.1 of 100 pairs" in after
    assert "something is wrong" not in after
    add_attacks(usual, [canary(found=3.5)])
    assert "That is more than is promised: something is wrong" in outline(report_of(usual, "ethics")[0]).text


@pytest.mark.slow
def test_a_run_that_stopped_early_is_held_to_its_whole_plan(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", SAMPLES["interrupted"])
    table = json.loads((folder / "result.json").read_text())
    for site in table["privacy"]["sites"].values():
        site |= {"epsilon": 1.0, "epsilon_planned": 2.0}
    (folder / "result.json").write_text(json.dumps(table))
    delta = next(iter(table["privacy"]["sites"].values()))["delta"]
    assert f"at most {coin_guessed(2.0, delta)} times in 100" in flat(outline(report_of(folder, "ethics")[0]).text)


# Attacks -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attacks_stand_on_the_researchers_page_alone_where_there_are_any(usual: Path) -> None:
    assert 'id="attacks"' not in page_of(usual)
    add_attacks(usual, ATTACKS)
    page = page_of(usual)
    text = outline(page).text
    assert "Measured by attack" in text and "≥ 1" in text and "within" in text
    assert "ROC on logarithmic axes" in text and "most that epsilon 3 allows" in text
    assert "at most 0.201" in text  # e^3 / 100 + 1e-4, rounded up
    assert "too few others" in text  # 150 of them cannot show one in a thousand
    assert "27.5 dB" in text and "backdoor against fedavg" in text


def test_an_audit_above_the_promise_is_marked(usual: Path) -> None:
    add_attacks(usual, [canary(found=3.0004)])
    page = page_of(usual)
    assert "above the promise" in page
    assert "≥ 3<" in page  # a lower bound is rounded down


def test_lower_bounds_are_rounded_down() -> None:
    assert [lower_bound(value) for value in (1.2349, 0.0, 1e-5, None, math.inf)] == ["1.234", "0", "0", "–", "–"]


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_drawn_bound_is_the_roc_curve_of_randomised_response(epsilon: float) -> None:
    """Randomised response attains the bound: its corner lies on it, and no threshold on its answers above."""
    curve = bound_curve(epsilon, 0.0)
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    rates, powers = np.array(curve).T
    assert (np.diff(rates) > 0).all() and (np.diff(powers) >= 0).all() and (powers >= rates - 1e-12).all()
    best = np.interp(rates, [0, 1 - keep, 1], [0, keep, 1])  # its ROC curve
    assert (powers >= best - 1e-9).all()
    assert np.abs(powers - best).min() < 1e-9


def test_pictures_are_the_arrays(usual: Path) -> None:
    add_attacks(usual, ATTACKS)
    addresses = re.findall(r'src="data:image/png;base64,([^"]+)"', page_of(usual))
    grey, colour = (matplotlib.image.imread(io.BytesIO(base64.b64decode(address)), format="png") for address in addresses)
    assert np.abs(grey - PICTURE).max() <= 0.5 / 255 + 1e-6
    assert colour.shape == (6, 8, 3) and np.abs(colour - PICTURE[:, :, None]).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 8, 1), (6, 8)])
def test_channels_may_stand_first_or_last(shape: tuple[int, ...]) -> None:
    array = picture_array(PICTURE.reshape(shape).tolist())
    assert array is not None and array.shape == (6, 8)
    assert matplotlib.image.imread(io.BytesIO(png(array)), format="png").shape == (6, 8)


@pytest.mark.parametrize("values", [[], [[1, 2], [3]], [[math.nan]], 3.0, [[["a"]]], np.zeros((2, 5, 7)).tolist()])
def test_what_is_no_picture_is_left_out(values: object) -> None:
    assert picture_array(values) is None


# IT security ---------------------------------------------------------------------------------------------------------------------


def facts_of(content: dict[str, object], section: str) -> dict[str, str]:
    """Name and value of all facts of a section."""
    sections = content["sections"]
    assert isinstance(sections, list)
    blocks = next(part for part in sections if part["id"] == section)["blocks"]
    return {fact["name"]: fact["value"] for block in blocks if block["kind"] == "facts" for fact in block["facts"]}


def with_model(folder: Path) -> Path:
    """The run with a final model of 17 numbers."""
    (folder / "model").mkdir()
    run = RunFolder.open(folder)
    header = {"study": "heart-disease", "study_hash": run.study.fingerprint(), "task": "heart-disease", "architecture": "ab" * 32}
    run.write_model("final", {"weight": np.zeros((1, 16), dtype=np.float32), "bias": np.zeros(1, dtype=np.float32)}, header)
    return folder


def test_of_a_simulation_what_it_does_not_have_is_absent(usual: Path) -> None:
    page, content = report_of(with_model(usual), "it-security")
    text = outline(page).text
    assert text.count("Absent: this was a simulation.") == 4  # ports, TLS, certificates, the coordinator's log
    identity = facts_of(content, "identity")
    model = (usual / "model" / "final.safetensors").read_bytes()
    assert identity["Final model (SHA-256)"] == hashlib.sha256(model).hexdigest()
    assert identity["Final model, size"] == f"{len(model)} bytes, 17 numbers"
    assert identity["Study hash (SHA-256)"] == identity["Study hash in the model’s header"] == Run(usual).study.fingerprint()
    assert "another model than the run" in identity["Task fingerprint (SHA-256)"]  # the header above names no architecture of ours
    for path in ("result.json", "privacy.json", "model/final.safetensors"):
        assert hashlib.sha256((usual / path).read_bytes()).hexdigest() in text


def test_a_package_is_hashed_where_its_version_is_the_runs(usual: Path) -> None:
    table = json.loads((usual / "privacy.json").read_text())
    table["versions"] = {"numpy": importlib.metadata.version("numpy"), "torch": "0.0.1", "no-such-package": "1"}
    (usual / "privacy.json").write_text(json.dumps(table))
    text = outline(report_of(usual, "it-security")[0]).text
    record = importlib.metadata.distribution("numpy").read_text("RECORD")
    assert record is not None and hashlib.sha256(record.encode()).hexdigest() in text
    assert "is installed here" in text and "not installed here" in text


@pytest.fixture(name="deployed")
def _deployed(tmp_path: Path) -> Path:
    """A run in a coordinator's kit with one approved site and an audit log."""
    kit = approved(tmp_path, ["north"]) / "coordinator"
    folder = build_run(kit / RUNS / "heart", DEPLOYED)
    table = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(table | {"engine": "flower"}))
    (kit / STATE / "witness").mkdir(parents=True)
    (kit / STATE / "witness" / "heads.json").write_text(json.dumps({"north": "cd" * 32}))
    AuditLog(kit / STATE / "audit.jsonl", owner="tests", role="coordinator", signer=load_signing_key(kit / SIGNING_KEY)).append(
        "study begun", {"run": "heart"}
    )
    return folder


def test_of_a_deployment_ports_certificates_and_anchors_are_those_of_the_kit(deployed: Path) -> None:
    kit = deployed.parents[1]
    page, content = report_of(deployed, "it-security")
    text = outline(page).text
    for name in (CA_CERTIFICATE, SERVER_CERTIFICATE):
        certificate = read_certificate(kit / name)
        assert fingerprint_of(certificate) in text and f"{certificate.not_valid_after_utc:%Y-%m-%d}" in text
    assert "8443" in text and "coordinator.example.org:8443" in text and "TLS_AES_256_GCM_SHA384 (TLSv1.3)" in text
    assert "TLS_RSA" not in text and "ECDHE-RSA" not in text  # the coordinator's key is elliptic
    last = json.loads((kit / STATE / "audit.jsonl").read_text().splitlines()[-1])
    assert facts_of(content, "audit")["Head (SHA-256 of the last row)"] == last["hash"]
    assert "cd" * 32 in text and "Absent: this" not in text
    assert "PRIVATE KEY" not in page


def test_an_altered_log_does_not_verify_and_an_altered_kit_is_refused(deployed: Path) -> None:
    kit = deployed.parents[1]
    log = kit / STATE / "audit.jsonl"
    log.write_text(log.read_text().replace('"run":"heart"', '"run":"other"'))
    assert "The log does not verify" in outline(report_of(deployed, "it-security")[0]).text
    (kit / MANIFEST).write_text((kit / MANIFEST).read_text().replace("8443", "8444"))
    with pytest.raises(KitError):
        write_report(deployed, "it-security")


@pytest.mark.slow
def test_a_copy_of_a_deployed_run_says_where_the_rest_is(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", DEPLOYED)
    table = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(table | {"engine": "flower"}))
    assert "away from the coordinator’s kit" in outline(report_of(folder, "it-security")[0]).text
    ethics = outline(report_of(folder, "ethics")[0]).text
    assert "an approval given there allowed this very study" in ethics and "nothing left any hospital" not in ethics


# Model card ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["usual", "hostile", "several-classes", "interrupted"])
def test_the_header_is_yaml_with_the_results_numbers(tmp_path: Path, name: str) -> None:
    yaml = pytest.importorskip("yaml")
    folder = build_run(tmp_path / name, SAMPLES[name])
    text = write_report(folder, "model-card").with_suffix(".md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    card = yaml.safe_load(header)
    result = Result.model_validate_json((folder / "result.json").read_text())
    assert "license" not in card and "datasets" not in card  # nobody told the run
    assert ("differential-privacy" in card["tags"]) == (result.privacy.unit != "none")
    assert ("synthetic-data" in card["tags"]) == result.synthetic
    if result.metrics["federated"]:
        [entry] = card["model-index"][0]["results"]
        assert entry["task"]["name"] == result.task_title
        found = {metric["name"]: metric["value"] for metric in entry["metrics"]}
        assert found["Accuracy"] == pytest.approx(result.metrics["federated"]["accuracy"], abs=1e-4)
    else:
        assert "model-index" not in card
    assert "<script>" not in body
    assert body.count("| --- |") >= 2


def test_markdown_takes_no_name_for_mark_up() -> None:
    assert escape("a|b\n<i> *c* `d` [e](f)") == r"a\|b \<i\> \*c\* \`d\` \[e\](f)"


def test_tripod_has_27_items_and_gaps_where_the_run_knows_nothing(usual: Path) -> None:
    run = read_run(usual)
    items = {item.part: item.answer for item in tripod_items(run, read_task_facts(run))}
    assert len(PARTS) == len(items) == 52
    assert {int(re.sub("[a-g]", "", part)) for part in items} == set(range(1, 28))
    assert all(items[part] == "" for part in ("3a", "5b", "6b", "18a", "18b", "18d", "19", "25"))  # nobody can know these from a run
    assert "age" in items["9b"] and "Synthetic" in items["5a"]
    page, _ = report_of(usual, "model-card")
    assert page.count(f'class="gap">{GAP}') == sum(answer == "" for answer in items.values())


def test_a_task_that_is_not_here_leaves_gaps_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign.py").write_text("raise SystemExit('a report ran the code that a study names')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = build_run(tmp_path / "run", MadeUp(task="foreign:task"))
    run = read_run(folder)
    items = {item.part: item.answer for item in tripod_items(run, read_task_facts(run))}
    assert items["8a"] == items["9b"] == items["11"] == ""
    assert "foreign" not in sys.modules
    assert "neither installed here nor a schema file" in report_of(folder, "model-card")[0]


def test_a_kind_of_a_task_of_ours_is_told_of(tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path / "run", MadeUp(task="shared.tasks.breast_cancer:normalised")))
    facts = read_task_facts(run)
    assert facts.why_absent == "" and facts.predictors[0].name == "mean radius" and "LayerNorm" in facts.model


# Exports -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")])
def test_an_export_without_its_package_says_how_to_get_it(usual: Path, monkeypatch: pytest.MonkeyPatch, to: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError) as raised:
        Run(usual).export(to, usual / "export")  # type: ignore[arg-type]  # one of the two
    assert raised.value.remedy == f"pip install {to}"


def test_an_unknown_target_is_refused(usual: Path) -> None:
    with pytest.raises(ConfigurationError, match="'tensorboard', 'mlflow'"):
        Run(usual).export("csv", usual / "export")  # type: ignore[arg-type]  # as a user may
    assert not (usual / "export").exists()


@pytest.mark.filterwarnings("ignore")  # of somebody else's packages
def test_tensorboard_reads_back_the_history(usual: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(usual)
    events = reading.EventAccumulator(str(run.export("tensorboard", usual / "export")))
    events.Reload()
    rounds = RunFolder.open(usual).rounds()
    assert [(event.step, event.value) for event in events.Scalars("metrics/auroc")] == [
        (record.round, pytest.approx(record.metrics["auroc"])) for record in rounds
    ]
    assert events.Scalars("epsilon/hungary")[-1].value == pytest.approx(rounds[-1].sites[1].epsilon)
    assert events.Scalars("final/federated/auroc")[0].value == pytest.approx(run.metrics["federated"]["auroc"])
    missing = [event.step for event in events.Scalars("sites/hungary/auroc")]
    assert missing == [1, 2, 3, *range(5, 13)]  # it was absent in round 4


@pytest.mark.filterwarnings("ignore")  # of somebody else's packages
def test_mlflow_reads_back_the_history(usual: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    run = Run(usual)
    client = tracking.MlflowClient(f"sqlite:///{run.export('mlflow', usual / 'export')}")
    [stored] = client.search_runs([client.get_experiment_by_name("heart-disease").experiment_id])
    assert stored.data.params["rounds.count"] == "12" and stored.info.status == "FINISHED"
    history = client.get_metric_history(stored.info.run_id, "metrics/auroc")
    assert {metric.step: metric.value for metric in history} == {record.round: record.metrics["auroc"] for record in RunFolder.open(usual).rounds()}


# In a browser --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: apt-get install chromium")
def test_in_a_browser_every_page_is_quiet_fits_and_prints(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    addresses = []
    for name in ("usual", "hostile", "many"):
        folder = build_run(tmp_path / name, SAMPLES[name])
        add_attacks(folder, ATTACKS)
        addresses += [write_report(folder, reader).as_uri() for reader in READERS]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=BROWSER_ARGUMENTS)
        try:
            for address in addresses:
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                said: list[str] = []
                asked: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(address)
                for width in (1280, 400):
                    page.set_viewport_size({"width": width, "height": 900})
                    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), (address, width)
                assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
                assert (said, [url for url in asked if not url.startswith("data:")]) == ([], [address])
                assert page.pdf().startswith(b"%PDF")
                page.close()
        finally:
            browser.close()
