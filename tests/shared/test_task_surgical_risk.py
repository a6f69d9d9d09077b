"""Risk after surgery: whose stays, what is summarised, and the risk table against a count by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from client.private_probe import probe_model
from shared.metrics import SCORE_HISTOGRAM, finish_metrics
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.icu_stays import DESCRIPTOR_NAMES, NUM_VARIABLES, VARIABLES
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.surgical_risk import NUM_FEATURES, RISK_METRICS, observed_to_expected, risk_table, summary_inputs, surgical_risk
from simulations.blocks.choice import check_alike

STUDIES = Path(__file__).resolve().parents[2] / "studies"
INDEX = {variable.name: index for index, variable in enumerate(VARIABLES)}


def test_summaries_are_of_what_was_measured() -> None:
    stays = synthetic_stays(1, 1)
    heart = np.full(4, INDEX["HR"])
    stays = replace(
        stays, stay=np.zeros(4, np.int64), variable=heart, minute=np.array([0, 10, 600, 1500]), value=np.array([60.0, 80.0, 120.0, 100.0])
    )
    low, high, second, measured = summary_inputs(stays)[0, : 4 * NUM_VARIABLES].reshape(4, NUM_VARIABLES)
    scaled = VARIABLES[INDEX["HR"]].scaled(np.array([70.0, 120.0, 100.0]))  # the first four hours have a mean of 70
    assert np.allclose([low[INDEX["HR"]], high[INDEX["HR"]], second[INDEX["HR"]]], scaled) and measured.sum() == measured[INDEX["HR"]] == 1
    others = np.arange(NUM_VARIABLES) != INDEX["HR"]
    assert not low[others].any() and not high[others].any() and not second[others].any()
    first_day = replace(stays, minute=np.array([0, 10, 600, 700]))
    assert np.isclose(summary_inputs(first_day)[0, 2 * NUM_VARIABLES + INDEX["HR"]], VARIABLES[INDEX["HR"]].scaled(np.array([90.0]))[0])
    assert summary_inputs(stays).shape == (1, NUM_FEATURES) and 4 * NUM_VARIABLES + len(DESCRIPTOR_NAMES) == NUM_FEATURES


def test_the_risk_table_counts_as_one_would_by_hand() -> None:
    task = surgical_risk()
    cohort = task.synthetic_cohort(500, 4)
    risks = np.random.default_rng(1).beta(0.6, 3, size=500)
    histogram = SCORE_HISTOGRAM.summarise(risks, cohort)
    for band in risk_table(histogram):
        within = (risks >= band.low) & (risks < band.high)
        assert abs(band.patients - within.sum()) <= 5  # a bin of risk may lie on both sides of an edge
        assert abs(band.predicted - risks[within].mean()) < 0.02 and abs(band.observed - cohort.labels[within].mean()) < 0.05
    assert sum(band.patients for band in risk_table(histogram)) == 500
    ratio = observed_to_expected(histogram)
    assert ratio is not None and abs(ratio - cohort.labels.sum() / risks.sum()) < 0.05
    values = finish_metrics(task.metrics, {"score_histogram": histogram})
    assert [values[metric.name] for metric in RISK_METRICS[:3]] == [band.observed for band in risk_table(histogram)]
    assert [metric.name for metric in RISK_METRICS[:3]] == ["died_of_risk_0_to_5", "died_of_risk_5_to_20", "died_of_risk_20_to_100"]


def test_an_empty_band_has_no_rate() -> None:
    nobody = np.zeros(SCORE_HISTOGRAM.shape)
    assert risk_table(nobody) == [] and observed_to_expected(nobody) is None and all(metric.of(nobody) is None for metric in RISK_METRICS)
    noised = np.random.default_rng(1).normal(size=SCORE_HISTOGRAM.shape)
    for metric in RISK_METRICS[:3]:
        value = metric.of(noised)
        assert value is None or 0 <= value <= 1


def test_it_trains_in_blocks_and_with_privacy() -> None:
    task = resolve_task("surgical-risk")
    assert check_alike(task).held > 0
    probe_model(task, Study.load(STUDIES / "surgical-risk.toml"))
    for number in (6, 60, 800):
        assert task.synthetic_cohort(number, 1).num_patients == number
