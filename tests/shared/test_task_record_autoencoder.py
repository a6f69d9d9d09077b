"""The autoencoder of records: standard units, sums against arithmetic on the arrays, planted outliers, and that the loss sees what was measured alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, ProtocolError, SchemaError
from shared.metrics import finish_metrics
from shared.models import get_parameters, initial_parameters, predict_in_batches, set_parameters
from shared.privacy import evaluation_noise_multiplier
from shared.study import Study
from shared.task import resolve_task
from shared.tasks import icu_apache
from shared.tasks.record_autoencoder import (
    CODE,
    COLUMNS,
    METRICS,
    MOST,
    MOST_SQUARE,
    OUTLIERS,
    RECONSTRUCTION,
    STEPS,
    RecordAutoencoder,
    load_cohort,
    outliers,
    record_autoencoder,
    record_error,
    standard_of,
    standard_values,
)
from simulations.blocks.choice import check_alike

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "eicu_demo"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data/eicu_demo")
FEATURES = icu_apache.SCHEMA.feature_names
FINDINGS = list(icu_apache.FINDINGS)


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return icu_apache.synthetic_cohort(120, 4)


@pytest.fixture(scope="module")
def model() -> RecordAutoencoder:
    model = RecordAutoencoder()
    set_parameters(model, initial_parameters(model, 1))
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> RecordAutoencoder:
    """Two hundred steps on 400 synthetic stays."""
    made = icu_apache.synthetic_cohort(400, 9)
    model, features = RecordAutoencoder(), torch.from_numpy(made.inputs[0])
    set_parameters(model, initial_parameters(model, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        record_error(model(features), torch.from_numpy(made.labels)).mean().backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
    return model.eval()


# Standard units -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("sodium", 139.0, 0.0),
        ("sodium", 147.0, 2.0),  # 4 mmol/l a unit
        ("creatinine", 1.0, 0.0),
        ("creatinine", float(np.exp(0.8)), 2.0),  # 0.4 of a natural logarithm
        ("age", 80.0, 1.0),
        ("temperature", 42.0, MOST),  # more than seven units, cut
    ],
)
def test_a_value_in_standard_units(column: str, value: float, expected: float) -> None:
    declared = next(each for each in icu_apache.SCHEMA.columns if each.name == column)
    assert declared.low is not None and declared.high is not None
    f = np.log if declared.scale == "log" else float
    features = np.zeros((1, len(FEATURES)), dtype=np.float32)
    features[0, FEATURES.index(column)] = 2 * (f(value) - f(declared.low)) / (f(declared.high) - f(declared.low)) - 1
    values, measured = standard_values(features)
    assert values[0, COLUMNS.index(column)] == pytest.approx(expected, abs=1e-4) and measured[0, COLUMNS.index(column)] == 1
    assert standard_of("diabetes") == (0.0, 1.0)


def test_the_model_and_the_arrays_agree_on_what_was_measured(cohort: Cohort, model: RecordAutoencoder) -> None:
    values, measured = standard_values(cohort.inputs[0])
    own_values, own_measured = model.standard(torch.from_numpy(cohort.inputs[0]))
    np.testing.assert_allclose(own_values.numpy(), values, atol=1e-5)
    np.testing.assert_array_equal(own_measured.numpy(), measured)
    assert 0.3 < measured.mean() < 0.95 and np.abs(values).max() <= MOST
    assert (measured[:, [COLUMNS.index(name) for name in COLUMNS if name not in FINDINGS]] == 1).all()


def test_a_value_that_was_not_measured_moves_nothing(cohort: Cohort, model: RecordAutoencoder) -> None:
    features = cohort.inputs[0].copy()
    before = predict_in_batches(model, (features,))
    gone = features[:, FEATURES.index("albumin missing")] == 1
    features[gone, FEATURES.index("albumin")] = 0.77
    assert gone.any()
    torch.testing.assert_close(predict_in_batches(model, (features,)), before)


# Error, code, metrics -----------------------------------------------------------------------------------------------------------


def test_outputs_against_arithmetic(cohort: Cohort, model: RecordAutoencoder) -> None:
    """Error, error of the mirror image and code, each written out."""
    values, measured = standard_values(cohort.inputs[0])
    outputs = predict_in_batches(model, cohort.inputs).numpy()
    assert outputs.shape == (120, 2 + CODE)

    def error_of(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            code = model.encoder(torch.from_numpy(np.concatenate([given, measured - 1], axis=1).astype(np.float32)))
            squares = (model.decoder(code).numpy() - given) ** 2
        return (squares * measured).sum(axis=1) / measured.sum(axis=1), code.numpy()

    errors, code = error_of(values)
    np.testing.assert_allclose(outputs[:, 0], errors, rtol=1e-4)
    np.testing.assert_allclose(outputs[:, 2:], code, atol=1e-5)
    mirrored = cohort.inputs[0].copy()
    turned = [FEATURES.index(name) for name in FINDINGS[::2]]
    mirrored[:, turned] = -mirrored[:, turned].astype(np.float32)
    np.testing.assert_allclose(outputs[:, 1], error_of(standard_values(mirrored)[0])[0], rtol=1e-4)
    in_training = model.train()(torch.from_numpy(cohort.inputs[0])).detach().numpy()
    model.eval()
    np.testing.assert_allclose(in_training[:, 0], outputs[:, 0], rtol=1e-5)
    assert not in_training[:, 1].any()


def test_metrics_against_arithmetic(cohort: Cohort, model: RecordAutoencoder) -> None:
    predictions = predict_in_batches(model, cohort.inputs).numpy().astype(np.float64)
    totals = {statistic.name: statistic.summarise(predictions, cohort) for statistic in (RECONSTRUCTION, OUTLIERS)}
    found = finish_metrics(METRICS, totals)
    values, measured = standard_values(cohort.inputs[0])
    squares, errors = (values**2).sum(axis=1) / measured.sum(axis=1), predictions[:, 0]
    counted = np.minimum(1, MOST_SQUARE / np.hypot(squares, errors))
    assert (counted < 1).any() and found["r2"] == pytest.approx(1 - float(counted @ errors) / float(counted @ squares), abs=0.02), "but for rounding"
    scores, planted = predictions[:, :2].T.reshape(-1), np.repeat([0, 1], len(predictions))
    assert found["outlier_auroc"] == pytest.approx(roc_auc_score(planted, scores), abs=0.01)
    assert finish_metrics(METRICS, {name: 0 * total for name, total in totals.items()}) == {"r2": None, "outlier_auroc": None}


def test_what_a_patient_adds_is_bounded_and_sums_add_up(cohort: Cohort) -> None:
    """Whatever is predicted, also NaN; two records of a patient count half each."""
    rng = np.random.default_rng(1)
    wild = rng.normal(size=(120, 2 + CODE)) * 10.0 ** rng.integers(-3, 9, size=(120, 1))
    wild[::7] = np.nan
    for statistic in (RECONSTRUCTION, OUTLIERS):
        alone = [statistic.summarise(wild[index : index + 1], cohort.select(np.array([index]))) for index in range(120)]
        assert max(float(np.linalg.norm(each)) for each in alone) <= statistic.sensitivity * (1 + 1e-9)
        total = statistic.summarise(wild, cohort)
        np.testing.assert_allclose(total, sum(alone), atol=1e-9)
        assert statistic.could_be(total, patients=120)
        twice = dataclasses.replace(cohort, patient_of_record=np.arange(120) // 2, patient_ids=cohort.patient_ids[:60], attributes={})
        np.testing.assert_allclose(statistic.summarise(wild, twice), total / 2, atol=1e-9)
    assert not RECONSTRUCTION.could_be(np.array([130.0, 0.0]), patients=120)


def test_no_sum_is_a_value_of_one_patient(cohort: Cohort) -> None:
    """A finding that one of sixty had measured: the sums and the difference of two models tell it in sixteenths, of 400 values a few."""
    features = cohort.inputs[0][:60].copy()
    place, flag = FEATURES.index("bilirubin"), FEATURES.index("bilirubin missing")
    features[:, [place, flag]] = 0.0, 1.0
    told: dict[tuple[float, ...], int] = {}
    for value in np.linspace(-1, 1, 400):
        features[0, [place, flag]] = value, 0.0
        values, measured = standard_values(features)
        sums = []
        for expected in (0.0, 1.5):  # of two decoders that give the same whoever comes, and differ in this column alone
            made = np.zeros_like(values)
            made[:, COLUMNS.index("bilirubin")] = expected
            error = (measured * (values - made) ** 2).sum(axis=1) / measured.sum(axis=1)
            alone = dataclasses.replace(cohort.select(np.arange(60)), inputs=(features.copy(),))
            sums += RECONSTRUCTION.summarise(np.column_stack([error, error, np.zeros((60, CODE))]), alone).tolist()
        np.testing.assert_array_equal(np.array(sums) * STEPS, np.round(np.array(sums) * STEPS))
        told[tuple(sums)] = told.get(tuple(sums), 0) + 1
    assert RECONSTRUCTION.shape == (2,), "nothing by column"
    assert len(told) <= 2 * STEPS and max(told.values()) > 20


def test_r2_can_be_used_under_noise() -> None:
    """100 patients, evaluation epsilon 1, delta 1e-4: within 0.5 of the exact value. Its standard deviation is near 0.1, so a draw of forty fails in 2e-5."""
    cohort = icu_apache.synthetic_cohort(100, 4)
    values, measured = standard_values(cohort.inputs[0])
    error = 0.4 * (values**2).sum(axis=1) / measured.sum(axis=1)
    total = RECONSTRUCTION.summarise(np.column_stack([error, error, np.zeros((100, CODE))]), cohort)
    exact, std = METRICS[0].of(total), evaluation_noise_multiplier(1.0, 1e-4) * np.sqrt(2) * RECONSTRUCTION.sensitivity  # two statistics are released
    assert exact == pytest.approx(0.6, abs=0.02)
    rng = np.random.default_rng(11)
    noised = [METRICS[0].of(total + rng.normal(scale=std, size=2)) for _ in range(40)]
    assert all(value is not None and abs(value - exact) < 0.5 for value in noised)
    assert float(np.std([value for value in noised if value is not None])) < 0.2
    assert METRICS[0].of(np.array([1.0, 40.0])) == -1 and METRICS[0].of(np.array([-1.0, 2.0])) is None


def test_a_perfect_reconstruction_explains_everything(cohort: Cohort) -> None:
    perfect = np.zeros((120, 2 + CODE))
    assert METRICS[0].of(RECONSTRUCTION.summarise(perfect, cohort)) == pytest.approx(1.0)


def test_training_explains_and_finds_what_was_planted(trained: RecordAutoencoder) -> None:
    tested = icu_apache.synthetic_cohort(400, 10)
    predictions = predict_in_batches(trained, tested.inputs).numpy().astype(np.float64)
    found = finish_metrics(METRICS, {statistic.name: statistic.summarise(predictions, tested) for statistic in (RECONSTRUCTION, OUTLIERS)})
    assert found["r2"] is not None and found["r2"] > 0.1  # findings of a synthetic stay share its severity alone
    assert found["outlier_auroc"] is not None and found["outlier_auroc"] > 0.8


def test_an_error_of_entry_is_found_and_named(trained: RecordAutoencoder) -> None:
    """Sodium of the first record typed at the end of its range."""
    cohort = icu_apache.synthetic_cohort(200, 12)
    features = cohort.inputs[0].copy()
    features[0, [FEATURES.index("sodium"), FEATURES.index("sodium missing")]] = 1.0, 0.0
    altered = dataclasses.replace(cohort, inputs=(features,))
    parameters = get_parameters(trained)
    before = {found.record: found for found in outliers(parameters, cohort, num=200)}
    after = outliers(parameters, altered, num=200)
    of_it = next(found for found in after if found.record == 0)
    assert of_it.column == "sodium" and of_it.excess > 2 and of_it.error > before[0].error
    assert [found.error for found in after] == sorted((found.error for found in after), reverse=True)
    assert len(outliers(parameters, altered, num=5)) == 5 and repr(of_it) == "Outlier()", "it is of a patient"
    with pytest.raises(ConfigurationError, match="at least 1"):
        outliers(parameters, cohort, num=0)
    with pytest.raises(ProtocolError):
        outliers({"other": np.zeros(1)}, cohort, num=1)


# The task -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"epsilon": 3.0, "delta": 1e-3}], ids=["none", "private"])
def test_the_model_is_accepted_and_sites_can_be_stacked(privacy: dict[str, object]) -> None:
    task = resolve_task("record-autoencoder")
    probe_model(task, Study.from_table({"name": "ae", "task": task.name, "privacy": privacy}))
    check_alike(task)


def test_outcomes_do_not_reach_the_loss(cohort: Cohort, model: RecordAutoencoder) -> None:
    outputs, labels = predict_in_batches(model, cohort.inputs), torch.from_numpy(cohort.labels)
    assert torch.equal(record_error(outputs, labels), record_error(outputs, 1 - labels)) and record_error(outputs, labels).shape == (120,)
    assert record_autoencoder().fingerprint() != icu_apache.icu_apache().fingerprint()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", DataMissingError),
        (b"patientunitstayid\n1\n", SchemaError),
        (b"\xff\xfe\x00", SchemaError),
        (b'patientunitstayid,uniquepid\n1,"p1\n', SchemaError),  # a quote left open
    ],
    ids=["empty", "columns", "not UTF-8", "quote"],
)
def test_bad_tables_are_refused(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    (tmp_path / "patient.csv").write_bytes(content)
    with pytest.raises(error):
        load_cohort(tmp_path, {})


def test_missing_data_and_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataMissingError, match="record-autoencoder has no data of its own"):
        load_cohort(None, {})
    with pytest.raises(DataMissingError):
        load_cohort(tmp_path / "none", {})
    with pytest.raises(ConfigurationError, match="sites"):
        load_cohort(tmp_path, {"sites": "ward"})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(tmp_path, {})


@pytest.mark.slow
@needs_data
def test_the_real_regions() -> None:
    cohort = load_cohort(DATA, {})
    assert (cohort.num_patients, cohort.num_records) == (1594, 1979)
    assert np.array_equal(cohort.inputs[0], icu_apache.load_cohort(DATA, {}).inputs[0])
