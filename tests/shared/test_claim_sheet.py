"""The claim sheet says what the code does: unit, sampling, who is covered, and what is not."""

import pytest

from shared.claim import across_sites, privacy_claim
from shared.privacy import PrivacyEvent, epsilon_of
from shared.results import PrivacyClaim, RunPrivacy, SitePrivacy
from shared.study import Study


def study(**privacy: object) -> Study:
    return Study.from_table({"name": "s", "task": "t", "rounds": {"count": 4}, "privacy": {"epsilon": 3.0, "delta": 1e-5, **privacy}})


def spent(noise: float, *, steps: int = 100, rate: float = 0.1, **changes: object) -> SitePrivacy:
    epsilon = epsilon_of([PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps)], 1e-5)
    values = {
        "epsilon": epsilon,
        "delta": 1e-5,
        "noise_multiplier": noise,
        "sample_rate": rate,
        "steps": steps,
        "epsilon_cross_check": epsilon * 1.001,
    }
    return SitePrivacy.model_validate({**values, **changes})


def claim(asked: Study, *, seeded: bool = False, **sites: SitePrivacy) -> PrivacyClaim:
    unit = asked.privacy.unit
    return privacy_claim(asked, RunPrivacy(unit=unit, seeded_noise=seeded, sites=sites), dict.fromkeys(sites, 200), {"wardround": "0"})


def test_disjoint_patients_have_the_worst_sites_promise() -> None:
    made = claim(study(), north=spent(2.0), south=spent(1.5))
    assert made.federation is not None and made.federation.basis == "maximum, patients are disjoint by declaration"
    assert made.federation.epsilon == made.sites["south"].epsilon > made.sites["north"].epsilon
    assert "if hospitals share no patients" in made.statement and "no patient is known to two sites (the study declares it)" in made.assumed


def test_shared_patients_have_the_composition_of_all_sites() -> None:
    made = claim(study(patients_overlap=True), north=spent(2.0), south=spent(1.5))
    assert made.federation is not None and made.federation.basis == "composition, patients may be shared"
    events = [PrivacyEvent(noise_multiplier=noise, sample_rate=0.1, steps=100) for noise in (2.0, 1.5)]
    assert made.federation.epsilon == epsilon_of(events, 1e-5) > made.sites["south"].epsilon
    assert made.federation.epsilon < made.sites["south"].epsilon + made.sites["north"].epsilon
    assert "known to any number of the sites" in made.statement and not any("two sites" in line for line in made.assumed)


def test_two_hospitals_at_three_that_share_a_patient() -> None:
    from shared.privacy import solve_noise_multiplier

    noise = solve_noise_multiplier(epsilon=3.0, delta=1e-5, sample_rate=0.05, steps=500)
    site = spent(noise, steps=500, rate=0.05)
    both = across_sites({"a": site, "b": site}, overlap=True)
    assert both is not None and both.epsilon == pytest.approx(4.39, abs=0.03)
    assert across_sites({}, overlap=True) is None


@pytest.mark.parametrize(
    ("privacy", "said", "unsaid"),
    [
        ({}, "one record of each sampled patient, drawn anew", "mean gradient"),
        ({"records_per_patient": "all"}, "the mean gradient over all records of each sampled patient", "drawn anew"),
        ({"unit": "record"}, "every training record independently", "patient"),
    ],
)
def test_sampling_is_as_the_study_has_it(privacy: dict[str, object], said: str, unsaid: str) -> None:
    made = claim(study(**privacy), north=spent(2.0))
    assert said in (made.sampling or "") and unsaid not in (made.sampling or "")


def test_the_mechanism_is_the_one_on_a_grid() -> None:
    made = claim(study(max_grad_norm=0.5), north=spent(2.0))
    assert "L2 norm 0.5" in (made.mechanism or "") and "rounded to a public grid" in (made.mechanism or "")
    assert any("Box-Muller" in line for line in made.assumed) and not any("low bits" in line for line in made.not_covered)


def test_evaluation_is_covered_where_it_carries_noise() -> None:
    exact, noised = claim(study(), north=spent(2.0)), claim(study(evaluation_epsilon=2.0), north=spent(2.0))
    assert any("exact sums, without noise" in line for line in exact.not_covered) and exact.evaluation_epsilon is None
    assert not any("exact sums" in line for line in noised.not_covered) and noised.evaluation_epsilon == 2.0
    assert any("epsilon 2 for any one test patient" in line for line in noised.covered)


def test_a_run_that_stopped_early_promises_its_whole_plan() -> None:
    whole, half = spent(2.0), spent(2.0, steps=50, epsilon_planned=spent(2.0).epsilon)
    made = claim(study(), north=half)
    assert made.sites["north"].epsilon_planned == whole.epsilon > made.sites["north"].epsilon
    assert "the promise that holds whatever made it stop is the whole plan's" in made.statement
    assert "whatever made it stop" not in claim(study(), north=spent(2.0, epsilon_planned=whole.epsilon)).statement


def test_choosing_among_runs_is_not_covered_and_priced() -> None:
    [line] = [line for line in claim(study(), north=spent(2.0)).not_covered if "choosing among several runs" in line]
    assert "privacy epsilon --event 2,0.1,100 --delta 1e-05 --best-of 10" in line


def test_the_tighter_accountant_is_named() -> None:
    pld = spent(2.0)
    site = spent(2.0, epsilon=pld.epsilon * 0.999, accountant="prv", epsilon_cross_check=pld.epsilon, cross_check_accountant="pld")
    made = claim(study(), north=site).sites["north"]
    assert (made.accountant, made.cross_check_accountant, made.epsilon_cross_check) == ("prv", "pld", pld.epsilon)


def test_seeded_noise_protects_nobody() -> None:
    made = claim(study(), seeded=True, north=spent(2.0))
    assert not made.protects and "protects nobody" in made.statement and made.sites["north"].noise_source == "seeded"


@pytest.mark.parametrize("lie", [{"noise_multiplier": 0.0}, {"sample_rate": 7.0}, {"steps": 10**18}])
def test_a_site_that_lies_spoils_its_number_and_not_the_sheet(lie: dict[str, object]) -> None:
    honest, liar = spent(2.0), spent(2.0).model_copy(update=lie)
    made = claim(study(patients_overlap=True), north=honest, south=liar)
    assert made.federation is not None
    assert (made.federation.epsilon, made.federation.delta) == (honest.epsilon + liar.epsilon, 2e-5)  # basic composition


def test_no_update_and_no_privacy() -> None:
    nothing = claim(study())
    assert nothing.federation is None and nothing.statement == "No site sent an update, so nothing was spent."
    public = claim(study().replace(privacy={"unit": "none"}))
    assert (public.unit, public.protects, public.federation, public.covered) == ("none", False, None, [])


def test_a_printed_bound_is_never_below_the_number() -> None:
    made = claim(study(), north=spent(2.0, epsilon=2.9911))
    assert "(3, 1e-05)" in made.statement or "(3.0, 1e-05)" in made.statement


def test_an_older_claim_sheet_still_reads() -> None:
    table = claim(study(), north=spent(2.0)).model_dump(mode="json")
    for key in ("assumed", "federation", "evaluation_epsilon"):
        del table[key]
    for key in ("accountant", "cross_check_accountant", "epsilon_planned"):
        del table["sites"]["north"][key]
    assert PrivacyClaim.model_validate(table).federation is None
