"""Tumour-cell detection: where in a field of stained tissue are nuclei of tumour cells, and not of other cells.

A map of centres (Zhou, Wang, Krähenbühl 2019, "Objects as Points", arXiv:1904.07850): every tumour cell is a Gaussian bump of height 1, the model gives
the map, and its local maxima are the cells found. Metric: F1 of pairs at most three pixels apart, one to one, by sums over patients, which sums over
sites give exactly.

Images are never resized, for a nucleus has its size: larger ones are cut into tiles of S x S pixels.

Legend: N records (tiles), S side of a tile, K points of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import DataMissingError, SchemaError
from shared.metrics import ROUNDING, FloatArray, Metric, Statistic
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import (
    BoolArray,
    FloatImages,
    attribute_of,
    in_set,
    model_input,
    patients_of,
    read_image,
    read_listing,
    reading,
    refuse_too_many,
    repeated_images,
    tolerance_of,
)

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "cell-detection"
SIDE = 64
LISTING, POINTS = "images.csv", "points.csv"
KINDS = {"tumour": 1.0, "tumor": 1.0, "other": 0.0}
MOST_CELLS = 32  # tumour cells of a tile, true or found: then nuclei stand 11 pixels apart; more is another magnification
DISTANCE = 3  # pixels: from a centre to what is found, at most; and between two that are found, at least one more along an axis
BUMP = 2.0  # standard deviation in pixels
REACH = 6  # pixels from a centre up to which its bump is drawn
THRESHOLD = 0.3  # of a peak; fixed before anything was measured, and tuned on nobody
PRIOR_LOGIT = -2.2  # the model starts where every pixel is a centre with probability 0.1 (after Lin et al. 2017, arXiv:1708.02002)
SYNTHETIC_SITES = {
    "synthetic-1": (0.86, 0.50, 0.04),
    "synthetic-2": (0.76, 0.38, 0.06),
    "synthetic-3": (0.92, 0.58, 0.05),
    "synthetic-4": (0.70, 0.42, 0.07),
}  # grey of tissue, darkness of stain, noise
SYNTHETIC_SLOTS = 5  # along each axis: places where there may be a nucleus
SYNTHETIC_JITTER = 4.0  # pixels
SYNTHETIC_HEALTHY_RATE = 0.15  # of fields without a tumour cell
SYNTHETIC_BARE_RATE = 0.1  # of fields that tissue does not fill
STAMP = 9  # pixels from its centre in which a nucleus is drawn

SCHEMA = (TensorSchema(name="image", shape=(1, SIDE, SIDE), unit="grey value, black -1 to white 1", low=-1.0, high=1.0),)


# Data ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """An image's tiles `(n, S, S)` in [0, 1], their maps of centres `(n, S, S)`, and how many tumour cells lie in the rest that fills no tile."""

    images: FloatImages = field(repr=False)
    centres: FloatImages = field(repr=False)
    num_outside: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Marked cells: `(K,)` each; one that is unusable has no place in an image, or a kind outside the set."""

    image: NDArray[np.str_] = field(repr=False)
    x: FloatArray = field(repr=False)
    y: FloatArray = field(repr=False)
    tumour: BoolArray = field(repr=False)
    usable: BoolArray = field(repr=False)

    def of(self, image: str) -> "Points":
        """The points of this image."""
        chosen = self.image == image
        return Points(image=self.image[chosen], x=self.x[chosen], y=self.y[chosen], tumour=self.tumour[chosen], usable=self.usable[chosen])


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A folder of PNG images, `images.csv` (columns `image`, `patient`, and there may be `site`) and `points.csv` (`image`, `x`, `y`, `kind` if any).

    A point is a nucleus in pixels of its image, from the left and from the top; its kind is tumour or other, and without that column all are tumour.
    An image without points has no tumour cell. An image is cut into tiles from its upper left corner, each of them a record of its patient.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many images are.
    """
    tolerance = tolerance_of(options, NAME)
    with reading(str(path)):
        if path is None or not path.is_dir():
            raise DataMissingError(f"task {NAME}: expected a folder with {LISTING} and {POINTS}, got none", "give the folder with --data")
    frame = read_listing(path / LISTING, ["image", "patient"])
    points = read_points(path / POINTS)
    strange = ~np.isin(points.image, frame["image"].to_numpy(dtype=np.str_))
    refuse_too_many(int(strange.sum()), len(strange), tolerance=tolerance, source=POINTS, first=f"a point of an image that {LISTING} does not list")
    tiles, usable, first = _read_tiles(path, frame, points)
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=LISTING, first=first, bad=~usable)
    notes = {
        "records_dropped": int((~usable).sum()),
        "points_without_image": int(strange.sum()),
        "cells_outside_tiles": sum(part.num_outside for part in tiles),
    }
    return _cohort(frame[usable], tiles, notes)


def read_points(path: Path) -> Points:
    """The points in a CSV.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `read_listing`.
    """
    import pandas as pd

    frame = read_listing(path, ["image", "x", "y"])
    x, y = (np.array(pd.to_numeric(frame[name], errors="coerce"), dtype=np.float64) for name in ("x", "y"))
    kinds, known = in_set(frame["kind"], KINDS) if "kind" in frame.columns else (np.ones(len(frame)), np.ones(len(frame), dtype=np.bool_))
    usable = known & np.isfinite(x) & np.isfinite(y)
    return Points(image=frame["image"].to_numpy(dtype=np.str_), x=x, y=y, tumour=np.asarray(kinds == 1.0), usable=usable)


def _read_tiles(folder: Path, frame: "pd.DataFrame", points: Points) -> tuple[list[Tiles], BoolArray, str]:
    """The tiles of each usable image, which of the images are usable, and what ails the first that is not."""
    tiles, usable, first = [], ~repeated_images(frame), ""
    for row, name in enumerate(frame["image"].tolist()):
        if not usable[row]:
            first = first or f"{LISTING}: record {row + 1}: an image listed twice"
            continue
        place = f"{LISTING}: record {row + 1}"
        try:
            tiles.append(tiles_of(read_image(folder, name, place), points.of(name), source=place))
        except (SchemaError, DataMissingError) as error:
            usable[row] = False
            first = first or error.what
    return tiles, usable, first


def tiles_of(image: FloatImages, points: Points, *, source: str) -> Tiles:
    """An image `(H, W)` and its points as tiles, from the upper left corner; what is left at the right and below is left out.

    Raises:
        SchemaError: the image is smaller than a tile, a point is unusable or outside the image, or a tile has too many tumour cells.
    """
    height, width = image.shape
    down, right = height // SIDE, width // SIDE
    if not (down and right):
        raise SchemaError(f"{source}: expected at least {SIDE} x {SIDE} pixels, got {width} x {height}", "cut larger fields, and do not resize them")
    outside = ~points.usable | (points.x < 0) | (points.y < 0) | (points.x >= width) | (points.y >= height)
    if outside.any():
        raise SchemaError(
            f"{source}: expected points within {width} x {height} pixels, of kind {', '.join(KINDS)}, got {int(outside.sum())} others", "correct them"
        )
    x, y = points.x[points.tumour].astype(np.int64), points.y[points.tumour].astype(np.int64)
    within = (x < right * SIDE) & (y < down * SIDE)
    x, y = x[within], y[within]
    centres = centre_maps((y // SIDE) * right + x // SIDE, y % SIDE, x % SIDE, num_maps=down * right)
    if centres_of(centres).max() > MOST_CELLS:
        raise SchemaError(
            f"{source}: expected at most {MOST_CELLS} tumour cells in {SIDE} x {SIDE} pixels, got more", "check the magnification of image and points"
        )
    cut = image[: down * SIDE, : right * SIDE].reshape(down, SIDE, right, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)
    return Tiles(images=cut, centres=centres, num_outside=int((~within).sum()))


def centre_maps(tile: NDArray[np.int64], row: NDArray[np.int64], column: NDArray[np.int64], *, num_maps: int) -> FloatImages:
    """`(num_maps, S, S)`: a bump for each cell, 1 at its pixel and nowhere else; where bumps meet, the higher (their section 3)."""
    offsets = np.arange(-REACH, REACH + 1)
    bump = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * BUMP**2)).astype(np.float32)
    maps = np.zeros((num_maps, SIDE + 2 * REACH, SIDE + 2 * REACH), dtype=np.float32)
    rows, columns = (place[:, None] + REACH + offsets for place in (row, column))
    np.maximum.at(maps, (tile[:, None, None], rows[:, :, None], columns[:, None, :]), bump)
    return np.ascontiguousarray(maps[:, REACH:-REACH, REACH:-REACH])


def centres_of(maps: NDArray[np.generic]) -> NDArray[np.int64]:
    """`(N,)`: how many centres each map has."""
    return np.asarray((maps == 1).sum(axis=(1, 2)), dtype=np.int64)


def _cohort(frame: "pd.DataFrame", tiles: list[Tiles], notes: Mapping[str, int]) -> Cohort:
    """The cohort of these images' tiles."""
    of_image = patients_of(frame["patient"].tolist(), source=LISTING)
    return Cohort(
        inputs=(model_input(np.concatenate([part.images for part in tiles])),),
        labels=np.concatenate([part.centres for part in tiles]),
        patient_of_record=np.repeat(of_image.patient_of_record, [len(part.images) for part in tiles]),
        patient_ids=of_image.patient_ids,
        attributes={"site": attribute_of(frame["site"].to_numpy(), of_image, "site", source=LISTING)} if "site" in frame.columns else {},
        notes=notes,
    )


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients with one or two fields of tissue: large, irregular, mottled nuclei of tumour cells among small, round, dark ones of others.

    Four sites differ in stain and noise. One field in seven has no tumour cell, and one in ten is partly bare glass.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    patient = np.repeat(np.arange(num_patients, dtype=np.int64), rng.integers(1, 3, size=num_patients))
    names = np.array(list(SYNTHETIC_SITES))
    site = rng.integers(len(names), size=num_patients)
    grey, darkness, noise = np.array(list(SYNTHETIC_SITES.values()), dtype=np.float32)[site[patient]].T[:, :, None, None]
    tissue = _synthetic_tissue(len(patient), rng)
    tile, row, column, tumour = _synthetic_cells(tissue, rng)
    stain = _synthetic_stain(tile, np.stack([row, column]), tumour, count=len(patient), rng=rng)
    person = rng.normal(0, 0.03, size=(num_patients, 1, 1)).astype(np.float32)[patient]
    ground = np.where(tissue, grey + person + _waves(len(patient), rng), 0.97)
    images = ground - darkness * stain + noise * rng.standard_normal(stain.shape, dtype=np.float32)
    pixel = (tile[tumour], np.floor(row[tumour]).astype(np.int64), np.floor(column[tumour]).astype(np.int64))
    return Cohort(
        inputs=(model_input(np.clip(images, 0, 1).astype(np.float32)),),
        labels=centre_maps(*pixel, num_maps=len(patient)),
        patient_of_record=patient,
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site]},
        synthetic=True,
    )


def _synthetic_tissue(count: int, rng: np.random.Generator) -> BoolArray:
    """`(N, S, S)`, False on bare glass beyond a straight edge."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE - 0.5
    angle, edge = rng.uniform(0, 2 * np.pi, size=(count, 1, 1)), rng.uniform(0.05, 0.35, size=(count, 1, 1))
    bare = rng.random((count, 1, 1)) < SYNTHETIC_BARE_RATE
    return np.asarray(~bare | (rows * np.sin(angle) + columns * np.cos(angle) < edge), dtype=np.bool_)


def _waves(count: int, rng: np.random.Generator) -> FloatImages:
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    slope, phase = rng.uniform(-9, 9, size=(2, count, 1, 1)).astype(np.float32), rng.uniform(0, 6.28, size=(count, 1, 1)).astype(np.float32)
    return np.asarray(0.04 * np.sin(slope[0] * rows + slope[1] * columns + phase), dtype=np.float32)


def _synthetic_cells(tissue: BoolArray, rng: np.random.Generator) -> tuple[NDArray[np.int64], FloatArray, FloatArray, BoolArray]:
    """Field, row and column of every nucleus, and whether it is of a tumour cell: slots of a grid, each moved by chance, so that few touch."""
    shape = (len(tissue), SYNTHETIC_SLOTS, SYNTHETIC_SLOTS)
    slot = SIDE / SYNTHETIC_SLOTS
    middles = (np.arange(SYNTHETIC_SLOTS) + 0.5) * slot
    row = middles[:, None] + rng.uniform(-SYNTHETIC_JITTER, SYNTHETIC_JITTER, size=shape)
    column = middles + rng.uniform(-SYNTHETIC_JITTER, SYNTHETIC_JITTER, size=shape)
    rate = np.where(rng.random((len(tissue), 1, 1)) < SYNTHETIC_HEALTHY_RATE, 0.0, rng.uniform(0.1, 0.4, size=(len(tissue), 1, 1)))
    drawn = rng.random(shape)
    field_ = np.broadcast_to(np.arange(len(tissue))[:, None, None], shape)
    present = (drawn < rate + 0.3) & tissue[field_, row.astype(np.int64), column.astype(np.int64)]
    return field_[present], row[present], column[present], (drawn < rate)[present]


def _synthetic_stain(tile: NDArray[np.int64], place: FloatArray, tumour: BoolArray, *, count: int, rng: np.random.Generator) -> FloatImages:
    """`(N, S, S)`: how much stain there is, 0 to 1; `place` is row and column of each nucleus, `(2, K)`."""
    num = len(tile)

    def each(low: float, high: float) -> FloatImages:
        return rng.uniform(low, high, size=(num, 1, 1)).astype(np.float32)

    large = tumour[:, None, None]
    corner = np.floor(place).astype(np.int64)
    offsets = np.arange(-STAMP, STAMP + 1)
    down = (offsets[:, None] + 0.5 - (place - corner)[0][:, None, None]).astype(np.float32)
    right = (offsets + 0.5 - (place - corner)[1][:, None, None]).astype(np.float32)
    stretch = np.exp(np.where(large, each(-0.25, 0.25), each(-0.1, 0.1)))
    down, right = down * stretch, right / stretch
    angle = np.arctan2(down, right)
    waves = np.sin(2 * angle + each(0, 6.28)) + np.sin(3 * angle + each(0, 6.28)) + np.sin(5 * angle + each(0, 6.28))
    radius = np.where(large, each(4.2, 6.2), each(2.0, 3.2)) * (1 + np.where(large, 0.09, 0.02) * waves)
    inside = 1 / (1 + np.exp(np.clip((np.hypot(down, right) - radius) * 2.5, -30, 30)))
    mottled = 1 + 0.25 * large * np.sin(each(0.8, 1.4) * down + each(0, 6.28)) * np.sin(each(0.8, 1.4) * right + each(0, 6.28))
    stamps = inside * mottled * np.where(large, each(0.65, 0.95), each(0.75, 1.0))
    stain = np.zeros((count, SIDE + 2 * STAMP, SIDE + 2 * STAMP), dtype=np.float32)
    rows, columns = (corner[axis][:, None] + STAMP + offsets for axis in (0, 1))
    np.maximum.at(stain, (tile[:, None, None], rows[:, :, None], columns[:, None, :]), stamps.astype(np.float32))
    return stain[:, STAMP:-STAMP, STAMP:-STAMP]


# Model and loss -----------------------------------------------------------------------------------------------------------------


class CentreNet(nn.Module):
    """`(N, 1, S, S) -> (N, S, S)` logits of "a tumour cell's centre": a fully convolutional net at half the resolution.

    A pixel sees 26 x 26, more than twice a tumour cell's nucleus. `PRIOR_LOGIT` is added to what the last layer gives.
    """

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def stage(num_in: int, dilation: int) -> nn.Sequential:
            convolution = nn.Conv2d(num_in, width, 3, padding=dilation, dilation=dilation)
            return nn.Sequential(convolution, nn.GroupNorm(4, width), nn.ReLU())

        self.body = nn.Sequential(stage(1, 1), nn.AvgPool2d(2), stage(width, 1), stage(width, 2), stage(width, 2))
        self.last = nn.Conv2d(width, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(N, S, S)`."""
        logits: torch.Tensor = self.up(self.last(self.body(images)))
        return logits[:, 0] + PRIOR_LOGIT


def centre_loss(outputs: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Penalty-reduced logistic loss over the pixels, divided by the cells (by one where there are none), for each record `(N,)`.

    Equation 1 of Zhou et al. 2019, after Law and Deng 2018, with alpha 2 and beta 4: what is sure already weighs little, as in a focal loss (Lin et
    al. 2017), and next to a centre it costs less to be wrong than far from one.
    """
    given = torch.sigmoid(outputs)
    at_centre = centres == 1
    found = -((1 - given) ** 2) * nn.functional.logsigmoid(outputs) * at_centre
    invented = -((1 - centres) ** 4) * given**2 * nn.functional.logsigmoid(-outputs) * ~at_centre
    return (found + invented).sum(dim=(1, 2)) / at_centre.sum(dim=(1, 2)).clamp(min=1)


# Metrics ------------------------------------------------------------------------------------------------------------------------


def peaks_of(maps: FloatArray) -> list[NDArray[np.int64]]:
    """Row and column `(k, 2)` of each map's peaks, the highest first: local maxima of at least `THRESHOLD`, none within `DISTANCE` of a higher one.

    Args:
        maps: `(N, S, S)` probabilities; one that is not finite counts as none.
    """
    finite = np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0)
    around = nn.functional.max_pool2d(torch.from_numpy(finite)[:, None], 2 * DISTANCE + 1, stride=1, padding=DISTANCE)[:, 0].numpy()
    return [_highest(scores) for scores in np.where((finite == around) & (finite >= THRESHOLD), finite, 0.0)]


def _highest(scores: FloatArray) -> NDArray[np.int64]:
    """At most `MOST_CELLS` places above 0 of `(S, S)`; of neighbours that are equal, the first."""
    left = scores.copy()
    places: list[tuple[int, int]] = []
    while len(places) < MOST_CELLS and left.max(initial=0.0) > 0:
        row, column = divmod(int(left.argmax()), left.shape[1])
        places.append((row, column))
        left[max(row - DISTANCE, 0) : row + DISTANCE + 1, max(column - DISTANCE, 0) : column + DISTANCE + 1] = 0
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def num_pairs(found: NDArray[np.int64], true: NDArray[np.int64]) -> int:
    """How many of the cells found `(k, 2)` can be paired with true ones `(m, 2)`, one to one, at most `DISTANCE` pixels apart."""
    from scipy.optimize import linear_sum_assignment

    if not (len(found) and len(true)):
        return 0
    far = np.linalg.norm(found[:, None] - true[None], axis=2) > DISTANCE
    return int((~far[linear_sum_assignment(far)]).sum())


def detection_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(4,)`: patients, and of each the pairs, cells found and true cells of a tile, as shares of `MOST_CELLS`; each at most 1 a patient.

    Args:
        predictions: `(N, S, S)` probabilities.
    """
    sums = np.ones((4, len(predictions)))
    for record, found in enumerate(peaks_of(predictions)):
        true = np.argwhere(cohort.labels[record] == 1)
        sums[1:, record] = num_pairs(found, true), len(found), min(len(true), MOST_CELLS)
    sums[1:] /= MOST_CELLS
    return np.asarray(sums @ cohort.record_weights())


def detections_agree(sums: FloatArray) -> bool:
    """Whether the sums are of cells: no more pairs than found or true ones, and no share above 1."""
    count, pairs, found, true = sums
    slack = ROUNDING * max(count, 1.0)
    return bool(pairs <= min(found, true) + slack and max(found, true) <= count + slack)


def f1(sums: FloatArray) -> float | None:
    """2 TP / (2 TP + FP + FN)."""
    cells = sums[2] + sums[3]
    return float(2 * sums[1] / cells) if cells > 0 else None


def precision(sums: FloatArray) -> float | None:
    """Of the cells found, the share that are true."""
    return float(sums[1] / sums[2]) if sums[2] > 0 else None


def recall(sums: FloatArray) -> float | None:
    """Of the true cells, the share that are found."""
    return float(sums[1] / sums[3]) if sums[3] > 0 else None


DETECTIONS = Statistic(name="detections", shape=(4,), summarise=detection_sums, sensitivity=2.0, is_counts=False, agrees=detections_agree)
METRICS = (
    Metric(name="f1", statistic=DETECTIONS, finish=f1, low=0, high=1),
    Metric(name="precision", statistic=DETECTIONS, finish=precision, low=0, high=1),
    Metric(name="recall", statistic=DETECTIONS, finish=recall, low=0, high=1),
)


def cell_detection() -> Task:
    """The task `cell-detection`."""
    return Task(
        name=NAME,
        title="Tumour cells in a field of stained tissue",
        modality="image",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=CentreNet,
        loss=centre_loss,
        predict=torch.sigmoid,
        metrics=METRICS,
        primary_metric="f1",
        source="your own fields of tissue and marked nuclei; synthetic tissue",
        default_study="cell-detection.toml",
    )
