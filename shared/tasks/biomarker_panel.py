"""Disease or not, from a panel of markers: gene expression or metabolites, more features than patients.

A panel is a list of markers with public bounds, fixed before anybody looks at patients: of a microarray or an assay its maker's. Values are on the
log2 scale, are clipped to the bounds and scaled to [-1, 1]. The shipped panel has 500 markers without a meaning, for synthetic patients; another
panel is a CSV with the columns `marker`, `low`, `high`, and four lines of a module of one's own:

    from pathlib import Path
    from shared.tasks.biomarker_panel import panel_task, read_panel

    def my_panel():
        return panel_task("my-panel", read_panel(Path(__file__).with_name("panel.csv")))

Models: logistic regression (`biomarker_panel`); the same with an elastic net (Zou and Hastie 2005; `biomarker_panel_elastic_net`), the better one
where few markers tell and no privacy is asked for; and a multilayer perceptron (`biomarker_panel_mlp`). The net is a proximal step that a site takes
after its training of a round (federated mirror descent: Yuan, Zaheer and Reddi 2021, algorithm 1): weights are shrunk, and what is small becomes 0.
It is a function of parameters alone, so under privacy it is post-processing. The mean over sites is 0 only where every site has 0, which that paper
calls the curse of primal averaging: count on the order of weights, not on exact zeros.

Legend: N records, M markers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.config import nearest
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.metrics import BINARY_METRICS, FloatArray
from shared.models import mlp
from shared.schema import MISSING_MARKS, MOST_NUMBER_LETTERS, OUT_OF_RANGE_TOLERANCE, TensorSchema, canonical
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import attribute_of, patients_of, refuse_too_many, tolerance_of
from shared.tasks.tabular import attribute_texts, logistic_loss, only_csv, read_csv

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "biomarker-panel"
NUM_MARKERS = 500
HALF_RANGE = 4.0  # log2 units from the middle of a marker's bounds to either
MOST_MISSING = 0.5  # share of a record's markers; of one with more, too little is known
HIDDEN = (16,)
L1_STEP, L2_STEP = 0.02, 0.002  # of the elastic net, a round: what is taken off every weight, and the share of it
CLASSES = ("0", "1")


# Panels -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A marker: its column's name, and the bounds between which its values may plausibly lie, in log2 units, known without looking at the data."""

    name: str
    low: float
    high: float


def shipped_panel() -> tuple[Marker, ...]:
    """The panel of the task as it is shipped: `marker_001` to `marker_500`; bounds that lie about middles drawn once and for all."""
    middles = np.round(generator(0, "panel", NAME).uniform(5.0, 12.0, size=NUM_MARKERS), 1)
    return tuple(
        Marker(name=f"marker_{number:03d}", low=float(middle) - HALF_RANGE, high=float(middle) + HALF_RANGE)
        for number, middle in enumerate(middles.tolist(), start=1)
    )


def read_panel(path: Path) -> tuple[Marker, ...]:
    """The panel in a CSV with the columns `marker`, `low` and `high` (log2 units), in the order of the model's input.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `shared.tasks.tabular.read_csv`.
        ConfigurationError: a column is missing, a marker has no name or stands twice, or its bounds are no finite numbers with low < high.
    """
    frame = read_csv(path)
    absent = [name for name in ("marker", "low", "high") if name not in frame.columns]
    if absent:
        raise ConfigurationError(f"{path.name}: expected column {absent[0]!r}, not found", "a panel has the columns marker, low, high")
    names = frame["marker"].str.strip().tolist()
    low, high = (_numbers(frame[column].to_numpy(dtype=np.object_)) for column in ("low", "high"))
    for row, name in enumerate(names, start=1):
        if name in MISSING_MARKS or name in ("patient", "label", "site") or names.index(name) != row - 1:
            raise ConfigurationError(f"{path.name}: row {row}: expected another marker's name, got none, one twice, or a reserved one", "correct it")
    usable = np.isfinite(low) & np.isfinite(high) & (low < high)
    if not len(names) or not usable.all():
        raise ConfigurationError(f"{path.name}: expected markers with numbers low < high, got others in {int((~usable).sum())} rows", "correct it")
    return tuple(Marker(name=name, low=a, high=b) for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True))


def panel_schema(panel: Sequence[Marker]) -> tuple[TensorSchema]:
    """One input of M markers, which names the panel by a hash of its names and bounds, so that sites with different panels are different tasks."""
    text = "\n".join(f"{marker.name},{marker.low!r},{marker.high!r}" for marker in panel)
    unit = f"log2, each marker's bounds -1 to 1; panel {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return (TensorSchema(name="markers", shape=(len(panel),), unit=unit, low=-1.0, high=1.0),)


# Files --------------------------------------------------------------------------------------------------------------------------


def load_panel(path: Path | None, options: Mapping[str, object], *, name: str, panel: Sequence[Marker]) -> Cohort:
    """A wide CSV: `patient`, `label` (0 or 1), perhaps `site`, and a column for each marker of the panel, in log2 units. Option `tolerance`.

    Other columns are not read. A patient may have several samples, a row each. A missing value takes the middle of its marker's bounds. A record
    is bad, skipped and counted up to `tolerance` (a share, by default one in twenty), where it has no patient, another label, text or
    infinity for a number, over half of the markers missing, or is the same as one before. One without a label is left out.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the file is missing, unreadable or not as declared, too many records are bad, or over one
            value in twenty of a marker is out of bounds.
    """
    tolerance = tolerance_of(options, name)
    if path is None:
        raise DataMissingError(f"task {name} has no data of its own", "give your CSV with --data")
    file = only_csv(path)
    frame = read_csv(file)
    frame.columns = [str(column).strip() for column in frame.columns]
    _require(list(frame.columns), panel, source=file.name)
    if len(frame) == 0:
        raise DataMissingError(f"{file.name}: expected at least one row, got none", "check that this is the right file")
    return _cohort(frame, panel, tolerance=tolerance, source=file.name)


def _require(present: Sequence[str], panel: Sequence[Marker], *, source: str) -> None:
    needed = ("patient", "label", *(marker.name for marker in panel))
    absent = [name for name in needed if name not in present]
    twice = [name for name in needed if f"{name}.1" in present]  # as pandas calls a second one
    if twice:
        raise SchemaError(f"{source}: expected one column {twice[0]!r}, found two", "rename or remove one in the file")
    if absent:
        spare = [name for name in present if name not in needed]
        hints = ", ".join(f"{name!r}{nearest(name, spare)}" for name in absent[:3])
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise SchemaError(f"{source}: expected columns {hints}{more}, not found", "rename or add them in the file")


def _cohort(frame: "pd.DataFrame", panel: Sequence[Marker], *, tolerance: float, source: str, synthetic: bool = False) -> Cohort:
    values = _numbers(frame[[marker.name for marker in panel]].to_numpy(dtype=np.object_))
    label = frame["label"].str.strip()
    missing, unlabelled = np.isnan(values), label.isin(MISSING_MARKS).to_numpy()
    bad = frame["patient"].str.strip().isin(MISSING_MARKS).to_numpy() | frame.duplicated().to_numpy()
    bad |= ~unlabelled & ~label.map(canonical).isin(CLASSES).to_numpy()
    bad |= np.isinf(values).any(axis=1) | (missing.mean(axis=1) > MOST_MISSING)
    if "site" in frame.columns:
        bad |= frame["site"].str.strip().isin(MISSING_MARKS).to_numpy()
    what = "no patient or site, another label, no number, over half of the markers missing, or one twice"
    refuse_too_many(int(bad.sum()), len(frame), tolerance=tolerance, source=source, first=what, bad=bad)
    kept = ~bad & ~unlabelled
    if not kept.any():
        raise DataMissingError(f"{source}: no record is left of {len(frame)}: each lacks its label", "check the column label")
    scaled, num_clipped = _scaled(values[kept], panel, source=source)
    patients = patients_of(frame["patient"].str.strip()[kept].tolist(), source=source)
    sites = {"site": attribute_texts(frame["site"].str.strip())[kept]} if "site" in frame.columns else {}
    return Cohort(
        inputs=(scaled,),
        labels=(label[kept].map(canonical) == "1").to_numpy(dtype=np.float32),
        patient_of_record=patients.patient_of_record,
        patient_ids=patients.patient_ids,
        attributes={key: attribute_of(values_of_key, patients, key, source=source) for key, values_of_key in sites.items()},
        notes={
            "records_bad": int(bad.sum()),
            "records_without_label": int((unlabelled & ~bad).sum()),
            "values_imputed": int(missing[kept].sum()),
            "values_clipped": num_clipped,
        },
        synthetic=synthetic,
    )


def _numbers(text: NDArray[np.object_]) -> FloatArray:
    """Text as numbers of the same shape: NaN where missing, infinity where it is anything but a finite number.

    Not as an array of text, which gives each cell the room of the longest.
    """
    import pandas as pd

    stripped = pd.Series(text.reshape(-1), dtype=object).str.strip()
    missing = stripped.isin(MISSING_MARKS).to_numpy()
    read = ~missing & (stripped.str.len() <= MOST_NUMBER_LETTERS).to_numpy()
    numbers = np.array(pd.to_numeric(stripped.where(read), errors="coerce"), dtype=np.float64)
    return np.where(missing, np.nan, np.where(np.isfinite(numbers), numbers, np.inf)).reshape(text.shape)


def _scaled(values: FloatArray, panel: Sequence[Marker], *, source: str) -> tuple[NDArray[np.float32], int]:
    """`(N, M)` in [-1, 1], 0 where missing, and how many values were clipped.

    Raises:
        SchemaError: of a marker, more than one value and one in twenty lie out of its bounds, as if they were in another unit.
    """
    low, high = (np.array([getattr(marker, bound) for marker in panel]) for bound in ("low", "high"))
    with np.errstate(invalid="ignore"):
        outside = ((values < low) | (values > high)).sum(axis=0)
    present = np.isfinite(values).sum(axis=0)
    wrong = np.flatnonzero(outside > np.maximum(1.0, OUT_OF_RANGE_TOLERANCE * present))
    if len(wrong):
        named = ", ".join(repr(panel[place].name) for place in wrong[:3].tolist())
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SchemaError(
            f"{source}: expected markers within the panel's bounds, got {int(outside[wrong].sum())} of {int(present[wrong].sum())} values outside in {named}{more}",
            "check that values are on the log2 scale, and that the panel is this one",
        )
    scaled = 2 * (np.clip(values, low, high) - low) / (high - low) - 1
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32), int(outside.sum())


# Synthetic patients -------------------------------------------------------------------------------------------------------------

BLOCK = 10  # markers that are regulated together
NUM_INFORMATIVE = 20  # markers that differ by disease, each in a block of its own
_BLOCK_CORRELATION = 0.4
_EFFECT = 0.6  # difference of the means of an informative marker, in standard deviations
_BATCH_SHIFT = 0.5  # of a marker's mean at a site, in standard deviations
_SYNTHETIC_SITES = {"synthetic-1": 0.5, "synthetic-2": 0.4, "synthetic-3": 0.6, "synthetic-4": 0.45}  # share with the disease
_SYNTHETIC_MISSING_RATE = 0.02


def informative_markers(num_markers: int) -> NDArray[np.int64]:
    """Places of the markers that differ by disease in synthetic patients: one in each of up to 20 blocks of ten, the same for every seed."""
    rng = generator(0, "informative", NAME)
    num_blocks = max(1, num_markers // BLOCK)
    blocks = np.sort(rng.permutation(num_blocks)[:NUM_INFORMATIVE])
    return np.asarray(np.minimum(blocks * BLOCK + rng.integers(BLOCK, size=len(blocks)), num_markers - 1))


def synthetic_panel(num_patients: int, seed: int, *, panel: Sequence[Marker]) -> Cohort:
    """Synthetic patients: markers normal about the middle of their bounds, correlated in blocks of ten; of them up to 20 differ by disease.

    Every site measures in a batch of its own, which shifts each marker; two values in a hundred are missing.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    num_markers, truth = len(panel), informative_markers(len(panel))
    rng = generator(seed, "synthetic", NAME)
    names, shares = np.array(list(_SYNTHETIC_SITES)), np.array(list(_SYNTHETIC_SITES.values()))
    site = rng.integers(len(names), size=num_patients)
    diseased = rng.random(num_patients) < shares[site]
    shared_part = np.repeat(rng.normal(size=(num_patients, -(-num_markers // BLOCK))), BLOCK, axis=1)[:, :num_markers]
    own_part = rng.normal(size=(num_patients, num_markers))
    values = _BLOCK_CORRELATION**0.5 * shared_part + (1 - _BLOCK_CORRELATION) ** 0.5 * own_part
    signs = generator(0, "signs", NAME).choice([-1.0, 1.0], size=len(truth))
    values[:, truth] += _EFFECT * signs * (diseased[:, None] - 0.5)
    values += (_BATCH_SHIFT * rng.normal(size=(len(names), num_markers)))[site]
    values[rng.random(values.shape) < _SYNTHETIC_MISSING_RATE] = np.nan
    low, high = (np.array([getattr(marker, bound) for marker in panel]) for bound in ("low", "high"))
    scaled, num_clipped = _scaled((low + high) / 2 + values * (high - low) / (2 * HALF_RANGE), panel, source="synthetic")
    return Cohort(
        inputs=(scaled,),
        labels=diseased.astype(np.float32),
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site]},
        notes={"values_imputed": int(np.isnan(values).sum()), "values_clipped": num_clipped},
        synthetic=True,
    )


# The task -----------------------------------------------------------------------------------------------------------------------


def elastic_net_step(model: nn.Module) -> None:
    """Shrink every weight in place by the proximal map of the elastic net, as a refinement after a round: a bias is left alone.

    The map of L1 |w| + L2 w^2 / 2 with a step of 1 (Parikh and Boyd 2014, section 6.5): sign(w) max(|w| - L1, 0) / (1 + L2).
    """
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(nn.functional.softshrink(layer.weight, L1_STEP) / (1 + L2_STEP))


def strongest_markers(model: nn.Module, panel: Sequence[Marker], count: int) -> list[tuple[Marker, float]]:
    """The markers with the largest weights of a linear model of this panel, by size, and the weight of each, per half of its bounds.

    A weight says what helps to predict beside all others. It is no test: correlated markers share a weight, or take it from each other.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if len(linear) != 1 or linear[0].weight.shape != (1, len(panel)):
        raise ConfigurationError(
            f"expected a linear model of {len(panel)} markers, got another", "use the linear task, and the panel it was trained with"
        )
    weights = linear[0].weight.detach().numpy()[0].astype(np.float64)
    order = np.argsort(-np.abs(weights), kind="stable")[:count]
    return [(panel[place], float(weights[place])) for place in order.tolist()]


def panel_task(
    name: str, panel: Sequence[Marker], *, hidden: tuple[int, ...] = (), elastic_net: bool = False, default_study: str | None = None
) -> Task:
    """The task of this panel.

    Args:
        hidden: widths of hidden layers; none is logistic regression.
        elastic_net: whether a site takes a proximal step after every round; its sites are then trained one after another. The task's name then ends
            in "-elastic-net": it learns another model in the same architecture, and both sides of a federation must mean the same.
    """
    markers, name = tuple(panel), f"{name}-elastic-net" if elastic_net else name

    def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
        return load_panel(path, options, name=name, panel=markers)

    load_cohort.__doc__ = load_panel.__doc__
    return Task(
        name=name,
        title="Disease, from a panel of molecular markers",
        modality="molecular panel",
        schema=panel_schema(markers),
        load_cohort=load_cohort,
        synthetic_cohort=lambda num_patients, seed: synthetic_panel(num_patients, seed, panel=markers),
        model=lambda: mlp(len(markers), 1, hidden=hidden),
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="a hospital's own wide CSV; the shipped panel's 500 markers are of synthetic patients alone",
        default_study=default_study,
        refine=elastic_net_step if elastic_net else None,
    )


def biomarker_panel() -> Task:
    """The task `biomarker-panel`: logistic regression on the shipped panel."""
    return panel_task(NAME, shipped_panel(), default_study="biomarker-panel.toml")


def biomarker_panel_elastic_net() -> Task:
    """The same with an elastic net: `shared.tasks.biomarker_panel:biomarker_panel_elastic_net`."""
    return panel_task(NAME, shipped_panel(), elastic_net=True, default_study="biomarker-panel.toml")


def biomarker_panel_mlp() -> Task:
    """The same with a hidden layer: `shared.tasks.biomarker_panel:biomarker_panel_mlp`."""
    return panel_task(NAME, shipped_panel(), hidden=HIDDEN, default_study="biomarker-panel.toml")
