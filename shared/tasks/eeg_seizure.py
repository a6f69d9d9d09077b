"""Seizure detection: does a window of four seconds of EEG show a seizure.

Model: a shallow convolutional network (ShallowConvNet of Schirrmeister et al. 2017, Human Brain Mapping 38:5391): filters over time and channels, whose
outputs are squared, averaged and passed through a logarithm, which is the power in bands that are learnt; with GroupNorm for BatchNorm. A patient has
several windows, of both kinds or of one; the unit of privacy is the patient.

A window is treated by itself and by public numbers: channels in one order, each without its mean, at one sampling rate, cut to a declared range.

Legend: N records (windows), C channels, T samples of a window, L samples of a recording.
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.config import nearest
from shared.errors import DataMissingError, SchemaError
from shared.metrics import BINARY_METRICS
from shared.schema import MISSING_MARKS, TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import (
    BoolArray,
    TextArray,
    attribute_of,
    data_file,
    in_set,
    path_below,
    patients_of,
    read_listing,
    read_npz,
    reading,
    refuse_too_many,
    text_of,
    tolerance_of,
)
from shared.tasks.tabular import logistic_loss

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

Signals = NDArray[np.float32]

NAME = "eeg-seizure"
CHANNELS = ("Fp1", "Fp2", "C3", "C4", "T7", "T8", "O1", "O2")  # of the 10-20 system, referential: what a montage for intensive care has
OLDER_NAMES = {"T3": "T7", "T4": "T8"}
RATE = 128  # samples a second
RATES = (128, 200, 250, 256, 400, 500, 512, 1000, 1024)  # that are brought to it
SECONDS = 4
LENGTH = RATE * SECONDS
TIME = "time"  # the column of a recording: seconds
LISTING = "windows.csv"
MEANINGS = {"1": 1.0, "seizure": 1.0, "0": 0.0, "background": 0.0}
UNIT_MICROVOLT = 100.0  # of the model's input
MOST_MICROVOLT = 500.0  # from a channel's mean; what is more is an artefact, and cut
LEAST_MICROVOLT = 0.5  # mean over half of the windows, at least: less is no recording, or in another unit
MOST_CUT = 0.05  # share of samples that may be cut before another unit is suspected
MOST_OFF = 2  # channels of a window without a recording; they are 0
LEAST_POWER = 1e-3  # of the 1 that a filter's output has on average: keeps the logarithm's slope bounded
CLOCK_SLACK = 5e-4  # seconds: recordings' times are rounded to milliseconds
ELECTRODES = ((-0.3, 0.9), (0.3, 0.9), (-0.5, 0.0), (0.5, 0.0), (-0.9, 0.0), (0.9, 0.0), (-0.3, -0.9), (0.3, -0.9))  # seen from above, nose up
SYNTHETIC_SITES = {
    "synthetic-1": (1.0, 2.0, 1.0, 50.0),
    "synthetic-2": (0.8, 4.0, 4.0, 50.0),
    "synthetic-3": (1.25, 3.0, 2.0, 60.0),
    "synthetic-4": (1.0, 6.0, 8.0, 60.0),
}  # gain; noise and line hum in microvolt; line frequency in Hz
SYNTHETIC_ILL_RATE = 0.5  # of patients in whose windows there are seizures
SYNTHETIC_SEIZURE_RATE = 0.5  # of their windows
SYNTHETIC_DROWSY_RATE = 0.2  # of windows without a seizure
SYNTHETIC_MUSCLE_RATE = 0.3  # of windows
SYNTHETIC_OFF_RATE = 0.02  # of channels

SCHEMA = (
    TensorSchema(
        name="signal",
        shape=(len(CHANNELS), LENGTH),
        unit=f"{UNIT_MICROVOLT:g} microvolt",
        low=-MOST_MICROVOLT / UNIT_MICROVOLT,
        high=MOST_MICROVOLT / UNIT_MICROVOLT,
    ),
)


# Data ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows `(N, C, T)` in `UNIT_MICROVOLT`, which are usable `(N,)`, their channels without a recording `(N,)`, and samples that were cut `(N,)`."""

    signals: Signals = field(repr=False)
    usable: BoolArray = field(repr=False)
    num_off: NDArray[np.int64] = field(repr=False)
    num_cut: NDArray[np.int64] = field(repr=False)
    first_problem: str = ""


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A folder with `windows.csv` (columns `file`, `start_s`, `label`, `patient`, and there may be `site`) and recordings as CSV; or an NPZ.

    A recording has the column `time` in seconds, and one in microvolt for each channel, named as in the 10-20 system; further columns are not read.
    An NPZ has `x` (windows, channels, samples) in microvolt, `y`, `patient`, `channels` (names), `sampling_rate` in Hz, and there may be `site`.
    A label is 1 or seizure, or 0 or background. Channels may be more, and in another order. A channel with a gap in a window is off there.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many windows are.
    """
    tolerance = tolerance_of(options, NAME)
    with reading(str(path)):
        listed = path is not None and (path / LISTING).is_file()
    file = path / LISTING if path is not None and listed else data_file(path, NAME)
    if file.suffix.lower() == ".npz":
        return _of_npz(file, tolerance=tolerance)
    return _of_recordings(file, tolerance=tolerance)


def places_of(names: Sequence[str], *, source: str) -> list[int]:
    """Where each of `CHANNELS` stands among the names of a recording's channels, `(C,)`.

    Capitals, "EEG " before and "-REF" behind a name, as exports of EDF have them, do not matter; T3 and T4 are T7 and T8.

    Raises:
        SchemaError: a channel is missing, or there twice: it is another montage.
    """
    known = [_plain(name) for name in names]
    for channel in CHANNELS:
        if known.count(channel.upper()) != 1:
            raise SchemaError(
                f"{source}: expected one channel {channel!r}{nearest(channel, list(names))}, found {known.count(channel.upper())}",
                f"export the referential montage with {', '.join(CHANNELS)}",
            )
    return [known.index(channel.upper()) for channel in CHANNELS]


def _plain(name: str) -> str:
    upper = name.strip().upper().removeprefix("EEG ").removesuffix("-REF").strip()
    return OLDER_NAMES.get(upper, upper)


def windows_of(microvolt: NDArray[np.floating], rate: int) -> Windows:
    """Windows `(N, C, rate x SECONDS)` as the model takes them: each channel without its mean, at `RATE`, cut to the range.

    A channel with a value that is not finite is off in that window: 0 throughout. A window with more than `MOST_OFF` such is unusable.
    """
    from scipy.signal import resample_poly

    off = ~np.isfinite(microvolt).all(axis=2)
    signals = np.where(off[:, :, None], microvolt.dtype.type(0), microvolt)
    signals -= signals.mean(axis=2, keepdims=True)
    if rate != RATE:
        signals = resample_poly(signals, RATE, rate, axis=2)
    num_cut = (np.abs(signals) > MOST_MICROVOLT).sum(axis=(1, 2))
    np.clip(signals, -MOST_MICROVOLT, MOST_MICROVOLT, out=signals)
    signals /= UNIT_MICROVOLT
    usable = off.sum(axis=1) <= MOST_OFF
    return Windows(
        signals=signals.astype(np.float32, copy=False),
        usable=usable,
        num_off=off.sum(axis=1),
        num_cut=num_cut,
        first_problem="" if usable.all() else f"more than {MOST_OFF} channels with gaps",
    )


def _of_npz(path: Path, *, tolerance: float) -> Cohort:
    source = path.name
    arrays = read_npz(path, ["x", "y", "patient", "channels", "sampling_rate"], optional=["site"])
    x, y = arrays["x"], arrays["y"]
    rate = _declared_rate(arrays["sampling_rate"], source)
    if x.ndim != 3 or x.shape[2] != rate * SECONDS or len(x) == 0 or x.dtype.kind not in "fiu":
        raise SchemaError(
            f"{source}: array 'x': expected numbers of shape (windows, channels, {rate * SECONDS}) at {rate} Hz, got {x.shape} {x.dtype}",
            f"cut windows of {SECONDS} s",
        )
    num = len(x)
    channels = text_of(arrays["channels"], "channels", num_records=x.shape[1], source=source)
    if y.shape != (num,) or y.dtype.kind not in "fiub":
        raise SchemaError(f"{source}: array 'y': expected a number for each of {num} windows, got {y.shape} {y.dtype}", "export it again")
    windows = windows_of(x[:, places_of(channels.tolist(), source=source)].astype(np.float32), rate)
    about: dict[str, TextArray] = {
        name: text_of(arrays[name], name, num_records=num, source=source) for name in ("patient", "site") if name in arrays
    }
    return _cohort(windows, y.astype(np.float32), np.isin(y, (0, 1)), about, tolerance=tolerance, source=source)


def _declared_rate(values: NDArray[np.generic], source: str) -> int:
    rate = values.item() if values.size == 1 and values.dtype.kind in "fiu" else None
    if rate not in RATES:
        raise SchemaError(
            f"{source}: array 'sampling_rate': expected one of {', '.join(map(str, RATES))} Hz, got another",
            f"resample to {RATE} Hz, or say the true one",
        )
    return int(rate)


def _of_recordings(path: Path, *, tolerance: float) -> Cohort:
    frame = read_listing(path, ["file", "start_s", "label", "patient"])
    _one_patient_a_file(frame, path.name)
    labels, known = in_set(frame["label"], MEANINGS)
    known = known & ~frame.duplicated(["file", "start_s"]).to_numpy(dtype=np.bool_)
    about = {name: frame[name].to_numpy(dtype=np.str_) for name in ("patient", "site") if name in frame.columns}
    return _cohort(_read_windows(path, frame), labels, known, about, tolerance=tolerance, source=path.name)


def _one_patient_a_file(frame: "pd.DataFrame", source: str) -> None:
    shared = int((frame.groupby("file")["patient"].nunique() > 1).sum())
    if shared:
        raise SchemaError(f"{source}: expected one patient for each recording, got two or more for {shared} recordings", "correct the list")


def _read_windows(path: Path, frame: "pd.DataFrame") -> Windows:
    """The windows that the list names, a recording at a time; one that cannot be cut is unusable."""
    import pandas as pd

    starts = np.array(pd.to_numeric(frame["start_s"], errors="coerce"), dtype=np.float64)
    signals = np.zeros((len(frame), len(CHANNELS), LENGTH), dtype=np.float32)
    usable, num_off, num_cut = np.zeros(len(frame), dtype=np.bool_), *np.zeros((2, len(frame)), dtype=np.int64)
    first = ""
    for name, rows in frame.groupby("file", sort=False).indices.items():
        place = f"{path.name}: record {int(rows[0]) + 1}"
        try:
            times, values = read_recording(path_below(path.parent, str(name), endings=[".csv"], source=place), source=place)
        except (SchemaError, DataMissingError) as error:
            first = first or error.what
            continue
        for row in rows:
            try:
                made = window_at(starts[row], times, values, source=f"{path.name}: record {int(row) + 1}")
            except SchemaError as error:
                first = first or error.what
                continue
            signals[row], usable[row], num_off[row], num_cut[row] = made.signals[0], made.usable[0], made.num_off[0], made.num_cut[0]
            first = first or made.first_problem
    return Windows(signals=signals, usable=usable, num_off=num_off, num_cut=num_cut, first_problem=first)


def read_recording(path: Path, *, source: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A recording's times `(L,)` in seconds and values `(L, C)` in microvolt, NaN where there is none. As numbers, for an hour is a million rows.

    Raises:
        DataMissingError, DataAccessError: no such file, an empty one, or one that may not be read.
        SchemaError: it is no regular CSV of numbers in UTF-8, lacks the time or a channel, or its time does not go on.
    """
    import pandas as pd

    with reading(source):
        if path.stat().st_size == 0:
            raise DataMissingError(f"{source}: expected a recording as CSV, got an empty file", "export it again")
        try:
            with warnings.catch_warnings(), open(path, encoding="utf-8-sig", newline="") as file:
                warnings.simplefilter("error", pd.errors.ParserWarning)
                separator = max(",;\t", key=file.readline().count)
                file.seek(0)
                names = next(csv.reader(file, delimiter=separator, skipinitialspace=True), [])
                wanted = _columns_of(names, source)
                frame = pd.read_csv(
                    file,
                    sep=separator,
                    decimal="," if separator == ";" else ".",
                    header=None,
                    names=list(range(len(names) + 1)),  # and one for what stands behind the last column: nothing
                    index_col=False,
                    dtype={**dict.fromkeys(wanted, np.float64), len(names): str},
                    na_values=list(MISSING_MARKS),
                    skipinitialspace=True,
                    low_memory=False,
                )
        except (ValueError, csv.Error, OverflowError, pd.errors.ParserWarning) as error:
            raise SchemaError(
                f"{source}: expected a regular CSV of numbers, got one that cannot be read ({type(error).__name__})", "export it again"
            ) from None
    if frame[len(names)].notna().any():
        raise SchemaError(f"{source}: expected a regular CSV of numbers, got a line with more fields", "check separators and decimal points")
    times = frame[wanted[0]].to_numpy()
    if not (len(times) and np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise SchemaError(f"{source}: expected column {TIME!r} with seconds that go on from row to row, got others", "export it again")
    return times, frame[wanted[1:]].to_numpy()


def _columns_of(names: list[str], source: str) -> list[int]:
    """Places of the time and of each channel."""
    plain = [name.strip().lower() for name in names]
    if plain.count(TIME) != 1:
        raise SchemaError(f"{source}: expected one column {TIME!r}{nearest(TIME, names)}, found {plain.count(TIME)}", "seconds since the start")
    return [plain.index(TIME), *places_of(names, source=source)]


def window_at(start: float, times: NDArray[np.float64], values: NDArray[np.float64], *, source: str) -> Windows:
    """The one window that begins at `start` seconds, as `windows_of` gives it; its rate is told by how many samples it has.

    Raises:
        SchemaError: it is not wholly in the recording, or at no rate of `RATES`.
    """
    first, end = np.searchsorted(times, (start - CLOCK_SLACK, start + SECONDS - CLOCK_SLACK)) if np.isfinite(start) else (0, 0)
    rate = next((rate for rate in RATES if end - first == rate * SECONDS), None)
    if rate is None or np.diff(times[first:end]).max() > 2 / rate:
        raise SchemaError(
            f"{source}: expected {SECONDS} s of the recording without a break, at {', '.join(map(str, RATES))} Hz, got another number of samples",
            f"correct start_s, or resample to {RATE} Hz",
        )
    return windows_of(values[None, first:end].swapaxes(1, 2), rate)


def _cohort(
    windows: Windows, labels: NDArray[np.float32], known: BoolArray, about: Mapping[str, TextArray], *, tolerance: float, source: str
) -> Cohort:
    """The cohort of the usable windows whose label is known.

    Raises:
        SchemaError: too many are not, the unit is another, or a patient has two sites.
    """
    usable = windows.usable & known
    problem = windows.first_problem or "a label outside its set, or a window listed twice"
    refuse_too_many(int((~usable).sum()), len(usable), tolerance=tolerance, source=source, first=problem, bad=~usable)
    signals = windows.signals[usable]
    _refuse_other_unit(signals, windows.num_cut[usable], source)
    patients = patients_of(about["patient"][usable].tolist(), source=source)
    return Cohort(
        inputs=(signals,),
        labels=labels[usable],
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes={name: attribute_of(values[usable], patients, name, source=source) for name, values in about.items() if name != "patient"},
        notes={
            "records_dropped": int((~usable).sum()),
            "channels_off": int(windows.num_off[usable].sum()),
            "values_clipped": int(windows.num_cut[usable].sum()),
        },
    )


def _refuse_other_unit(signals: Signals, num_cut: NDArray[np.int64], source: str) -> None:
    if num_cut.sum() > MOST_CUT * signals.size:
        raise SchemaError(
            f"{source}: expected microvolt, got more than {MOST_CUT:.0%} of the samples beyond {MOST_MICROVOLT:g}", "check the unit and the filter"
        )
    if np.median(np.abs(signals).mean(axis=(1, 2))) * UNIT_MICROVOLT < LEAST_MICROVOLT:
        raise SchemaError(
            f"{source}: expected microvolt, got less than {LEAST_MICROVOLT:g} in most windows", "check the unit: volt and millivolt look like this"
        )


# Synthetic patients -------------------------------------------------------------------------------------------------------------


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients with one to three windows: in a seizure, rhythmic spikes and waves of 3 to 8 Hz that slow down and grow around a focus.

    In both kinds there are 1/f and alpha, blinks, muscle, an electrode that is off, and in those without a seizure sometimes the rhythm of
    drowsiness. Four sites differ in gain, noise and hum of the line.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    patient = np.repeat(np.arange(num_patients, dtype=np.int64), rng.integers(1, 4, size=num_patients))
    ill = rng.random(num_patients) < SYNTHETIC_ILL_RATE
    labels = ill[patient] & (rng.random(len(patient)) < SYNTHETIC_SEIZURE_RATE)
    names = np.array(list(SYNTHETIC_SITES))
    site = rng.integers(len(names), size=num_patients)
    gain, noise, hum, line = np.array(list(SYNTHETIC_SITES.values()), dtype=np.float32)[site[patient]].T[:, :, None, None]
    signals = _background(patient, rng)
    signals[labels] += _seizures(int(labels.sum()), rng)
    drowsy = ~labels & (rng.random(len(patient)) < SYNTHETIC_DROWSY_RATE)
    signals[drowsy] += _drowsiness(int(drowsy.sum()), rng)
    tense = rng.random(len(patient)) < SYNTHETIC_MUSCLE_RATE
    signals[tense] += _muscle(int(tense.sum()), rng)
    signals += _blinks(len(patient), rng)
    seconds = np.arange(LENGTH, dtype=np.float32) / RATE
    signals *= gain
    signals += hum * np.sin(2 * np.pi * line * seconds) + noise * rng.standard_normal(signals.shape, dtype=np.float32)
    signals[rng.random(signals.shape[:2]) < SYNTHETIC_OFF_RATE] = np.nan
    windows = windows_of(signals, RATE)
    return Cohort(
        inputs=(windows.signals,),
        labels=labels.astype(np.float32),
        patient_of_record=patient,
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site]},
        synthetic=True,
    )


def _each(rng: np.random.Generator, count: int, low: float, high: float) -> Signals:
    """`(N, 1, 1)`, uniform."""
    return rng.uniform(low, high, size=(count, 1, 1)).astype(np.float32)


def _phase(hertz: Signals, rng: np.random.Generator, *, slowing: Signals | float = 0.0) -> Signals:
    """`(N, 1, T)`: the phase of a rhythm of this frequency, which falls by the share `slowing` in the window."""
    seconds = np.arange(LENGTH, dtype=np.float32) / RATE
    start = _each(rng, len(hertz), 0, 2 * np.pi)
    return np.asarray(start + 2 * np.pi * hertz * (seconds - slowing * seconds**2 / (2 * SECONDS)), dtype=np.float32)


def _background(patient: NDArray[np.int64], rng: np.random.Generator) -> Signals:
    """`(N, C, T)` in microvolt: noise of 1/f amplitude, in part the same in all channels, and a patient's alpha, which is strongest behind."""
    hertz = np.fft.rfftfreq(LENGTH, 1 / RATE)
    shape = np.where(hertz > 0, 1 / np.maximum(hertz, 0.5), 0).astype(np.float32)
    count, num = len(patient), int(patient[-1]) + 1
    drawn = rng.standard_normal((2, count, len(CHANNELS) + 1, len(hertz)), dtype=np.float32)
    pink = np.fft.irfft((drawn[0] + np.complex64(1j) * drawn[1]) * shape, n=LENGTH)
    mixed = np.float32(0.8) * pink[:, :-1] + np.float32(0.6) * pink[:, -1:]
    level = _each(rng, num, 10, 20)[patient] / np.float32(np.sqrt(2 * (shape**2).sum()) * np.sqrt(2) / LENGTH)
    behind = np.array([0.15 if down > 0.5 else 1.0 if down < -0.5 else 0.4 for _, down in ELECTRODES], dtype=np.float32)[:, None]
    waxing = 0.6 + 0.4 * np.sin(_phase(_each(rng, count, 0.2, 0.6), rng))
    alpha = _each(rng, num, 3, 22)[patient] * waxing * np.sin(_phase(_each(rng, num, 8.5, 11.5)[patient], rng))
    return np.asarray(level * mixed + alpha * behind, dtype=np.float32)


def _around(count: int, width: Signals, rng: np.random.Generator) -> Signals:
    """`(N, C, 1)`: how strongly each channel sees a source at one of them."""
    places = np.array(ELECTRODES, dtype=np.float32)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)[rng.integers(len(CHANNELS), size=count)]
    return np.asarray(np.exp(-((distance[:, :, None] / width) ** 2)), dtype=np.float32)


def _seizures(count: int, rng: np.random.Generator) -> Signals:
    """`(N, C, T)`: a spike and a slow wave in each cycle."""
    phase = _phase(_each(rng, count, 3, 8), rng, slowing=_each(rng, count, 0.05, 0.35))
    spike = np.exp(6 * (np.cos(phase) - 1)) - 0.17
    wave = spike + _each(rng, count, 0.3, 0.7) * np.sin(phase - 0.9)
    growing = np.linspace(0, 1, LENGTH, dtype=np.float32) * _each(rng, count, 0.0, 0.6) + 0.6
    height = np.exp(_each(rng, count, np.log(35), np.log(130)))
    return np.asarray(height * growing * wave * _around(count, _each(rng, count, 0.7, 2.5), rng), dtype=np.float32)


def _drowsiness(count: int, rng: np.random.Generator) -> Signals:
    """`(N, C, T)`: a smooth, even rhythm of 4 to 7 Hz."""
    height = _each(rng, count, 8, 25)
    return np.asarray(height * np.sin(_phase(_each(rng, count, 4, 7), rng)) * _around(count, _each(rng, count, 0.8, 2.0), rng), dtype=np.float32)


def _blinks(count: int, rng: np.random.Generator) -> Signals:
    """`(N, C, T)`: one or two slow bumps in front, in half of the windows."""
    seconds = np.arange(LENGTH, dtype=np.float32) / RATE
    front = np.array([1.0 if down > 0.5 else 0.12 if down > -0.5 else 0.0 for _, down in ELECTRODES], dtype=np.float32)[:, None]
    total = np.zeros((count, 1, LENGTH), dtype=np.float32)
    for rate in (0.5, 0.25):
        height = _each(rng, count, 50, 180) * (rng.random((count, 1, 1)) < rate)
        total += height * np.exp(-(((seconds - _each(rng, count, 0, SECONDS)) / _each(rng, count, 0.08, 0.15)) ** 2)).astype(np.float32)
    return total * front


def _muscle(count: int, rng: np.random.Generator) -> Signals:
    """`(N, C, T)`: a burst of fast activity at the temples."""
    seconds = np.arange(LENGTH, dtype=np.float32) / RATE
    begin, lasts = _each(rng, count, -1, SECONDS), _each(rng, count, 0.5, 3)
    height = _each(rng, count, 5, 30)
    fast = np.diff(rng.standard_normal((count, len(CHANNELS), LENGTH + 1), dtype=np.float32), axis=2) / np.float32(np.sqrt(2))
    temples = np.array([1.0 if abs(right) > 0.7 else 0.3 for right, _ in ELECTRODES], dtype=np.float32)[:, None]
    return np.asarray(height * ((seconds >= begin) & (seconds < begin + lasts)) * fast * temples, dtype=np.float32)


# Model --------------------------------------------------------------------------------------------------------------------------


class LogPower(nn.Module):
    """`(N, F, T) -> (N, F, parts)`: the logarithm of the mean square of each part of the window, from a least one on."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.mean = nn.AdaptiveAvgPool1d(parts)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The logarithms."""
        return torch.log(self.mean(values * values) + LEAST_POWER)


def model(filters: int = 12, parts: int = 4) -> nn.Module:
    """`(N, C, T) -> (N, 1)` logits: filters of 0.4 s at half the rate, normalised together, so that gain does not matter; power; one linear layer."""
    return nn.Sequential(
        nn.AvgPool1d(2),
        nn.Conv1d(len(CHANNELS), filters, 25, stride=2, padding=12),
        nn.GroupNorm(1, filters),
        LogPower(parts),
        nn.Flatten(),
        nn.Linear(filters * parts, 1),
    )


def eeg_seizure() -> Task:
    """The task `eeg-seizure`."""
    return Task(
        name=NAME,
        title="Seizure in a window of EEG",
        modality="signal",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=model,
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="your own recordings and windows; synthetic EEG",
        default_study="eeg-seizure.toml",
    )
