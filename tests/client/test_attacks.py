"""What an attacker found, each as a test: models and parameters made to tell of patients, states that tell of a cohort."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.cross_check import epsilon_prv
from client.ledger import Ledger, PlannedStudy
from client.local_training import LocalRound
from client.policy import SiteFile
from client.private_probe import probe_model
from client.private_training import (
    NoisedSum,
    Randomness,
    sum_clipped_gradients,
    train_round_private,
)
from client.real_site import open_site
from client.record_gradients import record_gradients
from client.sampling import physical_size
from shared.cohort import Cohort
from shared.errors import BudgetExhaustedError, ModelRefusedError
from shared.models import initial_parameters, set_parameters
from shared.plan import Limit, SitePlan
from shared.privacy import PrivacyEvent
from shared.study import Study
from shared.task import Task
from tests.client.test_ledger_account import SIGNER

Hospitals = Callable[..., Any]
Studies = Callable[..., Study]
Rounds = Callable[..., LocalRound]
Plans = Callable[..., SitePlan]
Patients = Callable[..., Cohort]


class Looking(nn.Module):
    """Looks a number up in a table whose rows are cut to `max_norm` as they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(16, 4, max_norm=1.0)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows((x[:, 0] * 2).round().long().clamp(-8, 7) + 8))


class Writing(nn.Module):
    """Writes to a trainable parameter, but not on the first few passes, which a probe might look at."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 1000:
            with torch.no_grad():
                self.head.weight += x.detach().mean(0)
        return self.head(x)


class Remembering(nn.Module):
    """Keeps the mean of a batch in a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.data = x.detach().mean(0).clone()
            return x
        return x - self.mean


class Gated(nn.Module):
    """Mixes records as soon as a gate that starts at zero is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.gate * (x - x.mean(0, keepdim=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Looking, r"layer 'rows' \(Embedding\) writes to the rows that it looks up"),
        (lambda: nn.Sequential(Remembering(), nn.Linear(3, 1)), "layer '0' changes 'mean' in training"),
        (Gated, r"layer '\(root\)' \(Gated\), before its layer 'head', mixes the records of a batch"),
    ],
)
def test_models_that_tell_of_their_patients_are_refused(model: Callable[[], nn.Module], words: str, task: Task, make_study: Studies) -> None:
    with pytest.raises(ModelRefusedError, match=words):
        probe_model(dataclasses.replace(task, model=model), make_study())


def test_a_parameter_written_in_a_forward_pass_ends_the_round(task: Task, make_study: Studies, make_plan: Plans, make_patients: Patients) -> None:
    model = Writing()
    model.passes = 1000
    local = LocalRound(study=make_study(), task=dataclasses.replace(task, model=Writing), round_number=1)
    with pytest.raises(ModelRefusedError, match=r"head.weight is written to by a forward pass"):
        train_round_private(model, make_patients(20), local, plan=make_plan(), randomness=Randomness.from_key(bytes(32)))


@pytest.mark.slow
@pytest.mark.parametrize("physical", [1, 5, 16, 100, 256])
@pytest.mark.parametrize("records", ["one", "all"])
@pytest.mark.parametrize("num_patients", [50, 200])
def test_parameters_that_make_much_of_a_last_bit_move_a_sum_by_no_more_than_c(
    physical: int, records: str, num_patients: int, task: Task, make_study: Studies, make_plan: Plans, make_patients: Patients
) -> None:
    """Equal hidden units and head weights of 1e9 that cancel turn a last bit into another gradient. Where the shape of a batch depends on who
    is in it, sums of neighbours were up to 17.8 C apart; with one public shape they are not."""
    hidden = 64
    wide = dataclasses.replace(task, model=lambda: nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)))
    study = make_study(privacy={"max_grad_norm": 1.0, "physical_batch_size": physical, "records_per_patient": records})
    local = LocalRound(study=study, task=wide, round_number=1)
    plan = make_plan(max_grad_norm=1.0)

    def clipped_sum(model: nn.Module, cohort: Cohort) -> torch.Tensor:
        units: Any = np.arange(cohort.num_records)
        if records == "all":
            units = [np.flatnonzero(cohort.patient_of_record == patient) for patient in range(cohort.num_patients)]
        with record_gradients(model) as gradients:
            total = NoisedSum(list(model.parameters()), gradients, plan=plan, noise=None)  # type: ignore[arg-type]  # none is drawn
            sum_clipped_gradients(total, gradients, cohort, units, local)
            return total.values.clone()

    for seed in range(3):
        cohort = make_patients(num_patients, seed=seed)
        rng = np.random.default_rng(seed)
        model = wide.model()
        parameters = initial_parameters(model, seed)
        first, bias, head, last = list(parameters)
        weights = rng.normal(size=hidden)
        weights[-1] -= weights.sum()
        parameters[first] = np.repeat(rng.normal(size=(1, 3)) * 0.3, hidden, axis=0).astype(np.float32)
        parameters[bias] = np.full_like(parameters[bias], 0.5)
        parameters[head] = (weights * 1e9).astype(np.float32)[None, :]
        parameters[last] = np.zeros_like(parameters[last])
        set_parameters(model, parameters)
        without_first = cohort.select(np.arange(num_patients) > 0)
        moved = float((clipped_sum(model, cohort) - clipped_sum(model, without_first)).norm())
        assert moved <= 1 + 2.0**-13


@pytest.mark.parametrize(
    ("expected", "most", "size"), [(1.0, 256, 16), (32.0, 256, 48), (64.0, 256, 80), (500.0, 256, 256), (500.0, 250, 240), (32.0, 1, 16)]
)
def test_the_shape_of_a_batch_follows_from_public_numbers(expected: float, most: int, size: int) -> None:
    assert physical_size(expected, most) == size


@pytest.mark.slow
def test_two_sites_of_one_state_folder_answer_for_themselves(make_hospital: Hospitals, make_study: Studies, tmp_path: Path) -> None:
    north, study = make_hospital(), make_study()
    (north.folder / "south.csv").write_text((north.folder / "patients.csv").read_text().replace("patient-", "other-").replace(",1\n", ",0\n", 3))
    text = (north.folder / "site.toml").read_text().replace('name = "north"', 'name = "south"').replace("patients.csv", "south.csv")
    (north.folder / "south.toml").write_text(text)
    south = open_site(north.folder / "south.toml", SiteFile.load(north.folder / "south.toml"), north.task)
    updates = []
    for site in (north.site, south):
        site.enrol(north.enrolment(study))
        reply, update, _ = site.train(north.training(study), north.parameters)
        assert reply.privacy is not None and reply.privacy.steps == 2
        updates.append(np.concatenate([value.ravel() for value in update.values()]))
    assert not np.array_equal(*updates)
    south.close()


def test_the_head_moves_whether_or_not_the_cohort_changed(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    heads = [hospital.reopen().enrol(hospital.enrolment(study)).ledger_head for _ in range(3)]
    assert len(set(heads)) == 3


def test_an_open_plan_is_looked_at_again_when_sides_mix_or_the_limit_is_lowered(tmp_path: Path) -> None:
    event = PrivacyEvent(noise_multiplier=2.2, sample_rate=1.0, steps=1)
    study = PlannedStudy(run="r", study="s", study_hash="0" * 64, training=event, evaluation=event)

    def opened(epsilon: float) -> Ledger:
        return Ledger(tmp_path / "l" / "l.sqlite", cohort="c", unit="patient", limit=Limit(epsilon=epsilon, delta=1e-5), signer=SIGNER)

    ledger = opened(2.6)
    ledger.bind_patients([b"a" * 32, b"b" * 32], test=[True, False], merged=False)
    ledger.admit(study)
    ledger.admit(study)  # nothing has changed
    lowered = opened(1.0)
    with pytest.raises(BudgetExhaustedError):
        lowered.admit(study)
    lowered.close()
    ledger.bind_patients([b"a" * 32, b"b" * 32], test=[False, False], merged=False)
    with pytest.raises(BudgetExhaustedError):
        ledger.admit(study)
    ledger.close()


def test_refusals_do_not_fill_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", cohort="c", unit="patient", limit=Limit(epsilon=0.5, delta=1e-5), signer=SIGNER)
    large = PrivacyEvent(noise_multiplier=0.5, sample_rate=1.0, steps=10)
    for number in range(20):
        with pytest.raises(BudgetExhaustedError):
            ledger.check_room(PlannedStudy(run=f"run-{number}", study="s", study_hash="0" * 64, training=large))
    assert ledger.num_rows == 2
    ledger.close()


def test_hardly_anything_spent_is_no_negative_epsilon() -> None:
    for delta in (5e-3, 9e-3):
        value = epsilon_prv([PrivacyEvent(noise_multiplier=50.0, sample_rate=0.01, steps=1)], delta)
        assert value is None or value >= 0
