"""Wardround's simulation, from study to closing evaluation, as a user calls it."""

import sys
from pathlib import Path
from typing import Literal

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(BENCHMARKS.parent), str(BENCHMARKS)]  # the checkout beside this file is what is measured, and its workloads

from side import Clock, Setting, write  # noqa: E402

from wardround import Study, simulate  # noqa: E402


def study_of(setting: Setting, noise_source: str) -> Study:
    """The study that says what the other sides are told."""
    privacy: dict[str, object] = {"unit": "none"}
    if setting.private:
        privacy = {"noise_multiplier": setting.noise_multiplier, "delta": 1e-4, "max_grad_norm": setting.max_grad_norm, "noise_source": noise_source}
    return Study.from_table(
        {
            "name": "benchmark", "task": f"workloads:{setting.workload}", "seed": setting.seed, "privacy": privacy,
            "rounds": {"count": setting.rounds}, "strategy": {"name": "fedavg", "weights": "equal"}, "evaluation": {"bootstrap": 0},
            "training": {"learning_rate": setting.learning_rate, "batch_size": setting.batch_size},
            "federation": {"partition": "column", "column": "site"},
        }
    )  # fmt: skip


def main(name: str, execution: Literal["auto", "sequential"], noise_source: str = "seeded") -> None:
    """All rounds."""
    folder = Path(sys.argv[1])
    setting = Setting.read(folder)
    clock = Clock()
    run = simulate(
        study_of(setting, noise_source),
        data=folder,
        out=folder / "runs",
        observe=lambda record: clock.lap(),
        execution=execution,
        processes=setting.processes,
    )
    write(folder, name, clock, float(run.metrics["federated"]["accuracy"]), execution=run.result.execution)


if __name__ == "__main__":
    main("ours", "auto")
