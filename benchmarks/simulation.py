"""A round of a simulation beside the same round made by others: same model, patients, batches and noise, in one run, interleaved.

python benchmarks/simulation.py --workload tabular [--private] --sites N --rounds R --against plain|opacus-loop|sequential [--processes P] [--json]

plain: a PyTorch loop with a DataLoader at every site. opacus-loop: Opacus' engine made at every site and round, as users do. Both in one process and one thread,
beside ours in as many processes as --processes says (1). sequential: our own site-by-site path. `ratio` is their seconds a site and round over ours, the
median of the rounds after the first, start-up excluded; each side runs three times, in turn.
"""

import argparse
import copy
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Study, finish
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import TRAIN, accuracy, tabular_arrays, tabular_model

BATCH, RATE, SIGMA, CLIP, SEED, REPEATS = 32, 0.1, 1.0, 1.0, 7, 3
Timed = tuple[list[float], float, float]  # seconds of each round, seconds to the first round's end, accuracy


def ours(arguments: argparse.Namespace, execution: str) -> Timed:
    """Our simulation; the model's accuracy is that of its closing evaluation."""
    from wardround import simulate

    privacy = {"noise_multiplier": SIGMA, "delta": 1e-4, "max_grad_norm": CLIP} if arguments.private else {"unit": "none"}
    study = Study.from_table(
        {
            "name": "benchmark", "task": "workloads:tabular", "seed": SEED, "privacy": privacy, "rounds": {"count": arguments.rounds},
            "training": {"learning_rate": RATE, "batch_size": BATCH}, "evaluation": {"bootstrap": 0},
            "federation": {"partition": "column", "column": "site", "num_patients": 250 * arguments.sites},
        }
    )  # fmt: skip
    seconds: list[float] = []
    started = time.perf_counter()
    first: list[float] = []

    def observe(record: object) -> None:
        seconds.append(record.seconds)  # type: ignore[attr-defined]
        if not first:
            first.append(time.perf_counter() - started)

    run = simulate(study, out=tempfile.mkdtemp(prefix="wardround-benchmark-"), observe=observe, execution=execution, processes=arguments.processes)
    return seconds, first[0], float(run.metrics["federated"]["accuracy"])


def loop(arguments: argparse.Namespace, train: Callable[[nn.Module, TensorDataset], None]) -> Timed:
    """Federated averaging in a plain loop over the sites, each trained by `train`."""
    started = time.perf_counter()
    inputs, labels = tabular_arrays(arguments.sites, SEED)
    sites = [TensorDataset(torch.from_numpy(x[:TRAIN]), torch.from_numpy(y[:TRAIN])) for x, y in zip(inputs, labels, strict=True)]
    torch.manual_seed(SEED)
    model = tabular_model()
    seconds, first = [], 0.0
    for number in range(arguments.rounds):
        begun = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        for data in sites:
            local = copy.deepcopy(model)
            train(local, data)
            for name, value in local.state_dict().items():
                total[name] += value
        model.load_state_dict({name: value / len(sites) for name, value in total.items()})
        seconds.append(time.perf_counter() - begun)
        if number == 0:
            first = time.perf_counter() - started
    return seconds, first, accuracy(model, inputs, labels)


def train_plain(model: nn.Module, data: TensorDataset) -> None:
    """One epoch without privacy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in DataLoader(data, batch_size=BATCH, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def train_opacus(model: nn.Module, data: TensorDataset) -> None:
    """One epoch by Opacus' engine, made anew, as its examples do."""
    from opacus import PrivacyEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=BATCH), noise_multiplier=SIGMA, max_grad_norm=CLIP
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
        private.to_standard_module()


def main() -> None:
    """Both sides, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=["tabular"], default="tabular")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--against", choices=["plain", "opacus-loop", "sequential"], default="opacus-loop")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    theirs: dict[str, Callable[[], Timed]] = {
        "plain": lambda: loop(arguments, train_plain),
        "opacus-loop": lambda: loop(arguments, train_opacus),
        "sequential": lambda: ours(arguments, "sequential"),
    }
    if (arguments.against, arguments.private) in (("plain", True), ("opacus-loop", False)):
        parser.error("plain is without privacy, and opacus-loop with it")
    sides: dict[str, list[Timed]] = {"ours": [], arguments.against: []}
    for _ in range(REPEATS):
        sides["ours"].append(ours(arguments, "blocks"))
        sides[arguments.against].append(theirs[arguments.against]())
    medians = {name: statistics.median(second for seconds, _, _ in runs for second in seconds[1:]) / arguments.sites for name, runs in sides.items()}
    usage = [resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    data: dict[str, object] = {
        "sites": arguments.sites, "private": arguments.private, "processes": arguments.processes, "against": arguments.against,
        "ours_ms": medians["ours"] * 1000, "their_ms": medians[arguments.against] * 1000, "ratio": medians[arguments.against] / medians["ours"],
        "our_first_round_seconds": statistics.median(run[1] for run in sides["ours"]),
        "their_first_round_seconds": statistics.median(run[1] for run in sides[arguments.against]),
        "our_accuracy": statistics.median(run[2] for run in sides["ours"]),
        "their_accuracy": statistics.median(run[2] for run in sides[arguments.against]),
        "peak_memory_mb": usage[0], "largest_worker_mb": usage[1],
    }  # fmt: skip
    for name, value in data.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}", file=sys.stderr)
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
