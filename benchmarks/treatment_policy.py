"""What a learned policy of doses is worth where the truth is known: mean returns of simulated patients who are treated by it, over seeds.

Beside it: the clinicians whose courses it learned from, the cloning of what they do (a classifier of doses on the same training courses, pooled), the
best single dose, and a near-optimal policy that is made with the simulator itself (fitted value iteration from the last step back, on true states).
Courses are treated in the simulator alone. It is no advice for any patient.

python benchmarks/treatment_policy.py [--patients N] [--seeds N] [--json]
"""

import argparse
import logging
import sys
from collections.abc import Callable

import numpy as np
import torch
from measuring import ROOT, SEEDS, Study, finish, mean_and_range, run_quietly, with_privacy
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neural_network import MLPClassifier

from server.run_folder import RunFolder
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.models import predict_in_batches, set_parameters
from shared.seeding import generator
from shared.task import architecture_hash, resolve_task
from shared.tasks.treatment_policy import (
    DISCOUNT,
    NAME,
    NUM_DOSES,
    NUM_STEPS,
    SITES,
    DoseValues,
    FloatArray,
    IntArray,
    Patients,
    admitted,
    clinicians,
    encoded,
    greedy,
    observed,
    stepped,
    synthetic_cohort,
)

SETTINGS = {"no privacy": None, "epsilon 3": 3.0}
TO_REACH = "to reach: more than the clinicians' mean return"
NUM_STATES = 8000  # at which a step of value iteration tries every dose
Policy = Callable[[FloatArray, FloatArray, int, Patients, np.random.Generator], IntArray]  # values, features, step, patients, rng -> doses


def mean_return(policy: Policy, num_patients: int, seed: int) -> float:
    """Of so many new patients, discounted from admission; equal seeds give the same patients."""
    rng, chance = generator(seed, "treated", NAME), generator(seed, "policy", NAME)
    patients, total = admitted(num_patients, rng), np.zeros(num_patients)
    for step in range(NUM_STEPS):
        values = observed(patients, rng)
        dose = policy(values, encoded(values, np.full(num_patients, step)), step, patients, chance)
        patients, reward = stepped(patients, dose, rng)
        total += DISCOUNT**step * reward
    return float(total.mean())


def by_clinicians(values: FloatArray, features: FloatArray, step: int, patients: Patients, rng: np.random.Generator) -> IntArray:
    """Each patient at one of the sites."""
    return clinicians(values, np.arange(len(values)) % len(SITES), rng)


def by_model(model: torch.nn.Module) -> Policy:
    """The dose that the model values most."""
    return lambda values, features, step, patients, rng: greedy(predict_in_batches(model, (features[:, None],))[:, 0].numpy())


def by_cloning(features: FloatArray, doses: IntArray, seed: int) -> Policy:
    """The dose that clinicians most often gave in such a state."""
    classifier = MLPClassifier((32, 32), max_iter=60, early_stopping=True, random_state=seed).fit(features, doses)
    return lambda values, features, step, patients, rng: classifier.predict(features).astype(np.int64)


def always(dose: int) -> Policy:
    """One dose for all."""
    return lambda values, features, step, patients, rng: np.full(len(values), dose, dtype=np.int64)


def near_optimal(seed: int) -> Policy:
    """Fitted value iteration from the last step back, with the simulator's own dynamics and lactate as it is."""
    rng = generator(seed, "value iteration", NAME)
    best: list[list[HistGradientBoostingRegressor]] = []  # a list for each step, the first step first

    def valued(patients: Patients, models: list[HistGradientBoostingRegressor]) -> FloatArray:
        states = np.column_stack([patients.pressure, patients.lactate, patients.response])
        return np.column_stack([model.predict(states) for model in models])

    for _ in range(NUM_STEPS):
        states = rng.uniform([-2, 0, 0.3], [2, 4, 1.7], size=(NUM_STATES, 3))
        models = []
        for dose in range(NUM_DOSES):
            patients = Patients(pressure=states[:, 0], lactate=states[:, 1], response=states[:, 2], alive=np.ones(NUM_STATES, dtype=np.bool_))
            after, reward = stepped(patients, np.full(NUM_STATES, dose), rng)
            targets = reward + (DISCOUNT * after.alive * valued(after, best[0]).max(axis=1) if best else 0)
            models.append(HistGradientBoostingRegressor(max_iter=60, random_state=seed).fit(states, targets))
        best.insert(0, models)
    return lambda values, features, step, patients, rng: valued(patients, best[step]).argmax(axis=1)


def main() -> None:
    """Print mean returns over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=4000, help="who are treated by each policy")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    shipped = Study.load(ROOT / "studies" / f"{NAME}.toml")
    returns: dict[str, list[float]] = {}
    for seed in SEEDS[: arguments.seeds]:
        cohort = synthetic_cohort(shipped.federation.num_patients or 800, seed)
        training = cohort.select(~held_out_patients(cohort, SIMULATION_SPLIT_KEY))
        present = training.labels[..., 3] > 0
        policies: dict[str, Policy] = {
            "clinicians": by_clinicians,
            "behaviour cloning": by_cloning(training.inputs[0][present], training.labels[..., 0][present].astype(np.int64), seed),
            **{f"always dose {dose}": always(dose) for dose in range(NUM_DOSES)},
            "near-optimal": near_optimal(seed),
        }
        for name, epsilon in SETTINGS.items():
            run = run_quietly(with_privacy(shipped.replace(seed=seed), epsilon))
            model = DoseValues()
            set_parameters(model, RunFolder.open(run.path).read_model("final", architecture_hash(resolve_task(NAME).model())))
            policies[f"learned, {name}"] = by_model(model)
            told = "  ".join(f"{metric} {value:.4g}" for metric, value in run.metrics["federated"].items() if value is not None)
            print(f"seed {seed} {name}: {told}", file=sys.stderr, flush=True)
        for name, policy in policies.items():
            returns.setdefault(name, []).append(mean_return(policy, arguments.patients, seed))
    for name, values in returns.items():
        print(f"{name:22} mean return {mean_and_range(values)}", file=sys.stderr)
    print(TO_REACH, file=sys.stderr)
    finish(dict(returns), as_json=arguments.json)


if __name__ == "__main__":
    main()
