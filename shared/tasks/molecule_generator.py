"""Molecule generator: a language model of SELFIES symbols, from which candidate molecules are drawn.

A recurrent network (GRU: Cho et al. 2014) says how likely each symbol is after those before it, as Segler et al. 2018 ("Generating focused molecule
libraries for drug discovery with recurrent neural networks", ACS Cent. Sci. 4:120-131) did with SMILES; in SELFIES (Krenn et al. 2020) nearly every
sequence is a molecule. Molecules are flat: without stereochemistry and isotopes.

What a site can report of its test molecules is how well they are predicted: perplexity and accuracy, sums over symbols. Validity, uniqueness and
novelty are of samples of the model, not of anybody's molecules, so they are no metric of a site: `sample_molecules` draws them and `judge` counts,
wherever the parameters are. Only how many samples are training molecules needs those, and only there.

Legend: N molecules (records), T places of a sequence, V symbols, H width of the state.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataMissingError
from shared.metrics import Metric, Statistic
from shared.models import Parameters, make_private, set_parameters
from shared.schema import TensorSchema
from shared.seeding import derive, generator
from shared.task import Task
from shared.tasks.images import tolerance_of
from shared.tasks.molecules import (
    ALPHABET,
    BOUNDARY,
    NUM_SYMBOLS,
    SYNTHETIC_SITES,
    canonical_smiles,
    largest_piece,
    parse,
    parsed_synthetic,
    rdkit_in_silence,
    read_molecules,
    sequences,
    smiles_of,
    symbols_of,
    synthetic_smiles,
)

FloatArray = NDArray[np.float64]

NAME = "molecule-generator"
LENGTH = 40  # T: 39 symbols and the boundary
WIDTH, HIDDEN = 32, 64
MOST_NATS = 12.0  # of a symbol in a metric; a worse prediction counts as so bad
MOST_SAMPLES = 1_000_000
LEAST_ATOMS = 2  # heavy atoms of the largest piece of what counts as a molecule, strictly

SCHEMA = (TensorSchema(name="symbols", shape=(LENGTH,), dtype="int64", unit=f"boundary, {', '.join(ALPHABET)}", low=0.0, high=NUM_SYMBOLS - 1),)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV file with a column `SMILES` and maybe `site`, or a folder of such; see `shared.tasks.molecules.read_molecules`.

    Files of AqSolDB and ESOL will do as published. Molecules with a symbol that the alphabet lacks, or with more than 39, are beyond what this model
    can say: they are left out and counted, and do not count as unusable rows. A molecule that a compound has already is left out, too.

    Args:
        options: `tolerance`, the share of rows whose SMILES may be unusable.

    Raises:
        ConfigurationError: package rdkit or selfies is not there, or an option is unknown or out of range.
        DataMissingError, DataAccessError, SchemaError: data are missing, may not be read, or are not as declared; or too many rows are unusable.
    """
    molecules = read_molecules(path, task=NAME, tolerance=tolerance_of(options, NAME))
    with rdkit_in_silence():
        flat = [canonical_smiles(molecule, flat=True) for molecule in molecules.parsed]
    symbols = {text: symbols_of(text) for text in dict.fromkeys(flat)}
    unknown = np.array([symbols[text] is None for text in flat])
    too_long = np.array([len(symbols[text] or ()) >= LENGTH for text in flat])
    places = {key: row for row, key in reversed([*enumerate(zip(molecules.compound_of_record.tolist(), flat, strict=True))])}  # the first of each
    repeated = ~np.isin(np.arange(len(flat)), list(places.values()))
    kept = np.flatnonzero(~(unknown | too_long | repeated))
    if not len(kept):
        raise DataMissingError(f"task {NAME}: expected molecules of at most {LENGTH - 1} known symbols, found none", "check the files")
    inputs, targets = sequences([symbols[flat[index]] or () for index in kept], LENGTH)
    present, patient_of_record = np.unique(molecules.compound_of_record[kept], return_inverse=True)
    left_out = {
        "unknown_symbols_left_out": unknown,
        "longer_molecules_left_out": too_long,
        "repeated_molecules_left_out": repeated & ~unknown & ~too_long,
    }
    return Cohort(
        inputs=(inputs,),
        labels=targets,
        patient_of_record=patient_of_record.astype(np.int64),
        patient_ids=tuple(molecules.compounds[index] for index in present.tolist()),
        attributes={} if molecules.sites is None else {"site": molecules.sites[present]},
        notes={**molecules.notes, **{name: int(mask.sum()) for name, mask in left_out.items()}},
    )


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic compounds of four laboratories, which prefer other scaffolds and groups; none is longer than the model can say."""
    rng = generator(seed, "synthetic", NAME)
    site = rng.integers(len(SYNTHETIC_SITES), size=num_patients)
    flat = [canonical_smiles(molecule, flat=True) for molecule in parsed_synthetic(synthetic_smiles(site, rng))]
    inputs, targets = sequences([(symbols_of(text) or ())[: LENGTH - 1] for text in flat], LENGTH)
    return Cohort(
        inputs=(inputs,),
        labels=targets,
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": np.array(SYNTHETIC_SITES)[site]},
        synthetic=True,
    )


# Model, loss, metrics -----------------------------------------------------------------------------------------------------------


class MoleculeModel(nn.Module):
    """`(N, T)` symbols -> `(N, T, V)` logits of the symbol after each; a place sees itself and what was before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_SYMBOLS, WIDTH)
        self.recurrent = make_private(nn.GRU(WIDTH, HIDDEN, batch_first=True))
        self.head = nn.Linear(HIDDEN, NUM_SYMBOLS)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Logits of every next symbol."""
        return self.head(self.recurrent(self.embedding(symbols))[0])  # type: ignore[no-any-return]

    def next_symbol(self, symbol: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N,)` symbols and the state before them -> `(N, V)` logits and the state after them: `forward`, a place at a time."""
        seen, state = self.recurrent(self.embedding(symbol[:, None]), state)
        return self.head(seen[:, 0]), state


def mean_symbol_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next symbol in nats, the mean over each molecule's symbols and boundary: `(N,)`."""
    known = labels >= 0
    of_symbol = nn.functional.cross_entropy(outputs.transpose(1, 2), labels.clamp(min=0), reduction="none")
    return (of_symbol * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def symbol_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(3,)`: symbols, nats and symbols that were the likeliest, each over T, so that a compound adds from 0 to 1 to each.

    Args:
        predictions: `(N, T, V)` logarithms of probabilities.
    """
    labels = cohort.labels.astype(np.int64)
    known, truth = labels >= 0, np.maximum(labels, 0)
    scores = np.nan_to_num(predictions, nan=-MOST_NATS)
    nats = np.clip(-np.take_along_axis(scores, truth[..., None], axis=2)[..., 0], 0, MOST_NATS) / MOST_NATS
    hits = scores.argmax(axis=2) == truth
    of_record = np.stack([(values * known).sum(axis=1) for values in (np.ones_like(nats), nats, hits)]) / known.shape[1]
    return np.asarray(of_record @ cohort.record_weights())


def _symbols_agree(sums: FloatArray) -> bool:
    """Neither nats nor hits are more than symbols."""
    return bool((sums[1:] <= sums[0] * (1 + 1e-9) + 1e-9).all())


def _perplexity(sums: FloatArray) -> float | None:
    return float(np.exp(np.clip(sums[1] / sums[0], 0, 1) * MOST_NATS)) if sums[0] > 0 else None


SYMBOLS = Statistic(name="symbols", shape=(3,), summarise=symbol_sums, sensitivity=3**0.5, is_counts=False, agrees=_symbols_agree)
METRICS = (
    Metric(name="perplexity", statistic=SYMBOLS, finish=_perplexity, higher_is_better=False, low=1, high=float(np.exp(MOST_NATS))),
    Metric(name="symbol_accuracy", statistic=SYMBOLS, finish=lambda sums: float(sums[2] / sums[0]) if sums[0] > 0 else None, low=0, high=1),
)


# Samples ------------------------------------------------------------------------------------------------------------------------


def sample_molecules(parameters: Parameters, num: int, seed: int) -> list[str]:
    """`num` SMILES as the SELFIES decoder gives them, from the model with these parameters; empty where a sequence says nothing.

    One that has not ended after T places is taken as it is. Equal arguments give equal samples; the draw is public, and protects nobody.

    Raises:
        ConfigurationError: package selfies is not there, or `num` is not from 1 to a million.
        ProtocolError: the parameters are not the model's.
    """
    if not 1 <= num <= MOST_SAMPLES:
        raise ConfigurationError(f"expected 1 to {MOST_SAMPLES} samples, got another number", "ask for fewer")
    with torch.random.fork_rng(devices=[]):  # a model draws its first parameters, which nobody will see
        model = MoleculeModel()
    set_parameters(model, parameters)
    return [smiles_of(row[: row.index(BOUNDARY)] if BOUNDARY in row else row) for row in _sequences_of(model.eval(), num, seed)]


def _sequences_of(model: MoleculeModel, num: int, seed: int) -> list[list[int]]:
    randomness = torch.Generator().manual_seed(derive(seed, "molecules") % 2**63)
    symbol, state, drawn = torch.full((num,), BOUNDARY), None, []
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            logits, state = model.next_symbol(symbol, state)
            symbol = torch.multinomial(logits.softmax(dim=1), 1, generator=randomness)[:, 0]
            drawn.append(symbol)
    rows: list[list[int]] = torch.stack(drawn, dim=1).tolist()
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What samples are worth; rates are None where there is nothing to divide by.

    Attributes:
        validity: share of the samples that RDKit reads and sanitises, and that are not empty.
        strict_validity: share of those, besides, that have a piece of two heavy atoms at the least: no lone atom, no ions alone.
        one_piece: share of those, besides, that are no salt or mixture.
        uniqueness: different molecules among the strictly valid ones, by flat canonical SMILES.
        novelty: share of the different ones that are no training molecule.
        num_memorised: samples, of all, that are a training molecule.
    """

    num_samples: int
    validity: float
    strict_validity: float
    one_piece: float
    uniqueness: float | None
    novelty: float | None
    num_memorised: int


def judge(samples: Sequence[str], training: Collection[str]) -> Judgement:
    """Validity, uniqueness and novelty (Brown et al. 2019, "GuacaMol", J. Chem. Inf. Model. 59:1096-1108) of SMILES.

    Args:
        training: flat canonical SMILES; see `molecules_of`.

    Raises:
        ConfigurationError: package rdkit is not there, or there is no sample.
    """
    if not samples:
        raise ConfigurationError("expected samples, got none", "draw some")
    with rdkit_in_silence():
        read = [molecule for molecule in map(parse, samples) if molecule is not None]
        strict = [canonical_smiles(molecule, flat=True) for molecule in read if largest_piece(molecule) >= LEAST_ATOMS]
    known, different = set(training), set(strict)
    return Judgement(
        num_samples=len(samples),
        validity=len(read) / len(samples),
        strict_validity=len(strict) / len(samples),
        one_piece=sum("." not in text for text in strict) / len(samples),
        uniqueness=len(different) / len(strict) if strict else None,
        novelty=len(different - known) / len(different) if different else None,
        num_memorised=sum(text in known for text in strict),
    )


def molecules_of(cohort: Cohort) -> list[str]:
    """The flat canonical SMILES of a cohort's records."""
    with rdkit_in_silence():
        read = [parse(smiles_of(row[row > 0].tolist())) for row in cohort.labels]
        return [canonical_smiles(molecule, flat=True) for molecule in read if molecule is not None]


def molecule_generator() -> Task:
    """The task `molecule-generator`."""
    return Task(
        name=NAME,
        title="Candidate molecules from a language model of SELFIES",
        modality="molecules",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=MoleculeModel,
        loss=mean_symbol_loss,
        predict=lambda outputs: torch.log_softmax(outputs, dim=2),
        metrics=METRICS,
        primary_metric="perplexity",
        source="AqSolDB (Sorkun et al. 2019) and ESOL (Delaney 2004); synthetic compounds",
        default_study="molecule-generator.toml",
    )
