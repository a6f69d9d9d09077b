"""Days in hospital: the rule for deaths, the loss on log-days, and predictions within the declared range."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import DataMissingError
from shared.study import Study
from shared.task import resolve_task
from shared.tasks import length_of_stay
from shared.tasks.icu_stays import IcuStays
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.length_of_stay import MOST_DAYS, SMOOTH, USUAL_DAYS, load_cohort, log_days_loss, predicted_days
from simulations.blocks.choice import check_alike

STUDIES = Path(__file__).resolve().parents[2] / "studies"


def cohort_with(monkeypatch: pytest.MonkeyPatch, stays: IcuStays) -> Cohort:
    monkeypatch.setattr(length_of_stay, "load_stays", lambda path, options, task: stays)
    return load_cohort(None, {})


def test_deaths_and_unknown_lengths_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stays = synthetic_stays(6, 1)
    stays = replace(stays, died=np.array([0, 1, 0, 0, 1, 0], np.float32), days=np.array([3, 4, math.nan, 90, math.nan, 7], np.float32))
    cohort = cohort_with(monkeypatch, stays)
    assert cohort.patient_ids == ("synthetic-0", "synthetic-3", "synthetic-5") and cohort.labels.tolist() == [3, MOST_DAYS, 7]
    assert cohort.notes["deaths_left_out"] == 2 and cohort.notes["unknown_lengths_left_out"] == 1 and len(cohort.inputs[0]) == 3


def test_nobody_went_home(monkeypatch: pytest.MonkeyPatch) -> None:
    stays = synthetic_stays(4, 1)
    with pytest.raises(DataMissingError, match="ended with a discharge"):
        cohort_with(monkeypatch, replace(stays, died=np.ones(4, np.float32)))


def test_the_loss_is_least_at_the_median_of_log_days_and_its_slope_is_bounded() -> None:
    days = torch.tensor([2.0, 3.0, 8.0, 20.0, 55.0])
    outputs = torch.linspace(-3, 3, 6001)[:, None]
    losses = torch.stack([log_days_loss(outputs, day.expand(6001)) for day in days])
    best = float(predicted_days(outputs)[losses.sum(dim=0).argmin()])
    assert 7 < best < 9
    far = torch.tensor([[50.0], [-50.0]], requires_grad=True)
    log_days_loss(far, days[:2]).sum().backward()  # type: ignore[no-untyped-call]
    assert far.grad is not None and far.grad[:, 0].tolist() == [1, -1]
    exact = torch.tensor([[math.log(20 / USUAL_DAYS)]])
    assert float(log_days_loss(exact, days[3:4])) < 1e-10
    assert math.isclose(float(log_days_loss(exact + 1, days[3:4])), 1 - SMOOTH / 2, rel_tol=1e-5)


def test_predictions_are_days_in_the_declared_range() -> None:
    days = predicted_days(torch.tensor([[0.0], [-99.0], [99.0]]))
    assert np.allclose(days.numpy(), [USUAL_DAYS, 1, MOST_DAYS], rtol=1e-5)


@pytest.mark.slow
def test_it_trains_in_blocks_and_with_privacy() -> None:
    task = resolve_task("length-of-stay")
    assert check_alike(task).held > 0
    probe_model(task, Study.load(STUDIES / "length-of-stay.toml"))
    cohort = task.synthetic_cohort(200, 1)
    assert cohort.num_patients == 200 and cohort.synthetic and cohort.labels.min() >= 2 and cohort.labels.max() <= MOST_DAYS
