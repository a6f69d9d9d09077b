"""May this model be trained privately? Synthetic patients and one real step answer; a validator's list of layers alone passes models that leak.

The question is whether a record's gradient depends on that record and the parameters alone. So the same synthetic records are passed
together and one by one, and every layer's input and output is compared row by row: the first that differs is the culprit, by name. Then
the gradients are compared with plain autograd's on each record alone, and one private step is taken, which must leave every buffer as it is.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import nn

from client.local_training import LocalRound, record_losses, torch_keyed
from client.private_training import Randomness, check_untrained, train_round_private, untrained_state
from client.record_gradients import RULES, layers_with_parameters, record_gradients
from shared.cohort import Cohort, IntArray
from shared.errors import ConfigurationError, ModelRefusedError
from shared.models import get_parameters
from shared.plan import SitePlan
from shared.study import Study
from shared.task import NUM_TRIAL_PATIENTS, Task

RELATIVE_TOLERANCE = 1e-3
NUM_POINTS = 3  # of parameters at which the model is looked at
MOVE = 0.5
PROBE_PLAN = SitePlan(
    unit="patient",
    declared_size=NUM_TRIAL_PATIENTS,
    sample_rate=1.0,
    steps_per_round=1,
    expected_batch_size=float(NUM_TRIAL_PATIENTS),
    rounds=1,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)
BY_HAND = ", or let shared.models.make_private(model) replace it"
REPLACEMENTS = {
    "BatchNorm": f"GroupNorm or LayerNorm (batch statistics mix patients){BY_HAND}",
    "InstanceNorm": f"GroupNorm, or InstanceNorm with track_running_stats=False{BY_HAND}",
    "LSTM": f"opacus.layers.DPLSTM{BY_HAND}",
    "GRU": f"opacus.layers.DPGRU{BY_HAND}",
    "RNN": f"opacus.layers.DPRNN{BY_HAND}",
    "Embedding": "the same layer without max_norm",
    "MultiheadAttention": "shared.models.make_private(model), which replaces it by linear layers",
}
FAILURES = (RuntimeError, ValueError, AttributeError, NotImplementedError, TypeError, LookupError)


def probe_model(task: Task, study: Study) -> None:
    """Return where the task's model can be trained as the study asks; privately, when it asks for privacy.

    Raises:
        ModelRefusedError: a layer mixes records, changes buffers, or gives no per-record gradient; it names the layer and what to do.
        ConfigurationError: the model, loss or prediction fails or has the wrong shape on synthetic patients.
    """
    with torch_keyed(bytes(32)):
        cohort = task.trial_patients()
    with torch_keyed(bytes(32)):  # the same answer every time, also where the patients were there already
        _probe(task, study, cohort)


def _probe(task: Task, study: Study, cohort: Cohort) -> None:
    model = task.model()
    local = LocalRound(study=study, task=task, round_number=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    frozen = untrained_state(model)
    _check_loss(model, cohort, task)
    if study.site_level and not study.private:  # noise on running statistics would be no statistics any more
        _check_running_buffers(model, before)
    if study.private:
        _check_layers(model)
        _check_running_buffers(model, before)
        check_untrained(model, frozen)
        for number in range(NUM_POINTS):
            point = _moved(model, number)
            _check_rows(point, cohort, task)
            _check_gradients(point, cohort, task)
        _check_step(model, cohort, local)


def _moved(model: nn.Module, number: int) -> nn.Module:
    """The model as it is (0), or elsewhere: a server chooses the parameters, and what is zero at the start may be a gate."""
    point = copy.deepcopy(model)
    if number:
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in point.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=MOVE)
    return point


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
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # also frozen, without affine, or in eval(): a step sets train()
            raise _refusal(name, module, "mixes the records of a batch in its statistics")
        if getattr(module, "max_norm", None) is not None:
            raise _refusal(name, module, "writes to the rows that it looks up (max_norm), which tells who was in a batch")
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or ModuleValidator.VALIDATORS.get(type(module), lambda _: [])(module):
            buffers = any(True for _ in module.buffers())
            why = "keeps running buffers, which every patient of a batch changes" if buffers else "gives no gradient for each record alone"
            raise _refusal(name, module, why)
    names = {module: name for name, module in model.named_modules()}
    for layer in layers_with_parameters(model):
        if type(layer) not in RULES and any(True for _ in layer.buffers()):
            raise _refusal(names[layer], layer, "has buffers beside its parameters, and no rule that gives its gradient for each record alone")


def _refusal(name: str, module: nn.Module, why: str) -> ModelRefusedError:
    kind = type(module).__name__
    remedy = next((text for key, text in REPLACEMENTS.items() if key in kind), "a layer that treats every record on its own, without running buffers")
    return ModelRefusedError(f"model: layer {name or '(root)'!r} ({kind}) {why}", f"use {remedy}")


def _check_running_buffers(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """A forward pass in training left every buffer bit for bit as it was."""
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            key = f"{name}.{own}" if name else own
            if key not in before or not torch.equal(buffer, before[key]):
                raise _refusal(name, module, f"keeps running buffers ({own!r}), which every patient of a batch changes without clipping or noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passing:
    """What passed into or out of a layer."""

    layer: str
    into: bool
    tensors: tuple[torch.Tensor, ...]


def _passings(model: nn.Module, cohort: Cohort, records: IntArray, task: Task, *, seed: int = 0) -> list[_Passing]:
    """Inputs and outputs of all layers on one pass in training, in the order in which they pass; the losses come last.

    Dropout layers are off: their chance would hide everything else.
    """
    seen: list[_Passing] = []

    def record(layer: str, into: bool, values: object) -> None:
        seen.append(_Passing(layer=layer, into=into, tensors=tuple(tensor.detach().clone() for tensor in _tensors(values))))

    with _without_dropout(model), contextlib.ExitStack() as hooks, torch_keyed(bytes([seed]) * 32), torch.no_grad():
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda _, values, kwargs, name=name: record(name, True, (values, kwargs)), with_kwargs=True)
            after = module.register_forward_hook(lambda _, __, values, name=name: record(name, False, values))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        losses = record_losses(model, cohort, records, task)
    seen.append(_Passing(layer=LOSS, into=False, tensors=(losses,)))
    return seen


LOSS = "the task's loss"


def _tensors(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode for all layers but dropout, for the block."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        model.train()


def _check_rows(model: nn.Module, cohort: Cohort, task: Task) -> None:
    """Every layer gives a record in a batch what it gives that record alone; so does the loss."""
    records = np.arange(cohort.num_records)
    together = _passings(model, cohort, records, task)
    culprit = _first_difference(together, _passings(model, cohort, records, task), _same)
    if culprit is not None:
        raise _mixing(model, culprit, "keeps what it saw of earlier records")
    culprit = _first_difference(together, _passings(model, cohort, records, task, seed=1), _same)
    if culprit is not None:
        raise ModelRefusedError(
            f"model: {_place(model, culprit)} draws random numbers of its own, so whether it mixes records cannot be told",
            "use nn.Dropout as a layer in place of functional dropout or noise",
        )
    for row in records:
        try:
            alone = _passings(model, cohort, records[row : row + 1], task)
        except FAILURES as error:
            raise ModelRefusedError(
                f"model: fails on a record alone: {type(error).__name__}: {error}", "remove what needs several records, such as batch statistics"
            ) from error
        culprit = _first_difference(together, alone, lambda batch, own, row=row: _row_is(batch, own, row))  # type: ignore[misc]  # bound now
        if culprit is not None:
            raise _mixing(model, culprit, "mixes the records of a batch: what a record gives depends on the other records of its batch")


def _first_difference(first: list[_Passing], second: list[_Passing], same: Callable[[torch.Tensor, torch.Tensor], bool]) -> _Passing | None:
    for one, other in zip(first, second, strict=False):
        if (one.layer, one.into, len(one.tensors)) != (other.layer, other.into, len(other.tensors)):
            return one
        if not all(same(a, b) for a, b in zip(one.tensors, other.tensors, strict=True)):
            return one
    return None


def _same(first: torch.Tensor, second: torch.Tensor, among: torch.Tensor | None = None) -> bool:
    """Equal, but for the last bits of numbers as large as the largest of `among`; without it, of `first`."""
    if first.shape != second.shape:
        return False
    if torch.equal(first, second):
        return True
    if not first.is_floating_point():
        return False
    size = _size(first if among is None else among)
    return bool(torch.allclose(first, second, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * 1e-2 * size, equal_nan=True))


def _size(values: torch.Tensor) -> float:
    """The largest finite magnitude; a number near zero may be what is left of large ones, and is compared as such."""
    return float(values.abs().nan_to_num(posinf=0.0).max()) if values.numel() and values.is_floating_point() else 0.0


def _row_is(batch: torch.Tensor, alone: torch.Tensor, row: int) -> bool:
    """`alone`, of one record, is that record's part of `batch`, along whichever dimension the records are."""
    if batch.shape == alone.shape:
        return _same(batch, alone)
    differing = [axis for axis, (many, one) in enumerate(zip(batch.shape, alone.shape, strict=False)) if many != one]
    if batch.dim() != alone.dim() or len(differing) != 1:
        return False
    [axis] = differing
    width = alone.shape[axis]
    return bool(batch.shape[axis] >= (row + 1) * width) and _same(batch.narrow(axis, row * width, width), alone, batch)


def _place(model: nn.Module, passing: _Passing) -> str:
    """The layer by name; where a layer's input is the first to differ, the forward() around it is to blame."""
    if passing.layer == LOSS:
        return LOSS
    name = passing.layer.rpartition(".")[0] if passing.into else passing.layer
    kind = type(model.get_submodule(name)).__name__
    return f"layer {name or '(root)'!r} ({kind})" + (f", before its layer {passing.layer.rpartition('.')[2]!r}," if passing.into else "")


def _mixing(model: nn.Module, passing: _Passing, why: str) -> ModelRefusedError:
    remedy = "remove operations across records, such as x - x.mean(0); LayerNorm and GroupNorm normalise a record on its own"
    return ModelRefusedError(f"model: {_place(model, passing)} {why}", remedy)


def _check_gradients(model: nn.Module, cohort: Cohort, task: Task) -> None:
    """Each record's gradient in a batch is what plain autograd gives for that record alone."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    records = np.arange(cohort.num_records)
    try:
        together = _batch_gradients(model, cohort, task)
    except FAILURES as error:
        raise _no_gradients(model, error) from error
    scale = max(
        (float(gradients.flatten(1).norm(dim=1).max()) for gradients in together.values()), default=0.0
    )  # a saturated record's is all rounding
    with _without_dropout(model):
        for row in records:
            loss = record_losses(model, cohort, records[row : row + 1], task).sum()
            alone = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), alone, strict=True):
                expected = torch.zeros_like(parameter) if gradient is None else gradient
                if float((together[name][row] - expected).norm()) > RELATIVE_TOLERANCE * max(scale, 1e-12):
                    raise ModelRefusedError(
                        f"model: the gradient of {name} for a record in a batch is not its gradient alone: it depends on the other records of its "
                        "batch, or passes a layer by",
                        "call each layer as a module, once for all records, and remove operations across records",
                    )


def _batch_gradients(model: nn.Module, cohort: Cohort, task: Task) -> dict[str, torch.Tensor]:
    """Name -> `(records, *shape)`."""
    with record_gradients(model) as gradients, _without_dropout(model):
        gradients.backward(record_losses(model, cohort, np.arange(cohort.num_records), task))
        found = {name: gradients.per_record(parameter).detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in found.items():
        if len(value) != cohort.num_records:
            raise ValueError(f"{name}: expected a gradient for each of {cohort.num_records} records, got {len(value)}")
    return found


def _no_gradients(model: nn.Module, error: Exception) -> ModelRefusedError:
    in_place = next(((name, module) for name, module in model.named_modules() if getattr(module, "inplace", False) is True), None)
    if in_place is not None:
        name, module = in_place
        return ModelRefusedError(
            f"model: layer {name!r} ({type(module).__name__}) works in place, and per-record gradients fail",
            f"avoid in-place operations: inplace=False{BY_HAND}",
        )
    return ModelRefusedError(
        f"model: per-record gradients fail: {type(error).__name__}: {error}", "avoid in-place operations, and layers that Opacus does not know"
    )


def _check_step(model: nn.Module, cohort: Cohort, local: LocalRound) -> None:
    before = get_parameters(model)
    untrained = untrained_state(model)
    try:
        train_round_private(model, cohort, local, plan=PROBE_PLAN, randomness=Randomness.from_key(bytes(32)))
    except FAILURES as error:
        raise ModelRefusedError(f"model: one private step fails: {type(error).__name__}: {error}", "avoid in-place operations") from error
    check_untrained(model, untrained)
    for name, value in get_parameters(model).items():
        if not np.isfinite(value).all():
            raise ModelRefusedError(f"model: {name} is not finite after one private step", "lower learning_rate, or check the model")
        if name not in untrained and np.array_equal(value, before[name]):
            raise ModelRefusedError(f"model: {name} did not move in one private step", "every parameter must take part in the loss, or be frozen")
