"""How the cost of a simulation grows: tabular, private, in sites, in rounds and in parameters.

python benchmarks/scaling.py [--processes P] [--picture] [--json]

Each point is a run in a process of its own: milliseconds a site and round (median of the rounds after the first), and the memory of all its processes
at the peak. `slope` is that of log seconds a round over log sites from 100 sites up: 1 is linear. --picture writes docs/pictures/scaling.png.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import ROOT, finish
from running import Result, run_side, write_setting
from simulation import OURS, SEED
from workloads import WORKLOADS

SITES = {10: 21, 100: 11, 1_000: 4, 10_000: 3}  # sites -> rounds, the first of which is left out
ROUNDS = {100: (3, 10, 30, 100)}
WIDTHS = ("tabular", "tabular_128", "tabular_256", "tabular_512")
PICTURE = ROOT / "docs" / "pictures" / "scaling.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run."""

    sites: int
    rounds: int
    parameters: int
    seconds_a_round: float
    ms_a_site: float
    memory_mb: float
    first_round_seconds: float


def measure(workload: str, sites: int, rounds: int, processes: int) -> Point:
    """Run it."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        write_setting(Path(folder), workload=workload, private=True, sites=sites, rounds=rounds, processes=processes, seed=SEED)
        result: Result = run_side(OURS, Path(folder), sys.executable, processes)
    seconds = statistics.median(result.seconds[1:])
    point = Point(
        sites=sites,
        rounds=rounds,
        parameters=sum(parameter.numel() for parameter in WORKLOADS[workload].model().parameters()),
        seconds_a_round=seconds,
        ms_a_site=1000 * seconds / sites,
        memory_mb=result.memory_mb,
        first_round_seconds=result.first_round_seconds,
    )
    print(
        f"{sites:6} sites  {rounds:4} rounds  {point.parameters:7} parameters  {point.ms_a_site:7.3f} ms a site and round"
        f"  {point.memory_mb:6.0f} MB  first round after {point.first_round_seconds:5.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return point


def slope_of(points: list[Point]) -> float:
    """Of log seconds a round over log sites, from 100 sites up."""
    many = [point for point in points if point.sites >= 100]
    return float(np.polyfit(np.log([point.sites for point in many]), np.log([point.seconds_a_round for point in many]), 1)[0])


def draw(by_sites: list[Point], by_rounds: list[Point], by_parameters: list[Point], path: Path) -> None:
    """Three panels: sites, rounds, parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (sites, rounds, parameters) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    slope = slope_of(by_sites)
    last = by_sites[-1]
    sites.loglog([point.sites for point in by_sites], [point.seconds_a_round for point in by_sites], "o-")
    ends = np.array([100, last.sites])
    sites.loglog(ends, last.seconds_a_round * (ends / last.sites), "--", color="grey", label="linear")
    sites.set(xlabel="sites", ylabel="seconds a round", title=f"slope {slope:.2f} from 100 sites up")
    sites.legend(frameon=False)
    rounds.semilogx([point.rounds for point in by_rounds], [point.memory_mb for point in by_rounds], "o-")
    rounds.set(xlabel=f"rounds of {by_rounds[0].sites} sites", ylabel="memory of all processes, MB", title="memory, by rounds")
    rounds.set_ylim(0, 1.2 * max(point.memory_mb for point in by_rounds))
    parameters.loglog([point.parameters for point in by_parameters], [point.ms_a_site for point in by_parameters], "o-")
    parameters.set(xlabel="parameters", ylabel="ms a site and round", title="noise and products, per parameter")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Every point, the slope, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    by_sites = [measure("tabular", sites, rounds, arguments.processes) for sites, rounds in SITES.items()]
    by_rounds = [measure("tabular", sites, rounds, arguments.processes) for sites, several in ROUNDS.items() for rounds in several]
    by_parameters = [measure(workload, 100, 4, arguments.processes) for workload in WIDTHS]
    slope = slope_of(by_sites)
    per_site = [point.ms_a_site for point in by_sites if point.sites >= 100]
    print(f"slope {slope:.3f}; dearest site over cheapest, from 100 sites up: {max(per_site) / min(per_site):.2f}", file=sys.stderr)
    if arguments.picture:
        draw(by_sites, by_rounds, by_parameters, PICTURE)
    series = {"sites": by_sites, "rounds": by_rounds, "parameters": by_parameters}
    points: dict[str, object] = {name: [dataclasses.asdict(point) for point in several] for name, several in series.items()}
    finish({"processes": arguments.processes, "slope": slope, **points}, as_json=arguments.json)


if __name__ == "__main__":
    main()
