"""The promise to whole sites as a plan: its study, its noise beside the closed form and Flower's accountant, its delta, its words."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from shared.claim import privacy_claim
from shared.errors import ConfigurationError
from shared.results import RunPrivacy, SiteLevelPrivacy, SitePrivacy
from shared.site_level import check_site_delta, default_site_delta, plan_site_level, resolve_site_delta
from shared.strategy_options import SUMS_ALONE, Strategy
from shared.study import Study
from shared.whole_promise import whole_promise

BASE = {"name": "s", "task": "t", "training": {"local_steps": 2}, "strategy": {"weights": "equal"}}
ALONE = {"unit": "site", "epsilon": 8.0, "delta": 1e-3, "max_site_norm": 1.0}
BESIDE = {"epsilon": 3.0, "delta": 1e-4, "site_epsilon": 8.0, "site_delta": 1e-3, "max_site_norm": 1.0}
STRATEGIES = {kind.model_fields["name"].annotation.__args__[0]: kind for kind in get_args(get_args(Strategy)[0])}


def study(privacy: dict[str, object] = ALONE, **changes: object) -> Study:
    return Study.from_table({**BASE, "privacy": privacy, **changes})


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """Balle and Wang 2018, theorem 8, of one Gaussian release of sensitivity 1."""
    mean = 1 / (2 * noise_multiplier)
    return float(norm.cdf(mean - epsilon * noise_multiplier) - math.exp(epsilon) * norm.cdf(-mean - epsilon * noise_multiplier))


# The study ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [ALONE, BESIDE, {**BESIDE, "unit": "record"}, {"unit": "site", "noise_multiplier": 2.0, "max_site_norm": 0.5}])
def test_it_reads_back_equal(privacy: dict[str, object]) -> None:
    made = study(privacy)
    assert made.site_level and made.private == (privacy.get("unit") != "site")
    assert Study.from_table(made.to_table()) == made and Study.from_table(made.to_table()).fingerprint() == made.fingerprint()


def test_a_study_without_it_is_what_it_was() -> None:
    """Studies keep their fingerprint: hospitals approved it."""
    plain = Study.from_table({"name": "s", "task": "t", "privacy": {"epsilon": 3.0, "delta": 1e-4}})
    assert not plain.site_level and plain.to_table()["privacy"] == {
        "unit": "patient", "epsilon": 3.0, "delta": 1e-4, "max_grad_norm": 1.0, "spare_rounds": 0, "patients_overlap": False, "noise_source": "seeded",
        "records_per_patient": "one", "physical_batch_size": 256,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({**ALONE, "max_site_norm": None}, "expected max_site_norm, the L2 norm"),
        ({**BESIDE, "max_site_norm": None}, "expected max_site_norm, the L2 norm"),
        ({"epsilon": 3.0, "max_site_norm": 1.0}, "expected unit 'site' or site_epsilon with max_site_norm"),
        ({"unit": "none", "max_site_norm": 1.0}, "expected unit 'site' or site_epsilon with max_site_norm"),
        (
            {"unit": "none", "max_site_norm": 1.0, "site_epsilon": 1.0},
            "stand beside a promise to patients or records, got unit 'none'; use unit = 'site'",
        ),
        ({**ALONE, "site_epsilon": 1.0}, "got unit 'site'; give epsilon and delta"),
        ({**BESIDE, "site_epsilon": None}, "expected site_epsilon with site_delta"),
        ({**ALONE, "evaluation_epsilon": 1.0}, "promises nothing to single patients, so expected no evaluation_epsilon"),
        ({**ALONE, "epsilon": None}, "expected either epsilon or noise_multiplier, got neither"),
        ({**ALONE, "noise_multiplier": 1.0}, "expected either epsilon or noise_multiplier, got both"),
        ({**ALONE, "max_site_norm": 0.0}, "max_site_norm"),
        ({**ALONE, "delta": 0.1}, "delta"),
    ],
)
def test_what_does_not_fit_is_refused(privacy: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        study({key: value for key, value in privacy.items() if value is not None})


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("privacy", [ALONE, BESIDE], ids=["alone", "beside"])
def test_every_strategy_is_one_of_means_or_refused_with_the_reason(name: str, privacy: dict[str, object]) -> None:
    asked = {"name": name, "weights": "equal"}
    if STRATEGIES[name] in SUMS_ALONE:
        assert study(privacy, strategy=asked).site_level
        return
    with pytest.raises(
        ConfigurationError,
        match=f"strategy {name!r} with a promise to whole sites: expected a strategy of which the coordinator needs the mean alone",
    ):
        study(privacy, strategy=asked)


def test_those_that_are_refused_are_the_ones_that_look_at_single_updates() -> None:
    refused = {name for name, kind in STRATEGIES.items() if kind not in SUMS_ALONE}
    assert refused >= {"median", "trimmed-mean", "krum", "multi-krum", "bulyan", "rfa", "norm-bounding", "q-fedavg", "fednova", "cyclic"}


def test_sites_count_alike() -> None:
    with pytest.raises(ConfigurationError, match="strategy.weights: expected 'equal' with a promise to whole sites"):
        study(strategy={})


def test_under_masks_shares_of_noise_would_be_clipped() -> None:
    assert study(secure_aggregation={}).site_level and study(BESIDE, secure_aggregation={}).site_level
    with pytest.raises(ConfigurationError, match=r"'distributed' with a promise to whole sites: expected noise 'local'"):
        study(BESIDE, training={"local_steps": 1}, secure_aggregation={"noise": "distributed", "sites": 5})


def test_another_unit_takes_the_place_of_the_promise() -> None:
    alone, beside = study(), study(BESIDE)
    for made in (alone, beside):
        plain = made.replace(privacy={"unit": "none"})
        assert not plain.site_level and not plain.private
    patients = alone.replace(privacy={"unit": "patient", "epsilon": 2.0})
    assert patients.private and not patients.site_level and patients.privacy.delta is None  # a hospital's delta is far too large for patients
    sites = beside.replace(privacy={"unit": "site", "epsilon": 5.0, "max_site_norm": 2.0})
    assert sites.site_level and not sites.private and sites.privacy.delta is None and sites.privacy.site_epsilon is None
    assert alone.replace(privacy={"epsilon": 2.0}).privacy.unit == "site"
    assert beside.replace(privacy={"epsilon": 2.0}).privacy.site_epsilon == 8.0


# The noise ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(noise=st.floats(0.5, 20.0), rounds=st.integers(1, 200), delta=st.sampled_from([1e-2, 1e-3, 1e-5]))
def test_epsilon_is_just_above_the_closed_form(noise: float, rounds: int, delta: float) -> None:
    """So many Gaussian releases are one, of as many times less noise squared: Balle and Wang's delta is exact there."""
    plan = plan_site_level(study({"unit": "site", "noise_multiplier": noise, "delta": delta, "max_site_norm": 1.0}, rounds={"count": rounds}))
    assert plan is not None
    whole = noise / math.sqrt(rounds)
    assert gaussian_delta(plan.epsilon, whole) <= delta * (1 + 1e-9)  # an upper bound
    if plan.epsilon > 0.01:
        assert gaussian_delta(plan.epsilon * 0.995, whole) > delta  # within half a per cent


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_the_noise_keeps_the_budget_and_hardly_more(epsilon: float) -> None:
    plan = plan_site_level(study({**ALONE, "epsilon": epsilon}, evaluation={"folds": 2}, rounds={"count": 10}))
    assert plan is not None and plan.releases == 20 and plan.max_norm == 1.0
    assert 0.99 * epsilon < plan.epsilon <= epsilon
    assert plan.epsilon_after(20) == pytest.approx(plan.epsilon, rel=1e-6) and 0 == plan.epsilon_after(0) < plan.epsilon_after(5) < plan.epsilon
    beside = plan_site_level(study({**BESIDE, "site_epsilon": epsilon}, evaluation={"folds": 2}, rounds={"count": 10}))
    assert beside == plan


def test_sampling_sites_is_charged_as_if_all_were_asked() -> None:
    assert plan_site_level(study(strategy={"weights": "equal", "fraction": 0.2})) == plan_site_level(study())


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (2.15, 20), (6.0, 300)])
def test_the_cross_check_is_what_flowers_accountant_says(noise: float, rounds: int) -> None:
    """Flower's own wraps the same Renyi accountant of dp-accounting; ours by loss distributions is tighter."""
    from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod

    config = PrivacyConfig(
        target_delta=1e-3, population_size=40, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )  # fmt: skip
    flowers = RdpAccountant(config)
    flowers.compose(GaussianPrivacyEvent(noise_multiplier=noise, sample_size=40, population_size=40), rounds)
    plan = plan_site_level(study({"unit": "site", "noise_multiplier": noise, "delta": 1e-3, "max_site_norm": 1.0}, rounds={"count": rounds}))
    assert plan is not None
    assert plan.epsilon_cross_check(rounds) == pytest.approx(flowers.get_epsilon(1e-3), rel=1e-9)
    assert plan.epsilon < plan.epsilon_cross_check(rounds)


# Delta ----------------------------------------------------------------------------------------------------------------------------


def test_delta_is_derived_far_below_one_over_the_sites() -> None:
    for sites in (1, 8, 40, 1000, 100_000):
        assert default_site_delta(sites) * sites <= 0.1 and default_site_delta(sites) <= 1e-3
    open_alone, open_beside = ({key: value for key, value in table.items() if key not in ("delta", "site_delta")} for table in (ALONE, BESIDE))
    assert resolve_site_delta(study(open_alone), 8).privacy.delta == 1e-3
    resolved = resolve_site_delta(study({**open_beside, "delta": 1e-4}), 1000).privacy
    assert (resolved.site_delta, resolved.delta) == (1e-4, 1e-4)
    with pytest.raises(ConfigurationError, match="privacy.delta: expected a value by now"):
        plan_site_level(study(open_alone))


def test_a_delta_that_allows_publishing_a_site_is_refused() -> None:
    check_site_delta(0.01, 99)
    with pytest.raises(ConfigurationError, match="privacy.site_delta: expected delta < 1/100 "):
        check_site_delta(0.01, 100)
    with pytest.raises(ConfigurationError, match="privacy.delta: expected delta < 1/1000 "):
        resolve_site_delta(study(), 1000)
    plain = study({"epsilon": 3.0, "delta": 1e-4})
    assert resolve_site_delta(plain, 10**6) is plain


# The claim ------------------------------------------------------------------------------------------------------------------------


def spent(*, rounds: int = 30, planned: int = 30) -> SiteLevelPrivacy:
    plan = plan_site_level(study(rounds={"count": planned}))
    assert plan is not None
    return SiteLevelPrivacy(
        epsilon=plan.epsilon_after(rounds), epsilon_planned=plan.epsilon, delta=plan.delta, noise_multiplier=plan.noise_multiplier,
        max_site_norm=plan.max_norm, rounds=rounds, rounds_planned=plan.releases, epsilon_cross_check=plan.epsilon_cross_check(rounds),
    )  # fmt: skip


def test_the_claim_alone_is_for_sites_and_says_who_is_not_protected() -> None:
    claim = privacy_claim(study(), RunPrivacy(unit="site", seeded_noise=False, sites={}, site_level=spent()), {}, {})
    assert claim.unit == "site" and claim.protects and claim.federation is None and claim.site_level is not None
    assert claim.neighbouring_relation.startswith("zero-out") and "(7.99, 0.001)-differential privacy" in claim.statement
    assert claim.statement.startswith("For any one hospital as a whole, against everybody but the coordinator")
    assert claim.statement.endswith("Nothing is promised to a patient against the coordinator.")
    assert claim.not_covered[0] == "anything against the coordinator, which gets every site's update by itself, without any noise"
    for word in ("evaluation statistics", "refused or was late", "baselines", "added by hand"):
        assert any(word in item for item in claim.not_covered), word
    whole = whole_promise(claim, None)
    assert (whole.unit, whole.epsilon, whole.delta, whole.protects) == ("site", claim.site_level.epsilon, 1e-3, True)


def test_the_claim_beside_keeps_both_promises_apart() -> None:
    site = SitePrivacy(epsilon=2.9, delta=1e-4, noise_multiplier=1.0, sample_rate=0.1, steps=10, epsilon_cross_check=2.95)
    both = privacy_claim(study(BESIDE), RunPrivacy(unit="patient", seeded_noise=False, sites={"a": site}, site_level=spent()), {"a": 100}, {})
    only = privacy_claim(
        study({"epsilon": 3.0, "delta": 1e-4}, strategy={}), RunPrivacy(unit="patient", seeded_noise=False, sites={"a": site}), {"a": 100}, {}
    )
    assert both.model_copy(update={"site_level": None}) == only  # nothing of the promise to patients changes
    assert both.site_level is not None and "Nothing is promised to a patient" not in both.site_level.statement
    assert both.site_level.not_covered[0].endswith("with the noise of the site's own promise to patients")
    assert whole_promise(both, None) == whole_promise(only, None)


def test_the_claim_of_a_simulation_or_a_run_cut_short() -> None:
    seeded = privacy_claim(study(), RunPrivacy(unit="site", seeded_noise=True, sites={}, site_level=spent()), {}, {})
    assert not seeded.protects and "protects no hospital" in seeded.statement and not seeded.site_level.protects
    short = privacy_claim(study(), RunPrivacy(unit="site", seeded_noise=False, sites={}, site_level=spent(rounds=3)), {}, {})
    assert "whatever made the run stop is epsilon 7.99" in short.statement and short.site_level.epsilon < 3
    none = privacy_claim(study(), RunPrivacy(unit="site", seeded_noise=False, sites={}, site_level=spent(rounds=0)), {}, {})
    assert none.statement == "No round was completed, so no model was released and nothing was spent." and none.covered == []
