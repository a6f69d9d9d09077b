"""Solubility: labels, ranges, the nine sources of the real data, and that the model learns in blocks and with privacy."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from client.private_probe import probe_model
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, SchemaError
from shared.metrics import finish_metrics
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.molecule_solubility import HIGH, LOW, NUM_BITS, esol, load_cohort, synthetic_cohort
from shared.tasks.molecules import DESCRIPTORS, parse
from simulations.blocks.choice import check_alike
from wardround import simulate

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "studies" / "molecule-solubility.toml"
DATA = ROOT.parent / "shared" / "data" / "molecules"


def write(path: Path, rows: list[tuple[str, float]]) -> Path:
    path.write_text("SMILES,Solubility\n" + "".join(f"{smiles},{value}\n" for smiles, value in rows))
    return path


def test_what_a_cohort_holds(tmp_path: Path) -> None:
    cohort = load_cohort(write(tmp_path / "a.csv", [("CCO", 1.1), ("c1ccccc1", -1.64), ("C" * 30, -14.0)]), {})
    assert [values.shape for values in cohort.inputs] == [(3, NUM_BITS), (3, len(DESCRIPTORS))]
    assert all(values.dtype == np.float32 for values in cohort.inputs) and cohort.labels.dtype == np.float32
    assert np.allclose(cohort.labels, [1.1, -1.64, LOW]) and cohort.notes["values_clipped"] == 1 and "site" not in cohort.attributes


def test_a_column_in_another_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="3 of 4 outside"):
        load_cohort(write(tmp_path / "a.csv", [("CCO", 1000), ("CCC", 62), ("CCCC", 61), ("CCCCC", 1)]), {})


@pytest.mark.parametrize("options", [{"bits": 3}, {"tolerance": 1.5}, {"tolerance": "much"}])
def test_options(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="tolerance"):
        load_cohort(write(tmp_path / "a.csv", [("CCO", 1)]), options)


def test_the_truth_of_synthetic_compounds_is_delaneys_equation() -> None:
    assert esol(parse("c1ccccc1")) == pytest.approx(0.16 - 0.63 * 1.6866 - 0.0062 * 78.114 - 0.74, abs=1e-3)
    assert esol(parse("CCCCO")) == pytest.approx(0.16 - 0.63 * 0.7788 - 0.0062 * 74.123 + 0.066 * 2, abs=1e-3)


def test_predictions_are_logs_in_the_declared_range() -> None:
    task = resolve_task("molecule-solubility")
    predicted = task.predict(torch.tensor([[-99.0], [0.0], [99.0]])).tolist()
    assert predicted == pytest.approx([LOW, (LOW + HIGH) / 2, HIGH], abs=1e-4)
    labels = torch.tensor([-5.0])
    outputs = torch.linspace(-6, 6, 4001)[:, None]
    best = outputs[task.loss(outputs, labels.expand(4001)).argmin()]
    assert float(task.predict(best[None])) == pytest.approx(-5.0, abs=0.02)


@pytest.mark.slow
def test_synthetic_compounds() -> None:
    cohort = synthetic_cohort(200, 3)
    assert cohort.num_patients == 200 and cohort.synthetic and set(cohort.attributes["site"]) == {f"synthetic-{n}" for n in (1, 2, 3, 4)}
    again, other = synthetic_cohort(200, 3), synthetic_cohort(200, 4)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and not np.array_equal(cohort.labels, other.labels)
    low, high = ([cohort.labels[cohort.attributes["site"] == f"synthetic-{n}"].mean() for n in sites] for sites in ((3, 4), (1, 2)))
    assert max(low) < min(high)  # what a laboratory makes shifts its labels


def test_it_trains_in_blocks_and_with_privacy() -> None:
    task = resolve_task("molecule-solubility")
    assert check_alike(task).held > 0
    probe_model(task, Study.load(STUDY))


@pytest.mark.slow
def test_it_learns_from_synthetic_compounds(tmp_path: Path) -> None:
    study = Study.load(STUDY).replace(rounds={"count": 10}, privacy={"unit": "none"}, evaluation={"bootstrap": 0}, federation={"num_patients": 800})
    study = study.replace(training={"batch_size": 16})
    run = simulate(study, out=tmp_path, processes=1)
    assert float(run.metrics["federated"]["r2"] or 0) > 0.4  # its noise leaves some 0.85 to be had


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "aqsoldb_curated-solubility-dataset.csv").exists(), reason="AqSolDB is not in ../shared/data/molecules")
def test_aqsoldb_as_published() -> None:
    cohort = load_cohort(DATA / "aqsoldb_curated-solubility-dataset.csv", {})
    assert (cohort.num_patients, cohort.num_records) == (9669, 9980)
    assert Counter(cohort.attributes["site"].tolist()) == {
        "A": 3630, "B": 3480, "C": 1239, "D": 154, "E": 190, "F": 765, "G": 120, "H": 58, "I": 33,
    }  # fmt: skip
    assert dict(cohort.notes) == {
        "records_dropped": 2, "files_passed_over": 0, "records_moved_between_sites": 242, "values_clipped": 4,
    }  # fmt: skip
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    keys = np.array(cohort.patient_ids)
    assert not set(keys[test]) & set(keys[~test]) and test.sum() == 2841
    [ridge] = _ridge(cohort.inputs[1], cohort.labels, test[cohort.patient_of_record])
    assert ridge > 0.45  # the descriptors alone, linearly: solubility is in them


def _ridge(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> list[float]:
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    train = design[~test]
    weights = np.linalg.solve(train.T @ train + np.eye(design.shape[1]), train.T @ labels[~test])
    return [float(1 - np.square(labels[test] - design[test] @ weights).sum() / np.square(labels[test] - labels[test].mean()).sum())]


def test_r2_is_of_the_pooled_sums() -> None:
    task, cohort = resolve_task("molecule-solubility"), synthetic_cohort(60, 1)
    predictions = np.full(60, float(cohort.labels.mean()))
    parts = [cohort.attributes["site"] == name for name in np.unique(cohort.attributes["site"])]
    [statistic] = {metric.statistic.name: metric.statistic for metric in task.metrics}.values()
    total = sum(statistic.summarise(predictions[part], cohort.select(part)) for part in parts)
    assert finish_metrics(task.metrics, {statistic.name: np.asarray(total)})["r2"] == pytest.approx(0.0, abs=1e-6)
