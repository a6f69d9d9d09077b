"""Buffered asynchronous aggregation: beside the paper's algorithm written out, with the same arrivals; then privacy, interruption, silence and speed."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Error, Message, MessageType

import client.local_update
import simulations.timed_grid
from client.ledger import reading
from server.strategies.fedbuff import Buffer, staleness_weight
from shared.errors import ConfigurationError, ProtocolError, QuorumLostError
from shared.plan import plan_site
from shared.results import RoundRecord
from shared.strategy_options import FedBuff
from shared.study import Study
from simulations.attacks.poisoning import attack_poisoning
from simulations.in_process import InProcessGrid
from simulations.simulate import prepare
from simulations.timed_grid import seconds_of_training
from tests.simulations.conftest import Finished, Runner
from tests.simulations.test_strategies import Arrays, Papers, assert_close, combine, final, plain_study
from wardround.report.page import write_report

SLOW = "site-2"
Seconds = Callable[[Study, str], float]


def buffered(runner: Runner, *, slowness: float = 1.0, count: int = 6, **options: object) -> Study:
    study = plain_study(runner, name="fedbuff", **{"buffer_size": 2, **options})
    return study.replace(federation={"slowness": slowness}, rounds={"count": count})


def written_out(
    papers: Papers, seconds: dict[str, float], *, size: int, rate: float = 1.0, count: int
) -> tuple[Arrays, list[dict[str, int]], list[float]]:
    """Algorithm 1 in float64: the model, who was in each buffer with which staleness, and when each buffer was full."""
    w, now, models, working = papers.start, 0.0, dict[int, Arrays](), dict[str, tuple[float, int]]()
    buffers, times = list[dict[str, int]](), list[float]()
    for number in range(1, count + 1):
        models[number] = w
        working |= {site: (now + seconds[site], number) for site in papers.parts if site not in working}
        buffer, staleness = combine(w=(0.0, w)), dict[str, int]()
        while len(staleness) < size:
            site = min(working, key=lambda name: (working[name][0], name))
            now, asked = working.pop(site)
            staleness[site] = number - asked
            s = 1 / math.sqrt(1 + number - asked)
            buffer = combine(b=(1, buffer), y=(s, papers.descend(site, models[asked])), w=(-s, models[asked]))
        w = combine(w=(1, w), b=(rate / size, buffer))
        buffers.append(staleness)
        times.append(now)
    return w, buffers, times


def took(run: Finished) -> list[float]:
    return [record.virtual_seconds or 0.0 for record in run.folder.rounds()]


def counted(record: RoundRecord) -> dict[str, int | None]:
    return {site.name: site.staleness for site in record.sites if site.status == "ok"}


@pytest.fixture
def twenty_times_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.timed_grid, "seconds_of_training", lambda study, name: 20.0 if name == SLOW else 1.0)


# Beside the paper -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rate"), [(1, 1.0), (2, 0.7), (3, 1.0), (4, 1.0)])
def test_fedbuff_is_algorithm_1(runner: Runner, size: int, rate: float) -> None:
    study = buffered(runner, buffer_size=size, server_learning_rate=rate)
    papers, run = Papers(study), runner.run(study)
    seconds = {site: seconds_of_training(study, site) for site in papers.parts}
    w, buffers, times = written_out(papers, seconds, size=size, rate=rate, count=6)
    assert [counted(record) for record in run.folder.rounds()] == buffers
    assert (max(max(buffer.values()) for buffer in buffers) > 0) == (size < 4), "the order of arrivals tells something"
    np.testing.assert_allclose(np.cumsum(took(run)), times, rtol=1e-6)
    assert_close(final(run), w)


@pytest.mark.slow
def test_a_buffer_of_all_sites_is_fedavg_with_equal_weights(runner: Runner) -> None:
    waiting = runner.run(plain_study(runner, name="fedavg", weights="equal").replace(federation={"slowness": 1.0}))
    run = runner.run(buffered(runner, buffer_size=4, count=4))
    assert final(run).keys() == final(waiting).keys()
    for name, value in final(run).items():
        np.testing.assert_allclose(value, final(waiting)[name], rtol=1e-5, atol=1e-6)
    assert took(run) == took(waiting), "and takes as long: the slowest decides"
    for record, other in zip(run.folder.rounds(), waiting.folder.rounds(), strict=True):
        assert record.metrics == pytest.approx(other.metrics, abs=1e-5)


def test_an_update_counts_for_less_the_older_its_model_and_beyond_the_limit_not_at_all() -> None:
    assert [staleness_weight(staleness) for staleness in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    ages = {"new": 0, "old": 3, "older": 4}
    buffer = Buffer(FedBuff(name="fedbuff", largest_staleness=3), staleness=ages)
    buffer.add({"w": np.float32([2.0])}, 1, site="new")
    buffer.add({"w": np.float32([2.0])}, 1, site="old")
    with pytest.raises(ProtocolError, match=r"at most 3 rounds old \(strategy.largest_staleness\), got one of 4 rounds"):
        buffer.add({"w": np.float32([2.0])}, 1, site="older")
    assert buffer.total_weight == 2 and buffer.take_mean()["w"] == [1.5]


def test_statistics_of_an_older_model_are_not_added_to_those_of_the_newest(runner: Runner) -> None:
    study = buffered(runner)
    run = runner.run(study)
    mixed = 0
    for record in run.folder.rounds():
        sites = {site.name: site for site in record.sites}
        fresh = [name for name, staleness in counted(record).items() if staleness == 0]
        assert (record.metrics == {}) == (not fresh)
        if len(fresh) == 1 and len(counted(record)) == 2:
            mixed += 1
            assert record.metrics["accuracy"] == sites[fresh[0]].metrics["accuracy"]
    assert mixed > 0


# Speed ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_one_site_twenty_times_slower_nobody_waits_for_it(runner: Runner, twenty_times_slower: None) -> None:
    changes = {"rounds": {"count": 25}, "training": {"local_steps": 1}}
    run = runner.run(buffered(runner).replace(strategy={"buffer_size": 3}, **changes))
    waiting = runner.run(plain_study(runner, name="fedavg").replace(federation={"slowness": 1.0}, **changes))
    assert (sum(took(run)), sum(took(waiting))) == (25.0, 500.0)
    late = [counted(record) for record in run.folder.rounds() if SLOW in counted(record)]
    assert [buffer[SLOW] for buffer in late] == [19]
    assert all(len(counted(record)) == 3 for record in run.folder.rounds())
    assert set(run.result.per_site) == set(waiting.result.per_site), "the final model is judged by who was at work when the last round ended, too"


def test_speed_depends_on_seed_and_name_alone_and_on_nothing_without_slowness(runner: Runner) -> None:
    study = buffered(runner, slowness=1.0)
    drawn = [seconds_of_training(study.replace(seed=seed), f"site-{number}") for seed in (11, 11, 12) for number in range(400)]
    assert drawn[:400] == drawn[400:800] != drawn[800:]
    assert abs(np.log(drawn).mean()) < 4 / math.sqrt(800), "false alarm: 6e-5"
    assert abs(np.log(drawn[400:]).std() - 1) < 4 / math.sqrt(2 * 800), "false alarm: 6e-5"
    assert seconds_of_training(study.replace(federation={"slowness": 0.0}), SLOW) == 1.0
    plain = runner.run(plain_study(runner, name="fedavg").replace(rounds={"count": 1}))
    assert plain.folder.rounds()[0].virtual_seconds is None


@pytest.mark.parametrize("execution", ["sequential", "blocks"])
def test_who_takes_longer_than_the_deadline_is_missed_and_has_been_charged(runner: Runner, twenty_times_slower: None, execution: str) -> None:
    study = runner.study(federation={"slowness": 1.0}, rounds={"deadline": "10s"})
    run = runner.run(study, execution=execution)
    assert [{site.name: site.status for site in record.sites}[SLOW] for record in run.folder.rounds()] == ["missing"] * 2
    assert took(run) == [10.0, 10.0] and run.result.privacy.sites[SLOW].steps > 0


def test_blocks_and_single_sites_take_alike(runner: Runner) -> None:
    study = runner.study(federation={"slowness": 1.0, "sites": 4}, privacy={"unit": "none"})
    assert took(runner.run(study, execution="blocks")) == took(runner.run(study, execution="sequential"))


# With privacy -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def private(runner: Runner) -> Study:
    return runner.study(
        strategy={"name": "fedbuff", "buffer_size": 2}, rounds={"count": 5}, federation={"sites": 4, "slowness": 1.5}, training={"local_steps": 2}
    )


@pytest.mark.slow
def test_no_site_is_charged_for_more_than_its_plan_and_slow_ones_for_less(runner: Runner, private: Study) -> None:
    run = runner.run(private)
    steps = dict[str, int]()
    for site, spent in run.result.privacy.sites.items():
        with reading(run.folder.path / "ledgers" / f"{site}.sqlite") as ledger:
            charges = ledger.charges()
        assert len({charge.entry.round for charge in charges}) == len(charges) <= 5, "once with each round's number"
        assert all(charge.committed for charge in charges)
        steps[site] = sum(charge.event.steps for charge in charges)
        answered = sum(site in counted(record) for record in run.folder.rounds())
        assert steps[site] == spent.steps == 2 * answered
        assert spent.epsilon <= 3.0 and spent.steps <= plan_site(run.folder.study, 100).planned_steps == 10
    assert min(steps.values()) < max(steps.values())


@pytest.mark.slow
def test_a_run_repeats_itself(runner: Runner, private: Study) -> None:
    runs = [runner.run(private) for _ in range(2)]
    assert runs[0].model() == runs[1].model() and runs[0].lines == runs[1].lines and runs[0].comparable == runs[1].comparable


@pytest.mark.slow
@pytest.mark.parametrize("cut_at", [3, 6, 9])
def test_a_resumed_run_equals_one_that_was_not_interrupted(runner: Runner, private: Study, monkeypatch: pytest.MonkeyPatch, cut_at: int) -> None:
    """What was at work at the checkpoint is asked again, with the model it was asked with, and is done when it would have been."""
    whole = runner.run(private)
    real, calls = client.local_update.train_round_private, list[int]()

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == cut_at:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(client.local_update, "train_round_private", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(private)
    cut = runner.latest().folder
    open_questions = cut.read_checkpoint()
    assert open_questions is not None and "at work" in open_questions.state
    resumed = runner.run(private, resume=cut.path)
    assert resumed.model() == whole.model()
    assert resumed.lines == whole.lines and resumed.comparable == whole.comparable


@pytest.mark.slow
def test_nothing_at_work_crosses_a_fold(runner: Runner, private: Study) -> None:
    run = runner.run(private.replace(evaluation={"folds": 2}, rounds={"count": 3}))
    records = run.folder.rounds()
    assert [(record.fold, record.round) for record in records] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    for record in records:
        assert all(staleness < record.round for staleness in counted(record).values())
    assert any(site.status == "at work" for site in records[2].sites)


# Sites that fail --------------------------------------------------------------------------------------------------------------------


def statuses(run: Finished, name: str) -> list[str]:
    return [site.status for record in run.folder.rounds() for site in record.sites if site.name == name]


@pytest.mark.slow
def test_a_bad_update_is_judged_by_what_its_site_was_asked(runner: Runner, twenty_times_slower: None) -> None:
    """The slow site's answer names the round in which it was asked, and counts; a liar's names another, and does not."""
    study = buffered(runner, count=22).replace(strategy={"buffer_size": 3}, training={"local_steps": 1})
    assert "ok" in statuses(runner.run(study), SLOW)
    for kind, told in (("other-round", "E102 expected a reply for this site and round"), ("nan", "E102 tensor"), ("wrong-shape", "E102 tensor")):
        run = runner.run(study.replace(faults={"sites": [SLOW], "kind": kind}))
        found = [site for record in run.folder.rounds() for site in record.sites if site.name == SLOW and site.status != "at work"]
        assert [(site.status, (site.reason or "")[: len(told)], site.staleness) for site in found] == [("failed", told, 19)]
        assert all(np.isfinite(value).all() for value in final(run).values())


@pytest.mark.slow
def test_an_update_that_is_too_old_is_dropped_by_name(runner: Runner, twenty_times_slower: None) -> None:
    study = buffered(runner, count=22).replace(strategy={"buffer_size": 3, "largest_staleness": 18}, training={"local_steps": 1})
    found = [site for record in runner.run(study).folder.rounds() for site in record.sites if site.name == SLOW and site.status == "failed"]
    assert ["largest_staleness" in (site.reason or "") for site in found] == [True]


@pytest.mark.parametrize("kind", ["silent", "late"])
def test_a_site_that_never_answers_is_missed_at_its_own_deadline_and_asked_again(runner: Runner, kind: str) -> None:
    study = buffered(runner, slowness=0.0, count=6).replace(
        strategy={"buffer_size": 3}, rounds={"deadline": "3s"}, training={"local_steps": 1}, faults={"sites": ["site-1"], "kind": kind}
    )
    run = runner.run(study)
    assert took(run) == [1.0] * 6, "nobody waits for it"
    assert statuses(run, "site-1") == ["at work", "at work", "missing", "at work", "at work", "missing"]


def test_below_the_buffer_s_size_a_round_does_not_count_unless_the_quorum_says_so(runner: Runner) -> None:
    study = buffered(runner).replace(strategy={"buffer_size": 4}, faults={"sites": ["site-1"], "kind": "nan"}, rounds={"count": 2})
    with pytest.raises(QuorumLostError, match="strategy fedbuff needs at least 4 usable updates, got 3"):
        runner.run(study)
    run = runner.run(study.replace(rounds={"require": 3}))
    assert statuses(run, "site-1") == ["failed"] * 2 and [len(counted(record)) for record in run.folder.rounds()] == [3, 3]
    with pytest.raises(ConfigurationError, match=r"at least rounds.require, 3, got 2; raise buffer_size"):
        study.replace(strategy={"buffer_size": 2}, rounds={"require": 3})
    with pytest.raises(ConfigurationError, match="strategy fedbuff: expected at least 5 sites asked in a round, got 4"):
        prepare(study.replace(strategy={"buffer_size": 5}), None)


def test_who_fails_is_asked_again_where_the_study_waits(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = InProcessGrid._answer, list[int]()

    def broken_once(self: InProcessGrid, message: Message) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and not failed:
            failed.append(message.metadata.dst_node_id)
            return Message(Error(code=2, reason="broken"), reply_to=message)
        return real(self, message)

    monkeypatch.setattr(InProcessGrid, "_answer", broken_once)
    once = buffered(runner, buffer_size=4, slowness=0.0, count=1)
    with pytest.raises(QuorumLostError, match="at least 4 usable updates, got 3"):
        runner.run(once)
    failed.clear()
    run = runner.run(once.replace(rounds={"on_missing": "wait"}))
    assert len(failed) == 1 and len(counted(run.folder.rounds()[0])) == 4 and took(run) == [2.0]


def test_a_share_of_the_idle_sites_is_asked(runner: Runner) -> None:
    study = buffered(runner, slowness=0.0, count=4).replace(strategy={"fraction": 0.5}, training={"local_steps": 1})
    for record in runner.run(study).folder.rounds():
        assert sorted(site.status for site in record.sites) == ["not asked", "not asked", "ok", "ok"]


def test_the_report_counts_who_was_at_work_and_calls_it_no_fault(runner: Runner) -> None:
    run = runner.run(buffered(runner, count=3))
    num_at_work = sum(site.status == "at work" for record in run.folder.rounds() for site in record.sites)
    text = write_report(run.folder.path).read_text()
    assert f"{num_at_work} times a site was still at work when a round ended" in text and num_at_work > 0
    assert "No site failed, refused or was too late." in text


def test_only_what_a_server_adds_up_at_once_is_masked(runner: Runner) -> None:
    with pytest.raises(ConfigurationError, match="fedbuff"):
        buffered(runner).replace(secure_aggregation={})


def test_it_is_attacked_like_any_other(runner: Runner) -> None:
    study = runner.study(privacy={"unit": "none"}, rounds={"count": 1}, federation={"sites": 4})
    [attack] = attack_poisoning(study, methods=["sign flip"], strategies=["fedbuff"])
    assert attack.clean is not None and attack.attacked is not None


def test_sites_are_not_trained_in_blocks(runner: Runner) -> None:
    with pytest.raises(ConfigurationError, match="fedbuff, whose sites train at times of their own"):
        runner.run(buffered(runner), execution="blocks")
