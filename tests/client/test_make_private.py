"""Models after `make_private`: layers replaced once and for all, weights carried over, and private training that works."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from client.local_training import LocalRound
from client.private_probe import probe_model
from client.private_training import Randomness, train_round_private
from shared.cohort import Cohort
from shared.errors import ModelRefusedError
from shared.models import get_parameters, make_private, set_parameters
from shared.plan import SitePlan
from shared.study import Study
from shared.task import Task


class Sequence(nn.Module):
    """A recurrent or transformer layer over three steps of one number."""

    def __init__(self, memory: nn.Module, width: int) -> None:
        super().__init__()
        self.up, self.memory, self.head = nn.Linear(1, 4), memory, nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.memory(self.up(x[:, :, None]))
        return self.head((steps[0] if isinstance(steps, tuple) else steps)[:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention, self.head = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.up(x[:, :, None])
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].mean(1))


def residual_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(6, 40, 1), nn.BatchNorm2d(40, affine=False), nn.Dropout(0.1, inplace=True)), nn.Flatten(), nn.Linear(120, 1),
    )  # fmt: skip


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    return Sequence(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP with BatchNorm": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 1)),
    "CNN with BatchNorm": residual_cnn,
    "InstanceNorm with buffers": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(3, 1)
    ),
    "LSTM": lambda: Sequence(nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True), 10),
    "GRU": lambda: Sequence(nn.GRU(4, 5, batch_first=True), 5),
    "RNN": lambda: Sequence(nn.RNN(4, 5, batch_first=True, nonlinearity="relu"), 5),
    "attention": Attending,
    "transformer": transformer,
}
SAME_OUTPUT = ("LSTM", "GRU", "RNN", "attention", "transformer")


def plain(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_the_model_trains_privately(
    name: str,
    task: Task,
    make_study: Callable[..., Study],
    make_round: Callable[..., LocalRound],
    make_plan: Callable[..., SitePlan],
    make_patients: Callable[..., Cohort],
) -> None:
    """The probe refuses it before and lets it pass after; a whole round works, and moves every trainable parameter."""
    with pytest.raises(ModelRefusedError, match="make_private"):
        probe_model(dataclasses.replace(task, model=lambda: plain(name)), make_study())
    private = dataclasses.replace(task, model=lambda: make_private(plain(name)))
    probe_model(private, make_study())
    probe_model(private, make_study(privacy={"records_per_patient": "all"}))
    model, local = private.model(), dataclasses.replace(make_round(), task=private)
    before = get_parameters(model)
    train_round_private(model, make_patients(20), local, plan=make_plan(steps_per_round=2), randomness=Randomness.from_key(bytes(32)))
    after = get_parameters(model)
    assert all(np.isfinite(value).all() and not np.array_equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("name", list(MODELS))
def test_once_is_enough_and_names_are_always_the_same(name: str) -> None:
    model = plain(name)
    first, second = make_private(model), make_private(model)
    assert list(get_parameters(first)) == list(get_parameters(second))
    again = make_private(first)
    assert [type(module) for module in again.modules()] == [type(module) for module in first.modules()]
    assert list(get_parameters(again)) == list(get_parameters(first))
    set_parameters(again, {key: value + 1 for key, value in get_parameters(second).items()})
    assert all(np.array_equal(value, get_parameters(second)[key] + 1) for key, value in get_parameters(again).items())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain(name).modules()]  # the model given is not touched


@pytest.mark.parametrize("name", SAME_OUTPUT)
def test_weights_are_carried_over(name: str) -> None:
    """These layers compute what they computed before."""
    model, x = plain(name), torch.randn(7, 3)
    private = make_private(model)
    for mode in (True, False):
        assert torch.allclose(model.train(mode)(x), private.train(mode)(x), atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 5}])
def test_attention_is_torchs_with_masks_and_weights(batch_first: bool, options: dict[str, bool]) -> None:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    private = make_private(attention)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 6, options.get("kdim", 8)), torch.randn(3, 6, options.get("vdim", 8))
    if not batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = torch.ones(4, 6, dtype=torch.bool).triu(2)
    for masks in ({}, {"key_padding_mask": padding, "attn_mask": causal}, {"attn_mask": causal.expand(6, 4, 6)}, {"average_attn_weights": False}):
        for expected, got in zip(attention(query, key, value, **masks), private(query, key, value, **masks), strict=True):
            assert torch.allclose(expected, got, atol=1e-5)
    assert private(query, key, value, need_weights=False)[1] is None


def test_a_causal_transformer_computes_what_it_computed() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    private, x = make_private(layer), torch.randn(3, 5, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for mode in (True, False):
        expected = layer.train(mode)(x, src_mask=mask, is_causal=True)
        assert torch.allclose(expected, private.train(mode)(x, src_mask=mask, is_causal=True), atol=1e-5)


def test_scale_and_shift_of_a_norm_are_carried_over() -> None:
    norm = nn.BatchNorm2d(6, eps=0.01)
    nn.init.normal_(norm.weight)
    group = make_private(nn.Sequential(norm))[0]
    assert isinstance(group, nn.GroupNorm) and torch.equal(group.weight, norm.weight) and group.eps == 0.01
    assert group.weight is not norm.weight


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 6), (32, 32), (40, 20), (64, 32), (37, 1), (48, 24)])
def test_as_many_groups_as_divide_the_channels_up_to_32(channels: int, groups: int) -> None:
    group = make_private(nn.BatchNorm2d(channels))
    assert isinstance(group, nn.GroupNorm) and group.num_groups == groups


def test_features_without_positions_are_normalised_together() -> None:
    """A group of a single number has mean itself and variance 0: everything a record says would be gone."""
    norm = make_private(nn.BatchNorm1d(16))
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 1
    assert norm(torch.randn(5, 16)).std() > 0.5


def test_what_was_shared_stays_shared_and_frozen_stays_frozen() -> None:
    norm = nn.BatchNorm2d(4).requires_grad_(False)
    model = make_private(nn.Sequential(norm, nn.Sequential(norm), nn.ReLU()))
    assert model[0] is model[1][0] and isinstance(model[0], nn.GroupNorm)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    with pytest.raises(ModelRefusedError, match=r"layer '1' \(LSTM\) has no private counterpart"):
        make_private(nn.Sequential(nn.Tanh(), nn.LSTM(3, 5, proj_size=2)))


def test_a_class_of_somebodys_own_is_left_to_the_probe() -> None:
    class Odd(nn.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)[0] * 2

    assert type(make_private(Odd(3, 4))) is Odd


@pytest.mark.slow
def test_models_are_imported_without_opacus_and_its_log_stays_out() -> None:
    code = (
        "import sys, logging, shared.models as m; assert 'opacus' not in sys.modules; from torch import nn; "
        "m.make_private(nn.BatchNorm2d(2)); assert 'opacus' in sys.modules; "
        "assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
