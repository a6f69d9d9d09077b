"""The table of all strategies, from the folder of a sweep over `studies/strategies.toml`: AUROC over all sites' test patients, and at the worst site.

wardround sweep strategies --data DIR --out runs
python benchmarks/strategies.py runs/strategies-*
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from simulations.sweeps.cell import CellResult
from wardround.sweeping import SweepRun, summarise


def main() -> None:
    """Print a table a variant, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    results = SweepRun(parser.parse_args().folder).results
    for variant in dict.fromkeys(result.settings["variant"] for result in results):
        print_variant(str(variant), [result for result in results if result.settings["variant"] == variant])


def print_variant(variant: str, results: list[CellResult]) -> None:
    """Mean and 95 % interval over the seeds (Student's t) of the pooled AUROC, and the mean of the worst site's, without privacy and with it."""
    print(f"\n### {variant}\n\n| strategy | no privacy | worst site | epsilon 3 | worst site |\n|---|---|---|---|---|")
    told: dict[str, dict[str, str]] = defaultdict(dict)
    for result in results:
        if result.status == "failed":
            told[str(result.settings["strategy.name"])]["failed"] = result.error or ""
    for row in summarise(results):
        name, epsilon = str(row.settings["strategy.name"]), str(row.settings["privacy.epsilon"])
        low, high = row.interval("federated") or (0.0, 0.0)
        told[name][epsilon] = f"{row.mean('federated'):.3f} ({low:.3f} to {high:.3f}) | {statistics.fmean(map(worst, row.runs)):.3f}"
    for name in dict.fromkeys(str(result.settings["strategy.name"]) for result in results):
        cells = told[name]
        if "failed" in cells:
            print(f"| {name} | {cells['failed'].split(': ', 1)[-1]} | | | |")
        else:
            print(f"| {name} | {cells['none']} | {cells.get('3', cells.get('3.0', ''))} |")


def worst(result: CellResult) -> float:
    """The lowest AUROC of a site that has one: of a site whose test patients are all of one class there is none."""
    return min((value for value in result.per_site.values() if value is not None), default=float("nan"))


if __name__ == "__main__":
    main()
