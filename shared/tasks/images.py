"""Images as tensors: read, checked and brought to one size by public rules; and `Augmentation`, the head of a model. Every task on images uses it.

What is done to an image depends on that image and on public numbers alone: intensities are scaled by their type's range, never by what a site's
images have; an image that is not square is padded with black. A reader of another format (`shared.tasks.dicom`) gives `(H, W)` float32 in [0, 1] as
`read_png` does, and takes its place in `READERS` by the ending of its files.

Legend: N records, C channels, H height and W width in pixels, S side of the square that a model takes.
"""

import hashlib
import io
import logging
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import IntArray
from shared.config import nearest
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, SchemaError
from shared.schema import MISSING_MARKS, canonical
from shared.tasks.tabular import only_csv, read_csv

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd  # tens of megabytes that a coordinator has no use for

FloatImages = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
TextArray = NDArray[np.str_]

DEFAULT_TOLERANCE = 0.05  # share of the records that may be unusable
MOST_EXPANSION = 100  # an archive that unpacks to more than so many times its size is refused
HARMLESS_BYTES = 2**20  # unpacked; under it no archive does harm, however well a few blank masks pack
MOST_UNPACKED_BYTES = 2**33
MOST_PIXELS = 2**25  # of one image: twice the largest radiograph; a blank mask may well pack a thousandfold, so not its ratio but its size counts
MOST_FILE_BYTES = 2**28
REMEDY_EXPORT = "export it again"


# Options and files --------------------------------------------------------------------------------------------------------------


def tolerance_of(options: Mapping[str, object], task: str) -> float:
    """The loader's only option, `tolerance`: the share of records that may be unusable and are skipped, by default one in twenty.

    Raises:
        ConfigurationError: there is another option, or it is no number from 0 to under 1.
    """
    others = sorted(options.keys() - {"tolerance"})
    if others:
        raise ConfigurationError(f"task {task}: its loader has no option {others[0]!r}", "remove it; the only one is 'tolerance'")
    value = options.get("tolerance", DEFAULT_TOLERANCE)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigurationError(
            f"task {task}: option tolerance: expected a number from 0 to under 1, got another value", "give the share of records that may be skipped"
        )
    return float(value)


def refuse_too_many(
    num_bad: int, num_records: int, *, tolerance: float, source: str, first: str = "", bad: "NDArray[np.bool_] | None" = None
) -> None:
    """Raise `SchemaError` where more than the share `tolerance` of the records, or all of them, cannot be used; `first` says what ails one.

    Args:
        bad: `(num_records,)`; without tolerance the message then names rows, from 1 below the header.
    """
    if num_bad and (num_bad > tolerance * num_records or num_bad == num_records):
        rows = f": {told_rows(bad)}" if bad is not None and tolerance == 0 else ""
        example = f" (the first: {first})" if first else ""
        raise SchemaError(
            f"{source}: expected at most {tolerance:.0%} unusable records, got {num_bad} of {num_records}{rows}{example}",
            "correct them, or raise the loader's option tolerance",
        )


def told_rows(bad: "NDArray[np.bool_]", *, most: int = 10) -> str:
    """The numbers of the first rows that are True, from 1.

    >>> told_rows(np.array([False, True, True])), told_rows(np.ones(12, dtype=bool), most=2)
    ('rows 2, 3', 'rows 1, 2 and 10 more')
    """
    places = np.flatnonzero(bad) + 1
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return f"row{'s' if len(places) > 1 else ''} {', '.join(map(str, places[:most].tolist()))}{more}"


def data_file(path: Path | None, task: str) -> Path:
    """The NPZ or CSV file that `path` is, or that alone stands in the folder `path`; an NPZ comes first.

    Raises:
        DataMissingError, DataAccessError: there is none, or more than one; it may not be read.
    """
    if path is None:
        raise DataMissingError(f"task {task} has no data of its own", "give your file or folder with --data")
    with reading(str(path)):
        if path.is_dir():
            archives = sorted(file for file in path.iterdir() if file.suffix.lower() == ".npz")
            if len(archives) > 1:
                raise DataMissingError(f"{path}: expected one NPZ file, found {len(archives)}", "give the file itself with --data")
            return archives[0] if archives else only_csv(path)
        if not path.exists():
            raise DataMissingError(f"{path}: expected data, found nothing", "check the path given with --data")
    if path.suffix.lower() not in (".npz", ".csv"):
        raise SchemaError(f"{path.name}: expected an .npz or .csv file, got {path.suffix or 'no ending'}", "see the task's page")
    return path


@contextmanager
def reading(source: str) -> "Iterator[None]":
    """What the operating system says about a file, as our errors: a permission is never worded as bad data."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataMissingError(f"{source}: expected a file, found none", "check the path") from None
    except PermissionError:
        raise DataAccessError(f"{source}: this user may not read it", "change its permissions") from None
    except OSError as error:
        raise DataError(f"{source}: could not be read ({type(error).__name__})", "check the file system") from None


@contextmanager
def silent_log(name: str) -> "Iterator[None]":
    """Silence of another library's log and of those below it: what it says of a file may quote it."""
    log = logging.getLogger(name)
    level = log.level
    if level > logging.CRITICAL:  # silent already: a level set anew clears every logger's cache, which costs more than a small file
        yield
        return
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


# NPZ ----------------------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, needed: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
    """The arrays of these names in an NPZ file; never pickled ones, and nothing is unpacked before its size is known.

    Raises:
        DataMissingError, DataAccessError: no such file, an empty one, or one that may not be read.
        SchemaError: it is no NPZ, is cut short, lacks an array, holds pickled objects, or would unpack to 100 times its size.
    """
    source = path.name
    with reading(str(path)):
        if path.stat().st_size == 0:
            raise DataMissingError(f"{path}: expected an NPZ file, got an empty file", REMEDY_EXPORT)
        try:
            with zipfile.ZipFile(path) as archive:
                refuse_expansion(archive, path)
                present = {name.removesuffix(".npy") for name in archive.namelist()}
                for name in needed:
                    if name not in present:
                        raise SchemaError(
                            f"{source}: expected an array {name!r}{nearest(name, sorted(present))}, not found", "rename or add it in the file"
                        )
                return {name: _read_array(archive, name, source) for name in [*needed, *(name for name in optional if name in present)]}
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
            raise SchemaError(f"{source}: expected an NPZ file, got one that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None


def refuse_expansion(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise `SchemaError` where the archive would unpack to 100 times its size, or to more than 8 GiB, by what its own directory says.

    A directory that says too little cuts its members short there, so it can hide nothing.
    """
    unpacked, packed = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    if unpacked > MOST_UNPACKED_BYTES or unpacked > max(HARMLESS_BYTES, MOST_EXPANSION * packed):
        raise SchemaError(
            f"{path.name}: expected an archive that unpacks to at most {MOST_EXPANSION} times its size, got {unpacked / packed:.0f} times "
            f"({unpacked / 2**20:.0f} MiB); it was not unpacked",
            "check where it comes from; blank images pack so well only in bulk: leave them out",
        )


def _read_array(archive: zipfile.ZipFile, name: str, source: str) -> NDArray[np.generic]:
    member = f"{name}.npy"
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise SchemaError(
            f"{source}: array {name!r}: expected numbers or text, got pickled objects, which may run any program and are never opened",
            "save it as a plain array",
        )
    if math.prod(shape) * dtype.itemsize > archive.getinfo(member).file_size:  # before the room for it is taken
        raise SchemaError(f"{source}: array {name!r}: expected {shape}, got fewer bytes", REMEDY_EXPORT)
    with archive.open(member) as file:
        values: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    return values


def text_of(values: NDArray[np.generic], name: str, *, num_records: int, source: str) -> TextArray:
    """An array of an NPZ as text `(N,)`: identifiers, sites.

    Raises:
        SchemaError: it has another length, is neither text nor whole numbers, or is not UTF-8.
    """
    if values.shape != (num_records,):
        raise SchemaError(f"{source}: array {name!r}: expected shape ({num_records},), got {values.shape}", REMEDY_EXPORT)
    if values.dtype.kind not in "USiu":
        raise SchemaError(f"{source}: array {name!r}: expected text or whole numbers, got {values.dtype}", REMEDY_EXPORT)
    try:
        return np.char.decode(values.astype(np.bytes_), "utf-8") if values.dtype.kind == "S" else values.astype(np.str_)
    except UnicodeDecodeError:
        raise SchemaError(f"{source}: array {name!r}: expected UTF-8 text, got other bytes", "save it as UTF-8") from None


# Intensities and size -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadImages:
    """Images `(N, S, S)` float32 in [0, 1], blank where unusable, and which are usable `(N,)`."""

    images: FloatImages = field(repr=False)
    usable: BoolArray = field(repr=False)
    first_problem: str = ""


def images_of_stack(values: NDArray[np.generic], name: str, *, side: int, source: str) -> ReadImages:
    """An array `(N, H, W)`, `(N, 1, H, W)` or `(N, H, W, 1)` as images of one size; one with NaN, infinity or a value off its range is unusable.

    Raises:
        SchemaError: the array has another shape, or a type without a known range (see `intensities`).
    """
    stack = values
    if values.ndim == 4:
        stack = values[:, 0] if values.shape[1] == 1 else values[..., 0] if values.shape[3] == 1 else values
    if stack.ndim != 3 or 0 in stack.shape or stack.shape[1] * stack.shape[2] > MOST_PIXELS:
        raise SchemaError(
            f"{source}: array {name!r}: expected grey images, shape (records, height, width), got {values.shape}", "one grey channel, no empty axis"
        )
    grey = intensities(stack, f"{source}: array {name!r}")
    usable = np.isfinite(grey).all(axis=(1, 2)) & (np.nan_to_num(grey, posinf=2).max(axis=(1, 2)) <= 1) & (np.nan_to_num(grey).min(axis=(1, 2)) >= 0)
    grey[~usable] = 0
    images = grey if grey.shape[1:] == (side, side) else np.stack([to_square(image, side) for image in grey])
    return ReadImages(images=images, usable=usable, first_problem="" if usable.all() else "NaN, infinity, or a value outside [0, 1]")


def intensities(values: NDArray[np.generic], source: str) -> FloatImages:
    """Grey values as float32, by the range of their type: 0 to 255 or to 65535 becomes 0 to 1, truth values 0 and 1, floats stay.

    Raises:
        SchemaError: another type.
    """
    if values.dtype.kind not in "bf" and values.dtype not in (np.uint8, np.uint16):
        raise SchemaError(f"{source}: expected uint8, uint16, truth values, or floats in [0, 1], got {values.dtype}", "convert it")
    most = 2 ** (8 * values.dtype.itemsize) - 1 if values.dtype.kind == "u" else 1
    return values.astype(np.float32) / np.float32(most)


def to_square(image: FloatImages, side: int) -> FloatImages:
    """`(H, W)` as `(side, side)`: padded with black around it to a square, then resized (bilinear, averaging where it shrinks)."""
    from PIL import Image

    height, width = image.shape
    if height != width:
        longest = max(height, width)
        top, left = (longest - height) // 2, (longest - width) // 2
        image = np.pad(image, ((top, longest - height - top), (left, longest - width - left)))
    if len(image) == side:
        return image
    return np.clip(np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32), 0, 1)


def model_input(images: FloatImages) -> FloatImages:
    """`(N, S, S)` in [0, 1] as a model takes it: `(N, 1, S, S)`, black -1 and white 1."""
    return 2 * images[:, None] - 1


# PNG ----------------------------------------------------------------------------------------------------------------------------


def read_png(path: Path, *, source: str) -> FloatImages:
    """A PNG file as grey `(H, W)` float32 in [0, 1]; colours by their luminance, 16 bits by their own range.

    Args:
        source: what messages call it; a file's own name may be a patient's.

    Raises:
        DataMissingError, DataAccessError: there is none, it is empty, or it may not be read.
        SchemaError: it is no PNG, is cut short, or has too many pixels, which is known before it is unpacked.
    """
    from PIL import Image

    with reading(source):
        if path.stat().st_size > MOST_FILE_BYTES:
            raise SchemaError(f"{source}: expected a file of at most {MOST_FILE_BYTES // 2**20} MiB, got a larger one", REMEDY_EXPORT)
        content = path.read_bytes()
    if not content:
        raise DataMissingError(f"{source}: expected a PNG file, got an empty file", REMEDY_EXPORT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PIL warns of bombs, and of damage that it reads over
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise SchemaError(f"{source}: expected at most {MOST_PIXELS} pixels, got {image.width} x {image.height}", "make it smaller")
                grey = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SchemaError(f"{source}: expected a PNG image, got one that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None
    return intensities(grey.astype(np.uint16) if grey.dtype == np.int32 else grey, source)


def _read_dicom(path: Path, *, source: str) -> FloatImages:
    from shared.tasks.dicom import read_dicom  # it takes its bounds from here

    return read_dicom(path, source=source)


READERS: dict[str, Callable[..., FloatImages]] = {".png": read_png, ".dcm": _read_dicom, ".dicom": _read_dicom}  # a file's ending -> what reads it


def read_images(folder: Path, names: Iterable[str], *, side: int, source: str) -> ReadImages:
    """The images of these names in `folder` and below, each brought to one size; one that cannot be read is unusable.

    Raises:
        DataAccessError: one may not be read; that is no bad record.
    """
    images, usable, first = [], [], ""
    for row, name in enumerate(names, start=1):
        place = f"{source}: record {row}"
        try:
            images.append(to_square(read_image(folder, name, place), side))
            usable.append(True)
        except (SchemaError, DataMissingError) as error:
            images.append(np.zeros((side, side), dtype=np.float32))
            usable.append(False)
            first = first or error.what
    stack = np.stack(images) if images else np.zeros((0, side, side), dtype=np.float32)
    return ReadImages(images=stack, usable=np.array(usable, dtype=np.bool_), first_problem=first)


def read_image(folder: Path, name: str, source: str) -> FloatImages:
    """The image `name` below `folder`, `(H, W)` float32 in [0, 1].

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `path_below`; or it cannot be read.
    """
    path = path_below(folder, name, endings=sorted(READERS), source=source)
    return READERS[path.suffix.lower()](path, source=source)


def path_below(folder: Path, name: str, *, endings: Sequence[str], source: str) -> Path:
    """The path of the file that a list in `folder` calls `name`.

    Raises:
        SchemaError: it leads out of the folder, has another ending than one of `endings`, or is no file but a folder, a device or a pipe.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if not name or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise SchemaError(f"{source}: expected the path of a file below the folder of the list, got none or another", "correct it")
    if relative.suffix.lower() not in endings:
        raise SchemaError(f"{source}: expected a file ({', '.join(endings)}), got another ending", "convert it")
    file = folder / relative
    with reading(source):
        if file.exists() and not file.is_file():  # a link to a device, which may have no end
            raise SchemaError(f"{source}: expected the path of a file below the folder of the list, got something else", "correct it")
    return file


# Lists of images ----------------------------------------------------------------------------------------------------------------


def read_listing(path: Path, needed: Sequence[str]) -> "pd.DataFrame":
    """A CSV with a row for each image: text, without blanks around it, with at least the columns `needed`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `read_csv`; a column is missing or twice, or there is no row.
    """
    frame: pd.DataFrame = read_csv(path).apply(lambda column: column.str.strip())
    for name in needed:
        if name not in frame.columns:
            raise SchemaError(f"{path.name}: expected column {name!r}{nearest(name, list(frame.columns))}, not found", "rename or add it in the file")
        if f"{name}.1" in frame.columns:  # as pandas calls a second one
            raise SchemaError(f"{path.name}: expected one column {name!r}, found two", "rename or remove one in the file")
    if len(frame) == 0:
        raise DataMissingError(f"{path.name}: expected at least one row, got none", "check the export")
    return frame


def in_set(values: "pd.Series[str]", meanings: Mapping[str, float]) -> tuple[NDArray[np.float32], BoolArray]:
    """What each text means `(N,)`, and where it is in the set `(N,)`; capitals and spellings of a number (1, 1.0) do not matter."""
    found = values.str.lower().map(canonical).map(dict(meanings))
    known = found.notna().to_numpy(dtype=np.bool_)
    return found.fillna(0).to_numpy(dtype=np.float32), known


def repeated_images(frame: "pd.DataFrame") -> BoolArray:
    """`(N,)`, True for a row whose image an earlier row names already."""
    return np.asarray(frame["image"].duplicated().to_numpy(), dtype=np.bool_)


# Patients -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Patients:
    """Patients by their records: `patient_of_record` `(N,)`, `patient_ids` `(P,)`, and each one's first record `(P,)`."""

    patient_of_record: IntArray = field(repr=False)
    patient_ids: tuple[str, ...] = field(repr=False)
    first: IntArray = field(repr=False)


def patients_of(identifiers: Sequence[str], *, source: str) -> Patients:
    """The patients behind the records, in the order in which they first stand.

    Raises:
        SchemaError: a record has no identifier.
    """
    nameless = sum(name in MISSING_MARKS for name in identifiers)
    if nameless:
        raise SchemaError(f"{source}: expected a patient's identifier for every record, got none for {nameless}", "fill it in")
    index: dict[str, int] = {}
    patient_of_record = np.array([index.setdefault(name, len(index)) for name in identifiers], dtype=np.int64)
    _, first = np.unique(patient_of_record, return_index=True)
    return Patients(patient_of_record=patient_of_record, patient_ids=tuple(index), first=first.astype(np.int64))


def attribute_of(values: NDArray[np.generic], patients: Patients, name: str, *, source: str) -> TextArray:
    """An attribute of each record as one of each patient, `(P,)`.

    Raises:
        SchemaError: a patient has two.
    """
    text = values.astype(np.str_)
    of_patient = text[patients.first]
    differing = len(np.unique(patients.patient_of_record[text != of_patient[patients.patient_of_record]]))
    if differing:
        raise SchemaError(f"{source}: expected one {name!r} for each patient, got two or more for {differing} patients", "correct it")
    return of_patient


def content_identifiers(images: Iterable[NDArray[np.generic]]) -> list[str]:
    """An identifier for each image from its content, where none is known: another image more makes nobody a new patient."""
    seen: dict[str, int] = {}
    identifiers = []
    for image in images:
        digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()
        seen[digest] = seen.get(digest, 0) + 1
        identifiers.append(f"{digest}-{seen[digest]}")
    return identifiers


# Augmentation -------------------------------------------------------------------------------------------------------------------


class Augmentation(nn.modules.dropout._DropoutNd):
    """Images `(N, C, H, W)`, each moved, turned, scaled and mirrored by chance; in training alone.

    Each record draws its own, six numbers from torch's generator, which a site's training keys; none sees another record. So it is a draw for each
    record as dropout is, and whoever must know that (the model probe, the blocks of sites) knows it by the base class. Sampled bilinearly; what
    comes from outside the image is its edge's grey. It has no parameters.

    Args:
        p: chance that a record is changed at all.
        shift: largest move along each axis, as a share of the side.
        degrees: largest turn either way.
        scale: largest change of size, as a share.
        flip: mirror left and right for half of the records.
    """

    def __init__(self, p: float = 1.0, *, shift: float = 0.1, degrees: float = 15.0, scale: float = 0.1, flip: bool = True) -> None:
        super().__init__(p)
        if not (0 <= shift < 1 and 0 <= degrees <= 180 and 0 <= scale < 1):
            raise ConfigurationError("augmentation: expected shift and scale in [0, 1) and degrees in [0, 180], got others", "correct the model")
        self.shift, self.degrees, self.scale, self.flip = shift, degrees, scale, flip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The images, changed in training; the same in evaluation."""
        if not self.training or self.p == 0:
            return images
        chances, mirrored, *others = torch.rand(len(images), 6, dtype=images.dtype).unbind(dim=1)
        right, down, turn, larger = (2 * chance - 1 for chance in others)
        changed = (chances < self.p).to(images.dtype)
        angle = turn * changed * math.radians(self.degrees)
        size = 1 + larger * changed * self.scale
        sign = 1 - 2 * changed * (mirrored < 0.5) if self.flip else torch.ones_like(size)
        cos, sin = angle.cos() / size, angle.sin() / size
        columns = [cos * sign, -sin, 2 * self.shift * right * changed, sin * sign, cos, 2 * self.shift * down * changed]
        matrices = torch.stack(columns, dim=1).view(-1, 2, 3).to(images.device)
        grid = nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def extra_repr(self) -> str:
        """Its settings, which are part of the architecture's hash."""
        return f"p={self.p}, shift={self.shift}, degrees={self.degrees}, scale={self.scale}, flip={self.flip}"
