"""Lung nodules: a cube is what was scanned, whatever the scanner's slices; lists of nodules, bad input, and synthetic phantoms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from client.private_probe import probe_model
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.schema import TensorSchema
from shared.study import Study
from shared.task import resolve_task
from shared.tasks import dicom
from shared.tasks.dicom import AIR, series_of_folder
from shared.tasks.lung_nodule import SIDE, Mirroring, _grid, cube_around, load_cohort, model_input, synthetic_cohort
from simulations.blocks.layers import NotStackableError
from simulations.blocks.stacked import StackedModel
from tests.shared.test_dicom import write

STUDY = Path(__file__).resolve().parents[2] / "studies" / "lung-nodule.toml"
TASK = resolve_task("lung-nodule")
RNG = np.random.default_rng(0)
HEADER = "seriesuid,coordX,coordY,coordZ,malignant"
ORIENTATIONS = {
    "axial": [1.0, 0, 0, 0, 1.0, 0],
    "coronal": [1.0, 0, 0, 0, 0, -1.0],
    "sagittal": [0, 1.0, 0, 0, 0, -1.0],
    "feet first": [-1.0, 0, 0, 0, 1.0, 0],
    "oblique": [0.6, 0.8, 0, -0.48, 0.36, 0.8],
}


def scan(
    folder: Path, volume: np.ndarray, *, uid: str = "1.1", spacing: tuple[float, ...] = (1, 1, 1), orientation: str = "axial", **about: object
) -> Path:
    """Write a series of stored values `(D, H, W)`, the middle of its first voxel at (-10, 20, -30) mm."""
    right, down = np.reshape(ORIENTATIONS[orientation], (2, 3))
    for number, values in enumerate(volume):
        place = np.array([-10.0, 20.0, -30.0]) + np.cross(right, down) * spacing[0] * number
        write(
            folder / f"{uid}-{number:02}.dcm", values, SeriesInstanceUID=uid, ImagePositionPatient=[round(float(value), 6) for value in place],
            ImageOrientationPatient=ORIENTATIONS[orientation], PixelSpacing=[spacing[1], spacing[2]], **about,
        )  # fmt: skip
    return folder


def nodules(folder: Path, rows: list[str], *, header: str = HEADER) -> Path:
    (folder / "nodules.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def phantom(sides: tuple[int, ...] = (28, 26, 27)) -> np.ndarray:
    return RNG.integers(0, 2000, size=sides, dtype=np.uint16)


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_a_cube_on_the_grid_is_what_was_scanned_to_the_bit(tmp_path: Path) -> None:
    volume = phantom()
    series = series_of_folder(scan(tmp_path, volume), ["1.1"]).series["1.1"]
    first = np.array([3, 1, 2])  # slice, row, column
    middle = np.array([-10.0, 20.0, -30.0]) + (first + (SIDE - 1) / 2)[::-1]
    cube, beyond = cube_around(series, middle, source="a")
    assert np.array_equal(cube, volume[3:27, 1:25, 2:26].astype(np.float32) - 1024) and not beyond


@pytest.mark.parametrize(
    ("orientation", "spacing"), [*((name, (1.25, 0.7, 0.8)) for name in ORIENTATIONS), ("axial", (2.5, 0.9, 0.9)), ("oblique", (1, 1, 1))]
)
def test_what_is_linear_in_the_patient_is_so_in_the_cube_whatever_the_slices(tmp_path: Path, orientation: str, spacing: tuple[float, ...]) -> None:
    right, down = np.reshape(ORIENTATIONS[orientation], (2, 3))
    axes = np.stack([np.cross(right, down), down, right]) * np.array(spacing)[:, None]
    sides = tuple(int(40 / side) for side in spacing)
    points = np.array([-10.0, 20.0, -30.0]) + np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), axis=-1) @ axes
    slope = np.array([3.0, -5.0, 7.0])
    volume = np.round((points @ slope + 1024) * 10).astype(np.uint16)
    series = series_of_folder(
        scan(tmp_path, volume, spacing=spacing, orientation=orientation, RescaleSlope="0.1", BitsStored=16, HighBit=15), ["1.1"]
    )
    middle = points.reshape(-1, 3).mean(axis=0) + np.array([0.3, -0.2, 0.4])
    cube, _ = cube_around(series.series["1.1"], middle, source="a")
    expected = (middle + _grid().T[:, ::-1]) @ slope
    inside = cube.ravel() != AIR
    assert inside.mean() > 0.9 and np.abs(cube.ravel() - expected)[inside].max() < 0.1


def test_what_the_scan_does_not_show_is_air_and_counted(tmp_path: Path) -> None:
    volume = phantom()
    scan(tmp_path, volume)
    cohort = load_cohort(nodules(tmp_path, ["1.1,3.5,31.5,-28.5,1", "1.1,3.5,31.5,-16.5,0"]), {})
    cube = cohort.inputs[0][0, 0]
    assert (cube[:10] == -1).all() and np.array_equal(cube[10:], model_input(volume[None, :14, :24, 2:26].astype(np.float32) - 1024)[0, 0])
    assert cohort.notes["cubes_beyond_the_scan"] == 1 and cohort.num_patients == 1 and cohort.labels.tolist() == [1.0, 0.0]


@pytest.mark.slow
def test_patients_come_from_the_files_or_the_list(tmp_path: Path) -> None:
    for uid, patient in (("1.1", "P1"), ("1.2", "P2"), ("1.3", "P1")):
        scan(tmp_path / uid, phantom(), uid=uid, PatientID=patient)
    (tmp_path / "1.1" / "report.dcm").write_bytes(b"no dicom")
    rows = [f"{uid},3,32,-17,{label}" for uid, label in (("1.1", 1), ("1.2", 0), ("1.3", 0))]
    cohort = load_cohort(nodules(tmp_path, rows), {})
    assert cohort.patient_ids == ("P1", "P2") and cohort.patient_of_record.tolist() == [0, 1, 0] and not cohort.attributes
    assert cohort.notes == {
        "records_dropped": 0, "records_without_label": 0, "cubes_beyond_the_scan": 0, "nodules_larger_than_the_cube": 0, "files_unreadable": 1,
    }  # fmt: skip
    about = ["a,s,F,61,30.5", "b,t,M,70,4", "b,t,M,70,"]
    rows = [f"{row},{text}" for row, text in zip([*rows[:2], "1.3,3,32,-17,"], about, strict=True)]
    cohort = load_cohort(nodules(tmp_path, rows, header=f"{HEADER},patient,site,sex,age,diameter_mm") / "nodules.csv", {})
    assert cohort.patient_ids == ("a", "b") and cohort.num_records == 2
    assert {name: values.tolist() for name, values in cohort.attributes.items()} == {"site": ["s", "t"], "sex": ["F", "M"], "age": ["61", "70"]}
    assert cohort.notes["records_without_label"] == 1 and cohort.notes["nodules_larger_than_the_cube"] == 1


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three series: a good one, one that lacks a slice, and one with a slice that is cut short."""
    folder = tmp_path_factory.mktemp("scans")
    for uid in ("1.1", "1.2", "1.3"):
        scan(folder, phantom(), uid=uid)
    (folder / "1.2-09.dcm").unlink()
    damaged = folder / "1.3-09.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-99])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("9.9,3,32,-17,1", "found none"), ("1.1,300,32,-17,1", "inside its series"), ("1.1,,32,-17,1", "inside its series"),
        ("1.1,inf,32,-17,1", "inside its series"), ("1.1,x,32,-17,1", "inside its series"), ("1.1,3,32,-17,2", "neither 1 nor 0"),
        ("1.1,4.0,32,-17.00,1", "listed twice"), ("1.2,3,32,-17,1", "a slice is missing"), ("1.3,3,32,-17,1", "cannot be read"),
    ],
)  # fmt: skip
def test_one_bad_record_is_skipped_and_counted(scans: Path, row: str, match: str) -> None:
    folder = nodules(scans, [*(f"1.1,{x},32,-17,{x % 2}" for x in range(4, 9)), row])
    cohort = load_cohort(folder, {"tolerance": 0.2})
    assert cohort.num_records == 5 and cohort.notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=f"got 1 of 6.*{match}") as caught:
        load_cohort(folder, {})
    assert "1.1-" not in str(caught.value) and "P1" not in str(caught.value)


@pytest.mark.slow
def test_lists_that_are_not_as_declared(tmp_path: Path) -> None:
    scan(tmp_path, phantom())
    row = "1.1,3,32,-17,1"
    with pytest.raises(SchemaError, match="'malignant'"):
        load_cohort(nodules(tmp_path, ["1.1,3,32,-17"], header=HEADER.rpartition(",")[0]), {})
    with pytest.raises(SchemaError, match="one 'site'"):
        load_cohort(nodules(tmp_path, [f"{row},s", "1.1,4,32,-17,1,t"], header=f"{HEADER},site"), {})
    with pytest.raises(SchemaError, match="identifier"):
        load_cohort(nodules(tmp_path, [f"{row},"], header=f"{HEADER},patient"), {})
    with pytest.raises(DataMissingError, match="at least one nodule"):
        load_cohort(nodules(tmp_path, ["1.1,3,32,-17,"]), {})
    with pytest.raises(DataMissingError, match="at least one row"):
        load_cohort(nodules(tmp_path, []), {})
    with pytest.raises(DataMissingError, match="no data of its own"):
        load_cohort(None, {})
    with pytest.raises(ConfigurationError, match="'other'"):
        load_cohort(tmp_path, {"other": 1})
    (tmp_path / "nodules.csv").write_bytes(HEADER.encode() + b"\n\xff\xfe,3,32,-17,1\n")
    with pytest.raises(SchemaError, match="UTF-8"):
        load_cohort(tmp_path, {})
    nodules(tmp_path, [f'{row},"two\nlines"'], header=f"{HEADER},note")
    assert load_cohort(tmp_path, {}).num_records == 1


def test_a_file_that_may_not_be_read_is_no_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodules(scan(tmp_path, phantom()), ["1.1,3,32,-17,1"])

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(dicom, "_has_mark", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(tmp_path, {"tolerance": 0.9})


# Synthetic patients and model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_synthetic_phantoms_are_seeded_and_differ_by_site() -> None:
    cohort, again = synthetic_cohort(400, 3), synthetic_cohort(400, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    (schema,) = TASK.schema if isinstance(TASK.schema, tuple) else ()
    assert isinstance(schema, TensorSchema) and cohort.inputs[0].shape[1:] == schema.shape and cohort.inputs[0].dtype == np.float32
    assert cohort.inputs[0].min() >= -1 and cohort.inputs[0].max() <= 1 and 400 < cohort.num_records < 520
    site = cohort.attributes["site"][cohort.patient_of_record]
    rates = {name: cohort.labels[site == name].mean() for name in np.unique(site)}
    assert max(rates.values()) - min(rates.values()) > 0.08  # of some 115 a site, 0.30 and 0.50: false alarm 3 %, and seeded
    rough = {name: np.abs(np.diff(cohort.inputs[0][site == name], axis=2)).mean() for name in rates}
    assert rough["synthetic-3"] < rough["synthetic-1"] < rough["synthetic-4"]  # thick slices, and noise
    beyond = (cohort.inputs[0][:, 0] == -1).all(axis=(2, 3)).any(axis=1).mean()
    assert 0.02 < beyond < 0.09
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


@pytest.mark.slow
def test_malignancy_can_be_seen_and_by_no_single_number() -> None:
    train, test = synthetic_cohort(300, 1), synthetic_cohort(200, 2)
    radius = np.linalg.norm(_grid(), axis=0)
    features = [
        np.stack([cohort.inputs[0].reshape(cohort.num_records, -1)[:, (radius >= at) & (radius < at + 1)].mean(axis=1) for at in range(12)], axis=1)
        for cohort in (train, test)
    ]
    scores = LogisticRegression(C=10, max_iter=1000).fit(features[0], train.labels).decision_function(features[1])
    assert roc_auc_score(test.labels, scores) > 0.9
    assert max(roc_auc_score(test.labels, column) for column in features[1].T) < 0.97


def test_the_model_may_be_trained_privately_and_says_why_not_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    with pytest.raises(NotStackableError, match="Conv3d|Mirroring"):
        StackedModel(TASK.model(), 3)


def test_mirroring_is_a_draw_for_each_record_in_training_alone() -> None:
    cubes = torch.rand(200, 1, 3, 3, 3)
    assert Mirroring(0.5).eval()(cubes) is cubes and Mirroring(0.0).train()(cubes) is cubes
    torch.manual_seed(0)
    made = Mirroring(0.5).train()(cubes)
    ways = [tuple(axis for axis in range(3) if number >> axis & 1) for number in range(8)]
    found = [next(way for way in ways if torch.equal(made[row], cubes[row].flip([axis + 1 for axis in way]))) for row in range(200)]
    assert set(found) == set(ways)  # of eight ways in 200 draws one is missing once in 5e10 times
    torch.manual_seed(0)
    other = cubes.clone()
    other[7] = 0
    again = Mirroring(0.5).train()(other)
    assert [row for row in range(200) if not torch.equal(made[row], again[row])] == [7]


@pytest.mark.slow
def test_a_few_steps_tell_malignant_from_benign() -> None:
    train, test = synthetic_cohort(300, 5), synthetic_cohort(200, 6)
    torch.manual_seed(0)
    model = TASK.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cubes, labels = torch.from_numpy(train.inputs[0]), torch.from_numpy(train.labels)
    for _ in range(6):
        for rows in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            TASK.loss(model(cubes[rows]), labels[rows]).mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert roc_auc_score(test.labels, TASK.predict(model.eval()(torch.from_numpy(test.inputs[0])))) > 0.85
