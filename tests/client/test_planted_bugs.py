"""Bugs that would cost privacy, planted on purpose: each is found by the canary audit or by a check of the mechanism, which honest code passes.

The bugs are patches of our own modules. A check looks at what a site sends or draws, from outside, and raises where it is not what the theorem
of `client.private_training` supposes. docs/attacks.md has the table of what finds what; `FOUND_BY` is that table.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import client.charging
import client.private_training
import client.sampling
from client.admission import SiteSettings
from client.ledger import Ledger
from client.noise import KeyedStream, NoiseGrid
from client.private_training import NoisedSum
from client.sampling import PatientIndex
from client.site import Site
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort
from shared.messages import EnrolTask, TrainTask
from shared.models import Parameters, initial_parameters, mlp
from shared.plan import SitePlan, plan_site
from shared.privacy import PrivacyEvent, epsilon_of
from shared.results import SitePrivacy
from shared.study import Study
from shared.task import Task
from simulations.attacks.canaries import audit

RARE = 1e-6  # how often a check of a distribution would alarm on honest code with fresh seeds
CLIP = 0.7
AUDITED = {
    "name": "audited",
    "task": "breast-cancer",
    "rounds": {"count": 2},
    "training": {"learning_rate": 0.5, "local_steps": 4, "batch_size": 397},
    "privacy": {"epsilon": 2.0, "delta": 1e-4},
    "federation": {"sites": 1, "partition": "iid"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Where a check makes its sites: a folder, a study, a task and its patients."""

    folder: Path
    study: Study
    task: Task
    cohort: Cohort

    def rounds(self, *, name: str = "north", task: Task | None = None, cohort: Cohort | None = None, study: Study | None = None) -> "Rounds":
        """All rounds of the study at one virtual site."""
        task, cohort, study = task or self.task, cohort or self.cohort, study or self.study
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        settings = SiteSettings(
            name=name, declared_size=cohort.num_patients, declared_num_patients=cohort.num_patients, declared_num_test=0,
            ledger_path=folder / "ledger.sqlite", releases_path=folder / "releases", split_key=SIMULATION_SPLIT_KEY,
        )  # fmt: skip
        taken = itertools.count()
        site = Site(settings, task, lambda: cohort, still_wanted=lambda: next(taken) and None)
        site.enrol(EnrolTask(run="run", study=study.to_table(), task_fingerprint=task.fingerprint()))
        parameters, updates, privacy = initial_parameters(task.model(), 3), [], []
        for number in range(1, study.rounds.count + 1):
            trained, update, _ = site.train(TrainTask(run="run", study_hash=study.fingerprint(), round=number, fold=1), parameters)
            assert trained.privacy is not None
            updates.append(update)
            privacy.append(trained.privacy)
        site.close()
        return Rounds(plan=plan_site(study, cohort.num_patients), updates=updates, privacy=privacy, steps=next(taken))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """What came of them: updates, what the site said it spent after each, and how many steps it really took."""

    plan: SitePlan
    updates: list[Parameters]
    privacy: list[SitePrivacy]
    steps: int

    def flat(self) -> np.ndarray:
        """The updates as rows, `(rounds, d)`, in units of one noised sum at learning rate 1: minus the sum of all its steps' sums."""
        rows = [np.concatenate([value.ravel() for value in update.values()]) for update in self.updates]
        return np.array(rows, dtype=np.float64) * self.plan.expected_batch_size


@pytest.fixture
def world(tmp_path: Path, task: Task, make_study: Callable[..., Study], make_patients: Callable[..., Cohort]) -> World:
    """40 patients, all in training; learning rate 1, so that an update is minus the sum of its steps' releases; 545 parameters in four tensors."""
    study = make_study(training={"learning_rate": 1.0, "local_steps": 3, "batch_size": 10}, privacy={"max_grad_norm": CLIP}, rounds={"count": 3})
    cohort = make_patients(40)
    cohort = dataclasses.replace(cohort, published_test=np.zeros(40, dtype=np.bool_))
    wide = dataclasses.replace(task, model=lambda: mlp(3, 1, hidden=(108,)))
    return World(folder=tmp_path, study=study, task=wide, cohort=cohort)


# Checks of the mechanism -----------------------------------------------------------------------------------------------------------


def without_gradients(task: Task) -> Task:
    """The task with a loss that nothing moves: what a site sends is its noise."""
    return dataclasses.replace(task, loss=lambda outputs, labels: 0 * task.loss(outputs, labels))


def check_noise_std(world: World) -> None:
    """The noise in every tensor of an update has the plan's standard deviation: chi-square over its entries and all rounds."""
    rounds = world.rounds(task=without_gradients(world.task))
    plan = rounds.plan
    assert plan.noise_multiplier is not None
    size = sum(value.size for value in rounds.updates[0].values())
    std = plan.noise_multiplier * NoiseGrid.of(CLIP, size).sensitivity * math.sqrt(plan.steps_per_round) / plan.expected_batch_size
    for name in rounds.updates[0]:
        values = np.concatenate([update[name].ravel() for update in rounds.updates]).astype(np.float64) / std
        tail = min(stats.chi2.cdf((values**2).sum(), values.size), stats.chi2.sf((values**2).sum(), values.size))
        assert tail > RARE, f"{name}: noise of {values.std():.3f} times what it should be"


def check_noise_unrelated(world: World) -> None:
    """No two of the updates of two sites in three rounds have correlated noise: within 6 / sqrt(d), 15 pairs."""
    task = without_gradients(world.task)
    rows = np.concatenate([world.rounds(name=name, task=task).flat() for name in ("north", "south")])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 6 / math.sqrt(rows.shape[1]), "two releases share their noise"


def check_sensitivity(world: World) -> None:
    """One patient more, with a gradient a thousand times the clipping norm, moves a noised sum by the clipping norm and no further."""
    study = world.study.replace(training={"local_steps": 1, "batch_size": 41}, rounds={"count": 1})
    louder = dataclasses.replace(world.task, loss=lambda outputs, labels: 1000 * world.task.loss(outputs, labels))
    more = dataclasses.replace(
        world.cohort, inputs=(np.concatenate([world.cohort.inputs[0], 3 * np.ones((1, 3), dtype=np.float32)]),),
        labels=np.append(world.cohort.labels, np.float32(0)), patient_of_record=np.append(world.cohort.patient_of_record, 40),
        patient_ids=(*world.cohort.patient_ids, "patient-40"), published_test=np.zeros(41, dtype=np.bool_),
    )  # fmt: skip
    fewer = dataclasses.replace(more, inputs=(np.where(np.arange(41)[:, None] == 40, np.nan, more.inputs[0]).astype(np.float32),))
    moved = world.rounds(task=louder, cohort=more, study=study).flat() - world.rounds(task=louder, cohort=fewer, study=study).flat()
    assert np.linalg.norm(moved) < 1.01 * CLIP, f"one patient moves the sum by {np.linalg.norm(moved) / CLIP:.1f} clipping norms"


def check_sampling(world: World) -> None:
    """Batches of a private round are Poisson samples: sizes binomial (mean and variance), and a patient's place in one says nothing of the next."""
    plan, index = plan_site(world.study, world.cohort.num_patients), PatientIndex(world.cohort)
    stream, count = KeyedStream(bytes(32)), 3000
    member = np.zeros((count, index.num_patients))
    for row in member:
        row[client.private_training.sample_units(world.cohort, index, plan, "one", stream)] = 1
    sizes, q, n = member.sum(axis=1), plan.sample_rate, index.num_patients
    variance = n * q * (1 - q)
    assert abs(sizes.mean() - n * q) < 5 * math.sqrt(variance / count), "the sample rate is another"
    tail = (sizes - n * q).var() * count / variance
    assert min(stats.chi2.cdf(tail, count), stats.chi2.sf(tail, count)) > RARE, "batch sizes are not binomial"
    following = ((member[:-1] - q) * (member[1:] - q)).mean(axis=0) / (q * (1 - q))
    assert np.abs(following).max() < 6 / math.sqrt(count), "a batch depends on the one before"


def check_ledger(world: World) -> None:
    """What a site says it spent is the cost of all the steps that it took, in every round so far."""
    rounds = world.rounds()
    plan = rounds.plan
    assert plan.noise_multiplier is not None and plan.delta is not None
    event = PrivacyEvent(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=rounds.steps)
    assert rounds.steps == plan.steps_per_round * plan.rounds
    assert rounds.privacy[-1].steps == rounds.steps, "the ledger has other steps than were taken"
    assert rounds.privacy[-1].epsilon >= epsilon_of([event], plan.delta) * (1 - 1e-6), "less is charged than was spent"


def check_audit(world: World, **changes: object) -> None:
    """The canary audit finds no more than is claimed."""
    found = audit(Study.from_table(AUDITED).replace(**changes), canaries=1000, seed=1)
    assert not found.exceeds, f"found {found.epsilon_lower_fdp:.2f}, claimed {found.epsilon_claimed:.2f}"


RARELY = {"rounds": {"count": 2}, "training": {"local_steps": 20, "batch_size": 20}}  # 40 steps at q = 0.05
CHECKS: dict[str, Callable[[World], None]] = {
    "noise": check_noise_std,
    "correlation": check_noise_unrelated,
    "sensitivity": check_sensitivity,
    "sampler": check_sampling,
    "ledger": check_ledger,
    "audit": check_audit,
    "audit at q = 0.05": functools.partial(check_audit, **RARELY),
}


# The bugs --------------------------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def weaker_noise(patch: Patch, *, by: float) -> None:
    release = NoiseGrid.release
    patch.setattr(NoiseGrid, "release", lambda grid, total, noise, multiplier: release(grid, total, noise, multiplier / by))


def layer_without_noise(patch: Patch) -> None:
    release = NoisedSum.release

    def forgetful(total: NoisedSum) -> None:
        release(total)
        first = total._parameters[0]
        first.grad = (total._parts[0] / total.expected_batch_size).to(first.dtype)

    patch.setattr(NoisedSum, "release", forgetful)


def never_clipped(patch: Patch) -> None:
    begin = NoisedSum.__init__

    def unclipped(total: NoisedSum, *args: object, **kwargs: object) -> None:
        begin(total, *args, **kwargs)  # type: ignore[arg-type]
        total._max_grad_norm = 1e30

    patch.setattr(NoisedSum, "__init__", unclipped)


def clipped_after_averaging(patch: Patch) -> None:
    never_clipped(patch)
    begin, release = NoisedSum.__init__, NoisedSum.release
    norms: dict[int, float] = {}

    def remembering(total: NoisedSum, *args: object, plan: SitePlan, **kwargs: object) -> None:
        begin(total, *args, plan=plan, **kwargs)  # type: ignore[arg-type]
        norms[id(total)] = plan.max_grad_norm or 0.0

    def late(total: NoisedSum) -> None:
        mean = float(torch.linalg.vector_norm(total.values)) / total.expected_batch_size
        total.values.mul_(min(1.0, norms[id(total)] / mean) if mean else 1.0)
        release(total)

    patch.setattr(NoisedSum, "__init__", remembering)
    patch.setattr(NoisedSum, "release", late)


def full_batch(patch: Patch) -> None:
    patch.setattr(client.sampling, "poisson_sample", lambda num_units, sample_rate, stream: np.arange(num_units))


def shuffled(patch: Patch) -> None:
    waiting: list[int] = []
    streams: list[KeyedStream] = []

    def next_batch(num_units: int, sample_rate: float, stream: KeyedStream) -> np.ndarray:
        if stream not in streams:  # another round
            waiting.clear()
            streams.append(stream)
        batch = []
        for _ in range(round(sample_rate * num_units)):
            if not waiting:
                waiting.extend(np.argsort(stream.uniforms(num_units)).tolist())
            batch.append(waiting.pop())
        return np.unique(batch)

    patch.setattr(client.sampling, "poisson_sample", next_batch)


def one_seed_for_sites(patch: Patch) -> None:
    key = client.charging.release_key
    patch.setattr(client.charging, "release_key", lambda seed, account, site, fold, number: key(seed, account, "any", fold, number))


def one_seed_for_rounds(patch: Patch) -> None:
    key = client.charging.release_key
    patch.setattr(client.charging, "release_key", lambda seed, account, site, fold, number: key(seed, account, site, fold, 1))


def accountant_reset(patch: Patch) -> None:
    taken: dict[int, tuple[Ledger, int]] = {}  # each ledger is kept, so that none later has its id
    steps = Ledger.steps

    def since_last_round(ledger: Ledger, run: str) -> int:
        total = steps(ledger, run)
        _, before = taken.get(id(ledger), (ledger, 0))
        taken[id(ledger)] = ledger, total
        return total - before

    patch.setattr(Ledger, "steps", since_last_round)


BUGS: dict[str, Callable[[Patch], None]] = {
    "noise / 4": functools.partial(weaker_noise, by=4),
    "noise / 2": functools.partial(weaker_noise, by=2),
    "noise forgotten on one layer": layer_without_noise,
    "no clipping": never_clipped,
    "clipping after averaging": clipped_after_averaging,
    "full batch claimed as q = 0.05": full_batch,
    "shuffling accounted as Poisson": shuffled,
    "one noise seed at two sites": one_seed_for_sites,
    "one noise seed in two rounds": one_seed_for_rounds,
    "accountant reset each round": accountant_reset,
}
AUDITS = {"audit", "audit at q = 0.05"}
FOUND_BY = {  # beside these an audit may find more, by luck, and is not asked
    "noise / 4": {"noise", "audit"},
    "noise / 2": {"noise"},
    "noise forgotten on one layer": {"noise"},
    "no clipping": {"sensitivity", "audit", "audit at q = 0.05"},
    "clipping after averaging": {"sensitivity", "audit"},
    "full batch claimed as q = 0.05": {"sampler", "audit at q = 0.05"},
    "shuffling accounted as Poisson": {"sampler"},
    "one noise seed at two sites": {"correlation"},
    "one noise seed in two rounds": {"correlation"},
    "accountant reset each round": {"ledger", "audit"},
}


@pytest.mark.parametrize("check", CHECKS)
def test_honest_code_passes(check: str, world: World) -> None:
    CHECKS[check](world)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_is_found(bug: str, world: World, monkeypatch: Patch) -> None:
    BUGS[bug](monkeypatch)
    found = set()
    for name, check in CHECKS.items():
        if name in AUDITS - FOUND_BY[bug]:
            continue
        try:
            check(world)
        except AssertionError:
            found.add(name)
    assert found == FOUND_BY[bug]


def test_the_documents_say_so() -> None:
    """The table of docs/attacks.md has a row for every bug, with these checks and no others."""
    lines = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    table = {row[0]: set(row[1].split(", ")) for row in rows if row[0] in BUGS}
    assert table == FOUND_BY
