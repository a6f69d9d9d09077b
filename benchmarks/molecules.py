"""What the molecule generator draws, without privacy and at epsilon 3: validity, uniqueness, novelty, and how many samples are training molecules.

By itself a training molecule among the samples is no proof of memory: ethanol would be drawn by anybody. So molecules of the test part, which no model
saw, are counted beside them; it is the difference of the two rates that memory makes. And in SELFIES even symbols drawn evenly are mostly valid, unique
and new: they stand beside, with how far descriptors of the samples are from those of test molecules (mean Wasserstein distance over descriptors, each
of a range of 2).

python benchmarks/molecules.py [--data DIR] [--samples N] [--seeds N] [--json]
"""

import argparse
import dataclasses
import logging
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, Study, finish, run_quietly, with_privacy
from scipy.stats import wasserstein_distance

from server.run_folder import RunFolder
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.models import Parameters, get_parameters
from shared.task import architecture_hash, resolve_task
from shared.tasks.molecule_generator import MoleculeModel, judge, molecules_of, sample_molecules
from shared.tasks.molecules import descriptors, parse, rdkit_in_silence
from simulations.federation import load_patients

FIRST_SEED = 7
SETTINGS = {"no privacy": None, "epsilon 3": 3.0}
TO_REACH = "to reach: validity 0.80, uniqueness 0.80; novelty reported"


def even_parameters() -> Parameters:
    """Of a model to which every symbol is as likely as any other."""
    return {name: np.zeros_like(value) for name, value in get_parameters(MoleculeModel()).items()}


def described(smiles: list[str]) -> np.ndarray:
    """Descriptors `(n, D)` of those that are molecules."""
    with rdkit_in_silence():
        molecules = [molecule for molecule in map(parse, smiles) if molecule is not None]
    return descriptors(molecules)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean Wasserstein distance over descriptors."""
    return statistics.fmean(wasserstein_distance(a, b) for a, b in zip(first.T, second.T, strict=True))


def measured(samples: list[str], training: list[str], tested: list[str]) -> dict[str, float]:
    """The judgement, and rates per thousand samples and thousand molecules that might have been met."""
    told = {name: float(value) for name, value in dataclasses.asdict(judge(samples, training)).items() if value is not None}
    met = judge(samples, tested).num_memorised
    told["met_of_training"] = 1e6 * told.pop("num_memorised") / len(samples) / len(set(training))
    told["met_of_test"] = 1e6 * met / len(samples) / len(set(tested))
    told["descriptor_distance"] = distance(described(samples), described(tested))
    return told


def split(cohort: Cohort) -> tuple[list[str], list[str]]:
    """Training and test molecules."""
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    return molecules_of(cohort.select(~test)), molecules_of(cohort.select(test))


def main() -> None:
    """Print all of it, a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with the CSV files of AqSolDB and ESOL; synthetic without")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    shipped = Study.load(ROOT / "studies" / "molecule-generator.toml")
    results: dict[str, object] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        study = shipped.replace(seed=seed)
        training, tested = split(load_patients(resolve_task(study.task), study, arguments.data))
        rows = {"evenly drawn": measured(sample_molecules(even_parameters(), arguments.samples, seed), training, tested)}
        for name, epsilon in SETTINGS.items():
            run = run_quietly(with_privacy(study, epsilon), data=arguments.data)
            parameters = RunFolder.open(run.path).read_model("final", architecture_hash(MoleculeModel()))
            told = measured(sample_molecules(parameters, arguments.samples, seed), training, tested)
            rows[name] = {**told, **{metric: float(value or 0) for metric, value in run.metrics["federated"].items()}}
        for name, values in rows.items():
            results[f"seed {seed}, {name}"] = values
            print(f"seed {seed} {name:12}", "  ".join(f"{key} {value:.4g}" for key, value in values.items()), file=sys.stderr)
        print(f"seed {seed} training molecules: descriptor_distance {distance(described(training), described(tested)):.4g}", file=sys.stderr)
    print(TO_REACH, file=sys.stderr)
    finish(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
