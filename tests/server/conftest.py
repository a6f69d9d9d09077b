"""A small task, virtual sites of it, and a coordinator over the in-process grid: the real parts, only few patients."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Context, Message

from client.app import client_app
from client.site import Site
from server.coordinator import Coordinator, History
from server.run_folder import RunFolder
from shared.cohort import Cohort
from shared.results import RoundRecord
from shared.schema import Column, TableSchema
from shared.study import Study
from shared.task import Task
from shared.tasks.tabular import ModelOptions, synthetic_cohort, table_task
from simulations.federation import VirtualFederation, virtual_sites
from simulations.in_process import InProcessGrid

SCHEMA = TableSchema(
    name="tiny",
    label=Column(name="ill", type="binary"),
    columns=(Column(name="x", type="number", low=-3, high=3), Column(name="y", type="number", low=0, high=10)),
)
STUDY = {
    "name": "tiny",
    "task": "tiny",
    "seed": 3,
    "rounds": {"count": 3},
    "training": {"learning_rate": 0.3, "batch_size": 16},
    "privacy": {"unit": "none"},
    "evaluation": {"bootstrap": 20},
}

Answering = Callable[[Message, Context], Message]
Tamper = Callable[[Answering, Message, Context], Message]


def _no_load(path: Path | None, options: object) -> Cohort:
    raise AssertionError("these patients are synthetic")


@pytest.fixture(scope="session")
def task() -> Task:
    """Two numbers, a binary label, logistic regression."""
    return table_task(SCHEMA, load_cohort=_no_load, model=ModelOptions(hidden=()))


@functools.cache
def patients(count: int, seed: int) -> Cohort:
    """Synthetic ones, the same for every test."""
    return synthetic_cohort(SCHEMA, count, seed=seed)


@dataclass(kw_only=True)
class Rig:
    """A virtual federation whose messages a test may tamper with."""

    study: Study
    task: Task
    cohorts: dict[str, Cohort]
    out: Path
    tamper: Tamper | None = None
    records: list[RoundRecord] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)

    def new_folder(self) -> RunFolder:
        """A fresh run's folder."""
        return RunFolder.create(self.out, self.study)

    def run(self, folder: RunFolder, observe: Callable[[RoundRecord], None] | None = None) -> History:
        """The coordinator over new sites, from the folder's checkpoint; `records` are the rounds of this execution."""
        self.records = []
        federation = VirtualFederation(cohorts=self.cohorts, synthetic=True, notes={})
        self.sites = virtual_sites(federation, self.task, self.study, folder.path / "ledgers")
        app = client_app(lambda context: self.sites[str(context.node_config["site"])])
        tamper = self.tamper

        def answer(message: Message, context: Context) -> Message:
            return app(message, context) if tamper is None else tamper(app, message, context)

        def take(record: RoundRecord) -> None:
            self.records.append(record)
            if observe is not None:
                observe(record)

        coordinator = Coordinator(self.study, self.task, folder, observe=take)
        self.coordinator = coordinator
        try:
            return coordinator.run(InProcessGrid(answer, sorted(self.cohorts)))
        finally:
            for site in self.sites.values():
                site.close()


@pytest.fixture
def make_rig(task: Task, tmp_path: Path) -> Callable[..., Rig]:
    """A rig of `sizes` patients a site, with these changes to the study."""

    def make(*, sizes: Iterable[int] = (60, 40, 50), tamper: Tamper | None = None, **changes: object) -> Rig:
        cohorts = {f"site-{index + 1}": patients(size, index) for index, size in enumerate(sizes)}
        study = Study.from_table(STUDY).replace(**changes)
        return Rig(study=study, task=task, cohorts=cohorts, out=tmp_path / "runs", tamper=tamper)

    return make
