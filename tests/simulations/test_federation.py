"""Virtual sites: their sizes, their ledgers' files, their refusals before any training."""

from pathlib import Path

import numpy as np
import pytest

from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, DataMissingError, PartitionError
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.federation import resolve_delta, virtual_federation, virtual_sites
from simulations.simulate import prepare
from simulations.site_files import site_files


@pytest.fixture(scope="module")
def task() -> Task:
    return resolve_task("breast-cancer")


def test_summaries_are_exact(runner, task: Task) -> None:
    federation = virtual_federation(task, runner.study(), None)
    for summary in federation.summaries(task, runner.study()):
        cohort = federation.cohorts[summary.name]
        test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
        assert (summary.num_patients, summary.num_train, summary.num_test) == (cohort.num_patients, int((~test).sum()), int(test.sum()))
        assert summary.classes == {"benign": int((cohort.labels == 0).sum()), "malignant": int((cohort.labels == 1).sum())}


def test_the_split_of_a_patient_does_not_depend_on_seed_or_sites(runner, task: Task) -> None:
    tested = []
    for changes in ({}, {"seed": 99}, {"federation": {"sites": 7}}):
        federation = virtual_federation(task, runner.study(**changes), None)
        tested.append(
            {name for cohort in federation.cohorts.values() for name in cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)).patient_ids}
        )
    assert tested[0] == tested[1] == tested[2]


def test_delta_is_filled_in_only_where_it_is_asked_for() -> None:
    study = Study.from_table({"name": "x", "task": "breast-cancer", "privacy": {"epsilon": 1.0}})
    assert resolve_delta(study, [50, 9_000]).privacy.delta == 1e-4
    assert resolve_delta(study, [50_000, 20_000]).privacy.delta == 1 / 200_000
    given = study.replace(privacy={"delta": 1e-6})
    assert resolve_delta(given, [50]) == given
    plain = study.replace(privacy={"unit": "none"})
    assert resolve_delta(plain, [50]) == plain


def test_a_delta_too_large_for_a_site_is_refused_before_any_training(runner) -> None:
    with pytest.raises(ConfigurationError, match="delta"):
        prepare(runner.study(privacy={"delta": 0.05}), None)


def test_ledgers_have_files_of_their_own_whatever_the_sites_are_called(runner, task: Task, tmp_path: Path) -> None:
    cohort = task.synthetic_cohort(120, 1)
    names = ["a/b", "a_b", "a b", "../evil", "Zürich", "a.b"]
    from simulations.federation import VirtualFederation

    parts = dict(zip(names, np.array_split(np.arange(120), len(names)), strict=True))
    federation = VirtualFederation(cohorts={name: cohort.select(part) for name, part in parts.items()}, synthetic=True, notes={})
    sites = virtual_sites(federation, task, runner.study(), tmp_path / "ledgers")
    paths = [site.settings.ledger_path for site in sites.values()]
    assert len(set(paths)) == len(names)
    assert all(path.parent == tmp_path / "ledgers" for path in paths)


def test_site_files_are_found_in_a_folder_or_named(tmp_path: Path, wards) -> None:
    assert [path.parent.name for path in site_files(wards.path)] == ["north", "south"]
    assert site_files(wards.path / "north" / "site.toml") == [wards.path / "north" / "site.toml"]
    assert site_files(wards.path / "north" / "patients.csv") == []
    assert site_files(None) == site_files(tmp_path / "absent") == []


@pytest.mark.parametrize("sites", [570, 100_000])
def test_more_sites_than_patients_is_refused_before_any_training(runner, sites: int) -> None:
    with pytest.raises(PartitionError, match="569 patients") as caught:
        prepare(runner.study(federation={"sites": sites}), None)
    assert caught.value.exit_code == 3
    assert "at most 56 sites would work" in caught.value.remedy
    prepare(runner.study(federation={"sites": 56, "partition": "iid"}, privacy={"unit": "none"}), None)


def test_data_that_are_not_there_are_data_errors(runner, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError):
        prepare(runner.study(), tmp_path / "absent.csv")


def test_a_quorum_of_more_sites_than_there_are_is_refused(runner) -> None:
    with pytest.raises(ConfigurationError, match=r"rounds\.require"):
        prepare(runner.study(rounds={"require": 4}), None)


def test_a_default_delta_suits_the_largest_site_as_well() -> None:
    study = Study.from_table({"name": "s", "task": "breast-cancer", "privacy": {"epsilon": 3.0}})
    assert resolve_delta(study, [50, 900]).privacy.delta == 1e-4
    assert resolve_delta(study, [2000, 5000]).privacy.delta == 1 / 20_000
    assert resolve_delta(study, [50, 20_000]).privacy.delta == 1 / 200_000
    assert resolve_delta(study.replace(privacy={"delta": 1e-3}), [50, 20_000]).privacy.delta == 1e-3
