"""What the canary audit finds beside what is claimed, how long it takes, and how often it alarms about honest studies.

Breast cancer at one site, 142 steps at q = 0.14 with 1,000 gradient canaries, without noise and at noise multipliers 1 and 2; the shipped study at its eight
sites; record canaries; and honest runs where the audit is at its sharpest (every patient in every step, epsilon 2). The first call in a process is a
little slower than the rest, which are timed.

    python benchmarks/canaries.py [--runs N] [--json]
"""

import argparse
import statistics
import sys
import time

from measuring import ROOT, Study, finish
from scipy import stats

from shared.attacks import CanaryAudit
from simulations.attacks.canaries import CanaryKind, audit

SEEDS = range(5)
ALARM_RATE = 0.05
ONE_SITE = {
    "name": "one-site",
    "task": "breast-cancer",
    "rounds": {"count": 2},
    "training": {"learning_rate": 0.5, "batch_size": 56, "local_steps": 71},
    "privacy": {"unit": "none"},
    "federation": {"sites": 1, "partition": "iid"},
}


def studies() -> dict[str, tuple[Study, CanaryKind]]:
    """What is audited, and with which canaries."""
    one, shipped = Study.from_table(ONE_SITE), Study.load(ROOT / "studies" / "breast-cancer.toml")
    noised = {f"one site, noise {sigma:g}": one.replace(privacy={"noise_multiplier": sigma, "delta": 1e-4}) for sigma in (1.0, 2.0)}
    gradient = {"one site, no noise": one, **noised, "shipped, epsilon 3": shipped, "shipped, no noise": shipped.replace(privacy={"unit": "none"})}
    record = {"shipped, no noise, records": shipped.replace(privacy={"unit": "none"})}
    return {**{name: (study, "gradient") for name, study in gradient.items()}, **{name: (study, "record") for name, study in record.items()}}


def honest() -> Study:
    """Every patient in every step, and a promise that is kept."""
    training = {"batch_size": 397, "local_steps": 4}
    return Study.from_table(ONE_SITE).replace(training=training, privacy={"epsilon": 2.0, "delta": 1e-4})


def measure(study: Study, kind: CanaryKind) -> dict[str, object]:
    """Means over `SEEDS`."""
    found: list[CanaryAudit] = []
    seconds = []
    for seed in SEEDS:
        started = time.perf_counter()
        found.append(audit(study, kind=kind, seed=seed))
        seconds.append(time.perf_counter() - started)
    return {
        "epsilon_lower": statistics.fmean(one.epsilon_lower for one in found),
        "epsilon_lower_fdp": statistics.fmean(one.epsilon_lower_fdp for one in found),
        "epsilon_claimed": found[0].epsilon_claimed,
        "steps": found[0].steps,
        "seconds": statistics.median(seconds),
    }


def main() -> int:
    """Measure, print, and fail where honest runs alarm more often than one in twenty allows (one false failure in 1,000)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="honest runs (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    log = sys.stderr if options.json else sys.stdout
    table = {}
    for name, (study, kind) in studies().items():
        table[name] = row = measure(study, kind)
        claimed = "-" if row["epsilon_claimed"] is None else f"{row['epsilon_claimed']:.2f}"
        print(
            f"{name:28} at least {row['epsilon_lower']:5.2f}   by f-DP {row['epsilon_lower_fdp']:5.2f}   claimed {claimed:>5}   "
            f"{row['steps']} steps   {row['seconds']:.2f} s", file=log,
        )  # fmt: skip
    runs = [audit(honest(), seed=1000 + seed) for seed in range(options.runs)]
    alarms, most = sum(run.exceeds for run in runs), max(run.epsilon_lower_fdp for run in runs)
    print(f"{options.runs} honest runs at epsilon 2: {alarms} alarms, the highest bound {most:.2f}", file=log)
    finish({"audits": table, "honest_runs": options.runs, "alarms": alarms, "highest_bound": most}, as_json=options.json)
    return int(alarms > stats.binom.isf(1e-3, options.runs, ALARM_RATE))


if __name__ == "__main__":
    sys.exit(main())
