"""The theorem of distributed noise, number by number: what shares come to, how near they are to what is accounted for, and what is added for it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_ndtr, logsumexp
from scipy.stats import norm

from shared.distributed_noise import MORE, TAIL, DistributedNoise, check_room
from shared.errors import ConfigurationError
from shared.plan import SitePlan, plan_site
from shared.privacy import PrivacyEvent, epsilon_if_all_others_collude, epsilon_of
from shared.study import Study

NOISE = DistributedNoise(max_grad_norm=1.0, num_parameters=1000, batch_size=32, sites=50, missing=2)


def study(**changes: object) -> Study:
    table = {
        "name": "s", "task": "breast-cancer", "rounds": {"count": 20}, "training": {"local_steps": 1}, "privacy": {"epsilon": 1.0, "delta": 1e-4},
        "secure_aggregation": {"noise": "distributed", "sites": 5, "missing": 1},
    }  # fmt: skip
    return Study.from_table({**table, **changes})


def log_rounded(s: float, x: np.ndarray) -> np.ndarray:
    """The log mass of round(N(0, s^2)) at x >= 0, from the tail that keeps its digits."""
    far, near = log_ndtr(-(x - 0.5) / s), log_ndtr(-(x + 0.5) / s)
    return far + np.log1p(-np.exp(near - far))


def log_discrete(s: float, x: np.ndarray) -> np.ndarray:
    """The log mass of the discrete Gaussian."""
    support = np.arange(-math.ceil(40 * s), math.ceil(40 * s) + 1)
    return -(x**2) / (2 * s**2) - logsumexp(-(support**2) / (2 * s**2))


@pytest.mark.parametrize("s", [3.0, 7.3, 20.0, 64.0, 300.0])
def test_a_rounded_gaussian_is_as_near_to_the_discrete_one_as_the_theorem_says(s: float) -> None:
    x = np.arange(0, math.floor(TAIL * s) + 1)
    distance = np.abs(log_rounded(s, x) - log_discrete(s, x)).max()
    assert distance <= TAIL**2 / (24 * s**2) + 1e-9
    assert distance > 0.1 * TAIL**2 / (24 * s**2), "a bound that is far off would cost more than it must"
    assert 2 * norm.sf(TAIL) < 2 * math.exp(-(TAIL**2) / 2)


@pytest.mark.parametrize("s", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("honest", [2, 3, 5])
def test_a_sum_of_discrete_gaussians_is_as_near_to_one_as_tau_says(s: float, honest: int) -> None:
    support = np.arange(-60, 61)
    one = np.exp(log_discrete(s, support))
    total = one
    for _ in range(honest - 1):
        total = np.convolve(total, one)
    places = np.arange(-60 * honest, 60 * honest + 1)
    inside = np.abs(places) <= 5 * s * math.sqrt(honest)  # where convolution keeps its digits
    distance = np.abs(np.log(total[inside]) - log_discrete(s * math.sqrt(honest), places[inside])).max()
    tau = 10 * sum(math.exp(-2 * math.pi**2 * s**2 * k / (k + 1)) for k in range(1, honest))
    assert distance <= tau


@pytest.mark.parametrize(("num_sites", "missing"), [(3, 0), (8, 2), (50, 10)])
def test_honest_shares_add_up_to_the_noise_that_is_accounted_for(num_sites: int, missing: int) -> None:
    noise = DistributedNoise(max_grad_norm=0.7, num_parameters=321, batch_size=32, sites=num_sites, missing=missing)
    share = noise.share_std(1.3)
    assert noise.honest == num_sites - missing and noise.least_in_sum(num_sites + 3) == num_sites + 3 - missing
    assert math.sqrt(noise.honest) * share == pytest.approx(1.3 * noise.grid.sensitivity / noise.grid.spacing)
    assert 0.7 < noise.grid.sensitivity < 0.7 * 1.001
    assert noise.most(1.3) >= 2 * 32 * 0.7 / noise.grid.spacing + TAIL * share
    assert num_sites * noise.most(1.3) < 2**52, "floats hold every sum exactly"


@pytest.mark.parametrize("num_parameters", [10, 10_000, 1_000_000])
@pytest.mark.parametrize("num_sites", [3, 50, 500])
def test_what_is_added_is_next_to_nothing(num_parameters: int, num_sites: int) -> None:
    noise = DistributedNoise(max_grad_norm=1.0, num_parameters=num_parameters, batch_size=32, sites=num_sites, missing=1)
    epsilon, delta = noise.added(1.0, 100)
    assert 0 < epsilon < 1e-3 * max(1, (num_sites / 50) ** 2) and 0 < delta < 1e-20
    more, _ = replace(noise, sites=2 * num_sites).added(1.0, 100)
    assert more > 3 * epsilon, "it grows with the square of the number of shares"


def test_the_charge_covers_it_or_the_study_is_refused() -> None:
    plan = plan_site(study(), 200)
    check_room(plan, NOISE)
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier * MORE, sample_rate=plan.sample_rate, steps=plan.planned_steps)
    added, of_delta = NOISE.added(plan.noise_multiplier, plan.planned_steps)
    assert epsilon_of([event], 1e-4 - of_delta) + added <= plan.epsilon <= 1.0
    coarse = SitePlan(
        unit="patient", declared_size=200, sample_rate=0.16, steps_per_round=1, expected_batch_size=32.0, rounds=20, noise_multiplier=0.6,
        max_grad_norm=1.0, epsilon=epsilon_of([PrivacyEvent(noise_multiplier=0.6, sample_rate=0.16, steps=20)], 1e-4), delta=1e-4,
    )  # fmt: skip
    check_room(coarse, NOISE)
    with pytest.raises(ConfigurationError, match="expected less than .* to be added to epsilon"):
        check_room(coarse, replace(NOISE, sites=200_000))


def test_against_all_others_a_site_has_its_own_share_alone() -> None:
    alone = epsilon_if_all_others_collude(2.0, sample_rate=0.1, steps=50, delta=1e-4, honest=4)
    assert alone == epsilon_of([PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=50)], 1e-4)
    assert alone > 2 * epsilon_of([PrivacyEvent(noise_multiplier=2.0, sample_rate=0.1, steps=50)], 1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"local_steps": 2}}, "training.local_steps = 1, got 2"),
        ({"training": {"local_epochs": 1}}, "training.local_steps = 1, got local_epochs"),
        ({"training": {"local_steps": 1, "momentum": 0.5}}, "optimizer 'sgd' without momentum"),
        ({"training": {"local_steps": 1, "optimizer": "adam"}}, "optimizer 'sgd' without momentum"),
        ({"privacy": {"unit": "none"}}, "privacy.unit 'patient' or 'record'"),
        ({"strategy": {"name": "scaffold"}}, "'fedavg' or a server optimizer"),
        ({"strategy": {"name": "ditto"}}, "'fedavg' or a server optimizer"),
        ({"secure_aggregation": {"missing": 2}}, "sites and missing belong to noise 'distributed'"),
        ({"secure_aggregation": {"noise": "distributed"}}, "expected sites, got none"),
        ({"secure_aggregation": {"noise": "distributed", "sites": 3, "missing": 3}}, "expected fewer missing than sites"),
    ],
)
def test_a_study_in_which_it_would_not_hold_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as error:
        study(**changes)
    assert error.value.exit_code == 3


def test_it_is_in_the_fingerprint_and_absent_where_it_is_not_asked_for() -> None:
    assert study().distributed_noise
    plain = Study.from_table({"name": "s", "task": "t", "privacy": {"epsilon": 1.0}})
    assert "secure_aggregation" not in plain.to_table() and not plain.distributed_noise
    assert study().fingerprint() != study(secure_aggregation={"noise": "distributed", "sites": 5, "missing": 2}).fingerprint()
