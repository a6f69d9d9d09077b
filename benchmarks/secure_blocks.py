"""What secure aggregation costs a simulation: seconds of a round of sites in blocks and one after another, under masks and in the clear.

Breast cancer (513 parameters) among virtual sites, each of which does all of its part of the protocol: keys, signatures, shares, masks. One process and
one thread; processor time between the ends of two rounds, so that setting up, the first round and the closing evaluation are left out; medians.
The model under masks is beside that in the clear, as a check.

    python benchmarks/secure_blocks.py [--sites N ...] [--rounds N] [--json]
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import finish

from shared.results import RoundRecord
from shared.study import Study
from shared.task import architecture_hash
from simulations.blocks.choice import Execution
from simulations.simulate import execute, prepare, start_run

KINDS = ("clear", "masked", "masked, distributed noise")
WAYS: tuple[Execution, ...] = ("blocks", "sequential")
STUDY = {"name": "blocks", "task": "breast-cancer", "seed": 1, "training": {"learning_rate": 0.5}, "privacy": {"epsilon": 3.0, "delta": 1e-4}}
Model = dict[str, np.ndarray]


def study_of(num_sites: int, rounds: int, kind: str) -> Study:
    """The study of one case, with patients drawn alike at every site."""
    study = Study.from_table({
        **STUDY, "rounds": {"count": rounds}, "evaluation": {"bootstrap": 0}, "federation": {"sites": num_sites, "partition": "iid", "min_patients": 4},
    })  # fmt: skip
    if kind == "masked, distributed noise":
        shared = {"noise": "distributed", "sites": num_sites, "missing": 1}
        return study.replace(secure_aggregation=shared, training={"local_steps": 1})
    return study.replace(secure_aggregation={}) if kind == "masked" else study


def run(study: Study, how: Execution) -> tuple[float, Model]:
    """Seconds of processor time of a round, and the final model."""
    ends: list[float] = []

    def observe(record: RoundRecord) -> None:
        ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as out:
        setting = prepare(study, None)
        folder = start_run(setting, Path(out))
        execute(setting, folder, baselines=False, observe=observe, execution=how, processes=1)
        model = folder.read_model("final", architecture_hash(setting.task.model()))
    return statistics.median(end - begun for begun, end in itertools.pairwise(ends)), model


def compare(num_sites: int, rounds: int) -> dict[str, object]:
    """Seconds a round of every case, and how far models are apart."""
    seconds, models = dict[str, float](), dict[str, Model]()
    for kind in KINDS:
        for how in WAYS:
            seconds[f"{kind}, {how}"], models[f"{kind}, {how}"] = run(study_of(num_sites, rounds, kind), how)
    apart = {
        f"{kind}: {how} beside {other}": _apart(models[f"{kind}, {how}"], models[other])
        for kind, how, other in (
            ("masked", "blocks", "masked, sequential"), ("masked", "blocks", "clear, blocks"),
            ("masked, distributed noise", "blocks", "masked, distributed noise, sequential"),
        )
    }  # fmt: skip
    return {"sites": num_sites, "rounds": rounds, "seconds_per_round": seconds, "largest_difference": apart}


def _apart(one: Model, other: Model) -> float:
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for num_sites in arguments.sites:
        rows.append(compare(num_sites, arguments.rounds))
        print(f"{num_sites} sites: {rows[-1]['seconds_per_round']}\n  {rows[-1]['largest_difference']}", file=sys.stderr)
    finish({"cases": rows}, as_json=arguments.json)


if __name__ == "__main__":
    main()
