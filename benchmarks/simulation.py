"""A round of a simulation beside the same round made by others: same model, first parameters, patients and noise level, in one run, in turn.

python benchmarks/simulation.py --workload tabular|image|sequence [--private] --sites N --rounds R
    --against flower-ray|opacus-loop|pfl|fused|plain|sequential|os-noise [--processes P] [--peers FOLDER] [--json]

Every side is a script of `sides/` in a process of its own, of one thread: flower-ray: Flower's simulation on Ray, with Opacus. opacus-loop: a loop over
the sites with Opacus' engine made at every site and round, as users do. pfl: pfl-research under torchrun. fused: tensors batched by hand for this one
model, the floor. plain: a PyTorch loop with a DataLoader. sequential: our own site-by-site path. os-noise: the same
with noise from the operating system.

`ratio` is their seconds a site and round over ours, each the median of the rounds after the first, so that start-up is left out; each side runs three
times, in turn, with as many processes that train. Flower and pfl are installed by pip in `benchmarks/.peers`, unless --peers names a folder that has
them as `flower` and `pfl`. Ours evaluates the model at all sites in every round, and keeps its accounts; the others only train.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from measuring import finish
from running import Result, Side, python_of, run_side, write_setting

SEED, REPEATS, ACCURACY_TOLERANCE = 7, 3, 0.02
OURS = Side(script="ours")
SIDES = {
    "flower-ray": Side(script="flower_ray", environment="flower"),
    "opacus-loop": Side(script="opacus_loop", privacy=(True,)),
    "pfl": Side(script="pfl_research", environment="pfl", privacy=(False,), torchrun=True),
    "fused": Side(script="fused", workloads=("tabular",)),
    "plain": Side(script="plain", privacy=(False,)),
    "sequential": Side(script="sequential"),
    "os-noise": Side(script="os_noise", privacy=(True,)),
}


def race(arguments: argparse.Namespace) -> dict[str, list[Result]]:
    """Both sides, in turn."""
    side = SIDES[arguments.against]
    pythons = {"ours": sys.executable, arguments.against: python_of(side.environment, arguments.peers)}
    results: dict[str, list[Result]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        write_setting(
            Path(folder), workload=arguments.workload, private=arguments.private, sites=arguments.sites, rounds=arguments.rounds,
            processes=arguments.processes, seed=SEED,
        )  # fmt: skip
        for _ in range(arguments.repeats):
            for name, own in (("ours", OURS), (arguments.against, side)):
                results[name].append(run_side(own, Path(folder), pythons[name], arguments.processes))
    return results


def summary(results: list[Result], num_sites: int, who: str) -> dict[str, object]:
    """Medians over the runs of a side."""
    return {
        f"{who}_ms": 1000 * statistics.median(second for run in results for second in run.seconds[1:]) / num_sites,
        f"{who}_first_round_seconds": statistics.median(run.first_round_seconds for run in results),
        f"{who}_memory_mb": max(run.memory_mb for run in results),
        f"{who}_accuracy": statistics.median(run.accuracy for run in results),
    }


def main() -> None:
    """Both sides, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["tabular", "image", "sequence"], default="tabular")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--against", choices=list(SIDES), default="opacus-loop")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    side = SIDES[arguments.against]
    if arguments.private not in side.privacy or arguments.workload not in side.workloads:
        parser.error(f"{arguments.against} has no {'private' if arguments.private else 'plain'} {arguments.workload} workload")
    if arguments.rounds < 2:
        parser.error("expected at least two rounds: the first is left out")
    results = race(arguments)
    ours, theirs = (summary(results[name], arguments.sites, who) for name, who in (("ours", "our"), (arguments.against, "their")))
    data = {
        "workload": arguments.workload, "private": arguments.private, "sites": arguments.sites, "rounds": arguments.rounds,
        "processes": arguments.processes, "against": arguments.against, "execution": results["ours"][0].execution, **ours, **theirs,
        "ratio": float(theirs["their_ms"]) / float(ours["our_ms"]),  # type: ignore[arg-type]
        "first_round_ratio": float(theirs["their_first_round_seconds"]) / float(ours["our_first_round_seconds"]),  # type: ignore[arg-type]
        "accuracy_difference": float(ours["our_accuracy"]) - float(theirs["their_accuracy"]),  # type: ignore[arg-type]
    }  # fmt: skip
    data["accuracies_agree"] = abs(data["accuracy_difference"]) <= ACCURACY_TOLERANCE
    for name, value in data.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}", file=sys.stderr)
    if not data["accuracies_agree"]:
        print(
            f"the two sides DO NOT AGREE: their accuracies differ by more than {ACCURACY_TOLERANCE}; the ratio compares different work",
            file=sys.stderr,
        )
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
