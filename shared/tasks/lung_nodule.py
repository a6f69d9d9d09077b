"""Lung nodule: is a nodule that a screening CT shows malignant, from the 24 mm around it.

A hospital's data are a folder of DICOM slices, as a scanner or archive exports them, and a CSV with the middle of every nodule in the scanner's own
coordinates. That is how LIDC-IDRI (Armato et al. 2011) and LUNA16 (Setio et al. 2017) are published too; labels of malignancy are the hospital's.

Around every nodule a cube of S points a side, 1 mm apart, is interpolated along the patient's own axes (feet to head, front to back, right to left),
whatever the scanner's slices are; Hounsfield units from -1000 to 400 become -1 to 1, and what the scan does not show counts as air.

Legend: N records (nodules), S side of the cube in points, K lobes of a synthetic nodule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError, SchemaError
from shared.metrics import BINARY_METRICS
from shared.schema import MISSING_MARKS, TensorSchema
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.dicom import AIR, Series, SeriesFolder, hounsfield_box, series_of_folder
from shared.tasks.images import BoolArray, attribute_of, in_set, patients_of, read_listing, refuse_too_many, tolerance_of
from shared.tasks.tabular import attribute_texts, logistic_loss, only_csv

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

Voxels = NDArray[np.float32]

NAME = "lung-nodule"
SIDE = 24
WINDOW = (AIR, 400.0)  # Hounsfield units
COORDINATES = ("coordX", "coordY", "coordZ")  # mm, in DICOM's patient axes: to the left, to the back, to the head; the names are LUNA16's
UNKNOWN = -1.0
MEANINGS = {"1": 1.0, "0": 0.0, **{mark.lower(): UNKNOWN for mark in MISSING_MARKS}}
ATTRIBUTES = ("sex", "age")  # of a patient at the first nodule
SUBGROUPS = (Subgroup(attribute="sex", names={"F": "female", "M": "male"}), Subgroup(attribute="age", edges=(60, 70)))
SYNTHETIC_SITES = {
    "synthetic-1": (1, 20.0, 0.0, 0.35),
    "synthetic-2": (2, 35.0, 10.0, 0.45),
    "synthetic-3": (3, 15.0, -20.0, 0.30),
    "synthetic-4": (1, 45.0, 15.0, 0.50),
}  # slice thickness in mm, noise and offset in Hounsfield units, share of malignant nodules
SYNTHETIC_SECOND_NODULE_RATE = 0.15  # of patients
SYNTHETIC_CUT_RATE = 0.05  # of nodules so near the first or last slice that the scan shows a part of the cube
SYNTHETIC_LOBES = 6  # K
SYNTHETIC_CHUNK = 32  # nodules drawn at once, which stay in cache

SCHEMA = (TensorSchema(name="cube", shape=(1, SIDE, SIDE, SIDE), unit="Hounsfield units, -1000 as -1 and 400 as 1, every mm", low=-1.0, high=1.0),)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A folder of DICOM slices (CT series, in any subfolders) with one CSV of nodules: `seriesuid`, `coordX`, `coordY`, `coordZ`, `malignant`.

    Coordinates are mm in DICOM's patient axes; `malignant` is 1, 0, or empty where nobody knows, and such a nodule is left out and counted. There may
    be `patient` (else the files' PatientID is the patient), `site`, `sex` (F, M), `age` and `diameter_mm`. A patient's nodules are records of one.

    Args:
        path: the folder, or the CSV in it.
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many records are.
        ConfigurationError: pydicom is not installed.
    """
    tolerance = tolerance_of(options, NAME)
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", "give your folder with --data")
    file = only_csv(path)
    frame = read_listing(file, ["seriesuid", *COORDINATES, "malignant"])
    labels, known = in_set(frame["malignant"], MEANINGS)
    folder = series_of_folder(file.parent, set(frame["seriesuid"]))
    read = read_nodules(frame, folder, source=file.name)
    usable = read.usable & known & ~_repeated(frame)
    problem = read.first_problem or "malignant is neither 1 nor 0, or a nodule listed twice"
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=file.name, first=problem, bad=~usable)
    kept = usable & (labels != UNKNOWN)
    if not kept.any():
        raise DataMissingError(f"{file.name}: expected at least one nodule with a label, got none", "fill in the column malignant")
    notes = {
        "records_dropped": int((~usable).sum()),
        "records_without_label": int((usable & ~kept).sum()),
        "cubes_beyond_the_scan": int(read.cut[kept].sum()),
        "nodules_larger_than_the_cube": _num_larger(frame[kept]),
        "files_unreadable": folder.num_unreadable,
    }
    patients = frame["patient"].tolist() if "patient" in frame.columns else [_patient(folder, uid) for uid in frame["seriesuid"]]
    identifiers = [name for name, keep in zip(patients, kept, strict=True) if keep]
    return _cohort(frame[kept], identifiers, read.cubes[kept], labels[kept], notes=notes, source=file.name)


def _places(frame: "pd.DataFrame") -> NDArray[np.float64]:
    """`(N, 3)` mm, not finite where a list says nothing or no number."""
    import pandas as pd

    return np.stack([pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64) for name in COORDINATES], axis=1)


def _repeated(frame: "pd.DataFrame") -> BoolArray:
    """`(N,)`, True for a nodule that an earlier row lists already, however its numbers are written."""
    import pandas as pd

    return pd.DataFrame(_places(frame)).assign(series=frame["seriesuid"].to_numpy()).duplicated().to_numpy(dtype=np.bool_)


def _patient(folder: SeriesFolder, uid: str) -> str:
    return folder.series[uid].patient if uid in folder.series else ""


def _num_larger(frame: "pd.DataFrame") -> int:
    import pandas as pd

    diameters = pd.to_numeric(frame["diameter_mm"], errors="coerce") if "diameter_mm" in frame.columns else pd.Series(dtype=float)
    return int((diameters > SIDE).sum())


def _cohort(
    frame: "pd.DataFrame", identifiers: Sequence[str], cubes: Voxels, labels: NDArray[np.float32], *, notes: Mapping[str, int], source: str
) -> Cohort:
    patients = patients_of(identifiers, source=source)
    attributes = {name: attribute_texts(frame[name])[patients.first] for name in ATTRIBUTES if name in frame.columns}
    if "site" in frame.columns:
        attributes["site"] = attribute_of(frame["site"].to_numpy(), patients, "site", source=source)
    return Cohort(
        inputs=(model_input(cubes),),
        labels=labels,
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes=attributes,
        notes=notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadNodules:
    """Cubes `(N, S, S, S)` in Hounsfield units, air where unusable; which are usable `(N,)`, and which the scan shows in part only `(N,)`."""

    cubes: Voxels = field(repr=False)
    usable: BoolArray = field(repr=False)
    cut: BoolArray = field(repr=False)
    first_problem: str = ""


def read_nodules(frame: "pd.DataFrame", folder: SeriesFolder, *, source: str) -> ReadNodules:
    """The cube around every nodule of the list; one whose series is not there, or not as it should be, is unusable.

    Raises:
        DataAccessError: a file may not be read; that is no bad record.
    """
    places = _places(frame)
    cubes = np.full((len(frame), SIDE, SIDE, SIDE), AIR, dtype=np.float32)
    usable, cut = np.zeros(len(frame), dtype=np.bool_), np.zeros(len(frame), dtype=np.bool_)
    first = ""
    for row, uid in enumerate(frame["seriesuid"]):
        place = f"{source}: record {row + 1}"
        try:
            if uid not in folder.series:
                raise SchemaError(f"{place}: {folder.problems.get(uid, 'expected its series in the folder, found none')}")
            cubes[row], cut[row] = cube_around(folder.series[uid], places[row], source=place)
            usable[row] = True
        except (SchemaError, DataMissingError) as error:
            first = first or error.what
    return ReadNodules(cubes=cubes, usable=usable, cut=cut, first_problem=first)


def cube_around(series: Series, middle: NDArray[np.float64], *, source: str) -> tuple[Voxels, bool]:
    """`(S, S, S)` Hounsfield units around a point of the patient, and whether a part of it lies beyond the scan, which is air then.

    Axes are the patient's: to the head, to the back, to the left; linear between voxels.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the point is not in the series, or a slice cannot be read.
    """
    from scipy.ndimage import map_coordinates  # half a second to import: only where there are scans

    size = np.array(series.size)
    inside = np.isfinite(middle).all() and (np.abs(series.index_of(middle[:, None])[:, 0] - (size - 1) / 2) <= size / 2).all()
    if not inside:
        raise SchemaError(f"{source}: expected coordinates inside its series, in mm, got others", "give DICOM's patient coordinates (LPS)")
    index = series.index_of(middle[:, None] + _grid()[::-1].astype(np.float64))
    first = np.clip(np.floor(index.min(axis=1)), 0, size - 1).astype(int)
    last = np.clip(np.ceil(index.max(axis=1)), 0, size - 1).astype(int) + 1
    box = hounsfield_box(series, first.tolist(), last.tolist(), source=source)
    cube = map_coordinates(box, index - first[:, None], order=1, mode="constant", cval=AIR, output=np.float32)
    beyond = bool((index.min(axis=1) < 0).any() or (index.max(axis=1) > size - 1).any())
    return np.asarray(cube.reshape(SIDE, SIDE, SIDE), dtype=np.float32), beyond


def _grid() -> Voxels:
    """`(3, S^3)` mm from the middle of the cube: to the head, to the back, to the left."""
    steps = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, -1)


def model_input(hounsfield: Voxels) -> Voxels:
    """`(N, S, S, S)` Hounsfield units as the model takes them, `(N, 1, S, S, S)` in [-1, 1]."""
    low, high = WINDOW
    return np.asarray(2 * (np.clip(hounsfield, low, high)[:, None] - low) / (high - low) - 1, dtype=np.float32)


# Synthetic patients -------------------------------------------------------------------------------------------------------------


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients: a nodule in lung with vessels, and sometimes the chest wall; three in twenty have a second nodule.

    A malignant one tends to be larger, to be lobed, and to be solid in its middle only; a benign one to be round, even, and now and then
    calcified. All of these overlap. Four sites differ in slice thickness, noise, offset, and in how many nodules are malignant.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    names = np.array(list(SYNTHETIC_SITES))
    site = rng.integers(len(names), size=num_patients)
    sex, age = rng.choice(["F", "M"], size=num_patients), rng.integers(50, 81, size=num_patients)  # whom screening invites
    second = np.flatnonzero(rng.random(num_patients) < SYNTHETIC_SECOND_NODULE_RATE)
    patient_of_record = np.concatenate([np.arange(num_patients), second]).astype(np.int64)
    settings = np.array(list(SYNTHETIC_SITES.values()))[site[patient_of_record]]
    malignant = rng.random(len(settings)) < settings[:, 3]
    cubes = _synthetic_cubes(malignant.astype(np.float32), settings.astype(np.float32), rng)
    return Cohort(
        inputs=(model_input(cubes),),
        labels=malignant.astype(np.float32),
        patient_of_record=patient_of_record,
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site], "sex": sex, "age": age.astype(np.str_)},
        synthetic=True,
    )


def _synthetic_cubes(malignant: Voxels, settings: Voxels, rng: np.random.Generator) -> Voxels:
    """`(N, S, S, S)` Hounsfield units."""
    cubes = np.empty((len(malignant), SIDE, SIDE, SIDE), dtype=np.float32)
    for start in range(0, len(malignant), SYNTHETIC_CHUNK):
        part = slice(start, start + SYNTHETIC_CHUNK)
        thickness, noise, offset = settings[part, :3].T[:, :, None, None, None]
        shown = _thick_slices(_anatomy(malignant[part], rng), thickness)
        shown += offset + noise * rng.standard_normal(shown.shape, dtype=np.float32)
        shown[_cut(len(shown), rng)] = AIR
        cubes[part] = shown
    return cubes


def _anatomy(malignant: Voxels, rng: np.random.Generator) -> Voxels:
    """`(n, S, S, S)` Hounsfield units as a perfect scanner would show them."""
    count = len(malignant)

    def uniform(low: float, high: float) -> Voxels:
        return rng.uniform(low, high, size=(count, 1)).astype(np.float32)

    def either(of_benign: float, of_malignant: float) -> BoolArray:
        return np.asarray(rng.random((count, 1)) < np.where(malignant[:, None] > 0, of_malignant, of_benign))

    ill = malignant[:, None]
    places = _grid() - rng.uniform(-1.5, 1.5, size=(count, 3, 1)).astype(np.float32)  # (n, 3, S^3) mm from the nodule's middle
    distance = np.sqrt(np.square(places).sum(axis=1))
    radius = np.exp(rng.normal(np.log(3.6) + 0.6 * ill, 0.22, size=(count, 1))).astype(np.float32)
    lobed = np.clip(rng.normal(0.05 + 0.5 * ill, 0.12, size=(count, 1)), 0, 1).astype(np.float32)
    edge = radius * (1 + lobed * _bumps(places / np.maximum(distance, 0.1)[:, None], rng))
    depth = edge - distance
    inside = 1 / (1 + np.exp(np.clip(-3 * depth, -30, 30)))  # 1 in the nodule, and its edge as soft as a voxel is wide
    core = distance < 0.55 * edge
    nodule = np.where(either(0.1, 0.35) & ~core, np.float32(-450), uniform(-50, 60))
    nodule = np.where(either(0.25, 0.03) & core, np.float32(400), nodule)
    lung = np.where(_vessels(places, rng), np.float32(-20), uniform(-880, -820))
    wall = (_directions(count, 1, rng) @ places)[:, 0]
    lung = np.where((rng.random((count, 1)) < 0.15) & (wall > radius + uniform(0, 5)), np.float32(30), lung)
    return np.asarray((lung + (nodule - lung) * inside).reshape(count, SIDE, SIDE, SIDE), dtype=np.float32)


def _directions(count: int, num: int, rng: np.random.Generator) -> Voxels:
    """`(n, num, 3)` unit vectors."""
    vectors = rng.standard_normal((count, num, 3), dtype=np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=2, keepdims=True), dtype=np.float32)


def _bumps(towards: Voxels, rng: np.random.Generator) -> Voxels:
    """`(n, S^3)`: about 1 in the directions of K lobes and below 0 between them; 0 on the mean over all directions.

    Args:
        towards: `(n, 3, S^3)` unit vectors.
    """
    cosines = _directions(len(towards), SYNTHETIC_LOBES, rng) @ towards
    return np.asarray(np.exp(8 * (cosines - 1)).sum(axis=1) - SYNTHETIC_LOBES / 16, dtype=np.float32)


def _vessels(places: Voxels, rng: np.random.Generator) -> BoolArray:
    """`(n, S^3)`, True in two straight vessels of 1 to 2 mm."""
    count = len(places)
    found = np.zeros((count, places.shape[2]), dtype=np.bool_)
    for _ in range(2):
        from_start = places - rng.uniform(-10, 10, size=(count, 3, 1)).astype(np.float32)
        square = np.square(from_start).sum(axis=1) - np.square((_directions(count, 1, rng) @ from_start)[:, 0])
        found |= square < np.square(rng.uniform(0.6, 1.2, size=(count, 1)).astype(np.float32))
    return found


def _thick_slices(cubes: Voxels, thickness: Voxels) -> Voxels:
    """Every slice as the mean of as many as it is thick, in mm."""
    around = [np.roll(cubes, shift, axis=1) for shift in (0, 1, -1)]
    return np.asarray(sum(values * (thickness > number) for number, values in enumerate(around)) / thickness, dtype=np.float32)


def _cut(count: int, rng: np.random.Generator) -> BoolArray:
    """`(n, S, S, S)`, True in the slices beyond the first or last of a scan."""
    num_cut = rng.integers(1, 8, size=(count, 1)) * (rng.random((count, 1)) < SYNTHETIC_CUT_RATE)
    slices = np.where(rng.random((count, 1)) < 0.5, np.arange(SIDE), np.arange(SIDE)[::-1])
    return np.broadcast_to((slices < num_cut)[:, :, None, None], (count, SIDE, SIDE, SIDE))


# Model --------------------------------------------------------------------------------------------------------------------------


class Mirroring(nn.modules.dropout._DropoutNd):
    """Cubes `(N, C, S, S, S)`, each mirrored along each of its axes with chance `p`; in training alone, and every record by its own draw.

    As `shared.tasks.images.Augmentation` it draws as dropout does, and is known for that by its base class.
    """

    def forward(self, cubes: torch.Tensor) -> torch.Tensor:
        """The cubes, mirrored in training; the same in evaluation."""
        if not self.training or self.p == 0:
            return cubes
        mirrored = torch.rand(len(cubes), 3, dtype=cubes.dtype) < self.p
        for axis in range(3):
            cubes = torch.where(mirrored[:, axis, None, None, None, None].to(cubes.device), cubes.flip(axis + 2), cubes)
        return cubes


def model() -> nn.Module:
    """A small 3-D CNN, `(N, 1, S, S, S) -> (N, 1)` logits: two convolutions with GroupNorm, after halving the cube, which takes out noise."""
    return nn.Sequential(
        Mirroring(0.5),
        nn.AvgPool3d(2),
        nn.Conv3d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(128, 1),
    )


def lung_nodule() -> Task:
    """The task `lung-nodule`."""
    return Task(
        name=NAME,
        title="Malignant nodule in a screening CT of the lung",
        modality="volume",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=model,
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="your own DICOM series and a CSV of nodules; synthetic phantoms",
        default_study="lung-nodule.toml",
        subgroups=SUBGROUPS,
    )
