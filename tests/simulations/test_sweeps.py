"""A sweep: every combination is a run, one that fails or is killed costs nothing but itself, and the table is the same whatever happened on the way."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.ledger import reading
from shared.errors import AlreadyRunningError, BudgetExhaustedError, ConfigurationError, ModelMismatchError, WorkerFailedError
from shared.study import Study
from shared.study_tables import toml_text
from shared.supervision import single_instance
from simulations import simulate
from simulations.sweeps import execution
from simulations.sweeps.cell import CellResult, run_cell
from simulations.sweeps.execution import run_sweep
from simulations.sweeps.folder import TABLE, SweepFolder
from simulations.sweeps.grid import Sweep, cells_of
from simulations.sweeps.real_ledgers import check_ledgers
from tests.simulations.conftest import STUDY, Wards

BASE = Study.from_table({**STUDY, "name": "base", "federation": {"sites": 2, "partition": "iid"}})
GRID = {"epsilon": [2, "none"], "seed": [1, 2]}


def a_sweep(**grid: object) -> Sweep:
    return Sweep.model_validate({"name": "tried", "study": BASE.to_table(), "grid": grid or GRID})


def begun(out: Path, sweep: Sweep | None = None, data: Path | None = None) -> SweepFolder:
    return SweepFolder.create(out, sweep or a_sweep(), BASE, data)


def table_of(folder: SweepFolder) -> list[dict[str, str]]:
    with open(folder.path / TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


VARIANTS = {
    "few": {"federation": {"sites": 2}, "training": {"local_steps": 3}, "task": "shared.tasks.breast_cancer:normalised"},
    "hearts": {"task": "heart-disease", "federation": {"sites": 4}},
}


def test_variants_are_changes_under_one_name(tmp_path: Path) -> None:
    sweep = Sweep(name="v", study="breast-cancer", baselines=False, variants=VARIANTS, grid={"variant": ["few", "hearts"], "alpha": [0.1, 5]})
    cells = cells_of(sweep, BASE)
    assert [cell.study.task for cell in cells] == ["shared.tasks.breast_cancer:normalised"] * 2 + ["heart-disease"] * 2
    assert [(cell.study.federation.sites, cell.study.federation.alpha) for cell in cells] == [(2, 0.1), (2, 5), (4, 0.1), (4, 5)]
    assert cells[0].study.training.local_steps == 3 and cells[2].study.training.local_steps is None
    assert cells[0].settings == {"variant": "few", "federation.alpha": 0.1}
    (tmp_path / "data").mkdir()
    folder = begun(tmp_path / "runs", sweep, tmp_path / "data")
    assert [folder.data_of(cell) for cell in SweepFolder(folder.path).cells] == [tmp_path.resolve() / "data"] * 2 + [None] * 2, "of the base's task"


@pytest.mark.parametrize(
    ("grid", "told"),
    [({"variant": ["fev"]}, "did you mean 'few'"), ({"alpha": [1]}, "no grid.variant goes over it"), ({"variant": ["other"]}, "expected names of")],
)
def test_variants_that_are_not_there_or_not_used_are_refused(tmp_path: Path, grid: dict, told: str) -> None:
    (tmp_path / "s.toml").write_text(toml_text({"name": "v", "study": "breast-cancer", "grid": grid, "variants": VARIANTS}))
    with pytest.raises(ConfigurationError, match=told):
        Sweep.load(tmp_path / "s.toml")


def test_the_grid_is_every_combination() -> None:
    cells = cells_of(a_sweep(**{"epsilon": [1, "none"], "strategy": ["fedavg", "fedprox"], "training.learning_rate": [0.1], "seed": [1, 2, 3]}), BASE)
    assert [cell.number for cell in cells] == list(range(1, 13))
    assert len({cell.study.fingerprint() for cell in cells}) == 12
    last = cells[-1].study
    assert (last.privacy.unit, last.strategy.name, last.training.learning_rate, last.seed) == ("none", "fedprox", 0.1, 3)
    assert cells[0].study == BASE.replace(privacy={"epsilon": 1}, training={"learning_rate": 0.1}, seed=1)
    natural = BASE.replace(federation={"partition": "natural"})
    assert cells_of(a_sweep(sites=[4]), natural)[0].study.federation.partition == "iid"


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"epsilonn": [1]}, "unknown key"),
        ({"epsilon": [1, -2]}, r"cell 2 \(privacy.epsilon = -2\)"),
        ({"training.lerning_rate": [1]}, "unknown key"),
        ({"a.b.c": [1]}, "unknown key"),
    ],
)
def test_a_combination_that_is_no_study_is_named_before_anything_runs(grid: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=told):
        begun(tmp_path / "runs", a_sweep(**grid))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("grid", [{"epsilon": []}, {"seed": [1, 1]}, {"epsilon": [1], "privacy.epsilon": [2]}, {}])
def test_a_grid_that_says_nothing_or_twice_is_refused(grid: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected|at least"):
        Sweep.model_validate({"name": "tried", "study": BASE.to_table(), "grid": grid})


@pytest.mark.slow
def test_a_row_a_run_with_all_settings_and_what_was_spent(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    results = run_sweep(folder, processes=1)
    assert [result.status for result in results] == ["ok"] * 4
    rows = table_of(folder)
    assert [(row["privacy.epsilon"], row["seed"], row["training.batch_size"]) for row in rows] == [
        ("2.0", "1", "32"), ("2.0", "2", "32"), ("none", "1", "32"), ("none", "2", "32"),
    ]  # fmt: skip
    assert all(0 < float(row["spent.epsilon"]) <= 2 and row["spent.accountant"] in ("pld", "prv") for row in rows[:2])
    assert all(row["local_only_private.auroc"] and not row["local_only.auroc"] for row in rows[:2])
    assert all(row["pooled.auroc"] and not row["spent.epsilon"] for row in rows[2:])
    assert len({row["federated.auroc"] for row in rows}) > 1
    assert not list(tmp_path.glob("*/cell-*")) and len(results[0].rounds) == BASE.rounds.count


@pytest.mark.slow  # trains several studies
def test_a_sweep_broken_off_anywhere_and_gone_on_with_has_the_same_table(tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole")
    run_sweep(whole, processes=1)

    def interrupted(result: CellResult) -> None:
        if result.number == 2:
            raise KeyboardInterrupt

    broken = begun(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(broken, processes=1, observe=interrupted)
    assert [row["cell"] for row in table_of(broken)] == ["1", "2"]
    again, ran = SweepFolder.latest(tmp_path / "broken", a_sweep(), BASE), []
    assert again.path == broken.path
    run_sweep(again, processes=1, observe=lambda result: ran.append(result.number))
    assert ran == [3, 4]
    assert (again.path / TABLE).read_bytes() == (whole.path / TABLE).read_bytes()


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_tried_again_and_the_others_go_on(tmp_path: Path) -> None:
    folder = begun(tmp_path, a_sweep(sites=[100_000, 2], seed=[1]))
    failed, fine = run_sweep(folder, processes=1)
    assert (failed.status, fine.status) == ("failed", "ok") and failed.error is not None and failed.error.startswith("E303")
    assert [row["status"] for row in table_of(folder)] == ["failed", "ok"]
    assert [cell.number for cell in folder.waiting()] == [1]


@pytest.mark.slow  # starts processes that import torch
def test_a_process_that_is_killed_takes_its_cell_alone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = begun(tmp_path / "alone")
    run_sweep(alone, processes=1)
    give, kill, killed = execution._Worker.give, subprocess.Popen.kill, []

    def deadly(worker: execution._Worker, cell) -> None:
        give(worker, cell)
        if cell.number == 2 and not killed:
            killed.append(cell.number)
            os.kill(worker.process.pid, signal.SIGKILL)

    def slow(process: "subprocess.Popen[bytes]") -> None:
        time.sleep(1.0)  # a busy machine: what the process does until then, to the files of the others too, it does
        kill(process)

    folder = begun(tmp_path / "several")
    with monkeypatch.context() as patch:
        patch.setattr(execution._Worker, "give", deadly)
        patch.setattr(subprocess.Popen, "kill", slow)
        results = run_sweep(folder, processes=2)
    assert [result.status for result in results] == ["ok", "failed", "ok", "ok"] and "SIGKILL" in str(results[1].error)
    run_sweep(folder, processes=2)
    assert (folder.path / TABLE).read_bytes() == (alone.path / TABLE).read_bytes()


def test_processes_that_cannot_begin_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerFailedError, match="processes of the sweep end before they can run a cell"):
        run_sweep(folder, processes=2)


class BrokenError(Exception):
    pass


@pytest.mark.slow
def test_a_task_that_fails_on_a_patient_fails_its_cell_and_says_no_more_than_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, calls = simulate.prepare, []

    def broken(study: Study, data: Path | None):
        calls.append(study.seed)
        if study.seed == 1:
            raise BrokenError("Jane Doe")
        return prepare(study, data)

    monkeypatch.setattr(simulate, "prepare", broken)
    folder = begun(tmp_path, a_sweep(seed=[1, 2]))
    failed, fine = run_sweep(folder, processes=1)
    assert (failed.status, failed.error, fine.status) == ("failed", "E100 BrokenError", "ok")
    assert not any("Jane" in path.read_text() for path in folder.path.rglob("*") if path.is_file())


@pytest.mark.slow  # trains several studies
def test_a_sweep_file_that_was_changed_does_not_pass_for_the_old_one(tmp_path: Path) -> None:
    folder = begun(tmp_path, a_sweep(seed=[1, 2]))
    run_sweep(folder, processes=1)
    written = (folder.path / "sweep.toml").read_text()
    for old, new in (("[1, 2]", "[1, 3]"), ("batch_size = 32", "batch_size = 16")):  # the grid; the base study
        assert old in written
        (folder.path / "sweep.toml").write_text(written.replace(old, new))
        with pytest.raises(ModelMismatchError, match="got a changed one"):
            SweepFolder(folder.path)
    with pytest.raises(ConfigurationError, match="--data: expected none"):
        folder.check_data(tmp_path)


@pytest.mark.slow
def test_two_processes_do_not_run_one_sweep(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with single_instance(folder.path), pytest.raises(AlreadyRunningError, match=f"process {os.getpid()}"):
        run_sweep(folder, processes=1)
    assert not folder.results()


def test_other_data_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "patients.csv").write_text("a\n1\n")
    folder = begun(tmp_path / "runs", data=tmp_path / "data")
    (tmp_path / "data" / "patients.csv").write_text("a\n2\n")
    with pytest.raises(ModelMismatchError, match="expected the data that this sweep began with"):
        run_sweep(SweepFolder(folder.path), processes=1)
    with pytest.raises(ConfigurationError, match="expected a folder of sweep"):
        SweepFolder.latest(tmp_path / "runs", a_sweep(seed=[5]), BASE)


def wards_sweep(wards: Wards, out: Path, **grid: object) -> SweepFolder:
    table = {key: value for key, value in wards.study.to_table().items() if key != "federation"}
    sweep = Sweep.model_validate({"name": "wards", "study": table, "grid": grid, "baselines": False})
    return SweepFolder.create(out, sweep, wards.study, wards.path)


@pytest.mark.slow
def test_a_sweep_over_real_ledgers_begins_only_where_they_cover_all_of_it(wards: Wards, tmp_path: Path) -> None:
    """A limit of epsilon 3 has room for any cell alone, and for two of epsilon 0.5 together, but not for all three."""
    too_much = wards_sweep(wards, tmp_path / "runs", epsilon=[2.5, 2.4])
    with pytest.raises(BudgetExhaustedError, match="expected a budget for all 2 cells"):
        check_ledgers(too_much)
    assert not wards.ledger("north").exists()  # nothing was written
    fits = wards_sweep(wards, tmp_path / "runs", epsilon=[0.5, 0.6])
    check_ledgers(fits)
    assert [result.status for result in run_sweep(fits)] == ["ok", "ok"]
    with reading(wards.ledger("north")) as ledger:
        assert len(ledger.account.plans) == 2
    with pytest.raises(BudgetExhaustedError):  # what was spent counts
        check_ledgers(wards_sweep(wards, tmp_path / "runs", epsilon=[2.5]))


@pytest.mark.slow
def test_after_a_cross_validation_both_sides_of_a_ledger_count(wards: Wards, tmp_path: Path) -> None:
    """Then everybody is on both sides, so what the closing evaluations ask of test patients counts with training, as the ledger's filter counts it."""
    evaluated = wards.study.replace(privacy={"epsilon": 1.6, "evaluation_epsilon": 1.6})
    fits = SweepFolder.create(
        tmp_path / "runs", Sweep.model_validate({"name": "wards", "study": real_table(evaluated), "grid": {"seed": [1]}}), evaluated, wards.path
    )
    check_ledgers(fits)
    folds = wards.study.replace(privacy={"epsilon": 1.8}, evaluation={"folds": 2})
    crossed = SweepFolder.create(
        tmp_path / "runs", Sweep.model_validate({"name": "wards", "study": real_table(folds), "grid": {"seed": [1]}}), folds, wards.path
    )
    [result] = run_sweep(crossed)
    assert result.status == "ok"
    with pytest.raises(BudgetExhaustedError):
        check_ledgers(fits)
    [refused] = [cell_error(fits)]
    assert refused.startswith("E700")


def real_table(study: Study) -> dict[str, object]:
    return {key: value for key, value in study.to_table().items() if key != "federation"}


def cell_error(folder: SweepFolder) -> str:
    """What the ledger itself says to the sweep's first cell."""
    result = run_cell(folder.cells[0], folder.data, baselines=False, scratch=folder.path)
    return str(result.error)
