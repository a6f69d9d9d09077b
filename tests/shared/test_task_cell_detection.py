"""Tumour cells: tiles and marked points, a map of centres, peaks and pairs against brute force, F1 that sums over sites, and bad input."""

import itertools
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
from shared.tasks.cell_detection import (
    DETECTIONS,
    DISTANCE,
    METRICS,
    MOST_CELLS,
    SIDE,
    THRESHOLD,
    CentreNet,
    centre_loss,
    centre_maps,
    centres_of,
    detection_sums,
    load_cohort,
    num_pairs,
    peaks_of,
    synthetic_cohort,
)
from simulations.blocks.stacked import StackedModel

STUDY = Path(__file__).resolve().parents[2] / "studies" / "cell-detection.toml"
TASK = resolve_task("cell-detection")
NUM = 24
IMAGES = np.random.default_rng(0).integers(0, 256, size=(NUM, SIDE, SIDE), dtype=np.uint8)
LISTED = [f"png/{index:02}.png,p{index // 2},s{index // 12}" for index in range(NUM)]
MARKED = [f"png/{index:02}.png,{10 + index},{index}.5,tumour" for index in range(1, NUM)] + ["png/00.png,5,6,other"]


def folder_of(path: Path, *, listed: list[str] | None = None, marked: list[str] | None = None, header: str = "image,x,y,kind") -> Path:
    """A folder of fields, their list, and points on them."""
    (path / "png").mkdir(exist_ok=True)
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(path / "png" / f"{index:02}.png")
    (path / "images.csv").write_text("\n".join(["image,patient,site", *(LISTED if listed is None else listed)]) + "\n")
    (path / "points.csv").write_text("\n".join([header, *(MARKED if marked is None else marked)]) + "\n")
    return path


def maps_of(places: list[list[tuple[int, int]]]) -> np.ndarray:
    """The maps of these centres (row, column)."""
    tile = np.repeat(np.arange(len(places)), [len(centres) for centres in places])
    rows, columns = np.array([place for centres in places for place in centres], dtype=np.int64).reshape(-1, 2).T
    return centre_maps(tile, rows, columns, num_maps=len(places))


def with_labels(maps: np.ndarray, patient_of_record: np.ndarray | None = None) -> Cohort:
    index = np.arange(len(maps)) if patient_of_record is None else patient_of_record
    ids = tuple(str(number) for number in range(int(index.max()) + 1))
    return Cohort(inputs=(np.zeros((len(maps), 1)),), labels=maps, patient_of_record=index, patient_ids=ids)


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read(tmp_path: Path) -> None:
    cohort = load_cohort(folder_of(tmp_path), {})
    assert (cohort.num_records, cohort.num_patients) == (NUM, NUM // 2) and np.allclose(cohort.inputs[0][:, 0], IMAGES / 127.5 - 1, atol=1e-6)
    assert [np.argwhere(label == 1).tolist() for label in cohort.labels] == [[], *([[index, 10 + index]] for index in range(1, NUM))]
    assert cohort.attributes["site"].tolist() == ["s0"] * 6 + ["s1"] * 6
    assert cohort.notes == {"records_dropped": 0, "points_without_image": 0, "cells_outside_tiles": 0}


def test_without_kinds_every_point_is_a_tumour_cell_and_a_list_needs_no_site(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, marked=["png/00.png,5,6"], header="image,x,y")
    (folder / "images.csv").write_text("patient,image\n1,png/00.png\n")
    cohort = load_cohort(folder, {})
    assert np.argwhere(cohort.labels == 1).tolist() == [[0, 6, 5]] and cohort.attributes == {}


def test_a_larger_image_is_cut_into_tiles_and_never_resized(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    large = np.random.default_rng(1).integers(0, 256, size=(2 * SIDE + 10, 3 * SIDE + 5), dtype=np.uint8)
    Image.fromarray(large).save(folder / "large.png")
    x, y = [3, SIDE + 3, 3 * SIDE - 1, 3 * SIDE + 1, 7], [2, SIDE, 2 * SIDE - 1, 2, 2 * SIDE]  # the last two in no tile
    (folder / "images.csv").write_text("image,patient\nlarge.png,p\npng/01.png,q\n")
    (folder / "points.csv").write_text("image,x,y\n" + "\n".join(f"large.png,{a},{b}.25" for a, b in zip(x, y, strict=True)) + "\n")
    cohort = load_cohort(folder, {})
    assert cohort.num_records == 7 and cohort.patient_of_record.tolist() == [0] * 6 + [1] and cohort.notes["cells_outside_tiles"] == 2
    assert np.argwhere(cohort.labels == 1).tolist() == [[0, 2, 3], [4, 0, 3], [5, SIDE - 1, SIDE - 1]]
    rows = [np.concatenate(list(cohort.inputs[0][start : start + 3, 0]), axis=1) for start in (0, 3)]
    assert np.allclose(np.concatenate(rows), large[: 2 * SIDE, : 3 * SIDE] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("png/23.png,64,1,tumour", "points within 64 x 64"), ("png/23.png,-0.1,1,tumour", "points within"), ("png/23.png,nan,1,tumour", "points within"),
        ("png/23.png,inf,1,tumour", "points within"), ("png/23.png,,1,tumour", "points within"), ("png/23.png,a,1,tumour", "points within"),
        ("png/23.png,1,1,lymphocyte", "of kind tumour"), ("png/23.png,1,1,", "of kind tumour"),
    ],
)  # fmt: skip
def test_a_bad_point_makes_its_image_unusable_and_no_other(tmp_path: Path, row: str, match: str) -> None:
    folder = folder_of(tmp_path, marked=[*MARKED, row])
    cohort = load_cohort(folder, {})
    assert cohort.num_records == NUM - 1 and cohort.notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=f"got 1 of 24.*record 24: expected.*{match}") as caught:
        load_cohort(folder, {"tolerance": 0.01})
    assert "23.png" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("png/00.png,p0,s0", "listed twice"), ("png/99.png,p,s0", "found none"), ("../x.png,p,s0", "below the folder"), ("png/a.tif,p,s0", "ending"),
        ("small.png,p,s0", "at least 64 x 64"), ("cut.png,p,s0", "cannot be read"), ("empty.png,p,s0", "empty file"),
    ],
)  # fmt: skip
def test_a_bad_image_is_skipped_up_to_the_tolerance(tmp_path: Path, row: str, match: str) -> None:
    folder = folder_of(tmp_path, listed=[*LISTED, row])
    Image.fromarray(IMAGES[0][:, :-1]).save(folder / "small.png")
    content = (folder / "png" / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").write_bytes(b"")
    cohort = load_cohort(folder, {})
    assert cohort.num_records == NUM and cohort.notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=match):
        load_cohort(folder, {"tolerance": 0.01})


def test_too_many_cells_are_another_magnification(tmp_path: Path) -> None:
    marked = [f"png/00.png,{x},{y},tumour" for x in range(0, 64, 8) for y in range(0, 64, 8)]
    with pytest.raises(SchemaError, match="magnification|at most 32 tumour cells"):
        load_cohort(folder_of(tmp_path, marked=marked), {"tolerance": 0.0})


def test_points_of_images_that_are_not_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, marked=[*MARKED, "png/77.png,1,1,tumour"])
    assert load_cohort(folder, {}).notes["points_without_image"] == 1
    with pytest.raises(SchemaError, match="points.csv.*got 1 of 25.*does not list"):
        load_cohort(folder, {"tolerance": 0.01})


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("points.csv", b"", DataMissingError, "empty"), ("points.csv", b"image,x,y\n", DataMissingError, "at least one row"),
        ("points.csv", b"image,x,Y\na,1,2\n", SchemaError, "column 'y'"), ("points.csv", b"image,x,y\n\xff\xfe,1,2\n", SchemaError, "UTF-8"),
        ("points.csv", b"image,x,y\na,1,2,3\n", SchemaError, "fields"), ("images.csv", b"", DataMissingError, "empty"),
        ("images.csv", b"image,site\npng/00.png,a\n", SchemaError, "'patient'"), ("images.csv", b"image,patient\npng/01.png,\n", SchemaError, "identifier"),
        ("images.csv", b"image,patient,site\npng/01.png,p,a\npng/02.png,p,b\n", SchemaError, "one 'site'"),
    ],
)  # fmt: skip
def test_bad_lists(tmp_path: Path, name: str, content: bytes, error: type[Exception], match: str) -> None:
    folder = folder_of(tmp_path, marked=["png/01.png,1,1,tumour"])
    (folder / name).write_bytes(content)
    with pytest.raises(error, match=match):
        load_cohort(folder, {})


def test_a_list_may_quote_line_breaks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "images.csv").write_text('image,note,patient\npng/01.png,"two\nlines",p\n')
    (folder / "points.csv").write_text('note,image,x,y\n"one\ntwo",png/01.png,4,5\n')
    assert np.argwhere(load_cohort(folder, {}).labels == 1).tolist() == [[0, 5, 4]]


def test_absent_and_forbidden_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (None, tmp_path / "absent", tmp_path):
        with pytest.raises(DataMissingError, match="images.csv"):
            load_cohort(path, {})
    folder = folder_of(tmp_path)

    def forbidden(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(folder, {})


# Map, peaks and pairs -----------------------------------------------------------------------------------------------------------


def test_a_map_is_the_highest_bump_at_every_pixel_and_1_at_centres_alone() -> None:
    places = [[(0, 0), (30, 31), (33, 30), (63, 20)], [], [(5, 60)]]
    maps = maps_of(places)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for found, centres in zip(maps, places, strict=True):
        expected = np.zeros((SIDE, SIDE))
        for row, column in centres:
            near = (abs(rows - row) <= 6) & (abs(columns - column) <= 6)
            expected = np.maximum(expected, np.where(near, np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 8.0), 0))
        assert np.allclose(found, expected, atol=1e-6) and sorted(map(tuple, np.argwhere(found == 1).tolist())) == sorted(centres)
    assert maps.dtype == np.float32 and centres_of(maps).tolist() == [4, 0, 1]


@given(st.lists(st.tuples(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1)), max_size=12))
def test_peaks_of_a_map_are_its_centres_where_these_stand_apart(drawn: list[tuple[int, int]]) -> None:
    centres: list[tuple[int, int]] = []
    for place in drawn:
        if all(max(abs(place[0] - other[0]), abs(place[1] - other[1])) > DISTANCE for other in centres):
            centres.append(place)
    (found,) = peaks_of(0.9 * maps_of([centres]).astype(np.float64))
    assert sorted(map(tuple, found.tolist())) == sorted(centres)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 4.0]))
def test_peaks_are_local_maxima_in_order_and_apart(seed: int, levels: float) -> None:
    scores = (
        np.round(np.random.default_rng(seed).random((3, 24, 24)) * levels) / levels if levels > 1 else np.random.default_rng(seed).random((3, 24, 24))
    )
    for map_, found in zip(scores, peaks_of(scores), strict=True):
        heights = map_[found[:, 0], found[:, 1]]
        assert len(found) <= MOST_CELLS and (heights >= THRESHOLD).all() and (np.diff(heights) <= 0).all()
        for (row, column), height in zip(found.tolist(), heights.tolist(), strict=True):
            assert height == map_[max(row - DISTANCE, 0) : row + DISTANCE + 1, max(column - DISTANCE, 0) : column + DISTANCE + 1].max()
        gaps = [np.abs(a - b).max() for a, b in itertools.combinations(found, 2)]
        assert not gaps or min(gaps) > DISTANCE


def test_maps_without_a_peak_and_maps_that_are_all_peak() -> None:
    nothing = np.stack([np.full((24, 24), THRESHOLD - 1e-6), np.full((24, 24), np.nan), np.full((24, 24), np.inf)])
    assert [len(found) for found in peaks_of(nothing)] == [0, 0, 0]
    (found,) = peaks_of(np.ones((1, SIDE, SIDE)))
    assert len(found) == MOST_CELLS


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 5))
def test_pairs_are_as_many_as_any_assignment_gives(seed: int, num_found: int, num_true: int) -> None:
    rng = np.random.default_rng(seed)
    found, true = rng.integers(0, 9, size=(num_found, 2)), rng.integers(0, 9, size=(num_true, 2))
    near = np.linalg.norm(found[:, None] - true[None], axis=2) <= DISTANCE
    short, long = (near, num_true) if num_found <= num_true else (near.T, num_found)
    best = max(sum(bool(short[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(long), len(short)))
    assert num_pairs(found, true) == best


def test_three_pixels_are_near_enough_and_more_are_not() -> None:
    assert num_pairs(np.array([[10, 10]]), np.array([[10, 13]])) == 1 and num_pairs(np.array([[10, 10]]), np.array([[12, 13]])) == 0
    assert num_pairs(np.array([[10, 10], [10, 11]]), np.array([[10, 12]])) == 1


# Metrics and loss ---------------------------------------------------------------------------------------------------------------


def test_f1_is_that_of_all_cells_together() -> None:
    true = maps_of([[(10, 10), (30, 30)], [(20, 20)], []])
    given_ = 0.8 * maps_of([[(11, 12), (50, 50)], [(20, 21)], [(5, 5)]]).astype(np.float64)
    halves = [detection_sums(given_[part], with_labels(true[part])) for part in (slice(0, 1), slice(1, 3))]
    found = finish_metrics(METRICS, {"detections": halves[0] + halves[1]})
    assert found == {"f1": pytest.approx(2 * 2 / (2 * 2 + 2 + 1)), "precision": pytest.approx(2 / 4), "recall": pytest.approx(2 / 3)}
    one_patient = detection_sums(given_, with_labels(true, np.zeros(3, dtype=np.int64)))
    assert np.allclose(one_patient, (halves[0] + halves[1]) / 3)


def test_edges_of_f1() -> None:
    none, one = maps_of([[]]), maps_of([[(9, 9)]])
    assert finish_metrics(METRICS, {"detections": detection_sums(none.astype(np.float64), with_labels(none))}) == {
        "f1": None, "precision": None, "recall": None
    }  # fmt: skip
    assert finish_metrics(METRICS, {"detections": detection_sums(np.full(one.shape, np.nan), with_labels(one))})["f1"] == 0
    assert finish_metrics(METRICS, {"detections": detection_sums(one.astype(np.float64), with_labels(one))})["f1"] == 1.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_patient_adds_at_most_the_sensitivity_and_sums_agree(seed: int, records: int) -> None:
    rng = np.random.default_rng(seed)
    given_, true = rng.random((records + 3, 24, 24)), (rng.random((records + 3, 24, 24)) < rng.random() * 0.2).astype(np.float32)
    index = np.array([*[0] * records, 1, 2, 3])
    whole, alone = detection_sums(given_, with_labels(true, index)), detection_sums(given_[:records], with_labels(true[:records], index[:records]))
    assert np.allclose(whole, alone + detection_sums(given_[records:], with_labels(true[records:])))
    assert np.linalg.norm(alone) <= DETECTIONS.sensitivity + 1e-12 and DETECTIONS.could_be(whole, patients=4)
    assert not DETECTIONS.could_be(whole, patients=1)


@pytest.mark.parametrize("forged", [[4, 2, 1, 3], [4, 0, 5, 1], [4, 0, 1, 5], [4, -1, 1, 1], [4, np.nan, 1, 1]])
def test_sums_that_no_cells_have_are_told(forged: list[float]) -> None:
    assert not DETECTIONS.could_be(np.array(forged, dtype=np.float64), patients=4)


def test_the_loss_is_the_papers_equation_for_each_record_alone() -> None:
    torch.manual_seed(0)
    centres = torch.from_numpy(maps_of([[(3, 4), (20, 20)], [], [(60, 60)]]))
    outputs = torch.randn(centres.shape, dtype=torch.float64)
    losses = centre_loss(outputs, centres.double())
    given_, expected = torch.sigmoid(outputs).numpy(), []
    for score, centre in zip(given_, centres.double().numpy(), strict=True):
        terms = np.where(centre == 1, (1 - score) ** 2 * np.log(score), (1 - centre) ** 4 * score**2 * np.log(1 - score))
        expected.append(-terms.sum() / max((centre == 1).sum(), 1))
    assert losses.shape == (3,) and np.allclose(losses.numpy(), expected)
    right = torch.where(centres == 1, 30.0, -30.0)
    assert (centre_loss(right, centres) < 1e-9).all() and torch.isfinite(centre_loss(-5 * right, centres)).all()


# Synthetic patients and model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_synthetic_tissue_is_seeded_has_dark_tumour_cells_and_differs_by_site() -> None:
    cohort, again = synthetic_cohort(200, 3), synthetic_cohort(200, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    images, counts = cohort.inputs[0][:, 0], centres_of(cohort.labels)
    assert cohort.num_records > 230 and 0.05 < (counts == 0).mean() < 0.3 and counts.max() <= MOST_CELLS
    assert np.abs(images).max() <= 1 and np.isfinite(images).all()
    assert images[cohort.labels == 1].mean() < images[cohort.labels == 0].mean() - 0.3
    site = cohort.attributes["site"][cohort.patient_of_record]
    grey = [float(np.median(images[site == name])) for name in np.unique(site)]
    assert len(grey) == 4 and max(grey) - min(grey) > 0.2
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


def test_darkness_alone_does_not_tell_tumour_cells_from_others() -> None:
    """There are dark pixels wherever there are nuclei: the ten darkest places of a field find few tumour cells for what they invent."""
    cohort = synthetic_cohort(60, 4)
    darkness = (1 - cohort.inputs[0][:, 0].astype(np.float64)) / 2
    assert (finish_metrics(METRICS, {"detections": detection_sums(darkness, cohort)})["f1"] or 0) < 0.6


@pytest.mark.slow
def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    assert StackedModel(TASK.model(), 3).flat.shape[0] == 3


def test_the_net_keeps_size_starts_at_its_prior_and_sees_a_whole_nucleus() -> None:
    torch.manual_seed(0)
    model = CentreNet().eval()
    images = torch.rand(1, 1, SIDE, SIDE, requires_grad=True)
    outputs = model(images)
    assert outputs.shape == (1, SIDE, SIDE) and torch.sigmoid(outputs).median() < THRESHOLD
    outputs[0, SIDE // 2, SIDE // 2].backward()
    assert images.grad is not None
    seen = np.argwhere(images.grad[0, 0].abs().numpy() > 1e-5 * float(images.grad.abs().max()))
    assert (seen.max(axis=0) - seen.min(axis=0) >= 24).all()


@pytest.mark.slow
def test_a_few_steps_find_cells() -> None:
    cohort, test = synthetic_cohort(160, 5), synthetic_cohort(40, 6)
    torch.manual_seed(0)
    model = CentreNet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, centres = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(cohort.labels)
    for step in range(80):
        rows = slice(step * 32 % 192, step * 32 % 192 + 32)
        optimizer.zero_grad()
        centre_loss(model(images[rows]), centres[rows]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        sums = detection_sums(TASK.predict(model.eval()(torch.from_numpy(test.inputs[0]))).double().numpy(), test)
    assert (finish_metrics(METRICS, {"detections": sums})["f1"] or 0) > 0.7
