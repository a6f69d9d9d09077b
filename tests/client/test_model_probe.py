"""The probe refuses every model that would leak or fail under private training, names the layer, and accepts those that are safe."""

import dataclasses
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn

from client.private_probe import probe_model
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
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1)),
}
UNSAFE: dict[str, tuple[Make, str]] = {
    "BatchNorm": (lambda: between(nn.BatchNorm1d(4)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "frozen BatchNorm": (lambda: frozen(nn.BatchNorm1d(4)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "frozen BatchNorm in eval": (with_evaluated_norm, r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "BatchNorm without affine": (lambda: between(nn.BatchNorm1d(4, affine=False)), r"layer '1' \(BatchNorm1d\).*use GroupNorm or LayerNorm"),
    "BatchNorm without buffers": (lambda: between(nn.BatchNorm1d(4, track_running_stats=False)), r"layer '1' \(BatchNorm1d\)"),
    "BatchNorm with neither": (lambda: between(nn.BatchNorm1d(4, affine=False, track_running_stats=False)), "expected|fail|depends"),
    "InstanceNorm with buffers": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), nn.Linear(3, 1)),
        r"layer '1' \(InstanceNorm1d\) keeps running buffers.*track_running_stats=False",
    ),
    "centred on the batch": (lambda: between(Layer(lambda layer, x: x - x.mean(0))), "depends on the other records of its batch"),
    "centred in training only": (
        lambda: between(Layer(lambda layer, x: x - x.mean(0) if layer.training else x)), "depends on the other records of its batch"
    ),
    "centred in training only, with dropout": (
        lambda: between(nn.Dropout(0.1), Layer(lambda layer, x: x - x.mean(0) if layer.training else x)), "depends on the other records of its batch"
    ),
    "sorted over the batch": (lambda: between(Layer(lambda layer, x: x.sort(dim=0).values)), "depends on the other records|fail"),
    "softmax over the batch": (lambda: between(nn.Softmax(dim=0)), "depends on the other records"),
    "running buffer": (lambda: between(RunningMean()), r"layer '1' \(RunningMean\) keeps running buffers"),
    "hidden running state": (lambda: between(Layer(HiddenState())), "depends on the other records"),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)), "keeps running buffers"),
    "in-place": (lambda: between(nn.ReLU(inplace=True)), "avoid in-place operations"),
    "LSTM": (lambda: Recurrent(nn.LSTM), r"layer 'memory' \(LSTM\).*use opacus.layers.DPLSTM"),
    "GRU": (lambda: Recurrent(nn.GRU), r"layer 'memory' \(GRU\).*use opacus.layers.DPGRU"),
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
    with pytest.raises(ModelRefusedError, match="depends on the other records"):
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
