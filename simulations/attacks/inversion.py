"""Gradient inversion: patients' images rebuilt from one update, as the server sees it.

Geiping, Bauermeister, Droege, Moeller 2020, "Inverting Gradients - How easy is it to break privacy in federated learning?", equation 4: the
image whose gradient points most in the direction of the one observed, with little total variation,

    argmin_x  1 - <grad L(x, y), g> / (|grad L(x, y)| |g|)  +  alpha TV(x),

by Adam on the sign of its gradient, with the rate cut to a tenth after 3/8, 5/8 and 7/8 of the iterations, and x held in its declared range.
It follows Zhu, Liu, Han 2019, "Deep Leakage from Gradients", who match gradients in Euclidean distance. The label of a single record is read
off the gradient of the last bias, as in iDLG (Zhao, Mopuri, Bilen 2020); those of several are given to the attacker, as Geiping et al. do.

The update is that of the first round, made by the study's own local training in one step on exactly these records: the case in which least
hides a patient. With privacy the noise is that of the study's plan at the site. Of an update by SGD minus it is the gradient's direction; of
Adam's it is nearly its sign, and the attack is weaker than it could be.

Legend: N records, C channels, H x W pixels, S sites.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from torch import nn

from client.local_training import LocalRound
from client.local_update import local_update
from shared.attacks import InversionAttack
from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.models import Parameters, initial_parameters, set_parameters
from shared.plan import SitePlan, plan_site, shape_site
from shared.privacy import default_delta_of_sites
from shared.schema import TableSchema, TensorSchema
from shared.seeding import derive_key, generator
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.attacks.attacked_study import Victim, trained_part
from simulations.federation import declared_sizes
from simulations.one_thread import one_thread

Images = NDArray[np.float32]  # (N, C, H, W)
Picture = NDArray[np.float64]  # (H, W) or (H, W, 3), in [0, 1]
Protection = Literal["none", "dp", "secure aggregation"]

EPSILON = 3.0  # of the protected case, where the study promises nothing
ITERATIONS = 1000
STEP_SHARE = 0.02  # of the declared range: Adam's rate; the paper's 0.1 on a range of five standard deviations
TOTAL_VARIATION = 1e-6  # as the paper takes for small pictures; of a picture in [0, 1]
MOST_SITES = 8  # that are summed: more hide each other better, and take the attack longer
SSIM_SIGMA, SSIM_RADIUS, SSIM_C1, SSIM_C2 = 1.5, 5, 0.01**2, 0.03**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What an attacker tries to rebuild.

    Attributes:
        cohorts: of each site, the records of its one step; the first are compared.
        parameters: that the sites received.
        plans: of each site: its noise.
    """

    task: Task
    study: Study
    parameters: Parameters = field(repr=False)
    cohorts: tuple[Cohort, ...]
    plans: tuple[SitePlan, ...]


def invert_gradients(
    study: Study, data: Path | None = None, *, seed: int = 0, num_records: int = 1, iterations: int = ITERATIONS
) -> list[InversionAttack]:
    """The attack on one site's update without protection and with privacy, and on the sum of several sites' updates.

    PSNR and SSIM are means over the records, each matched to the reconstruction that is nearest; the peak is the range of the originals.
    Pictures are in the result for synthetic patients alone.

    Args:
        data: as of `simulate`; virtual sites alone.
        seed: draws site, records, first guess and noise.
        num_records: in the step, of as many patients.
        iterations: of the attacker's optimizer.

    Raises:
        ConfigurationError: the task's input is no image, a site has too few patients, or real sites.
    """
    if num_records < 1 or iterations < 1:
        raise ConfigurationError(f"inversion: expected at least one record and iteration, got {num_records} and {iterations}")
    schema = image_schema(resolve_task(study.task))
    victim = Victim.of(study, data)
    attacks: list[InversionAttack] = []
    with one_thread():
        for protection in ("none", "dp", "secure aggregation"):
            target = _target(victim, protection, seed, num_records)
            rebuilt = reconstruct(target, schema, iterations=iterations, seed=seed)
            attacks.append(_result(victim, protection, seed, np.asarray(target.cohorts[0].inputs[0]), rebuilt))
    return attacks


def image_schema(task: Task) -> TensorSchema:
    """The task's only input, an image (C, H, W).

    Raises:
        ConfigurationError: it has another, or several.
    """
    if isinstance(task.schema, TableSchema) or len(task.schema) != 1 or len(task.schema[0].shape) != 3:
        raise ConfigurationError(f"inversion: expected images (C, H, W) as the one input of task {task.name}, got other", "attack an imaging task")
    return task.schema[0]


# The update that is seen -------------------------------------------------------------------------------------------------------------


def _target(victim: Victim, protection: Protection, seed: int, num_records: int) -> Target:
    parts = {name: trained_part(cohort) for name, cohort in victim.federation.cohorts.items()}
    enough = sorted(name for name, part in parts.items() if part.num_patients >= num_records)
    if not enough or (protection == "secure aggregation" and len(enough) < 2):
        raise ConfigurationError(
            f"inversion: expected two sites of at least {num_records} training patients, got {len(enough)}", "ask for fewer records"
        )
    names = generator(seed, "inversion", "sites").permutation(np.array(enough)).tolist()
    names = names[:MOST_SITES] if protection == "secure aggregation" else names[:1]
    study = _one_step(victim.study, protection, num_records)
    sizes = dict(zip(parts, declared_sizes([part.num_patients for part in parts.values()]), strict=True))
    return Target(
        task=victim.task,
        study=study,
        parameters=initial_parameters(victim.task.model(), study.seed),
        cohorts=tuple(_one_record_each(parts[name], generator(seed, "inversion", "records", name), num_records) for name in names),
        plans=tuple(_plan(victim.study, study, sizes[name], list(sizes.values())) for name in names),
    )


def _one_step(study: Study, protection: Protection, num_records: int) -> Study:
    """The study with one step on so many records in a round, and the protection that is attacked."""
    one = study.replace(training={"local_steps": 1, "batch_size": num_records})
    if protection != "dp":
        return one.replace(privacy={"unit": "none"})
    return one if study.private else one.replace(privacy={"unit": "patient", "epsilon": EPSILON})


def _plan(study: Study, one_step: Study, size: int, sizes: list[int]) -> SitePlan:
    """One step in which every record is sampled, with the noise that the whole study needs at a site of this size."""
    shape = replace(shape_site(one_step, size), sample_rate=1.0, steps_per_round=1, expected_batch_size=float(one_step.training.batch_size))
    if not one_step.private:
        return shape
    private = study if study.private else study.replace(privacy={"unit": "patient", "epsilon": EPSILON, "delta": default_delta_of_sites(sizes)})
    whole = plan_site(private, size)
    return replace(shape, unit=whole.unit, noise_multiplier=whole.noise_multiplier, max_grad_norm=whole.max_grad_norm)


def _one_record_each(part: Cohort, rng: np.random.Generator, num_records: int) -> Cohort:
    """So many of the patients, each with the first record alone."""
    chosen = part.select(np.sort(rng.choice(part.num_patients, size=num_records, replace=False)))
    first = np.unique(chosen.patient_of_record, return_index=True)[1]
    return replace(
        chosen, inputs=tuple(values[first] for values in chosen.inputs), labels=chosen.labels[first], patient_of_record=np.arange(num_records)
    )


def seen_update(target: Target, seed: int) -> Parameters:
    """What the server sees: a site's update, or the mean over sites of which it learns no part."""
    total: Parameters = {}
    for number, (cohort, plan) in enumerate(zip(target.cohorts, target.plans, strict=True)):
        local = LocalRound(study=target.study, task=target.task, round_number=1)
        key = derive_key(seed, "inversion", "update", number)
        update, _ = local_update(target.task.model(), cohort, target.parameters, local, plan=plan, key=key, simulated=True)
        total = {name: total[name] + value / len(target.plans) if total else value / len(target.plans) for name, value in update.items()}
    return total


# The attack ---------------------------------------------------------------------------------------------------------------------------


def reconstruct(target: Target, schema: TensorSchema, *, iterations: int, seed: int) -> Images:
    """`(S x N, C, H, W)`: the attacker's guess of every record in the step."""
    model = target.task.model()
    set_parameters(model, target.parameters)
    model.eval()
    update = seen_update(target, seed)
    observed = [torch.from_numpy(-update[name]) for name, parameter in model.named_parameters() if parameter.requires_grad]
    labels = np.concatenate([cohort.labels for cohort in target.cohorts])
    if len(labels) == 1 and np.issubdtype(labels.dtype, np.integer):
        labels = np.array([recovered_label(observed)], dtype=labels.dtype)
    return match_gradients(model, target.task, observed, torch.from_numpy(labels), schema, iterations=iterations, seed=seed)


def recovered_label(gradient: Sequence[torch.Tensor]) -> int:
    """The label of a single record under softmax and cross-entropy, from the gradient of each parameter, the last layer's last.

    iDLG: the gradient of the logits is p - onehot(y), negative for the true class alone; the last bias has it as it is, and a last weight
    without bias times what came into the layer, which is positive after ReLU or a sigmoid.
    """
    last = gradient[-1]
    return int((last if last.ndim == 1 else last.sum(dim=tuple(range(1, last.ndim)))).argmin())


def match_gradients(
    model: nn.Module, task: Task, observed: Sequence[torch.Tensor], labels: torch.Tensor, schema: TensorSchema, *, iterations: int, seed: int
) -> Images:
    """The images of these labels whose gradient points most in the direction observed: equation 4, and section 5 for the optimizer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = generator(seed, "inversion", "guess").standard_normal((len(labels), *schema.shape)).astype(np.float32)
    middle, span = (schema.high + schema.low) / 2, schema.high - schema.low
    guess = (middle + torch.from_numpy(start) * span / 8).requires_grad_()
    best, least = guess.detach().clone(), float("inf")
    adam = SignedAdam(guess)
    for iteration in range(iterations):
        losses = task.loss(model(guess), labels)
        gradient = torch.autograd.grad(losses.mean(), trainable, create_graph=True, allow_unused=True)
        cost = cosine_distance(gradient, observed) + TOTAL_VARIATION * total_variation(guess / span)
        if float(cost.detach()) < least:
            best, least = guess.detach().clone(), float(cost.detach())
        [direction] = torch.autograd.grad(cost, [guess])
        decay = 0.1 ** sum(iteration >= share * iterations for share in (3 / 8, 5 / 8, 7 / 8))
        adam.step(direction, STEP_SHARE * span * decay)
        with torch.no_grad():
            guess.clamp_(schema.low, schema.high)
    return np.asarray(best.numpy())


class SignedAdam:
    """Adam (Kingma and Ba 2015) on the sign of the gradient, in place."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._first, self._second = torch.zeros_like(values), torch.zeros_like(values)
        self._steps = 0

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of this rate."""
        self._steps += 1
        sign = gradient.sign()
        self._first.mul_(0.9).add_(sign, alpha=0.1)
        self._second.mul_(0.999).addcmul_(sign, sign, value=0.001)
        first, second = self._first / (1 - 0.9**self._steps), self._second / (1 - 0.999**self._steps)
        self._values.sub_(rate * first / (second.sqrt() + 1e-8))


def cosine_distance(gradient: Sequence[torch.Tensor | None], observed: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 - cosine of the angle between both, over all parameters; a parameter that no image reaches counts as zero."""
    pairs = [(one, other) for one, other in zip(gradient, observed, strict=True) if one is not None]
    product = torch.stack([(one * other).sum() for one, other in pairs]).sum()
    square = torch.stack([one.square().sum() for one, _ in pairs]).sum()
    norm = torch.stack([other.square().sum() for other in observed]).sum().sqrt()
    return 1 - product / (square.sqrt() * norm).clamp_min(1e-12)


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels, down and across (anisotropic)."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


# How near it came ---------------------------------------------------------------------------------------------------------------------


def psnr(original: Picture, rebuilt: Picture) -> float:
    """Peak signal-to-noise ratio in dB, of pictures in [0, 1]; at most 100, for equal ones.

    >>> round(psnr(np.zeros((4, 4)), np.full((4, 4), 0.1)), 6)
    20.0
    """
    return -10 * math.log10(max(float(np.mean((original - rebuilt) ** 2)), 1e-10))


def ssim(original: Picture, rebuilt: Picture) -> float:
    """Structural similarity of pictures in [0, 1], in [-1, 1]; 1 for equal ones alone. Colours are compared one by one.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment", equation 13 and section III.C: a Gaussian window of 11 x 11 with standard
    deviation 1.5, K1 = 0.01, K2 = 0.03, the mean over all places where the window fits; over all, mirrored at the border, where it fits nowhere.
    """
    if original.ndim == 3:
        return float(np.mean([ssim(original[..., channel], rebuilt[..., channel]) for channel in range(original.shape[2])]))

    def smooth(values: Picture) -> Picture:
        return np.asarray(gaussian_filter(values, SSIM_SIGMA, radius=SSIM_RADIUS, mode="reflect"))

    mean_one, mean_other = smooth(original), smooth(rebuilt)
    variances = smooth(original**2) - mean_one**2 + smooth(rebuilt**2) - mean_other**2
    covariance = smooth(original * rebuilt) - mean_one * mean_other
    luminance = (2 * mean_one * mean_other + SSIM_C1) / (mean_one**2 + mean_other**2 + SSIM_C1)
    similar = luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    if min(original.shape) > 2 * SSIM_RADIUS:
        similar = similar[SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]
    return float(similar.mean())


def as_pictures(images: Images, low: float, high: float) -> list[Picture]:
    """`(N, C, H, W)` with [low, high] as [0, 1]: RGB of three channels, else grey, the mean over channels."""
    scaled = np.clip((images.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    return list(np.moveaxis(scaled, 1, -1) if images.shape[1] == 3 else scaled.mean(axis=1))


def _result(victim: Victim, protection: Protection, seed: int, originals: Images, rebuilt: Images) -> InversionAttack:
    low, high = float(originals.min()), float(originals.max())
    shown, guessed = as_pictures(originals, low, high), as_pictures(rebuilt, low, high)
    nearness = np.array([[psnr(one, other) for other in guessed] for one in shown])
    rows, columns = linear_sum_assignment(-nearness)
    matched = [guessed[column] for column in columns]
    synthetic = victim.federation.synthetic
    return InversionAttack(
        protection=protection, seed=seed, num_records=len(shown), psnr=float(nearness[rows, columns].mean()),
        ssim=float(np.mean([ssim(one, other) for one, other in zip(shown, matched, strict=True)])),
        originals=[picture.round(4).tolist() for picture in shown] if synthetic else None,
        reconstructions=[picture.round(4).tolist() for picture in matched] if synthetic else None,
    )  # fmt: skip


def inversion_picture(attacks: Sequence[InversionAttack]) -> bytes:
    """A PNG: a row for each protection, original and reconstruction side by side.

    Raises:
        ConfigurationError: there are no pictures, for the patients are real.
    """
    shown = [attack for attack in attacks if attack.originals and attack.reconstructions]
    if not shown:
        raise ConfigurationError("inversion: expected pictures, got none: they are kept of synthetic patients alone", "use a synthetic cohort")
    from matplotlib.figure import Figure  # half a second to import: only here

    columns = max(len(attack.originals or ()) for attack in shown)
    figure = Figure(figsize=(0.4 + 3.0 * columns, 1.9 * len(shown)), dpi=150, layout="constrained")
    grid = figure.subplots(len(shown), 2 * columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for row, attack in zip(grid, shown, strict=True):
        pairs = zip(attack.originals or (), attack.reconstructions or (), strict=True)
        for number, (original, rebuilt) in enumerate(pairs):
            for axes, picture, title in ((row[2 * number], original, "original"), (row[2 * number + 1], rebuilt, _title(attack))):
                axes.imshow(np.array(picture, dtype=np.float64), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(title, fontsize=7)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _title(attack: InversionAttack) -> str:
    protection = {"none": "no protection", "dp": "privacy", "secure aggregation": "sum over sites"}[attack.protection]
    return f"{protection}\n{attack.psnr:.1f} dB, SSIM {attack.ssim:.2f}"
