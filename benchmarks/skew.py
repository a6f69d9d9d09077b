"""What strategies are for, each beside FedAvg in one run, over seeds, on breast cancer:

rounds: SCAFFOLD and FedDyn to the loss that FedAvg has at the end, at twenty uneven sites with many local steps;
own: personal models at the half of the sites that are skewed most, by their own test patients;
robust: fifteen sites of which three send the opposite of their update, or minus twenty times it.

    python benchmarks/skew.py [--seeds 5] [--part rounds|own|robust]
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from fedbuff import course_of

from shared.errors import WardroundError
from shared.results import Result
from shared.study import Study
from simulations.simulate import execute, prepare, start_run

ROUNDS, STEPS = 30, 20
PERSONAL = ("fedavg", "fedper", "fedrep", "ditto", "apfl", "fine-tuning")
ROBUST = ("fedavg", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "rfa", "norm-bounding")
TOLERANT = ("trimmed-mean", "krum", "multi-krum", "bulyan")
FAULTS: dict[str, dict[str, object]] = {
    "nobody": {}, "opposite": {"faults": {"sites": 3, "kind": "sign-flipped"}}, "x -20": {"faults": {"sites": 3, "kind": "scaled", "factor": -20.0}},
}  # fmt: skip


def study_of(seed: int, **changes: object) -> Study:
    """Twenty uneven sites, without privacy."""
    table: dict[str, object] = {
        "name": "skew", "task": "breast-cancer", "seed": seed, "rounds": {"count": ROUNDS}, "training": {"learning_rate": 0.5, "local_steps": 5},
        "privacy": {"unit": "none"}, "evaluation": {"bootstrap": 0}, "federation": {"sites": 20, "partition": "dirichlet", "alpha": 0.1},
    }  # fmt: skip
    return Study.from_table({**table, **changes})


def result_of(study: Study) -> Result:
    """What a run came to."""
    setting = prepare(study, None)
    with tempfile.TemporaryDirectory() as out:
        folder = start_run(setting, Path(out))
        execute(setting, folder, baselines=False)
        return Result.model_validate_json((folder.path / "result.json").read_bytes())


def rounds(seeds: int) -> None:
    """Rounds until the loss is that of FedAvg after `ROUNDS`."""
    print(f"\nRounds to the loss of FedAvg after {ROUNDS} ({STEPS} local steps): median over {seeds} seeds (each)")
    needed: dict[str, list[int]] = {name: [] for name in ("scaffold", "feddyn")}
    for seed in range(1, seeds + 1):
        training = {"learning_rate": 0.5, "local_steps": STEPS, "batch_size": 32}
        goal = course_of(study_of(seed, training=training, strategy={"name": "fedavg", "weights": "equal"})).points[-1][1]
        for name, found in needed.items():
            losses = [loss for _, loss in course_of(study_of(seed, training=training, strategy={"name": name})).points]
            found.append(next((number for number, loss in enumerate(losses, start=1) if loss <= goal), 10**6))
    for name, found in needed.items():
        told = ["never" if number > ROUNDS else str(number) for number in sorted(found)]
        print(f"{name:>10}: {told[len(told) // 2]} ({', '.join(told)})")


def own(seeds: int) -> None:
    """Brier score and accuracy on their own test patients of the ten sites whose classes are most uneven."""
    for epsilon in ("none", 3.0):
        print(
            f"\nThe ten most skewed sites of twenty, {'no privacy' if epsilon == 'none' else f'epsilon {epsilon:g}'}: Brier score, accuracy; mean over {seeds} seeds"
        )
        for name in PERSONAL:
            scores = []
            for seed in range(1, seeds + 1):
                privacy = {"unit": "none"} if epsilon == "none" else {"epsilon": epsilon}
                result = result_of(study_of(seed, strategy={"name": name}, privacy=privacy))
                skewed = sorted(result.sites, key=lambda site: min((site.classes or {"": 0}).values()) / site.num_patients)[:10]
                scores.append([weighted(result, [site.name for site in skewed], metric) for metric in ("brier", "accuracy")])
            print(f"{name:>12}: {statistics.fmean(brier for brier, _ in scores):.3f}  {statistics.fmean(accuracy for _, accuracy in scores):.3f}")


def weighted(result: Result, names: list[str], metric: str) -> float:
    """The mean of a metric over these sites' test patients."""
    tested = {site.name: site.num_test for site in result.sites if site.name in names}
    values = {name: result.per_site[name].get(metric) for name in names if result.per_site.get(name)}
    known = {name: float(value) for name, value in values.items() if isinstance(value, float)}
    return sum(tested[name] * value for name, value in known.items()) / sum(tested[name] for name in known)


def robust(seeds: int) -> None:
    """Pooled AUROC with a fifth of the sites turned."""
    print(f"\nFifteen like sites, three of them bad: AUROC, mean over {seeds} seeds\n{'':>14} {' '.join(f'{name:>10}' for name in FAULTS)}")
    for name in ROBUST:
        cells = []
        for changes in FAULTS.values():
            strategy = {"name": name, **({"tolerated": 3} if name in TOLERANT else {})}
            cells.append(
                statistics.fmean(auroc(study_of(seed, strategy=strategy, federation={"sites": 15}, **changes)) for seed in range(1, seeds + 1))
            )
        print(f"{name:>14} {' '.join(f'{value:>10.3f}' for value in cells)}")


def auroc(study: Study) -> float:
    """Of the pooled test patients; that of a coin where the study could not go on."""
    try:
        return float(result_of(study).metrics["federated"]["auroc"] or 0.5)
    except WardroundError:
        return 0.5


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["rounds", "own", "robust"])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    for name, part in {"rounds": rounds, "own": own, "robust": robust}.items():
        if arguments.part in (None, name):
            part(arguments.seeds)


if __name__ == "__main__":
    main()
