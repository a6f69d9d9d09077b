"""Stays of patients who never were, with signal, missing values and differences between units."""

import numpy as np
from numpy.typing import NDArray

from shared.seeding import generator
from shared.tasks.icu_stays import MOST_MINUTES, NUM_VARIABLES, UNKNOWN, VARIABLES, IcuStays, IntArray
from shared.tasks.physionet_2012 import plausible

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
