"""Molecules as SMILES: read from CSV files, told apart, and turned into fingerprints, descriptors or SELFIES symbols. Every task on molecules uses it.

SMILES (Weininger 1988, J. Chem. Inf. Comput. Sci. 28:31-36) are parsed by RDKit, which prints those that it cannot read: its log is blocked here,
for an unpublished compound is as much a secret of its site as a patient is. The patient of these tasks is the compound: the first block of the
InChIKey (Heller et al. 2015, J. Cheminform. 7:23), so that stereoisomers, isotopes and protonation states, which a fingerprint can hardly tell
apart, are records of one compound, and are never in training here and in test there.

Fingerprints are Morgan's (Rogers and Hahn 2010, "Extended-connectivity fingerprints", J. Chem. Inf. Model. 50:742-754) as folded counts. Symbols are
SELFIES (Krenn et al. 2020, "Self-referencing embedded strings (SELFIES)", Mach. Learn.: Sci. Technol. 1:045024) of an alphabet that is written
down here, as one collected from a site's molecules would say what is in them.

Legend: N molecules (records), P compounds (patients), B bits, D descriptors, T places of a sequence, V symbols.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.cohort import IntArray
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.tasks.images import MOST_FILE_BYTES, reading, refuse_too_many
from shared.tasks.tabular import read_csv

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

FloatArray = NDArray[np.float64]

SMILES, ID, SITE = "smiles", "id", "site"  # names of columns, whatever their capitals
ENDINGS = (".csv", ".tsv", ".txt")
SOURCE_ID = r"[A-I]-\d+"  # AqSolDB: the letter names the data set that a row comes from
MOST_CHARACTERS = 1000  # of a SMILES; longer ones are unusable, and no parser is given them
KEY_LETTERS = 14  # of the InChIKey's first block
REMEDY_EXTRA = 'pip install "wardround[chem]"'
REMEDY_DATA = "give a CSV file with a column SMILES, or a folder of such, with --data"

RADIUS = 2  # bonds around an atom
MOST_COUNT = 7  # of a feature; more count as so many


class Descriptor(NamedTuple):
    """A number that RDKit computes of a molecule, and its public range; what lies outside is clipped."""

    name: str
    low: float
    high: float
    is_log: bool = False


DESCRIPTORS = (
    Descriptor("MolWt", 10, 2000, is_log=True),
    Descriptor("HeavyAtomCount", 1, 150, is_log=True),
    Descriptor("MolLogP", -8, 12),
    Descriptor("MolMR", 0, 250),
    Descriptor("TPSA", 0, 300),
    Descriptor("LabuteASA", 0, 500),
    Descriptor("NumHAcceptors", 0, 20),
    Descriptor("NumHDonors", 0, 12),
    Descriptor("NumHeteroatoms", 0, 25),
    Descriptor("NumRotatableBonds", 0, 25),
    Descriptor("NumAromaticRings", 0, 6),
    Descriptor("NumAliphaticRings", 0, 6),
    Descriptor("FractionCSP3", 0, 1),
    Descriptor("fragments", 1, 6),
    Descriptor("charges", 0, 6),  # atoms with one
)

_PLAIN = "C N O S P B F Cl Br I =C =N =O =S =P #C #N O-1 S-1 N-1 C-1 N+1 =N+1 #N+1 =O+1 P+1 =N-1 S+1 Si =Si Se"
_HYDROGENS = "NH1 NH1+1 NH2+1 NH3+1 NH4+1 OH1-1 H+1"
_IONS = "Na+1 K+1 Li+1 Cl-1 Br-1 I-1 F-1 O-2 Ca+2 Mg+2 Zn+2 Al+3 Cu+2 Fe+3"
_STRUCTURE = "Branch1 =Branch1 #Branch1 Branch2 =Branch2 #Branch2 Ring1 =Ring1 Ring2 =Ring2"
ALPHABET = (".", *(f"[{symbol}]" for symbol in f"{_STRUCTURE} {_PLAIN} {_HYDROGENS} {_IONS}".split()))
BOUNDARY = 0  # before the first symbol and after the last; symbol k of the alphabet is k + 1
NUM_SYMBOLS = 1 + len(ALPHABET)  # V
NO_SYMBOL = -1  # what stands in targets after the boundary
_NUMBER_OF = {symbol: number for number, symbol in enumerate(ALPHABET, start=1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Molecules:
    """Molecules of a site, in the order of their files.

    Attributes:
        parsed: `(N,)` RDKit's molecules, sanitised.
        compound_of_record: `(N,)` index into `compounds`.
        compounds: `(P,)` first blocks of InChIKeys.
        sites: `(P,)`, or None where nothing tells sites apart.
        values: `(N,)` of the value asked for, finite; 0 where none was.
        notes: what was left out, in counts.
    """

    parsed: tuple[Any, ...] = field(repr=False)
    compound_of_record: IntArray = field(repr=False)
    compounds: tuple[str, ...] = field(repr=False)
    sites: NDArray[np.str_] | None = field(repr=False)
    values: FloatArray = field(repr=False)
    notes: Mapping[str, int]


# Files --------------------------------------------------------------------------------------------------------------------------


def read_molecules(path: Path | None, *, task: str, tolerance: float, value: str | None = None) -> Molecules:
    """The molecules of a CSV file, or of all files of a folder that have the columns asked for.

    Columns, whatever their capitals: `SMILES`; the value's; maybe `site`. Where there is no `site` but an `ID` as AqSolDB's (its letter names one of
    nine sources), the letter is the site; else, where there are several files, a file's name is. A compound at several sites belongs to the first.

    Args:
        value: the column of a number that every molecule needs; None: none is read.
        tolerance: share of the rows that may be unusable.

    Raises:
        ConfigurationError: RDKit is not there.
        DataMissingError, DataAccessError: there is no such file, or it may not be read.
        SchemaError: a file is no such table; or too many rows are unusable.
    """
    files, passed_over = _files(path, task, value)
    several = len(files) > 1
    rows = [row for file, frame in files for row in _rows(file, frame, value, several=several)]
    with rdkit_in_silence():
        parsed = [(row, parse(row.smiles)) for row in rows]
        usable = [(row, molecule, compound_key(molecule)) for row, molecule in parsed if molecule is not None and np.isfinite(row.value)]
    source, unread = path.name if path is not None else "", sum(molecule is None for _, molecule in parsed)
    first = f"{unread} with a SMILES that cannot be read" + (f", the rest without a number as {value}" if value else "")
    refuse_too_many(len(rows) - len(usable), len(rows), tolerance=tolerance, source=source, first=first)
    if not usable:
        raise DataMissingError(f"{source}: expected molecules, found none", "check the files")
    return _molecules(usable, {"records_dropped": len(rows) - len(usable), "files_passed_over": passed_over})


class _Row(NamedTuple):
    smiles: str
    site: str
    value: float


def _files(path: Path | None, task: str, value: str | None) -> "tuple[list[tuple[Path, pd.DataFrame]], int]":
    """Each file with its table, columns in small letters; and how many CSV files of the folder have other columns."""
    if path is None:
        raise DataMissingError(f"task {task} has no data of its own", REMEDY_DATA)
    with reading(str(path)):
        if not path.exists():
            raise DataMissingError(f"{path}: expected data, found nothing", "check the path given with --data")
        found = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix.lower() == ".csv")
    needed = [SMILES, *([value.lower()] if value else [])]
    kept = []
    for file in found:
        frame = _table(file, needed)
        absent = [name for name in needed if name not in frame.columns]
        if absent and path.is_file():
            raise SchemaError(f"{file.name}: expected a column {absent[0]!r}, whatever its capitals, not found", "rename or add it in the file")
        if not absent:
            kept.append((file, frame))
    if not kept:
        wanted = " and ".join(needed)
        raise DataMissingError(f"{path}: expected a CSV file with the columns {wanted}, found none among {len(found)} CSV files", REMEDY_DATA)
    return kept, len(found) - len(kept)


def _table(file: Path, needed: Sequence[str]) -> "pd.DataFrame":
    """A file's table, columns in small letters."""
    if file.suffix.lower() not in ENDINGS:  # by another ending a reader of tables would take it for an archive, and unpack it
        raise SchemaError(f"{file.name}: expected a file ending in {', '.join(ENDINGS)}, got another", "unpack or convert it")
    with reading(str(file)):
        if file.stat().st_size > MOST_FILE_BYTES:
            raise SchemaError(f"{file.name}: expected a file of at most {MOST_FILE_BYTES // 2**20} MiB, got a larger one", "divide it")
    frame = read_csv(file)
    frame.columns = frame.columns.str.strip().str.lower()
    twice = [name for name in (*needed, ID, SITE) if list(frame.columns).count(name) > 1]
    if twice:
        raise SchemaError(f"{file.name}: expected one column {twice[0]!r}, whatever its capitals, got several", "remove the others")
    return frame


def _rows(file: Path, frame: "pd.DataFrame", value: str | None, *, several: bool) -> list[_Row]:
    """The rows of a file; a value that is no number is NaN."""
    import pandas as pd

    if SITE in frame.columns:
        sites = frame[SITE].str.strip()
        if (sites == "").any():
            raise SchemaError(f"{file.name}: column {SITE!r}: expected a name in every row, got none in {int((sites == '').sum())}", "fill it in")
    elif ID in frame.columns and len(frame) and frame[ID].str.fullmatch(SOURCE_ID).all():
        sites = frame[ID].str[0]
    else:
        sites = pd.Series([file.stem if several else ""] * len(frame))
    values = [0.0] * len(frame) if value is None else pd.to_numeric(frame[value.lower()], errors="coerce").tolist()
    return [_Row(*row) for row in zip(frame[SMILES].str.strip().tolist(), sites.tolist(), values, strict=True)]


def _molecules(usable: Sequence[tuple[_Row, Any, str]], notes: Mapping[str, int]) -> Molecules:
    compounds: dict[str, int] = {}
    site_of: list[str] = []
    moved = 0
    for row, _, key in usable:
        if key not in compounds:
            compounds[key] = len(compounds)
            site_of.append(row.site)
        moved += site_of[compounds[key]] != row.site
    return Molecules(
        parsed=tuple(molecule for _, molecule, _ in usable),
        compound_of_record=np.array([compounds[key] for _, _, key in usable], dtype=np.int64),
        compounds=tuple(compounds),
        sites=np.array(site_of, dtype=np.str_) if any(site_of) else None,
        values=np.array([row.value for row, _, _ in usable], dtype=np.float64),
        notes={**notes, "records_moved_between_sites": moved},
    )


# RDKit --------------------------------------------------------------------------------------------------------------------------


def rdkit_module(name: str) -> Any:
    """A module of RDKit, which is imported only where molecules are.

    Raises:
        ConfigurationError: RDKit is not there.
    """
    try:
        return importlib.import_module(f"rdkit.{name}")
    except ImportError:
        raise ConfigurationError("molecules are read by package rdkit, which is not installed", REMEDY_EXTRA) from None


@contextmanager
def rdkit_in_silence() -> Iterator[None]:
    """RDKit's log, which quotes molecules, is blocked for the block.

    Raises:
        ConfigurationError: RDKit is not there.
    """
    with rdkit_module("rdBase").BlockLogs():
        yield


def parse(smiles: str) -> Any | None:
    """RDKit's molecule, sanitised; None where this is none, has no atom, is too long, or is followed by more than a SMILES. Call it in silence."""
    if not 0 < len(smiles) <= MOST_CHARACTERS or not re.fullmatch(r"[!-~]+", smiles):  # a name after a blank would be read, and kept
        return None
    try:
        molecule = rdkit_module("Chem").MolFromSmiles(smiles)
    except (RuntimeError, ValueError):  # what its C++ raises of an odd input
        return None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def canonical_smiles(molecule: Any, *, flat: bool = False) -> str:
    """RDKit's canonical SMILES; `flat` without stereochemistry and isotopes."""
    return str(rdkit_module("Chem").MolToSmiles(molecule, isomericSmiles=not flat))


def compound_key(molecule: Any) -> str:
    """The first block of the InChIKey; the flat canonical SMILES where InChI has none."""
    key = str(rdkit_module("Chem").MolToInchiKey(molecule))
    return key[:KEY_LETTERS] or canonical_smiles(molecule, flat=True)


def largest_piece(molecule: Any) -> int:
    """Heavy atoms of the largest of the pieces that no bond joins."""
    pieces = rdkit_module("Chem").GetMolFrags(molecule)
    return max((sum(molecule.GetAtomWithIdx(index).GetAtomicNum() > 1 for index in piece) for piece in pieces), default=0)


# Numbers ------------------------------------------------------------------------------------------------------------------------


def fingerprints(molecules: Iterable[Any], num_bits: int) -> NDArray[np.float32]:
    """`(N, B)` in [0, 1]: Morgan counts of radius 2, folded; 1 occurrence is a third, 3 are two thirds, 7 and more are 1 (log2(1 + count) / 3)."""
    generator = rdkit_module("Chem.rdFingerprintGenerator").GetMorganGenerator(radius=RADIUS, fpSize=num_bits)
    with rdkit_in_silence():
        counts = [generator.GetCountFingerprintAsNumPy(molecule) for molecule in molecules]
    clipped = np.minimum(np.array(counts, dtype=np.float32).reshape(-1, num_bits), MOST_COUNT)
    return np.asarray(np.log2(1 + clipped) / np.log2(1 + MOST_COUNT), dtype=np.float32)


def descriptors(molecules: Iterable[Any]) -> NDArray[np.float32]:
    """`(N, D)` in [-1, 1]: each of `DESCRIPTORS`, its public range scaled to that; one that is not finite counts as the middle."""
    with rdkit_in_silence():
        table = np.array([_described(molecule) for molecule in molecules], dtype=np.float64).reshape(-1, len(DESCRIPTORS))
    scaled = np.empty_like(table)
    for column, kind in enumerate(DESCRIPTORS):
        low, high, values = kind.low, kind.high, np.clip(table[:, column], kind.low, kind.high)
        if kind.is_log:
            low, high, values = float(np.log(low)), float(np.log(high)), np.log(values)
        scaled[:, column] = 2 * (values - low) / (high - low) - 1
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32)


def _described(molecule: Any) -> list[float]:
    library = rdkit_module("Chem.Descriptors")
    return [float((_OWN.get(kind.name) or getattr(library, kind.name))(molecule)) for kind in DESCRIPTORS]


_OWN: dict[str, Callable[[Any], int]] = {
    "fragments": lambda molecule: len(rdkit_module("Chem").GetMolFrags(molecule)),
    "charges": lambda molecule: sum(atom.GetFormalCharge() != 0 for atom in molecule.GetAtoms()),
}


# Symbols ------------------------------------------------------------------------------------------------------------------------


def _selfies() -> Any:
    try:
        return importlib.import_module("selfies")
    except ImportError:
        raise ConfigurationError("symbols of molecules are made by package selfies, which is not installed", REMEDY_EXTRA) from None


def symbols_of(smiles: str) -> list[int] | None:
    """The numbers of a molecule's SELFIES symbols, without boundaries; None where it has none, or one that the alphabet lacks."""
    selfies = _selfies()
    try:
        numbers = [_NUMBER_OF.get(symbol) for symbol in selfies.split_selfies(selfies.encoder(smiles))]
    except (selfies.EncoderError, ValueError, IndexError, KeyError):  # its message would quote the molecule
        return None
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) and known else None


def smiles_of(symbols: Sequence[int]) -> str:
    """The SMILES of these symbols as the decoder gives it; empty where it gives none."""
    selfies = _selfies()
    try:
        return str(selfies.decoder("".join(ALPHABET[number - 1] for number in symbols)))
    except (selfies.DecoderError, ValueError, IndexError, KeyError):
        return ""


def sequences(symbols: Sequence[Sequence[int]], length: int) -> tuple[IntArray, IntArray]:
    """Inputs and targets `(N, T)`: boundary and symbols, and symbols and boundary; targets after that are `NO_SYMBOL`.

    >>> sequences([[5, 6]], 4)
    (array([[0, 5, 6, 0]]), array([[ 5,  6,  0, -1]]))
    """
    inputs = np.full((len(symbols), length), BOUNDARY, dtype=np.int64)
    targets = np.full((len(symbols), length), NO_SYMBOL, dtype=np.int64)
    for row, numbers in enumerate(symbols):
        inputs[row, 1 : len(numbers) + 1] = numbers
        targets[row, : len(numbers) + 1] = [*numbers, BOUNDARY]
    return inputs, targets


# Synthetic molecules ------------------------------------------------------------------------------------------------------------

SYNTHETIC_SITES = ("synthetic-1", "synthetic-2", "synthetic-3", "synthetic-4")
SYNTHETIC_SALT_RATE = 0.05
_SCAFFOLDS = (
    "c1cc({0})cc({1})c1", "c1ccc({0})c({1})c1", "c1cc({0})ccc1({1})", "c1nc({0})cc({1})c1", "c1cc({0})oc1({1})", "C1CC({0})CC({1})C1", "C1CC({0})CN1({1})",
    "C({0})C({1})", "CC({0})C(C)C({1})", "O=C({0})C({1})", "O=C(N{1})C({0})", "C({0})CCCC({1})", "c1ccc2c({0})cc({1})cc2c1",
)  # fmt: skip
_POLAR = ("O", "N", "C(=O)O", "C(=O)N", "C#N", "CO", "CCO", "N(C)C", "S(=O)(=O)N", "OCCO", "NC(C)=O")
_GREASY = ("C", "CC", "CCC", "C(C)C", "CCCC", "CCCCCC", "Cl", "Br", "F", "C(F)(F)F", "OC", "SC", "c9ccccc9", "C(C)(C)C", "I")


def synthetic_smiles(site: IntArray, rng: np.random.Generator) -> list[str]:
    """A SMILES for each entry of `site`, 0 to 3: scaffolds with two groups, which are the greasier, and the scaffolds others, the higher the site."""
    shares = (0.65, 0.5, 0.4, 0.3)
    preferred = np.stack([np.roll(np.linspace(1.0, 3.0, len(_SCAFFOLDS)), 3 * index) for index in range(len(SYNTHETIC_SITES))])
    preferred /= preferred.sum(axis=1, keepdims=True)
    made = []
    for index in site.tolist():
        groups = [str(rng.choice(_POLAR if rng.random() < shares[index] else _GREASY)) for _ in range(2)]
        salt = ".Cl" if rng.random() < SYNTHETIC_SALT_RATE else ""
        made.append(_SCAFFOLDS[int(rng.choice(len(_SCAFFOLDS), p=preferred[index]))].format(*groups) + salt)
    return made


def parsed_synthetic(smiles: Sequence[str]) -> list[Any]:
    """RDKit's molecules of synthetic SMILES, which are valid by their making."""
    with rdkit_in_silence():
        molecules = [parse(text) for text in smiles]
    assert all(molecule is not None for molecule in molecules)
    return molecules
