"""Lesion segmentation: pairs as NPZ and PNG, Dice that sums over sites, synthetic lesions, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import DataAccessError, DataMissingError, SchemaError
from shared.metrics import finish_metrics
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.lesion_segmentation import METRICS, OVERLAPS, SIDE, UNet, load_cohort, overlap_loss, overlap_sums, synthetic_cohort
from simulations.blocks.stacked import StackedModel

STUDY = Path(__file__).resolve().parents[2] / "studies" / "lesion-segmentation.toml"
TASK = resolve_task("lesion-segmentation")
NUM = 24
MASKS = (np.indices((SIDE, SIDE)).sum(axis=0) < np.arange(5, 5 + NUM)[:, None, None]).astype(np.uint8)
IMAGES = np.random.default_rng(0).integers(0, 256, size=(NUM, SIDE, SIDE), dtype=np.uint8)


def npz(folder: Path, **changes: np.ndarray) -> Path:
    np.savez(folder / "pairs.npz", **{"images": IMAGES, "masks": MASKS, **changes})
    return folder / "pairs.npz"


def pngs(folder: Path) -> Path:
    for kind, values in (("images", IMAGES), ("masks", MASKS * 255)):
        (folder / kind).mkdir()
        for index, image in enumerate(values):
            Image.fromarray(image).save(folder / kind / f"{index:02}.png")
    return folder


def with_labels(masks: np.ndarray, patient_of_record: np.ndarray | None = None) -> Cohort:
    index = np.arange(len(masks)) if patient_of_record is None else patient_of_record
    return Cohort(
        inputs=(np.zeros((len(masks), 1)),), labels=masks, patient_of_record=index, patient_ids=tuple(str(i) for i in range(int(index.max()) + 1))
    )


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_npz_folder_and_list_give_the_same_cohort(tmp_path: Path) -> None:
    folder = pngs(tmp_path)
    from_folder = load_cohort(folder, {})
    rows = [f"images/{index:02}.png,masks/{index:02}.png" for index in range(NUM)]
    (folder / "list.csv").write_text("image,mask\n" + "\n".join(rows) + "\n")
    cohorts = [load_cohort(npz(tmp_path), {}), from_folder, load_cohort(folder / "list.csv", {})]
    for cohort in cohorts:
        assert np.array_equal(cohort.labels, MASKS) and np.allclose(cohort.inputs[0][:, 0], IMAGES / 127.5 - 1, atol=1e-6)
        assert cohort.patient_ids == cohorts[0].patient_ids and cohort.num_patients == NUM and cohort.notes == {"records_dropped": 0}


@pytest.mark.parametrize("masks", [MASKS * 255, MASKS.astype(bool), MASKS.astype(np.int64), MASKS.astype(np.float64), MASKS[:, None]])
def test_masks_of_every_type_are_the_same(tmp_path: Path, masks: np.ndarray) -> None:
    assert np.array_equal(load_cohort(npz(tmp_path, masks=masks), {}).labels, MASKS)


def test_patients_and_sites_come_along(tmp_path: Path) -> None:
    about = {"patients": np.arange(NUM) // 3, "sites": np.where(np.arange(NUM) < 12, "a", "b")}
    cohort = load_cohort(npz(tmp_path, **about), {})
    assert cohort.num_patients == 8 and cohort.attributes["site"].tolist() == ["a"] * 4 + ["b"] * 4
    with pytest.raises(SchemaError, match="one 'site'"):
        load_cohort(npz(tmp_path, patients=np.zeros(NUM, dtype=int), sites=about["sites"]), {})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"masks": MASKS[:-1]}, "the shape of 'images'"),
        ({"masks": MASKS[:, :-1]}, "the shape of 'images'"),
        ({"masks": MASKS + 2}, "unusable"),
        ({"masks": 1 - MASKS}, "more than half"),
        ({"masks": np.full(MASKS.shape, np.nan)}, "unusable"),
        ({"images": np.full(MASKS.shape, np.inf), "masks": MASKS}, "unusable"),
        ({"images": IMAGES.astype(np.int32)}, "expected uint8"),
        ({"masks": np.array([None] * NUM)}, "pickled"),
        ({"patients": np.array([""] * NUM)}, "identifier"),
        ({"sites": np.array(["a"])}, "shape"),
    ],
)
def test_a_file_that_is_not_as_declared_is_refused(tmp_path: Path, changes: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        load_cohort(npz(tmp_path, **changes), {})


def test_one_bad_record_is_skipped_and_counted(tmp_path: Path) -> None:
    images = IMAGES / 255
    images[4, 0, 0] = np.nan
    cohort = load_cohort(npz(tmp_path, images=images), {})
    assert np.array_equal(cohort.labels, np.delete(MASKS, 4, axis=0)) and cohort.notes == {"records_dropped": 1}
    with pytest.raises(SchemaError, match="got 1 of 24"):
        load_cohort(npz(tmp_path, images=images), {"tolerance": 0.0})


def test_an_image_without_its_mask_is_one_bad_record(tmp_path: Path) -> None:
    folder = pngs(tmp_path)
    (folder / "masks" / "03.png").unlink()
    assert load_cohort(folder, {}).num_records == NUM - 1
    for name in ("04", "05"):
        (folder / "masks" / f"{name}.png").write_bytes(b"")
    with pytest.raises(SchemaError, match="got 3 of 24"):
        load_cohort(folder, {})


def test_an_image_listed_twice_is_one_bad_record(tmp_path: Path) -> None:
    rows = [f"images/{index:02}.png,masks/{index:02}.png" for index in [*range(NUM), 0]]
    (pngs(tmp_path) / "list.csv").write_text("image,mask\n" + "\n".join(rows) + "\n")
    assert load_cohort(tmp_path / "list.csv", {}).notes == {"records_dropped": 1}


def test_a_folder_that_may_not_be_read_is_no_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pngs(tmp_path)

    def forbidden(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(folder, {})


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataMissingError, match="PNG files"):
        load_cohort(tmp_path, {})


# Metrics and loss ---------------------------------------------------------------------------------------------------------------


def test_dice_is_that_of_all_pixels_together() -> None:
    rng = np.random.default_rng(1)
    given, true = rng.random((7, 6, 6)), (rng.random((7, 6, 6)) < 0.3).astype(np.float32)
    totals = {"overlaps": sum(overlap_sums(given[part], with_labels(true[part])) for part in (slice(0, 2), slice(2, 7)))}
    found = finish_metrics(METRICS, totals)
    predicted = given >= 0.5
    both, size = (predicted * true).sum(), predicted.sum() + true.sum()
    own = [2 * (p * t).sum() / (p.sum() + t.sum()) for p, t in zip(predicted, true, strict=True)]
    assert found == {"dice": pytest.approx(2 * both / size), "mean_dice": pytest.approx(np.mean(own)), "iou": pytest.approx(both / (size - both))}


def test_edges_of_dice() -> None:
    none, full = np.zeros((1, 4, 4)), np.ones((1, 4, 4), dtype=np.float32)
    values = finish_metrics(METRICS, {"overlaps": overlap_sums(none, with_labels(none))})
    assert values == {"dice": None, "mean_dice": 1.0, "iou": None}
    assert finish_metrics(METRICS, {"overlaps": overlap_sums(np.full((1, 4, 4), np.nan), with_labels(full))})["dice"] == 0
    assert finish_metrics(METRICS, {"overlaps": overlap_sums(full, with_labels(full))}) == {"dice": 1.0, "mean_dice": 1.0, "iou": 1.0}
    assert finish_metrics(METRICS, {"overlaps": np.zeros(5)}) == {"dice": None, "mean_dice": None, "iou": None}


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_patient_adds_at_most_the_sensitivity_and_sums_agree(seed: int, records: int) -> None:
    rng = np.random.default_rng(seed)
    given_, true = rng.random((records + 3, 4, 4)), (rng.random((records + 3, 4, 4)) < rng.random()).astype(np.float32)
    index = np.array([*[0] * records, 1, 2, 3])
    whole = overlap_sums(given_, with_labels(true, index))
    alone = overlap_sums(given_[:records], with_labels(true[:records], index[:records]))
    rest = overlap_sums(given_[records:], with_labels(true[records:]))
    assert np.allclose(whole, alone + rest) and np.linalg.norm(alone) <= OVERLAPS.sensitivity + 1e-12
    assert OVERLAPS.could_be(whole, patients=4) and not OVERLAPS.could_be(whole, patients=1)


@pytest.mark.parametrize("forged", [[4, 2, 1, 3, 0], [4, 0, 5, 1, 0], [4, 0, 3, 3, 0], [4, 0, 0, 0, 5], [4, -1, 1, 1, 0], [4, np.nan, 1, 1, 0]])
def test_sums_that_no_masks_have_are_told(forged: list[float]) -> None:
    assert not OVERLAPS.could_be(np.array(forged, dtype=np.float64), patients=4)


def test_the_loss_is_of_each_record_alone_and_least_at_the_mask() -> None:
    masks = torch.from_numpy(MASKS[:3].astype(np.float32))
    right, wrong = 20 * (2 * masks - 1), torch.zeros_like(masks)
    losses = overlap_loss(right, masks)
    assert losses.shape == (3,) and (losses < 1e-3).all() and (overlap_loss(wrong, masks) > 0.5).all()
    assert torch.allclose(overlap_loss(right[1:2], masks[1:2]), losses[1:2])
    empty = overlap_loss(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4))
    assert float(empty) < 1e-6


# Synthetic patients and model ---------------------------------------------------------------------------------------------------


def test_synthetic_lesions_are_seeded_brighter_than_their_ground_and_differ_by_site() -> None:
    cohort, again = synthetic_cohort(300, 3), synthetic_cohort(300, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    images, masks = cohort.inputs[0][:, 0], cohort.labels
    ill = masks.any(axis=(1, 2))
    assert 0.85 < ill.mean() < 1 and masks.mean(axis=(1, 2)).max() < 0.5
    contrast = [image[mask == 1].mean() - image[mask == 0].mean() for image, mask in zip(images[ill], masks[ill], strict=True)]
    assert min(contrast) > 0.1
    sites = cohort.attributes["site"]
    grey = [images[sites == site].mean() for site in np.unique(sites)]
    assert len(grey) == 4 and max(grey) - min(grey) > 0.1
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


@pytest.mark.slow
def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    assert StackedModel(TASK.model(), 3).flat.shape[0] == 3


def test_the_unet_keeps_size_and_sees_a_whole_lesion() -> None:
    model = UNet().eval()
    images = torch.zeros(1, 1, SIDE, SIDE, requires_grad=True)
    outputs = model(images)
    assert outputs.shape == (1, SIDE, SIDE)
    outputs[0, SIDE // 2, SIDE // 2].backward()
    assert images.grad is not None
    seen = np.argwhere(images.grad[0, 0].numpy() != 0)
    assert (seen.max(axis=0) - seen.min(axis=0) >= 20).all()


@pytest.mark.slow
def test_a_few_steps_outline_lesions() -> None:
    cohort, test = synthetic_cohort(200, 5), synthetic_cohort(60, 6)
    torch.manual_seed(0)
    model = UNet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    images, masks = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(cohort.labels)
    for step in range(50):
        rows = slice(step * 40 % 200, step * 40 % 200 + 40)
        optimizer.zero_grad()
        overlap_loss(model(images[rows]), masks[rows]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        sums = overlap_sums(TASK.predict(model.eval()(torch.from_numpy(test.inputs[0]))).double().numpy(), test)
    assert (finish_metrics(METRICS, {"overlaps": sums})["dice"] or 0) > 0.7
