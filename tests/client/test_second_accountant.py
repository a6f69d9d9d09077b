"""Two accountants of different method and code agree on what a study costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cross_check import epsilon_prv
from shared.privacy import PrivacyEvent, epsilon_of, solve_noise_multiplier

EVENTS = st.builds(
    PrivacyEvent, noise_multiplier=st.sampled_from([0.8, 1.5, 4.0]), sample_rate=st.sampled_from([0.02, 0.1, 0.5, 1.0]), steps=st.integers(1, 500)
)


@pytest.mark.slow
@settings(max_examples=5)
@given(st.lists(EVENTS, min_size=1, max_size=3), st.sampled_from([1e-4, 1e-6]))
def test_prv_and_pld_agree_within_two_per_cent(events: list[PrivacyEvent], delta: float) -> None:
    other = epsilon_prv(events, delta)
    assert other is not None and other == pytest.approx(epsilon_of(events, delta), rel=0.02, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0, 8.0])
def test_solved_noise_keeps_the_budget_by_both(epsilon: float) -> None:
    noise = solve_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=0.16, steps=210)
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=0.16, steps=210)
    assert epsilon_of([event], 1e-5) <= epsilon and (epsilon_prv([event], 1e-5) or 0) <= epsilon * 1.002


def test_nothing_costs_nothing_and_no_number_is_made_up() -> None:
    assert epsilon_prv([], 1e-5) == 0.0
    assert epsilon_prv([PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=10)] * 5, 1e-5) == pytest.approx(5.16, abs=0.03)


def test_little_noise_takes_no_more_time_or_memory() -> None:
    """With a fixed error this took 2 GB and ten seconds, and a thousand steps more memory than a machine has."""
    event = PrivacyEvent(noise_multiplier=0.3, sample_rate=0.1, steps=1000)
    assert epsilon_prv([event], 1e-5) == pytest.approx(epsilon_of([event], 1e-5), rel=0.02)
