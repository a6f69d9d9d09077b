"""What a run says of itself before its first round: why sites train one after another, and how many are in a sum."""

import logging

import pytest

from shared.errors import ConfigurationError
from simulations.simulate import describe_sums


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("cyclic", "whose sites train in turn"),
        ("fedbuff", "whose sites train at times of their own"),
        ("ditto", "which has a part of its own at each site"),
    ],
)
def test_the_reason_against_blocks_is_the_strategy_s_own(runner, strategy: str, reason: str) -> None:
    study = runner.study(strategy={"name": strategy}, federation={"sites": 4})
    with pytest.raises(ConfigurationError, match=f"strategy {strategy}, {reason};"):
        runner.run(study, execution="blocks")


@pytest.mark.parametrize(
    ("options", "num_sites", "fraction", "told"),
    [
        ({"threshold": 3}, 8, 1.0, "at least 5 of the 8 sites asked (threshold 3 is raised to it)"),
        ({"threshold": 6}, 8, 1.0, "at least 6 of the 8 sites asked"),
        ({}, 8, 1.0, "at least 5 of the 8 sites asked"),
        ({}, 12, 0.5, "at least 4 of the 6 sites asked"),
    ],
)
def test_a_raised_threshold_is_said(runner, options: dict[str, int], num_sites: int, fraction: float, told: str) -> None:
    study = runner.study(secure_aggregation=options, strategy={"name": "fedavg", "fraction": fraction})
    assert describe_sums(study, num_sites) == f"updates are summed under masks: a sum is of {told}"


def test_shares_of_noise_ask_for_more_than_half(runner) -> None:
    study = runner.study(
        training={"local_steps": 1}, secure_aggregation={"threshold": 3, "noise": "distributed", "sites": 8, "missing": 1}, federation={"sites": 8}
    )  # fmt: skip
    assert describe_sums(study, 8).endswith("a sum is of at least 7 of the 8 sites asked (threshold 3 is raised to it)")


@pytest.mark.slow
def test_a_run_says_it_before_its_first_round_and_only_where_there_are_sums(runner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="simulations"):
        runner.run(runner.study(secure_aggregation={"threshold": 3}, federation={"sites": 4}, rounds={"count": 1}))
        assert "updates are summed under masks: a sum is of at least 3 of the 4 sites asked" in caplog.messages
        caplog.clear()
        runner.run(runner.study(federation={"sites": 4}, rounds={"count": 1}))
    assert not any("masks" in message for message in caplog.messages)
