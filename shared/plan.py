"""What a study means at one site: steps, sample rate and noise, solved from public numbers alone."""

import dataclasses
from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.privacy import (
    PrivacyEvent,
    epsilon_of,
    filter_order,
    renyi_budget,
    renyi_divergence,
    sample_rate_of,
    solve_noise_for_budget,
    solve_noise_multiplier,
    steps_per_round,
)
from shared.strategy_options import Apfl, Ditto, FineTuning, QFedAvg, Strategy
from shared.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a site allows a cohort to spend over all studies; enforced by a Renyi filter of one order (Feldman and Zrnic 2021)."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """The whole study at a site of this declared size. Without privacy, noise_multiplier and the promise are None.

    Attributes:
        declared_size: training patients, rounded, as the site declares.
        sample_rate: q, in (0, 1].
        steps_per_round: DP-SGD (or SGD) steps in a round, all that is charged; fixed, whatever is sampled.
        extra_steps: those of them that do not train the shared model: they train the site's own, or estimate a loss.
        closing_steps: after the last round of a fold, for fine-tuning.
        expected_batch_size: the denominator of the mean gradient, q x declared size.
        rounds: rounds times folds.
        spare_rounds: planned and charged beyond those, for rounds that a crash has spent without an update.
        epsilon: of the whole plan, spare rounds included.
    """

    unit: str
    declared_size: int
    sample_rate: float
    steps_per_round: int
    expected_batch_size: float
    rounds: int
    spare_rounds: int = 0
    extra_steps: int = 0
    closing_steps: int = 0
    folds: int = 1
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    epsilon: float | None = None
    delta: float | None = None

    @property
    def private(self) -> bool:
        """True when training is differentially private."""
        return self.noise_multiplier is not None

    @property
    def shared_steps(self) -> int:
        """Steps in a round that train the shared model."""
        return self.steps_per_round - self.extra_steps

    @property
    def planned_steps(self) -> int:
        """Steps of the whole study, spare rounds included."""
        return self.steps_per_round * (self.rounds + self.spare_rounds) + self.closing_steps * self.folds

    def event(self, steps: int) -> PrivacyEvent:
        """The spend of so many steps."""
        assert self.noise_multiplier is not None
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)

    def round_event(self) -> PrivacyEvent:
        """The spend of one round."""
        return self.event(self.steps_per_round)

    def study_event(self) -> PrivacyEvent:
        """The most that the whole study may spend, spare rounds included."""
        return self.event(self.planned_steps)


def plan_site(study: Study, declared_size: int, *, limit: Limit | None = None) -> SitePlan:
    """The plan of `study` at a site with `declared_size` training patients. The study's delta must be set.

    With cross-validation a patient is in the training part of all folds but one; the plan charges all of them.

    Args:
        limit: the site's own; the noise is made strong enough for the plan alone to pass its filter as well. A study that asks for more
            than the limit gets no noise for it: the site refuses it by name.

    Raises:
        ConfigurationError: delta is not below 1 / declared size, or no noise fits the budget.
    """
    shape = shape_site(study, declared_size)
    return _with_noise(shape, study, limit) if study.private else shape


def shape_site(study: Study, declared_size: int) -> SitePlan:
    """The plan without its noise and promise: what a policy can judge before anything is computed."""
    training = study.training
    rate = sample_rate_of(training.batch_size, declared_size)
    steps = steps_per_round(
        local_epochs=training.local_epochs, local_steps=training.local_steps, batch_size=training.batch_size, declared_size=declared_size
    )
    extra = extra_steps(study.strategy, steps)
    return SitePlan(
        unit=study.privacy.unit,
        declared_size=declared_size,
        sample_rate=rate,
        steps_per_round=steps + extra,
        extra_steps=extra,
        closing_steps=_closing_steps(study, declared_size),
        folds=study.evaluation.folds,
        expected_batch_size=rate * declared_size,
        rounds=study.rounds.count * study.evaluation.folds,
        spare_rounds=study.privacy.spare_rounds if study.private else 0,
    )


def extra_steps(strategy: Strategy, shared_steps: int) -> int:
    """Steps of a round beyond those that train the shared model: Ditto and APFL train a second one alike, q-FedAvg estimates a loss."""
    match strategy:
        case Ditto() | Apfl():
            return shared_steps
        case QFedAvg():
            return 1
        case _:
            return 0


def _closing_steps(study: Study, declared_size: int) -> int:
    if not isinstance(study.strategy, FineTuning):
        return 0
    batch_size = study.training.batch_size
    return steps_per_round(local_epochs=study.strategy.fine_tuning_epochs, local_steps=None, batch_size=batch_size, declared_size=declared_size)


def _with_noise(shape: SitePlan, study: Study, limit: Limit | None) -> SitePlan:
    delta, steps = study.privacy.delta, shape.planned_steps
    if delta is None:
        raise ConfigurationError("privacy.delta: expected a value by now, got none", "set it, or let the federation derive it from declared sizes")
    check_delta(delta, shape.declared_size)
    noise = study.privacy.noise_multiplier or solve_noise_multiplier(
        epsilon=study.privacy.epsilon or 0.0, delta=delta, sample_rate=shape.sample_rate, steps=steps
    )
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=shape.sample_rate, steps=steps)
    if limit is not None and delta <= limit.delta and epsilon_of([event], delta) <= limit.epsilon:
        event = within_filter(event, limit)
    return dataclasses.replace(
        shape,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=study.privacy.max_grad_norm,
        epsilon=epsilon_of([event], delta),
        delta=delta,
    )


def within_filter(event: PrivacyEvent, limit: Limit | None) -> PrivacyEvent:
    """`event`, with more noise where alone it would not pass the filter of `limit`; as it is without a limit."""
    if limit is None:
        return event
    order = filter_order(limit.epsilon, limit.delta)
    budget = renyi_budget(limit.epsilon, order=order, delta=limit.delta)
    if renyi_divergence(event, order) <= budget:
        return event
    noise = solve_noise_for_budget(budget=budget, order=order, sample_rate=event.sample_rate, steps=event.steps)
    return dataclasses.replace(event, noise_multiplier=max(noise, event.noise_multiplier))


def check_delta(delta: float, declared_size: int) -> None:
    """Raise `ConfigurationError` unless delta < 1 / declared size: at 1/n, publishing one patient outright would be allowed."""
    if delta * declared_size >= 1:
        raise ConfigurationError(
            f"privacy.delta: expected delta < 1/{declared_size} (the site's declared size), got {delta:g}", "lower it or omit it"
        )
