"""ECG beat: of which of five kinds is a heartbeat, from one lead around it and from its place in the rhythm.

The kinds are those of ANSI/AAMI EC57, from the symbols of WFDB annotations as de Chazal, O'Dwyer and Reilly 2004 ("Automatic classification of
heartbeats using ECG morphology and heartbeat interval features", IEEE TBME 51:1196-1206) group them:

    N  neither of the others: N, bundle branch block (L, R, B), escape beats from above the ventricles (e, j, n)
    S  supraventricular ectopic: A, a, J, S
    V  ventricular ectopic: V, E, r
    F  fusion of a ventricular and a normal beat: F
    Q  paced or not classifiable: /, f, Q, ?

A beat is a record; it is cut out of the lead from 0.256 s before the mark to 0.448 s after it, and two intervals say how early it came. Intervals
go to the beat after it, so this is for recordings that are read when they are over (a Holter's), not for an alarm. All is scaled by public numbers;
a patient's own middle interval is of that patient alone.

Legend: N beats (records), P patients, B beats of a recording, L samples of a beat, K kinds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from shared.cohort import Cohort, IntArray
from shared.config import Real, Settings, validate
from shared.errors import DataMissingError, SchemaError
from shared.metrics import confusion_metrics
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.images import attribute_of, patients_of, read_listing, refuse_too_many
from shared.tasks.wfdb_records import REMEDY_FOLDER, Lead, find_records, read_annotations, read_lead

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

Floats = NDArray[np.floating]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

NAME = "ecg-beat"
KINDS = ("N", "S", "V", "F", "Q")
SYMBOLS = {"N": "NLRBejn", "S": "AaJS", "V": "VEr", "F": "F", "Q": "/fQ?"}
KIND_OF_SYMBOL = {symbol: KINDS.index(kind) for kind, symbols in SYMBOLS.items() for symbol in symbols}
KIND_WEIGHTS = (0.6, 1.2, 1.0, 1.6, 1.0)  # of a beat in the loss: what is rare counts more; public, and the same everywhere
RATE = 125  # samples a second of what the model sees
BEFORE, AFTER = 32, 56  # samples around the mark
LENGTH = BEFORE + AFTER
MILLIVOLTS = 2.5  # becomes 1; twice that is cut
USUAL_INTERVAL = 0.8  # seconds, 75 beats a minute
NEIGHBOURS = 8  # intervals on either side, whose median is a beat's middle interval
PATIENTS_FILE = "patients.csv"
ATTRIBUTES = ("site", "age", "sex")
SUBGROUPS = (Subgroup(attribute="sex", names={"F": "female", "M": "male"}), Subgroup(attribute="age", edges=(50, 70)))
RHYTHM = (
    "log2 of the interval before / middle interval",
    "of the interval after",
    "log2 of the middle interval / 0.8 s",
    "before missing",
    "after missing",
)

SCHEMA = (
    TensorSchema(name="beat", shape=(1, LENGTH), unit=f"{MILLIVOLTS:g} mV, less the record's median; {RATE} samples a second", low=-2.0, high=2.0),
    TensorSchema(name="rhythm", shape=(len(RHYTHM),), unit="; ".join(RHYTHM), low=-1.0, high=1.0),
)


class EcgOptions(Settings):
    """Options of the loader."""

    lead: str | None = Field(default=None, min_length=1, description="the lead to read; omitted: MLII, else II, else the first ECG lead")
    annotator: str = Field(default="atr", pattern=r"^[A-Za-z0-9_]{1,32}$", description="ending of the files of annotations")
    most_beats: int = Field(default=5000, ge=1, description="of a patient; of more, so many are taken at even distances over time")
    tolerance: Real = Field(default=0.05, ge=0, lt=1, description="share of the records (files, not beats) that may be unusable")


# Data ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Beats:
    """Beats: what the model sees of each, `(B, 1, L)` and `(B, 5)` float32, the kind `(B,)` int64, and how many were left out for want of signal."""

    beat: NDArray[np.float32] = field(repr=False)
    rhythm: NDArray[np.float32] = field(repr=False)
    kind: IntArray = field(repr=False)
    num_without_signal: int = 0
    num_thinned: int = 0


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A folder of WFDB records (NAME.hea, its signal, NAME.atr), also in folders below; a file RECORDS, where there is one, lists them.

    A record is a patient, of that name, unless there is a `patients.csv` with the columns `record` (its path below the folder, without ending) and
    `patient`, and maybe `site`, `age` and `sex` (F, M). Nothing is taken from comments of headers.

    Args:
        options: `lead`, `annotator`, `most_beats`, `tolerance`; see `EcgOptions`.

    Raises:
        ConfigurationError: package wfdb is not there, or an option is unknown or out of range.
        DataMissingError, DataAccessError, SchemaError: data are missing, may not be read, or are not as declared; or too many records are.
    """
    settings = validate(EcgOptions, dict(options), f"task {NAME}: options of its loader")
    if path is None:
        raise DataMissingError(f"task {NAME} has no data of its own", REMEDY_FOLDER)
    names = find_records(path, task=NAME)
    table = read_patients(path / PATIENTS_FILE) if (path / PATIENTS_FILE).exists() else None
    kept: dict[str, Beats] = {}
    problems: list[str] = []
    other_lead = 0
    for number, name in enumerate(names, start=1):
        source = f"{path.name}: record {number}"
        try:
            if table is not None and name not in table.index:
                raise SchemaError(f"{source}: expected a row of {PATIENTS_FILE} for it, found none", "add it")
            lead = read_lead(path, name, lead=settings.lead, source=source)
            kept[name] = beats_of(path, name, lead, settings, source=source)
            other_lead += not lead.preferred
        except (SchemaError, DataMissingError) as error:
            problems.append(error.what)
    refuse_too_many(len(problems), len(names), tolerance=settings.tolerance, source=path.name, first=problems[0] if problems else "")
    notes = {"records_dropped": len(problems), "records_of_another_lead": other_lead}
    return _cohort(kept, table, settings.most_beats, notes, source=path.name)


def read_patients(path: Path) -> "pd.DataFrame":
    """The table of patients, by record.

    Raises:
        DataMissingError, DataAccessError, SchemaError: it is no such table; or a record is in it twice.
    """
    frame = read_listing(path, ["record", "patient"])
    if frame["record"].duplicated().any():
        raise SchemaError(
            f"{path.name}: expected every record once, got {int(frame['record'].duplicated().sum())} rows more", "remove the duplicates"
        )
    return frame.set_index("record")


def beats_of(folder: Path, name: str, lead: Lead, settings: EcgOptions, *, source: str) -> Beats:
    """The beats of a record, in the order of time; one of whose span the device gave no signal is left out, and counted.

    Raises:
        DataMissingError, SchemaError: there are no annotations or no beats, or two at one time; see `read_annotations`.
    """
    marks = read_annotations(folder, name, settings.annotator, of=lead, source=source)
    is_beat = np.isin(marks.symbol, list(KIND_OF_SYMBOL))
    sample = marks.sample[is_beat]
    kind = np.array([KIND_OF_SYMBOL[symbol] for symbol in marks.symbol[is_beat].tolist()], dtype=np.int64)
    if len(sample) == 0:
        raise DataMissingError(f"{source}: expected annotated beats, found none", "choose another annotator")
    intervals = np.diff(sample) / lead.rate
    if (intervals <= 0).any():
        raise SchemaError(f"{source}: expected beats one after another, got two at one time", "keep the annotations of one lead")
    heard = has_signal(lead, sample)
    if not heard.any():
        raise SchemaError(f"{source}: expected signal around the beats, got none around any", "choose another lead")
    rhythm = rhythm_of(np.concatenate([[np.nan], intervals]), np.concatenate([intervals, [np.nan]]))
    usable = np.flatnonzero(heard)
    chosen = usable[evenly(len(usable), settings.most_beats)]
    return Beats(
        beat=windows(lead, sample[chosen]),
        rhythm=rhythm[chosen],
        kind=kind[chosen],
        num_without_signal=int((~heard).sum()),
        num_thinned=len(usable) - len(chosen),
    )


def evenly(count: int, most: int) -> IntArray:
    """At most `most` of `count` places, at even distances: by time alone, whatever is there."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.asarray((2 * np.arange(most, dtype=np.int64) + 1) * count // (2 * most), dtype=np.int64)


def has_signal(lead: Lead, sample: IntArray) -> BoolArray:
    """`(B,)`, whether the lead has a value at every sample of each beat's span, as far as it lies in the record."""
    gaps = np.concatenate([[0], np.cumsum(np.isnan(lead.millivolts))])
    reach = len(lead.millivolts)
    start = np.clip(sample - math.ceil(BEFORE / RATE * lead.rate), 0, reach)
    end = np.clip(sample + math.ceil(AFTER / RATE * lead.rate) + 1, 0, reach)
    return np.asarray(gaps[end] == gaps[start])


def windows(lead: Lead, sample: IntArray) -> NDArray[np.float32]:
    """`(B, 1, L)`: the lead at `RATE` around each mark, less the record's median; flat where the record had not begun, or was over."""
    from scipy.signal import resample_poly

    level = float(np.nanmedian(lead.millivolts))
    signal = np.nan_to_num(lead.millivolts - level)
    ratio = Fraction(RATE / lead.rate).limit_denominator(1000)
    resampled = resample_poly(signal, ratio.numerator, ratio.denominator) if ratio != 1 else signal
    padded = np.pad(resampled, LENGTH)
    middle = np.rint(sample * float(ratio)).astype(np.int64) + LENGTH  # by the ratio as it was taken, so that nothing drifts over a day
    return scaled(padded[middle[:, None] + np.arange(-BEFORE, AFTER)])


def scaled(millivolts: Floats) -> NDArray[np.float32]:
    """`(B, L)` mV as the model takes it, `(B, 1, L)`."""
    return np.asarray(np.clip(millivolts / MILLIVOLTS, -2, 2)[:, None], dtype=np.float32)


def rhythm_of(before: FloatArray, after: FloatArray) -> NDArray[np.float32]:
    """What `RHYTHM` names, `(..., B, 5)` in [-1, 1], of a recording's intervals; one that is missing counts as the middle one, and is marked.

    Args:
        before, after: `(..., B)` seconds to the beat before and after each beat; NaN where there is none.
    """
    middle = _running_median(before)
    ratios = [np.log2(np.where(np.isnan(interval), middle, interval) / middle) for interval in (before, after)]
    columns = [*ratios, np.log2(middle / USUAL_INTERVAL), np.isnan(before), np.isnan(after)]
    return np.asarray(np.clip(np.stack(columns, axis=-1), -1, 1), dtype=np.float32)


def _running_median(intervals: FloatArray) -> FloatArray:
    """`(..., B)`: the median of the intervals near each beat; the usual interval where there is none."""
    beside = [(0, 0)] * (intervals.ndim - 1) + [(NEIGHBOURS, NEIGHBOURS)]
    near = np.lib.stride_tricks.sliding_window_view(np.pad(intervals, beside, constant_values=np.nan), 2 * NEIGHBOURS + 1, axis=-1)
    alone = np.isnan(near).all(axis=-1, keepdims=True)
    return np.asarray(np.nanmedian(np.where(alone, USUAL_INTERVAL, near), axis=-1))


def _cohort(kept: Mapping[str, Beats], table: "pd.DataFrame | None", most_beats: int, notes: Mapping[str, int], *, source: str) -> Cohort:
    names = list(kept)
    people = patients_of(names if table is None else table.loc[names, "patient"].tolist(), source=source)
    attributes = {}
    if table is not None:
        present = [attribute for attribute in ATTRIBUTES if attribute in table.columns]
        attributes = {name: attribute_of(table.loc[names, name].to_numpy(), people, name, source=PATIENTS_FILE) for name in present}
    patient = np.repeat(people.patient_of_record, [len(beats.kind) for beats in kept.values()])
    chosen = [np.flatnonzero(patient == index) for index in range(len(people.patient_ids))]
    rows = np.sort(np.concatenate([own[evenly(len(own), most_beats)] for own in chosen]))
    return Cohort(
        inputs=(np.concatenate([beats.beat for beats in kept.values()])[rows], np.concatenate([beats.rhythm for beats in kept.values()])[rows]),
        labels=np.concatenate([beats.kind for beats in kept.values()])[rows],
        patient_of_record=patient[rows],
        patient_ids=people.patient_ids,
        attributes=attributes,
        notes={
            **notes,
            "beats_without_signal": sum(beats.num_without_signal for beats in kept.values()),
            "beats_above_most_beats": sum(beats.num_thinned for beats in kept.values()) + len(patient) - len(rows),
        },
    )


# Synthetic patients -------------------------------------------------------------------------------------------------------------

SYNTHETIC_BEATS = 12  # of a patient
SYNTHETIC_SITES = ("synthetic-1", "synthetic-2", "synthetic-3", "synthetic-4")
SITE_GAIN, SITE_NOISE, SITE_WANDER = (1.0, 0.8, 1.2, 0.9), (0.02, 0.03, 0.04, 0.05), (0.05, 0.15, 0.1, 0.2)  # 1, mV, mV
SITE_HUM, SITE_MAINS = (0.01, 0.03, 0.02, 0.04), (50, 50, 60, 60)  # mV, Hz
SITE_ECTOPY = (1.0, 0.7, 1.3, 1.0)  # more or fewer beats of other kinds than N
SHARES = (0.60, 0.14, 0.16, 0.08, 0.02)  # of the kinds, where nobody is paced
PACED_SHARES = (0.06, 0.0, 0.06, 0.0, 0.88)
PACED_RATE, IRREGULAR_RATE, BLOCK_RATE, INVERTED_RATE = 0.12, 0.05, 0.05, 0.1  # of patients: paced, irregular, bundle branch block, T inverted
DOWNWARD_RATE = 0.3  # of patients: their ectopic beats point down
LOST_CONTACT_RATE, UNKNOWN_INTERVAL_RATE = 0.02, 0.03  # of beats
EARLY = ((1.0, 1.0), (0.60, 0.82), (0.50, 0.80), (0.82, 0.98), (1.0, 1.0))  # interval before a beat, in usual ones, by kind
WAVES = {  # amplitude in mV, middle and width in s after the mark, of a sum of Gaussians: P, Q, R, S, T
    "normal": ((0.15, -0.16, 0.022), (-0.10, -0.030, 0.010), (1.20, 0.0, 0.011), (-0.25, 0.030, 0.010), (0.30, 0.26, 0.040)),
    "atrial": ((0.08, -0.135, 0.020), (-0.10, -0.030, 0.010), (1.15, 0.0, 0.011), (-0.25, 0.030, 0.010), (0.28, 0.25, 0.040)),
    "ventricular": ((0.0, -0.16, 0.022), (-0.15, -0.070, 0.025), (1.50, 0.0, 0.035), (-0.60, 0.095, 0.035), (-0.40, 0.30, 0.055)),
    "paced": ((1.20, -0.056, 0.005), (-0.30, -0.020, 0.020), (-1.20, 0.030, 0.035), (0.20, 0.110, 0.030), (0.50, 0.31, 0.050)),
}


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients with twelve beats each, sums of Gaussians (after McSharry et al. 2003, "A dynamical model for generating synthetic ECGs").

    Every patient has waves of their own and kinds of beats they are prone to; an eighth are paced. Early atrial beats have another P wave and a
    short pause, ventricular ones are broad, without P, and have a full pause, fusions lie between; a few cannot be classified for noise. Four
    sites differ in gain, noise, wander, hum and how many ectopic beats there are. Of one beat in fifty the contact is lost for a moment, of one in thirty an interval is not known.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    site = rng.integers(len(SYNTHETIC_SITES), size=num_patients)
    paced = rng.random(num_patients) < PACED_RATE
    kind = _synthetic_kinds(site, paced, rng)
    before, after = _synthetic_intervals(kind, paced, rng)
    millivolts = _synthetic_waves(kind, paced, rng) * np.array(SITE_GAIN)[site, None, None] + _synthetic_noise(site, rng)
    millivolts *= _contact(kind.shape, rng)
    return Cohort(
        inputs=(scaled(millivolts.reshape(-1, LENGTH)), rhythm_of(before, after).reshape(-1, len(RHYTHM))),
        labels=kind.reshape(-1),
        patient_of_record=np.repeat(np.arange(num_patients, dtype=np.int64), SYNTHETIC_BEATS),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={
            "site": np.array(SYNTHETIC_SITES)[site],
            "age": rng.integers(25, 90, size=num_patients).astype(np.str_),
            "sex": rng.choice(["F", "M"], size=num_patients),
        },
        synthetic=True,
    )


def _synthetic_kinds(site: IntArray, paced: BoolArray, rng: np.random.Generator) -> IntArray:
    """`(P, B)`: each patient is prone to some kinds; a paced one has paced beats, now and then a normal or a ventricular one."""
    shares = np.tile(SHARES, (len(site), 1))
    shares[:, 1:4] *= np.array(SITE_ECTOPY)[site, None]
    prone = rng.gamma(4 * shares)
    prone /= prone.sum(axis=1, keepdims=True)
    prone[paced] = PACED_SHARES
    drawn = rng.random((len(site), SYNTHETIC_BEATS, 1)) > np.cumsum(prone, axis=1)[:, None, :-1]
    return np.asarray(drawn.sum(axis=2), dtype=np.int64)


def _synthetic_intervals(kind: IntArray, paced: BoolArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Seconds before and after each beat, `(P, B)`, NaN where not known: early beats by kind, and the pause after them."""
    count = len(kind)
    low, high = np.array(EARLY)[kind].transpose(2, 0, 1)
    early = rng.uniform(low, high)
    pause = np.where(kind == KINDS.index("S"), rng.uniform(1.0, 1.15, size=kind.shape), np.where(kind == KINDS.index("N"), 1.0, 2.0 - early))
    usual = rng.uniform(0.6, 1.1, size=(count, 1))
    spread = np.where(paced, 0.01, np.where(rng.random(count) < IRREGULAR_RATE, 0.15, 0.035))[:, None]
    own = usual * np.exp(spread * rng.standard_normal((count, SYNTHETIC_BEATS + 1)))
    intervals = own * np.concatenate([early, np.ones((count, 1))], axis=1) * np.concatenate([np.ones((count, 1)), pause], axis=1)
    unknown = rng.random((2, *kind.shape)) < UNKNOWN_INTERVAL_RATE
    return np.where(unknown[0], np.nan, intervals[:, :-1]), np.where(unknown[1], np.nan, intervals[:, 1:])


def _synthetic_waves(kind: IntArray, paced: BoolArray, rng: np.random.Generator) -> FloatArray:
    """`(P, B, L)` mV: the sum of each beat's waves; shapes differ between patients, and a little between beats.

    What is Q of a patient who is not paced cannot be classified: most of it is slow noise.
    """
    drawn = {name: _sum_of_gaussians(waves)[:, None] for name, waves in _synthetic_shapes(len(kind), rng).items()}  # (P, 1, L) each
    fused = rng.uniform(0.4, 0.65, size=(*kind.shape, 1))
    steps = np.arange(LENGTH)
    smooth = 0.2 * np.exp(-0.5 * ((steps - steps[:, None]) / 3) ** 2)
    unknown = 0.3 * drawn["normal"] + rng.standard_normal((*kind.shape, LENGTH)) @ smooth
    of_kind = (
        drawn["normal"],
        drawn["atrial"],
        drawn["ventricular"],
        (1 - fused) * drawn["normal"] + fused * drawn["ventricular"],
        np.where(paced[:, None, None], drawn["paced"], unknown),
    )
    waves = sum(np.where(kind[..., None] == index, wave, 0.0) for index, wave in enumerate(of_kind))
    return np.asarray(waves * np.exp(0.06 * rng.standard_normal((*kind.shape, 1))))


def _synthetic_shapes(count: int, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Each patient's own `WAVES`, `(P, 5, 3)` by name."""
    shapes = {name: np.tile(np.array(waves), (count, 1, 1)) for name, waves in WAVES.items()}
    size, width = np.exp(0.2 * rng.standard_normal((count, 5))), np.exp(0.1 * rng.standard_normal((count, 5)))
    place = 0.006 * rng.standard_normal((count, 5)) * (np.arange(5) != 2)  # the mark is where R is
    inverted, block = rng.random(count) < INVERTED_RATE, rng.random(count) < BLOCK_RATE
    for name, waves in shapes.items():
        waves *= np.stack([size, np.ones_like(size), width], axis=2)
        waves[:, :, 1] += place
        if name in ("normal", "atrial"):
            waves[inverted, 4, 0] *= -1
            waves[block, 2:4, 2] *= 1.8  # the ventricles take longer
    shapes["ventricular"][rng.random(count) < DOWNWARD_RATE, :, 0] *= -1
    return shapes


def _sum_of_gaussians(waves: FloatArray) -> FloatArray:
    """`(P, L)` of waves `(P, 5, 3)`."""
    time = (np.arange(LENGTH) - BEFORE) / RATE
    height, middle, width = waves.transpose(2, 0, 1)[..., None]
    return np.asarray((height * np.exp(-0.5 * ((time - middle) / width) ** 2)).sum(axis=1))


def _synthetic_noise(site: IntArray, rng: np.random.Generator) -> FloatArray:
    """`(P, B, L)` mV: muscle, breath and mains, by site."""
    shape = (len(site), SYNTHETIC_BEATS, 1)
    time = np.arange(LENGTH) / RATE

    def of_site(values: tuple[float, ...]) -> FloatArray:
        return np.array(values, dtype=np.float64)[site, None, None]

    noise = of_site(SITE_NOISE) * rng.standard_normal((*shape[:2], LENGTH))
    wander = of_site(SITE_WANDER) * np.sin(2 * np.pi * (rng.uniform(0.15, 0.4, size=shape) * time + rng.random(shape)))
    hum = of_site(SITE_HUM) * np.sin(2 * np.pi * (of_site(SITE_MAINS) * time + rng.random(shape)))
    return np.asarray(noise + wander + hum)


def _contact(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """`(P, B, L)`: 0 for the moment in which an electrode had no contact, else 1."""
    lost = rng.random((*shape, 1)) < LOST_CONTACT_RATE
    start, length = rng.integers(LENGTH, size=(*shape, 1)), rng.integers(6, 20, size=(*shape, 1))
    place = np.arange(LENGTH)
    return np.asarray(~(lost & (place >= start) & (place < start + length)), dtype=np.float64)


# Model, loss, task --------------------------------------------------------------------------------------------------------------


class BeatModel(nn.Module):
    """A CNN over the beat, and one linear output over what it finds and the rhythm: `(N, 1, L), (N, 5) -> (N, K)` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Sequential(
            nn.Conv1d(1, 8, 9, stride=2, padding=4),
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv1d(8, 16, 7, stride=2, padding=3),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.AvgPool1d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(16 * LENGTH // 8 + len(RHYTHM), len(KINDS))

    def forward(self, beat: torch.Tensor, rhythm: torch.Tensor) -> torch.Tensor:
        """The logit of each kind for each beat."""
        logits: torch.Tensor = self.head(torch.cat([self.shape(beat), rhythm], dim=1))
        return logits


def weighted_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each beat, `(N,)`, times the weight of its kind."""
    return nn.functional.cross_entropy(outputs, labels, reduction="none") * torch.tensor(KIND_WEIGHTS, device=outputs.device)[labels]


def ecg_beat() -> Task:
    """The task `ecg-beat`."""
    return Task(
        name=NAME,
        title="Kind of a heartbeat in one lead of an electrocardiogram",
        modality="signal",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=BeatModel,
        loss=weighted_loss,
        predict=lambda outputs: torch.softmax(outputs, dim=1),
        predicted=KINDS,
        metrics=confusion_metrics(len(KINDS)),
        primary_metric="macro_f1",
        source="your own WFDB records, such as those of PhysioNet (Goldberger et al. 2000); synthetic beats",
        default_study="ecg-beat.toml",
        subgroups=SUBGROUPS,
    )
