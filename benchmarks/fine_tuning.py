"""Few outcomes: `icu-mortality` from scratch beside after `self-supervised`, pre-trained without privacy and at epsilon 3, over seeds.

A share of the training patients keeps its outcomes, drawn by keyed hash of the patient's id; the others are left out, as if nobody had told how they
ended. All test patients stay, and pre-training, which reads no outcome, never sees them: both tasks split by the same hash. Fine-tuning is the study
of `icu-mortality` as shipped, without privacy: at 5 % a site has some 35 outcomes, and no budget leaves much of a gradient of so few.

python benchmarks/fine_tuning.py --data DIR [--shares 0.05,0.1,1] [--seeds N] [--json]
"""

import argparse
import dataclasses
import logging
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from measuring import ROOT, SEEDS, Run, Study, finish, mean_and_range, with_privacy
from scipy.stats import t as student

from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients, patient_hash
from shared.task import Task, resolve_task
from shared.tasks.self_supervised import without_outcomes
from simulations.federation import virtual_federation
from simulations.setting import Setting
from simulations.simulate import execute, start_run

PRE_TRAININGS: dict[str, float | None] = {"no privacy": None, "epsilon 3": 3.0}
SCRATCH = "from scratch"
TO_REACH = "to reach: better than from scratch at 5 % of the labels"


def with_outcomes_of(cohort: Cohort, share: float, seed: int) -> Cohort:
    """All test patients, and this share of the training patients; more of a share are the same ones and others."""
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    places = [int.from_bytes(patient_hash(f"outcomes, seed {seed}".encode(), name)[:8], "big") / 2**64 for name in cohort.patient_ids]
    return cohort.select(test | (np.array(places) < share))


def run_of(task: Task, study: Study, cohort: Cohort, *, start_from: Path | None = None) -> Run:
    """The run of a study on this cohort."""

    def given(path: Path | None, options: Mapping[str, object]) -> Cohort:
        return cohort

    with_cohort = dataclasses.replace(task, load_cohort=given)
    setting = Setting(study=study, task=with_cohort, federation=virtual_federation(with_cohort, study, Path()), real={})
    folder = start_run(setting, Path(tempfile.mkdtemp(prefix="wardround-benchmark-")), start_from=start_from)
    execute(setting, folder, baselines=False, processes=1)
    return Run(folder.path)


def metric_of(run: Run, name: str) -> float:
    """The final value at all test patients."""
    return float(run.metrics["federated"][name] or 0)


def compared(values: list[float], others: list[float]) -> str:
    """Mean difference of pairs with a 95 % interval by Student's t, and how often the first is larger."""
    differences = np.subtract(values, others)
    reach = student.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{differences.mean():+.4f} ({differences.mean() - reach:+.4f} to {differences.mean() + reach:+.4f}), larger in {(differences > 0).sum()}"


def main() -> None:
    """Print a line for each share and each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shares", default="0.05,0.1,1")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    mortality, pre_training = resolve_task("icu-mortality"), resolve_task("self-supervised")
    study, before = (Study.load(ROOT / "studies" / f"{name}.toml") for name in ("icu-mortality", "self-supervised"))
    cohort = mortality.load_cohort(arguments.data, {})
    shares = [float(share) for share in arguments.shares.split(",")]
    found: dict[tuple[float, str], list[float]] = {(share, start): [] for share in shares for start in (SCRATCH, *PRE_TRAININGS)}
    skills: dict[str, list[float]] = {name: [] for name in PRE_TRAININGS}
    for seed in SEEDS[: arguments.seeds]:
        starts: dict[str, Path | None] = {SCRATCH: None}
        for name, epsilon in PRE_TRAININGS.items():
            run = run_of(pre_training, with_privacy(before.replace(seed=seed), epsilon), without_outcomes(cohort))
            starts[name] = run.path
            skills[name].append(metric_of(run, "skill"))
            print(f"seed {seed} pre-trained, {name}: skill {skills[name][-1]:.4f}", file=sys.stderr, flush=True)
        for share in shares:
            few = with_outcomes_of(cohort, share, seed)
            for name, start in starts.items():
                run = run_of(mortality, with_privacy(study.replace(seed=seed), None), few, start_from=start)
                found[share, name].append(metric_of(run, "auroc"))
                print(f"seed {seed} share {share:g}, {name}: AUROC {found[share, name][-1]:.4f}", file=sys.stderr, flush=True)
    for (share, name), values in found.items():
        against = "" if name == SCRATCH else f"; against from scratch {compared(values, found[share, SCRATCH])}"
        print(f"share {share:5g} {name:12} AUROC median {statistics.median(values):.4f}, mean {mean_and_range(values)}{against}", file=sys.stderr)
    for name, values in skills.items():
        print(f"pre-trained, {name:12} skill {mean_and_range(values)}", file=sys.stderr)
    print(TO_REACH, file=sys.stderr)
    data: dict[str, object] = {f"auroc {name} at {share:g}": values for (share, name), values in found.items()}
    finish({**data, **{f"skill {name}": values for name, values in skills.items()}}, as_json=arguments.json)


if __name__ == "__main__":
    main()
