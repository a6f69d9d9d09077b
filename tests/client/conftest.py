"""Small real parts for the tests of a site: a task, patients with several records, a study, a hospital with a site.toml."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.account import Charge
from client.ledger import reading
from client.local_training import LocalRound
from client.policy import SiteFile
from client.real_site import open_site
from client.site import Site
from shared.cohort import Cohort
from shared.messages import EnrolTask, TrainTask
from shared.models import Parameters, initial_parameters
from shared.plan import SitePlan
from shared.schema import Column, TableSchema
from shared.study import Study
from shared.task import Task
from shared.tasks.tabular import ModelOptions, load_table, table_task

SCHEMA = TableSchema(
    name="tiny",
    label=Column(name="ill", type="binary"),
    patient="id",
    columns=tuple(Column(name=name, type="number", low=-3, high=3) for name in ("x", "y", "z")),
)
STUDY = {
    "name": "tiny",
    "task": "tiny",
    "seed": 3,
    "rounds": {"count": 3},
    "training": {"learning_rate": 0.3, "batch_size": 16, "local_steps": 2},
    "privacy": {"epsilon": 2.0, "delta": 1e-3, "max_grad_norm": 0.7},
}
SITE_FILE = """
name = "north"
[cohort]
path = "patients.csv"
declared_size = 60
declared_test_size = 20
[policy]
max_epsilon = {max_epsilon}
max_delta = {max_delta}
min_patients = {min_patients}
min_metric_patients = {min_metric_patients}
allowed_tasks = {allowed_tasks}
allowed_metrics = {allowed_metrics}
exact_metrics = {exact_metrics}
allow_record_unit = {allow_record_unit}
round_counts_to = {round_counts_to}
max_steps = {max_steps}
allow_no_privacy = {allow_no_privacy}
"""
POLICY: dict[str, object] = {
    "max_epsilon": 4.0, "max_delta": 1e-3, "min_patients": 20, "min_metric_patients": 5,
    "allowed_tasks": '["tiny"]', "allowed_metrics": "[]", "allow_no_privacy": "false",
    "exact_metrics": "false", "allow_record_unit": "true", "round_counts_to": 1, "max_steps": 1000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums of floats depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def task() -> Task:
    """Three numbers, a binary label, one small hidden layer."""
    return table_task(SCHEMA, load_cohort=lambda path, options: load_table(path, SCHEMA, options), model=ModelOptions(hidden=(4,)))


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """The small private study with changes."""
    return lambda **changes: Study.from_table(STUDY).replace(**changes)


def patients(num_patients: int, *, seed: int = 0, most_records: int = 1) -> Cohort:
    """Patients of the tiny task with one to `most_records` records each, in mixed order."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(num_patients), rng.integers(1, most_records + 1, size=num_patients))).astype(np.int64)
    inputs = rng.normal(size=(len(owner), 3)).astype(np.float32)
    labels = (inputs[:, 0] + rng.normal(size=len(owner)) > 0).astype(np.float32)
    names = tuple(f"patient-{index}" for index in range(num_patients))
    return Cohort(inputs=(inputs,), labels=labels, patient_of_record=owner, patient_ids=names)


@pytest.fixture(scope="session")
def make_patients() -> Callable[..., Cohort]:
    """See `patients`."""
    return patients


PLAN = SitePlan(
    unit="patient", declared_size=20, sample_rate=1.0, steps_per_round=1, expected_batch_size=20.0, rounds=1, noise_multiplier=1.0, max_grad_norm=0.7,
    epsilon=None, delta=1e-3,
)  # fmt: skip


@pytest.fixture
def make_plan() -> Callable[..., SitePlan]:
    """A plan with changes."""
    return lambda **changes: replace(PLAN, **changes)


@pytest.fixture
def make_round(task: Task, make_study: Callable[..., Study]) -> Callable[..., LocalRound]:
    """The first round of the small study with changes."""
    return lambda **changes: LocalRound(study=make_study(**changes), task=task, round_number=1)


@dataclass(kw_only=True)
class Hospital:
    """A hospital's folder and the site made of it; the messages a coordinator would send."""

    folder: Path
    task: Task
    site: Site
    parameters: Parameters

    def reopen(self) -> Site:
        """The site as after a restart of its process."""
        self.site.close()
        path = self.folder / "site.toml"
        self.site = open_site(path, SiteFile.load(path), self.task)
        return self.site

    @property
    def ledger_path(self) -> Path:
        """The cohort's ledger."""
        return self.folder / "state" / "ledgers" / f"{self.folder.name}.sqlite"

    def charges(self) -> list[Charge]:
        """Every charge in the ledger, oldest first, as another process reads them."""
        with reading(self.ledger_path) as ledger:
            return ledger.charges()

    def epsilon(self, delta: float) -> float:
        """Of everything charged."""
        with reading(self.ledger_path) as ledger:
            return ledger.epsilon(delta)

    def enrolment(self, study: Study, run: str = "run-1") -> EnrolTask:
        """The request to take part in `study`."""
        return EnrolTask(run=run, study=study.to_table(), task_fingerprint=self.task.fingerprint())

    def training(self, study: Study, round_number: int = 1, run: str = "run-1", fold: int = 1) -> TrainTask:
        """The request to train a round of `study`."""
        return TrainTask(run=run, study_hash=study.fingerprint(), round=round_number, fold=fold)


@pytest.fixture
def make_hospital(tmp_path: Path, task: Task) -> Callable[..., Hospital]:
    """A hospital with 80 patients (130 records or so) and this policy; `csv=None` writes no file of patients."""

    def make(*, csv: str | None = "", name: str = "north", task: Task = task, **policy: object) -> Hospital:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "site.toml").write_text(SITE_FILE.format(**{**POLICY, **policy}).replace('"north"', f'"{name}"'))
        if csv is not None:
            (folder / "patients.csv").write_text(csv or table_of(patients(80, seed=1, most_records=2)))
        path = folder / "site.toml"
        return Hospital(folder=folder, task=task, site=open_site(path, SiteFile.load(path), task), parameters=initial_parameters(task.model(), 3))

    return make


def table_of(cohort: Cohort) -> str:
    """The cohort as a CSV file."""
    rows = [
        f"{cohort.patient_ids[owner]},{','.join(repr(float(np.clip(value, -3, 3))) for value in row)},{int(label)}"
        for owner, row, label in zip(cohort.patient_of_record, cohort.inputs[0], cohort.labels, strict=True)
    ]
    return "\n".join(["id,x,y,z,ill", *rows]) + "\n"
