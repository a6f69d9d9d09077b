"""The first 48 hours in intensive care as series and as summaries: files of "Time,Parameter,Value", as of the PhysioNet/CinC Challenge 2012.

Silva, Moody, Scott, Celi, Mark 2012, "Predicting in-hospital mortality of ICU patients". One text file a stay, of ICU types 1 to 4, and one table
of outcomes. Series carry a value, whether it was measured, and the time since it last was (Che et al. 2018, the inputs of their GRU-simple).

Policies, the same everywhere: a value outside its plausible range counts as not measured; -1 is unknown; a value is scaled by its usual range,
which is clinical knowledge and no statistic of a data set; a record that is not of the declared form is left out and counted, up to `tolerance`.

Legend: P stays (a stay is a patient), E measurements, T steps, V variables, G descriptors.
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
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from shared.cohort import Cohort
from shared.config import Settings, nearest, validate
from shared.errors import DataAccessError, DataError, DataMissingError, SchemaError
from shared.models import make_private
from shared.schema import OUT_OF_RANGE_TOLERANCE, Column, EncodedColumn, TensorSchema, encode_column
from shared.seeding import generator
from shared.study import Real
from shared.subgroups import Subgroup
from shared.tasks.tabular import read_csv

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

SOURCE = "PhysioNet/CinC Challenge 2012, set A (Silva et al. 2012), ODC-By 1.0"
HOURS = 48
MOST_MINUTES = 60 * HOURS
MOST_RECORD_BYTES = 1_000_000  # the largest of 4,000 is 24,000
MOST_EXPANSION = 50  # times the size of an archive that it may unpack to; text of this kind takes 4 to 6
FAR_OUT = 3.0  # times half the usual range from its middle: where a scaled value is cut
HEADER = "Time,Parameter,Value"
RECORD_NAME = re.compile(r"(\d{1,18})\.txt")
CLOCK = re.compile(r"(\d{2}):([0-5]\d)")
UNITS = {"1": "coronary", "2": "cardiac-surgery", "3": "medical", "4": "surgical"}  # ICUType: CCU, CSRU, MICU, SICU
SITES = tuple(UNITS.values())
ID, DEATH, STAY = "RecordID", "In-hospital_death", "Length_of_stay"  # columns of the outcomes
UNKNOWN = "-1"
REMEDY_FOLDER = "give a folder with one Outcomes*.txt, and beside it one .tar.gz or the records themselves, <RecordID>.txt"
SUBGROUPS = (Subgroup(attribute="sex", names={"0": "female", "1": "male"}), Subgroup(attribute="age", edges=(50, 65, 80)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A measured quantity: what can be (`low` to `high`), and what is usual in intensive care, which becomes -1 to 1.

    Attributes:
        total: what is measured in a step is added up, an hour's worth (a flow), instead of averaged.
    """

    name: str
    unit: str
    low: float
    high: float
    usual: tuple[float, float]
    scale: Literal["linear", "log"] = "linear"
    total: bool = False

    def scaled(self, values: NDArray[np.float64]) -> FloatArray:
        """Values in [-FAR_OUT, FAR_OUT]; the usual range is [-1, 1]."""
        low, high = self.usual
        if self.scale == "log":
            low, high, values = math.log(low), math.log(high), np.log(np.maximum(values, self.low))
        return np.asarray(np.clip(2 * (values - low) / (high - low) - 1, -FAR_OUT, FAR_OUT), dtype=np.float32)


def _of(
    name: str, unit: str, plausible: tuple[float, float], usual: tuple[float, float], scale: Literal["linear", "log"] = "linear", *, total: bool = False
) -> Variable:  # fmt: skip
    return Variable(name=name, unit=unit, low=plausible[0], high=plausible[1], usual=usual, scale=scale, total=total)


VARIABLES = (
    _of("ALP", "U/L", (5, 5000), (40, 300), "log"),
    _of("ALT", "U/L", (1, 30000), (10, 400), "log"),
    _of("AST", "U/L", (1, 30000), (15, 500), "log"),
    _of("Albumin", "g/dL", (0.5, 7), (2, 4.2)),
    _of("BUN", "mg/dL", (1, 300), (8, 60), "log"),
    _of("Bilirubin", "mg/dL", (0.05, 90), (0.3, 5), "log"),
    _of("Cholesterol", "mg/dL", (10, 800), (90, 240)),
    _of("Creatinine", "mg/dL", (0.05, 40), (0.5, 3.5), "log"),
    _of("DiasABP", "mmHg", (10, 220), (40, 90)),
    _of("FiO2", "fraction", (0.2, 1), (0.3, 0.9)),
    _of("GCS", "points", (3, 15), (5, 15)),
    _of("Glucose", "mg/dL", (10, 2000), (80, 250), "log"),
    _of("HCO3", "mmol/L", (2, 70), (16, 32)),
    _of("HCT", "%", (5, 75), (23, 43)),
    _of("HR", "beats/min", (10, 320), (55, 120)),
    _of("K", "mmol/L", (1, 15), (3.2, 5.4)),
    _of("Lactate", "mmol/L", (0.1, 50), (0.8, 6), "log"),
    _of("MAP", "mmHg", (15, 320), (55, 110)),
    _of("MechVent", "0 or 1", (0, 1), (0, 1)),
    _of("Mg", "mg/dL", (0.3, 15), (1.5, 2.7)),
    _of("NIDiasABP", "mmHg", (10, 220), (35, 90)),
    _of("NIMAP", "mmHg", (15, 320), (55, 110)),
    _of("NISysABP", "mmHg", (25, 330), (85, 165)),
    _of("Na", "mmol/L", (90, 200), (130, 148)),
    _of("PaCO2", "mmHg", (5, 200), (28, 58)),
    _of("PaO2", "mmHg", (10, 700), (60, 350), "log"),
    _of("Platelets", "1000/uL", (1, 2500), (60, 450), "log"),
    _of("RespRate", "breaths/min", (2, 100), (10, 32)),
    _of("SaO2", "%", (20, 100), (90, 100)),
    _of("SysABP", "mmHg", (25, 330), (85, 165)),
    _of("Temp", "degrees C", (25, 45), (35.5, 38.5)),
    _of("TroponinI", "ug/L", (0.01, 200), (0.3, 30), "log"),
    _of("TroponinT", "ug/L", (0.005, 100), (0.02, 8), "log"),
    _of("Urine", "mL/h", (0, 12000), (0, 200), total=True),
    _of("WBC", "1000/uL", (0.05, 500), (4, 25), "log"),
    _of("Weight", "kg", (20, 350), (50, 120)),
    _of("pH", "", (6.5, 8), (7.2, 7.5)),
)
NUM_VARIABLES = len(VARIABLES)
_INDEX = {variable.name: index for index, variable in enumerate(VARIABLES)}

DESCRIPTORS = (
    Column(name="Age", type="number", unit="years", low=15, high=95, missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="Gender", type="binary", missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="Height", type="number", unit="cm", low=130, high=210, missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="ICUType", type="category", categories=tuple(UNITS)),
)
DESCRIPTOR_NAMES = tuple(name for column in DESCRIPTORS for name in column.feature_names)
_DESCRIBED = {column.name for column in DESCRIPTORS}
DESCRIPTOR_SCHEMA = TensorSchema(name="descriptors", shape=(len(DESCRIPTOR_NAMES),), unit=", ".join(DESCRIPTOR_NAMES), low=-1, high=1)


def series_schema(num_steps: int) -> tuple[TensorSchema, TensorSchema]:
    """What `series_inputs` gives: V values, V times V masks and V gaps a step; and the descriptors."""
    unit = f"value, measured (0 or 1), time since measured / {HOURS} h; of each of {', '.join(variable.name for variable in VARIABLES)}"
    return TensorSchema(name="series", shape=(num_steps, 3 * NUM_VARIABLES), unit=unit, low=-FAR_OUT, high=FAR_OUT), DESCRIPTOR_SCHEMA


class IcuOptions(Settings):
    """Options of the loaders of these tasks."""

    tolerance: Real = Field(default=0.05, ge=0, le=0.5, description="share of the records that may be left out because they cannot be read")


@dataclass(frozen=True, slots=True, kw_only=True)
class IcuStays:
    """Measurements of the first 48 hours of stays, and how the stays ended.

    Attributes:
        described: column of `DESCRIPTORS` -> text as read, `(P,)`.
        stay, variable, minute, value: `(E,)` each: index of the stay, index in `VARIABLES`, minutes since admission, plausible value.
        died: `(P,)` float32, 1 where the patient died in hospital.
        days: `(P,)` float32, days in hospital; NaN where not known.
        notes: in counts, what was left out.
    """

    ids: tuple[str, ...] = field(repr=False)
    described: Mapping[str, NDArray[np.str_]] = field(repr=False)
    stay: IntArray = field(repr=False)
    variable: IntArray = field(repr=False)
    minute: IntArray = field(repr=False)
    value: NDArray[np.float64] = field(repr=False)
    died: FloatArray = field(repr=False)
    days: FloatArray = field(repr=False)
    notes: Mapping[str, int] = field(default_factory=dict)
    synthetic: bool = False


# From files to measurements -------------------------------------------------------------------------------------------------------


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
        index = _INDEX.get(name)
        if index is not None:
            variables.append(index)
            minutes.append(clock(time))
            values.append(value)
        elif name == ID or name in _DESCRIBED:
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
            described={name: np.array([record.described.get(name, UNKNOWN) or UNKNOWN for record in records]) for name in sorted(_DESCRIBED)},
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


# From measurements to inputs ------------------------------------------------------------------------------------------------------


def descriptors(stays: IcuStays) -> FloatArray:
    """`(P, G)` in [-1, 1]: age, sex, height and type of unit as `DESCRIPTORS` declares; an age or height outside is cut to the range.

    Raises:
        SchemaError: more than one in twenty are outside: the unit is another.
    """
    return np.concatenate([part.features for part in _encoded_descriptors(stays)], axis=1).astype(np.float32)


def _encoded_descriptors(stays: IcuStays) -> list[EncodedColumn]:
    import pandas as pd

    return [encode_column(pd.Series(stays.described[column.name]), column, source="records") for column in DESCRIPTORS]


def binned(stays: IcuStays, hours_per_step: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Means (a flow: the sum, an hour's worth) and counts of measurements in each step, `(P, T, V)` each; a mean of none is 0."""
    num_steps, shape = HOURS // hours_per_step, (len(stays.ids), HOURS // hours_per_step, NUM_VARIABLES)
    step = np.minimum(stays.minute // (60 * hours_per_step), num_steps - 1)
    cell = (stays.stay * num_steps + step) * NUM_VARIABLES + stays.variable
    size = math.prod(shape)
    counts = np.bincount(cell, minlength=size).reshape(shape)
    sums = np.bincount(cell, weights=stays.value, minlength=size).reshape(shape)
    totals = np.array([variable.total for variable in VARIABLES])
    return sums / np.where(totals, hours_per_step, np.maximum(counts, 1)), counts


def series_inputs(stays: IcuStays, hours_per_step: int) -> tuple[FloatArray, FloatArray]:
    """The series `(P, T, 3 V)` and the descriptors `(P, G)`.

    A step has V values (the last one known, scaled; 0 before there is any), V marks of what was measured in it, and V times since the last
    measurement, in parts of 48 hours (1 before there is any).
    """
    values, counts = binned(stays, hours_per_step)
    num_steps = values.shape[1]
    scaled = np.stack([variable.scaled(values[:, :, index]) for index, variable in enumerate(VARIABLES)], axis=2)
    measured = counts > 0
    steps = np.arange(num_steps)[None, :, None]
    last = np.maximum.accumulate(np.where(measured, steps, -1), axis=1)  # step of the last measurement so far
    carried = np.where(last >= 0, np.take_along_axis(scaled, np.maximum(last, 0), axis=1), 0.0)
    gap = np.where(last >= 0, (steps - last) / num_steps, 1.0)
    return np.concatenate([carried, measured, gap], axis=2, dtype=np.float32, casting="unsafe"), descriptors(stays)


class RecurrentModel(nn.Module):
    """A recurrent layer over the series; its mean state, its last one and the descriptors go to one linear output. `(N, T, 3V), (N, G) -> (N, 1)`."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], hidden: int) -> None:
        super().__init__()
        self.recurrent = make_private(cell(3 * NUM_VARIABLES, hidden, batch_first=True))
        self.head = nn.Linear(2 * hidden + len(DESCRIPTOR_NAMES), 1)

    def forward(self, series: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
        """The output for each record, `(N, 1)`."""
        states, _ = self.recurrent(series)
        output: torch.Tensor = self.head(torch.cat([states.mean(dim=1), states[:, -1], described], dim=1))
        return output


def cohort_of(stays: IcuStays, inputs: tuple[NDArray[np.generic], ...], labels: NDArray[np.generic]) -> Cohort:
    """The cohort of all stays: a record a patient; site, sex and age as attributes."""
    num_clipped = sum(part.num_clipped for part in _encoded_descriptors(stays))
    return Cohort(
        inputs=inputs,
        labels=labels,
        patient_of_record=np.arange(len(stays.ids), dtype=np.int64),
        patient_ids=stays.ids,
        attributes={
            "site": np.array([UNITS[kind] for kind in stays.described["ICUType"].tolist()]),
            "sex": np.where(stays.described["Gender"] == UNKNOWN, "", stays.described["Gender"]),
            "age": np.where(stays.described["Age"] == UNKNOWN, "", stays.described["Age"]),
        },
        notes={**stays.notes, "values_clipped": num_clipped},
        synthetic=stays.synthetic,
    )


# Patients who never were ----------------------------------------------------------------------------------------------------------

SEVERITY = {  # by how many half usual ranges a variable moves with one standard deviation of severity
    "BUN": 0.5, "Creatinine": 0.4, "GCS": -0.6, "HCO3": -0.4, "HR": 0.35, "Lactate": 0.5, "SysABP": -0.35, "NISysABP": -0.35, "MAP": -0.3, "Urine": -0.4,
    "PaO2": -0.2, "RespRate": 0.3, "Albumin": -0.3, "Platelets": -0.25, "pH": -0.35, "Temp": -0.1, "WBC": 0.2, "Bilirubin": 0.3,
}  # fmt: skip
OFTEN = ("HR", "SysABP", "DiasABP", "MAP", "NISysABP", "NIDiasABP", "NIMAP", "Urine", "Temp", "RespRate", "GCS", "Weight")  # charted every 3 hours
MEASURED_OFTEN, MEASURED_SELDOM = 0.7, 0.12  # chance of a measurement in three hours
SHARE_OF_UNITS = (0.15, 0.22, 0.37, 0.26)
SHIFT_OF_UNITS = (0.1, -0.5, 0.4, 0.0)  # of severity
SHIFT_OF_DEVICES = 0.15  # standard deviation over units, in half usual ranges
BASE_LOGIT, LOGIT_OF_SEVERITY = -2.2, 1.6
BASE_LOG_DAYS, LOG_DAYS_OF_SEVERITY, LOG_DAYS_NOISE = 2.2, 0.35, 0.45


def synthetic_stays(num_patients: int, seed: int) -> IcuStays:
    """Synthetic stays of four units: a hidden severity that drifts moves the variables, decides how often they are measured, and how the stay ends."""
    rng = generator(seed, "synthetic", "icu series")
    unit = rng.choice(4, size=num_patients, p=SHARE_OF_UNITS)
    unit[: min(4, num_patients)] = np.arange(min(4, num_patients))
    severity = rng.normal(size=num_patients) + np.array(SHIFT_OF_UNITS)[unit]
    stay, variable, minute = _when_measured(severity, rng)
    shift = generator(0, "devices", "icu series").normal(scale=SHIFT_OF_DEVICES, size=(4, NUM_VARIABLES))
    effect = np.array([SEVERITY.get(entry.name, 0.0) for entry in VARIABLES])
    drift = 1 + 0.3 * rng.normal(size=num_patients)[stay] * (minute / MOST_MINUTES)
    scaled = effect[variable] * severity[stay] * drift + shift[unit[stay], variable]
    scaled += 0.4 * rng.normal(size=(num_patients, NUM_VARIABLES))[stay, variable] + 0.3 * rng.normal(size=len(stay))
    age = np.clip(np.round(rng.normal(64, 16, size=num_patients) + 3 * severity), 18, 90).astype(int)
    chance = 1 / (1 + np.exp(-(BASE_LOGIT + LOGIT_OF_SEVERITY * severity)))
    days = np.exp(BASE_LOG_DAYS + LOG_DAYS_OF_SEVERITY * severity + LOG_DAYS_NOISE * rng.normal(size=num_patients))
    died = (rng.random(num_patients) < chance).astype(np.float32)
    if num_patients >= 2 and died.min() == died.max():
        died[np.argmax(severity)], died[np.argmin(severity)] = 1, 0
    stays = IcuStays(
        ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        described={
            "Age": age.astype(str),
            "Gender": rng.integers(0, 2, size=num_patients).astype(str),
            "Height": np.where(rng.random(num_patients) < 0.45, UNKNOWN, np.round(rng.normal(170, 10, size=num_patients)).astype(int).astype(str)),
            "ICUType": (unit + 1).astype(str),
        },
        stay=stay, variable=variable, minute=minute, value=_unscaled(scaled, variable),
        died=died, days=np.maximum(2, np.round(days)).astype(np.float32), synthetic=True,
    )  # fmt: skip
    return plausible(stays, source="synthetic")


def _when_measured(severity: NDArray[np.float64], rng: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
    """Stay, variable and minute of each measurement: vital signs often, laboratory values the more the sicker."""
    often = np.array([entry.name in OFTEN for entry in VARIABLES])
    never = rng.random((len(severity), NUM_VARIABLES)) < np.where(often, 0.15, 0.35)  # not every patient has every line or test
    chance = np.where(often, MEASURED_OFTEN, MEASURED_SELDOM * np.exp(0.2 * severity)[:, None])
    happens = rng.random((len(severity), 16, NUM_VARIABLES)) < np.where(never, 0.0, np.minimum(chance, 1.0))[:, None, :]
    stay, step, variable = np.nonzero(happens)
    return stay, variable, step * 180 + rng.integers(0, 180, size=len(stay))


def _unscaled(scaled: NDArray[np.float64], variable: IntArray) -> NDArray[np.float64]:
    """Values whose scaled form is `scaled`, cut to what can be."""
    logs = np.array([entry.scale == "log" for entry in VARIABLES])[variable]
    ends = np.array([entry.usual for entry in VARIABLES])
    with np.errstate(divide="ignore"):
        low, high = (np.where(logs, np.log(ends[variable, end]), ends[variable, end]) for end in (0, 1))
    values = low + (scaled + 1) / 2 * (high - low)
    values = np.where(logs, np.exp(np.minimum(values, 20)), values)
    hours = np.where(np.array([entry.total for entry in VARIABLES])[variable], 3.0, 1.0)  # a flow is charted as what came in three hours
    limits = np.array([(entry.low, entry.high) for entry in VARIABLES])
    return np.asarray(np.clip(values * hours, limits[variable, 0], limits[variable, 1]))
