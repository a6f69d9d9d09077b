"""A network that drops, resets and cuts (fault 6): a site behind an HTTPS proxy that misbehaves; the others go on."""

import time

import pytest

from tests.faults.conftest import SOUTH
from tests.faults.federation import Federation, study
from tests.faults.proxy import Proxy

pytestmark = pytest.mark.slow


@pytest.fixture
def federation(hospitals: Federation) -> Federation:
    """Three hospitals, one of them behind the proxy."""
    return hospitals


def took_part(federation: Federation, run: str) -> list[int]:
    """The rounds in which the site behind the proxy did."""
    return [record.round for record in federation.rounds(run) if any((site.name, site.status) == (SOUTH, "ok") for site in record.sites)]


def test_a_network_gone_for_thirty_seconds_costs_no_round_that_had_quorum(federation: Federation, proxy: Proxy) -> None:
    run = federation.submit(study(rounds={"count": 200, "deadline": "12s"}, privacy={"epsilon": 10.0}))
    federation.reached(run, 2)
    proxy.down = True
    time.sleep(30)
    proxy.down = False
    last = len(federation.rounds(run))
    assert last >= 4  # it went on without the site
    federation.wait(lambda: any(number > last for number in took_part(federation, run)), "the site takes part again", 60)
    federation.ask(run, "stop")
    federation.finished(run, "stopped", seconds=60)
    numbers = [record.round for record in federation.rounds(run)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(sum(site.status == "ok" for site in record.sites) >= 2 for record in federation.rounds(run))


def test_a_proxy_that_cuts_idle_connections_is_not_even_noticed(federation: Federation, proxy: Proxy) -> None:
    proxy.idle_seconds, before = 0.15, proxy.num_cut
    try:
        run = federation.submit(study(rounds={"count": 4, "require": "all"}))
        federation.finished(run)
    finally:
        proxy.idle_seconds = 60.0
    assert took_part(federation, run) == [1, 2, 3, 4]
    assert proxy.num_cut > before


def test_resets_in_the_middle_of_messages_cost_no_round(federation: Federation, proxy: Proxy) -> None:
    proxy.reset_after, before = 40_000, proxy.num_cut  # a few messages
    try:
        run = federation.submit(study(rounds={"count": 6, "deadline": "20s"}))
        federation.finished(run)
    finally:
        proxy.reset_after = None
    assert proxy.num_cut > before + 2
    assert all(sum(site.status == "ok" for site in record.sites) >= 2 for record in federation.rounds(run))
    assert took_part(federation, run)
