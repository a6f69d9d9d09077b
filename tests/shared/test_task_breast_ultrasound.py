"""Breast ultrasound: MedMNIST's file as published, a hospital's own list, synthetic patients that carry signal, and bad input."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from client.private_probe import probe_model
from shared.cohort import Cohort, held_out_patients
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.breast_ultrasound import PARTS, SIDE, load_cohort, synthetic_cohort

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "medmnist" / "breastmnist.npz"
STUDY = Path(__file__).resolve().parents[2] / "studies" / "breast-ultrasound.toml"
TASK = resolve_task("breast-ultrasound")
RNG = np.random.default_rng(0)


def medmnist(folder: Path, **changes: np.ndarray) -> Path:
    """A file of 40, 10 and 10 images in MedMNIST's layout."""
    arrays: dict[str, np.ndarray] = {}
    for part, count in zip(PARTS, (40, 10, 10), strict=True):
        arrays[f"{part}_images"] = np.random.default_rng(count).integers(0, 256, size=(count, SIDE, SIDE), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count)[:, None] % 4 > 0).astype(np.uint8)
    np.savez(folder / "breastmnist.npz", **{**arrays, **changes})
    return folder / "breastmnist.npz"


def listing(folder: Path, rows: list[str], *, header: str = "image,finding,patient,site") -> Path:
    """A CSV of these rows beside twenty images."""
    for index in range(20):
        Image.fromarray(RNG.integers(0, 256, size=(40, 30), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "list.csv"


@pytest.mark.skipif(not DATA.is_file(), reason=f"breastmnist.npz is not at {DATA}")
class TestPublished:
    """The published file."""

    def test_counts_and_split_are_the_published_ones(self) -> None:
        cohort = load_cohort(DATA, {})
        test = held_out_patients(cohort, b"any key")
        assert (cohort.num_patients, int(test.sum())) == (780, 156)
        assert (int(cohort.labels[~test].sum()), int(cohort.labels[test].sum())) == (147 + 21, 42)
        assert cohort.inputs[0].shape == (780, 1, SIDE, SIDE) and cohort.inputs[0].min() == -1 and cohort.inputs[0].max() == 1
        assert cohort.notes == {"records_dropped": 0, "images_seen_before": 1} and len(set(cohort.patient_ids)) == 780

    def test_the_folder_is_the_file(self) -> None:
        assert load_cohort(DATA.parent, {}).patient_ids == load_cohort(DATA, {}).patient_ids


def test_labels_follow_their_images(tmp_path: Path) -> None:
    path = medmnist(tmp_path)
    cohort = load_cohort(path, {})
    arrays = np.load(path)
    assert np.allclose(cohort.inputs[0][:40, 0], arrays["train_images"] / 127.5 - 1, atol=1e-6)
    assert np.array_equal(cohort.labels[50:], arrays["test_labels"][:, 0] == 0) and cohort.published_test is not None
    assert cohort.published_test.tolist() == [False] * 50 + [True] * 10


def test_a_larger_edition_is_resized(tmp_path: Path) -> None:
    large = np.repeat(np.repeat(np.load(medmnist(tmp_path))["train_images"], 2, axis=1), 2, axis=2)
    assert load_cohort(medmnist(tmp_path, train_images=large), {}).inputs[0].shape == (60, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_images": np.zeros((40, SIDE), dtype=np.uint8)}, "grey images"),
        ({"train_images": np.full((40, SIDE, SIDE), "x")}, "expected uint8"),
        ({"train_images": np.zeros((39, SIDE, SIDE), dtype=np.uint8)}, "for each of 39"),
        ({"train_labels": np.zeros((40, 2), dtype=np.uint8)}, "for each of 40"),
        ({"train_labels": np.array(["a"] * 40)}, "for each of 40"),
        ({"train_labels": np.full((40, 1), 7)}, "unusable"),
        ({"train_labels": np.full((40, 1), np.nan)}, "unusable"),
        ({"train_images": np.full((40, SIDE, SIDE), np.nan)}, "unusable"),
        ({"train_images": np.array([None] * 40)}, "pickled"),
    ],
)
def test_a_file_that_is_not_as_declared_is_refused(tmp_path: Path, changes: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        load_cohort(medmnist(tmp_path, **changes), {})


def test_one_bad_record_is_skipped_and_counted(tmp_path: Path) -> None:
    labels = np.ones((40, 1))
    labels[3] = 5
    path = medmnist(tmp_path, train_labels=labels)
    cohort = load_cohort(path, {})
    assert cohort.num_records == 59 and cohort.notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match="got 1 of 60"):
        load_cohort(path, {"tolerance": 0.0})


def test_a_hospitals_list(tmp_path: Path) -> None:
    rows = [f"{index}.png,{('benign', 'Malignant', 'normal')[index % 3]},p{index // 2},s{index // 10}" for index in range(20)]
    cohort = load_cohort(listing(tmp_path, rows), {})
    assert (cohort.num_records, cohort.num_patients) == (20, 10) and cohort.labels.tolist() == [float(index % 3 == 1) for index in range(20)]
    assert cohort.attributes["site"].tolist() == ["s0"] * 5 + ["s1"] * 5 and cohort.inputs[0].shape == (20, 1, SIDE, SIDE)
    assert cohort.published_test is None
    without = load_cohort(listing(tmp_path, [row.rsplit(",", 2)[0] for row in rows], header="image,finding"), {})
    assert without.num_patients == 20 and without.attributes == {}


@pytest.mark.parametrize(
    ("row", "match"),
    [("0.png,cyst,p,s0", "outside its set"), ("99.png,benign,p,s0", "found none"), ("1.png,benign,p,s0", "listed twice"), ("../1.png,benign,p,s0", "below the folder")],
)  # fmt: skip
def test_a_bad_row_is_skipped_up_to_the_tolerance(tmp_path: Path, row: str, match: str) -> None:
    path = listing(tmp_path, [*(f"{index}.png,benign,p{index},s0" for index in range(20)), row])
    assert load_cohort(path, {}).notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=match):
        load_cohort(path, {"tolerance": 0.01})


def test_bad_lists(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="'finding'"):
        load_cohort(listing(tmp_path, ["0.png,benign"], header="image,findings"), {})
    with pytest.raises(SchemaError, match="identifier"):
        load_cohort(listing(tmp_path, ["0.png,benign,,s"]), {})
    with pytest.raises(SchemaError, match="one 'site'"):
        load_cohort(listing(tmp_path, ["0.png,benign,p,s", "1.png,benign,p,t"]), {})


def test_paths_and_options(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent.npz", tmp_path):
        with pytest.raises(DataMissingError):
            load_cohort(path, {})
    (tmp_path / "a.txt").touch()
    with pytest.raises(SchemaError, match=r"\.npz or \.csv"):
        load_cohort(tmp_path / "a.txt", {})
    with pytest.raises(ConfigurationError, match="no option 'fold'"):
        load_cohort(tmp_path, {"fold": 1})


def test_synthetic_patients_are_seeded_and_differ_by_site() -> None:
    cohort = synthetic_cohort(400, 3)
    again, other = synthetic_cohort(400, 3), synthetic_cohort(400, 4)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and not np.array_equal(cohort.inputs[0], other.inputs[0])
    assert cohort.synthetic and cohort.num_patients == 400 and np.abs(cohort.inputs[0]).max() <= 1
    means = [cohort.inputs[0][cohort.attributes["site"] == site].mean() for site in np.unique(cohort.attributes["site"])]
    assert len(means) == 4 and max(means) - min(means) > 0.05
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


def test_synthetic_patients_carry_signal() -> None:
    train, test = synthetic_cohort(400, 1), synthetic_cohort(200, 2)

    def profile(cohort: Cohort) -> np.ndarray:
        dark = cohort.inputs[0][:, 0] < cohort.inputs[0].mean(axis=(1, 2, 3))[:, None, None] - 0.3
        return np.concatenate([dark.sum(axis=1), dark.sum(axis=2)], axis=1)

    scores = LogisticRegression(C=0.01, max_iter=500).fit(profile(train), train.labels).predict_proba(profile(test))[:, 1]
    [auroc] = [metric for metric in TASK.metrics if metric.name == "auroc"]
    found = auroc.of(auroc.statistic.summarise(scores, test))
    assert found is not None and found > 0.7


def test_the_model_may_be_trained_privately() -> None:
    probe_model(TASK, Study.load(STUDY))
    assert dataclasses.replace(TASK).fingerprint() == TASK.fingerprint()


@pytest.mark.slow
def test_a_few_steps_learn() -> None:
    cohort = synthetic_cohort(100, 5)
    torch.manual_seed(0)
    model = TASK.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(cohort.labels)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = TASK.loss(model(images), labels).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
