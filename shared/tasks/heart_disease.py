"""Heart disease in four hospitals: is there a narrowed coronary vessel, from routine findings.

Data: Janosi, Steinbrunn, Pfisterer, Detrano 1988, UCI ML Repository: Cleveland, Hungarian, Switzerland, VA Long Beach.
Rows, columns and split are those of FLamby's Fed-Heart-Disease (Ogier du Terrail et al. 2022): slope, ca and thal are left out, rows
with a missing value are dropped (740 remain), and the split is stratified in each hospital with scikit-learn's generator seeded 43.
Two things differ, and both make the features public: scaling is by declared clinical ranges, and a cholesterol of 0 (all of
Switzerland) means "not measured", as its own column says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort
from shared.errors import DataAccessError, DataMissingError, SchemaError
from shared.schema import MISSING_MARKS, Column, TableSchema
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.tabular import ModelOptions, cohort_from_frame, read_csv, reject_options, table_task

SITES = ("cleveland", "hungarian", "switzerland", "va")
FILE_COLUMNS = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"]
LEFT_OUT = ["slope", "ca", "thal"]
SPLIT_SEED = 43
TEST_SHARE = 0.34

SCHEMA = TableSchema(
    name="heart-disease",
    title="Coronary heart disease, from routine findings",
    label=Column(name="disease", type="binary", categories=("absent", "present")),
    site="site",
    columns=(
        Column(name="age", type="number", unit="years", low=20, high=90),
        Column(name="sex", type="binary"),
        Column(name="cp", type="category", categories=("1", "2", "3", "4")),
        Column(name="trestbps", type="number", unit="mmHg", low=80, high=220, missing_codes=("0",)),
        Column(name="chol", type="number", unit="mg/dl", low=80, high=620, missing="indicator", missing_codes=("0",)),
        Column(name="fbs", type="binary"),
        Column(name="restecg", type="category", categories=("0", "1", "2")),
        Column(name="thalach", type="number", unit="beats/min", low=60, high=220),
        Column(name="exang", type="binary"),
        Column(name="oldpeak", type="number", unit="mm", low=-3, high=7),
    ),
    subgroups=(Subgroup(attribute="sex", names={"0": "female", "1": "male"}), Subgroup(attribute="age", edges=(50, 65))),
)

MODEL = ModelOptions(hidden=())

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """One hospital's file, or a folder of `processed.<hospital>.data`. No options.

    Raises:
        DataMissingError, DataAccessError, SchemaError: a file is missing, unreadable or not as declared.
    """
    import pandas as pd

    reject_options(options, SCHEMA.name)
    if path is None:
        raise DataMissingError(
            "task heart-disease has no data of its own", "run 'wardround data fetch heart-disease', or give the folder with --data"
        )
    files = hospital_files(path)
    frames = [_read_hospital(file, name) for name, file in files.items()]
    frame = pd.concat(frames, ignore_index=True)
    cohort = cohort_from_frame(frame.drop(columns="test"), SCHEMA, source=path.name)
    notes = {**cohort.notes, "records_dropped": sum(int(part.attrs["dropped"]) for part in frames)}
    return _with_split(cohort, frame["test"].to_numpy(dtype=np.bool_), notes)


def _with_split(cohort: Cohort, test: NDArray[np.bool_], notes: Mapping[str, int]) -> Cohort:
    assert len(test) == cohort.num_patients  # the loader has already dropped every row that the schema would drop
    return Cohort(
        inputs=cohort.inputs,
        labels=cohort.labels,
        patient_of_record=cohort.patient_of_record,
        patient_ids=cohort.patient_ids,
        attributes=cohort.attributes,
        published_test=test,
        notes=notes,
    )


def hospital_files(path: Path) -> dict[str, Path]:
    """Hospital -> its file, in the order of `SITES`.

    Raises:
        DataMissingError: `path` is absent, or the folder holds no such file.
    """
    if not path.exists():
        raise DataMissingError(f"{path}: expected data, found nothing", "check the path given with --data")
    try:
        candidates = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    except PermissionError:
        raise DataAccessError(f"{path}: this user may not read the folder", "change its permissions") from None
    found = {name: file for name in SITES for file in candidates if file.name == f"processed.{name}.data"}
    if not found:
        raise DataMissingError(
            f"{path}: expected processed.<hospital>.data for one of {', '.join(SITES)}, found none", "run 'wardround data fetch heart-disease'"
        )
    return found


def _read_hospital(file: Path, name: str) -> "pd.DataFrame":
    import pandas as pd

    _check_num_columns(file)
    raw = read_csv(file, names=FILE_COLUMNS).astype(str)
    kept = raw.drop(columns=LEFT_OUT)
    for column in kept.columns:
        if kept[column].isin(MISSING_MARKS).all():
            raise SchemaError(f"{file.name}: column {column!r}: all {len(kept)} values are missing", "fetch the file again")
    frame = kept[~kept.isin(MISSING_MARKS).any(axis=1)].reset_index(drop=True)
    if len(frame) == 0:
        raise DataMissingError(f"{file}: no row is without a missing value", "fetch the file again")
    num = pd.to_numeric(frame["num"], errors="coerce")
    if num.isna().any():
        raise SchemaError(
            f"{file.name}: column 'num': expected numbers, got text in {int(num.isna().sum())} rows",
            "check that the file has the 14 columns of the UCI description",
        )
    frame = frame.drop(columns="num").assign(disease=np.where(num > 0, "present", "absent"), site=name)
    frame["test"] = published_split(frame["disease"].to_numpy(dtype=np.str_))
    frame.attrs["dropped"] = len(raw) - len(frame)
    return frame


def _check_num_columns(file: Path) -> None:
    """Raise `SchemaError` unless the first line has the 14 values of the UCI description; what cannot be read, `read_csv` says."""
    try:
        with open(file, encoding="utf-8") as lines:
            num_values = len(lines.readline().split(","))
    except (OSError, UnicodeDecodeError):
        return
    if num_values not in (1, len(FILE_COLUMNS)):
        raise SchemaError(f"{file.name}: expected {len(FILE_COLUMNS)} columns ({', '.join(FILE_COLUMNS)}), got {num_values}", "fetch the file again")


def published_split(labels: NDArray[np.str_]) -> NDArray[np.bool_]:
    """`(N,)`, True for FLamby's test rows of one hospital; stratified unless a class has two rows or fewer."""
    from sklearn.model_selection import train_test_split  # a second to import: only here

    _, counts = np.unique(labels, return_counts=True)
    test = np.zeros(len(labels), dtype=np.bool_)
    if len(labels) < 4:
        return test
    stratify = labels if counts.min() > 2 else None
    _, chosen = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, train_size=1 - TEST_SHARE, random_state=SPLIT_SEED, shuffle=True, stratify=stratify
    )
    test[chosen] = True
    return test


def normalised() -> Task:
    """The task `heart-disease` with one hidden layer and LayerNorm in it, for strategies that keep normalisation at a site."""
    return heart_disease(ModelOptions(hidden=(16,), normalise=True))


def heart_disease(model: ModelOptions = MODEL) -> Task:
    """The task `heart-disease`."""
    return table_task(
        SCHEMA,
        load_cohort=load_cohort,
        model=model,
        source="Janosi, Steinbrunn, Pfisterer, Detrano 1988 (UCI); split of FLamby",
        sites=SITES,
        default_study="heart-disease.toml",
    )
