"""The risk table counts patients as their scores say, and shows no share of a handful."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from shared.metrics import RISK_EDGES, bin_of_score, bin_scores, risk_bands
from wardround.report import risk
from wardround.report.risk import risk_grid
from wardround.report.wording import number


def histogram_of(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    histogram = np.zeros((2, len(bin_scores())))
    np.add.at(histogram, (labels, bin_of_score(scores)), 1)
    return histogram


def test_bands_hold_the_patients_whose_scores_are_in_them() -> None:
    rng = np.random.default_rng(1)
    scores = bin_scores()[rng.integers(0, len(bin_scores()), 2000)]  # middles of bins, so that rounding moves nobody
    labels = (rng.random(2000) < scores).astype(int)
    bands = risk_bands(histogram_of(scores, labels))
    assert [(band.low, band.high) for band in bands] == list(zip((0.0, *RISK_EDGES), (*RISK_EDGES, 1.0), strict=True))
    for band in bands:
        inside = (scores >= band.low) & (scores < band.high)
        assert (band.patients, band.positives) == (inside.sum(), labels[inside].sum())
        assert band.mean == pytest.approx(scores[inside].mean())
    assert [band.mean for band in risk_bands(np.zeros((2, len(bin_scores()))))] == [0.0] * 7


def test_a_row_says_what_came_true_and_what_acting_from_there_would_find(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.repeat([0.02, 0.15, 0.3, 0.9], [50, 3, 40, 20])
    labels = np.concatenate([np.zeros(50), np.ones(3), np.arange(40) < 12, np.arange(20) < 15]).astype(int)
    monkeypatch.setattr(risk, "drawable", lambda run, name: {"federated": histogram_of(scores, labels)})
    grid = risk_grid(SimpleNamespace(study=SimpleNamespace(own_models=False)))  # type: ignore[arg-type]  # nothing else of a run is looked at
    assert grid is not None
    texts = {row.name: [cell.text for cell in row.cells] for row in grid.table.rows}
    assert [row.name for row in grid.table.rows][:2] == ["0 % to 5 %", "5 % to 10 %"]
    assert texts["0 % to 5 %"][0] == "50" and texts["0 % to 5 %"][2:] == ["0.000", "1.000", number(30 / 113)]
    assert texts["10 % to 20 %"][2] == "–", "three patients are no share"
    assert texts["20 % to 40 %"][2:] == ["0.300", number(27 / 30), number(27 / 60)]
    assert texts["80 % to 100 %"][2:] == ["0.750", "0.500", "0.750"]
    interval = binomtest(12, 40).proportion_ci(method="wilson")
    shown = {row.name: row.cells[2].below for row in grid.table.rows}
    assert shown["20 % to 40 %"] == f"{number(interval.low)} to {number(interval.high)}"


def test_without_chances_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk, "drawable", lambda run, name: {})
    assert risk_grid(SimpleNamespace()) is None  # type: ignore[arg-type]
