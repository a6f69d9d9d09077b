"""FedBuff beside FedAvg where sites differ in speed: virtual seconds until both have come to the same loss, over seeds.

Breast cancer at sites that differ in their labels (Dirichlet 0.5), without privacy. A site's training takes exp(slowness z) virtual seconds, z normal.
FedAvg waits for the slowest in every round. FedBuff steps whenever `--buffer` updates are there, so a step is less, and there are many more of them.
The loss is the mean over all training patients of the model that a round ends with; the goal is the lowest that FedAvg has within `--rounds` rounds.
Where FedBuff does not come to it in eight times as many steps, that is said; and so is how many sites never had an update that counted: they were
too slow, or each was too old.

python benchmarks/fedbuff.py [--sites N] [--buffer K] [--rounds N] [--seeds N] [--slowness 0,0.5,1,2] [--json]
"""

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import SEEDS, Study, finish

from server.run_folder import Checkpoint, RunFolder
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.models import Parameters, set_parameters
from simulations.setting import Setting
from simulations.simulate import execute, prepare, start_run

MORE_STEPS = 8  # than FedAvg has rounds
NEVER = float("inf")


def study_of(*, sites: int, slowness: float, seed: int, rounds: int) -> Study:
    """FedAvg, with equal weights as FedBuff has them."""
    return Study.from_table(
        {
            "name": "speed", "task": "breast-cancer", "seed": seed, "rounds": {"count": rounds, "deadline": "10h"},
            "training": {"learning_rate": 0.1, "local_steps": 5, "batch_size": 32}, "strategy": {"name": "fedavg", "weights": "equal"},
            "privacy": {"unit": "none"}, "evaluation": {"bootstrap": 0},
            "federation": {"sites": sites, "partition": "dirichlet", "alpha": 0.5, "slowness": slowness},
        }
    )  # fmt: skip


def training_patients(setting: Setting) -> list[Cohort]:
    """Of each site."""
    assert setting.federation is not None
    return [cohort.select(~held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for cohort in setting.federation.cohorts.values()]


def loss_of(setting: Setting, parts: list[Cohort], parameters: Parameters) -> float:
    """The mean over all training patients."""
    model, total = setting.task.model(), 0.0
    set_parameters(model, parameters)
    for part in parts:
        with torch.no_grad():
            outputs = model.eval()(*(torch.from_numpy(values) for values in part.inputs))
            total += float(setting.task.loss(outputs, torch.from_numpy(part.labels)).sum())
    return total / sum(len(part.labels) for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A run: virtual seconds and loss at the end of every round, and how many sites never had an update that counted."""

    points: list[tuple[float, float]]
    num_unheard: int

    def seconds_to(self, goal: float) -> float:
        """When the loss is first at most this."""
        return next((seconds for seconds, loss in self.points if loss <= goal), NEVER)


def course_of(study: Study) -> Course:
    """The run of a study."""
    setting = prepare(study, None)
    parts, losses = training_patients(setting), list[float]()
    folder = start_run(setting, Path(tempfile.mkdtemp(prefix="wardround-benchmark-")))
    written = RunFolder.write_checkpoint

    def watched(self: RunFolder, checkpoint: Checkpoint) -> None:
        losses.append(loss_of(setting, parts, checkpoint.parameters))
        written(self, checkpoint)

    RunFolder.write_checkpoint = watched  # type: ignore[method-assign]
    try:
        execute(setting, folder, baselines=False, execution="sequential")
    finally:
        RunFolder.write_checkpoint = written  # type: ignore[method-assign]
    records = folder.rounds()
    seconds = itertools.accumulate(1.0 if record.virtual_seconds is None else record.virtual_seconds for record in records)
    heard = {site.name for record in records for site in record.sites if site.status == "ok"}
    return Course(points=list(zip(seconds, losses, strict=True)), num_unheard=len(setting.site_names) - len(heard))


def compared(arguments: argparse.Namespace, slowness: float) -> Iterator[tuple[float, float, int]]:
    """Virtual seconds of FedAvg and of FedBuff, and the sites that FedBuff never heard, by seed."""
    for seed in SEEDS[: arguments.seeds]:
        study = study_of(sites=arguments.sites, slowness=slowness, seed=seed, rounds=arguments.rounds)
        waiting = course_of(study)
        goal = min(loss for _, loss in waiting.points)
        buffered = course_of(
            study.replace(strategy={"name": "fedbuff", "buffer_size": arguments.buffer}, rounds={"count": MORE_STEPS * arguments.rounds})
        )
        yield waiting.seconds_to(goal), buffered.seconds_to(goal), buffered.num_unheard


def main() -> None:
    """Print a line for each slowness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--buffer", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--slowness", default="0,0.5,1,2")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # an update that is too old is one, and is counted below
    data: dict[str, object] = {}
    for slowness in [float(value) for value in arguments.slowness.split(",")]:
        found = list(compared(arguments, slowness))
        ratios = np.array([waiting / buffered for waiting, buffered, _ in found])
        never, unheard = sum(buffered == NEVER for _, buffered, _ in found), [number for *_, number in found]
        times = [f"{statistics.median(column):8.1f} s" for column in list(zip(*found, strict=True))[:2]]
        told = f"; sites never heard: {unheard}" + (f"; FedBuff did not come to it in {never} of {len(found)}" if never else "")
        print(f"slowness {slowness:3g}: FedAvg {times[0]}, FedBuff {times[1]} (medians); {np.median(ratios):.2f} times as fast "
              f"({ratios.min():.2f} to {ratios.max():.2f}){told}", file=sys.stderr, flush=True)  # fmt: skip
        data[f"seconds at slowness {slowness:g}"] = [
            [waiting, None if buffered == NEVER else buffered, number] for waiting, buffered, number in found
        ]
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
