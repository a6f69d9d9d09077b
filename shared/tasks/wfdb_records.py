"""WFDB records from a folder: a header NAME.hea, its signal files, and its annotations, e.g. NAME.atr. Every task on such records uses it.

The formats are those of the WFDB Applications Guide (Moody, Pollard and Moody; header(5), signal(5), annot(5)); package wfdb decodes signals and
annotations. That package opens whatever it is told, also over the network, and takes the sizes a header claims for true. So a header is looked at
here first: names of files are plain names in the header's own folder, and what it claims must be in the files, before room is made for it.
Comments of a header, and notes of annotations, often name a patient's age, sex and illnesses: nothing of them leaves this file, and no message
holds a record's name, which may be a patient's.

Legend: T samples of a record, A annotations.
"""

import importlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cohort import IntArray
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.tasks.images import MOST_FILE_BYTES, REMEDY_EXPORT, reading

FloatArray = NDArray[np.float64]

HEADER, LIST = ".hea", "RECORDS"
MOST_HEADER_BYTES, MOST_ANNOTATION_BYTES = 2**20, 2**26
MOST_SIGNALS, MOST_SKEW_SECONDS = 256, 10
LEAST_RATE, MOST_RATE = 50.0, 10_000.0  # samples a second; slower tells no beat from another, faster no electrocardiograph is
LEAST_GAIN, MOST_GAIN = 1.0, 1e8  # steps of the converter in a millivolt
LEAST_SECONDS = 1  # of a record
BITS = {
    "8": 8,
    "16": 16,
    "24": 24,
    "32": 32,
    "61": 16,
    "80": 8,
    "160": 16,
    "212": 12,
    "310": Fraction(32, 3),
    "311": Fraction(32, 3),
}  # of a sample, by format
MILLIVOLTS = {"": 1.0, "mv": 1.0, "uv": 1e-3, "v": 1e3}  # in the unit of a header, which says mV where it says nothing
FILE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_]+)?")
SPECIAL = re.compile(r"::|[*?\[\]]")  # in a path; the library takes such for several files, or for an address
GAIN = re.compile(r"([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)?(?:\((-?\d+)\))?(?:/(\S+))?")
PREFERRED = ("mlii", "ii")
LEADS = (
    *PREFERRED, "i", "iii", "avr", "avl", "avf", "v", "v1", "v2", "v3", "v4", "v5", "v6", "mli", "mliii", "mcl1", "mcl5", "mv2", "cm5", "cc5",
    "ecg", "ecg1", "ecg2", "ecg3",
)  # fmt: skip  # names of signals that are electrocardiograms
REMEDY_EXTRA = 'pip install "wardround[ecg]"'
REMEDY_FOLDER = "give a folder of WFDB records, NAME.hea with its signal and annotations beside it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """One lead of a record, as the patient's body gave it.

    Attributes:
        millivolts: `(T,)` float64, NaN where the device gave no value.
        rate: samples a second.
        preferred: True where it is the lead that was asked for, or MLII or II where none was.
    """

    millivolts: FloatArray = field(repr=False)
    rate: float
    preferred: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What an annotator marked: the sample, `(A,)` int64 and never falling, and the symbol, `(A,)` text, of each mark."""

    sample: IntArray = field(repr=False)
    symbol: NDArray[np.str_] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What a checked header says: signals a file each, formats and gains known, and no more samples than the files can hold."""

    rate: float
    num_samples: int
    names: tuple[str, ...] = field(repr=False)
    millivolts: tuple[bool, ...]


# Which records ------------------------------------------------------------------------------------------------------------------


def find_records(folder: Path, *, task: str) -> list[str]:
    """The records of a folder, as names below it without ending: those that its file RECORDS lists, else every header in it and in folders below.

    Raises:
        DataMissingError, DataAccessError: there is no folder, or no record in it; some of it may not be read.
        SchemaError: RECORDS is not UTF-8, or names a record twice or one outside of the folder.
    """
    with reading(str(folder)):
        if not folder.exists():
            raise DataMissingError(f"{folder}: expected a folder of WFDB records, found nothing", "check the path given with --data")
        if not folder.is_dir():
            raise DataMissingError(f"{folder}: expected a folder of WFDB records, got a file", REMEDY_FOLDER)
        listed = folder / LIST
        names = _listed(listed) if listed.is_file() else _found(folder)
    if not names:
        raise DataMissingError(f"{folder}: task {task}: expected records (NAME.hea), found none", REMEDY_FOLDER)
    return names


def _listed(path: Path) -> list[str]:
    if path.stat().st_size > MOST_ANNOTATION_BYTES:
        raise SchemaError(f"{path}: expected a list of records, got a file of {path.stat().st_size / 2**20:.0f} MiB", REMEDY_EXPORT)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: expected UTF-8 text, got other bytes", "save it as UTF-8") from None
    names = [PurePosixPath(line.strip()).as_posix() for line in lines if line.strip()]  # ./a is a, and would be another patient
    if len(set(names)) != len(names):
        raise SchemaError(f"{path}: expected every record once, got {len(names) - len(set(names))} lines more", "remove the repeated lines")
    outside = sum(not _is_below(name) for name in names)
    if outside:
        raise SchemaError(f"{path}: expected names of records below its folder, got {outside} others", "list the records of this folder alone")
    return names


def _is_below(name: str) -> bool:
    """Whether this is a plain relative path, of names that stay in their folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and path.parts != () and all(FILE_NAME.fullmatch(part) for part in path.parts)


def _found(folder: Path) -> list[str]:
    """Every header, sorted; `Path.rglob` would pass over a folder that may not be read without a word."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        found += [(Path(place) / name).relative_to(folder).with_suffix("").as_posix() for name in files if name.endswith(HEADER)]
    return sorted(found)


# A header -----------------------------------------------------------------------------------------------------------------------


def _read_header(path: Path, *, source: str) -> tuple[Any, _Header]:
    """The header of a record, checked against the files beside it.

    Raises:
        DataMissingError, DataAccessError: it or a signal file is missing, empty, or may not be read.
        SchemaError: it is not of the declared form, names a file elsewhere, or claims more than its files hold.
    """
    lines = _header_lines(path.with_name(path.name + HEADER), source)
    record = _parsed(path, lines, source)
    rate, num_samples, count = float(record.fs), record.sig_len or 0, record.n_sig
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise SchemaError(f"{source}: expected {LEAST_RATE:g} to {MOST_RATE:g} samples a second, got another rate", REMEDY_EXPORT)
    if num_samples < rate * LEAST_SECONDS:
        raise SchemaError(f"{source}: expected a header that states its samples, a second's at the least, got none or fewer", REMEDY_EXPORT)
    if not 1 <= count <= MOST_SIGNALS or count != len(record.file_name):
        raise SchemaError(f"{source}: expected as many signal lines as the header says, 1 to {MOST_SIGNALS}, got others", REMEDY_EXPORT)
    if any((skew or 0) > MOST_SKEW_SECONDS * rate for skew in record.skew):
        raise SchemaError(f"{source}: expected signals at most {MOST_SKEW_SECONDS} s askew, got more", REMEDY_EXPORT)
    for name in dict.fromkeys(record.file_name):
        _check_signal_file(path, record, name, source)
    calibrated = tuple(_in_millivolts(line, source) for line in lines[1:])
    names = tuple((name or "").strip().lower() for name in record.sig_name)
    return record, _Header(rate=rate, num_samples=num_samples, names=names, millivolts=calibrated)


def _header_lines(path: Path, source: str) -> list[str]:
    """The lines of a header but for comments and empty ones."""
    with reading(f"{source}: header"):
        if path.stat().st_size > MOST_HEADER_BYTES:
            raise SchemaError(f"{source}: expected a header of at most {MOST_HEADER_BYTES // 2**20} MiB, got a larger file", REMEDY_EXPORT)
        content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise SchemaError(f"{source}: expected a header of UTF-8 text, got other bytes", "save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataMissingError(f"{source}: expected a header, got an empty one", REMEDY_EXPORT)
    if not all(line.isascii() and line.replace("\t", " ").isprintable() for line in lines):  # the library would leave others out
        raise SchemaError(f"{source}: expected plain characters but in a header's comments, got others", REMEDY_EXPORT)
    if "/" in lines[0].split()[0]:
        raise SchemaError(f"{source}: expected a record of one segment, got one of several", "convert it to one segment")
    for line in lines[1:]:
        if not FILE_NAME.fullmatch(line.split()[0]):
            raise SchemaError(
                f"{source}: expected signal files by their plain names, in the header's folder, got a path or an address", REMEDY_EXPORT
            )
    return lines


def _parsed(path: Path, lines: Sequence[str], source: str) -> Any:
    wfdb = _library()
    if SPECIAL.search(str(path.absolute())):
        raise SchemaError(f"{source}: expected a path without :: * ? [ ], got one with some of them", "move the data")
    with _parsing(f"{source}: header"):
        record = wfdb.rdheader(str(path.absolute()))
    if type(record) is not wfdb.Record or not record.file_name or list(record.file_name) != [line.split()[0] for line in lines[1:]]:
        raise SchemaError(f"{source}: expected a header with a line for each signal, got none", REMEDY_EXPORT)
    return record


def _check_signal_file(path: Path, record: Any, name: str, source: str) -> None:
    """The signal file is there, and holds what the header says of it."""
    places = [index for index, other in enumerate(record.file_name) if other == name]
    if places != list(range(places[0], places[0] + len(places))):
        raise SchemaError(f"{source}: expected the signals of a file one after another, got a header that mixes files", REMEDY_EXPORT)
    formats = {(record.fmt[index], record.byte_offset[index] or 0) for index in places}
    [(kind, offset), *others] = formats
    if others or kind not in BITS:
        raise SchemaError(f"{source}: expected one signal format of {', '.join(BITS)} in a file, got another", "convert it to format 16")
    per_frame = [record.samps_per_frame[index] or 1 for index in places]
    with reading(f"{source}: signal"):
        file = path.with_name(name)
        size = file.stat().st_size
        if not file.is_file() or size == 0:
            raise DataMissingError(f"{source}: expected a signal file, got an empty one or a folder", REMEDY_EXPORT)
    claimed = offset + math.floor(record.sig_len * sum(per_frame) * BITS[kind] // 8)  # exact, however large the numbers of the header
    if claimed > size or size > MOST_FILE_BYTES:
        raise SchemaError(
            f"{source}: expected a signal file of {min(claimed, MOST_FILE_BYTES)} to {MOST_FILE_BYTES} bytes, got {size}: it is cut short, or too large",
            REMEDY_EXPORT,
        )


def _in_millivolts(line: str, source: str) -> bool:
    """Whether a signal line calibrates its signal in volts; a gain of 0, or none, means that nobody has."""
    fields = line.split()
    match = GAIN.fullmatch(fields[2]) if len(fields) > 2 else None
    if match is None or match[1] is None:
        return False
    try:
        gain = abs(float(match[1]))
    except ValueError:
        raise SchemaError(f"{source}: expected a number as a signal's gain, got another text", REMEDY_EXPORT) from None
    factor = MILLIVOLTS.get((match[3] or "").lower())
    return factor is not None and LEAST_GAIN <= gain / factor <= MOST_GAIN


# A lead -------------------------------------------------------------------------------------------------------------------------


def read_lead(folder: Path, name: str, *, lead: str | None, source: str) -> Lead:
    """One lead of a record: the one asked for; or else MLII, else II, else the first that is an electrocardiogram by its name.

    Args:
        lead: its name in the header, whatever its capitals; None for the rule above.
        source: what messages call the record, whose own name may be a patient's.

    Raises:
        ConfigurationError: package wfdb is not there.
        DataMissingError, DataAccessError: header or signal is missing, empty, or may not be read.
        SchemaError: they are not as declared, are cut short, or there is no such lead in millivolts.
    """
    path = folder / name
    record, header = _read_header(path, source=source)
    index = _choose(header, lead, source)
    factor = MILLIVOLTS[(record.units[index] or "").lower()]
    wfdb = _library()
    with _parsing(f"{source}: signal"):
        values = np.asarray(wfdb.rdrecord(str(path.absolute()), channels=[index]).p_signal[:, 0], dtype=np.float64) * factor
    if values.shape != (header.num_samples,) or np.isinf(values).any() or np.isnan(values).all():
        raise SchemaError(f"{source}: expected a signal of {header.num_samples} samples, got another number, or none that is a number", REMEDY_EXPORT)
    preferred = lead is not None or header.names[index] in PREFERRED
    return Lead(millivolts=values, rate=header.rate, preferred=preferred)


def _choose(header: _Header, lead: str | None, source: str) -> int:
    wanted = (lead.lower(),) if lead is not None else LEADS
    places = [index for index, name in enumerate(header.names) if name in wanted and header.millivolts[index]]
    if not places:
        what = "that lead" if lead is not None else "an electrocardiogram lead"
        raise SchemaError(f"{source}: expected {what}, calibrated in mV, found none", "see its header, and the loader's option lead")
    return min(places, key=lambda index: PREFERRED.index(header.names[index]) if header.names[index] in PREFERRED else len(PREFERRED))


# Annotations --------------------------------------------------------------------------------------------------------------------


def read_annotations(folder: Path, name: str, annotator: str, *, of: Lead, source: str) -> Annotations:
    """What is marked in NAME.<annotator>, in the order of time, by the samples of a lead of the record.

    Raises:
        DataMissingError, DataAccessError: there is none, it is empty, or it may not be read.
        SchemaError: it is cut short or damaged, or marks what is not in the record.
    """
    path = folder / name
    file = path.with_name(f"{path.name}.{annotator}")
    with reading(f"{source}: annotations"):
        size = file.stat().st_size
        if size > MOST_ANNOTATION_BYTES:
            raise SchemaError(f"{source}: expected at most {MOST_ANNOTATION_BYTES // 2**20} MiB of annotations, got more", REMEDY_EXPORT)
        content = file.read_bytes()
        if not content:
            raise DataMissingError(f"{source}: expected annotations, got an empty file", REMEDY_EXPORT)
        if len(content) % 2 or content[-2:] != b"\0\0":  # the mark of the end, without which the library would say nothing
            raise SchemaError(f"{source}: expected annotations up to their end, got a file that is cut short", REMEDY_EXPORT)
    wfdb = _library()
    with _parsing(f"{source}: annotations"):
        read = wfdb.rdann(str(path.absolute()), annotator)
        marks = Annotations(sample=np.asarray(read.sample, dtype=np.int64), symbol=np.array(read.symbol, dtype=np.str_))
        same_clock = read.fs is None or math.isclose(float(read.fs), of.rate, rel_tol=1e-6)
    samples, last = marks.sample, len(of.millivolts)
    if not same_clock or len(samples) != len(marks.symbol) or (np.diff(samples) < 0).any() or (samples < 0).any() or (samples >= last).any():
        raise SchemaError(f"{source}: expected annotations within the record, in the order of time, got others", REMEDY_EXPORT)
    return marks


def _library() -> Any:
    """Package wfdb, which takes a second to import, and which whoever has no such records need not have.

    Raises:
        ConfigurationError: it is not there.
    """
    try:
        with _without_warnings():
            return importlib.import_module("wfdb")
    except ImportError:
        raise ConfigurationError("reading WFDB records: expected package wfdb, found none", REMEDY_EXTRA) from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The library warns of how it uses pandas, which nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _parsing(source: str) -> Iterator[None]:
    """What the library says about a file, as our errors, without a word of the file's."""
    with reading(source), _without_warnings():
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # a parser of others, on a file of anybody: it raises what it likes
            raise SchemaError(f"{source}: expected WFDB format, got a file that cannot be read ({type(error).__name__})", REMEDY_EXPORT) from None
