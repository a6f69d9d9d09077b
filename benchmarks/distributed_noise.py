"""Distributed noise beside local noise, both under secure aggregation: how much of it is in the sum, and what a study learns at the same epsilon.

python benchmarks/distributed_noise.py [--seeds 3]
"""

import argparse
import statistics
import tempfile

import numpy as np

from client.distributed_sum import noised_points
from client.local_training import LocalRound
from client.local_update import Learner
from shared.cohort import Cohort
from shared.distributed_noise import MORE, DistributedNoise
from shared.models import initial_parameters
from shared.plan import SitePlan
from shared.seeding import derive_key
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.federation import virtual_federation
from wardround import simulate

SITES = (4, 8, 16)
DRAWS = 4  # of the noise, with everybody in the batch, so that all that differs is noise
MISSING = 1


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"Noise in the mean gradient (root mean square of an entry), noise multiplier 1, C = 1, {MISSING} site may be missing")
    print(f"{'sites':>6} {'local':>10} {'distributed':>12} {'ratio':>7} {'sqrt(h)/1.005':>14}")
    for num_sites in SITES:
        local, distributed = noise_of_sums(num_sites)
        print(f"{num_sites:>6} {local:>10.5f} {distributed:>12.5f} {local / distributed:>7.2f} {np.sqrt(num_sites - MISSING) / MORE:>14.2f}")
    print("\nBreast cancer, iid, 60 rounds of one step, epsilon 0.5 for each patient: AUROC / Brier score, mean over seeds")
    print(f"{'sites':>6} {'local':>16} {'distributed':>16} {'epsilon if all others collude':>32}")
    for num_sites in SITES:
        runs = {kind: [run(num_sites, kind, seed) for seed in range(1, arguments.seeds + 1)] for kind in ("local", "distributed")}
        told = [" / ".join(f"{statistics.fmean(found[place] for found in runs[kind]):.3f}" for place in (0, 1)) for kind in runs]
        print(f"{num_sites:>6} {told[0]:>16} {told[1]:>16} {max(found[2] for found in runs['distributed']):>32.2f}")


def noise_of_sums(num_sites: int) -> tuple[float, float]:
    """Of the mean gradient over all sites, with local and with distributed noise."""
    study = study_of(num_sites, "distributed", 1)
    task = resolve_task(study.task)
    cohorts = list(virtual_federation(task, study, None).cohorts.values())
    noise = DistributedNoise(
        max_grad_norm=1.0, num_parameters=num_entries(task), batch_size=study.training.batch_size, sites=num_sites, missing=MISSING
    )
    batch = sum(cohort.num_patients for cohort in cohorts)
    sums = {"local": [], "distributed": []}  # type: dict[str, list[np.ndarray]]
    for draw in range(DRAWS):
        learners = [learner_of(task, study, cohort, derive_key(draw, "draw", site)) for site, cohort in enumerate(cohorts)]
        received = initial_parameters(task.model(), 1)
        share = noise.share_std(MORE)
        points = [noised_points(learner, received, noise, share_std=share) for learner in learners]
        sums["distributed"].append(sum(points) * noise.grid.spacing / batch)
        updates = [learner.train(received) for learner in learners]
        moved = [np.concatenate([(update[name] - received[name]).reshape(-1) for name in received]) for update in updates]
        sums["local"].append(sum(-value * learner.plan.expected_batch_size for value, learner in zip(moved, learners, strict=True)) / batch)
    spread = {kind: float(np.sqrt(np.var(np.array(values), axis=0, ddof=1).mean())) for kind, values in sums.items()}
    return spread["local"], spread["distributed"]


def learner_of(task: Task, study: Study, cohort: Cohort, key: bytes) -> Learner:
    """One step at one site with everybody in the batch and a learning rate of 1."""
    plan = SitePlan(
        unit="patient", declared_size=cohort.num_patients, sample_rate=1.0, steps_per_round=1, expected_batch_size=float(cohort.num_patients), rounds=1,
        noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-4,
    )  # fmt: skip
    local = LocalRound(study=study.replace(training={"learning_rate": 1.0}), task=task, round_number=1)
    return Learner(model=task.model(), train_part=cohort, local=local, plan=plan, key=key, simulated=True)


def num_entries(task: Task) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in task.model().parameters() if parameter.requires_grad)


def study_of(num_sites: int, kind: str, seed: int) -> Study:
    """One step a round, at epsilon 0.5."""
    return Study.from_table({
        "name": "noise", "task": "breast-cancer", "seed": seed, "rounds": {"count": 60}, "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": {"epsilon": 0.5, "delta": 1e-4}, "evaluation": {"bootstrap": 0}, "federation": {"sites": num_sites},
        "secure_aggregation": {"noise": "distributed", "sites": num_sites, "missing": MISSING} if kind == "distributed" else {},
    })  # fmt: skip


def run(num_sites: int, kind: str, seed: int) -> tuple[float, float, float]:
    """AUROC, Brier score, and epsilon against everybody else."""
    with tempfile.TemporaryDirectory() as out:
        result = simulate(study_of(num_sites, kind, seed), out=out).result
    metrics, shared = result.metrics["federated"], result.privacy.distributed_noise
    worst = 0.0 if shared is None else max(site.epsilon_if_all_others_collude for site in shared.sites.values())
    return float(metrics["auroc"] or 0.0), float(metrics["brier"] or 1.0), worst


if __name__ == "__main__":
    main()
