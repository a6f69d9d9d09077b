"""What the privacy mechanism costs: a step of private training beside Opacus' own, and noise beside torch's.

The same work in one run on one thread, in turns: the same model, data, expected batch size, noise multiplier and number of steps. Opacus is
used as its documentation shows, `PrivacyEngine.make_private` outside the time; ours wraps and unwraps the model inside it, once a round.
Opacus draws float32 noise from a 32-bit seed and adds it in float32; ours is ChaCha20 and float64 on a grid.

    python benchmarks/mechanism.py [--repeats N] [--json]
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from measuring import Study, finish
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from client.local_training import LocalRound
from client.noise import GaussianNoise, NoiseGrid
from client.private_training import Randomness, train_round_private
from shared.cohort import Cohort
from shared.models import mlp
from shared.plan import SitePlan
from shared.task import Task
from shared.tasks.breast_cancer import breast_cancer

TARGET = 1.1
NOISE_TARGET_MS = 100.0
LEARNING_RATE, CLIP, NOISE_MULTIPLIER = 0.1, 1.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One model on one cohort."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_classes: int
    num_patients: int
    batch_size: int
    steps: int


def cnn() -> nn.Module:
    """About 26,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


WORKS = {
    "MLP 30-64-32-2": Work(model=lambda: mlp(30, 2, hidden=(64, 32)), shape=(30,), num_classes=2, num_patients=200, batch_size=32, steps=50),
    "CNN with GroupNorm": Work(model=cnn, shape=(1, 28, 28), num_classes=10, num_patients=1000, batch_size=64, steps=16),
    "MLP 784-1024-256-10": Work(
        model=lambda: mlp(784, 10, hidden=(1024, 256)), shape=(784,), num_classes=10, num_patients=1000, batch_size=64, steps=16
    ),
}


def ours(work: Work, inputs: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A round of private training; it gives the seconds of its steps."""
    cohort = Cohort(
        inputs=(inputs,), labels=labels, patient_of_record=np.arange(len(labels)), patient_ids=tuple(map(str, range(len(labels)))), synthetic=True
    )
    task: Task = replace(breast_cancer(), model=work.model, loss=nn.CrossEntropyLoss(reduction="none"))
    study = Study.from_table(
        {
            "name": "mechanism",
            "task": "breast-cancer",
            "training": {"learning_rate": LEARNING_RATE, "batch_size": work.batch_size},
            "privacy": {"noise_multiplier": NOISE_MULTIPLIER, "delta": 1e-4},
        }
    )
    rate = work.batch_size / work.num_patients
    plan = SitePlan(
        unit="patient", declared_size=work.num_patients, sample_rate=rate, steps_per_round=work.steps, expected_batch_size=float(work.batch_size),
        rounds=1, noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP,
    )  # fmt: skip
    local = LocalRound(study=study, task=task, round_number=1)
    model, rounds = work.model(), iter(range(2**32))

    def once() -> float:
        key = next(rounds).to_bytes(32, "big")
        started = time.perf_counter()
        train_round_private(model, cohort, local, plan=plan, randomness=Randomness.from_key(key))
        return time.perf_counter() - started

    return once


def opacus(work: Work, inputs: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """The same number of steps as Opacus' documentation has it."""
    model = work.model()
    dataset = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        data_loader=DataLoader(dataset, batch_size=work.batch_size),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
    )
    loss = nn.CrossEntropyLoss()

    def once() -> float:
        taken = 0
        started = time.perf_counter()
        while taken < work.steps:
            for batch, target in loader:
                optimizer.zero_grad()
                loss(model(batch), target).backward()
                optimizer.step()
                taken += 1
                if taken == work.steps:
                    break
        return time.perf_counter() - started

    return once


def in_turns(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median seconds of each, one after the other `repeats` times, after one of each that does not count."""
    first(), second()
    times = [(first(), second()) for _ in range(repeats)]
    return statistics.median(one for one, _ in times), statistics.median(two for _, two in times)


def compare_steps(work: Work, repeats: int) -> dict[str, float]:
    """Milliseconds a step, and the ratio."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(work.num_patients, *work.shape)).astype(np.float32)
    labels = rng.integers(0, work.num_classes, size=work.num_patients)
    mine, theirs = in_turns(ours(work, inputs, labels), opacus(work, inputs, labels), repeats)
    num_parameters = sum(parameter.numel() for parameter in work.model().parameters())
    return {"parameters": num_parameters, "ours_ms": mine / work.steps * 1e3, "opacus_ms": theirs / work.steps * 1e3, "ratio": mine / theirs}


def compare_noise(repeats: int) -> dict[str, float]:
    """Milliseconds for a million values: ours drawn, rounded and added to a sum; torch's drawn."""
    stream, total = GaussianNoise(bytes(32)), torch.zeros(1_000_000, dtype=torch.float64)
    grid = NoiseGrid.of(CLIP, len(total))

    def timed(function: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started

        return once

    mine, theirs = in_turns(
        timed(lambda: grid.release(total, stream, NOISE_MULTIPLIER)), timed(lambda: torch.normal(0.0, 1.0, size=total.shape)), repeats
    )
    return {"ours_ms": mine * 1e3, "torch_float32_ms": theirs * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus has much to say
    torch.set_num_threads(1)
    data: dict[str, object] = {}
    for name, work in WORKS.items():
        step = compare_steps(work, arguments.repeats)
        data[name] = step
        print(
            f"{name} ({step['parameters']:,} parameters): {step['ours_ms']:.2f} ms a step, Opacus {step['opacus_ms']:.2f} ms, "
            f"ratio {step['ratio']:.2f}  to reach: at most {TARGET}",
            file=sys.stderr,
        )
    noise = compare_noise(arguments.repeats)
    data["a million noise values"] = noise
    print(
        f"a million noise values, rounded and added: {noise['ours_ms']:.1f} ms, torch float32 {noise['torch_float32_ms']:.1f} ms  "
        f"to reach: under {NOISE_TARGET_MS:.0f} ms",
        file=sys.stderr,
    )
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
