"""studies/faulty-site.toml: one of eight hospitals sends NaN every round, and the others lose nothing by it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.run_folder import read_tensors
from shared.results import Result
from shared.study import Study
from simulations.simulate import execute, prepare, start_run
from tests.wardround.conftest import Command
from wardround.studies import shipped_study

BAD, REASON = "site-3", "E102 tensor 0.weight: expected finite values, got NaN or infinity"


def without_the_bad_site(out: Path) -> Path:
    """The run of the seven others, with the same patients, seed and promise; its folder."""
    setting = prepare(Study.load(shipped_study("faulty-site")).replace(faults=None), None)
    assert setting.federation is not None
    others = {name: cohort for name, cohort in setting.federation.cohorts.items() if name != BAD}
    setting = replace(setting, federation=replace(setting.federation, cohorts=others))
    folder = start_run(setting, out)
    execute(setting, folder, baselines=False)
    return folder.path


@pytest.mark.slow
def test_a_site_that_sends_nan_costs_itself_its_rounds_and_nobody_anything(command: Command, tmp_path: Path) -> None:
    told = command("simulate", "faulty-site", "--json")
    assert told.code == 0 and f"{BAD}: failed: {REASON}" in " ".join(told.err.split())
    run, alone = Path(str(told.data["run_dir"])), without_the_bad_site(tmp_path / "alone")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    for line in lines:
        assert {site["name"]: (site["status"], site["reason"]) for site in line["sites"] if site["status"] != "ok"} == {BAD: ("failed", REASON)}
    page = (run / "report.html").read_text()
    assert f"failed in rounds 1–30: {REASON}" in page and "trained together by 7 sites" in page and "Faults were planted" in page
    models = [read_tensors(folder / "model" / "final.safetensors")[1] for folder in (run, alone)]
    for name, value in models[1].items():
        assert np.isfinite(models[0][name]).all()
        np.testing.assert_allclose(models[0][name], value, rtol=1e-3, atol=1e-5)  # blocks of other sites round differently
    results = [Result.model_validate_json((folder / "result.json").read_text()) for folder in (run, alone)]
    with_it, clean = (result.metrics["federated"]["auroc"] for result in results)
    assert with_it is not None and with_it > 0.98 and with_it == pytest.approx(clean, abs=0.01)
    for name in results[1].per_site:
        assert results[0].per_site[name]["num_test"] == results[1].per_site[name]["num_test"]
        assert results[0].per_site[name]["brier"] == pytest.approx(results[1].per_site[name]["brier"], abs=1e-3)
    assert results[0].privacy.sites[BAD].epsilon > 2.9, "it has trained, and was charged, in vain"
