"""Membership inference: its parts against closed forms and brute force, and models that give their patients away, or may not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from shared.attacks import MembershipAttack
from shared.errors import ConfigurationError
from shared.models import initial_parameters, set_parameters
from shared.study import Study
from shared.task import resolve_task
from simulations.attacks.membership import (
    answers_of,
    attack_membership,
    likelihood_ratio,
    logit_confidence,
    most_tpr,
    roc_of,
    roc_picture,
    shadow_halves,
)

NUM_COLUMNS = 10
MakeStudy = Callable[..., tuple[Study, Path]]


@pytest.fixture
def noise(tmp_path: Path) -> MakeStudy:
    """A study of patients whose labels are drawn by a coin, but for a share that a plane decides; the network has room to learn all by heart."""

    def make(num_patients: int, *, easy: float, **changes: object) -> tuple[Study, Path]:
        columns = [f"x{number}" for number in range(NUM_COLUMNS)]
        tables = "".join(f'[[columns]]\nname = "{name}"\ntype = "number"\nlow = -1\nhigh = 1\n' for name in columns)
        (tmp_path / "noise.toml").write_text(f'name = "noise"\n[label]\nname = "ill"\ntype = "binary"\n{tables}[model]\nhidden = [32]\n')
        rng = np.random.default_rng(0)
        values = rng.uniform(-1, 1, (num_patients, NUM_COLUMNS))
        labels = np.where(rng.random(num_patients) < easy, values[:, :3].sum(axis=1) > 0, rng.integers(2, size=num_patients))
        rows = [",".join([*(f"{value:.4f}" for value in row), str(label)]) for row, label in zip(values, labels.astype(int), strict=True)]
        (tmp_path / "patients.csv").write_text("\n".join([",".join([*columns, "ill"]), *rows]) + "\n")
        study = Study.from_table(
            {
                "name": "noise",
                "task": str(tmp_path / "noise.toml"),
                "rounds": {"count": 4},
                "training": {"optimizer": "adam", "learning_rate": 0.05, "local_epochs": 15, "batch_size": 8},
                "privacy": {"unit": "none"},
                "federation": {"sites": 2},
            }
        )
        return study.replace(**changes), tmp_path / "patients.csv"

    return make


def above_bound(attack: MembershipAttack, epsilon: float, delta: float) -> list[float]:
    """Of four false positive rates those at which the true positive rate is above the bound by over three standard errors of both."""
    found = []
    points = np.array(attack.roc)
    for rate in (0.05, 0.1, 0.2, 0.3):
        reached = points[points[:, 0] <= rate][:, 1].max()
        others_error = 3 * np.sqrt(rate * (1 - rate) / attack.non_members)
        members_error = 3 * np.sqrt(max(reached * (1 - reached), 0.01) / attack.members)
        if reached - members_error > most_tpr(rate + others_error, epsilon, delta):
            found.append(rate)
    return found


@pytest.mark.slow  # trains several studies
def test_a_model_that_learned_its_patients_by_heart_gives_them_away_and_a_private_one_does_not(noise: MakeStudy) -> None:
    """By chance the private half fails at most about once in 60 data sets: three standard errors at two areas and eight rates. Data are frozen."""
    study, data = noise(240, easy=0.0)
    loss, lira = attack_membership(study, data, num_shadows=8)
    assert (loss.method, lira.method, loss.num_shadows, lira.num_shadows) == ("loss", "lira", 0, 8)
    assert lira.members + lira.non_members == 240
    assert lira.epsilon_claimed is None
    for attack in (loss, lira):
        assert attack.auroc_ci95 is not None and attack.auroc_ci95[0] > 0.6
        assert above_bound(attack, 0.5, 1e-4), "what no model of epsilon 0.5 may show, this one must, or the check below says nothing"
    private, _ = noise(240, easy=0.0, privacy={"epsilon": 0.5}, training={"local_epochs": 1})
    for attack in attack_membership(private, data, num_shadows=8):
        assert attack.epsilon_claimed == pytest.approx(0.5, rel=0.01) and attack.epsilon_claimed <= 0.5
        assert attack.auroc_ci95 is not None
        assert abs(attack.auroc - 0.5) < 3 * (attack.auroc_ci95[1] - attack.auroc) / 1.96
        assert above_bound(attack, 0.5, 1e-4) == []


@pytest.mark.slow
def test_shadow_models_tell_a_member_from_an_easy_patient(noise: MakeStudy) -> None:
    """Where most patients are easy and some by chance, a low loss says little; LiRA asks how low it is for this patient."""
    study, data = noise(400, easy=0.7)
    loss, lira = attack_membership(study, data, num_shadows=16)
    assert lira.auroc > loss.auroc + 0.04
    assert lira.tpr_at_fpr["0.01"] > 2 * loss.tpr_at_fpr["0.01"]
    again = attack_membership(study, data, num_shadows=2)
    assert again[0] == loss
    assert again[1].auroc < lira.auroc


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_other_shadows(noise: MakeStudy) -> None:
    study, data = noise(60, easy=0.5, rounds={"count": 1}, training={"local_epochs": 2})
    first, again, other = (attack_membership(study, data, num_shadows=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first[1].roc != other[1].roc
    assert first[0].roc == other[0].roc


def test_real_sites_are_not_attacked(wards) -> None:
    with pytest.raises(ConfigurationError, match="virtual sites"):
        attack_membership(wards.study, wards.path)
    assert not list(wards.path.glob("*/state"))


@pytest.mark.parametrize("num_shadows", [0, 1, 7])
def test_shadows_come_in_pairs(noise: MakeStudy, num_shadows: int) -> None:
    study, data = noise(20, easy=0.0)
    with pytest.raises(ConfigurationError, match="even"):
        attack_membership(study, data, num_shadows=num_shadows)


def test_every_patient_is_in_half_of_the_shadows_and_half_of_every_site_in_each() -> None:
    sizes = [7, 2, 30]
    halves = np.stack(shadow_halves(sizes, 10, seed=1))
    assert (halves.sum(axis=0) == 5).all()
    for part, size in zip(np.split(halves, np.cumsum(sizes)[:-1], axis=1), sizes, strict=True):
        assert set(part.sum(axis=1).tolist()) <= {size // 2, size - size // 2}
    assert len({half.tobytes() for half in halves}) == 10


def test_the_area_is_that_of_mann_and_whitney_with_ties() -> None:
    rng = np.random.default_rng(3)
    members, others = rng.integers(0, 6, 40).astype(float) + 1, rng.integers(0, 6, 70).astype(float)
    roc = roc_of(members, others)
    assert roc.auroc == pytest.approx(roc_auc_score([1] * 40 + [0] * 70, np.concatenate([members, others])), abs=1e-12)
    assert np.trapezoid(roc.true_positive_rate, roc.false_positive_rate) == pytest.approx(roc.auroc, abs=1e-12)
    assert (roc.false_positive_rate[[0, -1]].tolist(), roc.true_positive_rate[[0, -1]].tolist()) == ([0.0, 1.0], [0.0, 1.0])
    assert roc.true_positives_at(0.0) == np.mean(members > others.max())
    assert roc_of(np.array([1.0]), others).auroc_ci95 is None


def test_the_interval_covers_the_true_area_as_often_as_it_says() -> None:
    """Members N(1, 1) against N(0, 1): the area is Phi(1 / sqrt 2). Of 400 intervals a right one covers 361 to 396 but for 2 in 10,000."""
    rng, truth = np.random.default_rng(5), norm.cdf(1 / np.sqrt(2))
    intervals = [roc_of(rng.normal(1, 1, 80), rng.normal(size=60)).auroc_ci95 for _ in range(400)]
    assert 361 <= sum(low <= truth <= high for low, high in intervals) <= 396


def test_a_curve_is_thinned_to_points_of_its_own() -> None:
    rng = np.random.default_rng(0)
    roc = roc_of(rng.normal(1, 1, 900), rng.normal(size=900))
    points = roc.points()
    assert len(points) <= 200 < len(roc.false_positive_rate)
    assert set(points) <= set(zip(roc.false_positive_rate.tolist(), roc.true_positive_rate.tolist(), strict=True))
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert sum(rate < 0.02 for rate, _ in points) > 20, "the left is where logarithmic axes look"


def test_confidence_is_the_logit_of_the_probability_and_always_finite() -> None:
    probabilities = np.array([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
    expected = np.log(probabilities) - np.log1p(-probabilities)
    np.testing.assert_allclose(logit_confidence(-np.log(probabilities)), expected, rtol=1e-6, atol=1e-12)
    assert np.isfinite(logit_confidence(np.array([-1.0, 0.0, 1e-300, 1e4, 1e30]))).all()


@pytest.mark.parametrize("num_shadows", [8, 64])
def test_the_score_is_the_likelihood_ratio_of_two_gaussians(num_shadows: int) -> None:
    rng = np.random.default_rng(num_shadows)
    num_units = 5
    inside = np.stack([rng.permutation(np.arange(num_shadows) % 2 == 0) for _ in range(num_units)], axis=1)
    shadows, observed = rng.normal(size=(num_shadows, num_units)) + inside, rng.normal(size=num_units)
    expected = []
    spread = {}
    for world in (True, False):
        parts = [shadows[inside[:, unit] == world, unit] for unit in range(num_units)]
        spread[world] = np.sqrt(sum(((part - part.mean()) ** 2).sum() for part in parts) / sum(len(part) - 1 for part in parts))
    for unit in range(num_units):
        worlds = {world: shadows[inside[:, unit] == world, unit] for world in (True, False)}
        scale = {world: spread[world] if num_shadows < 64 else part.std(ddof=1) for world, part in worlds.items()}
        logs = {world: norm.logpdf(observed[unit], part.mean(), scale[world]) for world, part in worlds.items()}
        expected.append(logs[True] - logs[False])
    np.testing.assert_allclose(likelihood_ratio(observed, shadows, inside), expected, rtol=1e-9)


def test_a_patient_answers_with_the_mean_of_all_records_and_a_record_for_itself() -> None:
    task = resolve_task("breast-cancer")
    records = task.load_cohort(None, {}).select(np.arange(6))
    owner = np.array([0, 1, 1, 2, 2, 2])
    cohort = replace(records, patient_of_record=owner, patient_ids=("a", "b", "c"))
    parameters = initial_parameters(task.model(), 3)
    losses, confidences = answers_of(task, parameters, cohort, "record")
    model = task.model()
    set_parameters(model, parameters)
    scores = torch.sigmoid(model(torch.from_numpy(cohort.inputs[0]))[:, 0]).detach().double().numpy()
    right = np.where(cohort.labels == 1, scores, 1 - scores)
    np.testing.assert_allclose(losses, -np.log(right), rtol=1e-5)
    np.testing.assert_allclose(confidences, np.log(right / (1 - right)), rtol=1e-4, atol=1e-6)
    for of_record, of_patient in zip((losses, confidences), answers_of(task, parameters, cohort, "patient"), strict=True):
        np.testing.assert_allclose(of_patient, [of_record[0], of_record[1:3].mean(), of_record[3:].mean()])


def test_equal_shadows_give_a_finite_score() -> None:
    inside = np.array([[True], [False]])
    assert np.isfinite(likelihood_ratio(np.array([1.0]), np.array([[2.0], [2.0]]), inside)).all()


def test_the_bound_is_reached_by_randomized_response_and_by_nothing_less() -> None:
    epsilon = 1.3
    truth = np.exp(epsilon) / (1 + np.exp(epsilon))
    assert most_tpr(1 - truth, epsilon, 0.0) == pytest.approx(truth)
    rates = np.linspace(0, 1, 101)
    np.testing.assert_allclose(most_tpr(rates, 0.0, 0.0), rates)
    np.testing.assert_allclose(most_tpr(0.0, 2.0, 0.01), 0.01)
    assert most_tpr(1.0, 2.0, 0.0) == 1
    assert (most_tpr(np.array([0.0, 1e-9]), 5000.0, 0.0) == [0.0, 1.0]).all()


def test_the_best_test_against_a_gaussian_mechanism_stays_below_the_bound() -> None:
    """Of N(0, 1) against N(mu, 1), whose exact delta at epsilon is that of Balle and Wang 2018, theorem 5; it is touched at one rate."""
    mu, epsilon = 1.0, 1.5
    delta = norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    rates = np.linspace(1e-6, 1 - 1e-6, 20001)
    gap = most_tpr(rates, epsilon, delta) - norm.sf(norm.isf(rates) - mu)
    assert gap.min() > -1e-9
    assert gap.min() < 1e-6, "the bound is tight for this delta"


@pytest.mark.slow
def test_the_picture_is_a_png_of_some_size(noise: MakeStudy) -> None:
    curve = roc_of(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.5]))
    attack = MembershipAttack(
        method="lira", seed=0, members=3, non_members=2, num_shadows=2, auroc=curve.auroc, auroc_ci95=curve.auroc_ci95, tpr_at_fpr={},
        roc=curve.points(), epsilon_claimed=1.0,
    )  # fmt: skip
    picture = roc_picture([attack, attack.model_copy(update={"method": "loss", "epsilon_claimed": None})])
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
