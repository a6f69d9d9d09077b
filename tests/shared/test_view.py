"""What may be said of an epsilon, by how a study's updates leave: every sentence is of the one place that decides it."""

import dataclasses

import pytest

from shared.claim import privacy_claim, shared_noise
from shared.clipped_updates import LINE, clipped_updates
from shared.errors import ConfigurationError
from shared.results import RunPrivacy, SitePrivacy
from shared.study import Study
from shared.view import View
from shared.whole_promise import rounded_up

PRIVATE, NONE = {"epsilon": 3.0, "delta": 1e-4}, {"unit": "none"}
DISTRIBUTED = {"noise": "distributed", "sites": 5, "missing": 1}


def study(privacy: dict[str, object], secure: dict[str, object] | None) -> Study:
    table = {
        "name": "s",
        "task": "t",
        "training": {"local_steps": 1},
        "privacy": privacy,
        **({} if secure is None else {"secure_aggregation": secure}),
    }
    return Study.from_table(table)


KINDS = {
    "plain": study(NONE, None),
    "masked": study(NONE, {}),
    "local": study(PRIVATE, None),
    "local, masked": study(PRIVATE, {}),
    "distributed": study(PRIVATE, DISTRIBUTED),
}


def sentences(view: View) -> str:
    texts = [
        view.condition,
        view.against,
        view.evidence,
        view.attacker,
        view.released,
        view.leaving(", 513 numbers"),
        view.in_short,
        view.remark,
        view.plainly,
    ]
    return " | ".join([*texts, view.steps("patient"), view.bounds("patient"), view.size(1.6, "patient")])


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_say_what_leaves_and_to_whom(kind: str) -> None:
    view = View.of(KINDS[kind])
    assert view.masked == (kind in ("masked", "local, masked", "distributed"))
    assert view.shared == (kind == "distributed") == ("share of the noise" in view.leaving(""))
    assert ("without noise" in view.leaving("")) == (view.noise == "none") == ("WITHOUT NOISE" in view.in_short)
    assert ("under masks" in view.leaving("")) == view.masked == ("under masks" in view.in_short)
    assert ("as it is" in view.plainly) == (not view.masked)
    assert bool(view.remark) == bool(view.against) == view.shared


def test_of_sums_nothing_is_said_that_is_of_each_update() -> None:
    view = View.of(KINDS["distributed"])
    for said in ("every update", "each update", "noise added at the hospital", "random noise in proportion", "the noise was"):
        assert said not in sentences(view)
    assert "as long as no site is in league with the coordinator" in view.against, "who is absent, sites see to"
    assert view.honest == 4 and view.share == 0.5 and "0.5 times it" in view.leaving("") and "0.8 times" in view.size(1.6, "patient")
    assert "in league with no site" in view.attacker
    league = View.of(study(PRIVATE, DISTRIBUTED | {"missing": 1, "colluding": 2}))
    assert "at most 2 of the 5 sites are in league" in league.condition and "with 2 of the 5 sites at most" in league.attacker and league.honest == 2


def test_of_single_updates_nothing_is_said_of_sums_or_shares() -> None:
    for kind in ("local", "local, masked"):
        told = sentences(View.of(KINDS[kind]))
        assert "share of" not in told and "sum of updates" not in told and "every update" in told and "league" not in View.of(KINDS[kind]).attacker


def spent(epsilon: float) -> SitePrivacy:
    return SitePrivacy(epsilon=epsilon, delta=1e-4, noise_multiplier=1.6, sample_rate=0.4, steps=6, epsilon_cross_check=None, epsilon_planned=epsilon)


@pytest.mark.parametrize("kind", KINDS)
def test_the_claim_sheet_follows_it(kind: str) -> None:
    asked = KINDS[kind]
    sites = {"a": spent(3.0), "b": spent(2.0)} if asked.private else {}
    privacy = RunPrivacy(unit=asked.privacy.unit, seeded_noise=False, sites=sites, distributed_noise=shared_noise(asked, sites))
    claim = privacy_claim(asked, privacy, {"a": 80, "b": 80}, {})
    everything = " ".join([claim.statement, claim.mechanism or "", *claim.covered, *claim.not_covered, *claim.assumed])
    view = View.of(asked)
    assert any("SecAgg+" in item for item in claim.assumed) == view.masked
    assert ("holds without this" in everything) == (kind == "local, masked") and ("rests on it" in everything) == view.shared
    assert (claim.distributed_noise is not None) == view.shared == ("distributed noise" in (claim.mechanism or ""))
    if view.shared:
        told = claim.distributed_noise
        assert told is not None and told.condition == view.condition and told.num_sites == 5
        worst = max(site.epsilon_if_all_others_collude for site in told.sites.values())
        assert (
            worst > 3 and "Epsilon 3 is against whoever sees sums" in claim.statement and f"epsilon {rounded_up(worst)} at worst" in claim.statement
        )
        assert "each other hospital counts as one in league" in claim.statement and "in league with any of the 5 sites" in " ".join(claim.not_covered)
        assert "a share alone is 0.5 times that" in (claim.mechanism or "")
    if kind == "masked":
        assert "under masks" in claim.statement and "everything that left" not in everything
    if kind == "plain":
        assert claim.not_covered == ["everything that left the sites"]


def test_a_patient_of_two_sites_is_refused_under_one_noise() -> None:
    """The sum moves at both sites, against one noise: composing the sites' promises, as of releases with a noise each, would say too little."""
    with pytest.raises(ConfigurationError, match="patients_overlap = false"):
        study(PRIVATE | {"patients_overlap": True}, DISTRIBUTED)
    study(PRIVATE | {"patients_overlap": True}, {})


def test_a_log_read_back_tells_sites_and_rounds_once() -> None:
    lines = [LINE % (site, number, 1, clipped, 500, 0.25) for site, number, clipped in (("a", 1, 5), ("b", 1, 400), ("a", 2, 10), ("a", 2, 10))]
    found = clipped_updates([*lines, "site a: an update of 3 of 500 values", "round 1"])
    assert found is not None and dataclasses.astuple(found) == (2, 2, 0.8, 0.25)
    assert "in 2 rounds, 2 sites" in found.sentence and "80 %" in found.sentence and "at 0.25" in found.sentence
    assert clipped_updates(["round 1: 3 of 3 sites"]) is None
