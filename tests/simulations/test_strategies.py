"""Every strategy with a part at the sites: whole runs beside its paper's algorithm written out in float64, with full batches and no privacy; then the
same with privacy, interruption and bad replies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import client.local_update
import client.strategies.apfl
import simulations.in_process
from client.kept_state import KeptState
from client.ledger import reading
from client.local_training import LocalRound
from client.private_probe import probe_model
from server.run_folder import read_tensors
from server.strategies.answers import Member
from server.strategies.q_fedavg import FairMean, noise_energy
from server.strategies.strategy import FederatedStrategy
from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, ModelMismatchError, StorageError
from shared.metrics import finish_metrics
from shared.models import initial_parameters, set_parameters
from shared.personal import personal_names
from shared.plan import plan_site
from shared.results import RoundRecord
from shared.seeding import derive_key
from shared.study import Study
from shared.task import architecture_hash, resolve_task
from simulations.simulate import prepare, start_run
from wardround.trained import read_trained

Arrays = dict[str, np.ndarray]
ROUNDS, STEPS, RATE = 4, 3, 0.5
STATEFUL = ("scaffold", "feddyn", "fedper", "fedrep", "ditto", "apfl")
ALL = (*STATEFUL, "q-fedavg", "fednova", "fine-tuning", "cyclic")


class Papers:
    """What the algorithms need of the sites: gradients over all of a site's training patients, in float64."""

    def __init__(self, study: Study) -> None:
        setting = prepare(study, None)
        assert setting.federation is not None
        self.study, self.task = setting.study, setting.task
        self.parts = {name: cohort.select(~held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for name, cohort in setting.federation.cohorts.items()}
        self.tests = {name: cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for name, cohort in setting.federation.cohorts.items()}
        self.model = self.task.model().double()
        self.start = {name: value.astype(np.float64) for name, value in initial_parameters(self.task.model(), study.seed).items()}

    def loss(self, site: str, at: Arrays) -> tuple[float, Arrays]:
        """The mean loss and its gradient."""
        set_parameters(self.model, at)
        self.model.zero_grad()
        part = self.parts[site]
        loss = self.task.loss(self.model(*(torch.from_numpy(v).double() for v in part.inputs)), torch.from_numpy(part.labels).double()).mean()
        loss.backward()
        return loss.item(), {name: parameter.grad.numpy().copy() for name, parameter in self.model.named_parameters()}

    def descend(self, site: str, at: Arrays, *, steps: int = STEPS, add: Callable[[Arrays], Arrays] | None = None, only=None) -> Arrays:
        """`steps` of gradient descent, with what `add` gives of the current point added to the gradient."""
        for _ in range(steps):
            gradient, extra = self.loss(site, at)[1], {} if add is None else add(at)
            at = {n: v - RATE * (gradient[n] + extra.get(n, 0.0)) if only is None or n in only else v for n, v in at.items()}
        return at

    @property
    def sizes(self) -> dict[str, int]:
        return {name: part.num_patients for name, part in self.parts.items()}

    def mean(self, values: dict[str, Arrays], weights: dict[str, float] | None = None) -> Arrays:
        weights = weights or dict.fromkeys(values, 1.0)
        total = sum(weights[site] for site in values)
        return {n: sum(weights[site] * value[n] for site, value in values.items()) / total for n in self.start}

    def judged(self, site: str, at: Arrays) -> dict[str, float | None]:
        """The metrics of these parameters on a site's test patients."""
        model = self.task.model()
        set_parameters(model, {name: value.astype(np.float32) for name, value in at.items()})
        with torch.no_grad():
            outputs = model.eval()(*(torch.from_numpy(values) for values in self.tests[site].inputs))
        predictions = self.task.predict(outputs).numpy().astype(np.float64)
        return finish_metrics(self.task.metrics, {m.statistic.name: m.statistic.summarise(predictions, self.tests[site]) for m in self.task.metrics})


def combine(**terms: tuple[float, Arrays]) -> Arrays:
    [first, *_] = terms.values()
    return {name: sum(factor * arrays[name] for factor, arrays in terms.values()) for name in first[1]}


def plain_study(runner, **strategy: object) -> Study:
    return runner.study(
        privacy={"unit": "none"}, rounds={"count": ROUNDS}, strategy=strategy,
        training={"learning_rate": RATE, "batch_size": 10_000, "local_steps": STEPS},
        federation={"sites": 4, "alpha": 0.3},
    )  # fmt: skip


def kept_at(run, site: str, fold: int = 1) -> dict[str, Arrays]:
    """What a site kept after the last round."""
    state = KeptState(run.folder.path / "ledgers" / f"{site}.releases", run.folder.name)
    return {group: dict(arrays) for group, arrays in state.before(fold, 10**6).items()}


def final(run) -> Arrays:
    return run.folder.read_model("final", architecture_hash(resolve_task(run.folder.study.task).model()))


def assert_close(found: Arrays, expected: Arrays) -> None:
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


# Each beside its paper ---------------------------------------------------------------------------------------------------------------


def test_scaffold_is_algorithm_1_with_option_ii(runner) -> None:
    study = plain_study(runner, name="scaffold", server_learning_rate=0.8)
    papers, run = Papers(study), runner.run(study)
    x, zero = papers.start, combine(a=(0.0, papers.start))
    c, own = zero, dict.fromkeys(papers.parts, zero)
    for _ in range(ROUNDS):
        drift = {site: combine(c=(1, c), own=(-1, own[site])) for site in own}
        y = {site: papers.descend(site, x, add=lambda at, added=drift[site]: added) for site in own}
        after = {site: combine(own=(1, own[site]), c=(-1, c), x=(1 / (STEPS * RATE), x), y=(-1 / (STEPS * RATE), y[site])) for site in own}
        c = combine(c=(1, c), new=(1, papers.mean(after)), old=(-1, papers.mean(own)))
        x, own = combine(x=(1 - 0.8, x), y=(0.8, papers.mean(y))), after
    assert_close(final(run), x)
    for site in own:
        assert_close(kept_at(run, site)["control"], own[site])


def test_feddyn_is_algorithm_1(runner) -> None:
    study, alpha = plain_study(runner, name="feddyn", alpha=0.2), 0.2
    papers, run = Papers(study), runner.run(study)
    theta, zero = papers.start, combine(a=(0.0, papers.start))
    h, own = zero, dict.fromkeys(papers.parts, zero)
    for _ in range(ROUNDS):
        local = {
            site: papers.descend(site, theta, add=lambda at, g=own[site], theta=theta: combine(g=(-1, g), at=(alpha, at), t=(-alpha, theta)))
            for site in own
        }
        own = {site: combine(g=(1, own[site]), y=(-alpha, local[site]), t=(alpha, theta)) for site in own}
        h = combine(h=(1, h), y=(-alpha, papers.mean(local)), t=(alpha, theta))
        theta = combine(y=(1, papers.mean(local)), h=(-1 / alpha, h))
    assert_close(final(run), theta)
    for site in own:
        assert_close(kept_at(run, site)["gradient"], own[site])


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_fedper_and_fedrep_share_the_body_alone(runner, name: str) -> None:
    study = plain_study(runner, name=name)
    papers, run = Papers(study), runner.run(study)
    head = personal_names(study.strategy, papers.task.model())
    assert head and set(papers.start) - head
    body, heads = papers.start, dict.fromkeys(papers.parts, papers.start)
    for _ in range(ROUNDS):
        whole = {site: {n: heads[site][n] if n in head else v for n, v in body.items()} for site in heads}
        if name == "fedper":
            whole = {site: papers.descend(site, at) for site, at in whole.items()}
        else:
            first = {site: papers.descend(site, at, steps=2, only=head) for site, at in whole.items()}  # half of 3 steps, to the even number
            whole = {site: papers.descend(site, at, steps=1, only=set(body) - head) for site, at in first.items()}
        heads, body = whole, papers.mean(whole, papers.sizes)
    found = final(run)
    assert_close({n: found[n] for n in found if n not in head}, body)
    assert all(np.array_equal(found[n], papers.start[n].astype(np.float32)) for n in head), "the head in the file is the untrained one"
    for site in heads:
        assert_close(kept_at(run, site)["personal"], {n: heads[site][n] for n in head})
        judged = papers.judged(site, {n: heads[site][n] if n in head else v for n, v in body.items()})
        assert run.result.per_site[site]["auroc"] == pytest.approx(judged["auroc"], abs=1e-9)


def test_ditto_is_algorithm_1(runner) -> None:
    study, pull = plain_study(runner, name="ditto", proximal_lambda=0.4), 0.4
    papers, run = Papers(study), runner.run(study)
    w, own = papers.start, dict.fromkeys(papers.parts, papers.start)
    for _ in range(ROUNDS):
        own = {site: papers.descend(site, own[site], add=lambda at, w=w: combine(at=(pull, at), w=(-pull, w))) for site in own}
        w = papers.mean({site: papers.descend(site, w) for site in own}, papers.sizes)
    assert_close(final(run), w)
    for site in own:
        assert_close(kept_at(run, site)["personal"], own[site])
        assert run.result.per_site[site]["auroc"] == pytest.approx(papers.judged(site, own[site])["auroc"], abs=1e-9)


@pytest.mark.parametrize("adaptive", [True, False])
def test_apfl_is_algorithm_1(runner, adaptive: bool) -> None:
    study = plain_study(runner, name="apfl", alpha=0.6, adaptive_alpha=adaptive)
    papers, run = Papers(study), runner.run(study)
    w, own, alphas = papers.start, dict.fromkeys(papers.parts, papers.start), dict.fromkeys(papers.parts, 0.6)
    for _ in range(ROUNDS):
        shared = {}
        for site in own:
            x, v, a, slope = w, own[site], alphas[site], 0.0
            for _ in range(STEPS):
                mixture = combine(v=(a, v), x=(1 - a, x))
                gradient, of_shared = papers.loss(site, mixture)[1], papers.loss(site, x)[1]
                slope += sum(float(np.vdot(v[n] - x[n], gradient[n])) for n in v)
                v, x = combine(v=(1, v), g=(-RATE * a, gradient)), combine(x=(1, x), g=(-RATE, of_shared))
            shared[site], own[site] = x, v
            alphas[site] = min(1.0, max(0.0, a - RATE * slope)) if adaptive else a
        w = papers.mean(shared, papers.sizes)
    assert_close(final(run), w)
    for site in own:
        assert_close(kept_at(run, site)["personal"], own[site])
        assert kept_at(run, site)["mixture"]["alpha"][0] == pytest.approx(alphas[site], abs=1e-4)
    assert adaptive == (len({round(a, 6) for a in alphas.values()}) > 1)


@pytest.mark.slow
def test_fine_tuning_trains_the_final_model_for_each_site(runner) -> None:
    study = plain_study(runner, name="fine-tuning", fine_tuning_epochs=2)
    papers, run, shared = Papers(study), runner.run(study), runner.run(plain_study(runner, name="fedavg"))
    assert_close(final(run), final(shared))
    for site in papers.parts:
        tuned = papers.descend(site, {n: v.astype(np.float64) for n, v in final(run).items()}, steps=2)  # an epoch is one full batch
        assert run.result.per_site[site]["auroc"] == pytest.approx(papers.judged(site, tuned)["auroc"], abs=1e-9)
        assert run.result.per_site[site]["brier"] == pytest.approx(papers.judged(site, tuned)["brier"], abs=1e-4)


def test_a_site_that_lies_about_its_loss_counts_for_no_more_than_the_largest() -> None:
    options = Study.from_table(
        {"name": "s", "task": "t", "privacy": {"unit": "none"}, "strategy": {"name": "q-fedavg", "q": 2, "max_loss": 3}}
    ).strategy

    def mean(loss: float) -> np.ndarray:
        fair = FairMean(options, learning_rate=RATE, losses={"a": 1.0, "b": loss})
        fair.add({"w": np.float32([1.0])}, 5, site="a")
        fair.add({"w": np.float32([-1.0])}, 5, site="b")
        return fair.take_mean()["w"]

    assert mean(1e9) == mean(3.0) != mean(2.0)


@pytest.mark.slow
def test_the_noise_of_an_update_is_what_is_taken_off(runner) -> None:
    """Of 30 draws of 481 entries the mean square is off by a fifth less than once in a million; the gradient's own part is far smaller."""
    study = runner.study(strategy={"name": "q-fedavg"}, training={"local_steps": 3}, privacy={"epsilon": 0.3})
    papers = Papers(study)
    site, size = min(papers.sizes.items(), key=lambda item: item[1])
    plan, start = plan_site(study, size), initial_parameters(papers.task.model(), study.seed)
    local, squares = LocalRound(study=study, task=papers.task, round_number=1), []
    for draw in range(30):
        key = derive_key(study.seed, "draw", draw)
        update, _ = client.local_update.local_update(papers.task.model(), papers.parts[site], start, local, plan=plan, key=key, simulated=True)
        squares.append(sum(float(np.square(value, dtype=np.float64).sum()) for value in update.values()) / RATE**2)
    expected = noise_energy(study, plan, sum(value.size for value in start.values()))
    assert 0.8 < np.mean(squares) / expected < 1.3


@pytest.mark.slow
def test_q_fedavg_learns_under_privacy(runner) -> None:
    study = runner.study(
        strategy={"name": "q-fedavg"}, training={"local_steps": 5}, rounds={"count": 15}, federation={"sites": 8, "partition": "iid"}
    )
    assert runner.run(study).result.metrics["federated"]["auroc"] > 0.95


@pytest.mark.parametrize("q", [0.0, 1.0, 2.5])
def test_q_fedavg_is_algorithm_2(runner, q: float) -> None:
    study = plain_study(runner, name="q-fedavg", q=q)
    papers, run = Papers(study), runner.run(study)
    w, lipschitz = papers.start, 1 / RATE
    for _ in range(ROUNDS):
        moved, steepness = combine(w=(0.0, w)), 0.0
        for site, size in papers.sizes.items():
            loss, _ = papers.loss(site, w)
            gone = combine(w=(lipschitz, w), y=(-lipschitz, papers.descend(site, w)))
            moved = combine(m=(1, moved), d=(size * loss**q, gone))
            steepness += size * (q * loss ** (q - 1) * sum(float((v**2).sum()) for v in gone.values()) + lipschitz * loss**q)
        w = combine(w=(1, w), m=(-1 / steepness, moved))
    assert_close(final(run), w)
    if q == 0:
        assert_close(final(run), final(runner.run(plain_study(runner, name="fedavg"))))


@pytest.mark.slow
def test_fednova_counts_by_the_step_and_equals_fedavg_for_equal_steps(runner) -> None:
    assert_close(final(runner.run(plain_study(runner, name="fednova"))), final(runner.run(plain_study(runner, name="fedavg"))))
    study = plain_study(runner, name="fednova").replace(training={"local_epochs": 2, "batch_size": 40})
    papers = Papers(study)
    steps = {site: plan_site(study, size).shared_steps for site, size in papers.sizes.items()}
    assert len(set(steps.values())) > 1
    runs = [runner.run(study.replace(rounds={"count": 1}), execution=execution) for execution in ("sequential", "blocks")]
    assert_close(final(runs[0]), final(runs[1]))
    alone = {}
    for site in papers.parts:  # a site's update, from a run of plain averaging with every other weight as it is
        alone[site] = site_update(study.replace(strategy={"name": "fedavg"}, rounds={"count": 1}), site)
    share = {site: size / sum(papers.sizes.values()) for site, size in papers.sizes.items()}
    effective = sum(share[site] * steps[site] for site in steps)
    moved = {n: effective * sum(share[site] * alone[site][n] / steps[site] for site in steps) for n in papers.start}
    assert_close(final(runs[0]), combine(x=(1, papers.start), d=(1, moved)))


def site_update(study: Study, site: str) -> Arrays:
    """What a site sends in the first round of a study without privacy, in a simulation."""
    papers = Papers(study)
    local, plan = LocalRound(study=papers.study, task=papers.task, round_number=1), plan_site(papers.study, papers.sizes[site])
    received, key = initial_parameters(papers.task.model(), study.seed), derive_key(study.seed, "training", site, 1, 1)
    return client.local_update.local_update(papers.task.model(), papers.parts[site], received, local, plan=plan, key=key, simulated=True)[0]


def test_cyclic_goes_from_site_to_site(runner) -> None:
    study = plain_study(runner, name="cyclic").replace(rounds={"count": 2})
    papers, run = Papers(study), runner.run(study)
    w = papers.start
    for number in (1, 2):
        turns = turns_of(study, papers, number)
        assert sorted(turns) == sorted(papers.parts)
        for site in turns:
            w = papers.descend(site, w)
    assert_close(final(run), w)
    assert turns_of(study, papers, 1) != turns_of(study, papers, 2)


def turns_of(study: Study, papers: Papers, number: int = 1) -> list[str]:
    """In which order the sites train in a round."""
    strategy = FederatedStrategy(study.strategy, seed=study.seed, trainable=frozenset(), statistics={})
    strategy.set_members(Member(name=name, node_id=place, weight=1) for place, name in enumerate(papers.parts))
    return strategy.turns(number)


# Under skew --------------------------------------------------------------------------------------------------------------------------


def loss_of(run) -> float:
    """The mean over all training patients of the final model's loss."""
    papers = Papers(run.folder.study)
    at = {name: value.astype(np.float64) for name, value in final(run).items()}
    return sum(size * papers.loss(site, at)[0] for site, size in papers.sizes.items()) / sum(papers.sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_corrected_sites_reach_a_lower_loss_than_averaged_ones_under_skew(runner, name: str) -> None:
    """With many local steps on very different patients, sites drift apart; after the same rounds the corrected model is nearer the optimum."""
    skewed = {
        "training": {"local_steps": 20, "learning_rate": 1.0, "batch_size": 10_000},
        "federation": {"sites": 6, "alpha": 0.05},
        "rounds": {"count": 8},
    }
    options = {"scaffold": {}, "feddyn": {"alpha": 0.05}}[name]
    study = runner.study(privacy={"unit": "none"}, strategy={"name": name, **options}, **skewed)
    averaged = runner.run(study.replace(strategy={"name": "fedavg", "weights": "equal"}))
    assert loss_of(runner.run(study)) < 0.9 * loss_of(averaged)


# With privacy ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_step_is_charged_whichever_model_it_trains(runner, name: str) -> None:
    study = runner.study(strategy={"name": name}, training={"local_steps": 4} if name != "fine-tuning" else {})
    run = runner.run(study)
    plain = plan_site(run.folder.study.replace(strategy={"name": "fedavg"}), 100)
    plan = plan_site(run.folder.study, 100)
    extra = {"ditto": 4, "apfl": 4, "q-fedavg": 1}.get(name, 0)
    assert plan.steps_per_round == plain.steps_per_round + extra
    assert plan.planned_steps == plan.steps_per_round * 2 + (plan.closing_steps if name == "fine-tuning" else 0)
    if plan.planned_steps > plain.planned_steps:
        assert plan.noise_multiplier > plain.noise_multiplier, "more steps under the same budget need more noise"
    for site, spent in run.result.privacy.sites.items():
        own = plan_site(run.folder.study, next(found.declared_size for found in run.claim.sites.values() if found.steps == spent.steps))
        assert spent.steps == own.planned_steps and 2.9 < spent.epsilon <= 3.0
        with reading(run.folder.path / "ledgers" / f"{site}.sqlite") as ledger:
            charges = ledger.charges()
        assert sum(charge.event.steps for charge in charges) == own.planned_steps and all(charge.committed for charge in charges)
    for found in final(run).values():
        assert np.isfinite(found).all()


@pytest.mark.slow
def test_the_claim_names_what_else_was_released(runner) -> None:
    told = {
        name: " ".join(runner.run(runner.study(strategy={"name": name}, rounds={"count": 1})).claim.covered)
        for name in ("ditto", "q-fedavg", "fedavg")
    }
    assert "the models that each site keeps for itself" in told["ditto"]
    assert "a noised sum of losses" in told["q-fedavg"]
    assert "keeps" not in told["fedavg"] and "loss" not in told["fedavg"]


# What stays, stays -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_nothing_personal_crosses_the_wire(runner, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real, seen = simulations.in_process.InProcessGrid._answer, list[set[str]]()

    def watched(self, message):
        reply = real(self, message)
        for record in (message.content, reply.content):
            if "parameters" in record:
                seen.append(set(record["parameters"]))
        return reply

    monkeypatch.setattr(simulations.in_process.InProcessGrid, "_answer", watched)
    study = runner.study(strategy={"name": name}, training={"local_steps": 2})
    run = runner.run(study)
    task = resolve_task(study.task)
    personal = personal_names(study.strategy, task.model())
    assert len(seen) > 10 and all(not names & personal for names in seen)
    header, _ = read_tensors(run.folder.path / "model" / "final.safetensors")
    assert set(str(header["personal"]).split("\n")) == personal
    with pytest.raises(ModelMismatchError, match="stayed at the sites"):
        read_trained(run.folder.path)


def test_a_run_may_start_with_the_body_of_a_personal_one(runner) -> None:
    personal = runner.run(runner.study(strategy={"name": "fedper"}, rounds={"count": 1}))
    folder = start_run(prepare(runner.study(), None), runner.out, start_from=personal.folder.path)
    head = personal_names(personal.folder.study.strategy, resolve_task("breast-cancer").model())
    assert set(folder.start.started_from.fresh) == head and not set(folder.start.started_from.taken) & head


def test_fedbn_keeps_normalisation_and_needs_some(runner) -> None:
    with pytest.raises(ConfigurationError, match="normalisation layer"):
        runner.run(runner.study(strategy={"name": "fedbn"}))
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    fedbn, fedper = (runner.study(strategy={"name": name}).strategy for name in ("fedbn", "fedper"))
    assert personal_names(fedbn, model) == {"1.weight", "1.bias"}
    assert personal_names(fedper, model) == {"3.weight", "3.bias"}
    named = runner.study(strategy={"name": "fedper", "head": ["1", "3"]}).strategy
    assert personal_names(named, model) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    with pytest.raises(ConfigurationError, match=r"strategy.head: expected layers of the model, got 'classifier'"):
        personal_names(runner.study(strategy={"name": "fedper", "head": ["classifier"]}).strategy, model)
    with pytest.raises(ConfigurationError, match="a head and a body"):
        personal_names(fedper, torch.nn.Sequential(torch.nn.Linear(3, 1)))


@pytest.mark.parametrize("name", ["breast_cancer", "heart_disease"])
def test_the_tasks_of_the_table_have_a_kind_with_normalisation(runner, name: str) -> None:
    task, plain = resolve_task(f"shared.tasks.{name}:normalised"), resolve_task(name.replace("_", "-"))
    assert task.name == plain.name and task.fingerprint() != plain.fingerprint(), "another architecture is another task to a site"
    assert personal_names(runner.study(strategy={"name": "fedbn"}).strategy, task.model()) == {"1.weight", "1.bias"}
    probe_model(task, runner.study(strategy={"name": "fedbn"}))  # which raises where it cannot be trained privately


@pytest.mark.slow
def test_fedbn_on_images_trains_under_privacy(runner) -> None:
    study = runner.study(
        task="breast-ultrasound", strategy={"name": "fedbn"}, rounds={"count": 2}, federation={"sites": 2, "num_patients": 40, "partition": "iid"}
    )
    run = runner.run(study)
    names = personal_names(study.strategy, resolve_task("breast-ultrasound").model())
    sites = [kept_at(run, site)["personal"] for site in run.result.privacy.sites]
    assert names and all(set(kept) == names for kept in sites)
    assert any(not np.array_equal(sites[0][name], sites[1][name]) for name in names)


# Interrupted -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STATEFUL, "q-fedavg", "fine-tuning", "cyclic"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(runner, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Cut off in the middle of the second round: a site that had trained trains again, on the state that it had before."""
    study = runner.study(strategy={"name": name}, training={"local_steps": 2}, rounds={"count": 3})
    whole = runner.run(study)
    owner, attribute = (client.strategies.apfl.Apfl, "train") if name == "apfl" else (client.local_update, "train_round_private")
    real, calls = getattr(owner, attribute), list[int]()
    per_round = {"fedrep": 6, "ditto": 6}.get(name, 3)

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == per_round + per_round * 2 // 3 + 1:  # at the last site of the second round
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(study)
    resumed = runner.run(study, resume=runner.latest().folder.path)
    assert resumed.model() == whole.model()
    assert resumed.comparable == whole.comparable and resumed.lines == whole.lines


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), [("ditto", "seeded"), ("fedper", "seeded"), ("fine-tuning", "os")])
def test_a_resumed_cross_validation_judges_every_fold_by_its_own_models(runner, name: str, source: str) -> None:
    study = runner.study(strategy={"name": name}, evaluation={"folds": 2}, privacy={"noise_source": source})
    runs = []
    for at in ((2, 1), None):

        def interrupt(record: RoundRecord, at=at) -> None:
            if (record.fold, record.round) == at:
                raise KeyboardInterrupt

        if at is None:
            runs.append(runner.run(study) if source == "seeded" else runs[0])
            continue
        with pytest.raises(KeyboardInterrupt):
            runner.run(study, observe=interrupt)
        runs.append(runner.run(study, resume=runner.latest().folder.path))
    assert runs[0].result.outcome == "completed" and runs[0].comparable == runs[1].comparable
    assert all(site.epsilon <= 3.0 for site in runs[0].result.privacy.sites.values())


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    state = KeptState(tmp_path, "run")
    state.keep(1, 1, {"personal": {"w": np.ones(3, np.float32)}})
    [file] = tmp_path.iterdir()
    for content in (b"", file.read_bytes()[:-1], file.read_bytes().replace(b"round", b"reund")):
        file.write_bytes(content)
        with pytest.raises(StorageError, match="expected what a site keeps between rounds"):
            state.before(1, 2)


def test_two_states_are_kept_and_the_last_before_a_round_is_its_base(tmp_path: Path) -> None:
    state = KeptState(tmp_path, "run")
    assert state.before(1, 1) == {}

    def value(fold: int, number: int) -> float | None:
        kept = state.before(fold, number)
        return float(kept["personal"]["w"][0]) if kept else None

    for number in (1, 2, 5, 5, 5, 9):  # 3, 4 and others were without this site; 5 was asked three times
        base = value(1, number)
        state.keep(1, number, {"personal": {"w": np.full(2, number, np.float32)}})
        assert value(1, number) == base, "the same round asked again starts from the same state"
    assert (value(1, 10), value(1, 9), value(2, 1)) == (9, 5, None)
    state.keep(2, 1, {"personal": {"w": np.full(2, 100, np.float32)}})
    assert (value(2, 2), value(2, 1)) == (100, None)
    assert value(1, 10) == 9, "a fold's own stay: its closing evaluation may be asked for again"
    assert len(list(tmp_path.iterdir())) == 3
    assert KeptState(tmp_path, "another").before(1, 10) == {}


# What cannot be ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": {"name": "scaffold"}}, "training.local_steps"),
        ({"strategy": {"name": "scaffold"}, "training": {"local_steps": 2, "momentum": 0.9}}, "plain SGD"),
        ({"strategy": {"name": "fednova"}, "training": {"optimizer": "adam"}}, "plain SGD"),
        ({"strategy": {"name": "ditto", "proximal_mu": 1.0}}, "did you mean 'proximal_lambda'"),
        ({"strategy": {"name": "apfl", "alpha": 1.5}}, "strategy.alpha"),
        ({"strategy": {"name": "q-fedavg", "q": -1}}, "strategy.q"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_by_the_key(runner, changes: dict, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        runner.study(**changes)


@pytest.mark.parametrize("name", ["ditto", "scaffold", "q-fedavg", "cyclic"])
def test_sites_with_a_part_of_their_own_are_not_trained_in_blocks(runner, name: str) -> None:
    study = runner.study(strategy={"name": name}, training={"local_steps": 2})
    with pytest.raises(ConfigurationError, match="whose sites train in turn" if name == "cyclic" else "a part of its own at each site"):
        runner.run(study, execution="blocks")
    with pytest.raises(ConfigurationError, match="--engine ray"):
        runner.run(study, engine="ray")


def test_a_cycle_passes_over_a_site_that_fails(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = client.local_update.train_round
    records: list[RoundRecord] = []
    study = plain_study(runner, name="cyclic").replace(rounds={"count": 1, "require": 3})
    papers = Papers(study)
    bad = sorted(papers.parts)[1]

    def broken(model, cohort, local, **named):
        if cohort.num_patients == papers.sizes[bad]:
            raise RuntimeError("no")
        return real(model, cohort, local, **named)

    assert len(set(papers.sizes.values())) == len(papers.sizes)
    monkeypatch.setattr(client.local_update, "train_round", broken)
    run = runner.run(study, observe=records.append)
    assert {site.name: site.status for site in records[0].sites} == {site: "refused" if site == bad else "ok" for site in papers.parts}
    expected = papers.start
    for site in turns_of(study, papers):
        expected = expected if site == bad else papers.descend(site, expected)
    assert_close(final(run), expected)
