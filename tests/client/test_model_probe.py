"""The probe refuses every model that would leak or fail under private training, names the layer, and accepts those that are safe."""

import dataclasses
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn

from client.private_probe import _row_is, probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, ModelRefusedError
from shared.study import Study
from shared.task import Task

Make = Callable[[], nn.Module]


class Layer(nn.Module):
    """A layer that is one function."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.memory = kind(1, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(x[:, :, None])[0][:, -1])


class RunningMean(nn.Module):
    """Parameterless, with a running buffer: what it learns of the patients is in the state that is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class HiddenState:
    """A running mean that is no buffer: it mixes patients all the same."""

    def __init__(self) -> None:
        self.mean = torch.zeros(4)

    def __call__(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0).detach()
        return x - self.mean


class CentredBetween(nn.Module):
    """Mixes records in its own forward, between two layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x - x.mean(0))


class Bypassed(nn.Module):
    """Uses a layer's weight also without the layer, so no rule sees that part of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) + nn.functional.linear(torch.sin(x), self.used.weight)


class MixedBackwards(torch.autograd.Function):
    """The identity, whose gradient is the mean over the batch: nothing that passes forward tells."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.mean(0).expand_as(gradient)


class Positions(nn.Module):
    """A buffer that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(-1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


MIXES = r"layer '1' \(Layer\) mixes the records of a batch: what a record gives depends on the other records of its batch"


def between(*layers: nn.Module) -> nn.Sequential:
    """A small network with these in the middle, four wide."""
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1))


def frozen(*layers: nn.Module) -> nn.Sequential:
    model = between(*layers)
    for layer in layers:
        layer.requires_grad_(False)
    return model


def with_evaluated_norm() -> nn.Module:
    model = frozen(nn.BatchNorm1d(4))
    model[1].eval()
    return model


def frozen_first() -> nn.Module:
    model = between(nn.Tanh())
    model[0].requires_grad_(False)
    return model


SAFE: dict[str, Make] = {
    "logistic regression": lambda: nn.Linear(3, 1),
    "MLP": lambda: between(nn.Tanh(), nn.Linear(4, 4), nn.ReLU()),
    "CNN with GroupNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)
    ),
    "LayerNorm": lambda: between(nn.LayerNorm(4), nn.GELU()),
    "DPLSTM": lambda: Recurrent(DPLSTM),
    "dropout": lambda: between(nn.Dropout(0.4), nn.Tanh()),
    "frozen first layer": frozen_first,
    "constant buffer": lambda: between(Positions(), nn.Tanh()),
    "InstanceNorm": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True), nn.Flatten(), nn.Linear(3, 1)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1)),
}
UNSAFE: dict[str, tuple[Make, str]] = {
    "BatchNorm": (lambda: between(nn.BatchNorm1d(4)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "frozen BatchNorm": (lambda: frozen(nn.BatchNorm1d(4)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "frozen BatchNorm in eval": (with_evaluated_norm, r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "BatchNorm without affine": (lambda: between(nn.BatchNorm1d(4, affine=False)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "BatchNorm without buffers": (lambda: between(nn.BatchNorm1d(4, track_running_stats=False)), r"layer '1' \(BatchNorm1d\)"),
    "BatchNorm with neither": (lambda: between(nn.BatchNorm1d(4, affine=False, track_running_stats=False)), r"layer '1' \(BatchNorm1d\)"),
    "InstanceNorm with buffers": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), nn.Linear(3, 1)),
        r"layer '1' \(InstanceNorm1d\) keeps running buffers.*track_running_stats=False",
    ),
    "centred on the batch": (lambda: between(Layer(lambda layer, x: x - x.mean(0))), MIXES),
    "centred in training only": (lambda: between(Layer(lambda layer, x: x - x.mean(0) if layer.training else x)), MIXES),
    "centred in training only, with dropout": (
        lambda: between(nn.Dropout(0.1), Layer(lambda layer, x: x - x.mean(0) if layer.training else x)), r"layer '2' \(Layer\) mixes the records"
    ),
    "centred between layers": (CentredBetween, r"layer '\(root\)' \(CentredBetween\), before its layer 'second', mixes the records"),
    "centred deep inside": (
        lambda: between(nn.Sequential(nn.Tanh(), Layer(lambda layer, x: x - x.mean(0)))), r"layer '1.1' \(Layer\) mixes the records"
    ),
    "sorted over the batch": (lambda: between(Layer(lambda layer, x: x.sort(dim=0).values)), MIXES),
    "softmax over the batch": (lambda: between(nn.Softmax(dim=0)), r"layer '1' \(Softmax\) mixes the records"),
    "needs two records": (lambda: between(Layer(lambda layer, x: x / x.std(0))), "mixes the records|fails on a record alone|not finite"),
    "functional dropout": (
        lambda: between(Layer(lambda layer, x: nn.functional.dropout(x, 0.3, training=layer.training))),
        r"layer '1' \(Layer\) draws random numbers of its own.*use nn.Dropout",
    ),
    "running buffer": (lambda: between(RunningMean()), r"layer '1' \(RunningMean\) keeps running buffers"),
    "hidden running state": (lambda: between(Layer(HiddenState())), r"layer '1' \(Layer\) keeps what it saw of earlier records"),
    "mixed on the way back": (lambda: between(Layer(lambda layer, x: MixedBackwards.apply(x))), "gradient of 0.weight for a record in a batch"),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)), r"layer '0.*buffers"),
    "in-place": (lambda: between(nn.ReLU(inplace=True)), r"layer '1' \(ReLU\) works in place.*inplace=False, or let shared.models.make_private"),
    "LSTM": (lambda: Recurrent(nn.LSTM), r"layer 'memory' \(LSTM\).*use opacus.layers.DPLSTM, or let shared.models.make_private\(model\)"),
    "GRU": (lambda: Recurrent(nn.GRU), r"layer 'memory' \(GRU\).*use opacus.layers.DPGRU"),
    "RNN": (lambda: Recurrent(nn.RNN), r"layer 'memory' \(RNN\).*use opacus.layers.DPRNN"),
    "weight used past its layer": (Bypassed, "gradient of used.weight for a record in a batch is not its gradient alone"),
    "unused parameter": (Spare, "takes no part in the loss|did not move"),
}  # fmt: skip


@pytest.fixture
def with_model(task: Task) -> Callable[[Make], Task]:
    """The task with another model."""
    return lambda make: dataclasses.replace(task, model=make)


@pytest.mark.parametrize("name", list(SAFE))
def test_safe_models_pass(name: str, with_model: Callable[[Make], Task], make_study: Callable[..., Study]) -> None:
    probe_model(with_model(SAFE[name]), make_study())


@pytest.mark.parametrize("name", list(UNSAFE))
def test_unsafe_models_are_refused_by_layer_and_remedy(name: str, with_model: Callable[[Make], Task], make_study: Callable[..., Study]) -> None:
    make, message = UNSAFE[name]
    with pytest.raises(ModelRefusedError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has much to say of some of them
        probe_model(with_model(make), make_study())
    assert re.search(message, str(caught.value)), str(caught.value)
    assert caught.value.remedy and caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["BatchNorm", "LSTM", "in-place", "running buffer"])
def test_without_privacy_any_model_that_runs_will_do(name: str, with_model: Callable[[Make], Task], make_study: Callable[..., Study]) -> None:
    probe_model(with_model(UNSAFE[name][0]), make_study(privacy={"unit": "none"}))


def test_a_loss_that_crosses_records_is_refused(task: Task, make_study: Callable[..., Study]) -> None:
    balanced = dataclasses.replace(task, loss=lambda outputs, labels: task.loss(outputs, labels) * (0.1 + labels.mean()))
    with pytest.raises(ModelRefusedError, match="the task's loss mixes the records"):
        probe_model(balanced, make_study())


def test_a_loss_of_the_whole_batch_is_named(task: Task, make_study: Callable[..., Study]) -> None:
    for study in (make_study(), make_study(privacy={"unit": "none"})):
        with pytest.raises(ConfigurationError, match=r"loss: expected one value for each record, shape \(8,\), got \(\)"):
            probe_model(dataclasses.replace(task, loss=lambda outputs, labels: task.loss(outputs, labels).mean()), study)


def test_a_model_of_another_width_is_named(with_model: Callable[[Make], Task], make_study: Callable[..., Study]) -> None:
    with pytest.raises(ConfigurationError, match="model and loss fail on synthetic patients"):
        probe_model(with_model(lambda: nn.Linear(5, 1)), make_study())


def test_a_model_of_half_precision_does_not_pass(with_model: Callable[[Make], Task], make_study: Callable[..., Study], task: Task) -> None:
    """bfloat16 gradients pass the clip by 0.4 per cent; a model that casts its input must not get through either."""

    def make(kind: torch.dtype) -> nn.Module:
        return nn.Sequential(Layer(lambda layer, x: x.to(kind)), between(nn.Tanh()).to(kind), Layer(lambda layer, x: x.float()))

    for kind in (torch.bfloat16, torch.float16):
        with pytest.raises(ModelRefusedError, match=r"1.0.weight: expected float32 or float64, got torch"):
            probe_model(with_model(lambda kind=kind: make(kind)), make_study())


def test_the_probe_sees_no_patient(task: Task, make_study: Callable[..., Study]) -> None:
    def refuse(path: object, options: object) -> Cohort:
        raise AssertionError("the probe works on synthetic patients")

    probe_model(dataclasses.replace(task, load_cohort=refuse), make_study())


def test_a_number_left_over_from_large_ones_is_no_mixing() -> None:
    """Near zero all digits differ between a batch and a record alone; what counts is the size of the whole batch."""
    batch = torch.tensor([[1e-6], [1.0], [-2.0]])
    assert _row_is(batch, torch.tensor([[1.2e-6]]), 0)
    assert not _row_is(batch, torch.tensor([[1e-3]]), 0)
    assert not _row_is(batch, torch.tensor([[1.01]]), 1)
