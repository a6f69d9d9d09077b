"""Small studies on the bundled patients, run from study to result by the real parts; and hospitals with files of their own."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from server.run_folder import RunFolder
from shared.results import PrivacyClaim, Result, RoundRecord
from shared.study import Study
from simulations.blocks.choice import Execution
from simulations.simulate import execute, prepare, resume_run, start_run

STUDY = {
    "name": "small",
    "task": "breast-cancer",
    "seed": 11,
    "rounds": {"count": 2},
    "training": {"learning_rate": 0.5, "batch_size": 32},
    "privacy": {"epsilon": 3.0, "delta": 1e-4},
    "evaluation": {"bootstrap": 20},
    "federation": {"sites": 3, "partition": "dirichlet"},
}

SCHEMA = """
name = "ward"
patient = "id"
[label]
name = "ill"
type = "binary"
[[columns]]
name = "age"
type = "number"
low = 0
high = 100
[[columns]]
name = "marker"
type = "number"
low = -3
high = 3
[model]
hidden = []
"""

POLICY = {"max_epsilon": 3.0, "max_delta": 1e-3, "min_patients": 20, "allowed_tasks": ["ward"]}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run's folder, read back."""

    folder: RunFolder

    @property
    def result(self) -> Result:
        return Result.model_validate_json((self.folder.path / "result.json").read_text())

    @property
    def claim(self) -> PrivacyClaim:
        return PrivacyClaim.model_validate_json((self.folder.path / "privacy.json").read_text())

    @property
    def comparable(self) -> dict[str, object]:
        """result.json but for what may differ between two equal runs."""
        table: dict[str, object] = json.loads((self.folder.path / "result.json").read_text())
        del table["run"], table["timing"]
        return table

    @property
    def lines(self) -> list[dict[str, object]]:
        """rounds.jsonl but for the seconds."""
        found = [json.loads(line) for line in (self.folder.path / "rounds.jsonl").read_text().removesuffix("\n").split("\n")]
        for line in found:
            del line["seconds"]
        return found

    def model(self, name: str = "final") -> bytes:
        return (self.folder.path / "model" / f"{name}.safetensors").read_bytes()


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs studies derived from the small one."""

    out: Path

    def study(self, **changes: object) -> Study:
        return Study.from_table(STUDY).replace(**changes)

    def run(
        self,
        study: Study,
        *,
        data: Path | None = None,
        baselines: bool = False,
        resume: Path | None = None,
        observe: Callable[[RoundRecord], None] = lambda record: None,
        execution: Execution = "auto",
        **machine: object,
    ) -> Finished:
        setting = prepare(study, data)
        folder = start_run(setting, self.out) if resume is None else resume_run(setting, resume)
        execute(setting, folder, baselines=baselines, observe=observe, execution=execution, **machine)
        return Finished(folder=folder)

    def latest(self) -> Finished:
        """The newest run's folder, where the run itself raised."""
        return Finished(folder=RunFolder(max(self.out.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)))


@dataclass(frozen=True, kw_only=True)
class OneByOne(Runner):
    """As `Runner`, but each site answers its own messages, one after another, unless a test says otherwise."""

    def run(self, study: Study, *, execution: Execution = "sequential", **how: object) -> Finished:
        return super().run(study, execution=execution, **how)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(out=tmp_path / "runs")


@pytest.fixture(scope="session")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run of the small study, for those who only read it."""
    runner = Runner(out=tmp_path_factory.mktemp("usual"))
    return runner.run(runner.study())


@dataclass(frozen=True, kw_only=True)
class Wards:
    """A folder of two hospitals with files of their own, and the study that asks them."""

    path: Path
    study: Study

    def ledger(self, name: str) -> Path:
        """A hospital's ledger."""
        return self.path / name / "state" / "ledgers" / f"{name}.sqlite"

    def write_policy(self, name: str, **changes: object) -> None:
        """Write the site file anew with these keys of its policy changed."""
        policy = {**POLICY, **changes}
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in policy.items())
        text = f'name = "{name}"\n[cohort]\npath = "patients.csv"\ndeclared_size = 60\ndeclared_test_size = 25\n[policy]\n{lines}\n'
        (self.path / name / "site.toml").write_text(text)


@pytest.fixture
def wards(tmp_path: Path) -> Wards:
    """Hospitals "north" and "south", 90 patients each."""
    (tmp_path / "ward.toml").write_text(SCHEMA)
    study = Study.from_table(
        {
            "name": "wards",
            "task": str(tmp_path / "ward.toml"),
            "rounds": {"count": 2},
            "training": {"learning_rate": 0.5, "batch_size": 20},
            "privacy": {"epsilon": 2.5, "delta": 1e-3},
            "evaluation": {"bootstrap": 20},
        }
    )
    made = Wards(path=tmp_path / "hospitals", study=study)
    for seed, name in enumerate(["north", "south"]):
        rng = np.random.default_rng(seed)
        (made.path / name).mkdir(parents=True)
        age, marker = rng.uniform(20, 90, 90), rng.normal(size=90).clip(-3, 3)
        ill = (marker + rng.normal(size=90) > 0).astype(int)
        rows = [f"{name}-{index},{age[index]:.1f},{marker[index]:.4f},{ill[index]}" for index in range(90)]
        (made.path / name / "patients.csv").write_text("\n".join(["id,age,marker,ill", *rows]) + "\n")
        made.write_policy(name)
    return made
