"""Whole runs under distributed noise: the model moves by what sites put into the sum, the sum has the noise that is promised, and who asks for less is
refused."""

import math
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

import client.local_work
from client.ledger import reading
from client.secure_updates import SecureUpdates
from shared.distributed_noise import MORE
from shared.errors import ProtocolError, QuorumLostError
from shared.models import initial_parameters
from shared.plan import plan_site
from shared.secure_sum.messages import AdvertiseKeysTask, ShareKeysTask
from shared.study import Study
from shared.task import resolve_task
from tests.simulations.conftest import OneByOne
from tests.simulations.test_secure_aggregation import final, intercept, kind, kind_of


@pytest.fixture
def runner(tmp_path: Path) -> OneByOne:
    """Messages as in a deployment, which a test can come between; of blocks is `test_secure_blocks`."""
    return OneByOne(out=tmp_path / "runs")


def study_of(runner, *, missing: int = 1, sites: int = 5, **changes: object) -> Study:
    return runner.study(**{
        "federation": {"sites": sites, "partition": "iid"}, "rounds": {"count": 2, "require": 3}, "training": {"local_steps": 1, "learning_rate": 0.5},
        "secure_aggregation": {"noise": "distributed", "sites": sites, "missing": missing}, **changes,
    })  # fmt: skip


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, float, float]]:
    """Every site's points, with the spacing of the grid and the expected batch."""
    real, seen = client.local_work.noised_points, list[tuple[np.ndarray, float, float]]()

    def watch(learner, received, noise, *, share_std):
        points = real(learner, received, noise, share_std=share_std)
        seen.append((points, noise.grid.spacing, learner.plan.expected_batch_size))
        return points

    monkeypatch.setattr(client.local_work, "noised_points", watch)
    return seen


@pytest.mark.slow
def test_the_model_moves_by_the_noised_mean_gradient_exactly(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    run = runner.run(study_of(runner, rounds={"count": 1, "require": 3}))
    assert len(seen) == 5
    start = initial_parameters(resolve_task("breast-cancer").model(), run.folder.study.seed)
    step = -0.5 * seen[0][1] * sum(points for points, _, _ in seen) / sum(batch for _, _, batch in seen)
    found = np.concatenate([(value - start[name]).reshape(-1) for name, value in final(run).items()])
    np.testing.assert_allclose(found, step, rtol=1e-4, atol=1e-7)
    for site in run.result.privacy.sites:
        with reading(run.folder.path / "ledgers" / f"{site}.sqlite") as ledger:
            assert [charge.event.steps for charge in ledger.charges()] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 2])
def test_the_sum_has_the_noise_that_is_promised(runner, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    """With gradients cut to nothing, all that is in a sum is noise. 481 entries of 6 sums: their deviation is off by 10 % once in 10**13."""
    seen = watched(monkeypatch)
    study = study_of(runner, missing=missing, rounds={"count": 6, "require": 3})
    run = runner.run(study)
    plan = max((plan_site(run.folder.study, site.declared_size) for site in run.claim.sites.values()), key=lambda plan: plan.noise_multiplier)
    rounds = [seen[start : start + 5] for start in range(0, len(seen), 5)]
    spacing = seen[0][1]
    sums = np.array([sum(points for points, _, _ in of_round) for of_round in rounds]) * spacing
    signal = 5 * max(batch for _, _, batch in seen)  # far more than clipped gradients come to, over all entries
    expected = plan.noise_multiplier * MORE * math.sqrt(5 / (5 - missing))
    noise = sums - np.median(sums, axis=0)  # the signal changes little from round to round
    assert 0.8 * expected < noise.std() * math.sqrt(6 / 5) < 1.25 * expected + signal * 0.001


@pytest.mark.slow
def test_sites_may_be_missing_up_to_the_number_that_the_study_declares(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"site-2"}
    intercept(
        monkeypatch,
        lambda site, message, answer: (
            Message(Error(code=2, reason=""), reply_to=message) if site in gone and kind(message) == kind_of("mask") else answer(message)
        ),
    )
    assert runner.run(study_of(runner)).result.outcome == "completed"
    gone.add("site-4")
    with pytest.raises(QuorumLostError, match="expected 4 sites or more, got 3"):
        runner.run(study_of(runner))


@pytest.mark.parametrize("changed", ["noise_multiplier", "threshold"])
def test_sites_refuse_less_noise_than_their_plans_need_and_sums_of_fewer_shares(runner, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    real = SecureUpdates.answer

    def less(self: SecureUpdates, task):
        if isinstance(task, AdvertiseKeysTask):
            task = task.model_copy(update={changed: task.noise_multiplier * 0.99 if changed == "noise_multiplier" else 3})
        return real(self, task)

    monkeypatch.setattr(SecureUpdates, "answer", less)
    with pytest.raises(QuorumLostError):
        runner.run(study_of(runner))
    run = runner.latest()
    for path in (run.folder.path / "ledgers").glob("*.sqlite"):
        with reading(path) as ledger:
            assert not ledger.charges(), "it is refused before anything is trained"


@pytest.mark.slow
def test_a_refused_request_takes_nothing_from_a_share(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked between two stages to begin among a thousand sites, a site refuses; its share stays that of the sum that it masks for."""
    real, seen, refused = SecureUpdates.answer, watched(monkeypatch), list[str]()
    study = study_of(runner, rounds={"count": 1, "require": 3})
    tasks: dict[str, AdvertiseKeysTask] = {}

    def asked(self: SecureUpdates, task):
        if isinstance(task, AdvertiseKeysTask):
            tasks[self._name] = task
        if isinstance(task, ShareKeysTask):
            reply = real(self, task)
            many = tuple(sorted({*task.sites, *(f"x{number:03}" for number in range(900))}))
            with pytest.raises(ProtocolError) as error:
                real(self, tasks[self._name].model_copy(update={"sites": many, "threshold": 890}))
            refused.append(error.value.what)
            return reply
        return real(self, task)

    honest = final(runner.run(study))
    points = [found.copy() for found, _, _ in seen]
    monkeypatch.setattr(SecureUpdates, "answer", asked)
    again = final(runner.run(study))
    assert len(refused) == 5
    assert all(np.array_equal(one, other) for one, (other, _, _) in zip(points, seen[5:], strict=True))
    assert all(np.array_equal(honest[name], again[name]) for name in honest)


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_interrupted(runner) -> None:
    study = study_of(runner, rounds={"count": 3, "require": 3})
    whole = runner.run(study)

    def interrupt(record) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(study, observe=interrupt)
    resumed = runner.run(study, resume=runner.latest().folder.path)
    assert resumed.model() == whole.model() and resumed.comparable == whole.comparable


@pytest.mark.slow
def test_both_epsilons_are_kept(runner) -> None:
    run = runner.run(study_of(runner))
    told = run.claim.distributed_noise
    assert told is not None and told.missing == 1 and set(told.sites) == set(run.result.privacy.sites)
    for name, site in told.sites.items():
        spent = run.result.privacy.sites[name].epsilon
        assert spent == site.epsilon_against_coordinator < site.epsilon_if_all_others_collude
    assert "every other site" in told.statement


@pytest.mark.slow
def test_it_learns_where_local_noise_does_not(runner) -> None:
    """Eight sites at epsilon 0.5: the sum has about a third of the noise."""
    study = study_of(runner, sites=8, privacy={"epsilon": 0.5}, rounds={"count": 40, "require": 8}, federation={"sites": 8, "partition": "iid"})
    table = study.to_table()
    del table["secure_aggregation"]
    distributed, local = runner.run(study).result, runner.run(Study.from_table(table)).result
    brier = [result.metrics["federated"]["brier"] for result in (distributed, local)]
    assert brier[0] < 0.9 * brier[1]
