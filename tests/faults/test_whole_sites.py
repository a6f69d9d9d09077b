"""A promise to whole sites among real processes, beside that to patients."""

import json

import pytest

from shared.results import PrivacyClaim, Result
from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow


def test_whole_sites_are_promised_something_in_a_deployment(seeded: Federation) -> None:
    whole = {"site_epsilon": 8.0, "site_delta": 1e-2, "max_site_norm": 0.5}
    run = seeded.submit(study(rounds={"count": 2, "require": "all"}, strategy={"weights": "equal"}, privacy=whole))
    seeded.finished(run)
    folder = seeded.coordinator / "runs" / run
    claim = PrivacyClaim.model_validate_json((folder / "privacy.json").read_text())
    assert claim.unit == "patient" and claim.protects and claim.federation is not None
    assert claim.site_level is not None and claim.site_level.protects and claim.site_level.noise_source == "os"
    assert claim.site_level.rounds == claim.site_level.rounds_planned == 2 and 7.9 < claim.site_level.epsilon <= 8.0
    spent = [json.loads(line)["site_level_epsilon"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert spent == sorted(spent) and len(spent) == 2 and spent[-1] == pytest.approx(claim.site_level.epsilon)
    assert Result.model_validate_json((folder / "result.json").read_text()).privacy.site_level is not None
