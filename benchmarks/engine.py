"""The in-process engine's own cost: everything of a round but local training and evaluation, for a model of about 10,000 parameters.

The time inside the sites' training and evaluation is measured in the same run and taken off; what is left is messages, checks,
aggregation, ledgers, records and checkpoints.

    python benchmarks/engine.py [--sites N] [--json]
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from measuring import Study, finish

import client.site
import shared.task
from shared.models import mlp
from shared.tasks.breast_cancer import breast_cancer
from simulations.blocks import trainer

T = TypeVar("T")
ONE_BY_ONE = ("train_round", "train_round_private", "evaluate_parameters")

HIDDEN = (96, 64)  # 30 x 96 + 96 + 96 x 64 + 64 + 64 + 1 = 9,249 parameters
ROUNDS = 11  # the first is left out


class Stopwatch:
    """Adds up the time inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, timed."""

        def timed(*args: object, **kwargs: object) -> T:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def ten_thousand_parameters() -> shared.task.Task:
    """The breast-cancer task with a wider model."""
    import dataclasses

    return dataclasses.replace(breast_cancer(), model=lambda: mlp(30, 1, hidden=HIDDEN))


def own_cost(private: bool, sites: int, *, blocks: bool) -> float:
    """Median milliseconds a site and round, training and evaluation taken off."""
    watch = Stopwatch()
    places = [(trainer, "train_block"), (trainer.BlockTrainer, "_evaluate")] if blocks else [(client.site, name) for name in ONE_BY_ONE]
    originals = [getattr(place, name) for place, name in places]
    for (place, name), function in zip(places, originals, strict=True):
        setattr(place, name, watch.around(function))
    privacy = {"epsilon": 3.0, "delta": 1e-4} if private else {"unit": "none"}
    study = Study.from_table(
        {
            "name": "engine",
            "task": "engine:ten_thousand_parameters",
            "privacy": privacy,
            "rounds": {"count": ROUNDS},
            "evaluation": {"bootstrap": 0},
            "federation": {"sites": sites, "min_patients": 10},
        }
    )
    ends: list[tuple[float, float]] = []
    import tempfile

    from wardround import simulate

    try:
        simulate(
            study, out=tempfile.mkdtemp(prefix="wardround-benchmark-"), execution="blocks" if blocks else "sequential", processes=1,
            observe=lambda record: ends.append((time.perf_counter(), watch.seconds)),
        )  # fmt: skip
    finally:
        for (place, name), function in zip(places, originals, strict=True):
            setattr(place, name, function)
    spans = [(b[0] - a[0]) - (b[1] - a[1]) for a, b in itertools.pairwise(ends)]
    return statistics.median(spans) / sites * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data: dict[str, object] = {"sites": arguments.sites}
    for blocks in (True, False):
        for name, private in (("no privacy", False), ("private, ledger and accounting included", True)):
            key = f"{name}, {'in blocks' if blocks else 'site by site'}"
            data[key] = own_cost(private, arguments.sites, blocks=blocks)
            print(f"{key}: {data[key]:.3f} ms a site and round  to reach: under 1 ms", file=sys.stderr)
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()
