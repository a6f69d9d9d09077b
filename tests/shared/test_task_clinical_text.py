"""Clinical texts: equal texts are one patient's, forms in any order give the same, synthetic texts carry signal, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from client.private_probe import probe_model
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.metrics import finish_metrics
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.clinical_text import KIND_WEIGHTS, KINDS, NUM_TOKENS, load_cohort, synthetic_cohort, weighted_loss
from shared.tasks.text import NUM_FORMS, forms_of
from simulations.blocks.choice import check_alike

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "clinical_text"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"clinical_text data are not at {DATA}")
STUDY = Path(__file__).resolve().parents[2] / "studies" / "clinical-text.toml"
TASK = resolve_task("clinical-text")
WORDS = ("carcinoma", "gastric", "cerebral", "cardiac", "infection")
ROWS = [f'"A study of {WORDS[index % 5]} in case {chr(97 + index) * 3}, and more",{index % 5 + 1}' for index in range(24)]


def table(folder: Path, rows: list[str], header: str = "text,label") -> Path:
    (folder / "texts.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


def test_a_table_is_read(tmp_path: Path) -> None:
    cohort = load_cohort(table(tmp_path, ROWS), {})
    assert (cohort.num_patients, cohort.num_records) == (24, 24) and cohort.labels.tolist() == [index % 5 for index in range(24)]
    assert cohort.inputs[0][1].tolist() == [*forms_of("gastric"), *[0] * (NUM_TOKENS - 1)] and cohort.attributes == {}
    assert cohort.notes == {"records_dropped": 0, "records_without_forms": 0, "forms_left_out": 0}
    named = [f"{row.rpartition(',')[0]},{KINDS[index % 5].upper()}" for index, row in enumerate(ROWS)]
    (tmp_path / "medical_tc_labels.csv").write_text("condition_label,condition_name\n1,neoplasms\n")
    again = load_cohort(table(tmp_path, named, "medical_abstract,condition_label"), {})
    assert np.array_equal(again.labels, cohort.labels) and again.patient_ids == cohort.patient_ids


def test_equal_texts_are_of_one_patient(tmp_path: Path) -> None:
    """So that a text with two labels is not trained on under one and tested under the other."""
    cohort = load_cohort(table(tmp_path, [*ROWS, ROWS[0][:-1] + "5"]), {})
    assert (cohort.num_patients, cohort.num_records) == (24, 25) and cohort.patient_of_record[24] == 0 and cohort.labels[24] == 4


def test_patients_and_sites_come_along(tmp_path: Path) -> None:
    rows = [f"{row},p{index // 2},s{index // 12}" for index, row in enumerate(ROWS)]
    cohort = load_cohort(table(tmp_path, rows, "text,label,patient,site"), {})
    assert cohort.num_patients == 12 and cohort.attributes["site"].tolist() == ["s0"] * 6 + ["s1"] * 6
    with pytest.raises(SchemaError, match="one 'site'"):
        load_cohort(table(tmp_path, [*rows, f"{ROWS[1][:-1]}3,p0,s9"], "text,label,patient,site"), {})
    with pytest.raises(SchemaError, match="identifier"):
        load_cohort(table(tmp_path, [*rows, "plain text example,3,,s0"], "text,label,patient,site"), {})


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("Mrs Doe has a headache,6", "outside its set"), ("Mrs Doe has a headache,", "outside its set"), ("Mrs Doe has a headache,inf", "outside"),
        (",1", "without words"), ("12 0.5 ...,1", "without words"), ("Doe \x01\x02 headache binary,1", "control"), (ROWS[0], "twice"),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_up_to_the_tolerance(tmp_path: Path, row: str, match: str) -> None:
    path = table(tmp_path, [*ROWS, row])
    assert load_cohort(path, {}).notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=match) as caught:
        load_cohort(path, {"tolerance": 0.01})
    assert "Doe" not in str(caught.value)


def test_options_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no option"):
        load_cohort(table(tmp_path, ROWS), {"language": "en"})
    with pytest.raises(SchemaError, match="unusable"):
        load_cohort(table(tmp_path, [",1"]), {"tolerance": 0.9})
    with pytest.raises(DataMissingError):
        load_cohort(None, {})
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


def test_order_padding_and_other_records_do_not_matter() -> None:
    model, forms = TASK.model(), synthetic_cohort(30, 2).inputs[0]
    start = initial_parameters(model, 3)
    set_parameters(model, {name: value * (50 if name == "embedding.weight" else 1) for name, value in start.items()})
    expected = predict_in_batches(model, (forms,))
    order = np.random.default_rng(0).permutation(NUM_TOKENS)
    assert torch.allclose(predict_in_batches(model, (forms[:, order],)), expected, atol=1e-5)
    assert torch.allclose(torch.cat([predict_in_batches(model, (forms[i : i + 1],)) for i in range(len(forms))]), expected, atol=1e-5)
    start["embedding.weight"][0] = 1e3  # of padding
    set_parameters(model, {name: value * (50 if name == "embedding.weight" else 1) for name, value in start.items()})
    assert torch.allclose(predict_in_batches(model, (forms,)), expected, atol=1e-5) and expected.std() > 1e-3
    assert torch.isfinite(predict_in_batches(model, (np.zeros((1, NUM_TOKENS), dtype=np.int64),))).all()


def test_the_loss_is_weighted_by_kind_and_of_each_record_alone() -> None:
    losses = weighted_loss(torch.zeros(5, 5), torch.arange(5))
    assert torch.allclose(losses, torch.log(torch.tensor(5.0)) * torch.tensor(KIND_WEIGHTS))


def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    check_alike(TASK)  # raises where the sites would be trained one after another


def counts_of(forms: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(own, minlength=NUM_FORMS)[1:] for own in forms])


def test_synthetic_texts_carry_signal_and_differ_by_site() -> None:
    cohort, test, again = synthetic_cohort(1200, 3), synthetic_cohort(400, 4), synthetic_cohort(1200, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    model = LogisticRegression(max_iter=500).fit(counts_of(cohort.inputs[0]), cohort.labels)
    assert 0.7 < model.score(counts_of(test.inputs[0]), test.labels) < 0.98  # one label in ten is another's
    sites = cohort.attributes["site"]
    lengths = [(cohort.inputs[0][sites == site] > 0).sum(axis=1).mean() for site in np.unique(sites)]
    assert len(lengths) == 4 and max(lengths) > 1.5 * min(lengths)
    shares = [np.mean(cohort.labels[sites == site] == 0) for site in np.unique(sites)]
    assert max(shares) - min(shares) > 0.15  # some 300 texts a site: 0.30 expected, a standard error of 0.04


def test_macro_f1_of_the_confusion_matrix() -> None:
    cohort = synthetic_cohort(50, 1)
    perfect = np.eye(5)[cohort.labels]
    statistic = TASK.metrics[0].statistic
    assert finish_metrics(TASK.metrics, {statistic.name: statistic.summarise(perfect, cohort)}) == {"accuracy": 1.0, "macro_f1": 1.0}


@pytest.mark.slow
@needs_data
def test_the_corpus() -> None:
    cohort = load_cohort(DATA, {})
    assert (cohort.num_patients, cohort.num_records) == (2770, 2888) and np.bincount(cohort.labels).tolist() == [633, 299, 385, 610, 961]
    assert cohort.notes["records_dropped"] == 0 and cohort.notes["records_without_forms"] < 20
    assert int(held_out_patients(cohort, SIMULATION_SPLIT_KEY).sum()) == 870
