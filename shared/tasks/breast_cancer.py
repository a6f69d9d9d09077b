"""Breast cancer (Wisconsin Diagnostic): is a mass malignant, from 30 measures of cell nuclei in a fine-needle aspirate.

Data: Wolberg, Street, Mangasarian 1995, UCI ML Repository, as bundled with scikit-learn: 569 real patients, one record each.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cohort import Cohort
from shared.schema import Column, TableSchema
from shared.task import Task
from shared.tasks.tabular import ModelOptions, cohort_from_frame, load_table, reject_options, table_task

# Public ranges: those of the data set's published description, rounded outward. (mean), (standard error), (worst).
_RANGES = {
    "radius": ("0.01 mm", (6, 30), (0.1, 3), (7, 40)),
    "texture": ("grey levels", (9, 40), (0.3, 5), (12, 50)),
    "perimeter": ("0.01 mm", (40, 190), (0.7, 22), (50, 260)),
    "area": ("0.0001 mm2", (140, 2600), (6, 550), (180, 4300)),
    "smoothness": ("", (0.05, 0.17), (0.001, 0.032), (0.07, 0.23)),
    "compactness": ("", (0.015, 0.35), (0.002, 0.14), (0.02, 1.1)),
    "concavity": ("", (0, 0.43), (0, 0.4), (0, 1.3)),
    "concave points": ("", (0, 0.21), (0, 0.055), (0, 0.3)),
    "symmetry": ("", (0.1, 0.31), (0.007, 0.08), (0.15, 0.67)),
    "fractal dimension": ("", (0.045, 0.1), (0.0008, 0.03), (0.05, 0.21)),
}


def _columns() -> tuple[Column, ...]:
    names = ("mean {}", "{} error", "worst {}")
    return tuple(
        Column(
            name=pattern.format(measure),
            type="number",
            unit=unit,
            low=ranges[part][0],
            high=ranges[part][1],
            scale="log" if ranges[part][0] > 0 else "linear",
        )
        for part, pattern in enumerate(names)
        for measure, (unit, *ranges) in _RANGES.items()
    )


SCHEMA = TableSchema(
    name="breast-cancer",
    title="Breast cancer: malignant or benign, from cell nuclei",
    label=Column(name="diagnosis", type="binary", categories=("benign", "malignant")),
    columns=_columns(),
)

MODEL = ModelOptions(hidden=(16,))

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The bundled 569 patients where `path` is None, else a CSV file of the same columns."""
    if path is not None:
        return load_table(path, SCHEMA, options)
    reject_options(options, SCHEMA.name)
    return copy.deepcopy(_bundled())


@functools.cache
def _bundled() -> Cohort:
    """Read once in a process: a sweep has many runs."""
    from sklearn.datasets import load_breast_cancer  # a second to import: only here

    bundle = load_breast_cancer(as_frame=True)
    frame: pd.DataFrame = bundle.data.astype(str)
    frame["diagnosis"] = bundle.target.map({0: "malignant", 1: "benign"})
    return cohort_from_frame(frame, SCHEMA, source="wisconsin")


def normalised() -> Task:
    """The task `breast-cancer` with LayerNorm in its hidden layer, for strategies that keep normalisation at a site."""
    return breast_cancer(ModelOptions(hidden=(16,), normalise=True))


def breast_cancer(model: ModelOptions = MODEL) -> Task:
    """The task `breast-cancer`."""
    return table_task(
        SCHEMA,
        load_cohort=load_cohort,
        model=model,
        source="Wolberg, Street, Mangasarian 1995 (UCI), as bundled with scikit-learn",
        bundled=True,
        default_study="breast-cancer.toml",
    )
