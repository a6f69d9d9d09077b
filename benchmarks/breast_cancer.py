"""The main job in numbers: pooled AUROC over five seeds with and without privacy, and the wall time of `wardround simulate`.

python benchmarks/breast_cancer.py [--json]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from measuring import ROOT, SEEDS, Study, finish, mean_and_range, run_quietly, with_privacy

TARGETS = {"epsilon 3": 0.98, "no privacy": 0.985}


def demo_seconds(repeats: int = 3) -> list[float]:
    """Wall seconds of the whole command, start-up, baselines and report included."""
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        command = [sys.executable, "-m", "wardround", "simulate", "--out", tempfile.mkdtemp(prefix="wardround-benchmark-"), "--json"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        times.append(time.monotonic() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    study = Study.load(ROOT / "studies" / "breast-cancer.toml")
    data: dict[str, object] = {}
    for name, epsilon in (("epsilon 3", 3.0), ("epsilon 1", 1.0), ("no privacy", None)):
        values = [float(run_quietly(with_privacy(study.replace(seed=seed), epsilon)).metrics["federated"]["auroc"] or 0) for seed in SEEDS]
        data[f"auroc {name}"] = statistics.fmean(values)
        target = f"  to reach: {TARGETS[name]}" if name in TARGETS else ""
        print(f"{name:12} AUROC over {len(SEEDS)} seeds {mean_and_range(values)}{target}", file=sys.stderr)
    times = demo_seconds()
    data["demo_seconds"] = statistics.median(times)
    print(
        f"wardround simulate, baselines and report included: median {statistics.median(times):.1f} s of {len(times)}  to reach: under 20 s",
        file=sys.stderr,
    )
    finish(data, as_json=as_json)


if __name__ == "__main__":
    main()
