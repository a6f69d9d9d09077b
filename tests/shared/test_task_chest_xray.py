"""Chest radiographs: findings that may be unknown, a masked loss, a histogram for each finding, synthetic chests, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import DataAccessError, DataMissingError, SchemaError
from shared.metrics import finish_metrics
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.chest_xray import FINDINGS, HISTOGRAMS, METRICS, SIDE, UNKNOWN, finding_histograms, load_cohort, masked_loss, synthetic_cohort
from simulations.blocks.stacked import StackedModel

STUDY = Path(__file__).resolve().parents[2] / "studies" / "chest-xray.toml"
TASK = resolve_task("chest-xray")
HEADER = "image,patient,site,sex,age,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"
NUM = 24


def folder_of(path: Path, rows: list[str] | None = None, *, header: str = HEADER) -> Path:
    """A folder of radiographs and a CSV of these rows."""
    rng = np.random.default_rng(0)
    (path / "png").mkdir(exist_ok=True)
    for index in range(NUM):
        Image.fromarray(rng.integers(0, 256, size=(80, 70), dtype=np.uint8)).save(path / "png" / f"{index}.png")
    (path / "labels.csv").write_text("\n".join([header, *(good_rows() if rows is None else rows)]) + "\n")
    return path


def good_rows() -> list[str]:
    return [f"png/{index}.png,p{index // 2},s{index // 12},{'FM'[index // 2 % 2]},{40 + index // 2},1,0.0,,-1,{index % 2}" for index in range(NUM)]


def with_labels(labels: np.ndarray, patient_of_record: np.ndarray | None = None) -> Cohort:
    index = np.arange(len(labels)) if patient_of_record is None else patient_of_record
    ids = tuple(str(number) for number in range(int(index.max()) + 1))
    return Cohort(inputs=(np.zeros((len(labels), 1)),), labels=labels, patient_of_record=index, patient_ids=ids)


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read(tmp_path: Path) -> None:
    cohort = load_cohort(folder_of(tmp_path), {})
    assert (cohort.num_records, cohort.num_patients) == (NUM, NUM // 2) and cohort.inputs[0].shape == (NUM, 1, SIDE, SIDE)
    assert cohort.labels[:2].tolist() == [[1, 0, UNKNOWN, UNKNOWN, 0], [1, 0, UNKNOWN, UNKNOWN, 1]]
    assert cohort.attributes["site"].tolist() == ["s0"] * 6 + ["s1"] * 6 and cohort.attributes["sex"][:2].tolist() == ["F", "M"]
    assert cohort.attributes["age"][3] == "43" and cohort.notes == {"records_dropped": 0, "records_without_label": 0}
    assert load_cohort(tmp_path / "labels.csv", {}).patient_ids == cohort.patient_ids


def test_images_of_which_nothing_is_known_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*good_rows()[:-2], "png/22.png,a,s0,F,50,,,,,", "png/23.png,b,s0,F,50,-1,nan,?,,NA"]
    assert load_cohort(folder_of(tmp_path, rows), {}).notes == {"records_dropped": 0, "records_without_label": 2}
    with pytest.raises(DataMissingError, match="known finding"):
        load_cohort(folder_of(tmp_path, rows[-2:]), {})


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("png/0.png,p0,s0,F,40,1,0,0,0,0", "listed twice"), ("png/99.png,p,s0,F,40,1,0,0,0,0", "found none"),
        ("png/23.png,p,s0,F,40,2,0,0,0,0", "outside its set"), ("png/23.png,p,s0,F,40,yes,0,0,0,0", "outside its set"),
        ("png/23.jpg,p,s0,F,40,1,0,0,0,0", "another ending"), ("/etc/passwd,p,s0,F,40,1,0,0,0,0", "below the folder"),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_up_to_the_tolerance(tmp_path: Path, row: str, match: str) -> None:
    path = folder_of(tmp_path, [*good_rows()[:-1], row])
    assert load_cohort(path, {}).notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=match):
        load_cohort(path, {"tolerance": 0.01})


def test_truncated_images_beyond_the_tolerance(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    for index in (3, 4):
        content = (path / "png" / f"{index}.png").read_bytes()
        (path / "png" / f"{index}.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SchemaError, match="got 2 of 24 .the first: labels.csv: record 4: expected a PNG image"):
        load_cohort(path, {})
    assert load_cohort(path, {"tolerance": 0.1}).num_records == NUM - 2


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (HEADER.replace("Edema", "Oedema"), "column 'edema', found 0"), (HEADER.replace("Edema", "atelectasis"), "'atelectasis', found 2"),
        (HEADER.replace("image", "file"), "'image'"),
    ],
)  # fmt: skip
def test_missing_columns_are_named(tmp_path: Path, header: str, match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        load_cohort(folder_of(tmp_path, header=header), {})


def test_other_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataMissingError, match="one CSV file"):
        load_cohort(tmp_path, {})
    np.savez(tmp_path / "a.npz", images=np.zeros(2))
    with pytest.raises(SchemaError, match="got an NPZ"):
        load_cohort(tmp_path / "a.npz", {})
    (tmp_path / "a.npz").unlink()
    with pytest.raises(SchemaError, match="one 'site'"):
        load_cohort(folder_of(tmp_path, ["png/0.png,p,s0,F,40,1,0,0,0,0", "png/1.png,p,s1,F,40,1,0,0,0,0"]), {})
    with pytest.raises(SchemaError, match="identifier"):
        load_cohort(folder_of(tmp_path, ["png/0.png,,s0,F,40,1,0,0,0,0"]), {})

    def forbidden(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(tmp_path, {})


# Loss and metrics ---------------------------------------------------------------------------------------------------------------


def test_what_is_unknown_adds_nothing_to_loss_or_gradient() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, len(FINDINGS), requires_grad=True)
    labels = torch.tensor([[1, 0, UNKNOWN, 1, 0], [UNKNOWN] * 5, [1, 1, 1, 1, 1], [UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN]])
    losses = masked_loss(outputs, labels)
    assert losses.shape == (4,) and losses[1].item() == 0
    expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(outputs[0, i], labels[0, i]).item() for i in (0, 1, 3, 4)) / 5
    assert losses[0].item() == pytest.approx(expected, rel=1e-5)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None and bool(((outputs.grad == 0) == (labels == UNKNOWN)).all())


def test_auroc_of_a_finding_is_that_over_whom_it_is_known() -> None:
    rng = np.random.default_rng(2)
    labels = rng.choice([UNKNOWN, 0.0, 1.0], size=(300, 5)).astype(np.float32)
    scores = 1 / (1 + np.exp(-(rng.normal(size=(300, 5)) + labels)))
    halves = [finding_histograms(scores[part], with_labels(labels[part])) for part in (slice(0, 100), slice(100, 300))]
    found = finish_metrics(METRICS, {HISTOGRAMS.name: halves[0] + halves[1]})
    expected = []
    for index, finding in enumerate(FINDINGS):
        known = labels[:, index] != UNKNOWN
        expected.append(roc_auc_score(labels[known, index], scores[known, index]))
        assert found[f"auroc_{finding.replace(' ', '_')}"] == pytest.approx(expected[-1], abs=0.01)  # bins of 0.05 in logit
    assert found["auroc"] == pytest.approx(np.mean(expected), abs=0.005)


def test_a_finding_of_one_class_has_no_auroc_and_is_left_out_of_the_mean() -> None:
    labels = np.full((4, 5), UNKNOWN, dtype=np.float32)
    labels[:, 0], labels[:, 1] = [0, 0, 1, 1], 1
    found = finish_metrics(METRICS, {HISTOGRAMS.name: finding_histograms(np.tile([[0.1], [0.2], [0.8], [0.9]], (1, 5)), with_labels(labels))})
    assert found["auroc"] == found["auroc_atelectasis"] == 1.0 and found["auroc_cardiomegaly"] is None and found["auroc_edema"] is None
    assert finish_metrics(METRICS, {HISTOGRAMS.name: np.zeros(HISTOGRAMS.shape)})["auroc"] is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_a_patient_adds_at_most_the_sensitivity(seed: int, records: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([UNKNOWN, 0.0, 1.0], size=(records + 2, 5)).astype(np.float32)
    scores, index = rng.random((records + 2, 5)), np.array([*[0] * records, 1, 2])
    whole = finding_histograms(scores, with_labels(labels, index))
    rest = finding_histograms(scores[records:], with_labels(labels[records:]))
    assert np.linalg.norm(whole - rest) <= HISTOGRAMS.sensitivity + 1e-12 and HISTOGRAMS.could_be(whole, patients=3)


# Synthetic patients and model ---------------------------------------------------------------------------------------------------


def test_synthetic_chests_are_seeded_and_sites_differ() -> None:
    cohort, again = synthetic_cohort(300, 3), synthetic_cohort(300, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    assert (cohort.labels != UNKNOWN).any(axis=1).all() and set(np.unique(cohort.labels)) == {UNKNOWN, 0.0, 1.0}
    site = cohort.attributes["site"]
    assert (cohort.labels[site == "synthetic-4", FINDINGS.index("edema")] == UNKNOWN).all()
    rates = [(cohort.labels[site == name] == UNKNOWN).mean() for name in ("synthetic-1", "synthetic-2")]
    grey = [cohort.inputs[0][site == name].mean() for name in np.unique(site)]
    assert rates[1] > rates[0] + 0.05 and max(grey) - min(grey) > 0.1
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


@pytest.mark.parametrize("index", range(len(FINDINGS)), ids=FINDINGS)
def test_every_finding_can_be_seen(index: int) -> None:
    parts = []
    for seed, count in ((1, 400), (2, 300)):
        cohort = synthetic_cohort(count, seed)
        known = cohort.labels[:, index] != UNKNOWN
        images = cohort.inputs[0][known, 0].reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4))
        parts.append(((images - images.mean(axis=(1, 2), keepdims=True)).reshape(len(images), -1), cohort.labels[known, index]))
    (train, truth), (test, of_test) = parts
    scores = LogisticRegression(C=0.1, max_iter=300).fit(train, truth).decision_function(test)
    assert roc_auc_score(of_test, scores) > 0.75


def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    assert StackedModel(TASK.model(), 3).flat.shape[0] == 3
