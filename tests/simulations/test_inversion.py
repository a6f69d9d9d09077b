"""Gradient inversion: the parts against their definitions, and an image that one update gives away unless something protects it."""

import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from client.local_training import record_losses
from shared.attacks import InversionAttack
from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.metrics import confusion_metrics
from shared.models import set_parameters
from shared.schema import TensorSchema
from shared.study import Study
from shared.task import Task
from simulations.attacks import inversion
from simulations.attacks.attacked_study import Victim
from simulations.attacks.inversion import as_pictures, cosine_distance, image_schema, inversion_picture, invert_gradients, psnr, recovered_label, ssim

SIDE, CLASSES = 16, 4
STUDY = {
    "name": "spots",
    "task": "wardround_test_spots:spots",
    "rounds": {"count": 5},
    "training": {"learning_rate": 0.1},
    "privacy": {"epsilon": 3.0},
    "federation": {"sites": 4, "num_patients": 200},
}


def spots_cohort(num_patients: int, seed: int) -> Cohort:
    """Pictures of three soft spots; the class is the quarter that the brightest of them lies in."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = rng.uniform(1, SIDE - 1, size=(num_patients, 3, 2))
    distances = (rows[None, None] - centres[..., 0, None, None]) ** 2 + (columns[None, None] - centres[..., 1, None, None]) ** 2
    images = (np.array([1.0, 0.6, 0.4])[:, None, None] * np.exp(-distances / 12)).sum(axis=1).clip(0, 1)
    quarter = 2 * (centres[:, 0, 0] > SIDE / 2) + (centres[:, 0, 1] > SIDE / 2)
    return Cohort(
        inputs=(images[:, None].astype(np.float32),), labels=quarter.astype(np.int64), patient_of_record=np.arange(num_patients),
        patient_ids=tuple(map(str, range(num_patients))), synthetic=True,
    )  # fmt: skip


def small_net() -> nn.Module:
    """Smooth, as the networks of DLG are: second derivatives are what the attack goes by."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Conv2d(8, 8, 5, padding=2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(8 * (SIDE // 2) ** 2, CLASSES),
    )  # fmt: skip


def spots() -> Task:
    def load(path: Path | None, options: Mapping[str, object]) -> Cohort:
        return replace(spots_cohort(200, 99), synthetic=False)  # as though they were real

    return Task(
        name="spots", title="spots", modality="image", schema=(TensorSchema(name="image", shape=(1, SIDE, SIDE), low=0.0, high=1.0),),
        load_cohort=load, synthetic_cohort=spots_cohort, model=small_net, metrics=confusion_metrics(CLASSES), primary_metric="accuracy",
        loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="none"),
        predict=lambda outputs: torch.softmax(outputs, dim=1),
    )  # fmt: skip


@pytest.fixture
def study() -> Iterator[Study]:
    module = types.ModuleType("wardround_test_spots")
    module.spots = spots  # type: ignore[attr-defined]
    sys.modules["wardround_test_spots"] = module
    yield Study.from_table(STUDY)
    del sys.modules["wardround_test_spots"]


@pytest.mark.slow  # trains several studies
def test_one_record_is_rebuilt_from_its_update_and_not_from_a_private_one(study: Study) -> None:
    bare, private, summed = invert_gradients(study, iterations=250)
    assert [attack.protection for attack in (bare, private, summed)] == ["none", "dp", "secure aggregation"]
    assert bare.psnr > 30 and bare.ssim > 0.95
    assert private.psnr < 10 and abs(private.ssim) < 0.2
    assert summed.num_records == 1
    np.testing.assert_array_equal(bare.originals, private.originals)
    assert np.shape(bare.reconstructions) == (1, SIDE, SIDE)
    picture = inversion_picture([bare, private, summed])
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@pytest.mark.slow
def test_many_records_and_sites_hide_each_other(study: Study) -> None:
    for seed in (1, 2):
        bare, _, summed = invert_gradients(study, seed=seed, iterations=300)
        assert summed.psnr < bare.psnr - 10
    crowd = invert_gradients(study.replace(privacy={"unit": "none"}), num_records=16, iterations=300)
    assert crowd[0].psnr < 25
    assert len(crowd[0].originals) == 16


@pytest.mark.slow
def test_a_study_without_privacy_is_held_against_epsilon_3(study: Study) -> None:
    plain = Victim.of(study.replace(privacy={"unit": "none"}), None)
    private = Victim.of(study, None)
    for protection in ("none", "secure aggregation"):
        assert not any(plan.private for plan in inversion._target(private, protection, 0, 1).plans)
    [of_plain], [of_private] = (inversion._target(victim, "dp", 0, 1).plans for victim in (plain, private))
    assert of_plain == of_private
    assert (of_plain.sample_rate, of_plain.steps_per_round, of_plain.expected_batch_size) == (1.0, 1, 1.0)
    whole = inversion.plan_site(private.study, of_plain.declared_size)
    assert of_plain.noise_multiplier == whole.noise_multiplier, "the noise is that of all rounds, not of the one step"


def test_an_update_without_protection_is_the_gradient_of_the_record_and_a_sum_is_its_mean(study: Study) -> None:
    victim = Victim.of(study, None)
    for protection, num_records in (("none", 1), ("none", 3), ("secure aggregation", 2)):
        target = inversion._target(victim, protection, 5, num_records)
        model = target.task.model()
        set_parameters(model, target.parameters)
        losses = [record_losses(model, cohort, np.arange(num_records), target.task).mean() for cohort in target.cohorts]
        torch.stack(losses).mean().backward()
        update = inversion.seen_update(target, 0)
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(update[name], -0.1 * parameter.grad.numpy(), rtol=1e-3, atol=1e-7)


def test_the_label_of_one_record_is_read_off_the_gradient() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        for label in range(CLASSES):
            model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, CLASSES, bias=bias))
            loss = nn.functional.cross_entropy(model(torch.randn(1, 6)), torch.tensor([label]))
            assert recovered_label(torch.autograd.grad(loss, list(model.parameters()))) == label


def test_no_picture_of_a_real_patient_is_kept(study: Study, tmp_path: Path) -> None:
    attacks = invert_gradients(study, tmp_path, iterations=2)
    assert all(attack.originals is None and attack.reconstructions is None for attack in attacks)
    with pytest.raises(ConfigurationError, match="synthetic"):
        inversion_picture(attacks)


def test_a_table_is_no_image(study: Study) -> None:
    with pytest.raises(ConfigurationError, match="images"):
        invert_gradients(Study.load("studies/breast-cancer.toml"))
    sequence = TensorSchema(name="ecg", shape=(12, 100), low=-1.0, high=1.0)
    with pytest.raises(ConfigurationError, match="images"):
        image_schema(replace(spots(), schema=(sequence,)))


def test_a_site_must_have_the_records(study: Study) -> None:
    with pytest.raises(ConfigurationError, match="training patients"):
        invert_gradients(study, num_records=1000)


def test_the_cosine_distance_knows_direction_alone() -> None:
    observed = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert float(cosine_distance([2 * value for value in observed], observed)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance([-value for value in observed], observed)) == pytest.approx(2, abs=1e-6)
    assert float(cosine_distance([torch.tensor([0.0, 1.0]), None], observed)) == pytest.approx(1, abs=1e-6)


# Nearness ------------------------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random((9, 9)), rng.random((9, 9))
    assert psnr(one, other) == pytest.approx(10 * np.log10(1 / np.mean((one - other) ** 2)))
    assert psnr(one, one) == 100


def test_structural_similarity_has_the_properties_that_its_authors_ask_for() -> None:
    """Symmetric, at most one, one for equal pictures alone (section III.B); the closed form of two flat ones is the luminance term."""
    rng = np.random.default_rng(1)
    picture = gaussian_filter(rng.random((24, 24)), 2)
    noisy, noisier = (picture + scale * rng.normal(size=picture.shape) for scale in (0.01, 0.1))
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert ssim(picture, noisier) < ssim(picture, noisy) < 1
    assert ssim(picture, noisy) == pytest.approx(ssim(noisy, picture), abs=1e-12)
    assert ssim(picture, 2 * picture.mean() - picture) < 0, "the negative is the opposite in structure"
    flat, other = np.full((16, 16), 0.2), np.full((16, 16), 0.7)
    assert ssim(flat, other) == pytest.approx((2 * 0.14 + 1e-4) / (0.04 + 0.49 + 1e-4), abs=1e-9)
    assert ssim(np.full((5, 5), 0.2), np.full((5, 5), 0.7)) == pytest.approx(ssim(flat, other), abs=1e-9)
    assert ssim(np.stack([picture] * 3, axis=-1), np.stack([noisy] * 3, axis=-1)) == pytest.approx(ssim(picture, noisy), abs=1e-12)


def test_structural_similarity_is_the_mean_over_windows_written_out() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.random((14, 13)), rng.random((14, 13))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row in range(14 - 10):
        for column in range(13 - 10):
            a, b = one[row : row + 11, column : column + 11], other[row : row + 11, column : column + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(one, other) == pytest.approx(np.mean(values), abs=1e-12)


def test_pictures_are_grey_or_rgb_in_the_unit_range() -> None:
    images = np.linspace(-3, 5, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    assert [picture.shape for picture in as_pictures(images, -1, 3)] == [(4, 5, 3)] * 2
    assert [picture.shape for picture in as_pictures(images[:, :2], -1, 3)] == [(4, 5)] * 2
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in as_pictures(images, -1, 3))


@pytest.mark.slow
def test_a_flat_guess_has_a_picture(study: Study) -> None:
    attack = InversionAttack(protection="none", seed=0, num_records=1, psnr=1.0, ssim=0.0, originals=[[[0.5]]], reconstructions=[[[0.5]]])
    assert inversion_picture([attack]).startswith(b"\x89PNG")
