"""A simulation in blocks: the same run as one site after another, in one process or several, broken off and resumed."""

import functools
import json
from collections.abc import Callable

import numpy as np
import pytest

import client.local_update
from client.ledger import reading
from client.memory_chain import JOURNAL, Journal
from client.releases import row_digests
from server.run_folder import read_tensors
from shared.errors import ConfigurationError, LedgerError, WorkerFailedError
from shared.models import arrays_digest
from shared.results import RoundRecord
from simulations.blocks import trainer
from simulations.blocks.choice import Execution, choose
from simulations.blocks.trainer import Job
from simulations.blocks.training import named
from simulations.blocks.workers import Pool
from simulations.federation import declared_sizes
from simulations.simulate import prepare
from tests.simulations.conftest import Finished, Runner
from tests.simulations.other_device import other_device

SITES = ("site-1", "site-2", "site-3", "site-4", "site-5")


def five_sites(runner, **changes: object):
    return runner.study(federation={"sites": 5, "partition": "quantity", "alpha": 2.0}, **changes)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Execution], Finished]:
    """The run of five sites, made once each way, for those who only read it."""
    runner = Runner(out=tmp_path_factory.mktemp("runs"))
    return functools.cache(lambda how: runner.run(five_sites(runner), execution=how))


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{}, {"unit": "none"}, {"evaluation_epsilon": 2.0}], ids=["private", "none", "noised evaluation"])
def test_a_run_in_blocks_comes_to_what_a_run_site_by_site_comes_to(runner, usual, privacy: dict[str, object]) -> None:
    runs = {how: runner.run(five_sites(runner, privacy=privacy), execution=how) if privacy else usual(how) for how in ("blocks", "sequential")}
    blocks, sequential = runs["blocks"], runs["sequential"]
    assert "blocks of up to 3 sites" in blocks.result.execution and "as asked" in sequential.result.execution
    models = [read_tensors(run.folder.path / "model" / "final.safetensors")[1] for run in (blocks, sequential)]
    for name, value in models[1].items():
        np.testing.assert_allclose(models[0][name], value, rtol=1e-4, atol=1e-6)
    assert blocks.result.metrics["federated"] == pytest.approx(sequential.result.metrics["federated"], abs=0.02)
    one, other = ([[(site["name"], site["status"], site.get("epsilon")) for site in line["sites"]] for line in run.lines] for run in runs.values())
    assert one == other
    assert blocks.result.privacy == sequential.result.privacy


def test_the_ledgers_of_both_hold_the_same_charges(usual) -> None:
    charges = {}
    for how in ("blocks", "sequential"):
        run = usual(how)
        for name in SITES:
            with reading(run.folder.path / "ledgers" / f"{name}.sqlite") as ledger:
                found = [(charge.entry.round, charge.event, charge.committed) for charge in ledger.charges()]
            charges.setdefault(name, []).append(found)
    assert all(one == other and len(one) == 2 for one, other in charges.values())


def ready_after(patch: pytest.MonkeyPatch, num_blocks: int) -> list[int]:
    """Workers that have started when so many blocks were trained here, and not sooner; how many they are given is counted in what comes back."""
    given, asked, submit = [0], [0], Pool.submit

    def ready(pool: Pool) -> bool:
        asked[0] += 1
        while asked[0] > num_blocks + 1 and pool._starting:  # the first time, nobody waits to train
            pool._read()
        return asked[0] > num_blocks + 1

    def counted(pool: Pool, slot: tuple[int, int], job: Job) -> None:
        given[0] += 1
        submit(pool, slot, job)

    patch.setattr(Pool, "ready", ready)
    patch.setattr(Pool, "submit", counted)
    return given


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize("here", [0, 1, 4], ids=["workers from the start", "from the second block on", "workers that come too late"])
@pytest.mark.parametrize("how", ["blocks", "sequential"])
def test_processes_make_no_difference_to_any_bit(runner, how: Execution, here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = runner.run(five_sites(runner), execution=how, processes=1)
    given = ready_after(monkeypatch, here)
    several = runner.run(five_sites(runner), execution=how, processes=2)
    assert given == [4 - here]  # two rounds of two blocks
    assert several.model() == alone.model() and several.comparable == alone.comparable


@pytest.mark.slow  # starts processes that import torch
def test_a_worker_that_dies_ends_the_run_by_name_and_it_can_be_resumed(runner, usual, monkeypatch: pytest.MonkeyPatch) -> None:
    ready_after(monkeypatch, 0)
    submit = Pool.submit

    def killed(pool: Pool, slot: tuple[int, int], job: Job) -> None:
        if job.round_number == 2:
            for process in pool._processes:
                process.kill()
                process.wait()
        submit(pool, slot, job)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "submit", killed)
        with pytest.raises(WorkerFailedError):
            runner.run(five_sites(runner), execution="blocks", processes=2)
    broken = runner.latest()
    assert broken.result.outcome == "failed" and broken.result.rounds_completed == 1
    resumed = runner.run(broken.folder.study, resume=broken.folder.path, execution="blocks")
    assert resumed.model() == usual("blocks").model()


def test_a_run_broken_off_in_a_block_leaves_its_charges_and_is_resumed_to_the_same_bits(runner, usual, monkeypatch: pytest.MonkeyPatch) -> None:
    real, rounds = trainer.train_block, []

    def interrupted(*arguments: object) -> object:
        rounds.append(1)
        if len(rounds) == 3:  # the first block of the second round: two blocks a round
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(five_sites(runner), execution="blocks")
    run = runner.latest()
    standing = 0
    for name in SITES:
        with reading(run.folder.path / "ledgers" / f"{name}.sqlite") as ledger:
            states = [charge.committed for charge in ledger.charges()]
        assert states in ([True], [True, False])
        standing += states.count(False)
    assert standing == 3  # the block that was under way, and no other
    resumed = runner.run(run.folder.study, resume=run.folder.path, execution="blocks")
    whole = usual("blocks")
    assert resumed.model() == whole.model() and resumed.comparable == whole.comparable


def test_a_killed_runs_journal_is_read_back(runner, usual, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed has not closed its ledgers: all that is left is the journal, perhaps with half a line at its end."""
    lines: list[RoundRecord] = []

    def stop(record: RoundRecord) -> None:
        lines.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(five_sites(runner), execution="blocks", observe=stop)
    run = runner.latest()
    ledgers = run.folder.path / "ledgers"
    for path in ledgers.glob("*.sqlite"):
        path.unlink()
    with open(ledgers / JOURNAL, "a") as file:
        file.write('["site-1", "reserve", "2026')
    resumed = runner.run(run.folder.study, resume=run.folder.path, execution="blocks")
    with reading(ledgers / "site-1.sqlite") as ledger:
        assert [charge.entry.round for charge in ledger.charges()] == [1, 2]
    assert resumed.model() == usual("blocks").model()
    (ledgers / JOURNAL).write_text("nonsense\n")
    with pytest.raises(LedgerError, match="line 1"):
        Journal(ledgers)


@pytest.mark.slow
def test_one_site_that_breaks_a_block_fails_alone(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block is trained one after another, and only that site fails."""

    def broken(*arguments: object) -> object:
        raise RuntimeError("patient 17 has HIV")

    real = client.local_update.train_round_private
    bad = prepare(five_sites(runner), None).federation.cohorts["site-2"]

    def one_is_bad(model, cohort, *arguments: object, **named: object) -> int:
        if set(cohort.patient_ids) <= set(bad.patient_ids):
            raise RuntimeError("patient 17 has HIV")
        return real(model, cohort, *arguments, **named)

    monkeypatch.setattr(trainer, "train_block", broken)
    monkeypatch.setattr(client.local_update, "train_round_private", one_is_bad)
    run = runner.run(five_sites(runner), execution="blocks")
    states = [{site["name"]: site["status"] for site in line["sites"]} for line in run.lines]
    assert all(state.pop("site-2") == "refused" and set(state.values()) == {"ok"} for state in states)
    written = "".join(path.read_text() for path in run.folder.path.glob("*.json*"))
    assert "HIV" not in written


def test_what_the_ledgers_hold_of_a_blocks_updates_are_their_digests() -> None:
    rng = np.random.default_rng(1)
    template = {"weight": np.zeros((3, 4), np.float32), "scale": np.zeros((), np.float32), "bias": np.zeros(5, np.float32)}
    rows = rng.normal(size=(6, 18)).astype(np.float32)[::2]
    assert row_digests(rows, template) == tuple(arrays_digest(named(row, template)) for row in rows)
    assert len(set(row_digests(rows, template))) == 3


def test_what_cannot_be_in_blocks_is_told_and_refused_where_it_was_asked_for(runner) -> None:
    own_noise = prepare(five_sites(runner, privacy={"noise_source": "os"}), None)
    assert "operating system" in choose(own_noise, "auto").reason
    with pytest.raises(ConfigurationError, match="operating system"):
        choose(own_noise, "blocks")
    usual = prepare(five_sites(runner), None)
    assert choose(usual, "auto").block_size == 3 and not choose(usual, "sequential").blocks
    assert not choose(usual, "auto", memory=10_000).blocks
    assert choose(usual, "auto", processes=3).num_workers == 3 and choose(usual, "auto", processes=1).num_workers == 0


@pytest.mark.slow
def test_what_a_task_refines_is_refined_in_blocks_as_site_by_site(runner) -> None:
    study = runner.study(
        task="shared.tasks.biomarker_panel:biomarker_panel_elastic_net", federation={"sites": 3, "num_patients": 150, "partition": "iid"}
    )
    runs = [runner.run(study, execution=how) for how in ("blocks", "sequential")]
    assert "in blocks" in runs[0].result.execution
    models = [read_tensors(run.folder.path / "model" / "final.safetensors")[1] for run in runs]
    for name, value in models[1].items():
        np.testing.assert_allclose(models[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{}, {"unit": "none"}], ids=["private", "none"])
def test_a_run_whose_blocks_another_device_trains_comes_to_what_the_cpu_comes_to(runner, privacy: dict[str, object]) -> None:
    with other_device() as device:
        there = runner.run(five_sites(runner, privacy=privacy), device=device)
    here = runner.run(five_sites(runner, privacy=privacy))
    assert there.result.execution == f"in blocks of up to 5 sites on {device}"
    models = [read_tensors(run.folder.path / "model" / "final.safetensors")[1] for run in (there, here)]
    for name, value in models[1].items():
        np.testing.assert_allclose(models[0][name], value, rtol=1e-4, atol=1e-6)
    assert there.result.metrics["federated"] == pytest.approx(here.result.metrics["federated"], abs=0.02)
    assert there.result.privacy == here.result.privacy


@pytest.mark.slow
def test_a_device_that_is_not_there_or_would_not_train_is_refused(runner) -> None:
    usual = prepare(five_sites(runner), None)
    for name in ("cuda:77", "no device", "meta"):
        with pytest.raises(ConfigurationError, match=f"--device {name}: expected a device that torch can use here"):
            choose(usual, "auto", device=name)
    with other_device() as device:
        for options in ({"execution": "sequential"}, {"execution": "auto", "processes": 2}):
            with pytest.raises(ConfigurationError, match="expected blocks that one process feeds"):
                choose(usual, **options, device=device)
        with pytest.raises(ConfigurationError, match="operating system"):
            choose(prepare(five_sites(runner, privacy={"noise_source": "os"}), None), "auto", device=device)
        with pytest.raises(ConfigurationError, match="with --engine ray"):
            choose(usual, "auto", device=device).on_ray(usual, None, None)


def test_declared_sizes_are_exact_where_they_are_few_and_rounded_where_they_are_many() -> None:
    assert declared_sizes([199, 172, 30]) == [199, 172, 30]
    many = list(range(100, 400))
    rounded = declared_sizes(many)
    assert len(set(rounded)) <= 16
    assert all(abs(told - size) <= 0.5 * size for told, size in zip(rounded, many, strict=True))
    assert declared_sizes(range(1, 100))[0] == 1


def test_the_statistics_of_all_sites_at_once_are_those_of_each(usual) -> None:
    run, whole = usual("blocks"), usual("sequential")
    assert json.dumps(run.lines[0]["sites"]) == json.dumps(whole.lines[0]["sites"])  # of the first model, which is the same
