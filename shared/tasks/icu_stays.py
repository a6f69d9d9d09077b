"""Stays in intensive care as measurements: which variables there are, how a public range scales each, and what is known at admission.

Every variable has a plausible range, outside of which a value counts as not measured, and a usual range, which is clinical knowledge and no statistic
of a data set.

Legend: P stays (a stay is a patient), E measurements, V variables, G descriptors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.schema import Column, TensorSchema
from shared.subgroups import Subgroup

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

SOURCE = "PhysioNet/CinC Challenge 2012, set A (Silva et al. 2012), ODC-By 1.0"
HOURS = 48
MOST_MINUTES = 60 * HOURS
FAR_OUT = 3.0  # times half the usual range from its middle: where a scaled value is cut
UNITS = {"1": "coronary", "2": "cardiac-surgery", "3": "medical", "4": "surgical"}  # ICUType: CCU, CSRU, MICU, SICU
SITES = tuple(UNITS.values())
UNKNOWN = "-1"
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
INDEX_OF = {variable.name: index for index, variable in enumerate(VARIABLES)}

DESCRIPTORS = (
    Column(name="Age", type="number", unit="years", low=15, high=95, missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="Gender", type="binary", missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="Height", type="number", unit="cm", low=130, high=210, missing="indicator", missing_codes=(UNKNOWN,)),
    Column(name="ICUType", type="category", categories=tuple(UNITS)),
)
DESCRIPTOR_NAMES = tuple(name for column in DESCRIPTORS for name in column.feature_names)
DESCRIBED = {column.name for column in DESCRIPTORS}
DESCRIPTOR_SCHEMA = TensorSchema(name="descriptors", shape=(len(DESCRIPTOR_NAMES),), unit=", ".join(DESCRIPTOR_NAMES), low=-1, high=1)


def series_schema(num_steps: int) -> tuple[TensorSchema, TensorSchema]:
    """What `series_inputs` gives: V values, V times V masks and V gaps a step; and the descriptors."""
    unit = f"value, measured (0 or 1), time since measured / {HOURS} h; of each of {', '.join(variable.name for variable in VARIABLES)}"
    return TensorSchema(name="series", shape=(num_steps, 3 * NUM_VARIABLES), unit=unit, low=-FAR_OUT, high=FAR_OUT), DESCRIPTOR_SCHEMA


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
