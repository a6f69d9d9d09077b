"""DICOM as arrays: a file as a grey image, and a folder of slices as CT series whose geometry was checked.

Of a file nothing is kept but pixels, geometry, and the identifiers by which slices and patients are told apart; these are printed nowhere. A file
that says that names are burned into its pixels (0028,0301) is refused; one that has them and does not say so is not recognised. Whatever pydicom has
to say of a file, in warnings, log or exceptions, may quote its header, so it is not passed on.

Grey values follow PS3.3 C.11: rescale slope and intercept, then the first window that the file declares, or else all of its bits stored; so they
depend on that file alone, and never on the least and largest value in it.

Legend: H height and W width in pixels, D slices. Points are in mm in DICOM's patient axes: x to the patient's left, y to the back, z to the head.
"""

import errno
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError, DataError, DataMissingError, SchemaError
from shared.tasks.images import MOST_FILE_BYTES, MOST_PIXELS, REMEDY_EXPORT, BoolArray, FloatImages, reading, silent_log

if TYPE_CHECKING:
    from pydicom.dataset import Dataset  # an extra, and half a second

FloatArray = NDArray[np.float64]
Stored = NDArray[np.integer]  # values as a file holds them
Found = TypeVar("Found")

AIR = -1000.0  # Hounsfield units
DEFLATED = "1.2.840.10008.1.2.1.99"  # the whole file is packed, so that its size is known only when it is unpacked
GREY = ("MONOCHROME1", "MONOCHROME2")
OTHER_KINDS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # what a message may quote
MOST_BITS = 16
MARK_AT, MARK = 128, b"DICM"
DICOM_ENDINGS = (".dcm", ".dicom")
LEAST_SPACING_MM, MOST_SPACING_MM = 0.1, 5.0
SAME_DIRECTION = 1e-3  # of unit vectors
SAME_PLACE_MM = 0.1
SAME_GAP = 0.1  # share of the gap between slices by which one may differ: positions are rounded, and tables shake
RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))  # and what holds where a file does not say
PIXEL_TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue", "PixelPaddingRangeLimit", "BurnedInAnnotation",
)  # fmt: skip
SLICE_TAGS = (
    "Rows", "Columns", "NumberOfFrames", "Modality", "PatientID", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "BurnedInAnnotation",
)  # fmt: skip


# Files --------------------------------------------------------------------------------------------------------------------------


def _header(path: Path, tags: Sequence[str], *, pixels: bool, source: str) -> "Dataset":
    """These elements of a file, and no others.

    Raises:
        DataMissingError, DataAccessError: there is none, it is empty, or it may not be read.
        SchemaError: it is no DICOM file, is damaged, too large, or packed as a whole.
        ConfigurationError: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ConfigurationError("DICOM files: expected pydicom, found it not installed", 'pip install "wardround[imaging]"') from error
    with reading(source):
        num_bytes = path.stat().st_size
        if num_bytes == 0:
            raise DataMissingError(f"{source}: expected a DICOM file, got an empty file", REMEDY_EXPORT)
        if num_bytes > MOST_FILE_BYTES:
            raise SchemaError(f"{source}: expected a file of at most {MOST_FILE_BYTES // 2**20} MiB, got a larger one", REMEDY_EXPORT)
        if not _has_mark(path):
            raise SchemaError(f"{source}: expected a DICOM file, got one without the mark DICM after 128 bytes", "export it as DICOM Part 10")
        with _parsing(source):
            if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
                raise SchemaError(f"{source}: expected pixels that are packed alone, got a deflated file; it was not unpacked", REMEDY_EXPORT)
            with open(path, "rb") as file:
                return pydicom.dcmread(file, stop_before_pixels=not pixels, specific_tags=list(tags))


def _has_mark(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(MARK_AT)
        return file.read(len(MARK)) == MARK


@contextmanager
def _parsing(source: str) -> Iterator[None]:
    """Silence around pydicom, and its exceptions as `SchemaError`: a damaged file makes it raise almost anything, and quotes the file in it."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), silent_log("pydicom"):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the system's own; pydicom raises some of its own
            raise
        raise SchemaError(f"{source}: expected a DICOM file, got one that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None


def _refuse_annotated(header: "Dataset", source: str) -> None:
    if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise SchemaError(f"{source}: expected pixels without text, got a file that says that annotations are burned in", "leave it out")


def _refuse_frames(header: "Dataset", source: str) -> None:
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1:
        raise SchemaError(f"{source}: expected one image, got a file of {frames} frames", "export every frame as a file of its own")


# One image ----------------------------------------------------------------------------------------------------------------------


def read_dicom(path: Path, *, source: str) -> FloatImages:
    """A DICOM file as grey `(H, W)` float32 in [0, 1], as it would be shown: windowed, MONOCHROME1 inverted, padding black.

    Args:
        source: what messages call it; a file's own name may be a patient's.

    Raises:
        DataMissingError, DataAccessError: there is none, it is empty, or it may not be read.
        SchemaError: it is no DICOM file, is damaged, has no pixels, colours, several frames, text burned in, more pixels than `MOST_PIXELS`, which
            is known before they are unpacked, or a compression for which no decoder is installed.
        ConfigurationError: pydicom is not installed.
    """
    header = _header(path, PIXEL_TAGS, pixels=True, source=source)
    with _parsing(source):
        raw, padding = _grey_pixels(header, source)
        shown = _windowed(raw, header, source)
        if header.PhotometricInterpretation == "MONOCHROME1":
            shown = 1 - shown
        return np.where(padding, 0, shown).astype(np.float32)


def _grey_pixels(header: "Dataset", source: str) -> tuple[Stored, BoolArray]:
    """Stored values `(H, W)`, and where they are padding."""
    _refuse_annotated(header, source)
    if "PixelData" not in header:
        raise SchemaError(f"{source}: expected an image, got a file without pixels, or one that is cut short", "leave out plans, structures, reports")
    kind = str(header.get("PhotometricInterpretation", ""))
    if kind not in GREY or header.get("SamplesPerPixel", 1) != 1:
        raise SchemaError(f"{source}: expected a grey image, got {kind if kind in OTHER_KINDS else 'another kind'}", "export it as MONOCHROME2")
    _refuse_frames(header, source)
    size = (int(header.Rows), int(header.Columns))
    if math.prod(size) > MOST_PIXELS or 0 in size:
        raise SchemaError(f"{source}: expected 1 to {MOST_PIXELS} pixels, got {size[0]} x {size[1]}", "make it smaller")
    if header.BitsAllocated > MOST_BITS:
        raise SchemaError(f"{source}: expected at most {MOST_BITS} bits a pixel, got {header.BitsAllocated}", "leave out what is no image, as dose")
    if header.get("ModalityLUTSequence"):
        raise SchemaError(f"{source}: expected a rescale slope and intercept, got a table of values (0028,3000)", "export it without")
    _refuse_unknown_compression(header, source)
    raw: Stored = header.pixel_array
    if raw.shape != size:
        raise SchemaError(f"{source}: expected {size} pixels, got {raw.shape}", REMEDY_EXPORT)
    return raw, _is_padding(raw, header)


def _refuse_unknown_compression(header: "Dataset", source: str) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise SchemaError(f"{source}: expected a known way of storing pixels, got another", "export it uncompressed") from None
    if not decoder.is_available:
        raise SchemaError(
            f"{source}: expected pixels that can be unpacked here, got {syntax.name}, for which no decoder is installed",
            "export it uncompressed (Explicit VR Little Endian), or install pylibjpeg with its plug-ins",
        )


def _is_padding(raw: Stored, header: "Dataset") -> BoolArray:
    value = header.get("PixelPaddingValue")
    if value is None:
        return np.zeros(raw.shape, dtype=np.bool_)
    ends = sorted((int(value), int(header.get("PixelPaddingRangeLimit", value))))
    return np.asarray((raw >= ends[0]) & (raw <= ends[1]))


def _rescaled(raw: Stored, header: "Dataset", source: str) -> FloatArray:
    slope, intercept = (_finite(header.get(name) if header.get(name) is not None else default) for name, default in RESCALE)
    if slope == 0:
        raise SchemaError(f"{source}: expected a rescale slope other than 0, got 0", REMEDY_EXPORT)
    return np.asarray(raw.astype(np.float64) * slope + intercept)


def _windowed(raw: Stored, header: "Dataset", source: str) -> FloatArray:
    """`(H, W)` in [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    values = _rescaled(raw, header, source)
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if centre is None or width is None:
        bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
        low = -(2 ** (bits - 1)) if signed else 0
        ends = _rescaled(np.array([low, low + 2**bits - 1]), header, source)
        return np.asarray(np.clip((values - ends.min()) / np.ptp(ends), 0, 1))
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in WINDOWS or width < (1 if function == "LINEAR" else math.ulp(1.0)):
        raise SchemaError(f"{source}: expected a window ({', '.join(WINDOWS)}) that is not empty, got another", REMEDY_EXPORT)
    return WINDOWS[function](values, centre, width)


def _linear(values: FloatArray, centre: float, width: float) -> FloatArray:
    return _linear_exact(values, centre - 0.5, max(width - 1, math.ulp(1.0)))


def _linear_exact(values: FloatArray, centre: float, width: float) -> FloatArray:
    return np.asarray(np.clip((values - centre) / width + 0.5, 0, 1))


def _sigmoid(values: FloatArray, centre: float, width: float) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -50, 50))))


WINDOWS: Mapping[str, Callable[[FloatArray, float, float], FloatArray]] = {"LINEAR": _linear, "LINEAR_EXACT": _linear_exact, "SIGMOID": _sigmoid}


def _first(value: object) -> float | None:
    """The first of one or several numbers; None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    numbers = [value] if isinstance(value, str | int | float) else list(value)  # type: ignore[call-overload]
    return _finite(numbers[0]) if numbers else None


def _finite(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


# Series -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One file of a CT series: where it is, and where it lies in the patient."""

    path: Path = field(repr=False)
    patient: str = field(repr=False)
    position: FloatArray = field(repr=False)  # (3,) mm, of the middle of the first pixel
    right: FloatArray = field(repr=False)  # (3,) unit vector along a row
    down: FloatArray = field(repr=False)  # (3,) unit vector along a column
    spacing: tuple[float, float]  # mm between rows, and between columns
    size: tuple[int, int]  # H, W


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A CT series as one even grid of voxels: slices, rows, columns."""

    slices: tuple[Slice, ...] = field(repr=False)
    axes: FloatArray = field(repr=False)  # (3, 3), a row for each axis of the grid: its unit vector in the patient
    spacing: FloatArray  # (3,) mm

    @property
    def patient(self) -> str:
        """The identifier in its files."""
        return self.slices[0].patient

    @property
    def size(self) -> tuple[int, int, int]:
        """D, H, W."""
        return (len(self.slices), *self.slices[0].size)

    def index_of(self, points: FloatArray) -> FloatArray:
        """Where points of the patient `(3, n)` lie in the grid, `(3, n)`; whole numbers are middles of voxels."""
        from_first = points - self.slices[0].position[:, None]
        return np.asarray(np.round(self.axes @ from_first / self.spacing[:, None], 6))  # a millionth of a voxel off the grid is on it


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFolder:
    """The series of a folder by their UID, what ails the others, and how many files with the mark or ending of DICOM could not be read at all."""

    series: Mapping[str, Series] = field(repr=False)
    problems: Mapping[str, str] = field(repr=False)
    num_unreadable: int


def series_of_folder(folder: Path, wanted: Collection[str]) -> SeriesFolder:
    """The CT series with the UIDs `wanted` in `folder` and below; headers alone are read.

    Raises:
        DataAccessError: a folder or file may not be read; that is no bad series.
        ConfigurationError: pydicom is not installed.
    """
    slices: dict[str, list[Slice]] = {}
    problems: dict[str, str] = {}
    num_unreadable = 0
    with silent_log("pydicom"):
        for number, path in enumerate(_files_below(folder), start=1):
            try:
                header, uid = _slice_header(path, f"{folder.name}: file {number}")
            except (SchemaError, DataMissingError):
                num_unreadable += 1
                continue
            if header is not None and uid in wanted:
                try:
                    slices.setdefault(uid, []).append(_slice(header, path, "a slice"))
                except SchemaError as error:
                    problems.setdefault(uid, error.what)
    series = {}
    for uid in slices.keys() - problems.keys():
        try:
            series[uid] = series_of(slices[uid], source="its series")
        except SchemaError as error:
            problems[uid] = error.what
    return SeriesFolder(series=series, problems=problems, num_unreadable=num_unreadable)


def _files_below(folder: Path) -> list[Path]:
    def refused(error: OSError) -> None:
        raise error

    with reading(folder.name):
        if not folder.is_dir():
            raise DataMissingError(f"{folder}: expected a folder of DICOM files, found none", "check the path given with --data")
        return sorted(Path(root) / name for root, _, names in os.walk(folder, onerror=refused) for name in names)


def _slice_header(path: Path, source: str) -> "tuple[Dataset | None, str]":
    """A file's header and its series; None where it neither has the mark nor the ending of DICOM."""
    with reading(source):
        if path.suffix.lower() not in DICOM_ENDINGS and not _has_mark(path):
            return None, ""
    header = _header(path, SLICE_TAGS, pixels=False, source=source)
    with _parsing(source):  # values are made of bytes only now
        return header, str(header.get("SeriesInstanceUID", ""))


def _slice(header: "Dataset", path: Path, source: str) -> Slice:
    """The slice that a header describes.

    Raises:
        SchemaError: it is no CT slice with a place in the patient.
    """
    with _parsing(source):
        _refuse_annotated(header, source)
        _refuse_frames(header, source)
        if header.get("Modality") != "CT":
            raise SchemaError(f"{source}: expected CT, got another modality", "leave it out")
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            if not header.get(name):
                raise SchemaError(f"{source}: expected {name}, found none", "export the original slices")
        directions = np.array([_finite(value) for value in header.ImageOrientationPatient])
        position = np.array([_finite(value) for value in header.ImagePositionPatient])
        rows, columns = (_finite(value) for value in header.PixelSpacing)
        right, down = directions.reshape(2, 3)
        lengths = np.array([right @ right - 1, down @ down - 1, right @ down])
        if position.shape != (3,) or np.abs(lengths).max() > SAME_DIRECTION:
            raise SchemaError(f"{source}: expected an orientation of two unit vectors at right angles, got others", REMEDY_EXPORT)
        if not LEAST_SPACING_MM <= min(rows, columns) <= max(rows, columns) <= MOST_SPACING_MM:
            raise SchemaError(f"{source}: expected pixels of {LEAST_SPACING_MM:g} to {MOST_SPACING_MM:g} mm, got others", "correct the export")
        return Slice(
            path=path,
            patient=str(header.get("PatientID") or "").strip(),
            position=position,
            right=right,
            down=down,
            spacing=(rows, columns),
            size=(int(header.Rows), int(header.Columns)),
        )


def series_of(slices: Sequence[Slice], *, source: str) -> Series:
    """The even grid that these slices are, in the order in which they lie.

    Raises:
        SchemaError: they have several patients, sizes, spacings or orientations, stand askew, or are not evenly spaced: one is missing or double.
    """
    first = slices[0]
    if len({part.patient for part in slices}) > 1:
        raise SchemaError(f"{source}: expected one patient, got several", REMEDY_EXPORT)
    if len({part.size for part in slices}) > 1:
        raise SchemaError(f"{source}: expected slices of one size, got several", "leave out what is no slice of it, as scouts")
    if not np.allclose([part.spacing for part in slices], first.spacing, rtol=1e-3, atol=0):
        raise SchemaError(f"{source}: expected one pixel spacing, got several", REMEDY_EXPORT)
    directions = np.array([(part.right, part.down) for part in slices])
    if np.abs(directions - directions[0]).max() > SAME_DIRECTION:
        raise SchemaError(f"{source}: expected slices of one orientation, got several", "leave out what is no slice of it, as scouts")
    normal = np.cross(first.right, first.down)
    positions = np.array([part.position for part in slices])
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    gap = _even_gap(places[order], source)
    if np.abs((positions - positions[order[0]]) @ np.stack([first.right, first.down], axis=1)).max() > SAME_PLACE_MM:
        raise SchemaError(f"{source}: expected slices straight above each other, got them askew, as from a tilted gantry", "use another series")
    return Series(
        slices=tuple(slices[index] for index in order), axes=np.stack([normal, first.down, first.right]), spacing=np.array([gap, *first.spacing])
    )


def _even_gap(places: FloatArray, source: str) -> float:
    """mm between neighbours of sorted places along the normal, where it is the same everywhere."""
    if len(places) < 2:
        raise SchemaError(f"{source}: expected at least two slices, got {len(places)}", REMEDY_EXPORT)
    gaps = np.diff(places)
    if gaps.min() < LEAST_SPACING_MM / 2:
        raise SchemaError(f"{source}: expected every slice once, got two at the same place", "export it once")
    typical = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    odd = gaps[np.abs(gaps - typical) > SAME_GAP * typical]
    if len(odd) and len(odd) <= max(1, len(gaps) // 10) and odd.min() > 1.5 * typical:
        raise SchemaError(f"{source}: expected evenly spaced slices, got {len(odd)} gaps: a slice is missing", "export the whole series")
    if len(odd):
        raise SchemaError(f"{source}: expected evenly spaced slices, got mixed spacings", "use a series reconstructed evenly")
    if not LEAST_SPACING_MM <= typical <= MOST_SPACING_MM:
        raise SchemaError(
            f"{source}: expected slices {LEAST_SPACING_MM:g} to {MOST_SPACING_MM:g} mm apart, got {typical:.1f} mm", "use a series of thinner slices"
        )
    return float(places[-1] - places[0]) / len(gaps)


def hounsfield_box(series: Series, first: Sequence[int], last: Sequence[int], *, source: str) -> FloatImages:
    """Voxels of the grid from `first` to before `last` (slices, rows, columns) as Hounsfield units; padding is air. Other slices are not read.

    Raises:
        DataMissingError, DataAccessError, SchemaError: a slice cannot be read any more, is damaged, or is not as its header said.
    """
    rows, columns = slice(first[1], last[1]), slice(first[2], last[2])
    box = np.empty([end - start for start, end in zip(first, last, strict=True)], dtype=np.float32)
    with silent_log("pydicom"):
        for number, part in enumerate(series.slices[first[0] : last[0]]):
            header = _header(part.path, PIXEL_TAGS, pixels=True, source=source)
            with _parsing(source):
                raw, padding = _grey_pixels(header, source)
                if raw.shape != part.size:
                    raise SchemaError(f"{source}: expected {part.size} pixels, got {raw.shape}", REMEDY_EXPORT)
                box[number] = np.where(padding, AIR, _rescaled(raw, header, source))[rows, columns]
    return box
