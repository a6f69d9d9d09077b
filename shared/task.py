"""The task: the clinical problem as one frozen object, and how a name becomes one."""

import copy
import functools
import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.config import nearest
from shared.errors import ConfigurationError, UnknownTaskError, WardroundError
from shared.metrics import Metric
from shared.schema import Schema, schema_fingerprint
from shared.subgroups import Subgroup

ENTRY_POINT_GROUP = "wardround.tasks"
NUM_TRIAL_PATIENTS = 8
BUILT_IN = {
    "biomarker-panel": "shared.tasks.biomarker_panel:biomarker_panel",
    "breast-cancer": "shared.tasks.breast_cancer:breast_cancer",
    "breast-ultrasound": "shared.tasks.breast_ultrasound:breast_ultrasound",
    "cell-detection": "shared.tasks.cell_detection:cell_detection",
    "chest-xray": "shared.tasks.chest_xray:chest_xray",
    "clinical-text": "shared.tasks.clinical_text:clinical_text",
    "deidentify-notes": "shared.tasks.deidentify_notes:deidentify_notes",
    "ecg-beat": "shared.tasks.ecg_beat:ecg_beat",
    "eeg-seizure": "shared.tasks.eeg_seizure:eeg_seizure",
    "heart-disease": "shared.tasks.heart_disease:heart_disease",
    "icu-apache": "shared.tasks.icu_apache:icu_apache",
    "icu-attention": "shared.tasks.icu_attention:icu_attention",
    "icu-mortality": "shared.tasks.icu_mortality:icu_mortality",
    "length-of-stay": "shared.tasks.length_of_stay:length_of_stay",
    "lesion-segmentation": "shared.tasks.lesion_segmentation:lesion_segmentation",
    "lung-nodule": "shared.tasks.lung_nodule:lung_nodule",
    "molecule-generator": "shared.tasks.molecule_generator:molecule_generator",
    "molecule-solubility": "shared.tasks.molecule_solubility:molecule_solubility",
    "multimodal-risk": "shared.tasks.multimodal_risk:multimodal_risk",
    "patient-generator": "shared.tasks.patient_generator:patient_generator",
    "record-autoencoder": "shared.tasks.record_autoencoder:record_autoencoder",
    "self-supervised": "shared.tasks.self_supervised:self_supervised",
    "surgical-risk": "shared.tasks.surgical_risk:surgical_risk",
    "survival-breast": "shared.tasks.survival_breast:survival_breast",
    "treatment-policy": "shared.tasks.treatment_policy:treatment_policy",
}

_OF_OURS = re.compile(r"shared\.tasks\.\w+:\w+", re.ASCII)

LoadCohort = Callable[[Path | None, Mapping[str, object]], Cohort]
Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedOutput:
    """The number that tells why a model predicts what it does: in words, and `of`: the model's outputs `(N, ...)` -> `(N,)`, with a gradient.

    It must rise or fall with what is predicted.
    """

    words: str
    of: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A clinical problem: schema, cohort loader, model, loss, metrics.

    Attributes:
        load_cohort: (path, options) -> Cohort. A folder may hold several sites; then `attributes["site"]` tells them apart.
            Path None is asked for only where `bundled`.
        synthetic_cohort: (num_patients, seed) -> Cohort with learnable signal and no real patient.
        model: () -> plain `nn.Module`, called with `cohort.inputs`; Opacus-ready (no batch statistics, no in-place activations).
        loss: (outputs, labels) -> loss of each record, `(N,)`; nothing in it may cross records.
        predict: outputs -> predictions as the metrics take them.
        metrics: what a site may report; `primary_metric` names one of them.
        sites: names of the hospitals of the real data, where it has several.
        bundled: True when real patients come with the package, so that no path is needed.
        default_study: file name of the shipped study, for `simulate --task`.
        subgroups: by which attributes of patients a report tells how well the model does.
        refine: what a site does to its model, in place, after it trained it for a round: a fresh model with the trained parameters, and no patient,
            so under privacy it is post-processing. It alone may move what does not require gradients, such as a GAN's generator, trained against
            the discriminator, or a Q-learner's target; draws come from torch's generator, which is keyed.
        predicted: names of the K numbers that are predicted for a record; empty: by the schema's label, else numbered.
        row: where predictions are no `(N,)` or `(N, K)`: (predictions, inputs) -> `(N, K)`, what a hospital is told of each record.
        explained: what of several outputs is explained, where it is not the largest of `(N, K)` that become predictions one by one.
    """

    name: str
    title: str
    modality: str
    schema: Schema = field(repr=False)
    load_cohort: LoadCohort = field(repr=False)
    synthetic_cohort: Callable[[int, int], Cohort] = field(repr=False)
    model: Callable[[], nn.Module] = field(repr=False)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = field(repr=False)
    predict: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    metrics: tuple[Metric, ...] = field(repr=False)
    primary_metric: str
    source: str = ""
    sites: tuple[str, ...] = ()
    bundled: bool = False
    default_study: str | None = None
    subgroups: tuple[Subgroup, ...] = ()
    refine: Callable[[nn.Module], None] | None = field(default=None, repr=False)
    predicted: tuple[str, ...] = ()
    row: Callable[[Array, tuple[Array, ...]], Array] | None = field(default=None, repr=False)
    explained: ExplainedOutput | None = None
    _fingerprints: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # made once: hundreds of sites ask
    _trial: list[Cohort] = field(default_factory=list, init=False, repr=False, compare=False)  # made once: every run asks

    def __post_init__(self) -> None:
        names = [metric.name for metric in self.metrics]
        if self.primary_metric not in names:
            raise ConfigurationError(f"task {self.name}: primary_metric: expected one of {', '.join(names)}, got {self.primary_metric!r}")

    @property
    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every statistic a site sends."""
        return {metric.statistic.name: metric.statistic.shape for metric in self.metrics}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over name, schema, metrics and architecture: two sides with equal fingerprints speak of the same task."""
        if not self._fingerprints:
            parts = [self.name, schema_fingerprint(self.schema), ",".join(m.name for m in self.metrics), architecture_hash(self.model())]
            self._fingerprints.append(hashlib.sha256("\n".join(parts).encode()).hexdigest())
        return self._fingerprints[0]

    def trial_patients(self) -> Cohort:
        """`NUM_TRIAL_PATIENTS` synthetic patients, the same every time, whatever a model that is tried on them does to them."""
        if not self._trial:
            cohort = self.synthetic_cohort(NUM_TRIAL_PATIENTS, 0)
            self._trial.append(cohort.select(np.arange(cohort.num_patients) < NUM_TRIAL_PATIENTS))  # a task may make whole sites at a time
        return copy.deepcopy(self._trial[0])


def architecture_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the module tree and of names, shapes and types of the state."""
    state = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join([repr(model), *state]).encode()).hexdigest()


def resolve_task(name: str) -> Task:
    """The task of this name: built in, an entry point of group "wardround.tasks", "package.module:factory", or a schema TOML file.

    Raises:
        UnknownTaskError: nothing has that name; near names are proposed.
        ConfigurationError: the factory fails or gives something else than a `Task`.
    """
    if name.endswith(".toml"):
        tabular = importlib.import_module("shared.tasks.tabular")
        task: Task = tabular.load_tabular_task(Path(name))
        return task
    if name in BUILT_IN:
        return _built_in(name)
    target = _entry_points().get(name) or name
    if ":" not in target:
        known = task_names()
        raise UnknownTaskError(f"no task {name!r}{nearest(name, known)}", f"known: {', '.join(known)}, 'package.module:factory', or a schema .toml")
    return _call_factory(target)


@functools.cache
def _built_in(name: str) -> Task:
    """Made once: a sweep asks for its task again and again."""
    return _call_factory(BUILT_IN[name])


def task_names() -> list[str]:
    """Names of the built-in tasks and of installed entry points."""
    return sorted(BUILT_IN.keys() | _entry_points().keys())


def is_installed(name: str) -> bool:
    """Whether a task's code came with an installation: built in, an entry point, or a kind of one of ours ("shared.tasks.heart_disease:normalised").

    Who only looks at a run or a model runs no other code: a folder can come from anywhere, and its files shall not say what is run.
    """
    return name in task_names() or _OF_OURS.fullmatch(name) is not None


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _call_factory(target: str) -> Task:
    module_name, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        task = factory() if callable(factory) and not isinstance(factory, Task) else factory
    except WardroundError:
        raise
    except (ImportError, AttributeError) as error:
        raise UnknownTaskError(f"task {target!r}: {error}", "check the name, and that the package is installed") from error
    except Exception as error:
        raise ConfigurationError(f"task {target!r}: its factory raised {type(error).__name__}", "run it alone, or with --debug") from error
    if not isinstance(task, Task):
        raise ConfigurationError(f"task {target!r}: expected a Task, got {type(task).__name__}", "return shared.task.Task(...)")
    return task
