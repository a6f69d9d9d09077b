"""Secure aggregation of sites that are trained in blocks: the same run as one site after another, whoever drops out, in one process and in several (`test_ray_workers`: on Ray)."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

import simulations.in_process
from client.ledger import reading
from client.site import Site
from shared.errors import ProtocolError, QuorumLostError
from shared.messages import MASKED, MESSAGE, PARAMETERS
from shared.study import Study
from simulations.blocks import trainer
from simulations.blocks.choice import Execution
from simulations.blocks.engine import BlockEngine
from simulations.in_process import InProcessGrid
from tests.simulations.conftest import Finished, Runner
from tests.simulations.other_device import other_device
from tests.simulations.test_block_engine import ready_after
from tests.simulations.test_secure_aggregation import final, kind, kind_of

DISTRIBUTED = {"training": {"local_steps": 1, "learning_rate": 0.5}, "secure_aggregation": {"noise": "distributed", "sites": 5, "missing": 1}}
KINDS: dict[str, dict[str, object]] = {
    "private": {}, "none": {"privacy": {"unit": "none"}}, "noised evaluation": {"privacy": {"evaluation_epsilon": 2.0}},
    "fedadam": {"strategy": {"name": "fedadam", "weights": "equal"}}, "whole sites": {"strategy": {"weights": "equal"}, "privacy": {"site_epsilon": 8.0, "max_site_norm": 0.5}},
    "distributed": DISTRIBUTED,
}  # fmt: skip


def study_of(runner, **changes: object) -> Study:
    base = {"federation": {"sites": 5, "partition": "quantity", "alpha": 2.0}, "rounds": {"count": 2, "require": 3}, "secure_aggregation": {}}
    return runner.study(**{**base, **changes})


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Execution], Finished]:
    """The runs of five sites, made once each way, for those who only read them."""
    runner = Runner(out=tmp_path_factory.mktemp("runs"))
    return functools.cache(lambda kind, how: runner.run(study_of(runner, **KINDS[kind]), execution=how))


def assert_close(found: Finished, expected: Finished, *, atol: float = 5e-6) -> None:
    """As blocks are to sites one after another (`test_block_engine`), and a step or two of the fixed point where a rounding falls the other way."""
    for name, value in final(found).items():
        np.testing.assert_allclose(value, final(expected)[name], rtol=1e-4, atol=atol, err_msg=name)


def charges(run: Finished) -> dict[str, list[tuple[int, object, bool]]]:
    found = {}
    for name in run.result.privacy.sites:
        with reading(run.folder.path / "ledgers" / f"{name}.sqlite") as ledger:
            found[name] = [(charge.entry.round, charge.event, charge.committed) for charge in ledger.charges()]
    return found


def statuses(run: Finished) -> list[dict[str, str]]:
    return [{site["name"]: site["status"] for site in line["sites"]} for line in run.lines]


def lose(monkeypatch: pytest.MonkeyPatch, gone: set[str], *, times: int = 99) -> None:
    """Have the masked updates of these sites, trained in blocks, be lost on their way, in so many rounds."""
    real, asked = BlockEngine._masked, dict.fromkeys(gone, 0)

    def masked(self: BlockEngine, *arguments: object) -> Iterator[Message]:
        for reply in real(self, *arguments):
            name = self._names[reply.metadata.src_node_id]
            asked[name] = asked.get(name, 0) + 1
            if name not in gone or asked[name] > times:
                yield reply

    monkeypatch.setattr(BlockEngine, "_masked", masked)


def lose_stage(monkeypatch: pytest.MonkeyPatch, gone: set[str], stage: str) -> None:
    """Have the answers of these sites to a stage that each answers alone be lost; that of masks too where sites are trained one after another."""
    real = InProcessGrid._answer

    def answer(self: InProcessGrid, message: Message) -> Message:
        site = str(self._contexts[message.metadata.dst_node_id].node_config["site"])
        reply = real(self, message)
        return Message(Error(code=2, reason=""), reply_to=message) if site in gone and kind(message) == kind_of(stage) else reply

    monkeypatch.setattr(simulations.in_process.InProcessGrid, "_answer", answer)


# The same runs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind_", [pytest.param(name, marks=pytest.mark.slow) if name in ("noised evaluation", "fedadam") else name for name in KINDS]
)
def test_blocks_come_to_what_sites_come_to_one_after_another(usual, kind_: str) -> None:
    blocks, single = (usual(kind_, how) for how in ("blocks", "sequential"))
    assert "blocks of up to 3 sites" in blocks.result.execution and "as asked" in single.result.execution
    assert_close(blocks, single, atol=1e-3 if kind_ == "fedadam" else 5e-6)  # it divides by roots of squares
    assert blocks.result.privacy == single.result.privacy and charges(blocks) == charges(single)
    assert statuses(blocks) == statuses(single)
    assert blocks.lines[0]["sites"] == single.lines[0]["sites"]  # of the first model, which is the same


def test_blocks_under_masks_come_to_the_model_of_blocks_in_the_clear(runner, usual) -> None:
    table = study_of(runner).to_table()
    del table["secure_aggregation"]
    clear = runner.run(Study.from_table(table), execution="blocks")
    for name, value in final(usual("private", "blocks")).items():
        np.testing.assert_allclose(value, final(clear)[name], atol=2e-5)  # to the fixed point's step: `test_secure_aggregation`
    assert usual("private", "blocks").result.privacy == clear.result.privacy


@pytest.mark.slow
def test_every_site_masks_its_own_update_and_none_crosses_in_the_clear(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two runs are the same bits."""
    real, masked, sent = Site.mask, list[str](), list[Message]()

    def watched(self: Site, *arguments: object, **named: object) -> object:
        masked.append(self.settings.name)
        return real(self, *arguments, **named)

    monkeypatch.setattr(Site, "mask", watched)
    taken = BlockEngine._masked
    monkeypatch.setattr(BlockEngine, "_masked", lambda self, *rest: (sent.append(reply) or reply for reply in taken(self, *rest)))
    runs = [runner.run(study_of(runner, privacy={"unit": "none"}), execution="blocks") for _ in range(2)]
    assert sorted(masked) == sorted(4 * [f"site-{number}" for number in range(1, 6)]) and len(sent) == 20
    assert all(MASKED in reply.content and PARAMETERS not in reply.content for reply in sent)
    assert all(str(reply.content[MESSAGE]["json"]).startswith('{"kind":"secure-trained"') for reply in sent)
    assert runs[0].model() == runs[1].model()


@pytest.mark.parametrize("kind_", [pytest.param("private", marks=pytest.mark.slow), "distributed"])
def test_a_run_whose_blocks_another_device_trains_comes_to_what_the_cpu_comes_to(runner, usual, kind_: str) -> None:
    with other_device() as device:
        there = runner.run(study_of(runner, **KINDS[kind_]), device=device)
    assert there.result.execution == f"in blocks of up to 5 sites on {device}"
    assert_close(there, usual(kind_, "blocks"))
    assert there.result.privacy == usual(kind_, "blocks").result.privacy


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize("kind_", ["private", "distributed"])
@pytest.mark.parametrize("how", ["blocks", "sequential"])
def test_processes_make_no_difference_to_any_bit(runner, usual, how: Execution, kind_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ready_after(monkeypatch, 1)
    several = runner.run(study_of(runner, **KINDS[kind_]), execution=how, processes=2)
    assert given == [3]  # of two rounds of two blocks
    assert several.model() == usual(kind_, how).model() and several.comparable == usual(kind_, how).comparable


# Drop-outs -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind_", "stage"),
    [
        ("private", "advertise"), ("private", "mask"), ("distributed", "mask"), ("whole sites", "share"), ("whole sites", "unmask"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("private", "unmask"), ("distributed", "share"), ("distributed", "unmask"), ("whole sites", "mask"))),
    ],
)  # fmt: skip
def test_a_site_that_drops_out_at_any_stage_leaves_what_it_leaves_one_after_another(
    runner, monkeypatch: pytest.MonkeyPatch, stage: str, kind_: str
) -> None:  # fmt: skip
    study = study_of(runner, **{**KINDS[kind_], "rounds": {"count": 1, "require": 3}})
    lose_stage(monkeypatch, {"site-2"}, stage)
    single = runner.run(study, execution="sequential")
    if stage == "mask":
        lose(monkeypatch, {"site-2"})
    blocks = runner.run(study, execution="blocks")
    assert_close(blocks, single)
    assert charges(blocks) == charges(single)
    expected = {"mask": "missing", "unmask": "ok"}.get(stage, "failed")  # in the last stage nobody is missed
    [found] = statuses(blocks)
    assert found == {f"site-{number}": expected if number == 2 else "ok" for number in range(1, 6)}


@pytest.mark.slow
def test_who_is_too_slow_for_the_deadline_is_missing_and_the_others_go_on(runner) -> None:
    """Of eight sites, as slow as the seed says; on the virtual clock, so nobody waits."""
    study = study_of(
        runner, federation={"sites": 8, "slowness": 5.0}, rounds={"count": 1, "require": 3, "deadline": "200s"}, seed=3, privacy={"unit": "none"}
    )
    runs = [runner.run(study, execution=how) for how in ("blocks", "sequential")]
    assert_close(*runs)
    [line, other] = (statuses(run)[0] for run in runs)
    assert line == other and 0 < list(line.values()).count("missing") <= 3


@pytest.mark.parametrize("kind_", ["private", pytest.param("distributed", marks=pytest.mark.slow)])
def test_below_the_threshold_the_round_fails_by_name_and_nothing_is_learnt(runner, monkeypatch: pytest.MonkeyPatch, kind_: str) -> None:
    lose(monkeypatch, {"site-1", "site-2", "site-3"})
    least = 4 if kind_ == "distributed" else 3
    study = study_of(runner, **{**KINDS[kind_], "rounds": {"count": 1, "require": 1}})
    with pytest.raises(QuorumLostError, match=rf"round 1: .*expected {least} sites or more, got 2"):
        runner.run(study, execution="blocks")
    run = runner.latest()
    assert run.result.outcome == "failed" and run.result.rounds_completed == 0 and not (run.folder.path / "checkpoint" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_sum_that_fails_is_begun_anew_where_the_study_waits_and_is_charged_once(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(runner, rounds={"count": 1, "require": 3, "on_missing": "wait"})
    whole = runner.run(study, execution="blocks")
    lose(monkeypatch, {"site-2", "site-3", "site-4"}, times=1)
    run = runner.run(study, execution="blocks")
    assert_close(run, whole)
    assert all(len(found) == 1 for found in charges(run).values())


@pytest.mark.slow
def test_a_site_that_refuses_is_out_before_it_is_charged_and_one_whose_update_may_not_leave_after(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    check, mask = Site.check_sum, Site.mask

    def refusing(self: Site, task: object) -> float | None:
        if self.settings.name == "site-2":
            raise ProtocolError("secure sum: not with us")
        return check(self, task)

    def holding_back(self: Site, *arguments: object, **named: object) -> object:
        if self.settings.name == "site-4":
            raise RuntimeError("patient 17 has HIV")
        return mask(self, *arguments, **named)

    monkeypatch.setattr(Site, "check_sum", refusing)
    monkeypatch.setattr(Site, "mask", holding_back)
    runs = [runner.run(study_of(runner), execution=how) for how in ("blocks", "sequential")]
    assert_close(*runs)
    for run in runs:
        assert all({name for name, status in line.items() if status == "refused"} == {"site-2", "site-4"} for line in statuses(run))
        found = charges(run)
        assert len(found["site-4"]) == 2 and not found.get("site-2")
        assert "HIV" not in "".join(path.read_text() for path in run.folder.path.glob("*.json*"))


def test_a_block_that_cannot_be_trained_at_once_is_trained_and_masked_one_after_another(runner, usual, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        raise RuntimeError

    monkeypatch.setattr(trainer, "train_block", broken)
    run = runner.run(study_of(runner), execution="blocks")
    assert run.model() == usual("private", "sequential").model() and charges(run) == charges(usual("private", "sequential"))


@pytest.mark.parametrize(
    "kind_", ["distributed", pytest.param("private", marks=pytest.mark.slow), pytest.param("whole sites", marks=pytest.mark.slow)]
)
def test_a_run_gone_on_with_is_the_same_to_the_bit(runner, usual, kind_: str) -> None:
    def stop(record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(study_of(runner, **KINDS[kind_]), execution="blocks", observe=stop)
    broken = runner.latest().folder
    resumed = runner.run(broken.study, resume=Path(broken.path), execution="blocks")
    assert resumed.model() == usual(kind_, "blocks").model() and resumed.comparable == usual(kind_, "blocks").comparable
