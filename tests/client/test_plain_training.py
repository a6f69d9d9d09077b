"""Training without privacy is a plain PyTorch loop; schedules and the proximal term are as their papers say."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.local_training import LocalRound, record_losses, round_batches, torch_keyed, train_round
from client.noise import KeyedStream
from client.optimizers import LocalOptimizer
from shared.cohort import Cohort
from shared.models import initial_parameters, set_parameters
from shared.schedule import learning_rate_at
from shared.study import Study
from shared.task import Task

Studies = Callable[..., Study]
Patients = Callable[..., Cohort]


def fresh_model(task: Task) -> torch.nn.Module:
    model = task.model()
    set_parameters(model, initial_parameters(model, 1))
    return model


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
    ids=["sgd", "adam", "adamw"],
)
@pytest.mark.parametrize("length", [{"local_epochs": 3}, {"local_steps": 7}])
def test_a_round_is_a_plain_loop(
    training: dict[str, object], length: dict[str, object], task: Task, make_study: Studies, make_patients: Patients
) -> None:
    study = make_study(privacy={"unit": "none"}, training={**training, **length, "batch_size": 12})
    cohort, model, by_hand = make_patients(30, most_records=2), fresh_model(task), fresh_model(task)
    steps = train_round(model, cohort, LocalRound(study=study, task=task, round_number=2), rng=np.random.default_rng(4))
    batches = round_batches(cohort.num_records, study, np.random.default_rng(4))
    settings = study.training
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    options = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    optimizer = kind(by_hand.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, **options)
    for batch in batches:
        outputs = by_hand(torch.from_numpy(cohort.inputs[0][batch]))[:, 0]
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(outputs, torch.from_numpy(cohort.labels[batch])).backward()
        optimizer.step()
    assert steps == len(batches) == (7 if "local_steps" in length else 3 * math.ceil(cohort.num_records / 12))
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_proximal_term_is_the_gradient_of_its_penalty(task: Task, make_study: Studies, make_patients: Patients) -> None:
    study = make_study(privacy={"unit": "none"}, strategy={"name": "fedprox", "proximal_mu": 0.7}, training={"local_steps": 5, "batch_size": 8})
    cohort, model, by_hand = make_patients(30), fresh_model(task), fresh_model(task)
    train_round(model, cohort, LocalRound(study=study, task=task, round_number=1), rng=np.random.default_rng(4))
    anchors = [parameter.detach().clone() for parameter in by_hand.parameters()]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=study.training.learning_rate)
    for batch in round_batches(30, study, np.random.default_rng(4)):
        optimizer.zero_grad()
        penalty = sum(((parameter - anchor) ** 2).sum() for parameter, anchor in zip(by_hand.parameters(), anchors, strict=True))
        (record_losses(by_hand, cohort, batch, task).mean() + 0.7 / 2 * penalty).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_frozen_parameters_do_not_move(strategy: str, task: Task, make_study: Studies, make_patients: Patients) -> None:
    study = make_study(privacy={"unit": "none"}, strategy={"name": strategy})
    model = fresh_model(task)
    first, *others = list(model.parameters())
    first.requires_grad_(False)
    before = [parameter.clone() for parameter in (first, *others)]
    train_round(model, make_patients(30), LocalRound(study=study, task=task, round_number=1), rng=np.random.default_rng(4))
    assert torch.equal(first, before[0]) and not any(torch.equal(new, old) for new, old in zip(others, before[1:], strict=True))


def test_a_site_without_records_takes_no_step(task: Task, make_study: Studies, make_patients: Patients) -> None:
    study = make_study(privacy={"unit": "none"}, training={"local_epochs": 2})
    nobody = make_patients(3).select(np.zeros(3, dtype=np.bool_))
    assert train_round(fresh_model(task), nobody, LocalRound(study=study, task=task, round_number=1), rng=np.random.default_rng(4)) == 0


def rates(study: Study, num_rounds: int = 10) -> list[float]:
    return [learning_rate_at(study.training, number, num_rounds) for number in range(1, num_rounds + 1)]


def test_schedules(make_study: Studies) -> None:
    assert rates(make_study(training={"learning_rate": 0.5})) == [0.5] * 10
    assert rates(make_study(training={"learning_rate": 1.0, "schedule": "linear"})) == pytest.approx([1 - step / 10 for step in range(10)])
    cosine = rates(make_study(training={"learning_rate": 1.0, "schedule": "cosine"}))
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])
    warm = rates(make_study(training={"learning_rate": 1.0, "schedule": "linear", "warmup_rounds": 3}))
    assert warm == pytest.approx([0.25, 0.5, 0.75, *(1 - step / 7 for step in range(7))])
    assert rates(make_study(training={"learning_rate": 1.0, "warmup_rounds": 30}), 10) == pytest.approx([number / 31 for number in range(1, 11)])
    assert all(rate > 0 for schedule in ("linear", "cosine") for rate in rates(make_study(training={"schedule": schedule})))


def test_every_round_has_a_fresh_optimizer_at_its_rate(task: Task, make_study: Studies) -> None:
    study = make_study(training={"learning_rate": 1.0, "schedule": "linear"}, rounds={"count": 4})
    assert [LocalOptimizer(study, task.model().parameters(), number).rate for number in (1, 3)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("training", [
    {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adam", "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1},
])  # fmt: skip
def test_the_optimizers_are_torchs_own_bit_for_bit(training: dict[str, Any], make_study: Studies) -> None:
    """Frozen parameters, and ones that have a gradient only sometimes, stay as they are meanwhile."""
    study = make_study(training={"learning_rate": 0.1, **training})
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(3)]
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    rest = {"momentum": study.training.momentum} if study.training.optimizer == "sgd" else {}
    theirs = classes[study.training.optimizer](others, lr=0.1, weight_decay=study.training.weight_decay, **rest)
    ours = LocalOptimizer(study, parameters, 1)
    for step in range(5):
        ours.zero_grad()
        theirs.zero_grad()
        for place, (parameter, other) in enumerate(zip(parameters, others, strict=True)):
            if place == 0 or (place == 1 and step % 2):
                parameter.grad = torch.randn(3, 4, generator=generator)
                other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        assert all(torch.equal(parameter, other) for parameter, other in zip(parameters, others, strict=True))


def test_torchs_generator_is_seeded_inside_and_restored_after() -> None:
    before = torch.get_rng_state()
    with torch_keyed(bytes([5]) * 32):
        first = torch.rand(3)
    with pytest.raises(KeyError), torch_keyed(bytes([5]) * 32):
        assert torch.equal(torch.rand(3), first)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_the_whole_state_of_torchs_generator_comes_from_the_key() -> None:
    """Not 32 bits of it: all 624 words are those of the keyed stream, and what is drawn is the Mersenne twister's continuation of them."""
    reference = np.random.MT19937()
    words = (KeyedStream(bytes([5]) * 32).words(624) >> np.uint64(32)).astype(np.uint32)
    reference.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    with torch_keyed(bytes([5]) * 32):
        drawn = torch.randint(0, 2**24, (2000,), dtype=torch.int64)
        again = torch.rand(5)
    expected = reference.random_raw(2000)
    assert np.array_equal(drawn.numpy(), expected % 2**24)
    with torch_keyed(bytes([6]) * 32):
        torch.randint(0, 2**24, (2000,), dtype=torch.int64)
        assert not torch.equal(torch.rand(5), again)


def test_dropout_depends_on_the_seed_alone(task: Task, make_study: Studies, make_patients: Patients) -> None:
    dropped = dataclasses.replace(task, model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)))
    local = LocalRound(study=make_study(privacy={"unit": "none"}), task=dropped, round_number=1)
    results = []
    for seed in (1, 1, 2):
        model = fresh_model(dropped)
        with torch_keyed(bytes([seed]) * 32):
            train_round(model, make_patients(30), local, rng=np.random.default_rng(4))
        results.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
