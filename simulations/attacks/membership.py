"""Membership inference on the final model: was this patient trained on? By the loss alone, and by LiRA with shadow models.

Loss threshold: Yeom, Giacomelli, Fredrikson, Jha 2018, "Privacy Risk in Machine Learning", adversary 1: a member's loss is low.

LiRA: Carlini, Chien, Nasr, Song, Terzis, Tramer 2022, "Membership Inference Attacks From First Principles" (arXiv:2112.03570), algorithm 1:
shadow models are trained with and without a patient; the logit-scaled confidence phi = log(p / (1 - p)) of the patient is taken for Gaussian
in either world, and the score is the likelihood ratio of what the attacked model says. Each shadow is the whole study on a random half of
every site's patients, trained by the simulation itself with a seed of its own; two shadows take complementary halves, so every patient is in
exactly half of them. Below 64 shadows one variance for all patients, as the paper does (section VI.B), here within patients.

The attacker has the model, records of the patients asked about, and patients like them for shadows; not the seed, so not the noise.

Legend: U units (patients, or records where the unit of privacy is a record), K shadow models, P patients.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from shared.attacks import MembershipAttack
from shared.cohort import SIMULATION_SPLIT_KEY, BoolArray, Cohort, held_out_patients
from shared.errors import ConfigurationError
from shared.models import Parameters, predict_in_batches, set_parameters
from shared.privacy import attack_power
from shared.seeding import derive, generator
from shared.study import Study
from shared.task import Task
from simulations.attacks.attacked_study import TrainedModel, Victim, train
from simulations.baselines import pool
from simulations.one_thread import one_thread

FloatArray = NDArray[np.float64]

FALSE_POSITIVE_RATES = (0.001, 0.01)
MOST_ROC_POINTS = 200
OWN_VARIANCE = 64  # shadows from which on every patient has variances of its own
LEAST_LOSS, LEAST_VARIANCE = 1e-12, 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Roc:
    """A receiver operating characteristic from (0, 0) to (1, 1), with its area and a 95 % interval of that."""

    false_positive_rate: FloatArray  # (T,)
    true_positive_rate: FloatArray  # (T,)
    auroc: float
    auroc_ci95: tuple[float, float] | None

    def true_positives_at(self, false_positive_rate: float) -> float:
        """The largest true positive rate at no more than this false positive rate."""
        return float(self.true_positive_rate[self.false_positive_rate <= false_positive_rate].max())

    def points(self, most: int = MOST_ROC_POINTS) -> list[tuple[float, float]]:
        """At most so many of its points, half of them close to the left, where logarithmic axes look."""
        last = len(self.false_positive_rate) - 1
        places = np.unique(
            np.concatenate([[0, last], np.geomspace(1, max(1, last), most // 2 - 1), np.linspace(0, last, most // 2 - 1)]).astype(np.int64)
        )
        return [(float(self.false_positive_rate[place]), float(self.true_positive_rate[place])) for place in places]


def attack_membership(study: Study, data: Path | None = None, *, seed: int = 0, num_shadows: int = 16) -> list[MembershipAttack]:
    """Both attacks on the study's final model, asked about all training patients (members) and test patients (others).

    Args:
        data: as of `simulate`; virtual sites alone.
        seed: of the halves and of the shadows' training; the attacked model keeps the study's own.
        num_shadows: even, at least 2.

    Raises:
        ConfigurationError: the number of shadows, a site of one patient, nobody to compare with, or real sites.
        WardroundError: what stopped the study.

    >>> [attack.method for attack in attack_membership(Study.load("studies/breast-cancer.toml"))]  # doctest: +SKIP
    ['loss', 'lira']
    """
    if num_shadows < 2 or num_shadows % 2:
        raise ConfigurationError(f"shadows: expected an even number of at least 2, got {num_shadows}", "for example 16")
    victim = Victim.of(study, data)
    cohorts = victim.federation.cohorts
    everybody, unit = pool(list(cohorts.values())), victim.study.privacy.unit
    members = _by_unit(np.concatenate([~held_out_patients(cohort, SIMULATION_SPLIT_KEY) for cohort in cohorts.values()]), everybody, unit)
    _check(victim, members)
    with one_thread():
        attacked = train(victim.setting(victim.study, cohorts))
        loss, confidence = answers_of(victim.task, attacked.parameters, everybody, unit)
        inside = shadow_halves([cohort.num_patients for cohort in cohorts.values()], num_shadows, seed)
        shadows = np.stack([_shadow_confidence(victim, half, number, seed, everybody) for number, half in enumerate(inside)])
    ratio = likelihood_ratio(confidence, shadows, np.stack([_by_unit(half, everybody, unit) for half in inside]))
    about = _About(seed=seed, attacked=attacked, members=members)
    return [_result("loss", -loss, 0, about), _result("lira", ratio, num_shadows, about)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What both results share."""

    seed: int
    attacked: TrainedModel
    members: BoolArray


def _result(method: Literal["loss", "lira"], scores: FloatArray, num_shadows: int, about: _About) -> MembershipAttack:
    members, roc = about.members, roc_of(scores[about.members], scores[~about.members])
    return MembershipAttack(
        method=method, seed=about.seed, members=int(members.sum()), non_members=int((~members).sum()),
        num_shadows=num_shadows, auroc=roc.auroc, auroc_ci95=roc.auroc_ci95,
        tpr_at_fpr={f"{rate:g}": roc.true_positives_at(rate) for rate in FALSE_POSITIVE_RATES},
        roc=roc.points(), epsilon_claimed=about.attacked.claim.epsilon if about.attacked.claim is not None else None,
        delta=about.attacked.claim.delta if about.attacked.claim is not None else None,
    )  # fmt: skip


def _check(victim: Victim, members: BoolArray) -> None:
    if members.all() or not members.any():
        raise ConfigurationError("membership: expected training and test patients to compare, got one kind only", "use more patients")
    for name, cohort in victim.federation.cohorts.items():
        if cohort.num_patients < 2:
            raise ConfigurationError(f"membership: site {name}: expected two patients, for halves, got {cohort.num_patients}", "use fewer sites")


def _by_unit(of_patient: BoolArray, cohort: Cohort, unit: str) -> BoolArray:
    """`(U,)`: what is known of patients `(P,)`, for each unit."""
    return of_patient[cohort.patient_of_record] if unit == "record" else of_patient


# Shadow models ------------------------------------------------------------------------------------------------------------------


def shadow_halves(sizes: Sequence[int], num_shadows: int, seed: int) -> list[BoolArray]:
    """For each shadow `(P,)`, who is trained on: half of every site, and the other half in the next shadow.

    Args:
        sizes: patients of each site, in the order of the P patients.
    """
    halves = []
    for pair in range(num_shadows // 2):
        chosen = []
        for place, size in enumerate(sizes):
            order = generator(seed, "membership", "half", pair, place).permutation(size)
            chosen.append(order < size // 2)
        first = np.concatenate(chosen)
        halves += [first, ~first]
    return halves


def _shadow_confidence(victim: Victim, inside: BoolArray, number: int, seed: int, everybody: Cohort) -> FloatArray:
    """`(U,)`: what a model trained on this half of the patients says of everybody."""
    study = victim.study.replace(seed=derive(seed, "membership", "shadow", number))
    cohorts = victim.federation.cohorts
    ends = np.cumsum([cohort.num_patients for cohort in cohorts.values()])[:-1]
    split = {
        name: replace(cohort, published_test=~part)  # the other half is this shadow's test patients
        for (name, cohort), part in zip(cohorts.items(), np.split(inside, ends), strict=True)
    }
    trained = train(victim.setting(study, split))
    return answers_of(victim.task, trained.parameters, everybody, study.privacy.unit)[1]


def answers_of(task: Task, parameters: Parameters, cohort: Cohort, unit: str) -> tuple[FloatArray, FloatArray]:
    """`(U,)` each: the loss, and the logit-scaled confidence, the mean over a patient's records where the unit is a patient.

    The confidence is p = exp(-loss), which for logistic loss and cross-entropy is the probability of the true label; in float64, for
    confident models differ in digits that float32 does not keep (the paper, section IV.C).
    """
    model = task.model()
    set_parameters(model, parameters)
    outputs = predict_in_batches(model.double(), tuple(_as_double(values) for values in cohort.inputs))
    with torch.no_grad():
        losses = task.loss(outputs, torch.from_numpy(_as_double(cohort.labels))).numpy().astype(np.float64)
    confidences = logit_confidence(losses)
    if unit == "record":
        return losses, confidences
    return _mean_by_patient(losses, cohort), _mean_by_patient(confidences, cohort)


def _as_double(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.astype(np.float64) if np.issubdtype(values.dtype, np.floating) else values


def _mean_by_patient(values: FloatArray, cohort: Cohort) -> FloatArray:
    return np.bincount(cohort.patient_of_record, values * cohort.record_weights(), cohort.num_patients).astype(np.float64)


def logit_confidence(losses: FloatArray) -> FloatArray:
    """log(p / (1 - p)) of p = exp(-loss), finite for any loss; a loss below 1e-12 counts as that.

    >>> logit_confidence(np.array([np.log(2.0)])).round(12)
    array([0.])
    """
    clipped = np.maximum(losses, LEAST_LOSS)
    return np.asarray(-clipped - np.log(-np.expm1(-clipped)))


def likelihood_ratio(observed: FloatArray, shadows: FloatArray, inside: BoolArray) -> FloatArray:
    """`(U,)`: log N(observed; in) - log N(observed; out), LiRA's score, with one variance for all units below `OWN_VARIANCE` shadows.

    Args:
        observed: `(U,)` confidences of the attacked model.
        shadows: `(K, U)` confidences of shadow models.
        inside: `(K, U)`, whether the shadow was trained on the unit; every unit is in some and out of some.
    """
    densities = []
    for mask in (inside, ~inside):
        count = mask.sum(axis=0)
        mean = np.where(mask, shadows, 0.0).sum(axis=0) / count
        squares = np.where(mask, (shadows - mean) ** 2, 0.0).sum(axis=0)
        own = squares / np.maximum(count - 1, 1)
        pooled = squares.sum() / max(int((count - 1).sum()), 1)
        variance = np.maximum(own if len(shadows) >= OWN_VARIANCE else np.full_like(own, pooled), LEAST_VARIANCE)
        densities.append(-0.5 * (np.log(variance) + (observed - mean) ** 2 / variance))
    return np.asarray(densities[0] - densities[1])


# What a score is worth ------------------------------------------------------------------------------------------------------------


def roc_of(members: FloatArray, others: FloatArray) -> Roc:
    """The curve of a score that is meant to be higher for members; a tie counts one half in the area (Mann-Whitney).

    The interval is DeLong, DeLong, Clarke-Pearson 1988; None with a single member or other.
    """
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    ordered_members, ordered_others = np.sort(members), np.sort(others)
    true_rate = (len(members) - np.searchsorted(ordered_members, thresholds, side="left")) / len(members)
    false_rate = (len(others) - np.searchsorted(ordered_others, thresholds, side="left")) / len(others)
    placed_members = _share_below(ordered_others, members)  # V10: of the others, how many a member outranks
    placed_others = 1 - _share_below(ordered_members, others)  # V01
    auroc = float(placed_members.mean())
    interval = None
    if min(len(members), len(others)) > 1:
        reach = float(-ndtri(0.025) * np.sqrt(placed_members.var(ddof=1) / len(members) + placed_others.var(ddof=1) / len(others)))
        interval = max(0.0, auroc - reach), min(1.0, auroc + reach)
    return Roc(
        false_positive_rate=np.concatenate([[0.0], false_rate]),
        true_positive_rate=np.concatenate([[0.0], true_rate]),
        auroc=auroc,
        auroc_ci95=interval,
    )


def _share_below(ordered: FloatArray, values: FloatArray) -> FloatArray:
    """For each value the share of `ordered` below it, where a tie counts one half."""
    return (np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")) / (2 * len(ordered))


def most_tpr(fpr: FloatArray | float, epsilon: float, delta: float) -> FloatArray:
    """`attack_power` at each of these false positive rates: what the promise leaves to any attacker.

    It is said of one patient, added or removed, whatever the others are; so it holds for rates over many patients whose membership is
    drawn independently, as by the keyed hash of a patient's id, on average over that draw.
    """
    power = np.vectorize(lambda rate: attack_power(epsilon, delta, rate), otypes=[np.float64])
    return np.asarray(power(np.asarray(fpr, dtype=np.float64)))


def roc_picture(attacks: Sequence[MembershipAttack]) -> bytes:
    """A PNG of the curves on logarithmic axes, as in the paper (figure 1), with chance and what each claim leaves to any attacker."""
    from matplotlib.figure import Figure  # half a second to import: only here

    left = min([1e-3, *(0.5 / attack.non_members for attack in attacks)])
    figure = Figure(figsize=(5.2, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rates = np.geomspace(left, 1, 300)
    axes.plot(rates, rates, color="#8a8f98", linestyle=":", label="chance")
    for epsilon, delta in sorted({(attack.epsilon_claimed, attack.delta or 0.0) for attack in attacks if attack.epsilon_claimed is not None}):
        axes.plot(rates, most_tpr(rates, epsilon, delta), color="#b3261e", linestyle="--", label=f"most at epsilon {epsilon:.2f}, delta {delta:g}")
    for attack in attacks:
        points = np.array(attack.roc)
        name = {"loss": "loss threshold", "lira": f"LiRA, {attack.num_shadows} shadows"}[attack.method]
        color = {"loss": "#b36b00", "lira": "#0b57d0"}[attack.method]
        label = f"{name}: AUROC {attack.auroc:.3f}" + ("" if attack.epsilon_claimed is not None else ", no privacy")
        axes.step(np.maximum(points[:, 0], left), np.maximum(points[:, 1], left / 10), where="post", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(left, 1.05), xlabel="false positive rate", ylabel="true positive rate")
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
