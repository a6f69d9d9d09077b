"""Many sites at once make the updates that each would make alone: batches, clipping, noise and optimizer included."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from client.local_training import LocalRound
from client.local_update import local_update
from client.noise import SimulatedNoise
from client.sampling import PatientIndex
from shared.cohort import Cohort
from shared.models import Parameters, initial_parameters, make_private, mlp
from shared.plan import plan_site
from shared.seeding import derive_key
from shared.study import Study
from shared.task import Task, resolve_task, task_names
from simulations.blocks import training
from simulations.blocks.choice import check_alike
from simulations.blocks.layers import NotStackableError
from simulations.blocks.stacked import StackedModel
from simulations.blocks.training import Records, SiteWork, flat_updates, train_block
from tests.simulations.other_device import DeviceMismatchError, other_device

FLOAT32, FLOAT64 = 1e-5, 1e-12
DEEP = 1e-8  # float64, of a deep network after several steps; in float32 some come apart without privacy, as rounding tips a ReLU and steps make more of it
ADAM = 10  # times: it divides by the gradient's own size, and so makes more of the rounding of small ones
TOKENS = 7  # so that a record has some twice
SIZES = (17, 9, 5)  # ragged: each has fewer steps than the one before


class Recurrent(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(steps)[0][:, -1])  # type: ignore[no-any-return]


class Attentive(nn.Module):
    """A transformer's layer, averaged over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 16), nn.Linear(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(self.embed(steps)).mean(dim=1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(30, 8), nn.Linear(8, 8), nn.Linear(8, 2, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(torch.tanh(self.again(torch.tanh(self.first(rows))))))  # type: ignore[no-any-return]


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 2)
    )  # fmt: skip


class Embedded(nn.Module):
    """Tokens looked up, many of them equal, and read by an LSTM or averaged."""

    def __init__(self, *, padding: int | None = None, recurrent: bool = False) -> None:
        super().__init__()
        self.rows, self.out = nn.Embedding(TOKENS, 6, padding_idx=padding), nn.Linear(6, 2)
        self.lstm = nn.LSTM(6, 6, batch_first=True) if recurrent else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.rows(tokens)
        return self.out(rows.mean(dim=1) if self.lstm is None else self.lstm(rows)[0][:, -1])  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 4, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(6, 5, (3, 2), bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 2),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding="same", dilation=2), nn.GroupNorm(4, 8), nn.Tanh(), nn.Conv2d(8, 8, 2, groups=4), nn.Tanh(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def along_a_line() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 4, padding="same"), nn.Tanh(), nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv1d(4, 4, 5), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


class DropsChannels(nn.Module):
    """Channels, and what is left; one layer of dropout is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.channels, self.drop = nn.Conv2d(2, 6, 3), nn.Dropout2d(0.4), nn.Dropout(0.2)
        self.hidden, self.out = nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        kept = self.drop(self.channels(self.conv(rows).tanh()).flatten(1))
        return self.out(self.drop(self.hidden(kept).tanh()))  # type: ignore[no-any-return]


def dropping() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(30, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8), nn.Dropout(0.0), nn.Linear(8, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(30, 2, hidden=(16, 8)), (30,)),
    "logistic regression": (lambda: nn.Linear(30, 2), (30,)),
    "norms": (normalised, (30,)),
    "a layer used twice": (Twice, (30,)),
    "lstm": (lambda: make_private(Recurrent()), (7, 6)),
    "gru": (lambda: make_private(nn.Sequential(nn.GRU(6, 8, batch_first=True), Last())), (7, 6)),
    "two-way rnn": (lambda: make_private(nn.Sequential(nn.RNN(6, 5, 2, nonlinearity="relu", batch_first=True, bidirectional=True), Last())), (4, 6)),
    "two gru": (lambda: make_private(nn.Sequential(nn.GRU(6, 5, 2, bias=False, batch_first=True), Last())), (4, 6)),
    "attention": (lambda: make_private(Attentive()), (5, 6)),
    "convolution": (convolutional, (2, 10, 9)),
    "convolution in groups": (grouped, (2, 6, 6)),
    "convolution along a line": (along_a_line, (3, 10)),
    "dropout": (dropping, (30,)),
    "dropout of channels": (DropsChannels, (2, 4, 4)),
    "dropout along a line": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(16, 2)), (3, 6)),
    "tokens": (Embedded, (9,)),
    "tokens with padding": (lambda: Embedded(padding=3), (9,)),
    "tokens in an lstm": (lambda: make_private(Embedded(recurrent=True)), (9,)),
}


class Last(nn.Module):
    """The last two entries of a recurrent layer's last state."""

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return given[0][:, -1, :2]


TRAININGS: dict[str, dict[str, object]] = {
    "sgd": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.01, "local_epochs": 2},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
}
PRIVACIES: dict[str, dict[str, object]] = {"none": {"unit": "none"}, "private": {"noise_multiplier": 1.0, "delta": 1e-4}}


def make_study(privacy: dict[str, object], training: dict[str, object]) -> Study:
    strategy = {"name": "fedprox", "proximal_mu": 0.1}
    table = {"name": "blocks", "task": "breast-cancer", "privacy": privacy, "strategy": strategy}
    return Study.from_table({**table, "training": {"learning_rate": 0.1, "batch_size": 8, **training}})


def task_of(make: Callable[[], nn.Module], dtype: torch.dtype) -> Task:
    loss = lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="none")  # noqa: E731
    return dataclasses.replace(resolve_task("breast-cancer"), model=lambda: make().to(dtype), loss=loss)


def cohort_of(num_patients: int, shape: tuple[int, ...], seed: int, *, records: int = 1, tokens: bool = False) -> Cohort:
    rng, owner = np.random.default_rng(seed), np.repeat(np.arange(num_patients), records)
    size = (len(owner), *shape)
    inputs = rng.integers(0, TOKENS, size) if tokens else rng.normal(size=size).astype(np.float32)
    names = tuple(map(str, range(num_patients)))
    return Cohort(inputs=(inputs,), labels=rng.integers(0, 2, len(owner)), patient_of_record=owner, patient_ids=names)


def in_dtype(cohort: Cohort, dtype: torch.dtype) -> Cohort:
    kind = np.float64 if dtype == torch.float64 else np.float32
    inputs = tuple(values.astype(kind) if values.dtype.kind == "f" else values for values in cohort.inputs)
    labels = cohort.labels.astype(kind) if cohort.labels.dtype.kind == "f" else cohort.labels
    return dataclasses.replace(cohort, inputs=inputs, labels=labels)


def key_of(site: int) -> bytes:
    return derive_key(7, "site", site)


def alone(local: LocalRound, cohorts: list[Cohort], received: Parameters) -> list[Parameters]:
    """The update of each site, by the code of a deployment."""
    model, updates = local.task.model(), []
    for site, cohort in enumerate(cohorts):
        update, _ = local_update(
            model, cohort, received, local, plan=plan_site(local.study, cohort.num_patients), key=key_of(site), simulated=True
        )  # fmt: skip
        updates.append({name: np.asarray(value) for name, value in update.items()})
    return updates


def together(local: LocalRound, cohorts: list[Cohort], received: Parameters, device: str = "cpu") -> list[Parameters]:
    """The updates of all sites at once."""
    starts = np.cumsum([0, *[cohort.num_records for cohort in cohorts]])
    stacked = StackedModel(local.task.model(), len(cohorts), device)
    works = [
        SiteWork(name=str(site), plan=plan_site(local.study, cohort.num_patients), part=cohort, index=PatientIndex(cohort), start=int(start), key=key_of(site))
        for site, (cohort, start) in enumerate(zip(cohorts, starts, strict=False))
    ]  # fmt: skip
    inputs = tuple(torch.from_numpy(np.concatenate(parts)).to(device) for parts in zip(*(cohort.inputs for cohort in cohorts), strict=True))
    records = Records(inputs=inputs, labels=torch.from_numpy(np.concatenate([cohort.labels for cohort in cohorts])).to(device))
    train_block(stacked, received, works, records, local)
    splits = np.cumsum([value.size for value in received.values()])[:-1]
    rows = flat_updates(stacked, received, len(cohorts))
    return [dict(zip(received, np.split(row, splits), strict=True)) for row in rows]


def differences(one: list[Parameters], other: list[Parameters]) -> list[float]:
    """For each site |one - other| / |one|, over all parameters."""
    flat = [[np.concatenate([value.ravel() for value in update.values()]).astype(np.float64) for update in updates] for updates in (one, other)]
    return [float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30)) for a, b in zip(*flat, strict=True)]


KINDS = [  # float64 says all that float32 does, and more sharply, but for a type that is mistaken: for that, one way of training is enough at first
    pytest.param(
        training,
        dtype,
        id=f"{training}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] * (dtype == torch.float32 and training != "sgd"),
    )
    for training in TRAININGS
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own layer copies its input; that is all
@pytest.mark.parametrize(("training", "dtype"), KINDS)
@pytest.mark.parametrize("privacy", PRIVACIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_ragged_sites_makes_the_updates_that_they_make_alone(name: str, privacy: str, training: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    if training == "adam" and privacy == "none":
        pytest.skip("Adam divides a gradient that is zero but for rounding by its own size, and makes much of it")
    local = LocalRound(study=make_study(PRIVACIES[privacy], TRAININGS[training]), task=task_of(make, dtype), round_number=1)
    cohorts = [in_dtype(cohort_of(size, shape, seed, tokens="tokens" in name), dtype) for seed, size in enumerate(SIZES)]
    received = initial_parameters(local.task.model(), 3)
    found = differences(alone(local, cohorts, received), together(local, cohorts, received))
    assert max(found) < (FLOAT32 if dtype == torch.float32 else FLOAT64) * (ADAM if training == "adam" else 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("privacy", PRIVACIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_trains_on_another_device_as_on_the_cpu(name: str, privacy: str) -> None:
    """A device that computes as the CPU does, and refuses its tensors: so every tensor is where it must be, and the numbers are the same."""
    make, shape = MODELS[name]
    local = LocalRound(study=make_study(PRIVACIES[privacy], {}), task=task_of(make, torch.float32), round_number=1)
    cohorts = [cohort_of(size, shape, seed, tokens="tokens" in name) for seed, size in enumerate((9, 5))]
    received = initial_parameters(local.task.model(), 3)
    with other_device() as device:
        elsewhere = together(local, cohorts, received, device)
    assert max(differences(together(local, cohorts, received), elsewhere)) < FLOAT32


def test_the_other_device_refuses_what_an_accelerator_refuses() -> None:
    with other_device() as device:
        there = torch.ones(2).to(device)
        assert (there + torch.tensor(1.0)).sum().item() == 4.0
        with pytest.raises(DeviceMismatchError):
            there + torch.ones(2)
        with pytest.raises(TypeError):
            there.numpy()


@pytest.mark.parametrize("bug", ["a quarter of the noise", "no clipping", "one seed for all sites"])
def test_a_bug_planted_in_blocks_is_found_by_their_equality_with_sites_alone(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No audit runs through blocks: this is what finds a fault of theirs."""
    make, shape = MODELS["mlp"]
    local = LocalRound(study=make_study({**PRIVACIES["private"], "max_grad_norm": 0.1}, {}), task=task_of(make, torch.float32), round_number=1)
    cohorts = [cohort_of(size, shape, seed) for seed, size in enumerate((60, 60, 40))]
    received = initial_parameters(local.task.model(), 3)
    expected = alone(local, cohorts, received)
    assert max(differences(expected, together(local, cohorts, received))) < FLOAT32
    if bug == "a quarter of the noise":
        draw = training.standard_normals
        monkeypatch.setattr(training, "standard_normals", lambda bits, out: draw(bits, out).mul_(0.25))
    elif bug == "no clipping":
        monkeypatch.setattr(StackedModel, "squared_norms", lambda stacked: torch.full((len(stacked.layers[0].calls[0][0]),), 1e-8))
    else:
        monkeypatch.setattr(training, "SimulatedNoise", lambda key: SimulatedNoise(bytes(32)))
    assert max(differences(expected, together(local, cohorts, received))) > 100 * FLOAT32


@pytest.mark.parametrize("privacy", PRIVACIES)
@pytest.mark.parametrize("name", task_names())
def test_every_task_that_can_be_stacked_trains_alike(name: str, privacy: str) -> None:
    task = dataclasses.replace(resolve_task(name), refine=None)  # which a block leaves to whoever trains it
    try:
        check_alike(task)
    except NotStackableError as error:
        pytest.skip(f"{name} is trained one site after another: {error}")
    cohort = in_dtype(task.synthetic_cohort(42, 5), torch.float64)
    local = LocalRound(
        study=make_study(PRIVACIES[privacy], {}), task=dataclasses.replace(task, model=lambda: task.model().to(torch.float64)), round_number=1
    )  # fmt: skip
    cohorts = [cohort.select(np.arange(cohort.num_patients) % 7 <= site) for site in (0, 2, 5)][::-1]
    received = initial_parameters(local.task.model(), 3)
    assert max(differences(alone(local, cohorts, received), together(local, cohorts, received))) < DEEP


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_patients_with_several_records_are_sampled_alike(unit: str) -> None:
    make, shape = MODELS["mlp"]
    local = LocalRound(study=make_study({"unit": unit, **PRIVACIES["private"]}, {}), task=task_of(make, torch.float64), round_number=1)
    cohorts = [in_dtype(cohort_of(size, shape, size, records=3), torch.float64) for size in (40, 20)]
    received = initial_parameters(local.task.model(), 3)
    assert max(differences(alone(local, cohorts, received), together(local, cohorts, received))) < FLOAT64


def test_a_record_without_a_finite_gradient_costs_nobody_else_anything() -> None:
    """It counts as zero at its own site, and no other site is touched."""
    make, shape = MODELS["mlp"]
    local = LocalRound(study=make_study(PRIVACIES["private"], {}), task=task_of(make, torch.float64), round_number=1)
    cohorts = [in_dtype(cohort_of(size, shape, size), torch.float64) for size in (40, 20)]
    cohorts[0].inputs[0][:10] = 1e308
    cohorts[0].inputs[0][3] = np.nan
    received = initial_parameters(local.task.model(), 3)
    both = together(local, cohorts, received)
    assert all(np.isfinite(value).all() for update in both for value in update.values())
    assert max(differences(alone(local, cohorts, received), both)) < FLOAT64


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), "Conv3d"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "'reflect' instead of zeros"),
        (lambda: nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "BatchNorm1d"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(0.5)), "AlphaDropout"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(1.0)), "Dropout"),
        (lambda: make_private(nn.LSTM(6, 4, 2, dropout=0.5)), "drops along its steps"),
        (lambda: nn.Sequential(nn.Tanh()), "no trainable layer"),
    ],
)
def test_what_cannot_be_stacked_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NotStackableError, match=reason):
        StackedModel(make(), 3)


class DropsSteps(nn.Module):
    """Dropout on rows that are not in front."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(5, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(rows.view(-1, 6, 5).transpose(0, 1)).mean(dim=0))  # type: ignore[no-any-return]


def test_dropout_along_another_axis_is_seen_before_anything_is_trained() -> None:
    with pytest.raises(NotStackableError, match="not that of records"):
        check_alike(task_of(DropsSteps, torch.float32))


def test_a_model_that_drops_is_stacked_and_found_alike() -> None:
    task = dataclasses.replace(resolve_task("breast-cancer"), model=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(30, 1)))
    assert check_alike(task).held > 0


def test_batches_beyond_the_physical_size_drop_as_they_come() -> None:
    make, shape = MODELS["dropout"]
    study = make_study({**PRIVACIES["private"], "physical_batch_size": 16}, {"batch_size": 40})
    local = LocalRound(study=study, task=task_of(make, torch.float64), round_number=1)
    cohorts = [in_dtype(cohort_of(size, shape, seed), torch.float64) for seed, size in enumerate((90, 60, 12))]
    received = initial_parameters(local.task.model(), 3)
    assert max(differences(alone(local, cohorts, received), together(local, cohorts, received))) < FLOAT64


class Packed(nn.Module):
    """An LSTM over sequences that end at different steps, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(30, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        steps = rows.unsqueeze(1).expand(-1, 3, -1)
        packed = nn.utils.rnn.pack_padded_sequence(steps, torch.arange(len(rows)) % 3 + 1, batch_first=True, enforce_sorted=False)
        return self.out(self.lstm(packed)[1][0][-1])  # type: ignore[no-any-return]


def test_packed_sequences_are_trained_one_site_after_another() -> None:
    with pytest.raises(NotStackableError, match="packed"):
        check_alike(task_of(lambda: make_private(Packed()), torch.float32))


def test_a_longer_sequence_takes_memory_and_no_more_of_the_cache() -> None:
    found = []
    for steps in (10, 80):
        cohort = cohort_of(6, (steps, 6), 0)
        task = dataclasses.replace(task_of(MODELS["lstm"][0], torch.float32), synthetic_cohort=lambda num, seed, cohort=cohort: cohort)
        found.append(check_alike(task))
    short, long = found
    assert long.held > 6 * short.held and long.largest == 8 * short.largest and long.near <= short.near


def test_a_recurrent_layer_that_is_not_trained_stays_as_it_is() -> None:
    make, shape = MODELS["lstm"]
    model = make()
    model.get_submodule("lstm").requires_grad_(False)
    stacked = StackedModel(model, 2)
    stacked.flat[:] = torch.cat([parameter.flatten() for parameter in model.parameters() if parameter.requires_grad]).detach()
    [inputs] = (torch.from_numpy(values) for values in cohort_of(4, shape, 1).inputs)
    torch.testing.assert_close(stacked(inputs), model(inputs))


def test_a_token_without_a_row_is_not_looked_up_at_the_next_site() -> None:
    stacked = StackedModel(nn.Embedding(TOKENS, 2), 2)
    with pytest.raises(IndexError):
        stacked(torch.tensor([1, TOKENS]))


@pytest.mark.parametrize("name", ["lstm", "convolution", "tokens"])
def test_rows_that_are_dropped_weigh_nothing_whatever_they_hold(name: str) -> None:
    make, shape = MODELS[name]
    inputs = [torch.from_numpy(values) for values in cohort_of(8, shape, 1, tokens=name == "tokens").inputs]
    sums = []
    for last in (1.0, float("nan")):
        stacked = StackedModel(make(), 2)
        torch.manual_seed(5)
        stacked.flat.normal_(0, 0.3)
        outputs = stacked(*inputs)
        stacked.backward(outputs.sum(dim=1) * torch.tensor([1.0] * 7 + [last]))
        stacked.squared_norms()
        stacked.drop(torch.tensor([7]))
        stacked.write_weighted_sums(torch.ones(2, 4))
        sums.append(stacked.gradients.clone())
    assert sums[0].isfinite().all() and sums[0].count_nonzero() > 0
    assert torch.equal(*sums)
