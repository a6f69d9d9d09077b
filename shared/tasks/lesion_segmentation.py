"""Lesion segmentation: which pixels of an image belong to a lesion.

Model: U-Net (Ronneberger, Fischer, Brox 2015) of two levels, with GroupNorm, and upsampling by copying in place of transposed convolution. Metric:
Dice (1945) by sums of overlaps, 2 sum |P and T| / (sum |P| + sum |T|) over all patients, which sums over sites give exactly; beside it the mean of
every image's own Dice.

Images and masks come as NPZ, or as pairs of PNG, DICOM or NIfTI files. A NIfTI volume is one patient where no list says more, and its slices are the
patient's records: every slice with a lesion, and as many without one, evenly spread, or one where there is no lesion. Another format becomes `Pairs`
in a reader of its own beside those here; `cohort_of` does the rest.

Legend: N records, S side of an image, W channels of the first level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort, IntArray
from shared.errors import DataMissingError, SchemaError
from shared.metrics import ROUNDING, FloatArray, Metric, Statistic
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import (
    BoolArray,
    FloatImages,
    ReadImages,
    TextArray,
    attribute_of,
    content_identifiers,
    data_file,
    images_of_stack,
    model_input,
    path_below,
    patients_of,
    read_images,
    read_listing,
    read_npz,
    reading,
    refuse_too_many,
    repeated_images,
    text_of,
    to_square,
    tolerance_of,
)
from shared.tasks.nifti import NIFTI_ENDINGS, read_nifti, same_grid

NAME = "lesion-segmentation"
SIDE = 32
WIDTH = 8
LARGEST_SHARE = 0.5  # of an image that a lesion may take; a larger mask is one that is inverted, and the record is unusable
FOLDERS = ("images", "masks")  # of pairs of files, which have the same name in both
BACKGROUND_CODES = (0, 1, 255)  # values of a mask of whole numbers; all but 0 are lesion
SYNTHETIC_SITES = {
    "synthetic-1": (0.00, 0.35),
    "synthetic-2": (0.08, 0.30),
    "synthetic-3": (-0.06, 0.40),
    "synthetic-4": (0.03, 0.28),
}  # grey, contrast
SYNTHETIC_HEALTHY_RATE = 0.05  # images without a lesion
SYNTHETIC_NOISE = 0.06

SCHEMA = (TensorSchema(name="image", shape=(1, SIDE, SIDE), unit="grey value, black -1 to white 1", low=-1.0, high=1.0),)


NONE_READ = ReadImages(images=np.zeros((0, SIDE, SIDE), dtype=np.float32), usable=np.zeros(0, dtype=np.bool_))


# Data ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images and masks as read, with each record's patient, and site where known, as text `(N,)`; without patients every image is one."""

    images: ReadImages
    masks: ReadImages
    patients: TextArray | None = field(default=None, repr=False)
    sites: TextArray | None = field(default=None, repr=False)
    refused: BoolArray | None = field(default=None, repr=False)  # (N,), for another reason


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """An NPZ with `images` and `masks` (and `patients`, `sites`), or PNG or NIfTI files in `images/` and `masks/`, or a CSV that lists the pairs.

    The CSV may list DICOM files too. It has the columns `image` and `mask` (paths below its folder), and may have `patient` and `site`.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many records are.
    """
    tolerance = tolerance_of(options, NAME)
    if path is not None and (path / FOLDERS[0]).is_dir():
        return cohort_of(read_folder(path), tolerance=tolerance, source=path.name)
    file = data_file(path, NAME)
    pairs = read_npz_pairs(file) if file.suffix.lower() == ".npz" else read_listed_pairs(file)
    return cohort_of(pairs, tolerance=tolerance, source=file.name)


def read_npz_pairs(path: Path) -> Pairs:
    """The pairs in an NPZ."""
    arrays = read_npz(path, ["images", "masks"], optional=["patients", "sites"])
    images, masks = arrays["images"], arrays["masks"]
    squeezed = {values.squeeze(axis=tuple(i for i in (1, 3) if values.ndim == 4 and values.shape[i] == 1)).shape for values in (images, masks)}
    if len(squeezed) > 1:
        raise SchemaError(f"{path.name}: array 'masks': expected the shape of 'images', {images.shape}, got {masks.shape}", "export them together")
    about = {name: text_of(arrays[name], name, num_records=len(images), source=path.name) for name in ("patients", "sites") if name in arrays}
    return Pairs(
        images=images_of_stack(images, "images", side=SIDE, source=path.name),
        masks=images_of_stack(_as_truth(masks), "masks", side=SIDE, source=path.name),
        patients=about.get("patients"),
        sites=about.get("sites"),
    )


def _as_truth(masks: NDArray[np.generic]) -> NDArray[np.generic]:
    """Masks of whole numbers 0 and 1, or 0 and 255, as float32 0 and 1, and -1 for another value; other types as they are."""
    if masks.dtype.kind not in "iu":
        return masks
    return np.where(np.isin(masks, BACKGROUND_CODES), masks != 0, -1).astype(np.float32)


def read_listed_pairs(path: Path) -> Pairs:
    """The pairs that a CSV lists: all of them NIfTI files, or none."""
    frame = read_listing(path, ["image", "mask"])
    text = {name: frame[name].to_numpy(dtype=np.str_) for name in ("patient", "site") if name in frame.columns}
    listed = Pairs(images=NONE_READ, masks=NONE_READ, patients=text.get("patient"), sites=text.get("site"), refused=repeated_images(frame))
    if _are_nifti([*frame["image"], *frame["mask"]], path.name):
        return read_nifti_pairs(path.parent, list(zip(frame["image"], frame["mask"], strict=True)), listed, source=path.name)
    return replace(
        listed,
        images=read_images(path.parent, frame["image"], side=SIDE, source=f"{path.name}, images"),
        masks=read_images(path.parent, frame["mask"], side=SIDE, source=f"{path.name}, masks"),
    )


def read_folder(path: Path) -> Pairs:
    """The pairs of a folder: `images/a.png` with `masks/a.png`, or NIfTI files. An image without a mask is unusable."""
    with reading(str(path / FOLDERS[0])):
        names = sorted(file.name for file in (path / FOLDERS[0]).iterdir() if file.suffix.lower() in (".png", *NIFTI_ENDINGS))
    if not names:
        raise DataMissingError(f"{path / FOLDERS[0]}: expected NIfTI or PNG files, found none", "check the path given with --data")
    if _are_nifti(names, path.name):
        pairs = [(f"{FOLDERS[0]}/{name}", f"{FOLDERS[1]}/{name}") for name in names]
        return read_nifti_pairs(path, pairs, Pairs(images=NONE_READ, masks=NONE_READ), source=path.name)
    images, masks = (read_images(path / folder, names, side=SIDE, source=f"{path.name}/{folder}") for folder in FOLDERS)
    return Pairs(images=images, masks=masks)


def _are_nifti(names: Sequence[str], source: str) -> bool:
    found = {name.lower().endswith(NIFTI_ENDINGS) for name in names}
    if len(found) > 1:
        raise SchemaError(f"{source}: expected NIfTI files alone, or none, got both", "give them one after the other, each in a folder of its own")
    return True in found


def read_nifti_pairs(folder: Path, names: Sequence[tuple[str, str]], listed: Pairs, *, source: str) -> Pairs:
    """The slices of these pairs of NIfTI files below `folder`; a pair that cannot be read is one unusable record.

    Args:
        names: of image and mask.
        listed: what a list says of each pair: patient, site, refused.

    Raises:
        DataAccessError: a file may not be read; that is no bad record.
    """
    pairs, problems = [], []
    for row, (image, mask) in enumerate(names, start=1):
        try:
            pairs.append(_nifti_slices(folder, image, mask, source=f"{source}: pair {row}"))
            problems.append("")
        except (SchemaError, DataMissingError) as error:
            blank = np.zeros((1, SIDE, SIDE), dtype=np.float32)
            pairs.append((blank, blank, np.zeros(1, dtype=np.bool_)))
            problems.append(error.what)
    counts = [len(usable) for _, _, usable in pairs]
    images, masks, usable = (np.concatenate([pair[index] for pair in pairs]) for index in range(3))
    problem = next((text for text in problems if text), "" if usable.all() else "NaN, infinity, or a value outside its set in a slice")
    patients = np.array(content_identifiers([pair[0] for pair in pairs]), dtype=np.str_) if listed.patients is None else listed.patients
    return Pairs(
        images=ReadImages(images=images, usable=usable, first_problem=problem),
        masks=ReadImages(images=masks, usable=usable),
        patients=np.repeat(patients, counts),
        sites=None if listed.sites is None else np.repeat(listed.sites, counts),
        refused=None if listed.refused is None else np.repeat(listed.refused, counts),
    )


def _nifti_slices(folder: Path, image: str, mask: str, *, source: str) -> tuple[FloatImages, FloatImages, BoolArray]:
    """Chosen slices of a pair as images and masks `(n, S, S)`, and which are usable `(n,)`."""
    volume, truth = (
        read_nifti(path_below(folder, name, endings=NIFTI_ENDINGS, source=source), source=f"{source}, {kind}")
        for name, kind in ((image, "image"), (mask, "mask"))
    )
    if not same_grid(volume, truth):
        raise SchemaError(f"{source}: expected a mask with the shape and affine of its image, got another", "export them together")
    grey, usable = volume.grey(f"{source}, image")
    lesion, known = replace(truth, values=_as_truth(truth.values), window=None).grey(f"{source}, mask")
    chosen = chosen_slices(np.asarray((lesion >= 0.5).any(axis=(1, 2))))
    return (
        np.stack([to_square(grey[index], SIDE) for index in chosen]),
        np.stack([to_square(lesion[index], SIDE) for index in chosen]),
        usable[chosen] & known[chosen],
    )


def chosen_slices(ill: BoolArray) -> IntArray:
    """Which of a volume's slices are records, in their order: all with a lesion, and as many without, evenly spread; one where there is none.

    >>> chosen_slices(np.array([False, False, False, True, False, False, False])).tolist()
    [3, 4]
    """
    healthy = np.flatnonzero(~ill)
    num_healthy = min(len(healthy), max(int(ill.sum()), 1))
    spread = ((np.arange(num_healthy) + 0.5) * len(healthy) / max(num_healthy, 1)).astype(np.int64)
    return np.sort(np.concatenate([np.flatnonzero(ill), healthy[spread]])).astype(np.int64)


def cohort_of(pairs: Pairs, *, tolerance: float, source: str) -> Cohort:
    """The cohort of these pairs; a mask's pixel belongs to the lesion from one half on, and one of more than half the image is unusable.

    Raises:
        SchemaError: too many records are unusable, or a patient has two sites.
    """
    truth = (pairs.masks.images >= 0.5).astype(np.float32)
    usable = pairs.images.usable & pairs.masks.usable & (truth.mean(axis=(1, 2)) <= LARGEST_SHARE)
    if pairs.refused is not None:
        usable &= ~pairs.refused
    problem = pairs.images.first_problem or pairs.masks.first_problem or "an image listed twice, or a mask of more than half the image"
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=source, first=problem, bad=~usable)
    images = pairs.images.images[usable]
    identifiers = content_identifiers(images) if pairs.patients is None else pairs.patients[usable].tolist()
    patients = patients_of(identifiers, source=source)
    return Cohort(
        inputs=(model_input(images),),
        labels=truth[usable],
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes={} if pairs.sites is None else {"site": attribute_of(pairs.sites[usable], patients, "site", source=source)},
        notes={"records_dropped": int((~usable).sum())},
    )


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients: a bright lesion with a wavy edge on uneven ground, beside thin bright vessels that are none; one in twenty has no lesion.

    Four sites differ in grey and in the lesion's contrast.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    names = np.array(list(SYNTHETIC_SITES))
    site = rng.integers(len(names), size=num_patients)
    grey, contrast = np.array(list(SYNTHETIC_SITES.values()), dtype=np.float32)[site].T[:, :, None, None]
    truth = _synthetic_lesions(num_patients, rng)
    ground = 0.35 + grey + _waves(num_patients, rng) + 0.6 * contrast * _vessels(num_patients, rng)
    images = ground + contrast * truth * rng.uniform(0.8, 1.2, size=(num_patients, 1, 1)) + rng.normal(0, SYNTHETIC_NOISE, size=truth.shape)
    return Cohort(
        inputs=(model_input(np.clip(images, 0, 1).astype(np.float32)),),
        labels=truth,
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site]},
        synthetic=True,
    )


def _coordinates() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    return rows, columns


def _synthetic_lesions(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`(N, S, S)`, 1 in the lesion."""
    rows, columns = _coordinates()
    middle = rng.uniform(0.25, 0.75, size=(2, count, 1, 1))
    radius = rng.uniform(0.09, 0.20, size=(count, 1, 1))
    stretch = np.exp(rng.normal(0, 0.2, size=(count, 1, 1)))
    down, right = (rows - middle[0]) / stretch, (columns - middle[1]) * stretch
    edge = 1 + 0.15 * np.sin(rng.integers(2, 6, size=(count, 1, 1)) * np.arctan2(down, right) + rng.uniform(0, 2 * np.pi, size=(count, 1, 1)))
    healthy = rng.random((count, 1, 1)) < SYNTHETIC_HEALTHY_RATE
    return np.asarray((np.hypot(down, right) < radius * edge) & ~healthy, dtype=np.float32)


def _waves(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    rows, columns = _coordinates()
    slope, phase = rng.uniform(-4, 4, size=(2, count, 1, 1)), rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
    return np.asarray(0.06 * np.sin(slope[0] * rows + slope[1] * columns + phase), dtype=np.float64)


def _vessels(count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """`(N, S, S)`, True on a straight line of two pixels' width."""
    rows, columns = _coordinates()
    angle, offset = rng.uniform(0, np.pi, size=(count, 1, 1)), rng.uniform(-0.4, 0.4, size=(count, 1, 1))
    return np.asarray(np.abs((rows - 0.5) * np.cos(angle) + (columns - 0.5) * np.sin(angle) - offset) < 1 / SIDE)


# Model --------------------------------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """Convolution, GroupNorm and ReLU; `(N, c, H, W) -> (N, d, H, W)`."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(nn.Conv2d(num_in, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.ReLU())


class UNet(nn.Module):
    """`(N, 1, S, S) -> (N, S, S)` logits of "lesion": down twice, up twice, and what was seen on the way down beside it on the way up.

    A pixel sees 36 around it, so that a lesion is seen whole.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = Block(1, width)
        self.second = Block(width, 2 * width)
        self.bottom = nn.Sequential(Block(2 * width, 2 * width), Block(2 * width, 2 * width))
        self.up_second = Block(4 * width, width)
        self.up_first = Block(2 * width, width)
        self.last = nn.Conv2d(width, 1, 1)
        self.down = nn.AvgPool2d(2)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(N, S, S)`."""
        first = self.first(images)
        second = self.second(self.down(first))
        bottom = self.bottom(self.down(second))
        second = self.up_second(torch.cat([self.up(bottom), second], dim=1))
        first = self.up_first(torch.cat([self.up(second), first], dim=1))
        logits: torch.Tensor = self.last(first)
        return logits[:, 0]


def overlap_loss(outputs: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the pixels plus one minus a soft Dice of the same image, for each record `(N,)`.

    The second keeps a small lesion from being outvoted by its surroundings (Milletari et al. 2016); one pixel of smoothing makes it zero, not 0/0,
    for an image without a lesion.
    """
    entropy = nn.functional.binary_cross_entropy_with_logits(outputs, masks, reduction="none").mean(dim=(1, 2))
    given = torch.sigmoid(outputs)
    overlap, size = (given * masks).sum(dim=(1, 2)), (given + masks).sum(dim=(1, 2))
    return entropy + 1 - (2 * overlap + 1) / (size + 1)


# Metrics ------------------------------------------------------------------------------------------------------------------------


def overlap_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(5,)`: patients, their shares of pixels in both masks, in the predicted and in the true one, and their own Dice; each at most 1 a patient.

    Args:
        predictions: `(N, S, S)` probabilities of "lesion"; one that is not finite counts as none.
    """
    given = np.nan_to_num(predictions, nan=0.0) >= 0.5
    true = cohort.labels.astype(np.float64) >= 0.5
    both, of_given, of_true = (part.mean(axis=(1, 2)) for part in (given & true, given, true))
    size = of_given + of_true
    own = np.where(size > 0, 2 * both / np.where(size > 0, size, 1), 1.0)  # no lesion, and none seen: right
    return np.asarray(np.stack([np.ones_like(both), both, of_given, of_true, own]) @ cohort.record_weights())


def overlaps_agree(sums: FloatArray) -> bool:
    """Whether the sums are of masks: what both have is in each, and no share is above 1."""
    count, both, given, true, own = sums
    slack = ROUNDING * max(count, 1.0)
    return bool(both <= min(given, true) + slack and max(given, true, own) <= count + slack and given + true - both <= count + slack)


def dice(sums: FloatArray) -> float | None:
    """Dice of all patients' pixels together."""
    size = sums[2] + sums[3]
    return float(2 * sums[1] / size) if size > 0 else None


def mean_dice(sums: FloatArray) -> float | None:
    """Mean over patients of their own Dice."""
    return float(sums[4] / sums[0]) if sums[0] > 0 else None


def intersection_over_union(sums: FloatArray) -> float | None:
    """Pixels in both masks over pixels in either, of all patients together (Jaccard)."""
    union = sums[2] + sums[3] - sums[1]
    return float(sums[1] / union) if union > 0 else None


OVERLAPS = Statistic(name="overlaps", shape=(5,), summarise=overlap_sums, sensitivity=5**0.5, is_counts=False, agrees=overlaps_agree)
METRICS = (
    Metric(name="dice", statistic=OVERLAPS, finish=dice, low=0, high=1),
    Metric(name="mean_dice", statistic=OVERLAPS, finish=mean_dice, low=0, high=1),
    Metric(name="iou", statistic=OVERLAPS, finish=intersection_over_union, low=0, high=1),
)


def lesion_segmentation() -> Task:
    """The task `lesion-segmentation`."""
    return Task(
        name=NAME,
        title="Outline of a lesion in an image",
        modality="image",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=UNet,
        loss=overlap_loss,
        predict=torch.sigmoid,
        metrics=METRICS,
        primary_metric="dice",
        source="your own image and mask pairs; synthetic lesions",
        default_study="lesion-segmentation.toml",
    )
