"""What a study means at a site follows from public numbers alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.plan import Limit, plan_site
from shared.privacy import PrivacyEvent, epsilon_of, filter_order, renyi_budget, renyi_divergence
from shared.study import Study


def study(**changes: object) -> Study:
    base = Study.from_table({"name": "s", "task": "t", "rounds": {"count": 5}, "privacy": {"epsilon": 3.0, "delta": 1e-4}})
    return base.replace(**changes)


@pytest.mark.slow
def test_a_private_plan() -> None:
    plan = plan_site(study(), 200)
    assert (plan.unit, plan.declared_size, plan.sample_rate, plan.steps_per_round, plan.rounds) == ("patient", 200, 0.16, 7, 5)
    assert plan.expected_batch_size == 32 and plan.private and plan.max_grad_norm == 1.0 and plan.delta == 1e-4
    assert plan.epsilon is not None and 2.98 < plan.epsilon <= 3.0
    assert plan.study_event() == PrivacyEvent(noise_multiplier=plan.round_event().noise_multiplier, sample_rate=0.16, steps=35)
    assert epsilon_of([plan.round_event()] * 5, 1e-4) == plan.epsilon
    spare = plan_site(study(privacy={"epsilon": 3.0, "delta": 1e-4, "spare_rounds": 2}), 200)
    assert spare.study_event().steps == 49 and spare.epsilon is not None and 2.98 < spare.epsilon <= 3.0
    assert spare.round_event().noise_multiplier > plan.round_event().noise_multiplier


def test_under_a_sites_limit_the_noise_passes_study_and_filter() -> None:
    limit = Limit(epsilon=3.0, delta=1e-4)
    alone, under = plan_site(study(), 200), plan_site(study(), 200, limit=limit)
    order = filter_order(limit.epsilon, limit.delta)
    budget = renyi_budget(limit.epsilon, order=order, delta=limit.delta)
    assert renyi_divergence(alone.study_event(), order) > budget >= renyi_divergence(under.study_event(), order) > 0.999 * budget
    assert plan_site(study(), 200, limit=Limit(epsilon=9.0, delta=1e-4)) == alone
    assert plan_site(study(), 200, limit=Limit(epsilon=2.0, delta=1e-4)) == alone  # more than the site allows is refused, not made to fit


@settings(max_examples=10)
@given(size=st.integers(2, 5000), batch=st.integers(1, 600), epochs=st.integers(1, 3), folds=st.integers(1, 3))
def test_sampling_accounting_and_denominator_speak_of_the_same_numbers(size: int, batch: int, epochs: int, folds: int) -> None:
    asked = study(
        training={"batch_size": batch, "local_epochs": epochs},
        evaluation={"folds": folds},
        privacy={"noise_multiplier": 5.0, "delta": min(1e-4, 0.5 / size)},
    )
    plan = plan_site(asked, size)
    assert plan.sample_rate == min(1.0, batch / size)
    assert plan.expected_batch_size == pytest.approx(min(batch, size))
    assert plan.rounds == 5 * folds  # every fold trains on a patient again: all are charged
    assert plan.study_event().steps == plan.steps_per_round * plan.rounds
    assert plan.round_event().sample_rate == plan.sample_rate


def test_a_bigger_budget_needs_less_noise_and_a_given_noise_is_taken() -> None:
    noises = [plan_site(study(privacy={"epsilon": epsilon}), 200).noise_multiplier for epsilon in (1.0, 3.0)]
    assert noises == sorted(noises, reverse=True) and len(set(noises)) == 2
    assert plan_site(study(privacy={"noise_multiplier": 2.5}), 200).noise_multiplier == 2.5


def test_folds_and_rounds_raise_the_noise() -> None:
    one = plan_site(study(), 200).noise_multiplier
    assert plan_site(study(evaluation={"folds": 5}), 200).noise_multiplier == pytest.approx(
        plan_site(study(rounds={"count": 25}), 200).noise_multiplier
    )
    assert one is not None and one < (plan_site(study(evaluation={"folds": 5}), 200).noise_multiplier or 0)


def test_without_privacy_nothing_is_promised() -> None:
    plan = plan_site(study(privacy={"unit": "none"}), 50)
    assert not plan.private and plan.epsilon is None and plan.delta is None and plan.noise_multiplier is None


@pytest.mark.parametrize(
    ("delta", "size", "fits"), [(0.05, 20, False), (0.0499, 20, True), (0.01, 199, False), (1e-3, 999, True), (1e-3, 1000, False)]
)
def test_delta_must_be_below_one_in_the_patients(delta: float, size: int, fits: bool) -> None:
    asked = study(privacy={"noise_multiplier": 3.0, "delta": delta})
    if fits:
        assert math.isfinite(plan_site(asked, size).epsilon or math.nan)
    else:
        with pytest.raises(ConfigurationError, match=rf"privacy.delta: expected delta < 1/{size} .*got {delta:g}; lower it or omit it"):
            plan_site(asked, size)


def test_delta_must_be_resolved_by_now() -> None:
    unresolved = Study.from_table({"name": "s", "task": "t", "privacy": {"epsilon": 3.0}})
    with pytest.raises(ConfigurationError, match="privacy.delta: expected a value by now"):
        plan_site(unresolved, 100)
