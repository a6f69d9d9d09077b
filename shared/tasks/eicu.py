"""The eICU Collaborative Research Database as its publisher ships it: one CSV table a file, gzipped or not, in one folder.

Pollard, Johnson, Raffa, Celi, Mark, Badawi 2018, Scientific Data 5:180178. A patient (`uniquepid`) has one or more stays in an intensive care
unit (`patientunitstayid`); the tables of a stay give times as offsets in minutes from the admission to the unit. Here are the parts that every
task on these tables needs: reading a table, and the stays with patient, site and outcome.

Nothing that the publisher derives from an outcome, or that is known at discharge alone, is read here but for the outcome itself and the time
of leaving the hospital, which say who is in the cohort; neither is a feature.
"""

import gzip
import io
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared.config import Real, Settings, nearest, validate
from shared.errors import DataAccessError, DataError, DataMissingError, SchemaError
from shared.schema import MOST_NUMBER_LETTERS

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

REGIONS = ("Midwest", "South", "West", "Northeast")
OUTCOMES = ("Alive", "Expired")
MOST_EXPANSION = 50  # times its size that a gzipped table may unpack to; the publisher's unpack to 4 to 14 times
SMALL_TABLE = 2**20  # bytes; a table may always unpack to so much
OLDEST = "90"  # stands for "> 89", as the publisher writes ages that would identify
SMALLEST_SITE = 4  # patients; fewer cannot be divided into patients to train on and to test on
REMEDY_DOWNLOAD = "get the file again, and compare its SHA-256 with the publisher's SHA256SUMS.txt"
REMEDY_FOLDER = "give the folder that holds the publisher's tables with --data"

PATIENT_COLUMNS = ("patientunitstayid", "uniquepid", "hospitalid", "gender", "age", "hospitaldischargestatus", "hospitaldischargeoffset")


class LoadOptions(Settings):
    """Options of the loader, as in a site.toml."""

    sites: Literal["region", "hospital"] = Field(default="region", description="what counts as a site: one of four regions, or each hospital")
    tolerance: Real = Field(default=0.05, ge=0, lt=1, description="share of a table's rows that may be bad; they are skipped and counted")


def load_options(options: Mapping[str, object], task: str, *, sites: Literal["region", "hospital"]) -> LoadOptions:
    """The loader's options; `sites` is what holds where they do not say.

    Raises:
        ConfigurationError: an unknown option or value.
    """
    return validate(LoadOptions, {"sites": sites, **options}, f"task {task}: options of its loader")


# A table -------------------------------------------------------------------------------------------------------------------------


class _BoundedUnpacking(io.RawIOBase):
    """Unpacks gzip, and refuses to go on past `limit` bytes, whatever the file says about its size."""

    def __init__(self, packed: BinaryIO, *, limit: int, name: str) -> None:
        self._stream, self._left, self._name = gzip.GzipFile(fileobj=packed), limit, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # io passes what a memoryview takes
        part = self._stream.read(len(view))
        self._left -= len(part)
        if self._left < 0:
            raise _too_large(self._name)
        view[: len(part)] = part
        return len(part)


def _too_large(name: str) -> SchemaError:
    return SchemaError(
        f"{name}: expected gzip that unpacks to at most {MOST_EXPANSION} times its size, got one that would be larger, or is cut short or damaged",
        REMEDY_DOWNLOAD,
    )


def find_table(folder: Path, name: str) -> Path:
    """`<name>.csv.gz` or `<name>.csv` in `folder`, whatever their case.

    Raises:
        DataMissingError: the folder or the table is not there.
        DataAccessError: the folder may not be read.
    """
    try:
        present = {file.name.lower(): file for file in sorted(folder.iterdir())}
    except PermissionError:
        raise DataAccessError(f"{folder}: this user may not read the folder", "change its permissions") from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataMissingError(f"{folder}: expected a folder with eICU tables, found none", REMEDY_FOLDER) from None
    for suffix in (".csv.gz", ".csv"):
        if (found := present.get(f"{name}{suffix}".lower())) is not None:
            return found
    raise DataMissingError(f"{folder}: expected {name}.csv.gz or {name}.csv, found neither", REMEDY_FOLDER)


def read_table(folder: Path, name: str, columns: Sequence[str]) -> "pd.DataFrame":
    """The named columns of a table as text, `(rows, columns)`, empty where a field is empty; all other columns are never kept.

    Raises:
        DataMissingError: the table is not there, empty, or has no rows.
        DataAccessError: it may not be read.
        SchemaError: a column is missing, it is cut short or not gzip, no UTF-8, no regular CSV, or unpacks to far more than its size.
    """
    import pandas as pd

    path = find_table(folder, name)
    try:
        with warnings.catch_warnings(), open(path, "rb") as file, _text_of(file, path) as text:
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = _parse(text, columns, path.name)
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read it", "change its permissions") from None
    except pd.errors.EmptyDataError:
        raise DataMissingError(f"{path}: expected a table, got an empty file", REMEDY_DOWNLOAD) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise SchemaError(f"{path}: expected a whole gzip file, got one that is cut short or damaged", REMEDY_DOWNLOAD) from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: expected UTF-8 text, got other bytes", REMEDY_DOWNLOAD) from None
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        raise SchemaError(
            f"{path}: expected the same number of fields in every line, got a line with more, or a quote left open", REMEDY_DOWNLOAD
        ) from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({type(error).__name__})", "check the file system") from None
    if len(frame) == 0:
        raise DataMissingError(f"{path}: expected at least one row, got none", REMEDY_DOWNLOAD)
    return frame


def _text_of(file: BinaryIO, path: Path) -> io.TextIOWrapper:
    if not path.name.lower().endswith(".gz"):
        return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataMissingError(f"{path}: expected a table, got an empty file", REMEDY_DOWNLOAD)
    limit = max(SMALL_TABLE, MOST_EXPANSION * size)
    if size >= 18:  # the last four bytes of gzip: its unpacked size; a lie is found out while unpacking
        file.seek(-4, os.SEEK_END)
        if int.from_bytes(file.read(4), "little") > limit:
            raise _too_large(path.name)
        file.seek(0)
    return io.TextIOWrapper(io.BufferedReader(_BoundedUnpacking(file, limit=limit, name=path.name)), encoding="utf-8-sig", newline="")


def _parse(text: io.TextIOWrapper, columns: Sequence[str], source: str) -> "pd.DataFrame":
    import pandas as pd

    chunks = []
    with pd.read_csv(text, dtype=str, keep_default_na=False, index_col=False, chunksize=100_000) as parts:
        for part in parts:
            part.columns = [str(column).strip().lower() for column in part.columns]
            _require(list(part.columns), columns, source)
            chunks.append(part[list(columns)].fillna("").apply(lambda values: values.str.strip()))
    return pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame(columns=list(columns), dtype=str)


def _require(present: Sequence[str], columns: Sequence[str], source: str) -> None:
    absent = [name for name in columns if name not in present]
    if absent:
        spare = [name for name in present if name not in columns]
        hints = ", ".join(f"{name!r}{nearest(name, spare)}" for name in absent)
        raise SchemaError(f"{source}: expected column{'s' if len(absent) > 1 else ''} {hints}, not found", REMEDY_DOWNLOAD)


def without_bad_rows(frame: "pd.DataFrame", bad: NDArray[np.bool_], *, tolerance: float, source: str, what: str) -> "pd.DataFrame":
    """The rows that are not `bad` `(rows,)`, where no more than `tolerance` of them are.

    Args:
        what: what makes a row bad, for the message.

    Raises:
        SchemaError: more are.
    """
    if bad.sum() > tolerance * len(frame):
        raise SchemaError(
            f"{source}: expected at most {tolerance:.0%} of {len(frame)} rows to be bad ({what}), got {int(bad.sum())}",
            "correct the table, or raise the loader's option 'tolerance'",
        )
    return frame[~bad].reset_index(drop=True)


def numbers_of(values: "pd.Series[str]") -> NDArray[np.float64]:
    """`(rows,)`: numbers, NaN where a field is empty; infinity where it holds anything but a finite number, for the caller to refuse."""
    import pandas as pd

    short = (values != "") & (values.str.len() <= MOST_NUMBER_LETTERS)
    numbers = np.array(pd.to_numeric(values.where(short, "nan"), errors="coerce"), dtype=np.float64)
    return np.where((values != "").to_numpy() & ~np.isfinite(numbers), np.inf, numbers)


# Stays ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """Stays with a known outcome, a row each, and what was left out in counts.

    `frame` has the columns of `PATIENT_COLUMNS`, and `site`, `hospital`, `region`, each of the patient's first stay in the table. Ages are
    numbers as text, `OLDEST` for "> 89", empty where unknown.
    """

    frame: "pd.DataFrame" = field(repr=False)
    notes: dict[str, int]


def read_stays(folder: Path, options: LoadOptions, *, more_columns: Sequence[str] = ()) -> Stays:
    """The stays of the tables `patient` and `hospital`.

    Left out, each with a count: stays whose outcome is blank; with regions as sites, stays in hospitals of no stated region; stays of a patient
    at another site than that of the first stay, for no hospital holds them both; bad rows (a stay's number twice or missing, no patient, an
    outcome outside its set, a time that is no number), up to the tolerance.

    Args:
        more_columns: of `patient`, to be kept too; never one that is known only at discharge.

    Raises:
        DataError: see `read_table` and `without_bad_rows`; and where no stay is left.
    """
    frame = read_table(folder, "patient", (*PATIENT_COLUMNS, *more_columns))
    status, offset = frame["hospitaldischargestatus"], numbers_of(frame["hospitaldischargeoffset"])
    known = np.isin(status, OUTCOMES)
    bad = frame["patientunitstayid"].duplicated() | (frame["patientunitstayid"] == "") | (frame["uniquepid"] == "") | (frame["hospitalid"] == "")
    bad |= (~known & (status != "")) | np.isinf(offset) | (known & np.isnan(offset))
    num_rows, num_blank = len(frame), int((status[~bad] == "").sum())
    frame = without_bad_rows(
        frame, bad.to_numpy(), tolerance=options.tolerance, source="patient", what="a stay twice, no patient, hospital or time, or another outcome"
    )
    notes = {"records_bad": num_rows - len(frame), "stays_without_outcome": num_blank}
    frame = frame[frame["hospitaldischargestatus"] != ""].reset_index(drop=True)
    frame["age"] = frame["age"].replace(r"^>\s*89$", OLDEST, regex=True)
    frame = _with_sites(frame, _region_of_hospital(folder, options), options, notes)
    if len(frame) == 0:
        raise DataMissingError(f"{folder}: no stay is left: each lacks an outcome or a region", "check that these are eICU's tables")
    return Stays(frame=frame, notes=notes)


def _region_of_hospital(folder: Path, options: LoadOptions) -> dict[str, str]:
    hospitals = read_table(folder, "hospital", ("hospitalid", "region"))
    bad = (hospitals["hospitalid"].duplicated() | ~hospitals["region"].isin(["", *REGIONS])).to_numpy()
    hospitals = without_bad_rows(
        hospitals, bad, tolerance=options.tolerance, source="hospital", what=f"a hospital twice, or no region of {', '.join(REGIONS)}"
    )
    return dict(zip(hospitals["hospitalid"], hospitals["region"], strict=True))


def _with_sites(frame: "pd.DataFrame", regions: Mapping[str, str], options: LoadOptions, notes: dict[str, int]) -> "pd.DataFrame":
    region = frame["hospitalid"].map(regions).fillna("")
    frame = frame.assign(hospital="hospital-" + frame["hospitalid"], region=region.where(region != "", "not stated"))
    if options.sites == "region":
        notes["stays_without_region"] = int((region == "").sum())
        frame = frame[region != ""].reset_index(drop=True)
    first = frame.groupby("uniquepid", sort=False)[["hospital", "region"]].transform("first")
    here = frame[options.sites] == first[options.sites]
    notes["stays_at_another_site"] = int((~here).sum())
    frame = frame.assign(hospital=first["hospital"], region=first["region"], site=first[options.sites])
    return frame[here].reset_index(drop=True)


def without_small_sites(frame: "pd.DataFrame", notes: dict[str, int]) -> "pd.DataFrame":
    """The stays at sites of at least `SMALLEST_SITE` patients; `notes` counts the others. Asked for last, when the cohort is known."""
    patients = frame.groupby("site")["uniquepid"].transform("nunique")
    small = patients < SMALLEST_SITE
    notes["stays_at_small_sites"] = int(small.sum())
    return frame[~small].reset_index(drop=True)
