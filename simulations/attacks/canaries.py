"""The one-run canary audit: a study is run once with canaries in it, and who saw the updates guesses which of them were there.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run"; the bounds are in `simulations.attacks.one_run_bounds`. m canaries,
each in or out of the training patients of one site by a fair coin, take the study's own way: site, sampling, clipping, noise, ledger and messages
are those of a simulation, and nothing in them knows of canaries. Sample rate, noise and denominator are those that the site plans from the size
that it declares, without canaries; so the promise under test is the study's own. A score for each canary is read from what passes the
server: what it sent to that site and what came back, in every round (`CuriousGrid`).

Gradient canaries (Dirac canaries, Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning") are patients whose gradient is one
coordinate that nobody else touches, longer than the clipping norm; the noise on that coordinate is all that hides one, so what they find is
nearly all that a server with patients of its own choice could. The task is wrapped: the model has one more parameter for each canary, the inputs
one more column with a canary's number (0: an ordinary patient, whose gradient there is zero), and a canary's loss is its parameter, scaled.
Each canary has norm max_grad_norm after clipping, so the noise that protects it is the noise of every parameter.

Record canaries are patients of the task itself, synthetic and with the wrong label, told by how far their loss went down along the updates: what is
found of them is what a server that sees only updates finds of a conspicuous patient.

Not audited: statistics of evaluation, and whatever does not depend on one patient more or less in training.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from client.app import client_app
from client.site import Site
from server.app import server_app
from server.coordinator import Coordinator
from server.run_folder import RunFolder
from shared.attacks import CanaryAudit
from shared.cohort import SIMULATION_SPLIT_KEY, BoolArray, Cohort, held_out_patients
from shared.errors import ConfigurationError, DataError, ProtocolError
from shared.messages import PARAMETERS, from_array_record
from shared.models import Parameters, predict_in_batches, set_parameters
from shared.privacy import default_delta_of_sites
from shared.results import SitePrivacy
from shared.seeding import derive, generator
from shared.study import Study
from shared.task import Task
from simulations.attacks.one_run_bounds import CONFIDENCE, best_bounds
from simulations.federation import VirtualFederation, declared_sizes, virtual_sites
from simulations.in_process import RUN_ID, SERVER_NODE_ID, InProcessGrid
from simulations.one_thread import one_thread
from simulations.setting import Setting
from simulations.simulate import prepare
from simulations.site_files import site_files
from simulations.timed_grid import with_clock

CanaryKind = Literal["gradient", "record"]
Score = Callable[[Parameters, Parameters], NDArray[np.float64]]  # (sent to the site, its update) -> (m,), high where a canary seems to be in

FEWEST = 20  # canaries; with fewer not even all guesses right would say much
TABLE = "canaries.weight"
GRADIENT_NORM = 100.0  # of a canary before clipping, in max_grad_norm: were it not clipped, it would be seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Patients who may be put among those to train on, and what tells whether they are.

    Attributes:
        task: what the sites run: the study's own task, or that with a parameter for each canary.
        cohorts: the sites' ordinary patients, as that task takes them.
        candidates: the canaries, one record each.
        score: of each canary, from one round; scores add up over rounds.
    """

    task: Task
    cohorts: dict[str, Cohort]
    candidates: Cohort
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What one run with canaries came to: their scores `(m,)`, the site's claim (None where nothing is promised), the steps it took."""

    scores: NDArray[np.float64]
    privacy: SitePrivacy | None
    steps: int


def audit(study: Study, data: Path | None = None, *, canaries: int = 1000, kind: CanaryKind = "gradient", seed: int = 0) -> CanaryAudit:
    """What a server that sees the updates can tell of one patient, measured: lower bounds on epsilon, beside the epsilon that the run claims.

    The study is run once more, on the same virtual sites, with randomness of its own for each `seed`: the coins of the canaries, initial parameters,
    sampling and (seeded) noise. Attacked is the site with most training patients.

    Raises:
        ConfigurationError: too few canaries, or sites that are real: a hospital's ledger is charged for no canary.
        WardroundError: what stops any simulation.

    >>> audit(Study.load("studies/breast-cancer.toml")).exceeds  # doctest: +SKIP
    False
    """
    if canaries < FEWEST:
        raise ConfigurationError(f"--canaries: expected at least {FEWEST}, got {canaries}", "1000 is a good number")
    if site_files(data):
        raise ConfigurationError(
            "canaries: expected virtual sites, got site files: a hospital's ledger is charged for no canary", "give a cohort with --data"
        )
    setting = prepare(study, data)
    assert setting.federation is not None
    site = largest_site(setting)
    made = gradient_canaries(setting, canaries) if kind == "gradient" else record_canaries(setting, canaries, seed=seed)
    inside = generator(seed, "canaries that are in").random(canaries) < 0.5
    watched = run_with_canaries(replace(setting, study=audited_study(setting.study, seed)), made, inside, site=site)
    delta = setting.study.privacy.delta or default_delta_of_sites(declared_sizes([summary.num_train for summary in setting.summaries()]))
    bounds, claim = best_bounds(watched.scores, inside, delta=delta), watched.privacy
    return CanaryAudit(
        canary=kind, site=site, seed=seed, canaries=canaries, guesses=bounds.guessed.guesses, correct=bounds.guessed.correct, steps=watched.steps,
        noise_multiplier=None if claim is None else claim.noise_multiplier, sample_rate=None if claim is None else claim.sample_rate,
        delta=delta, confidence=CONFIDENCE, epsilon_lower=bounds.epsilon_lower, epsilon_lower_fdp=bounds.epsilon_lower_fdp,
        epsilon_claimed=None if claim is None else claim.epsilon,
    )  # fmt: skip


def audited_study(study: Study, seed: int) -> Study:
    """The study with the randomness of this audit, which must not be another audit's: the bounds are about all coins and all noise together."""
    return study.replace(seed=derive(seed, "canary audit", study.seed))


def largest_site(setting: Setting) -> str:
    """The site with most training patients, the first of several by name."""
    return min(setting.summaries(), key=lambda summary: (-summary.num_train, summary.name)).name


# Two kinds of canaries -------------------------------------------------------------------------------------------------------


class CanaryModel(nn.Module):
    """A task's model and a parameter for each canary. In training it gives (outputs, a canary's parameter, its number); in evaluation the outputs.

    Args:
        model: of the task; called with all inputs but the last, which is the number of a canary, `(N,)`, 0 for an ordinary patient.
    """

    def __init__(self, model: nn.Module, canaries: int) -> None:
        super().__init__()
        self.patients = model
        self.canaries = nn.Embedding(canaries, 1)
        self.canaries.reset_parameters = self._begin_at_zero  # type: ignore[method-assign]  # so that weight decay pulls at nothing

    def _begin_at_zero(self) -> None:
        nn.init.zeros_(self.canaries.weight)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *own, number = inputs
        outputs: torch.Tensor = self.patients(*own)
        if not self.training:
            return outputs
        return outputs, self.canaries((number - 1).clamp(min=0)).squeeze(1), number


def canary_task(task: Task, canaries: int, *, norm: float) -> Task:
    """The task with a parameter for each canary; the gradient of a canary's loss is `norm` there and zero everywhere else."""

    def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:  # a CanaryModel's
        own, parameter, number = outputs
        return torch.where(number > 0, norm * parameter, task.loss(own, labels))

    return replace(task, model=lambda: CanaryModel(task.model(), canaries), loss=loss)


def gradient_canaries(setting: Setting, canaries: int) -> Canaries:
    """Copies of a patient but for their number; the score is how far the canary's own parameter went down."""
    cohorts = _cohorts(setting)
    numbered = {name: numbered_cohort(cohort, np.zeros(cohort.num_records, dtype=np.int64)) for name, cohort in cohorts.items()}
    some = next(cohort for cohort in cohorts.values() if cohort.num_records)
    candidates = Cohort(
        inputs=tuple(np.repeat(values[:1], canaries, axis=0) for values in some.inputs),
        labels=np.repeat(some.labels[:1], canaries, axis=0),
        patient_of_record=np.arange(canaries),
        patient_ids=_names(canaries),
        synthetic=some.synthetic,
    )
    return Canaries(
        task=canary_task(setting.task, canaries, norm=GRADIENT_NORM * setting.study.privacy.max_grad_norm),
        cohorts=numbered,
        candidates=numbered_cohort(candidates, np.arange(1, canaries + 1)),
        score=lambda sent, update: -update[TABLE][:, 0].astype(np.float64),
    )


def numbered_cohort(cohort: Cohort, numbers: NDArray[np.int64]) -> Cohort:
    """The cohort with one more input: the number of a canary, of each record, `(N,)`."""
    return replace(cohort, inputs=(*cohort.inputs, numbers))


def record_canaries(setting: Setting, canaries: int, *, seed: int) -> Canaries:
    """Synthetic patients with the wrong label; the score is how much less the updated model loses on them than the one before.

    Raises:
        DataError: the task makes fewer synthetic patients than were asked for.
    """
    task = setting.task
    made = task.synthetic_cohort(canaries, derive(seed, "record canaries") % 2**31)
    if made.num_patients < canaries:
        raise DataError(f"task {task.name}: expected {canaries} synthetic patients, got {made.num_patients}", "use fewer canaries")
    first = np.unique(made.patient_of_record, return_index=True)[1][:canaries]
    candidates = Cohort(
        inputs=tuple(values[first] for values in made.inputs),
        labels=wrong_labels(made.labels[first]),
        patient_of_record=np.arange(canaries),
        patient_ids=_names(canaries),
        synthetic=True,
    )
    model = task.model()

    def losses(parameters: Parameters) -> NDArray[np.float64]:
        set_parameters(model, parameters)
        outputs = predict_in_batches(model, candidates.inputs)
        return np.asarray(task.loss(outputs, torch.from_numpy(candidates.labels)).detach().numpy(), dtype=np.float64)

    return Canaries(
        task=task,
        cohorts=_cohorts(setting),
        candidates=candidates,
        score=lambda sent, update: losses(sent) - losses({name: sent[name] + update[name] for name in sent}),
    )


def wrong_labels(labels: NDArray[np.generic]) -> NDArray[np.generic]:
    """Another label for each: half-way round the values that occur, or, where a label is an array, that of another patient."""
    if labels.ndim > 1:
        return np.roll(labels, len(labels) // 2, axis=0)
    values, index = np.unique(labels, return_inverse=True)
    return np.asarray(values[(index + max(1, len(values) // 2)) % len(values)])


def _cohorts(setting: Setting) -> dict[str, Cohort]:
    assert setting.federation is not None
    return setting.federation.cohorts


def _names(canaries: int) -> tuple[str, ...]:
    return tuple(f"canary {number}" for number in range(1, canaries + 1))


# The run, and who watches it ---------------------------------------------------------------------------------------------------


class CuriousGrid(InProcessGrid):
    """Carries messages as ever, and tells what went to one site with a round's task and which update came back.

    Args:
        watched: the site's name.
        tell: called with the parameters sent and the update.
    """

    def __init__(self, app: ClientApp, site_names: Iterable[str], *, watched: str, tell: Callable[[Parameters, Parameters], None]) -> None:
        super().__init__(app, site_names)
        self._watched = watched
        self._tell = tell

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """As of any grid."""
        asked = list(messages)
        for reply in super().send_and_receive(asked, timeout=timeout):
            if self._contexts[reply.metadata.src_node_id].node_config["site"] == self._watched and reply.has_content():
                [sent] = [message for message in asked if message.metadata.message_id == reply.metadata.reply_to_message_id]
                received, update = sent.content.get(PARAMETERS), reply.content.get(PARAMETERS)
                if isinstance(received, ArrayRecord) and isinstance(update, ArrayRecord):
                    self._tell(from_array_record(received), from_array_record(update))
            yield reply


def run_with_canaries(setting: Setting, canaries: Canaries, inside: BoolArray, *, site: str) -> Watched:
    """Run the study with the canaries that are `inside` (`(m,)`) among the training patients of `site`; its folder is gone afterwards.

    Raises:
        WardroundError: what stopped the run.
    """
    scores, steps = np.zeros(len(inside)), 0

    def tell(sent: Parameters, update: Parameters) -> None:
        nonlocal scores
        scores = scores + canaries.score(sent, update)

    def step() -> None:
        nonlocal steps
        steps += 1

    cohort = with_canaries(canaries.cohorts[site], canaries.candidates.select(inside))
    with tempfile.TemporaryDirectory(prefix="wardround-audit-") as place, contextlib.ExitStack() as closing, one_thread():
        folder = RunFolder.create(Path(place), setting.study)
        federation = VirtualFederation(cohorts=canaries.cohorts, synthetic=False, notes={})  # sizes, and so plans, are those without canaries
        sites = virtual_sites(federation, canaries.task, setting.study, folder.path / "ledgers")
        sites[site] = Site(sites[site].settings, canaries.task, lambda: cohort, still_wanted=step)
        for each in sites.values():
            closing.callback(each.close)
        coordinator = Coordinator(setting.study, canaries.task, folder)
        app = client_app(lambda context: sites[str(context.node_config["site"])])
        context = Context(run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config={})
        grid = CuriousGrid(app, sorted(sites), watched=site, tell=tell)
        server_app(coordinator)(with_clock(grid, setting.study, sorted(sites)), context)
    if not steps:
        raise ProtocolError(f"site {site}: expected updates to attack, got none: it was never selected", "use more rounds, or select all sites")
    return Watched(scores=scores, privacy=coordinator.history.privacy.get(site), steps=steps)


def with_canaries(cohort: Cohort, canaries: Cohort) -> Cohort:
    """The patients of a site, split as they were, and the canaries, all of them to be trained on.

    With cross-validation a canary is, as any patient, held out in one fold.
    """
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    return Cohort(
        inputs=tuple(np.concatenate(values) for values in zip(cohort.inputs, canaries.inputs, strict=True)),
        labels=np.concatenate([cohort.labels, canaries.labels]),
        patient_of_record=np.concatenate([cohort.patient_of_record, canaries.patient_of_record + cohort.num_patients]),
        patient_ids=(*cohort.patient_ids, *canaries.patient_ids),
        published_test=np.concatenate([test, np.zeros(canaries.num_patients, dtype=np.bool_)]),
        synthetic=cohort.synthetic and canaries.synthetic,
    )
