"""APACHE III points: how far each finding of the first day is from healthy, in points of a published table.

Knaus, Wagner, Draper et al. 1991, "The APACHE III prognostic system", Chest 100:1619-1636: the tables of points for vital signs and laboratory
values, acid-base state, neurological state, age, and comorbid conditions. A finding that was not measured counts as healthy, as there. The
table is public and older than any patient here, so points say nothing about other patients; and they are no prediction of a model: the
equations that turn them into a risk are not used.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

MOST_POINTS = 299  # 252 of physiology, 24 of age, 23 of comorbid conditions
WATER_VAPOUR_AND_AIR = 713.0  # mmHg: 760 of air less 47 of water vapour
RESPIRATORY_QUOTIENT = 0.8

# name -> edges, and points of each interval [edge, next edge); one more interval than edges
POINTS: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "heartrate": ((40, 50, 100, 110, 120, 140, 155), (8, 5, 0, 1, 5, 7, 13, 17)),  # beats/min
    "meanbp": ((40, 60, 70, 80, 100, 120, 130, 140), (23, 15, 7, 6, 0, 4, 7, 9, 10)),  # mmHg
    "temperature": ((33, 33.5, 34, 35, 36, 40), (20, 16, 13, 8, 2, 0, 4)),  # degrees C
    "respiratoryrate": ((6, 12, 14, 25, 35, 40, 50), (17, 8, 7, 0, 6, 9, 11, 18)),  # breaths/min
    "hematocrit": ((41, 50), (3, 0, 3)),  # %
    "wbc": ((1, 3, 20, 25), (19, 5, 0, 1, 5)),  # 1000/mm3
    "bun": ((17, 20, 40, 80), (0, 2, 7, 11, 12)),  # mg/dl
    "sodium": ((120, 135, 155), (3, 2, 0, 4)),  # mmol/l
    "albumin": ((2, 2.5, 4.5), (11, 6, 0, 4)),  # g/dl
    "bilirubin": ((2, 3, 5, 8), (0, 5, 6, 8, 16)),  # mg/dl
    "glucose": ((40, 60, 200, 350), (8, 9, 0, 3, 5)),  # mg/dl
    "urine": ((400, 600, 900, 1500, 2000, 4000), (15, 8, 7, 5, 4, 0, 1)),  # ml/day
    "age": ((45, 60, 65, 70, 75, 85), (0, 5, 11, 13, 16, 17, 24)),  # years
}
CREATININE = ((0.5, 1.5, 1.95), (3, 0, 4, 7))  # mg/dl
CREATININE_IN_RENAL_FAILURE = ((1.5,), (0, 10))
OXYGEN = ((50, 70, 80), (15, 5, 2, 0))  # arterial partial pressure, mmHg
OXYGEN_GRADIENT = ((100, 250, 350, 500), (0, 7, 9, 11, 14))  # alveolar to arterial, mmHg, of ventilated patients on half oxygen or more
ACID_BASE_PH = (7.20, 7.30, 7.35, 7.45, 7.50, 7.60)
ACID_BASE_CO2 = (25, 30, 35, 40, 45, 50)  # mmHg
ACID_BASE = (  # a row for each interval of pH, a column for each of carbon dioxide
    (12, 12, 12, 12, 12, 12, 4),
    (9, 9, 6, 6, 3, 3, 2),
    (9, 9, 0, 0, 0, 1, 1),
    (5, 5, 0, 0, 0, 1, 1),
    (5, 5, 0, 2, 2, 12, 12),
    (3, 3, 3, 3, 12, 12, 12),
    (0, 3, 3, 3, 12, 12, 12),
)
COMA = ((29, 24, 15, 15), (29, 24, 13, 10), (13, 13, 8, 3), (3, 3, 3, 0))  # rows: verbal 1, 2-3, 4, 5; columns: motor 1-2, 3-4, 5, 6
COMA_SILENT_EYES_CLOSED = (48, 33, 16, 16)  # eyes 1 and verbal 1; what else the table leaves out for closed eyes counts as for open ones
COMORBID = {"aids": 23, "hepaticfailure": 16, "lymphoma": 13, "metastaticcancer": 11, "leukemia": 10, "immunosuppression": 10, "cirrhosis": 4}


def points_of(values: FloatArray, edges: tuple[float, ...], points: tuple[int, ...]) -> FloatArray:
    """`(N,)`: points of the interval that holds each value; 0 where it is NaN.

    >>> points_of(np.array([39.0, 40.0, np.nan]), (40, 50), (8, 5, 0)).tolist()
    [8.0, 5.0, 0.0]
    """
    found = np.asarray(points, dtype=np.float64)[np.searchsorted(edges, values, side="right")]
    return np.where(np.isnan(values), 0.0, found)


def apache_iii_points(findings: Mapping[str, FloatArray]) -> FloatArray:
    """`(N,)`: the APACHE III score, 0 to `MOST_POINTS`.

    Args:
        findings: by eICU's name, `(N,)` each, NaN where not measured: the keys of `POINTS` and `COMORBID`, and creatinine, dialysis, vent, pao2,
            pco2, fio2 (%), ph, eyes, verbal, motor, electivesurgery.
    """
    parts = [points_of(findings[name], *table) for name, table in POINTS.items() if name != "respiratoryrate"]
    parts += [_breathing(findings), _creatinine(findings), _oxygen(findings), _acid_base(findings), _coma(findings), _comorbid(findings)]
    return np.asarray(np.sum(parts, axis=0))


def _breathing(findings: Mapping[str, FloatArray]) -> FloatArray:
    """A ventilated patient's slow breathing is the machine's, and costs nothing."""
    points = points_of(findings["respiratoryrate"], *POINTS["respiratoryrate"])
    return np.where((findings["vent"] == 1) & (findings["respiratoryrate"] < 14), 0.0, points)


def _creatinine(findings: Mapping[str, FloatArray]) -> FloatArray:
    """Acute renal failure is a creatinine of 1.5 mg/dl or more with less than 410 ml of urine, without chronic dialysis."""
    creatinine = findings["creatinine"]
    failing = (creatinine >= 1.5) & (findings["urine"] < 410) & (findings["dialysis"] != 1)
    return np.where(failing, points_of(creatinine, *CREATININE_IN_RENAL_FAILURE), points_of(creatinine, *CREATININE))


def _oxygen(findings: Mapping[str, FloatArray]) -> FloatArray:
    """The gradient from air sacs to artery for the ventilated on half oxygen or more, the arterial pressure for all others."""
    inspired = findings["fio2"] / 100 * WATER_VAPOUR_AND_AIR
    gradient = inspired - findings["pco2"] / RESPIRATORY_QUOTIENT - findings["pao2"]
    helped = (findings["vent"] == 1) & (findings["fio2"] >= 50)
    return np.where(helped, points_of(gradient, *OXYGEN_GRADIENT), points_of(findings["pao2"], *OXYGEN))


def _acid_base(findings: Mapping[str, FloatArray]) -> FloatArray:
    row = np.searchsorted(ACID_BASE_PH, findings["ph"], side="right")
    column = np.searchsorted(ACID_BASE_CO2, findings["pco2"], side="right")
    measured = ~(np.isnan(findings["ph"]) | np.isnan(findings["pco2"]))
    return np.where(measured, np.asarray(ACID_BASE, dtype=np.float64)[np.minimum(row, len(ACID_BASE) - 1), np.minimum(column, 6)], 0.0)


def _coma(findings: Mapping[str, FloatArray]) -> FloatArray:
    eyes, verbal, motor = (findings[name] for name in ("eyes", "verbal", "motor"))
    row, column = np.searchsorted((2, 4, 5), verbal, side="right"), np.searchsorted((3, 5, 6), motor, side="right")
    silent = np.asarray(COMA_SILENT_EYES_CLOSED, dtype=np.float64)[column]
    points = np.where((eyes == 1) & (verbal == 1), silent, np.asarray(COMA, dtype=np.float64)[row, column])
    return np.where(np.isnan(eyes) | np.isnan(verbal) | np.isnan(motor), 0.0, points)


def _comorbid(findings: Mapping[str, FloatArray]) -> FloatArray:
    """The one condition that counts most; none after elective surgery."""
    most = np.max([weight * np.nan_to_num(findings[name]) for name, weight in COMORBID.items()], axis=0)
    return np.where(findings["electivesurgery"] == 1, 0.0, most)
