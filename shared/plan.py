"""What a study means at one site: steps, sample rate and noise, solved from public numbers alone."""

from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.privacy import PrivacyEvent, epsilon_of, sample_rate_of, solve_noise_multiplier, steps_per_round
from shared.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """The whole study at a site of this declared size. Without privacy, noise_multiplier and the promise are None.

    Attributes:
        declared_size: training patients, rounded, as the site declares.
        sample_rate: q, in (0, 1].
        steps_per_round: DP-SGD (or SGD) steps in a round; fixed, whatever is sampled.
        expected_batch_size: the denominator of the mean gradient, q x declared size.
        rounds: rounds times folds.
    """

    unit: str
    declared_size: int
    sample_rate: float
    steps_per_round: int
    expected_batch_size: float
    rounds: int
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    epsilon: float | None = None
    delta: float | None = None

    @property
    def private(self) -> bool:
        """True when training is differentially private."""
        return self.noise_multiplier is not None

    def round_event(self) -> PrivacyEvent:
        """The spend of one round."""
        assert self.noise_multiplier is not None
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps_per_round)

    def study_event(self, rounds: int | None = None) -> PrivacyEvent:
        """The spend of the whole study, or of its first `rounds`."""
        assert self.noise_multiplier is not None
        steps = self.steps_per_round * (self.rounds if rounds is None else rounds)
        return PrivacyEvent(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)


def plan_site(study: Study, declared_size: int) -> SitePlan:
    """The plan of `study` at a site with `declared_size` training patients. The study's delta must be set.

    With cross-validation a patient is in the training part of all folds but one; the plan charges all of them.

    Raises:
        ConfigurationError: delta is not below 1 / declared size, or no noise fits the budget.
    """
    training = study.training
    rate = sample_rate_of(training.batch_size, declared_size)
    steps = steps_per_round(
        local_epochs=training.local_epochs, local_steps=training.local_steps, batch_size=training.batch_size, declared_size=declared_size
    )
    rounds = study.rounds.count * study.evaluation.folds
    shape = {"unit": study.privacy.unit, "declared_size": declared_size, "steps_per_round": steps, "rounds": rounds}
    if not study.private:
        return SitePlan(**shape, sample_rate=rate, expected_batch_size=rate * declared_size)  # type: ignore[arg-type]  # the keys above
    delta = study.privacy.delta
    if delta is None:
        raise ConfigurationError("privacy.delta: expected a value by now, got none", "set it, or let the federation derive it from declared sizes")
    check_delta(delta, declared_size)
    noise = study.privacy.noise_multiplier or solve_noise_multiplier(
        epsilon=study.privacy.epsilon or 0.0, delta=delta, sample_rate=rate, steps=steps * rounds
    )
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps * rounds)
    return SitePlan(
        **shape,  # type: ignore[arg-type]  # the keys above
        sample_rate=rate,
        expected_batch_size=rate * declared_size,
        noise_multiplier=noise,
        max_grad_norm=study.privacy.max_grad_norm,
        epsilon=epsilon_of([event], delta),
        delta=delta,
    )


def check_delta(delta: float, declared_size: int) -> None:
    """Raise `ConfigurationError` unless delta < 1 / declared size: at 1/n, publishing one patient outright would be allowed."""
    if delta * declared_size >= 1:
        raise ConfigurationError(
            f"privacy.delta: expected delta < 1/{declared_size} (the site's declared size), got {delta:g}", "lower it or omit it"
        )
