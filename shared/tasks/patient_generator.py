"""Synthetic patients with heart disease or without: a generative adversarial network (Goodfellow et al. 2014, arXiv:1406.2661), federated.

A generator makes patients from noise, columns and diagnosis together; a discriminator tells them from real ones (logistic loss, and for the generator
the one that does not saturate, section 3 there). It has a logit for each diagnosis, and a patient is judged by that of the patient's own: a
projection of the label (Miyato and Koyama 2018, arXiv:1802.05637) with a part for each class. Categories are drawn by the Gumbel-max trick, with
the gradient of its softmax (Jang, Gu and Poole 2017, arXiv:1611.01144, "straight-through"). Several hospitals: each trains its discriminator on
its own patients and a generator against it, and both are averaged (FedGAN: Rasouli, Sun and Rajagopal 2020, arXiv:2006.07228).

Privacy (Xie et al. 2018, arXiv:1802.06739, and Augenstein et al. 2020, arXiv:1911.06679, for federations). Theorem: what a site sends in a round is
a function of its private release of that round and of a key that is independent of its patients, so it is as private as that release, whose
guarantee stands in `client.private_training`. Proof: a record meets the discriminator alone, whose step is clipped by record or patient and noised. The
loss of a record is that of the real patient plus that of one made for it from noise drawn for it, by a generator that stands still in these steps
(no gradient is asked of it, and that it stood still is checked); so a record's gradient depends on that record, parameters and key alone. The
generator moves in `Task.refine`, which is given the trained parameters and draws, and no patient: post-processing (Dwork and Roth 2014, proposition
2.1). Also how common the disease is, is learned in this way: no statistic of a site enters otherwise. Synthetic patients are drawn from the released
parameters, so any number of them costs nothing. Without privacy there is no guarantee, and a synthetic patient may be near a real one:
`closest_distances` looks.

What is reported is "train on synthetic, test on real" (Esteban, Hyland and Rae 2017, arXiv:1706.02633): in evaluation the model draws patients from
its generator, fits a logistic regression to them, and the fit scores the real test patients that it is given. So a metric sees real patients only as
any other task's does.

Legend: N records, F features, D widths of the generator's output, M synthetic patients, L noise entries.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.metrics import BINARY_METRICS
from shared.models import Parameters, set_parameters
from shared.schema import Column, TableSchema
from shared.seeding import derive
from shared.task import ExplainedOutput, Task
from shared.tasks import heart_disease

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "patient-generator"
NOISE = 16  # L
GENERATOR_WIDTH, DISCRIMINATOR_WIDTH = 48, 48
TEMPERATURE = 0.7  # of the softmax whose gradient stands for that of a draw
GENERATOR_STEPS, GENERATOR_BATCH = 10, 128  # of a round at a site
GENERATOR_RATE = 2e-3
GENERATOR_MEMORY = (0.5, 0.9)  # Adam's decay rates
NUM_DRAWN = 2000  # M of an evaluation
RIDGE = 1e-2  # of the logistic regression, on the mean loss
NUM_INVERSE_STEPS, NUM_FIT_STEPS = 24, 60
MOST_SAMPLES = 1_000_000
SCHEMA: TableSchema = heart_disease.SCHEMA.model_copy(update={"name": NAME, "title": "Synthetic patients, by whom heart disease can be learned"})


# Columns: what the generator gives, and what the tables hold -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A column as the generator gives it: `width` numbers from `start`, and one more, `start + width`, where it may be missing."""

    column: Column
    start: int

    @property
    def width(self) -> int:
        """A logit a category; of a number or of two categories, one."""
        return len(self.column.values) if self.column.type == "category" else 1

    @property
    def indicated(self) -> bool:
        """Whether a logit says that it is missing."""
        return self.column.missing == "indicator"

    @property
    def end(self) -> int:
        """Where the next begins."""
        return self.start + self.width + self.indicated


def parts_of(columns: tuple[Column, ...]) -> tuple[Part, ...]:
    """The columns, one after another.

    >>> [(part.start, part.end) for part in parts_of(SCHEMA.columns)][:3]
    [(0, 1), (1, 2), (2, 6)]
    """
    parts: list[Part] = []
    for column in columns:
        parts.append(Part(column=column, start=parts[-1].end if parts else 0))
    return tuple(parts)


PARTS = parts_of((*SCHEMA.columns, SCHEMA.label))
NUM_RAW = PARTS[-1].end  # D: F and one for the label
NUM_FEATURES = NUM_RAW - 1


def _layout() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the D places: which are numbers, which are lone logits (flags, "missing"); which pairs are rivals for a category; which gates which."""
    number, lone = torch.zeros(NUM_RAW, dtype=torch.bool), torch.zeros(NUM_RAW, dtype=torch.bool)
    rivals, gates = torch.zeros(NUM_RAW, NUM_RAW), torch.zeros(NUM_RAW, NUM_RAW)
    for part in PARTS:
        main = slice(part.start, part.start + part.width)
        number[main] = part.column.type == "number"
        lone[main] = part.column.type == "binary"
        rivals[main, main] = float(part.column.type != "number")
        if part.indicated:
            lone[part.end - 1] = True
            rivals[part.end - 1, part.end - 1] = 1
            gates[part.end - 1, main] = 1
    return number, lone, rivals, gates


_NUMBER, _LONE, _RIVALS, _GATES = _layout()  # (D,) bool, (D,) bool, (D, D) 0/1, (D, D) 0/1
_MOST_LOGIT = 15.0


def table_rows(raw: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The generator's output as rows of features and, last, the label: `(N, D)`; drawn values, with the gradient of their softened draws.

    A category is the largest of its perturbed logits, a flag is 1 where its own is above 0, a number is a tanh; a missing value is 0.

    Args:
        raw: `(N, D)`.
        chance: `(N, D)`, standard Gumbel draws for a logit of several, their difference (logistic) for a lone one; of a number's place, not read.
    """
    number, lone, rivals, gates = (constant.to(raw.device) for constant in (_NUMBER, _LONE, _RIVALS.to(raw.dtype), _GATES.to(raw.dtype)))
    perturbed = (raw + chance).clamp(-_MOST_LOGIT, _MOST_LOGIT)
    mass = torch.exp(perturbed / TEMPERATURE)
    soft = mass / (mass @ rivals + lone.to(raw.dtype) + number.to(raw.dtype))  # a lone logit's rival is 0
    beaten = ((perturbed[..., None, :] > perturbed[..., :, None]) & (rivals > 0)).any(dim=-1) | (lone & (perturbed <= 0))
    drawn = (~beaten).to(raw.dtype) + soft - soft.detach()
    values = torch.where(number, torch.tanh(raw), drawn)
    return values * (1 - values @ gates)


def draws_of(uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers `(N, L + D)` in (0, 1) -> noise `(N, L)` in [-1, 1] and draws `(N, D)` as `table_rows` takes them."""
    noise, rest = uniform[..., :NOISE], uniform[..., NOISE:].clamp(1e-6, 1 - 1e-6)
    gumbel, logistic = -torch.log(-torch.log(rest)), torch.log(rest) - torch.log1p(-rest)
    return 2 * noise - 1, torch.where(_LONE.to(rest.device), logistic, gumbel)


# Model --------------------------------------------------------------------------------------------------------------------------


class RecordDraws(nn.modules.dropout._DropoutNd):
    """`(N, ...)` -> `(N, L + D)` uniform numbers, a row for each record, in training; one half elsewhere.

    They come from torch's generator, which a site's training keys; no record sees another's. So it is a draw for each record as dropout is, and
    whoever must know that knows it by the base class.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The draws."""
        shape = (*features.shape[:-1], NOISE + NUM_RAW)
        if not self.training:
            return torch.full(shape, 0.5, dtype=features.dtype, device=features.device)
        return torch.rand(shape, dtype=features.dtype).to(features.device)


class PatientGAN(nn.Module):
    """`(N, F)` -> `(N, 4)`: logits "is real" of the record with each diagnosis, of a patient made for it, and the logit of disease.

    The last is of a logistic regression on synthetic patients, in evaluation alone; 0 in training. The generator asks for no gradient here: training
    on patients is of the discriminator alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = RecordDraws(0.5)  # the base class asks for a chance; nothing is dropped
        self.generator = nn.Sequential(nn.Linear(NOISE, GENERATOR_WIDTH), nn.Tanh(), nn.Linear(GENERATOR_WIDTH, NUM_RAW))
        self.discriminator = nn.Sequential(nn.Linear(NUM_FEATURES, DISCRIMINATOR_WIDTH), nn.Tanh(), nn.Linear(DISCRIMINATOR_WIDTH, 2))
        self.generator.requires_grad_(False)
        public = torch.Generator().manual_seed(derive(0, NAME) % 2**63)
        self.register_buffer("public_draws", torch.rand(NUM_DRAWN, NOISE + NUM_RAW, generator=public, dtype=torch.float64), persistent=False)
        self.public_draws: torch.Tensor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The four logits."""
        made = self.made(self.draws(features)).detach()
        logits = self.discriminator(torch.stack([features, made[..., :-1]], dim=-2))  # each layer sees a record and the one made for it at once
        judged = [logits[..., 0, :], of_own_diagnosis(logits[..., 1, :], made[..., -1])]
        risk = torch.zeros_like(judged[1]) if self.training else self.risk(features).to(features.dtype)
        return torch.cat([*judged, risk], dim=-1)

    def made(self, uniform: torch.Tensor) -> torch.Tensor:
        """`(N, L + D)` uniform numbers -> patients, features and label `(N, D)`, in the type of the numbers."""
        noise, chance = draws_of(uniform)
        raw = noise
        for layer in self.generator:
            raw = nn.functional.linear(raw, layer.weight.to(raw.dtype), layer.bias.to(raw.dtype)) if isinstance(layer, nn.Linear) else layer(raw)
        return table_rows(raw, chance)

    def risk(self, features: torch.Tensor) -> torch.Tensor:
        """`(N, 1)` float64: the logit of disease by a logistic regression fitted to `NUM_DRAWN` patients of the generator, the same for all records."""
        patients = self.made(self.public_draws)
        weights = fit_logistic(patients[:, :-1], patients[:, -1])
        return with_constant(features.to(weights.dtype)) @ weights


def of_own_diagnosis(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """`(N, 2)` logits and labels `(N,)` -> the logit of each record's own label, `(N, 1)`."""
    return (logits[..., 0] * (1 - label) + logits[..., 1] * label)[..., None]


def with_constant(features: torch.Tensor) -> torch.Tensor:
    """A column of ones beside the features."""
    return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


def fit_logistic(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights `(F + 1, 1)` of logistic regression, the constant last; least mean loss + `RIDGE` / 2 |weights|^2.

    Newton's method with the bound X'X / (4 N) in place of the second derivative (Böhning and Lindsay 1988, Ann. Inst. Stat. Math. 40:641-663), which
    never goes uphill; the bound's inverse by Newton and Schulz's iteration. Products of matrices alone, so that every exporter knows it.
    """
    rows, truth = with_constant(features), labels[:, None]
    one = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    bound = rows.T @ rows / (4 * rows.shape[0]) + RIDGE * one
    inverse = one / torch.diagonal(bound).sum()  # the trace is no less than the largest eigenvalue, so it converges
    for _ in range(NUM_INVERSE_STEPS):
        inverse = inverse @ (2 * one - bound @ inverse)
    weights = torch.zeros_like(rows[:1].T)
    for _ in range(NUM_FIT_STEPS):
        slope = rows.T @ (torch.sigmoid(rows @ weights) - truth) / rows.shape[0] + RIDGE * weights
        weights = weights - inverse @ slope
    return weights


# Training -----------------------------------------------------------------------------------------------------------------------


def discriminator_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logistic loss of each record `(N,)`: the record is real, with its own diagnosis, and the patient made for it is not."""
    real = of_own_diagnosis(outputs[..., :2], labels.to(outputs.dtype))[..., 0]
    return nn.functional.softplus(-real) + nn.functional.softplus(outputs[..., 2])


def train_generator(model: nn.Module) -> None:
    """Move the generator, in place, so that the discriminator as it stands takes its patients for real; the discriminator is left alone."""
    assert isinstance(model, PatientGAN)
    model.train()
    weights = list(model.generator.parameters())
    discriminator = list(model.discriminator.parameters())
    for parameter in discriminator:
        parameter.requires_grad_(False)
    for parameter in weights:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=GENERATOR_RATE, betas=GENERATOR_MEMORY)
    for _ in range(GENERATOR_STEPS):
        patients = model.made(torch.rand(GENERATOR_BATCH, NOISE + NUM_RAW))
        judged = of_own_diagnosis(model.discriminator(patients[:, :-1]), patients[:, -1])
        optimizer.zero_grad()
        nn.functional.softplus(-judged).mean().backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
    for parameter in discriminator:
        parameter.requires_grad_(True)
    for parameter in weights:
        parameter.requires_grad_(False)


# Data and samples ---------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """One hospital's file, or a folder of `processed.<hospital>.data`, as of `heart-disease`. No options.

    Raises:
        ConfigurationError, DataError: see `shared.tasks.heart_disease.load_cohort`.
    """
    return heart_disease.load_cohort(path, options)


def sample_patients(parameters: Parameters, num: int, seed: int) -> "pd.DataFrame":
    """`num` synthetic patients as a table of the schema: columns in their units, categories by name, an empty field where missing, and the diagnosis.

    Equal arguments give equal patients. The draw is public and protects nobody; what protects is how the parameters came about.

    Raises:
        ConfigurationError: `num` is not from 1 to a million.
        ProtocolError: the parameters are not the model's.

    Example:
        sample_patients(get_parameters(read_trained(Path("runs/...")).model), 200, seed=1).to_csv("synthetic.csv", index=False)
    """
    import pandas as pd

    if not 1 <= num <= MOST_SAMPLES:
        raise ConfigurationError(f"expected 1 to {MOST_SAMPLES} patients, got another number", "ask for fewer")
    with torch.random.fork_rng(devices=[]):  # a model draws its first parameters, which nobody will see
        model = PatientGAN()
    set_parameters(model, parameters)
    randomness = torch.Generator().manual_seed(derive(seed, "patients") % 2**63)
    with torch.no_grad():
        rows = model.made(torch.rand(num, NOISE + NUM_RAW, generator=randomness, dtype=torch.float64)).numpy()
    return pd.DataFrame({part.column.name: _texts(rows[:, part.start : part.end], part) for part in PARTS})


def _texts(values: NDArray[np.float64], part: Part) -> list[str]:
    """A column's features `(N, f)` in the schema's words and units; the inverse of `shared.schema.encode_column`."""
    column = part.column
    if column.type == "number":
        assert column.low is not None and column.high is not None
        low, high = (math.log(column.low), math.log(column.high)) if column.scale == "log" else (column.low, column.high)
        numbers = low + (values[:, 0] + 1) / 2 * (high - low)
        digits = 1 if high - low < 20 else 0
        texts = [f"{number:.{digits}f}" for number in (np.exp(numbers) if column.scale == "log" else numbers).tolist()]
    elif column.type == "category":
        texts = [column.values[index] for index in values[:, : part.width].argmax(axis=1).tolist()]
    else:
        texts = [column.values[int(value > 0.5)] for value in values[:, 0].tolist()]
    missing = values[:, part.width] > 0.5 if part.indicated else np.zeros(len(texts), dtype=np.bool_)
    return ["" if gone else text for text, gone in zip(texts, missing.tolist(), strict=True)]


def closest_distances(rows: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float64]:
    """`(N,)`: the Euclidean distance of each of `rows` to the closest of `others`, in features.

    Synthetic patients that lie closer to training patients than other real patients do are learned by heart (Choi et al. 2017, medGAN, section 4.4).
    """
    squares = (rows.astype(np.float64)[:, None] - others.astype(np.float64)[None]) ** 2
    return np.asarray(np.sqrt(squares.sum(axis=2).min(axis=1)))


def marginal_distance(rows: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """The mean over features of the Kolmogorov distance of two tables: the largest difference of their distribution functions."""
    distances = []
    for column in range(rows.shape[1]):
        one, other = np.sort(rows[:, column]), np.sort(others[:, column])
        points = np.concatenate([one, other])
        shares = (np.searchsorted(each, points, side="right") / len(each) for each in (one, other))
        distances.append(float(np.abs(np.subtract(*shares)).max()))
    return float(np.mean(distances))


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Patients of `heart-disease`'s own synthetic cohort: independent columns, and a diagnosis that depends on them."""
    return heart_disease.heart_disease().synthetic_cohort(num_patients, seed)


def patient_generator() -> Task:
    """The task `patient-generator`."""
    base = heart_disease.heart_disease()
    return replace(
        base,
        name=NAME,
        title=SCHEMA.title,
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=PatientGAN,
        loss=discriminator_loss,
        predict=lambda outputs: torch.sigmoid(outputs[..., 3]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        default_study=f"{NAME}.toml",
        refine=train_generator,
        explained=ExplainedOutput(words="the logit of disease, not what the discriminator says", of=lambda outputs: outputs[..., 3]),
    )
