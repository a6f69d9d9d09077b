"""What a site is told of its own update alone: in blocks as one by one, each hospital hears of itself and of no other."""

import logging
import re

import numpy as np
import pytest

from server.strategies.strategy import FederatedStrategy
from shared.results import RoundRecord

HEARD = re.compile(r"^site (site-\d+): its update of round (\d+) did not count: E102 ")


def bound_that_half_keep(runner, monkeypatch: pytest.MonkeyPatch) -> float:
    """The median of the norms of the first round's updates."""
    norms, real = list[float](), FederatedStrategy._check_norm

    def watched(self: FederatedStrategy, of_update: float, of_model: float) -> None:
        norms.append(of_update)
        real(self, of_update, of_model)

    with monkeypatch.context() as patch:
        patch.setattr(FederatedStrategy, "_check_norm", watched)
        runner.run(runner.study(federation={"sites": 6, "alpha": 2.0}, rounds={"count": 2}), execution="sequential")
    assert len(norms) == 12
    return float(np.median(norms[:6]))


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["blocks", "sequential"])
def test_whose_update_is_too_long_hears_of_it_and_nobody_else(
    runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, execution: str
) -> None:
    bound, records = bound_that_half_keep(runner, monkeypatch), list[RoundRecord]()
    study = runner.study(
        federation={"sites": 6, "alpha": 2.0}, strategy={"name": "fedavg", "largest_update": bound}, rounds={"count": 2, "require": 1}
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="client.site"):
        runner.run(study, execution=execution, observe=records.append)
    failed = {(site.name, record.round) for record in records for site in record.sites if site.status == "failed"}
    assert {number for _, number in failed} == {1, 2} and len(failed) >= 4
    heard = [match for record in caplog.records if (match := HEARD.match(record.getMessage()))]
    assert {(match[1], int(match[2])) for match in heard} == failed and len(heard) == len(failed)
