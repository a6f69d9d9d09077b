"""The generator: sequences, loss and sums against oracles, samples by the model's own probabilities, and the judge."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataMissingError, ProtocolError
from shared.metrics import finish_metrics
from shared.models import Parameters, get_parameters, initial_parameters, set_parameters
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.molecule_generator import (
    LENGTH,
    METRICS,
    MOST_NATS,
    SYMBOLS,
    MoleculeModel,
    judge,
    load_cohort,
    mean_symbol_loss,
    molecules_of,
    sample_molecules,
    symbol_sums,
    synthetic_cohort,
)
from shared.tasks.molecules import ALPHABET, NUM_SYMBOLS, canonical_smiles, parse, symbols_of
from simulations.blocks.choice import check_alike

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "molecules"


def write(path: Path, smiles: list[str]) -> Path:
    path.write_text("smiles\n" + "\n".join(smiles) + "\n")
    return path


@pytest.fixture(scope="module")
def trained() -> Parameters:
    """A few steps on 60 synthetic molecules."""
    cohort = synthetic_cohort(60, 2)
    model = MoleculeModel()
    set_parameters(model, initial_parameters(model, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        mean_symbol_loss(model(torch.from_numpy(cohort.inputs[0])), torch.from_numpy(cohort.labels)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return get_parameters(model)


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_a_molecule_as_a_sequence(tmp_path: Path) -> None:
    cohort = load_cohort(write(tmp_path / "a.csv", ["OCC", "C"]), {})
    numbers = symbols_of("CCO")
    assert numbers == [1 + ALPHABET.index(symbol) for symbol in ("[C]", "[C]", "[O]")]
    assert cohort.inputs[0][0].tolist() == [0, *numbers, *[0] * (LENGTH - 4)]
    assert cohort.labels[0].tolist() == [*numbers, 0, *[-1] * (LENGTH - 4)]
    assert molecules_of(cohort) == ["CCO", "C"] and cohort.inputs[0].dtype == cohort.labels.dtype == np.int64


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    smiles = ["CCO", "OCC", "C[C@H](N)O", "C[C@@H](N)O", "[U]", "C" * 39, "C" * 40]
    cohort = load_cohort(write(tmp_path / "a.csv", smiles), {})
    assert molecules_of(cohort) == ["CCO", "CC(N)O", "C" * 39] and cohort.num_patients == 3
    left_out = {name: count for name, count in cohort.notes.items() if name.endswith("left_out")}
    assert left_out == {"unknown_symbols_left_out": 1, "longer_molecules_left_out": 1, "repeated_molecules_left_out": 2}
    with pytest.raises(DataMissingError, match="known symbols"):
        load_cohort(write(tmp_path / "b.csv", ["[U]", "C" * 40]), {})
    with pytest.raises(ConfigurationError, match="no option"):
        load_cohort(tmp_path / "a.csv", {"length": 3})


def test_synthetic_molecules_come_whole() -> None:
    cohort = synthetic_cohort(120, 4)
    texts = molecules_of(cohort)
    assert cohort.num_patients == len(texts) == 120 and cohort.synthetic and len(set(texts)) > 80
    assert ((cohort.labels >= 0).sum(axis=1) <= LENGTH).all() and (cohort.labels == 0).sum(axis=1).tolist() == [1] * 120
    assert np.array_equal(cohort.labels, synthetic_cohort(120, 4).labels)


# Loss and sums ------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_a_molecules_own_symbols() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, LENGTH, NUM_SYMBOLS, generator=generator)
    labels = torch.from_numpy(synthetic_cohort(3, 1).labels)
    by_hand = []
    for row in range(3):
        terms = [-float(outputs[row, place].log_softmax(dim=0)[label]) for place, label in enumerate(labels[row].tolist()) if label >= 0]
        by_hand.append(sum(terms) / len(terms))
    assert mean_symbol_loss(outputs, labels).tolist() == pytest.approx(by_hand, rel=1e-5)
    changed = outputs.clone()
    changed[labels < 0] += 7.0 * torch.randn(int((labels < 0).sum()), NUM_SYMBOLS, generator=generator)
    assert torch.equal(mean_symbol_loss(changed, labels), mean_symbol_loss(outputs, labels))


def test_perplexity_of_even_predictions_is_the_number_of_symbols() -> None:
    cohort = synthetic_cohort(20, 1)
    even = np.full((20, LENGTH, NUM_SYMBOLS), -np.log(NUM_SYMBOLS))
    values = finish_metrics(METRICS, {"symbols": symbol_sums(even, cohort)})
    assert values["perplexity"] == pytest.approx(NUM_SYMBOLS)
    perfect = np.full_like(even, -50.0)
    np.put_along_axis(perfect, np.maximum(cohort.labels, 0)[..., None].astype(np.int64), 0.0, axis=2)
    assert finish_metrics(METRICS, {"symbols": symbol_sums(perfect, cohort)}) == pytest.approx({"perplexity": 1.0, "symbol_accuracy": 1.0})


@pytest.mark.parametrize("fault", [np.nan, -np.inf, np.inf, -1e300])
def test_sums_of_a_compound_are_bounded_whatever_is_predicted(fault: float) -> None:
    cohort = synthetic_cohort(5, 1)
    predictions = np.random.default_rng(1).normal(size=(5, LENGTH, NUM_SYMBOLS)) * 20
    predictions[2] = fault
    for one in range(5):
        total = symbol_sums(predictions[one : one + 1], cohort.select(np.array([one])))
        assert np.linalg.norm(total) <= SYMBOLS.sensitivity and SYMBOLS.could_be(total, patients=1)
    total = symbol_sums(predictions, cohort)
    assert SYMBOLS.could_be(total, patients=5) and not SYMBOLS.could_be(total * [1, 1, 99], patients=5)
    assert not SYMBOLS.could_be(np.array([1.0, 1.1, 0.5]), patients=3)


def test_records_of_a_compound_share_its_weight() -> None:
    one = synthetic_cohort(1, 1)
    twice = Cohort(
        inputs=(np.repeat(one.inputs[0], 2, axis=0),),
        labels=np.repeat(one.labels, 2, axis=0),
        patient_of_record=np.zeros(2, dtype=np.int64),
        patient_ids=("a",),
    )
    predictions = np.log(np.random.default_rng(1).dirichlet(np.ones(NUM_SYMBOLS), size=(1, LENGTH)))
    assert np.allclose(symbol_sums(predictions, one), symbol_sums(np.repeat(predictions, 2, axis=0), twice))
    assert symbol_sums(predictions, one)[1] * MOST_NATS * LENGTH == pytest.approx(
        -sum(predictions[0, place, label] for place, label in enumerate(one.labels[0].tolist()) if label >= 0)
    )


def test_nobody_tested() -> None:
    assert finish_metrics(METRICS, {"symbols": np.zeros(3)}) == {"perplexity": None, "symbol_accuracy": None}


# Model and samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_trains_in_blocks_and_with_privacy() -> None:
    task = resolve_task("molecule-generator")
    assert check_alike(task).held > 0
    probe_model(task, Study.load(ROOT / "studies" / "molecule-generator.toml"))


def test_a_place_sees_nothing_after_it(trained: Parameters) -> None:
    model = MoleculeModel()
    set_parameters(model, trained)
    inputs = torch.from_numpy(synthetic_cohort(4, 3).inputs[0])
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % NUM_SYMBOLS
    assert torch.equal(model(inputs)[:, :7], model(changed)[:, :7]) and not torch.equal(model(inputs)[:, 7:], model(changed)[:, 7:])


def test_a_place_at_a_time_is_the_same(trained: Parameters) -> None:
    model = MoleculeModel()
    set_parameters(model, trained)
    inputs, state, logits = torch.from_numpy(synthetic_cohort(4, 3).inputs[0]), None, []
    for place in range(LENGTH):
        given, state = model.next_symbol(inputs[:, place], state)
        logits.append(given)
    assert torch.allclose(torch.stack(logits, dim=1), model(inputs), atol=1e-5)


def test_samples_are_the_parameters_and_the_seeds(trained: Parameters) -> None:
    samples = sample_molecules(trained, 50, 1)
    assert samples == sample_molecules(trained, 50, 1) != sample_molecules(trained, 50, 2) and len(samples) == 50
    before = torch.random.get_rng_state()
    sample_molecules(trained, 5, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    for num in (0, 10**7):
        with pytest.raises(ConfigurationError, match="1 to"):
            sample_molecules(trained, num, 1)
    with pytest.raises(ProtocolError):
        sample_molecules({**trained, "head.bias": np.full(NUM_SYMBOLS, np.nan, dtype=np.float32)}, 5, 1)


@pytest.mark.slow
def test_samples_follow_the_models_probabilities() -> None:
    """Of carbon, oxygen, or nothing as the only symbols, by a bias alone; chi-square, false alarms in 1e-6 of all seeds."""
    parameters = {name: np.zeros_like(value) for name, value in get_parameters(MoleculeModel()).items()}
    shares = {"[C]": 0.5, "[O]": 0.2}
    bias = np.full(NUM_SYMBOLS, -60.0, dtype=np.float32)
    bias[0] = np.log(0.3)
    for symbol, share in shares.items():
        bias[1 + ALPHABET.index(symbol)] = np.log(share)
    samples = sample_molecules({**parameters, "head.bias": bias}, 4000, 9)
    counts = [sum(text == "" for text in samples), sum(text.startswith("C") for text in samples), sum(text.startswith("O") for text in samples)]
    assert sum(counts) == 4000 and chisquare(counts, [4000 * share for share in (0.3, 0.5, 0.2)]).pvalue > 1e-6


def test_what_was_learned_shows_in_the_samples(trained: Parameters) -> None:
    """A model that has seen rings and chains is much less surprised by others of the kind than one that draws evenly."""
    task, cohort, model = resolve_task("molecule-generator"), synthetic_cohort(100, 8), MoleculeModel()
    set_parameters(model, trained)
    with torch.no_grad():
        predictions = task.predict(model(torch.from_numpy(cohort.inputs[0]))).numpy().astype(np.float64)
    assert float(finish_metrics(METRICS, {"symbols": symbol_sums(predictions, cohort)})["perplexity"] or 99) < 8
    assert judge(sample_molecules(trained, 200, 1), molecules_of(cohort)).validity > 0.9


def test_the_judge() -> None:
    samples = ["CCO", "OCC", "C", "", "CC(C)(C)(C)C", "[Na+].[Cl-]", "CCN.Cl", "c1ccccc1", "C[C@H](N)O", "CC(N)O"]
    judged = judge(samples, ["CCO", "CCC"])
    assert (judged.num_samples, judged.validity, judged.strict_validity, judged.one_piece) == (10, 0.8, 0.6, 0.5)
    assert judged.uniqueness == pytest.approx(4 / 6) and judged.novelty == pytest.approx(3 / 4) and judged.num_memorised == 2
    nothing = judge(["", "C"], ["CCO"])
    assert (nothing.validity, nothing.strict_validity, nothing.uniqueness, nothing.novelty, nothing.num_memorised) == (0.5, 0.0, None, None, 0)
    with pytest.raises(ConfigurationError):
        judge([], ["CCO"])


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "delaney-processed.csv").exists(), reason="AqSolDB and ESOL are not in ../shared/data/molecules")
def test_aqsoldb_and_esol_as_published() -> None:
    cohort = load_cohort(DATA, {})
    assert (cohort.num_patients, cohort.num_records) == (7808, 7842) and set(cohort.attributes["site"]) == set("ABCDEFGHI")
    assert dict(cohort.notes) == {
        "records_dropped": 2, "files_passed_over": 0, "records_moved_between_sites": 1370, "unknown_symbols_left_out": 387,
        "longer_molecules_left_out": 1644, "repeated_molecules_left_out": 1235,
    }  # fmt: skip
    texts = molecules_of(cohort)
    assert len(texts) == 7842 and all(canonical_smiles(parse(text), flat=True) == text for text in texts[::200])
