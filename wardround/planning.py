"""Before anybody trains: of epsilon, noise, rounds, batch size and delta, the one left open; and whether a signal remains under the noise.

Every condition holds at every site. Numbers are of the whole study at a site: rounds x steps a round Poisson-sampled Gaussian releases,
add or remove one patient. No torch is imported here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config import Settings
from shared.errors import ConfigurationError
from shared.plan import check_delta
from shared.privacy import (
    MIN_NOISE_MULTIPLIER,
    PrivacyEvent,
    default_delta_of_sites,
    delta_of,
    epsilon_of,
    filter_order,
    renyi_budget,
    renyi_divergence,
    renyi_epsilon,
    sample_rate_of,
    solve_noise_for_budget,
    solve_noise_multiplier,
    steps_per_round,
)

Solved = Literal["noise", "epsilon", "rounds", "batch_size", "delta"]

DEFAULT_ROUNDS, DEFAULT_BATCH_SIZE = 30, 32
MAX_ROUNDS = 100_000  # as in a study
LEAST_DELTA = 1e-12  # a solved delta is never said to be less: below, the rounding of the numerical composition would show


class Question(Settings):
    """What is known of a study; the rest is solved, or takes a study's default."""

    patients: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1, description="training patients of each site, as declared")
    epsilon: float | None = Field(default=None, gt=0, le=100)
    noise_multiplier: float | None = Field(default=None, ge=MIN_NOISE_MULTIPLIER, le=1e6)
    delta: float | None = Field(default=None, gt=0, lt=0.1)
    rounds: int | None = Field(default=None, ge=1, le=MAX_ROUNDS)
    batch_size: int | None = Field(default=None, ge=1)
    local_epochs: int = Field(default=1, ge=1, le=1000)
    spare_rounds: int = Field(default=0, ge=0, le=1000, description="planned beyond the rounds, for those that a crash spends in vain")
    limit: float | None = Field(default=None, gt=0, le=100, description="a hospital's limit over all studies; None: what this plan costs")
    parameters: int | None = Field(default=None, ge=1, description="trainable parameters of the model")

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("expected either epsilon or noise_multiplier, or both, got neither; give one")
        if None not in (self.epsilon, self.noise_multiplier, self.rounds, self.batch_size, self.delta):
            raise ValueError("expected one of epsilon, noise_multiplier, rounds, batch_size and delta to be left open, got all; omit one")
        return self

    @property
    def solved(self) -> Solved:
        """What is left open."""
        if self.epsilon is None:
            return "epsilon"
        if self.noise_multiplier is None:
            return "noise"
        if self.rounds is None:
            return "rounds"
        return "batch_size" if self.batch_size is None else "delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNumbers:
    """The plan at one site.

    Attributes:
        steps: of the whole study, spare rounds included; all are charged.
        epsilon: by privacy loss distributions; at most what was asked for.
        epsilon_filter: what the site's limit would be charged, by a Renyi filter of one order, `filter_order`.
        noise_multiplier_filter: the least noise that passes that filter as well; None where no noise does.
    """

    declared_size: int
    sample_rate: float
    steps_per_round: int
    steps: int
    noise_multiplier: float
    epsilon: float
    delta: float
    limit: float
    filter_order: float
    epsilon_filter: float
    noise_multiplier_filter: float | None

    @property
    def passes_filter(self) -> bool:
        """True when the plan's own noise passes."""
        return self.noise_multiplier_filter == self.noise_multiplier


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """How much a model can learn at most, for all the noise.

    Attributes:
        ratio: upper bound on update over noise, in norms; None without a number of parameters.
        largest_model: parameters at which the ratio would be 1.
        patients_needed: of each site for a ratio of 1, all growing in one proportion and the batch with them; None where it is above 1.
    """

    parameters: int | None
    ratio: float | None
    largest_model: int
    patients_needed: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The answer."""

    solved: Solved
    rounds: int
    batch_size: int
    sites: tuple[SiteNumbers, ...]
    signal: Signal


def plan_study(question: Question) -> Planned:
    """The plan that `question` asks for.

    Raises:
        ConfigurationError: nothing fits; it says what would.
    """
    delta = question.delta if question.delta is not None else default_delta_of_sites(question.patients)
    rounds = question.rounds or (_most_rounds(question, delta) if question.solved == "rounds" else DEFAULT_ROUNDS)
    batch_size = question.batch_size or (_largest_batch(question, rounds, delta) if question.solved == "batch_size" else DEFAULT_BATCH_SIZE)
    if question.solved == "delta":
        delta = _least_delta(question, rounds, batch_size)
    for size in question.patients:
        check_delta(delta, size)
    sites = tuple(_site(question, _shape(question, size, rounds, batch_size), size, delta) for size in question.patients)
    return Planned(solved=question.solved, rounds=rounds, batch_size=batch_size, sites=sites, signal=_signal(question, sites))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    sample_rate: float
    steps_per_round: int
    steps: int

    def event(self, noise_multiplier: float) -> PrivacyEvent:
        return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)


def _shape(question: Question, size: int, rounds: int, batch_size: int) -> _Shape:
    steps = steps_per_round(local_epochs=question.local_epochs, local_steps=None, batch_size=batch_size, declared_size=size)
    return _Shape(sample_rate=sample_rate_of(batch_size, size), steps_per_round=steps, steps=steps * (rounds + question.spare_rounds))


def _site(question: Question, shape: _Shape, size: int, delta: float) -> SiteNumbers:
    noise = question.noise_multiplier
    if noise is None:
        assert question.epsilon is not None
        noise = solve_noise_multiplier(epsilon=question.epsilon, delta=delta, sample_rate=shape.sample_rate, steps=shape.steps)
    epsilon = epsilon_of([shape.event(noise)], delta)
    limit = question.limit or question.epsilon or epsilon
    order = filter_order(limit, delta)
    return SiteNumbers(
        declared_size=size,
        sample_rate=shape.sample_rate,
        steps_per_round=shape.steps_per_round,
        steps=shape.steps,
        noise_multiplier=noise,
        epsilon=epsilon,
        delta=delta,
        limit=limit,
        filter_order=order,
        epsilon_filter=renyi_epsilon(renyi_divergence(shape.event(noise), order), order=order, delta=delta),
        noise_multiplier_filter=_noise_for_filter(shape.event(noise), renyi_budget(limit, order=order, delta=delta), order),
    )


def _noise_for_filter(event: PrivacyEvent, budget: float, order: float) -> float | None:
    if renyi_divergence(event, order) <= budget:
        return event.noise_multiplier
    if budget <= 0:
        return None
    return solve_noise_for_budget(budget=budget, order=order, sample_rate=event.sample_rate, steps=event.steps)


def _fits(question: Question, rounds: int, batch_size: int, delta: float) -> bool:
    return all(_cost(question, size, rounds, batch_size, delta) <= (question.epsilon or 0.0) for size in question.patients)


def _cost(question: Question, size: int, rounds: int, batch_size: int, delta: float) -> float:
    assert question.noise_multiplier is not None
    return epsilon_of([_shape(question, size, rounds, batch_size).event(question.noise_multiplier)], delta)


def _most_rounds(question: Question, delta: float) -> int:
    """The most rounds that fit at all sites."""
    batch_size = question.batch_size or DEFAULT_BATCH_SIZE
    if not _fits(question, 1, batch_size, delta):
        raise _nothing_fits(question, 1, batch_size, delta, what="even one round")
    most = 1
    while most < MAX_ROUNDS and _fits(question, min(2 * most, MAX_ROUNDS), batch_size, delta):
        most = min(2 * most, MAX_ROUNDS)
    return _last(lambda rounds: _fits(question, rounds, batch_size, delta), most, min(2 * most, MAX_ROUNDS + 1))


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number below `high` for which `holds`, given that it holds at `low` and then for a while."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _largest_batch(question: Question, rounds: int, delta: float) -> int:
    """The largest batch size that fits at all sites.

    While the steps of a round stay, a larger batch costs more; where it saves a step it may cost less. So of the ranges in which no
    site's steps change the last one that begins with a fit is found, and the largest fit within it.
    """
    starts = _starts(question.patients)
    fitting = next((index for index in reversed(range(len(starts))) if _fits(question, rounds, starts[index], delta)), None)
    if fitting is None:
        raise _nothing_fits(question, rounds, 1, delta, what="even an expected batch of one patient")
    end = starts[fitting + 1] if fitting + 1 < len(starts) else starts[fitting] + 1
    return _last(lambda batch_size: _fits(question, rounds, batch_size, delta), starts[fitting], end)


def _starts(patients: tuple[int, ...]) -> list[int]:
    """Batch sizes at which some site's steps a round fall, up to the largest site, in ascending order."""
    starts = {1, *patients}
    for size in patients:
        starts |= {math.ceil(size / steps) for steps in range(1, math.isqrt(size) + 1)} | set(range(1, math.isqrt(size) + 2))
    return sorted(start for start in starts if start <= max(patients))


def _least_delta(question: Question, rounds: int, batch_size: int) -> float:
    assert question.epsilon is not None and question.noise_multiplier is not None
    needed = max(
        delta_of([_shape(question, size, rounds, batch_size).event(question.noise_multiplier)], question.epsilon) for size in question.patients
    )
    if needed * max(question.patients) >= 1:
        raise _nothing_fits(
            question, rounds, batch_size, default_delta_of_sites(question.patients), what=f"any delta below 1/{max(question.patients)}"
        )
    return max(needed, LEAST_DELTA)


def _nothing_fits(question: Question, rounds: int, batch_size: int, delta: float, *, what: str) -> ConfigurationError:
    costs = {size: _cost(question, size, rounds, batch_size, delta) for size in question.patients}
    worst = max(costs, key=costs.__getitem__)
    shapes = [_shape(question, size, rounds, batch_size) for size in question.patients]
    assert question.epsilon is not None
    noise = max(solve_noise_multiplier(epsilon=question.epsilon, delta=delta, sample_rate=s.sample_rate, steps=s.steps) for s in shapes)
    return ConfigurationError(
        f"privacy plan: with noise multiplier {question.noise_multiplier:g}, {what} does not keep epsilon {question.epsilon:g} at a site with {worst} patients",
        f"for {rounds} rounds at batch size {batch_size} and delta {delta:g}: epsilon {_up(costs[worst])} or more, or a noise multiplier of {_up(noise)} or more",
    )


def _up(value: float) -> str:
    """Three digits, rounded up."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{math.ceil(value * 10**digits) / 10**digits:g}"


def _signal(question: Question, sites: tuple[SiteNumbers, ...]) -> Signal:
    one = _ratio(question, sites, 1)
    ratio = None if question.parameters is None else one / math.sqrt(question.parameters)
    needed = None if ratio is None or ratio >= 1 else _patients_needed(question, sites, ratio)
    return Signal(parameters=question.parameters, ratio=ratio, largest_model=math.floor(one**2 * (1 + 1e-12)), patients_needed=needed)


def _ratio(question: Question, sites: tuple[SiteNumbers, ...], parameters: float) -> float:
    """Upper bound on the norm of the sum of all steps' mean gradients over that of its noise, averaged over sites with equal weights.

    A step adds at most C of signal, and noise of norm noise_multiplier x C x sqrt(parameters) / batch; noises of steps and sites are
    independent. For K equal sites and T steps: batch x sqrt(T x K) / (noise_multiplier x sqrt(parameters)).
    """
    taken = [site.steps - question.spare_rounds * site.steps_per_round for site in sites]
    noises = [site.noise_multiplier / (site.sample_rate * site.declared_size) for site in sites]
    return sum(taken) / math.sqrt(parameters * sum(steps * noise**2 for steps, noise in zip(taken, noises, strict=True)))


def _patients_needed(question: Question, sites: tuple[SiteNumbers, ...], ratio: float) -> tuple[int, ...]:
    """With the batch growing in proportion, sample rates and steps stay, and so does the noise but for a smaller delta; the ratio grows with the patients."""
    factor = 1 / ratio
    for _ in range(4):  # delta enters by its logarithm: this settles at once
        factor /= _ratio(question, _grown(question, sites, factor), question.parameters or 1)
    return tuple(math.ceil(site.declared_size * factor) for site in sites)


def _grown(question: Question, sites: tuple[SiteNumbers, ...], factor: float) -> tuple[SiteNumbers, ...]:
    sizes = [math.ceil(site.declared_size * factor) for site in sites]
    kept = question.delta is not None and question.delta * max(sizes) < 1
    delta = sites[0].delta if kept else min(sites[0].delta, default_delta_of_sites(sizes))

    def grow(site: SiteNumbers) -> SiteNumbers:
        noise = site.noise_multiplier
        if question.solved == "noise":
            noise = solve_noise_multiplier(epsilon=question.epsilon or 0.0, delta=delta, sample_rate=site.sample_rate, steps=site.steps)
        return dataclasses.replace(site, declared_size=math.ceil(site.declared_size * factor), noise_multiplier=noise)

    return tuple(grow(site) for site in sites)
