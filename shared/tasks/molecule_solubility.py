"""Molecule solubility: how much of a compound dissolves in water, from what its structure is made of.

The label is LogS, the decimal logarithm of moles that dissolve in a litre, clipped to a public range: -12 is a picomole, below what is measured, and
2 is above what any liquid holds of itself. The model is a multilayer perceptron on the folded counts of Morgan's fingerprint and on a dozen
descriptors of the whole molecule. The real data are AqSolDB (Sorkun, Khetan and Er 2019, "AqSolDB, a curated reference set of aqueous solubility and
2D descriptors for a diverse set of compounds", Scientific Data 6:143), whose nine sources are the sites. The unit of privacy is the compound.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort
from shared.errors import SchemaError
from shared.models import mlp
from shared.schema import Column, TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import tolerance_of
from shared.tasks.molecules import (
    DESCRIPTORS,
    SYNTHETIC_SITES,
    descriptors,
    fingerprints,
    parsed_synthetic,
    rdkit_module,
    read_molecules,
    synthetic_smiles,
)
from shared.tasks.tabular import label_rule

NAME = "molecule-solubility"
VALUE = "Solubility"
LOW, HIGH = -12.0, 2.0  # LogS, mol/l
RULE = label_rule(Column(name=VALUE, type="number", unit="log10 mol/l", low=LOW, high=HIGH))
NUM_BITS = 1024
HIDDEN = 32

SCHEMA = (
    TensorSchema(name="fingerprint", shape=(NUM_BITS,), unit="Morgan counts of radius 2, folded, log2(1 + count) / 3", low=0.0, high=1.0),
    TensorSchema(name="descriptors", shape=(len(DESCRIPTORS),), unit=", ".join(kind.name for kind in DESCRIPTORS), low=-1.0, high=1.0),
)


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV file with the columns `SMILES` and `Solubility` (LogS) and maybe `site`, or a folder of such; see `shared.tasks.molecules.read_molecules`.

    AqSolDB's file as published will do: the letter of its `ID` is the site. Rows of one compound are its records.

    Args:
        options: `tolerance`, the share of rows that may be unusable.

    Raises:
        ConfigurationError: package rdkit is not there, or an option is unknown or out of range.
        DataMissingError, DataAccessError, SchemaError: data are missing, may not be read, or are not as declared; or too many rows are unusable.
    """
    tolerance = tolerance_of(options, NAME)
    molecules = read_molecules(path, task=NAME, tolerance=tolerance, value=VALUE)
    outside = (molecules.values < LOW) | (molecules.values > HIGH)
    if outside.sum() > max(1.0, tolerance * len(outside)):
        raise SchemaError(
            f"column {VALUE!r}: expected values from {LOW:g} to {HIGH:g} log10 mol/l, got {int(outside.sum())} of {len(outside)} outside",
            "check the unit",
        )
    return Cohort(
        inputs=(fingerprints(molecules.parsed, NUM_BITS), descriptors(molecules.parsed)),
        labels=np.clip(molecules.values, LOW, HIGH).astype(np.float32),
        patient_of_record=molecules.compound_of_record,
        patient_ids=molecules.compounds,
        attributes={} if molecules.sites is None else {"site": molecules.sites},
        notes={**molecules.notes, "values_clipped": int(outside.sum())},
    )


SYNTHETIC_NOISE = 0.5  # of a measurement, in LogS
SYNTHETIC_SHIFT = (0.0, 0.2, -0.2, 0.3)  # of a laboratory's


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic compounds of four laboratories, which make different ones and measure a little differently; soluble as Delaney's equation has it.

    Nothing is missing, for every feature is computed from the structure.
    """
    rng = generator(seed, "synthetic", NAME)
    site = rng.integers(len(SYNTHETIC_SITES), size=num_patients)
    molecules = parsed_synthetic(synthetic_smiles(site, rng))
    truth = np.array([esol(molecule) for molecule in molecules]).reshape(-1)
    values = truth + np.array(SYNTHETIC_SHIFT)[site] + SYNTHETIC_NOISE * rng.standard_normal(num_patients)
    return Cohort(
        inputs=(fingerprints(molecules, NUM_BITS), descriptors(molecules)),
        labels=np.clip(values, LOW, HIGH).astype(np.float32),
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": np.array(SYNTHETIC_SITES)[site]},
        synthetic=True,
    )


def esol(molecule: Any) -> float:
    """LogS by the equation of Delaney 2004 ("ESOL: estimating aqueous solubility directly from molecular structure", J. Chem. Inf. 44:1000-1005)."""
    library = rdkit_module("Chem.Descriptors")
    aromatic = sum(atom.GetIsAromatic() for atom in molecule.GetAtoms()) / max(molecule.GetNumHeavyAtoms(), 1)
    weight, lipophilicity, rotatable = library.MolWt(molecule), library.MolLogP(molecule), library.NumRotatableBonds(molecule)
    return float(0.16 - 0.63 * lipophilicity - 0.0062 * weight + 0.066 * rotatable - 0.74 * aromatic)


class SolubilityModel(nn.Module):
    """A multilayer perceptron over both inputs: `(N, B), (N, D) -> (N, 1)`, the logit of where LogS lies in its range."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(NUM_BITS + len(DESCRIPTORS), 1, hidden=(HIDDEN,))

    def forward(self, fingerprint: torch.Tensor, described: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(torch.cat([fingerprint, described], dim=1))
        return logits


def molecule_solubility() -> Task:
    """The task `molecule-solubility`."""
    return Task(
        name=NAME,
        title="Solubility of a compound in water from its structure",
        modality="molecules",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=SolubilityModel,
        loss=RULE.loss,
        predict=RULE.predict,
        predicted=("Solubility",),
        metrics=RULE.metrics,
        primary_metric="r2",
        source="AqSolDB (Sorkun et al. 2019), nine sources; synthetic compounds",
        default_study="molecule-solubility.toml",
    )
