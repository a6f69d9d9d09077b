"""Utility at equal epsilon: our federated private training beside the same federation trained with Opacus' own PrivacyEngine, ten seeds.

Everything but the engine is shared: sites, split, initial model, FedAvg with declared sizes, learning rate, epochs, clipping norm. Opacus takes
its own sample rate (1 / batches in an epoch), its own noise for it (get_noise_multiplier, PRV) and its own noise and sampling.

python benchmarks/utility.py [--data HEART_DISEASE_DIR] [--json]
"""

import argparse
import functools
import logging
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, Study, finish, mean_and_range, run_quietly, with_privacy
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch.utils.data import DataLoader, TensorDataset

from client.evaluation import evaluate_parameters
from server.evaluation import add_statistics
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.metrics import finish_metrics
from shared.models import Parameters, get_parameters, initial_parameters, set_parameters
from shared.task import Task
from simulations.simulate import prepare

TO_KEEP = 0.005
SEEDS = range(1, 11)
EPSILONS = (3.0, 1.0)


@functools.cache
def opacus_noise(epsilon: float, delta: float, batches: int, rounds: int) -> float:
    """Opacus' own noise multiplier for `rounds` epochs of `batches` steps."""
    return float(get_noise_multiplier(target_epsilon=epsilon, target_delta=delta, sample_rate=1 / batches, steps=rounds * batches, accountant="prv"))


def opacus_round(model: torch.nn.Module, train: Cohort, task: Task, study: Study, noise: float) -> None:
    """One epoch of Opacus' private training, in place."""
    data = TensorDataset(*(torch.from_numpy(values) for values in train.inputs), torch.from_numpy(train.labels))
    loader = DataLoader(data, batch_size=min(study.training.batch_size, train.num_records))
    optimizer = torch.optim.SGD(model.parameters(), lr=study.training.learning_rate)
    engine = PrivacyEngine(accountant="prv")
    private, private_optimizer, batches = engine.make_private(
        module=model.train(), optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=study.privacy.max_grad_norm
    )
    for *inputs, labels in batches:
        private_optimizer.zero_grad()
        if len(labels):
            task.loss(private(*inputs), labels).mean().backward()
        else:
            private(*inputs).sum().backward()  # an empty batch: noise alone
        private_optimizer.step()
    private.to_standard_module()


def opacus_auroc(study: Study, data: Path | None) -> float:
    """Pooled-test AUROC after the whole study with Opacus' engine at every site."""
    setting = prepare(study, data)
    assert setting.federation is not None and study.privacy.epsilon is not None and setting.study.privacy.delta is not None
    task = setting.task
    torch.manual_seed(study.seed)
    parts = {name: (cohort, held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for name, cohort in setting.federation.cohorts.items()}
    sites = {name: (cohort.select(~test), cohort.select(test)) for name, (cohort, test) in parts.items()}
    parameters: Parameters = initial_parameters(task.model(), study.seed)
    rounds = study.rounds.count
    for _ in range(rounds):
        updates, weights = [], []
        for train, _test in sites.values():
            batches = -(-train.num_records // min(study.training.batch_size, train.num_records))
            model = task.model()
            set_parameters(model, parameters)
            opacus_round(model, train, task, study, opacus_noise(study.privacy.epsilon, setting.study.privacy.delta, batches, rounds))
            updates.append(get_parameters(model))
            weights.append(train.num_patients)
        parameters = {
            name: np.average([update[name] for update in updates], axis=0, weights=weights).astype(value.dtype) for name, value in parameters.items()
        }
    total = add_statistics(evaluate_parameters(task, test, parameters, model=task.model()) for _, test in sites.values())
    return float(finish_metrics(task.metrics, total)["auroc"] or 0)


def main() -> None:
    """Print both, side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="FLamby's heart-disease files; left out without")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # Opacus installs a root handler
    torch.set_num_threads(1)
    results: dict[str, object] = {"to_keep": TO_KEEP}
    for name, data in (("breast-cancer", None), ("heart-disease", arguments.data)):
        if name == "heart-disease" and data is None:
            continue
        for epsilon in EPSILONS:
            study = with_privacy(Study.load(ROOT / "studies" / f"{name}.toml"), epsilon)
            ours = [float(run_quietly(study.replace(seed=seed), data=data).metrics["federated"]["auroc"] or 0) for seed in SEEDS]
            theirs = [opacus_auroc(study.replace(seed=seed), data) for seed in SEEDS]
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            difference, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
            results[f"{name} epsilon {epsilon:g}"] = {
                "ours": statistics.fmean(ours), "opacus": statistics.fmean(theirs), "difference": difference, "standard_error": error,
            }  # fmt: skip
            print(
                f"{name:14} epsilon {epsilon:g}  ours {mean_and_range(ours)}  Opacus {mean_and_range(theirs)}  difference {difference:+.4f} +- {error:.4f}"
                f"  to keep: within {TO_KEEP}",
                file=sys.stderr,
            )
    finish(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
