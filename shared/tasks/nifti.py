"""NIfTI files as slices: an image or volume in a known orientation, with its intensities in [0, 1] by what its header declares.

A volume is turned to the patient's axes by its affine (to the nearest ones: an oblique one is not interpolated) and taken apart along the axis from
feet to head; a slice lies as a radiologist sees it, front at the top and the patient's right at the left. Pixels are taken to be square.

Intensities: the window that the header declares (cal_min to cal_max), or else the range of the type (uint8, uint16), or floats in [0, 1] as they are;
never the least and largest value of the image. Text in the header is not read.

Legend: H height and W width of a slice, D slices.
"""

import gzip
import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.tasks.images import MOST_EXPANSION, MOST_FILE_BYTES, REMEDY_EXPORT, BoolArray, FloatImages, intensities, reading, silent_log

if TYPE_CHECKING:
    import nibabel  # an extra

NIFTI_ENDINGS = (".nii", ".gz")  # the second of .nii.gz
HEADER_BYTES = {348: 352, 540: 544}  # NIfTI-1 and NIfTI-2: the size that a header begins with -> its bytes, with the mark of extensions
MOST_BYTES = 2**30  # of an unpacked file
HARMLESS_BYTES = 2**28  # unpacked; a blank mask of a whole body packs a thousandfold, and up to here is let be
SAME_PLACE_MM = 1e-2  # of affines


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Slices `(D, H, W)` as stored, scaled by the header's slope; their place in the patient `(4, 4)`; and the window that the header declares."""

    values: NDArray[np.generic] = field(repr=False)
    affine: NDArray[np.float64] = field(repr=False)
    window: tuple[float, float] | None = None

    def grey(self, source: str) -> tuple[FloatImages, BoolArray]:
        """`(D, H, W)` float32 in [0, 1], blank where unusable; and which slices are usable `(D,)`: all is finite, and floats are in [0, 1].

        Raises:
            SchemaError: a type without a known range, and no window.
        """
        with np.errstate(all="ignore"):  # what is too large for float32 is infinite there, and unusable
            values = self.values.astype(np.float32) if self.values.dtype.kind == "f" else self.values
            low, high = self.window or (0.0, 1.0)
            windowed = np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        if self.window is not None:
            grey = windowed
        elif self.values.dtype.kind == "i":
            raise SchemaError(
                f"{source}: expected uint8, uint16 or floats in [0, 1], got {self.values.dtype} without a window",
                "set cal_min and cal_max in the header, as -1000 and 400 for lungs",
            )
        else:
            grey = intensities(values, source)
        usable = np.isfinite(values).all(axis=(1, 2)) & ((np.nan_to_num(grey, nan=-1) >= 0) & (np.nan_to_num(grey, nan=2) <= 1)).all(axis=(1, 2))
        grey[~usable] = 0
        return grey, usable


def read_nifti(path: Path, *, source: str) -> Volume:
    """The slices in a .nii or .nii.gz file of one image or volume; nothing is unpacked before the header has said how much it is.

    Args:
        source: what messages call it; a file's own name may be a patient's.

    Raises:
        DataMissingError, DataAccessError: there is none, it is empty, or it may not be read.
        SchemaError: it is no NIfTI file, is cut short, has colours or several points in time, or more than 1 GiB, or would unpack to 100 times its size
            and more than 256 MiB.
        ConfigurationError: nibabel is not installed.
    """
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("NIfTI files: expected nibabel, found it not installed", 'pip install "wardround[imaging]"') from error
    with reading(source):
        packed = path.stat().st_size
        if packed == 0:
            raise DataMissingError(f"{source}: expected a NIfTI file, got an empty file", REMEDY_EXPORT)
        if packed > MOST_FILE_BYTES:
            raise SchemaError(f"{source}: expected a file of at most {MOST_FILE_BYTES // 2**20} MiB, got a larger one", REMEDY_EXPORT)
        content = _content(path, packed, source)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"), silent_log("nibabel.global"):
            warnings.simplefilter("ignore")
            return _volume(_kind(content).from_bytes(content), source)
    except SchemaError:
        raise
    except Exception as error:  # a damaged file makes nibabel raise almost anything, and quotes the file in it
        raise SchemaError(f"{source}: expected a NIfTI file, got one that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None


def _content(path: Path, packed: int, source: str) -> bytes:
    """Header and values, unpacked; not a byte more than the header declares."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if is_packed else file
        try:
            head = stream.read(max(HEADER_BYTES.values()))
            declared = _declared_bytes(head, source)
            if declared > MOST_BYTES or (is_packed and declared > max(HARMLESS_BYTES, MOST_EXPANSION * packed)):
                raise SchemaError(
                    f"{source}: expected at most {MOST_BYTES // 2**20} MiB, and {MOST_EXPANSION} times the file's size or "
                    f"{HARMLESS_BYTES // 2**20} MiB, got {declared / 2**20:.0f} MiB; it was not unpacked",
                    "check where it comes from; cut it to what is needed",
                )
            content = head + stream.read(max(declared - len(head), 0))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SchemaError(
                f"{source}: expected a NIfTI file, got one that is cut short or damaged ({type(error).__name__})", REMEDY_EXPORT
            ) from None
    if len(content) < declared:
        raise SchemaError(f"{source}: expected {declared} bytes, as the header says, got {len(content)}: it is cut short", REMEDY_EXPORT)
    return content


def _declared_bytes(head: bytes, source: str) -> int:
    """What the header says the whole file has, by its own shape, type and offset."""
    try:
        header = _kind(head).header_class.from_fileobj(io.BytesIO(head), check=False)  # type: ignore[no-untyped-call]
        shape, bits, offset = header.get_data_shape(), int(header["bitpix"]), float(header["vox_offset"])
        if bytes(header["magic"].tobytes()[:3]) not in (b"n+1", b"n+2"):
            raise SchemaError(f"{source}: expected a single .nii file, got a header whose values are in another file", "save it as .nii or .nii.gz")
        num_bytes = math.prod(int(side) for side in shape) * bits // 8 + int(offset)
    except SchemaError:
        raise
    except Exception as error:
        raise SchemaError(f"{source}: expected a NIfTI file, got one that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None
    if min(shape, default=0) < 1 or num_bytes < len(HEADER_BYTES):
        raise SchemaError(f"{source}: expected an image, got a header of none", REMEDY_EXPORT)
    return num_bytes


def _kind(content: bytes) -> "type[nibabel.nifti1.Nifti1Image]":
    """NIfTI-1 or NIfTI-2, by the size that a header begins with, in either order of bytes."""
    import nibabel

    sizes = {struct.unpack(order + "i", content[:4])[0] for order in "<>"}
    found = [kind for size, kind in ((348, nibabel.Nifti1Image), (540, nibabel.Nifti2Image)) if size in sizes]
    return found[0]


def _volume(image: Any, source: str) -> Volume:
    """The slices of an image of nibabel, its axes turned to the patient's."""
    from nibabel import orientations

    shape, header = image.shape, image.header
    if not 2 <= len(shape) <= 7 or math.prod(shape[3:]) != 1:
        raise SchemaError(f"{source}: expected one image or volume, got shape {shape}", "save every point in time as a file of its own")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise SchemaError(f"{source}: expected an affine that places it in the patient, got another", REMEDY_EXPORT)
    values = np.asanyarray(image.dataobj)
    if values.dtype.kind not in "iuf":
        raise SchemaError(f"{source}: expected numbers, got type {values.dtype.kind!r}", "save it in grey")
    values = values.reshape((*shape, 1)[:3])
    turn = orientations.io_orientation(affine)  # type: ignore[no-untyped-call]
    turned = orientations.apply_orientation(values, turn)  # type: ignore[no-untyped-call]  # right, front, head
    low, high = float(header["cal_min"]), float(header["cal_max"])
    scaled = header.get_slope_inter() not in ((None, None), (1.0, 0.0))
    return Volume(
        values=np.transpose(turned[::-1, ::-1], (2, 1, 0)).astype(np.float32 if scaled else values.dtype.newbyteorder("=")),
        affine=affine @ orientations.inv_ornt_aff(turn, values.shape),  # type: ignore[no-untyped-call]
        window=(low, high) if math.isfinite(low) and math.isfinite(high) and high > low else None,
    )


def same_grid(first: Volume, second: Volume) -> bool:
    """Whether two volumes have their voxels at the same places."""
    return first.values.shape == second.values.shape and bool(np.allclose(first.affine, second.affine, rtol=0, atol=SAME_PLACE_MM))
