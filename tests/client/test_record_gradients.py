"""Gradients of records and patients, clipped and summed, against a loop over patients with plain autograd, for every kind of layer."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn

from client.local_training import LocalRound, record_losses
from client.noise import GaussianNoise
from client.private_training import NoisedSum, Randomness, sum_clipped_gradients, train_round_private
from client.record_gradients import record_gradients
from client.sampling import PatientIndex
from shared.cohort import Cohort
from shared.errors import ConfigurationError, ModelRefusedError
from shared.models import mlp
from shared.plan import SitePlan
from shared.private_layers import RecordAttention
from shared.task import Task

Rounds = Callable[..., LocalRound]
Plans = Callable[..., SitePlan]
Patients = Callable[..., Cohort]


class Layer(nn.Module):
    """A layer that is one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = DPLSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(x[:, :, None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention, self.head = nn.Linear(1, 4), RecordAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.up(x[:, :, None])
        return self.head(self.attention(steps, steps, steps)[0].mean(1))


class Tied(nn.Module):
    """One weight in two layers, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class Scaled(nn.Module):
    """A parameter without dimensions, by functorch, beside a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def frozen_bias() -> nn.Module:
    model = mlp(3, 1, hidden=(4,))
    model[0].bias.requires_grad_(False)
    return model


def one_layer_in_two_places() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Tanh()), nn.Linear(3, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(3, 1, hidden=(8, 5)),
    "CNN with GroupNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)
    ),
    "embedding": lambda: nn.Sequential(
        Layer(lambda x: (x * 2 + 8).long().clamp(0, 15)), nn.Embedding(16, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Flatten(), nn.Linear(12, 1)
    ),
    "DPLSTM": Recurrent,
    "attention": Attention,
    "tied weights": Tied,
    "scalar parameter": lambda: nn.Sequential(nn.Linear(3, 4), Scaled(), nn.Linear(4, 1)),
    "frozen bias": frozen_bias,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
    "one layer in two places": one_layer_in_two_places,
    "float64": lambda: nn.Sequential(Layer(lambda x: x.double()), mlp(3, 1, hidden=(4,)).double(), Layer(lambda x: x.float())),
}


def with_model(task: Task, name: str) -> tuple[Task, nn.Module]:
    torch.manual_seed(5)
    task = dataclasses.replace(task, model=MODELS[name])
    return task, task.model()


def by_hand(model: nn.Module, cohort: Cohort, units: list[np.ndarray], task: Task, clip: float) -> np.ndarray:
    """One patient after the other: the mean of plain autograd's gradients of the records, clipped, added."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = np.zeros(sum(parameter.numel() for parameter in trainable))
    for records in units:
        own = []
        for record in records:
            gradients = torch.autograd.grad(record_losses(model.train(), cohort, np.array([record]), task).sum(), trainable)
            own.append(np.concatenate([gradient.numpy().ravel().astype(np.float64) for gradient in gradients]))
        unit = np.mean(own, axis=0)
        total += unit * min(1.0, clip / np.linalg.norm(unit))
    return total


def clipped_sum(model: nn.Module, cohort: Cohort, units: np.ndarray | list[np.ndarray], local: LocalRound, plan: SitePlan) -> np.ndarray:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with record_gradients(model) as gradients:
        total = NoisedSum(trainable, gradients, plan=plan, noise=GaussianNoise(bytes(32)))
        sum_clipped_gradients(total, gradients, cohort, units, local)
        return total.values.numpy().copy()


@pytest.mark.parametrize("per_patient", ["one", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_clipped_sum_equals_a_loop_over_patients(
    name: str, per_patient: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    """Some units are clipped and some are not; physical batches of 7 records cut the sum into parts, and patients into pieces."""
    task, model = with_model(task, name)
    cohort = make_patients(20, seed=4, most_records=10 if per_patient == "all" else 1)
    units = PatientIndex(cohort).all_records(np.arange(20))
    norms = [np.linalg.norm(by_hand(model, cohort, [records], task, 1e9)) for records in units]
    clip = float(np.median(norms))
    expected = by_hand(model, cohort, units, task, clip)
    for size in (7, 256):
        privacy = {"records_per_patient": per_patient, "physical_batch_size": size}
        local = dataclasses.replace(make_round(privacy=privacy), task=task)
        ours = clipped_sum(model, cohort, units if per_patient == "all" else np.concatenate(units), local, make_plan(max_grad_norm=clip))
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("per_patient", ["one", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_no_record_however_large_moves_the_sum_by_more_than_the_clip(
    name: str, per_patient: str, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    """Scaled by 1e20: what float32 can still hold is clipped, what it cannot counts as nothing; others keep their part."""
    task, model = with_model(task, name)
    local, plan = dataclasses.replace(make_round(privacy={"records_per_patient": per_patient}), task=task), make_plan(max_grad_norm=0.5)
    cohort = make_patients(6, seed=4)
    cohort.inputs[0][2] *= 1e20
    units = [np.array([record]) for record in range(6)]
    whole, without = (
        clipped_sum(model, cohort, some if per_patient == "all" else np.concatenate(some), local, plan) for some in (units, units[:2] + units[3:])
    )
    assert np.isfinite(whole).all() and np.linalg.norm(whole - without) <= 0.5 * (1 + 1e-6)  # others' last bits may move with the batch
    alone = clipped_sum(model, cohort, units[2:3] if per_patient == "all" else units[2], local, plan)
    assert np.linalg.norm(alone) <= 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("size", [2, 256])
def test_one_record_that_is_not_a_number_takes_its_patient_out_and_nobody_else(
    size: int, task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients
) -> None:
    cohort, model = make_patients(8, seed=6, most_records=5), mlp(3, 1, hidden=(4,))
    units = PatientIndex(cohort).all_records(np.arange(8))
    cohort.inputs[0][units[3][-1], 0] = np.nan
    local = make_round(privacy={"records_per_patient": "all", "physical_batch_size": size})
    whole, without = (clipped_sum(model, cohort, some, local, make_plan()) for some in (units, units[:3] + units[4:]))
    assert np.linalg.norm(without) > 0.1
    assert np.linalg.norm(whole - without) <= 1e-6 * np.linalg.norm(without)


def test_a_patient_gives_the_same_in_pieces_repeated_or_alone(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """The mean over records: 50 copies of each of a patient's records weigh as one copy of each."""
    cohort, model = make_patients(1, seed=3, most_records=5), mlp(3, 1, hidden=(4,))
    records = np.arange(cohort.num_records)
    sums = [
        clipped_sum(
            model, cohort, [np.tile(records, copies)], make_round(privacy={"records_per_patient": "all", "physical_batch_size": 4}), make_plan()
        )
        for copies in (1, 50)
    ]
    assert len(records) > 1 and np.linalg.norm(sums[0] - sums[1]) <= 1e-6 * np.linalg.norm(sums[0])


@pytest.mark.parametrize("name", list(MODELS))
def test_factors_multiplied_out_are_opacus_own_samples(name: str, task: Task, make_patients: Patients) -> None:
    """Norms and weighted sums agree with what is multiplied out, and only plain linear layers on vectors stay in factors."""
    task, model = with_model(task, name)
    cohort, trainable = make_patients(9, seed=8), [parameter for parameter in model.parameters() if parameter.requires_grad]
    with record_gradients(model) as gradients:
        gradients.backward(record_losses(model.train(), cohort, np.arange(9), task))
        flat = torch.cat([gradients.per_record(parameter).reshape(9, -1).double() for parameter in trainable], dim=1)
        assert torch.allclose(gradients.norms(trainable), flat.norm(dim=1), rtol=1e-6)
        weights, rows = torch.arange(4, dtype=torch.float64), torch.tensor([1, 3, 4, 8])
        for parameter in trainable:
            total = torch.ones(parameter.shape, dtype=torch.float64)
            gradients.add_weighted_sum(parameter, weights, total, rows)
            expected = 1 + torch.tensordot(weights, gradients.per_record(parameter)[rows].double(), dims=1)
            assert torch.allclose(total, expected, rtol=1e-6, atol=1e-9)
        if name in ("MLP", "tied weights"):
            factored = [parameter in gradients._factors for parameter in trainable if parameter.dim() == 2]
            assert factored == ([True] * 3 if name == "MLP" else [False, True])


def test_long_sums_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch, task: Task, make_patients: Patients) -> None:
    task, model = with_model(task, "embedding")
    cohort, trainable = make_patients(9), list(model.parameters())

    def sums() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with record_gradients(model) as gradients:
            gradients.backward(record_losses(model.train(), cohort, np.arange(9), task))
            totals = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in trainable]
            for parameter, total in zip(trainable, totals, strict=True):
                gradients.add_weighted_sum(parameter, torch.ones(9, dtype=torch.float64), total, slice(None))
            return gradients.norms(trainable), totals

    norms, totals = sums()
    monkeypatch.setattr("client.record_gradients.CHUNK_ENTRIES", 20)
    chunked_norms, chunked = sums()
    assert torch.allclose(norms, chunked_norms, rtol=1e-14)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(totals, chunked, strict=True))


def test_nothing_of_a_patient_stays_on_the_model(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """Neither inputs, nor gradients, nor a sum before its noise; also not after a round that failed between the passes."""
    task, model = with_model(task, "weight norm")
    local, key = dataclasses.replace(make_round(), task=task), Randomness.from_key(bytes(32))
    plain = [set(vars(module)) for module in model.modules()]
    train_round_private(model, make_patients(5), local, plan=make_plan(), randomness=key)

    def stop(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing = dataclasses.replace(local, task=dataclasses.replace(task, loss=stop))
        train_round_private(model, make_patients(5), failing, plan=make_plan(), randomness=key)
    assert plain == [set(vars(module)) for module in model.modules()]
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(value is None for parameter in model.parameters() for value in (parameter.grad, *vars(parameter).values()))


def test_a_buffer_that_changes_late_ends_the_round(task: Task, make_round: Rounds, make_plan: Plans, make_patients: Patients) -> None:
    """A probe of one step cannot see what changes in the third; the round itself does, before anything is sent."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                self.seen += x.detach().mean(0)
            return x

    model = nn.Sequential(Late(), nn.Linear(3, 1))

    def train(steps: int) -> int:
        key = Randomness.from_key(bytes(32))
        return train_round_private(model, make_patients(5), make_round(), plan=make_plan(steps_per_round=steps), randomness=key)

    assert train(2) == 2
    with pytest.raises(ModelRefusedError, match="layer '0' changes 'seen' in training"):
        train(2)


def test_all_records_of_a_patient_belong_to_unit_patient(make_round: Rounds) -> None:
    with pytest.raises(ConfigurationError, match="records_per_patient = 'all' protects patients, but unit is 'record'; use unit = 'patient'"):
        make_round(privacy={"unit": "record", "records_per_patient": "all"})
    assert make_round(privacy={"records_per_patient": "all"}).study.replace(privacy={"unit": "none"}).private is False


def test_what_changed_in_place_is_noticed(make_patients: Patients, task: Task) -> None:
    """The rule of a layer would see what came after in place of what it took in or gave."""
    for change in (lambda x, y: y.mul_(2), lambda x, y: x.mul_(2)):
        first, second = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(x: torch.Tensor, change: Callable = change, first: nn.Linear = first, second: nn.Linear = second) -> torch.Tensor:
            hidden = first(x)
            out = second(hidden)
            change(hidden, out)
            return out

        model = nn.Sequential(Layer(forward))
        model.layers = nn.ModuleList([first, second])
        with record_gradients(model) as gradients, pytest.raises(RuntimeError, match="changed in place"):
            gradients.backward(forward(torch.ones(5, 3))[:, 0])
