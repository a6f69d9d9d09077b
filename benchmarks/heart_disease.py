"""Four real hospitals over five seeds: pooled-test accuracy without privacy, at epsilon 3 and at epsilon 1, beside FLamby's published numbers.

python benchmarks/heart_disease.py --data DIR [--json]
"""

import argparse
import statistics
import sys
from pathlib import Path

from measuring import ROOT, SEEDS, Study, finish, mean_and_range, run_quietly, with_privacy

TARGETS = {"no privacy": 0.79, "epsilon 3": 0.765, "epsilon 1": 0.75}
PUBLISHED = "FLamby (Ogier du Terrail et al. 2022), without privacy: FedAvg 0.748, pooled 0.795"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    study = Study.load(ROOT / "studies" / "heart-disease.toml")
    data: dict[str, object] = {}
    for name, epsilon in (("no privacy", None), ("epsilon 3", 3.0), ("epsilon 1", 1.0)):
        runs = [run_quietly(with_privacy(study.replace(seed=seed), epsilon), data=arguments.data, baselines=epsilon is None) for seed in SEEDS]
        for metric in ("accuracy", "auroc"):
            values = [float(run.metrics["federated"][metric] or 0) for run in runs]
            data[f"{metric} {name}"] = statistics.fmean(values)
            target = f"  to reach: {TARGETS[name]}" if metric == "accuracy" else ""
            print(f"{name:12} {metric:9} over {len(SEEDS)} seeds {mean_and_range(values)}{target}", file=sys.stderr)
        if epsilon is None:
            pooled = [float(run.metrics["pooled"]["accuracy"] or 0) for run in runs]
            data["accuracy pooled"] = statistics.fmean(pooled)
            print(f"{'pooled':12} accuracy  over {len(SEEDS)} seeds {mean_and_range(pooled)}", file=sys.stderr)
    print(PUBLISHED, file=sys.stderr)
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
