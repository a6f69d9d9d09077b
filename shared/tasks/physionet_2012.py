"""Reading the PhysioNet/CinC Challenge 2012: one file "Time,Parameter,Value" a stay, in a folder or a .tar.gz, and one table of outcomes.

Silva, Moody, Scott, Celi, Mark 2012, "Predicting in-hospital mortality of ICU patients". The first 48 hours of ICU types 1 to 4. An archive is read as a
stream, and nothing of it is unpacked to disk; a record that is not of the declared form is left out and counted, up to `tolerance`.
"""

import gzip
import io
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared.config import Real, Settings, nearest, validate
from shared.errors import DataAccessError, DataError, DataMissingError, SchemaError
from shared.schema import OUT_OF_RANGE_TOLERANCE
from shared.tasks.icu_stays import DESCRIBED, HOURS, INDEX_OF, MOST_MINUTES, NUM_VARIABLES, UNITS, UNKNOWN, VARIABLES, IcuStays, IntArray
from shared.tasks.tabular import read_csv

MOST_RECORD_BYTES = 1_000_000  # the largest of 4,000 is 24,000
MOST_EXPANSION = 50  # times the size of an archive that it may unpack to; text of this kind takes 4 to 6
HEADER = "Time,Parameter,Value"
RECORD_NAME = re.compile(r"(\d{1,18})\.txt")
CLOCK = re.compile(r"(\d{2}):([0-5]\d)")
ID, DEATH, STAY = "RecordID", "In-hospital_death", "Length_of_stay"  # columns of the outcomes
REMEDY_FOLDER = "give a folder with one Outcomes*.txt, and beside it one .tar.gz or the records themselves, <RecordID>.txt"


class IcuOptions(Settings):
    """Options of the loaders of these tasks."""

    tolerance: Real = Field(default=0.05, ge=0, le=0.5, description="share of the records that may be left out because they cannot be read")


def load_stays(path: Path | None, options: Mapping[str, object], *, task: str) -> IcuStays:
    """The stays in a folder that holds Outcomes*.txt and a .tar.gz of records, or the records, or one folder of them.

    An archive is read as a stream and nothing is unpacked to disk.

    Raises:
        DataMissingError, DataAccessError: a file is missing, or may not be read.
        SchemaError: files are not as declared, a patient is there twice, or more records than `tolerance` cannot be used.
        DataError: an archive is damaged, or would unpack to far more than its size.
    """
    settings = validate(IcuOptions, dict(options), f"task {task}: options of its loader")
    if path is None:
        raise DataMissingError(f"task {task} has no data of its own", REMEDY_FOLDER)
    outcomes_file, records = find_files(path)
    outcomes = read_outcomes(outcomes_file)
    reader = _Reader()
    for name, body in read_archive(records[0]) if records[0].name.endswith(".tar.gz") else _read_records(records):
        reader.take(name, body)
    return reader.stays(outcomes, settings.tolerance, source=path.name)


def find_files(path: Path) -> tuple[Path, list[Path]]:
    """The table of outcomes, and the archive or the records; `path` is their folder, or the archive with the table beside it.

    Raises:
        DataMissingError, DataAccessError: they are not there, or the folder may not be read.
    """
    if not path.exists():
        raise DataMissingError(f"{path}: expected data, found nothing", "check the path given with --data")
    if not path.is_dir() and not path.name.endswith(".tar.gz"):
        raise DataMissingError(f"{path}: expected a folder or a .tar.gz, got another file", REMEDY_FOLDER)
    beside = _listed(path if path.is_dir() else path.parent)
    tables = [file for file in beside if file.name.startswith("Outcomes") and file.suffix == ".txt"]
    if len(tables) != 1:
        raise DataMissingError(f"{path}: expected one Outcomes*.txt, found {len(tables)}", REMEDY_FOLDER)
    archives = [file for file in beside if file.name.endswith(".tar.gz")] if path.is_dir() else [path]
    folders = [path, *(file for file in beside if file.is_dir())] if path.is_dir() else []
    found = [files for folder in folders if (files := [file for file in _listed(folder) if RECORD_NAME.fullmatch(file.name)])]
    if len(archives) + len(found) != 1 or not (archives or found)[0]:
        raise DataMissingError(f"{path}: expected one .tar.gz or one folder of records, found {len(archives) + len(found)}", REMEDY_FOLDER)
    return tables[0], archives or found[0]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        raise DataAccessError(f"{folder}: this user may not read the folder", "change its permissions") from None


def _read_records(files: list[Path]) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of each record; None for one that is too large to be one.

    Raises:
        DataAccessError: a record may not be read. That is no bad data, and no reason to go on without it.
    """
    for file in files:
        try:
            yield file.name, None if file.stat().st_size > MOST_RECORD_BYTES else file.read_bytes()
        except PermissionError:
            raise DataAccessError(f"{file.parent}: this user may not read some of the records in it", "change their permissions") from None
        except OSError as error:
            raise DataError(f"{file.parent}: a record could not be read ({type(error).__name__})", "check the file system") from None


class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than `most` bytes."""

    def __init__(self, stream: gzip.GzipFile, most: int, name: str) -> None:
        super().__init__()
        self._stream, self._left, self._name = stream, most, name

    def read(self, size: int = -1) -> bytes:
        part = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(part)
        if self._left < 0:
            raise DataError(
                f"{self._name}: expected an archive that unpacks to at most {MOST_EXPANSION} times its size, got more", "check where it comes from"
            )
        return part


def read_archive(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of each record of a .tar.gz, in its order; None for one that is too large to be one. Nothing is written to disk.

    Raises:
        DataMissingError, DataAccessError: no such file, or it may not be read.
        SchemaError: it holds something else than plain files <RecordID>.txt and folders, or a name that leads out of it.
        DataError: it is damaged, cut off, or unpacks to more than `MOST_EXPANSION` times its size.
    """
    try:
        most = MOST_EXPANSION * path.stat().st_size + tarfile.RECORDSIZE  # an archive of nothing is padded to that
        with gzip.open(path) as packed, tarfile.open(fileobj=_Bounded(packed, most, path.name), mode="r|") as archive:
            for member in archive:
                if member.size > most:
                    raise DataError(
                        f"{path.name}: expected an archive that unpacks to at most {MOST_EXPANSION} times its size, got more",
                        "check where it comes from",
                    )
                if not member.isdir():
                    yield _member_name(member, path.name), _member_body(archive, member)
    except FileNotFoundError:
        raise DataMissingError(f"{path}: expected an archive of records, found none", "check the path given with --data") from None
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read it", "change its permissions") from None
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a whole .tar.gz, got one that cannot be read ({type(error).__name__})", "copy it again") from None


def _member_name(member: tarfile.TarInfo, source: str) -> str:
    parts = member.name.split("/")
    if not member.isreg() or ".." in parts or member.name.startswith("/") or not RECORD_NAME.fullmatch(parts[-1]):
        raise SchemaError(f"{source}: expected plain files <RecordID>.txt, got a link or another name", "make the archive of the records alone")
    return parts[-1]


def _member_body(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = archive.extractfile(member) if member.size <= MOST_RECORD_BYTES else None
    return None if file is None else file.read()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a stay ended: death in hospital, and days in hospital (NaN where not known)."""

    died: bool
    days: float


def read_outcomes(file: Path) -> dict[str, Outcome | None]:
    """RecordID -> how the stay ended; None where the row does not say so in the declared form.

    Raises:
        DataMissingError, DataAccessError, SchemaError: no such file, it may not be read, or it is no such table; or a patient is there twice.
    """
    frame = read_csv(file)
    absent = [name for name in (ID, DEATH, STAY) if name not in frame.columns]
    if absent:
        raise SchemaError(f"{file.name}: expected column {absent[0]!r}{nearest(absent[0], list(frame.columns))}, not found", "rename or add it")
    if len(frame) == 0:
        raise DataMissingError(f"{file.name}: expected a row for each patient, got none", "check that this is the right file")
    ids = frame[ID].str.strip()
    if ids.duplicated().any():
        raise SchemaError(f"{file.name}: expected each patient once, got {int(ids.duplicated().sum())} rows more", "remove the duplicates")
    return {name: _outcome(died, days) for name, died, days in zip(ids, frame[DEATH], frame[STAY], strict=True)}


def _outcome(died: str, days: str) -> Outcome | None:
    number = _number(days)
    if died.strip() not in ("0", "1") or number is None:
        return None
    return Outcome(died=died.strip() == "1", days=number if number > 0 else math.nan)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One stay's file: descriptors as text, and its measurements `(e,)`."""

    described: Mapping[str, str] = field(repr=False)
    variable: IntArray = field(repr=False)
    minute: IntArray = field(repr=False)
    value: NDArray[np.float64] = field(repr=False)
    num_unknown: int


def parse_record(record_id: str, body: bytes, clock: Callable[[str], int]) -> Record:
    """The rows of a stay's file.

    Args:
        clock: "hh:mm" -> minutes; raises `SchemaError` for another text.

    Raises:
        SchemaError: it is not UTF-8, has no header or no rows, a row does not have the three fields of its kind, or it is of another patient.
    """
    try:
        lines = body.decode().splitlines()
    except UnicodeDecodeError:
        raise SchemaError("expected UTF-8 text, got other bytes") from None
    if not lines or lines[0].strip() != HEADER or len(lines) < 2:
        raise SchemaError(f"expected the line {HEADER} and rows, got others")
    described: dict[str, str] = {}
    variables, minutes, values, num_unknown = [], [], [], 0
    for line in lines[1:]:
        fields = line.split(",")
        if len(fields) != 3:
            raise SchemaError("expected three fields in every row, got another number")
        time, name, value = fields
        index = INDEX_OF.get(name)
        if index is not None:
            variables.append(index)
            minutes.append(clock(time))
            values.append(value)
        elif name == ID or name in DESCRIBED:
            described[name] = value.strip()
        else:
            num_unknown += 1
    if described.pop(ID, None) != record_id or described.get("ICUType") not in UNITS:
        raise SchemaError("expected the RecordID of the file's name and an ICUType from 1 to 4, got others")
    if any(_number(described.get(name) or UNKNOWN) is None for name in ("Age", "Height")) or described.get("Gender", UNKNOWN) not in (
        "0",
        "1",
        UNKNOWN,
    ):
        raise SchemaError(f"expected Age and Height as numbers and Gender 0, 1 or {UNKNOWN}, got others")
    try:
        numbers = np.array([float(value) for value in values], dtype=np.float64)
    except ValueError:
        raise SchemaError("expected a number as Value, got text") from None
    if not np.isfinite(numbers).all():
        raise SchemaError("expected a finite Value, got NaN or infinity")
    return Record(
        described=described, variable=np.array(variables, dtype=np.int64), minute=np.array(minutes, dtype=np.int64), value=numbers, num_unknown=num_unknown
    )  # fmt: skip


class _Clock:
    """Minutes since admission in "hh:mm", up to 48:00; there are 2,881 of them, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._known:
            match = CLOCK.fullmatch(text)
            minutes = 60 * int(match[1]) + int(match[2]) if match else -1
            if not 0 <= minutes <= MOST_MINUTES:
                raise SchemaError(f"expected a Time from 00:00 to {HOURS}:00, got another")
            self._known[text] = minutes
        return self._known[text]


class _Reader:
    """Takes records one by one; keeps what can be read, and counts what cannot."""

    def __init__(self) -> None:
        self._clock, self._records, self._seen = _Clock(), dict[str, Record](), set[str]()
        self._num_bad, self._reason = 0, ""

    def take(self, name: str, body: bytes | None) -> None:
        """Raises `SchemaError` for a patient who was there before."""
        record_id = name.removesuffix(".txt")
        if record_id in self._seen:
            raise SchemaError("records: expected each patient once, got one twice", "remove the duplicate")
        self._seen.add(record_id)
        try:
            if body is None:
                raise SchemaError(f"expected at most {MOST_RECORD_BYTES} bytes, got more")
            self._records[record_id] = parse_record(record_id, body, self._clock)
        except SchemaError as error:
            self._num_bad += 1
            self._reason = self._reason or error.what

    def stays(self, outcomes: Mapping[str, Outcome | None], tolerance: float, *, source: str) -> IcuStays:
        """The stays of all records taken, in their order.

        Raises:
            SchemaError: too many could not be read or have no outcome, or too many values of a variable cannot be.
            DataMissingError: there is none.
        """
        ended = {name: outcomes.get(name) for name in self._records}
        kept = {name: record for name, record in self._records.items() if ended[name] is not None}
        num_endless = len(ended) - len(kept)
        if self._num_bad + num_endless > tolerance * len(self._seen):
            reason = self._reason or f"expected a row of the outcomes, with {DEATH} 0 or 1 and {STAY} a number, got none"
            raise SchemaError(
                f"{source}: expected at most a share of {tolerance:g} of records that cannot be used, got {self._num_bad + num_endless} of "
                f"{len(self._seen)}; the first: {reason}",
                "correct the export, or raise the option tolerance",
            )
        if not kept:
            raise DataMissingError(f"{source}: expected records, found none", REMEDY_FOLDER)
        outcome = [ended[name] for name in kept]
        notes = {
            "records_unreadable": self._num_bad,
            "records_without_outcome": num_endless,
            "outcomes_without_record": len(outcomes.keys() - self._seen),
            "values_of_unknown_parameters": sum(record.num_unknown for record in kept.values()),
        }
        records = list(kept.values())
        lengths = [len(record.value) for record in records]
        stays = IcuStays(
            ids=tuple(kept),
            described={name: np.array([record.described.get(name, UNKNOWN) or UNKNOWN for record in records]) for name in sorted(DESCRIBED)},
            stay=np.repeat(np.arange(len(records), dtype=np.int64), lengths),
            variable=np.concatenate([record.variable for record in records]),
            minute=np.concatenate([record.minute for record in records]),
            value=np.concatenate([record.value for record in records]),
            died=np.array([end is not None and end.died for end in outcome], dtype=np.float32),
            days=np.array([math.nan if end is None else end.days for end in outcome], dtype=np.float32),
            notes=notes,
        )
        return plausible(stays, source=source)


def plausible(stays: IcuStays, *, source: str) -> IcuStays:
    """The stays with the values that can be; unknown ones (-1) and others are left out and counted.

    Raises:
        SchemaError: more than one in twenty of a variable's values cannot be: its unit is another.
    """
    low, high = (np.array([getattr(variable, end) for variable in VARIABLES]) for end in ("low", "high"))
    unknown = stays.value == float(UNKNOWN)
    outside = ~unknown & ((stays.value < low[stays.variable]) | (stays.value > high[stays.variable]))
    present, strange = (np.bincount(stays.variable[which], minlength=NUM_VARIABLES) for which in (~unknown, outside))
    wrong = np.flatnonzero(strange > np.maximum(1.0, OUT_OF_RANGE_TOLERANCE * present))
    if len(wrong):
        variable, number = VARIABLES[wrong[0]], wrong[0]
        raise SchemaError(
            f"{source}: parameter {variable.name!r}: expected values from {variable.low:g} to {variable.high:g} {variable.unit}, got {strange[number]} of "
            f"{present[number]} outside",
            "check the unit",
        )
    kept = ~unknown & ~outside
    notes = {**stays.notes, "values_unknown": int(unknown.sum()), "values_implausible": int(outside.sum())}
    return _with(stays, kept, notes)


def _with(stays: IcuStays, kept: NDArray[np.bool_], notes: Mapping[str, int]) -> IcuStays:
    return IcuStays(
        ids=stays.ids, described=stays.described, stay=stays.stay[kept], variable=stays.variable[kept], minute=stays.minute[kept],
        value=stays.value[kept], died=stays.died, days=stays.days, notes=notes, synthetic=stays.synthetic,
    )  # fmt: skip
