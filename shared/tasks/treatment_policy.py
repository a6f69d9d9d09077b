"""A policy of doses learned from what clinicians did: conservative Q-learning (Kumar, Zhou, Tucker, Levine 2020, arXiv:2006.04779). It is no advice.

A course is up to twelve steps of a patient: what was observed, which of five doses was given, and a reward. The model values each dose, Q(s, a); its loss
is equation 4 there with the regulariser of CQL(H), per step

    (r + gamma max_a' Q'(s', a') - Q(s, a))^2 / 2 + alpha (log sum_a' exp Q(s, a') - Q(s, a))

where a' of the maximum is the one that Q itself prefers (van Hasselt, Guez, Silver 2016, arXiv:1509.06461) and Q' is a copy that stands still while a site
trains (Mnih et al. 2015). The second term keeps down the value of doses that nobody gave in such a state. A record is a whole course, its loss the mean
over its steps, so that a patient is one gradient to clip. The copy follows in `Task.refine`, a function of the parameters alone: post-processing.

What a policy is worth cannot be told from logged courses: a policy that does what they do not is judged by a model, and confounders that nobody logged
stay. The metrics say how well the values fit, and how far the policy is from the clinicians. In `synthetic_cohort` the truth is known: a small simulator
of a patient in shock, made for this and fitted to nobody (`observed`, `stepped`), in which `benchmarks/treatment_policy.py` lets the policy act.

Legend: N courses, T steps, S features of a state, A doses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from shared.cohort import Cohort
from shared.config import Real, Settings, validate
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.metrics import Metric, Statistic
from shared.schema import MISSING_MARKS, TensorSchema
from shared.seeding import generator
from shared.task import ExplainedOutput, Task
from shared.tasks.eicu import numbers_of
from shared.tasks.images import told_rows
from shared.tasks.tabular import attribute_texts
from shared.tasks.text import read_texts, text_file

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NAME = "treatment-policy"
NUM_STEPS, NUM_DOSES, WIDTH = 12, 5, 32  # T, A
DISCOUNT = 0.95  # gamma
CONSERVATISM = 0.1  # alpha
FOLLOWS = 0.5  # of the way that the copy goes to Q in a round
RANGES = {"pressure": (-2.0, 2.0), "lactate": (0.0, 4.0), "response": (0.0, 2.0)}  # of the state's columns, in the units of the simulator
MAY_BE_MISSING = "lactate"
COLUMNS = ("patient", "step", *RANGES, "dose", "reward", "done")
FEATURES = (*RANGES, f"{MAY_BE_MISSING} not measured", "step")
MOST_RETURN = (1 - DISCOUNT**NUM_STEPS) / (1 - DISCOUNT)  # rewards are from -1 to 1
MOST_ERROR = 4.0
SITES = ("north", "south", "east", "west")
NO_ADVICE = "It is no advice for any patient."

SCHEMA = (TensorSchema(name="states", shape=(NUM_STEPS, len(FEATURES)), unit=", ".join(FEATURES), low=-1, high=1),)


# Model and loss -----------------------------------------------------------------------------------------------------------------


class DoseValues(nn.Module):
    """`(N, T, S) -> (N, T, 2 A)`: the value of each dose by Q, and by the copy of it that stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.target = _values(), _values()
        self.target.requires_grad_(False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Values by Q, then by its copy."""
        return torch.cat([self.q(states), self.target(states)], dim=-1)


def _values() -> nn.Sequential:
    return nn.Sequential(nn.Linear(len(FEATURES), WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, NUM_DOSES))


def follow(model: nn.Module) -> None:
    """Move the copy `FOLLOWS` of the way to Q, in place."""
    assert isinstance(model, DoseValues)
    with torch.no_grad():
        for still, moved in zip(model.target.parameters(), model.q.parameters(), strict=True):
            still.lerp_(moved, FOLLOWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Of every step of a course: the difference to its target, what the regulariser adds, and whether there was such a step; `(N, T)` each."""

    difference: torch.Tensor
    conservatism: torch.Tensor
    present: torch.Tensor


def fit_of(outputs: torch.Tensor, labels: torch.Tensor) -> Fit:
    """How the values fit what happened.

    Args:
        outputs: `(N, T, 2 A)`.
        labels: `(N, T, 4)`: dose, reward, 1 where a step follows, 1 where there was such a step.
    """
    values, still = outputs[..., :NUM_DOSES], outputs[..., NUM_DOSES:]
    dose, reward, goes_on, present = labels.unbind(dim=-1)
    of_dose = values.gather(-1, dose.long().unsqueeze(-1)).squeeze(-1)
    best = values.detach().argmax(dim=-1, keepdim=True)
    there = still.gather(-1, best).squeeze(-1)
    after = torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], dim=1)
    target = reward + DISCOUNT * goes_on * after
    return Fit(difference=target.detach() - of_dose, conservatism=values.logsumexp(dim=-1) - of_dose, present=present)


def conservative_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each course, `(N,)`: the mean over its steps."""
    fit = fit_of(outputs, labels)
    steps = (fit.difference.square() / 2 + CONSERVATISM * fit.conservatism) * fit.present
    return steps.sum(dim=1) / fit.present.sum(dim=1).clamp(min=1)


# Metrics ------------------------------------------------------------------------------------------------------------------------


def course_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(5,)`: patients; squared differences to the target; agreement with the dose given; value at the start and return as logged; each in [0, 1].

    Args:
        predictions: `(N, T, 2 A)`.
    """
    labels = np.asarray(cohort.labels, dtype=np.float64)
    outputs = torch.from_numpy(np.nan_to_num(predictions, nan=0.0, posinf=1e6, neginf=-1e6))
    fit = fit_of(outputs, torch.from_numpy(labels))
    present = labels[..., 3]
    steps = np.maximum(present.sum(axis=1), 1)
    error = (np.minimum(fit.difference.numpy() ** 2, MOST_ERROR) * present).sum(axis=1) / steps / MOST_ERROR
    values = outputs[..., :NUM_DOSES].numpy()
    agreement = ((values.argmax(axis=-1) == labels[..., 0]) * present).sum(axis=1) / steps
    logged = (labels[..., 1] * present) @ DISCOUNT ** np.arange(NUM_STEPS)
    shares = [(np.clip(each, -MOST_RETURN, MOST_RETURN) / MOST_RETURN + 1) / 2 for each in (values[:, 0].max(axis=-1), logged)]
    return np.asarray(cohort.record_weights() @ np.column_stack([np.ones(len(error)), error, agreement, *shares]))


def _sums_agree(sums: FloatArray) -> bool:
    return bool((sums[1:] <= sums[0] * (1 + 1e-9) + 1e-9).all())


def _share(sums: FloatArray, place: int) -> float | None:
    return float(sums[place] / sums[0]) if sums[0] > 0 else None


def _return(sums: FloatArray, place: int) -> float | None:
    share = _share(sums, place)
    return None if share is None else (2 * share - 1) * MOST_RETURN


def _error(sums: FloatArray) -> float | None:
    share = _share(sums, 1)
    return None if share is None else share * MOST_ERROR


COURSES = Statistic(name="courses", shape=(5,), summarise=course_sums, sensitivity=math.sqrt(5), is_counts=False, agrees=_sums_agree)
METRICS = (
    Metric(name="td_error", statistic=COURSES, finish=_error, higher_is_better=False, low=0, high=MOST_ERROR),
    Metric(name="agreement", statistic=COURSES, finish=lambda sums: _share(sums, 2), low=0, high=1),
    Metric(name="believed_return", statistic=COURSES, finish=lambda sums: _return(sums, 3), low=-MOST_RETURN, high=MOST_RETURN),
    Metric(name="logged_return", statistic=COURSES, finish=lambda sums: _return(sums, 4), low=-MOST_RETURN, high=MOST_RETURN),
)


# States as the model takes them -------------------------------------------------------------------------------------------------


def encoded(values: FloatArray, step: IntArray) -> NDArray[np.float32]:
    """Columns of `RANGES` `(..., 3)`, NaN where lactate was not measured, at this step `(...)` -> features `(..., S)` in [-1, 1]."""
    ends = np.array(list(RANGES.values()))
    scaled = np.clip(2 * (values - ends[:, 0]) / (ends[:, 1] - ends[:, 0]) - 1, -1, 1)
    missing = np.isnan(values[..., list(RANGES).index(MAY_BE_MISSING)])
    time = 2 * step / (NUM_STEPS - 1) - 1
    return np.concatenate([np.nan_to_num(scaled), missing[..., None], time[..., None]], axis=-1).astype(np.float32)


# Files --------------------------------------------------------------------------------------------------------------------------


class PolicyOptions(Settings):
    """Options of the loader."""

    tolerance: Real = Field(default=0.05, ge=0, le=0.5, description="share of the patients that may be left out because of a bad row")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    values: FloatArray = field(repr=False)  # (R, 3)
    step: IntArray = field(repr=False)  # (R,)
    told: FloatArray = field(repr=False)  # (R, 3): dose, reward, done
    good: NDArray[np.bool_] = field(repr=False)  # (R,)


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """The courses of a CSV, or of the only one in a folder, with a row a step: patient, step (0 to 11), pressure, lactate (may be empty), response, dose (0 to 4), reward (-1 to 1), done.

    Steps of a patient follow one another from 0, and the last one alone is done. A column "site" is optional. A patient with a bad row is left out.

    Raises:
        DataMissingError, DataAccessError: there is no file, it may not be read, or has no row.
        SchemaError: it is no CSV of at most 1 GiB, a column is missing or twice, a row has no patient, or more patients than `tolerance` have a bad row.
        ConfigurationError: an option is not known.
    """
    settings = validate(PolicyOptions, dict(options), f"task {NAME}: options of its loader")
    file = text_file(path, NAME)
    frame = read_texts(file, COLUMNS)
    if frame["patient"].isin(MISSING_MARKS).any():
        raise SchemaError(f"{file.name}: expected a patient's identifier in every row, got one without", "fill it in")
    rows = _rows(frame)
    sites = attribute_texts(frame["site"]) if "site" in frame.columns else None
    return _courses(frame["patient"].tolist(), rows, sites, tolerance=settings.tolerance, source=file.name)


def _rows(frame: "pd.DataFrame") -> _Rows:
    numbers = {name: numbers_of(frame[name].where(~frame[name].isin(MISSING_MARKS), "")) for name in COLUMNS[1:]}  # NaN where missing, else inf
    good = np.ones(len(frame), dtype=np.bool_)
    limits = {**RANGES, "step": (0, NUM_STEPS - 1), "dose": (0, NUM_DOSES - 1), "reward": (-1, 1), "done": (0, 1)}
    for name, (low, high) in limits.items():
        within = (numbers[name] >= low) & (numbers[name] <= high)  # False of NaN
        whole = (numbers[name] == np.round(numbers[name])) if name in ("step", "dose", "done") else True
        good &= (within & whole) | (np.isnan(numbers[name]) if name == MAY_BE_MISSING else False)
    step = np.where(good, numbers["step"], 0).astype(np.int64)
    told = np.column_stack([np.where(good, numbers[name], 0) for name in ("dose", "reward", "done")])
    return _Rows(values=np.column_stack([numbers[name] for name in RANGES]), step=step, told=told, good=good)


def _courses(patients: Sequence[str], rows: _Rows, sites: NDArray[np.str_] | None, *, tolerance: float, source: str) -> Cohort:
    """The courses of those who have no bad row."""
    index: dict[str, int] = {}
    owner = np.array([index.setdefault(name, len(index)) for name in patients], dtype=np.int64)
    count = np.bincount(owner)
    seen = np.zeros((len(index), NUM_STEPS), dtype=np.int64)
    np.add.at(seen, (owner, rows.step), 1)
    follows = (seen == (np.arange(NUM_STEPS) < count[:, None])).all(axis=1)  # each step from 0 once
    last = rows.step == count[owner] - 1
    bad_rows = ~rows.good | ((rows.told[:, 2] == 1) != last)
    first = np.unique(owner, return_index=True)[1]
    if sites is not None:
        bad_rows |= sites != sites[first][owner]
    usable = follows & (np.bincount(owner, weights=bad_rows) == 0)
    if (~usable).sum() > tolerance * len(index) or not usable.any():
        rows_told = f": {told_rows(bad_rows | ~follows[owner])}" if tolerance == 0 else ""
        raise SchemaError(
            f"{source}: expected at most a share of {tolerance:g} of patients with a bad row, got {(~usable).sum()} of {len(index)}{rows_told} "
            "(a value outside its range or set, a step twice or left out, or done elsewhere than at the last step, or two sites)",
            "correct the export",
        )
    states = np.zeros((len(index), NUM_STEPS, len(FEATURES)), dtype=np.float32)
    labels = np.zeros((len(index), NUM_STEPS, 4), dtype=np.float32)
    kept = usable[owner]
    where = (owner[kept], rows.step[kept])
    states[where] = encoded(rows.values[kept], rows.step[kept])
    labels[where] = np.column_stack([rows.told[kept, 0], rows.told[kept, 1], 1 - rows.told[kept, 2], np.ones(kept.sum())])
    chosen = np.flatnonzero(usable)
    names = list(index)
    return Cohort(
        inputs=(states[usable],),
        labels=labels[usable],
        patient_of_record=np.arange(len(chosen), dtype=np.int64),
        patient_ids=tuple(names[place] for place in chosen.tolist()),
        attributes={} if sites is None else {"site": sites[first][usable]},
        notes={"patients_dropped": int((~usable).sum())},
    )


# The simulator: a patient in shock, made for this ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Patients:
    """Simulated patients between two steps: pressure (0 is right), lactate, response to the drug, each `(N,)`; who has not died."""

    pressure: FloatArray = field(repr=False)
    lactate: FloatArray = field(repr=False)
    response: FloatArray = field(repr=False)
    alive: NDArray[np.bool_] = field(repr=False)


def admitted(num_patients: int, rng: np.random.Generator) -> Patients:
    """Patients with low pressure, each with a response of their own."""
    return Patients(
        pressure=np.clip(rng.normal(-1.0, 0.3, size=num_patients), -2, 2),
        lactate=np.clip(rng.normal(2.0, 0.5, size=num_patients), 0, 4),
        response=rng.uniform(0.3, 1.7, size=num_patients),
        alive=np.ones(num_patients, dtype=np.bool_),
    )


def stepped(patients: Patients, dose: IntArray, rng: np.random.Generator) -> tuple[Patients, FloatArray]:
    """The patients after a dose, and the reward of each: pressure near 0 and low lactate are good, a dose costs a little, death -1; 0 of who died before.

    Pressure falls by itself and rises with dose times response; lactate rises where pressure is low, and where it is high, more so.
    """
    size = len(dose)
    pressure = 0.7 * patients.pressure - 0.35 + 0.3 * dose * patients.response + 0.1 * rng.normal(size=size)
    strain = np.maximum(-pressure - 0.2, 0) + 1.5 * np.maximum(pressure - 0.2, 0)
    lactate = 0.8 * patients.lactate + 0.8 * strain + 0.1 * np.abs(rng.normal(size=size))
    pressure, lactate = np.clip(pressure, -2, 2), np.clip(lactate, 0, 4)
    dies = rng.random(size) < 0.25 / (1 + np.exp(-3 * (lactate - 3)))
    reward = np.where(dies, -1.0, 1 - np.minimum(np.abs(pressure), 1) - 0.2 * lactate - 0.02 * dose)
    after = Patients(pressure=pressure, lactate=lactate, response=patients.response, alive=patients.alive & ~dies)
    return after, np.where(patients.alive, np.clip(reward, -1, 1), 0.0)


def observed(patients: Patients, rng: np.random.Generator) -> FloatArray:
    """`(N, 3)` as `RANGES`; lactate is measured in seven of ten steps, else NaN."""
    lactate = np.where(rng.random(len(patients.alive)) < 0.7, patients.lactate, np.nan)
    return np.column_stack([patients.pressure, lactate, patients.response])


def clinicians(values: FloatArray, site: IntArray, rng: np.random.Generator) -> IntArray:
    """Doses `(N,)` of clinicians who go by the pressure alone: with site-wise habits, and now and then any dose."""
    habit = np.array([0.0, 0.9, -0.7, 0.4])[site]
    wanted = 1.3 - 1.2 * values[:, 0] + habit + 0.8 * rng.normal(size=len(site))
    dose = np.clip(np.round(wanted), 0, NUM_DOSES - 1).astype(np.int64)
    return np.where(rng.random(len(site)) < 0.15, rng.integers(0, NUM_DOSES, size=len(site)), dose)


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Simulated courses at four sites, logged by their clinicians.

    Raises:
        DataMissingError: fewer than one patient is asked for.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one patient, got fewer", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    site = np.arange(num_patients) % len(SITES)
    patients = admitted(num_patients, rng)
    states = np.zeros((num_patients, NUM_STEPS, len(FEATURES)), dtype=np.float32)
    labels = np.zeros((num_patients, NUM_STEPS, 4), dtype=np.float32)
    for step in range(NUM_STEPS):
        values = observed(patients, rng)
        dose = clinicians(values, site, rng)
        there = patients.alive
        states[there, step] = encoded(values, np.full(num_patients, step))[there]
        patients, reward = stepped(patients, dose, rng)
        goes_on = patients.alive & (step < NUM_STEPS - 1)
        labels[there, step] = np.column_stack([dose, reward, goes_on, there])[there]
    return Cohort(
        inputs=(states,),
        labels=labels,
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": np.array(SITES)[site]},
        synthetic=True,
    )


def greedy(outputs: FloatArray) -> IntArray:
    """The dose that Q values most, `(N,)`, of outputs `(N, 2 A)` for a step."""
    if outputs.shape[-1] != 2 * NUM_DOSES:
        raise ConfigurationError(f"expected values of {NUM_DOSES} doses by Q and by its copy, got another number", "give the model's outputs")
    return np.asarray(outputs[..., :NUM_DOSES].argmax(axis=-1), dtype=np.int64)


def course_rows(predictions: NDArray[np.generic], inputs: tuple[NDArray[np.generic], ...]) -> FloatArray:
    """`(N, 3)`: the value at the start of the dose that Q prefers there, the number of the last step, and the dose that Q prefers at it.

    Args:
        predictions: `(N, T, 2 A)`.
        inputs: the states `(N, T, S)`; of a step that there was, the time is never 0.
    """
    there = inputs[0][..., FEATURES.index("step")] != 0
    last = NUM_STEPS - 1 - there[:, ::-1].argmax(axis=1)
    values = predictions[..., :NUM_DOSES].astype(np.float64)
    dose = values[np.arange(len(values)), last].argmax(axis=1)
    return np.column_stack([values[:, 0].max(axis=1), last, dose])


def treatment_policy() -> Task:
    """The task `treatment-policy`."""
    return Task(
        name=NAME,
        title=f"Doses by conservative Q-learning from logged courses; for research on methods alone. {NO_ADVICE[:-1]}",
        modality="trajectories",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=DoseValues,
        loss=conservative_loss,
        predict=lambda outputs: outputs,
        metrics=METRICS,
        primary_metric="td_error",
        source=f"a simulator made for this task; a CSV of courses with --data. {NO_ADVICE}",
        default_study=f"{NAME}.toml",
        refine=follow,
        predicted=("believed_return", "last_step", "preferred_dose"),
        row=course_rows,
        explained=ExplainedOutput(
            words="the value of the preferred dose at the first step", of=lambda outputs: outputs[:, 0, :NUM_DOSES].amax(dim=-1)
        ),
    )
