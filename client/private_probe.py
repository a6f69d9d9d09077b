"""May this model be trained privately? One real step on synthetic patients answers; the validator alone passes models that then leak or fail."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import nn

from client.local_training import LocalRound, record_losses
from client.noise import GaussianNoise
from client.private_training import Randomness, train_round_private, wrapped_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, ModelRefusedError
from shared.models import get_parameters
from shared.plan import SitePlan
from shared.study import Study
from shared.task import Task

NUM_PROBE_PATIENTS = 8
RELATIVE_TOLERANCE = 1e-3
PROBE_PLAN = SitePlan(
    unit="patient",
    declared_size=NUM_PROBE_PATIENTS,
    sample_rate=1.0,
    steps_per_round=1,
    expected_batch_size=float(NUM_PROBE_PATIENTS),
    rounds=1,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)
REPLACEMENTS = {
    "BatchNorm": "GroupNorm or LayerNorm (batch statistics mix patients)",
    "InstanceNorm": "GroupNorm, or InstanceNorm with track_running_stats=False",
    "LSTM": "opacus.layers.DPLSTM",
    "GRU": "opacus.layers.DPGRU",
    "RNN": "opacus.layers.DPRNN",
    "MultiheadAttention": "opacus.layers.DPMultiheadAttention",
    "TransformerEncoderLayer": "a layer built on opacus.layers.DPMultiheadAttention",
}


def probe_model(task: Task, study: Study) -> None:
    """Return where the task's model can be trained as the study asks; privately, when it asks for privacy.

    Raises:
        ModelRefusedError: a layer mixes records, keeps running buffers, or gives no per-record gradient; it names the layer.
        ConfigurationError: the model, loss or prediction fails or has the wrong shape on synthetic patients.
    """
    cohort = task.synthetic_cohort(NUM_PROBE_PATIENTS, 0)
    model = task.model()
    local = LocalRound(study=study, task=task, round_number=1)
    _check_loss(model, cohort, task)
    if study.private:
        _check_layers(model)
        _check_gradients(model, cohort, local)
        _check_step(model, cohort, local)


def _check_loss(model: nn.Module, cohort: Cohort, task: Task) -> None:
    try:
        losses = record_losses(model.train(), cohort, np.arange(cohort.num_records), task)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigurationError(
            f"task {task.name}: model and loss fail on synthetic patients: {error}", "correct the task's model or loss"
        ) from error
    if losses.shape != (cohort.num_records,):
        raise ConfigurationError(
            f"task {task.name}: loss: expected one value for each record, shape ({cohort.num_records},), got {tuple(losses.shape)}",
            "use reduction='none'",
        )


def _check_layers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ModelRefusedError(
                f"model: {name}: expected float32 or float64, got {parameter.dtype}", "use float32: lower precision passes the clipping norm"
            )
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            raise _refusal(name, module, "keeps running buffers, which every patient of a batch changes without clipping or noise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        complaints = ModuleValidator.validate(model, strict=False)
    if complaints:
        name, module = next(_unsupported_layers(model), ("", model))
        raise _refusal(name, module, "gives no gradient for each patient alone")


def _unsupported_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with a known replacement, or leaves that Opacus' validator complains of."""
    for name, module in model.named_modules():
        replaceable = type(module).__name__ in REPLACEMENTS and not type(module).__module__.startswith("opacus")
        complained_of = not list(module.children()) and ModuleValidator.validate(module, strict=False)
        if name and (replaceable or complained_of):
            yield name, module


def _refusal(name: str, module: nn.Module, why: str) -> ModelRefusedError:
    kind = type(module).__name__
    replacement = next((text for key, text in REPLACEMENTS.items() if key in kind), "a layer that treats every record on its own, without buffers")
    return ModelRefusedError(f"model: layer {name or '(root)'!r} ({kind}) {why}", f"use {replacement}")


def _check_gradients(model: nn.Module, cohort: Cohort, local: LocalRound) -> None:
    """Each record's gradient in a batch equals its gradient alone, with dropout and the like switched off."""
    records = np.arange(cohort.num_records)
    try:
        together = _record_gradients(model, cohort, records, local)
        alone = torch.cat([_record_gradients(model, cohort, records[i : i + 1], local) for i in records])
    except (RuntimeError, ValueError, AttributeError, NotImplementedError, TypeError) as error:
        raise ModelRefusedError(
            f"model: per-record gradients fail: {type(error).__name__}: {error}", "avoid in-place operations, and layers that Opacus does not know"
        ) from error
    scale = float(alone.norm(dim=1).max().clamp(min=1e-12))
    if float((together - alone).norm(dim=1).max()) > RELATIVE_TOLERANCE * scale:
        raise ModelRefusedError(
            "model: a record's gradient depends on the other records of its batch", "remove operations across records, such as x - x.mean(0)"
        )


def _record_gradients(model: nn.Module, cohort: Cohort, records: "np.ndarray[tuple[int], np.dtype[np.int64]]", local: LocalRound) -> torch.Tensor:
    with wrapped_model(model) as wrapped:
        wrapped.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # its chance would make two passes differ; all else is probed as it trains
        wrapped.zero_grad(set_to_none=True)
        record_losses(wrapped, cohort, records, local.task).sum().backward()  # type: ignore[no-untyped-call]  # torch
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        samples: list[torch.Tensor] = [sample for parameter in trainable if (sample := getattr(parameter, "grad_sample", None)) is not None]
        if len(samples) < len(trainable):
            raise AttributeError("a parameter takes no part in the loss")
        return torch.cat([sample.detach().reshape(len(records), -1).clone() for sample in samples], dim=1)


def _check_step(model: nn.Module, cohort: Cohort, local: LocalRound) -> None:
    before = get_parameters(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    randomness = Randomness(sampling=np.random.default_rng(0), noise=GaussianNoise(bytes(32)))
    try:
        train_round_private(model, cohort, local, plan=PROBE_PLAN, randomness=randomness)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelRefusedError(f"model: one private step fails: {type(error).__name__}: {error}", "avoid in-place operations") from error
    for name, value in get_parameters(model).items():
        if not np.isfinite(value).all():
            raise ModelRefusedError(f"model: {name} is not finite after one private step", "lower learning_rate, or check the model")
        if name not in frozen and np.array_equal(value, before[name]):
            raise ModelRefusedError(f"model: {name} did not move in one private step", "every parameter must take part in the loss, or be frozen")
