"""Risk from an image, a table, a note and a gene panel, any of which may be missing, for a patient or for a whole hospital.

The outcome is whatever a hospital's column `label` says, 0 or 1; the declared columns suit patients with an infection of the lungs. Each modality has an
encoder of its own, and the logits of those that are there are summed (see `shared.tasks.multimodal_model`). Words become numbers by a public hash, and
numbers are scaled by public bounds, so hospitals that hold different modalities have one model without a message.

The same on table and text of the eICU: `shared.tasks.multimodal_eicu`.

Legend: N records, one a patient; M modalities, S side of an image, G markers of the panel.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cohort import Cohort, IntArray
from shared.errors import DataMissingError
from shared.metrics import BINARY_METRICS
from shared.models import mlp
from shared.seeding import generator
from shared.subgroups import Subgroup
from shared.task import Task
from shared.tasks.images import model_input
from shared.tasks.multimodal_files import COLUMNS, FEATURES, MODALITIES, NAME, NUM_MARKERS, PANEL, SCHEMA, SIDE, encoded, load_cohort
from shared.tasks.multimodal_model import FusedRisk, WordsEncoder, image_encoder, presence_counts, with_only, words_input
from shared.tasks.tabular import logistic_loss
from shared.tasks.text import listed

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

HIDDEN = (16,)
USUAL_LOGIT = -1.0
SUBGROUPS = (Subgroup(attribute="sex", names={"F": "female", "M": "male"}), Subgroup(attribute="age", edges=(50, 70)))


# Synthetic patients -------------------------------------------------------------------------------------------------------------

SYNTHETIC_LACKS = {
    "synthetic-1": (0.15, 0.05, 0.1, 0.3),
    "synthetic-2": (0.2, 0.05, 0.1, 1.0),
    "synthetic-3": (1.0, 0.05, 0.2, 0.3),
    "synthetic-4": (0.1, 0.1, 1.0, 0.2),
}  # share of patients without each modality, by site
SYNTHETIC_SHIFT = (0.0, 0.4, -0.3, 0.1)  # of the risk, by site
SYNTHETIC_GAINS = (1.0, 0.85, 1.0, 1.15)  # of images, by site
SHARED, SIGNAL = 0.3, 1.2  # of the variance of what each modality sees; logits for each unit of it
# name of a finding, of a patient of no risk; spread; how far a unit of risk moves it, in spreads
SYNTHETIC_TABLE = {
    "heart_rate": (88.0, 16.0, 0.45),
    "systolic_pressure": (128.0, 20.0, -0.35),
    "respiratory_rate": (19.0, 4.5, 0.6),
    "temperature": (37.2, 0.8, 0.2),
    "oxygen_saturation": (95.0, 2.5, -0.6),
    "white_cells": (2.2, 0.4, 0.3),  # of the logarithm, as the next two
    "creatinine": (0.0, 0.4, 0.4),
    "lactate": (0.4, 0.45, 0.6),
}
RISK_WORDS = listed("hypoxia sepsis confusion shock dyspnea consolidation delirium oliguria cyanosis frail")
CALM_WORDS = listed("stable ambulatory comfortable alert eating afebrile discharge improving mild walking")
OTHER_WORDS = listed("patient admitted fever cough history chest daughter medication allergy tobacco asthma hypertension diabetes oxygen antibiotics")
NUM_INFORMATIVE = 12  # markers of the panel


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients: each modality sees a part of the risk, through noise, and the risk is the sum of the parts.

    An image is two lungs with shadows, the more and the larger the riskier; findings, words and markers move with their part. Of four sites one has
    no images, one no notes and one no panels; elsewhere who is at more risk more often has an image and a panel. Sites differ in risk, in how images
    are exposed, and in the batch of their panels; one finding in twelve is not measured.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    names = np.array(list(SYNTHETIC_LACKS))
    site = rng.integers(len(names), size=num_patients)
    parts = SHARED**0.5 * rng.normal(size=(num_patients, 1)) + (1 - SHARED) ** 0.5 * rng.normal(size=(num_patients, len(MODALITIES)))
    parts += np.array(SYNTHETIC_SHIFT)[site][:, None]
    labels = rng.random(num_patients) < 1 / (1 + np.exp(-(USUAL_LOGIT + SIGNAL * parts.sum(axis=1))))
    table, age, sex = _synthetic_table(parts[:, 1], rng)
    everybody = np.ones(num_patients, dtype=np.bool_)
    features, counts = encoded(table, COLUMNS, everybody, source="synthetic")
    panel, _ = encoded(_synthetic_panel(parts[:, 3], site, rng), PANEL, everybody, source="synthetic")
    images = _synthetic_images(parts[:, 0], rng) * np.array(SYNTHETIC_GAINS)[site][:, None, None]
    words = words_input(_synthetic_texts(parts[:, 2], rng))
    lacks = np.array(list(SYNTHETIC_LACKS.values()))[site]
    lacks[:, [0, 3]] = np.where(lacks[:, [0, 3]] < 1, lacks[:, [0, 3]] * np.exp(-0.3 * parts[:, [1]]).clip(0, 2), 1)
    present = rng.random(lacks.shape) >= lacks
    present[~present.any(axis=1), 1] = True
    there = present.astype(np.float32)
    return Cohort(
        inputs=(
            model_input(np.clip(images, 0, 1).astype(np.float32)) * there[:, 0, None, None, None],
            features * there[:, 1:2],
            words * present[:, 2:3],
            panel * there[:, 3:4],
            there,
        ),
        labels=labels.astype(np.float32),
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": names[site], "sex": sex, "age": age},
        notes={**counts, **presence_counts(present, MODALITIES)},
        synthetic=True,
    )


def _synthetic_table(risk: NDArray[np.float64], rng: np.random.Generator) -> tuple["pd.DataFrame", NDArray[np.str_], NDArray[np.str_]]:
    """The table as text, and age and sex in it."""
    import pandas as pd

    age = np.clip(np.round(62 + 16 * rng.normal(size=len(risk)) + 4 * risk), 18, 100).astype(int).astype(np.str_)
    sex = rng.choice(["F", "M"], size=len(risk))
    table = pd.DataFrame({"age": age, "sex": sex})
    for column in COLUMNS[2:]:
        usual, spread, steepness = SYNTHETIC_TABLE[column.name]
        assert column.low is not None and column.high is not None
        values = usual + spread * (steepness * risk + rng.normal(size=len(risk)))
        values = np.clip(np.exp(values) if column.scale == "log" else values, column.low, column.high)
        table[column.name] = np.where(rng.random(len(risk)) < 1 / 12, "", np.round(values, 2).astype(np.str_))
    return table, age, sex


def _synthetic_panel(risk: NDArray[np.float64], site: IntArray, rng: np.random.Generator) -> "pd.DataFrame":
    """Markers as text: normal about the middle of their bounds; every fourth moves with the risk, up or down; a batch at each site."""
    import pandas as pd

    steepness = np.zeros(NUM_MARKERS)
    steepness[: 4 * NUM_INFORMATIVE : 4] = 0.45 * np.tile([1.0, -1.0], NUM_INFORMATIVE // 2)
    batch = 0.3 * rng.normal(size=(len(SYNTHETIC_LACKS), NUM_MARKERS))
    values = steepness * risk[:, None] + rng.normal(size=(len(risk), NUM_MARKERS)) + batch[site]
    low, high = (np.array([getattr(marker, bound) for marker in PANEL], dtype=np.float64) for bound in ("low", "high"))
    text = np.round(np.clip((low + high) / 2 + values * (high - low) / 8, low, high), 3).astype(np.str_)
    return pd.DataFrame(np.where(rng.random(text.shape) < 0.02, "", text), columns=[marker.name for marker in PANEL])


def _synthetic_texts(risk: NDArray[np.float64], rng: np.random.Generator) -> list[str]:
    """Notes of some ten words, of which few tell."""
    rates = np.stack([0.15 * np.exp(0.6 * risk), 0.15 * np.exp(-0.6 * risk)], axis=1).clip(0, 0.9)
    texts = []
    for own in rates:
        told = [rng.random(len(words)) < rate for words, rate in zip((RISK_WORDS, CALM_WORDS, OTHER_WORDS), (*own, 0.4), strict=True)]
        chosen = [np.array(words)[which] for words, which in zip((RISK_WORDS, CALM_WORDS, OTHER_WORDS), told, strict=True)]
        texts.append(" ".join(rng.permutation(np.concatenate(chosen)).tolist()))
    return texts


def _synthetic_images(risk: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """`(N, S, S)`: tissue is bright and air dark; up to four shadows lie in the lungs, larger where the risk is."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float64) / SIDE
    count = len(risk)

    def spot(down: NDArray[np.float64] | float, right: NDArray[np.float64] | float, height: NDArray[np.float64] | float) -> NDArray[np.float64]:
        distance = ((rows - down) / height) ** 2 + ((columns - right) / (0.5 * height + 0.03)) ** 2
        return np.asarray(np.exp(-2 * distance))

    def draw(low: float, high: float) -> NDArray[np.float64]:
        return rng.uniform(low, high, size=(count, 1, 1))

    air = 0.6 * np.maximum(spot(0.48, 0.28, draw(0.42, 0.5)), spot(0.48, 0.72, draw(0.42, 0.5)))
    strength = 1 / (1 + np.exp(-(1.3 * risk + 0.5 * rng.normal(size=count))))[:, None, None]
    for number in range(4):
        shadow = spot(draw(0.25, 0.75), (0.28 if number % 2 else 0.72) + draw(-0.08, 0.08), 0.06 + 0.1 * strength)
        air = air * (1 - 0.9 * strength * shadow)
    return 0.8 - air + 0.04 * rng.normal(size=air.shape)


# The task -----------------------------------------------------------------------------------------------------------------------


def model() -> FusedRisk:
    """A CNN, a multilayer perceptron, embeddings of words, and a linear panel."""
    encoders = {"image": image_encoder(), "table": mlp(len(FEATURES), 1, hidden=HIDDEN), "text": WordsEncoder(), "panel": mlp(NUM_MARKERS, 1)}
    return FusedRisk(encoders, usual_logit=USUAL_LOGIT)


def risk_task(only: Sequence[str] = MODALITIES) -> Task:
    """The task on the modalities `only`: the same patients, of whom nothing else is known."""

    def load(path: Path | None, options: Mapping[str, object]) -> Cohort:
        return with_only(load_cohort(path, options), MODALITIES, only)

    load.__doc__ = load_cohort.__doc__
    return Task(
        name="-".join([NAME, *(() if only == MODALITIES else only)]),
        title="Risk of an event, from an image, a table, a note and a gene panel, any of which may be missing",
        modality="image, table, text and gene panel",
        schema=SCHEMA,
        load_cohort=load,
        synthetic_cohort=lambda num_patients, seed: with_only(synthetic_cohort(num_patients, seed), MODALITIES, only),
        model=model,
        loss=logistic_loss,
        predict=lambda outputs: torch.sigmoid(outputs[:, 0]),
        metrics=BINARY_METRICS,
        primary_metric="auroc",
        source="a hospital's own folder; synthetic patients",
        default_study="multimodal-risk.toml",
        subgroups=SUBGROUPS,
    )


def multimodal_risk() -> Task:
    """The task `multimodal-risk`."""
    return risk_task()


def image_alone() -> Task:
    """The same patients by their images alone: `shared.tasks.multimodal_risk:image_alone`."""
    return risk_task(("image",))


def table_alone() -> Task:
    """The same patients by the table alone: `shared.tasks.multimodal_risk:table_alone`."""
    return risk_task(("table",))


def text_alone() -> Task:
    """The same patients by their notes alone: `shared.tasks.multimodal_risk:text_alone`."""
    return risk_task(("text",))


def panel_alone() -> Task:
    """The same patients by their panels alone: `shared.tasks.multimodal_risk:panel_alone`."""
    return risk_task(("panel",))
