"""The theorem of distributed noise, number by number: what shares come to, how near they are to what is accounted for, and what is added for it."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.special import log_ndtr, logsumexp, ndtr, ndtri_exp
from scipy.stats import norm

from shared.distributed_noise import MORE, TAIL, DistributedNoise, check_room
from shared.errors import ConfigurationError
from shared.noise import NoiseGrid
from shared.plan import plan_site
from shared.privacy import PrivacyEvent, delta_of, epsilon_if_all_others_collude, epsilon_of, renyi_divergence
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
def test_shares_are_all_but_a_gaussian(num_parameters: int, num_sites: int) -> None:
    noise = DistributedNoise(max_grad_norm=1.0, num_parameters=num_parameters, batch_size=32, sites=num_sites, missing=1)
    assert 0 < noise.distance(1.0) < 5e-6 * max(1, (num_sites / 50) ** 2) and 0 < noise.tails(100) < 1e-36
    assert replace(noise, sites=2 * num_sites).distance(1.0) > 3 * noise.distance(1.0), "it grows with the square of the number of shares"


def test_the_charge_covers_it_or_the_study_is_refused() -> None:
    plan = plan_site(study(), 200)
    check_room(plan, NOISE)
    check_room(replace(plan, noise_multiplier=0.2), replace(NOISE, sites=1000, missing=0))  # as little noise and as many shares as there can be
    with pytest.raises(ConfigurationError, match="expected shares that add up to all but a Gaussian"):
        check_room(plan, replace(NOISE, sites=200_000))
    many = replace(NOISE, num_parameters=10**9)
    check_room(replace(plan, rounds=10**6), many)
    with pytest.raises(ConfigurationError, match="delta would be .* more"):
        check_room(replace(plan, rounds=10**6, delta=1e-24), many)


@pytest.mark.parametrize("z", [0.2, 0.7, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("room", [1 - 1 / MORE, 0.2, 0.7])
def test_the_condition_is_enough_for_every_test_whatever_its_false_positives(z: float, room: float) -> None:
    """Step 3 of the proof at its limit: what is left of the errors of the noise that is added is never less than the errors of what is charged."""
    c = room / (z * math.sqrt(2 * math.pi))
    t = np.concatenate([np.linspace(1 / (2 * z), 1 / (2 * z) + 12, 20_001), np.linspace(12, 36, 2001) + 1 / z])
    s = -ndtri_exp(log_ndtr(-t) + c)
    added, charged = s - (1 - room) / z, t - 1 / z
    better = np.maximum(log_ndtr(added) - log_ndtr(charged), log_ndtr(-charged) - log_ndtr(-added)) - c
    assert (better >= -1e-9 * np.maximum(1, t**2)).all()
    beyond = np.maximum(log_ndtr(added) - log_ndtr(charged), log_ndtr(-charged) - log_ndtr(-added)) - 2 * c
    assert (beyond < 0).any(), "a condition that is far from what is needed would show nothing here"


def shares_added_up(noise: DistributedNoise, noise_multiplier: float, *, within: float) -> np.ndarray:
    """The mass of one entry of h shares, by convolution, at -M .. M, so many standard deviations; every mass with its digits, for all are positive."""
    share = noise.share_std(noise_multiplier)
    one = np.exp(log_rounded(share, np.abs(np.arange(-math.ceil(within * share), math.ceil(within * share) + 1)).astype(float)))
    total = one
    for _ in range(noise.honest - 1):
        total = np.convolve(total, one)
    cut = max(0, len(total) // 2 - math.ceil(within * share * math.sqrt(noise.honest)))
    return total[cut : len(total) - cut]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """One step of distributed noise, computed law by law: masses where a unit takes part and where it does not."""

    moved: np.ndarray
    still: np.ndarray

    @classmethod
    def of(cls, noise: DistributedNoise, noise_multiplier: float, shift: tuple[int, ...], *, within: float = 13.0) -> "Released":
        """A unit that moves the sum by so many grid points in each of one or two entries."""
        total = shares_added_up(noise, noise_multiplier, within=within)
        pairs = [(np.concatenate([np.zeros(by), total]), np.concatenate([total, np.zeros(by)])) for by in shift]
        moved, still = pairs[0] if len(pairs) == 1 else (np.multiply.outer(pairs[0][0], pairs[1][0]), np.multiply.outer(pairs[0][1], pairs[1][1]))
        return cls(moved=moved.ravel(), still=still.ravel())

    def sampled(self, rate: float) -> "Released":
        """The same where the unit takes part with this probability."""
        return Released(moved=(1 - rate) * self.still + rate * self.moved, still=self.still)

    def hockey_stick(self, epsilon: float, *, removed: bool = True) -> float:
        one, other = (self.moved, self.still) if removed else (self.still, self.moved)
        return float(np.maximum(one - math.exp(epsilon) * other, 0).sum())

    def renyi(self, order: float, *, removed: bool = True) -> float:
        """Where both worlds have mass."""
        one, other = (self.moved, self.still) if removed else (self.still, self.moved)
        there = (one > 0) & (other > 0)
        return float(logsumexp(order * np.log(one[there]) + (1 - order) * np.log(other[there]))) / (order - 1)


def gaussian_hockey_stick(epsilon: float, z: float) -> float:
    """Balle and Wang 2018, theorem 5."""
    return float(ndtr(1 / (2 * z) - epsilon * z) - math.exp(epsilon) * ndtr(-1 / (2 * z) - epsilon * z))


COARSE = DistributedNoise(max_grad_norm=1.0, num_parameters=1, batch_size=1, sites=3, missing=0)


def on_grid(monkeypatch: pytest.MonkeyPatch, *, points: int, entries: int = 1, **changes: int) -> tuple[DistributedNoise, tuple[int, ...]]:
    """Noise on a grid on which a unit moves a sum of so many entries by `points` in L2 at most; how far it moves each."""
    noise = replace(COARSE, num_parameters=entries, **changes)
    monkeypatch.setattr(DistributedNoise, "grid", NoiseGrid(spacing=1.0, sensitivity=float(points)))
    return noise, (math.floor(points / math.sqrt(entries)),) * entries


EPSILONS = [0.0, 0.001, 0.01, 0.1, 0.3, 0.7, 1.0, 2.0, 3.0, 5.0]
CASES = [(1.0, 400, 1, 2), (1.0, 700, 1, 3), (0.6, 900, 1, 3), (3.0, 250, 1, 5), (1.0, 240, 2, 2)]  # z, grid points, entries, honest shares


@pytest.mark.slow
@pytest.mark.parametrize(("z", "points", "entries", "honest"), CASES)
def test_no_divergence_of_a_step_passes_that_of_what_is_charged(
    monkeypatch: pytest.MonkeyPatch, z: float, points: int, entries: int, honest: int
) -> None:
    """Against the laws themselves, computed mass by mass: for every epsilon and order, added or removed, sampled or not."""
    noise, shift = on_grid(monkeypatch, points=points, entries=entries, sites=honest)
    assert math.sqrt(2 * math.pi) * z * noise.distance(z) <= 1 - 1 / MORE, "the case is one that the theorem is of"
    within, left_out = (13.0, 1e-13) if entries == 1 else (7.2, 4e-12)  # standard deviations; and the mass beyond them, with rounding
    step = Released.of(noise, z * MORE, shift, within=within)
    charged = [gaussian_hockey_stick(epsilon, z) for epsilon in EPSILONS]
    for removed in (True, False):
        assert all(step.hockey_stick(epsilon, removed=removed) <= allowed + left_out for epsilon, allowed in zip(EPSILONS, charged, strict=True))
    for rate in (1.0, 0.2, 0.01) if entries == 1 else (0.2,):
        event = PrivacyEvent(noise_multiplier=z, sample_rate=rate, steps=1)
        sampled = step.sampled(rate)
        for order in (2.0, 3.0, 5.0, 8.0)[: 4 if entries == 1 else 2]:
            assert max(sampled.renyi(order), sampled.renyi(order, removed=False)) <= renyi_divergence(event, order), (rate, order)
        delta = sampled.hockey_stick(0.3)
        assert delta < 1e-12 or epsilon_of([event], delta) >= 0.3, "the accountant of claims"


def test_a_share_too_small_is_seen_by_the_same_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of one site more than there are: the mirror of the test above, which can fail."""
    noise, shift = on_grid(monkeypatch, points=700, sites=3)
    step = Released.of(noise, z_of_one_more := MORE * math.sqrt(3 / 4), shift)
    assert z_of_one_more < 1 and step.hockey_stick(1.0) > gaussian_hockey_stick(1.0, 1.0)
    assert step.renyi(2.0) > renyi_divergence(PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1), 2.0)


@pytest.mark.slow
def test_steps_composed_law_by_law_stay_below_their_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of one entry each are one of two: what is said of a step holds of several, without any accountant between."""
    noise, shift = on_grid(monkeypatch, points=200, sites=2)
    step = Released.of(noise, MORE, shift, within=7.2).sampled(0.3)
    both = Released(moved=np.multiply.outer(step.moved, step.moved).ravel(), still=np.multiply.outer(step.still, step.still).ravel())
    event = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.3, steps=2)
    for epsilon in (0.1, 0.5, 1.0):
        assert both.hockey_stick(epsilon) <= delta_of([event], epsilon)
    assert both.hockey_stick(0.5) > 0.97 * delta_of([event], 0.5), "it is compared with what it costs, not with far more"


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
        ({"secure_aggregation": {"missing": 2}}, "sites, missing and colluding belong to noise 'distributed'"),
        ({"secure_aggregation": {"colluding": 1}}, "sites, missing and colluding belong to noise 'distributed'"),
        ({"secure_aggregation": {"noise": "distributed"}}, "expected sites, got none"),
        ({"secure_aggregation": {"noise": "distributed", "sites": 3, "missing": 3}}, "expected fewer missing and colluding than sites"),
        (
            {"secure_aggregation": {"noise": "distributed", "sites": 3, "missing": 1, "colluding": 2}},
            "expected fewer missing and colluding than sites",
        ),
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


def test_shares_are_of_sites_that_are_there_and_honest_whoever_chooses_who_is_absent() -> None:
    """Eight sites, two absent at the coordinator's choice, one of the others in league with it: five honest shares make up the whole noise."""
    noise = DistributedNoise(max_grad_norm=1.0, num_parameters=10, batch_size=8, sites=8, missing=2, colluding=1)
    assert noise.least_in_sum(8) == 6 and noise.least_in_sum(10) == 8, "who is in league may be in the sum"
    assert noise.honest == 5 == noise.least_in_sum(8) - noise.colluding
    whole = DistributedNoise(max_grad_norm=1.0, num_parameters=10, batch_size=8, sites=1, missing=0)
    assert noise.share_std(1.3) * math.sqrt(5) == pytest.approx(whole.share_std(1.3))
