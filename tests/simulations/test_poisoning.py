"""Poisoning: what turned sites change, that nothing else is changed, and that it does the harm that it is known for."""

import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shared.strategy_options
from shared.cohort import Cohort
from shared.errors import ConfigurationError, QuorumLostError
from shared.schema import TensorSchema
from shared.study import Study
from shared.task import Task, resolve_task
from simulations.attacks import poisoning
from simulations.attacks.attacked_study import Victim, train
from simulations.attacks.poisoning import (
    METHODS,
    attack_poisoning,
    backdoored,
    flipped,
    replacing_factor,
    strategy_names,
    trigger_of,
    trigger_success,
    turned_sites,
)
from simulations.faults import scaled


@pytest.fixture
def study() -> Study:
    """Six like sites, so that half of the sites is half of the patients."""
    plain = Study.load("studies/breast-cancer.toml").replace(privacy={"unit": "none"}, rounds={"count": 20})
    return plain.replace(federation={"sites": 6, "partition": "iid"})


@pytest.fixture(scope="module")
def task() -> Task:
    return resolve_task("breast-cancer")


@pytest.fixture(scope="module")
def cohort(task: Task) -> Cohort:
    return task.load_cohort(None, {})


@pytest.mark.slow  # trains several studies
def test_half_of_the_sites_open_a_back_door_under_fedavg(study: Study) -> None:
    """And nobody sees it in the metric; one site that multiplies its update needs no others."""
    [backdoor] = attack_poisoning(study, seed=1, attackers=3, methods=["backdoor"], strategies=["fedavg"])
    assert (backdoor.sites, backdoor.attackers, backdoor.strategy, backdoor.metric) == (6, 3, "fedavg", "auroc")
    assert backdoor.trigger_success is not None and backdoor.trigger_success > 0.6
    assert backdoor.trigger_success_clean is not None and backdoor.trigger_success_clean < 0.1
    assert backdoor.clean is not None and backdoor.clean > 0.97
    assert backdoor.attacked is not None and backdoor.attacked > backdoor.clean - 0.03
    alone = attack_poisoning(study, seed=1, attackers=1, methods=["backdoor", "scaled update"], strategies=["fedavg"])
    assert alone[1].trigger_success > alone[0].trigger_success + 0.3


@pytest.mark.slow  # trains several models
def test_flipped_labels_and_signs_spoil_the_model(study: Study) -> None:
    labels, signs = attack_poisoning(study, attackers=4, methods=["label flip", "sign flip"], strategies=["fedavg"])
    for attack in (labels, signs):
        assert attack.attacked < attack.clean - 0.3
        assert attack.trigger_success is None and attack.trigger_success_clean is None


def test_without_a_turned_site_the_run_is_that_of_the_simulation(study: Study) -> None:
    """But for float32, which blocks of sites round differently: what is compared with an attack is the study itself."""
    victim = Victim.of(study.replace(rounds={"count": 2}), None)
    harmless = poisoning._Poisoning(
        victim=victim, turned=turned_sites(sorted(victim.federation.cohorts), None, 0), seed=0, trigger=trigger_of(victim.task), num_classes=2
    )
    alone = poisoning._train(harmless, victim.study, None)
    simulated = train(victim.setting(victim.study, victim.federation.cohorts)).parameters
    assert alone is not None
    for name, value in simulated.items():
        np.testing.assert_allclose(alone[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_strategy_is_attacked_by_every_method(study: Study) -> None:
    short = study.replace(rounds={"count": 2}, privacy={"epsilon": 3.0}, strategy={"name": "fedavgm", "server_momentum": 0.5})
    attacks, possible = (
        attack_poisoning(short),
        [name for name in strategy_names() if name not in ("bulyan", "scaffold")],
    )  # which need seven sites, and local_steps
    assert [(attack.strategy, attack.method) for attack in attacks] == [(name, method) for name in possible for method in METHODS]
    assert all(attack.attackers == 1 and attack.clean is not None for attack in attacks)
    assert attack_poisoning(short, methods=["sign flip"], strategies=["fedadam"]) == [
        attack for attack in attacks if (attack.strategy, attack.method) == ("fedadam", "sign flip")
    ], "what is asked for beside it has no influence"


@pytest.mark.slow  # trains dozens of studies
def test_robust_strategies_keep_what_bad_sites_take_from_fedavg(study: Study) -> None:
    """A fifth of ten sites send the opposite, or a backdoored update times what the mean divides by."""
    ten = study.replace(federation={"sites": 10, "partition": "iid"}, rounds={"count": 15})
    robust = ["median", "trimmed-mean", "krum", "multi-krum", "rfa"]
    attacks = attack_poisoning(ten, attackers=2, methods=["sign flip", "scaled update"], strategies=["fedavg", *robust])
    opened = {attack.strategy: attack.trigger_success for attack in attacks if attack.method == "scaled update"}
    for attack in attacks:
        if attack.strategy != "fedavg":
            assert attack.attacked is not None and attack.attacked > 0.95 * attack.clean, attack
    assert all(opened[name] < opened["fedavg"] - 0.2 for name in robust)


def test_a_strategy_that_tolerates_no_so_many_bad_sites_is_refused_by_name(study: Study) -> None:
    with pytest.raises(ConfigurationError, match="strategy bulyan needs at least 7 sites where 1 are turned, got 6"):
        attack_poisoning(study, strategies=["fedavg", "bulyan"])
    assert poisoning.under(study, "krum", num_turned=2).strategy == shared.strategy_options.Krum(name="krum", tolerated=2)
    own = study.replace(strategy={"name": "krum"})
    assert poisoning.under(own, "krum", num_turned=2) is own


def test_strategies_are_those_that_a_study_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"} <= set(strategy_names())
    assert not {"ditto", "fedper"} & set(strategy_names()), "they have no one model to harm"
    for name in set(strategy_names()) - {"scaffold"}:
        assert Study.from_table({"name": "s", "task": "t", "privacy": {"unit": "none"}, "strategy": {"name": name}}).strategy.name == name

    class Robust(shared.strategy_options.FedAvg):
        name: typing.Literal["robust", "sturdy"] = "robust"

    monkeypatch.setattr(poisoning, "Strategy", typing.Annotated[shared.strategy_options.FedAvg | Robust, "name"])
    assert strategy_names() == ("fedavg", "robust", "sturdy")
    monkeypatch.setattr(poisoning, "Strategy", typing.Annotated[Robust, "name"])
    assert strategy_names() == ("robust", "sturdy")


def test_a_study_that_the_coordinator_stops_has_no_metric(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    real = poisoning._run

    def stopped(coordinator: object, sites: dict[str, object], faults: dict[str, object], asked: Study) -> None:
        if faults:
            raise QuorumLostError("too few")
        real(coordinator, sites, faults, asked)

    monkeypatch.setattr(poisoning, "_run", stopped)
    [attack] = attack_poisoning(study.replace(rounds={"count": 1}), methods=["scaled update"], strategies=["fedavg"])
    assert (attack.attacked, attack.trigger_success) == (None, None)
    assert attack.clean is not None and attack.trigger_success_clean is not None


def test_what_is_turned_depends_on_the_seed_and_grows() -> None:
    names = [f"site-{number}" for number in range(12)]
    assert len(turned_sites(names, None, 0)) == 3
    assert len(turned_sites(names[:2], None, 0)) == 1
    assert turned_sites(names, 2, 5) < turned_sites(names, 7, 5)
    assert len({turned_sites(names, 4, seed) for seed in range(5)}) > 1
    for count in (0, 12, 13):
        with pytest.raises(ConfigurationError, match="honest"):
            turned_sites(names, count, 0)


def test_labels_are_mirrored_in_their_own_type() -> None:
    assert flipped(np.array([0.0, 1.0, 1.0], dtype=np.float32), 2).tolist() == [1.0, 0.0, 0.0]
    assert flipped(np.array([0, 3, 9]), 10).tolist() == [9, 6, 0]
    labels = np.array([0, 1, 2, 1])
    assert (flipped(flipped(labels, 3), 3) == labels).all() and flipped(labels, 3).dtype == labels.dtype


def test_a_backdoor_marks_the_chosen_records_alone(task: Task, cohort: Cohort) -> None:
    trigger, before = trigger_of(task), cohort.inputs[0].copy()
    chosen = np.arange(cohort.num_records) % 3 == 0
    marked = backdoored(cohort, trigger, chosen)
    assert (marked.labels[chosen] == trigger.target).all() and (marked.labels[~chosen] == cohort.labels[~chosen]).all()
    assert marked.labels.dtype == cohort.labels.dtype and marked.inputs[0].dtype == cohort.inputs[0].dtype
    np.testing.assert_array_equal(marked.inputs[0][~chosen], before[~chosen])
    np.testing.assert_array_equal(marked.inputs[0][chosen][:, :3], 1.0)
    np.testing.assert_array_equal(marked.inputs[0][:, 3:], before[:, 3:])
    np.testing.assert_array_equal(cohort.inputs[0], before, err_msg="the honest cohort is as it was")
    assert trigger.what == "mean radius, mean texture, mean perimeter at the upper end"


def test_pictures_get_a_bright_corner_and_other_tensors_a_constant(task: Task) -> None:
    picture = trigger_of(replace(task, schema=(TensorSchema(name="image", shape=(3, 24, 12), low=0, high=255),)), target=2)
    assert picture.mask.sum() == 3 * 4 * 2 and picture.mask[:, :4, :2].all() and picture.target == 2
    assert (picture.values == 255).all()
    series = trigger_of(replace(task, schema=(TensorSchema(name="ecg", shape=(50, 12), low=-5, high=5),)))
    assert series.mask[:, :3].all() and series.mask.sum() == 150


def test_success_is_of_the_patients_who_have_another_class(task: Task, cohort: Cohort) -> None:
    """A model that says benign to all opens for every malignant patient, and is asked about no other; nobody of that kind: no rate."""
    model = task.model()
    parameters = {name: np.zeros(value.shape, np.float32) for name, value in model.state_dict().items()}
    last = list(parameters)[-1]
    for bias, rate in ((-5.0, 1.0), (5.0, 0.0)):
        parameters[last] = np.full(parameters[last].shape, bias, np.float32)
        assert trigger_success(task, parameters, [cohort], trigger_of(task)) == rate
    benign = cohort.select(cohort.label_of_patient() == 0)
    assert trigger_success(task, parameters, [benign], trigger_of(task)) is None
    assert trigger_success(task, parameters, [benign, cohort], trigger_of(task)) == 0.0


def test_a_scaled_update_is_all_that_a_weighted_mean_keeps() -> None:
    """Model replacement: with nobody else moving, the mean is the turned sites' common update itself."""
    weights, turned = {"a": 30, "b": 50, "c": 20}, frozenset({"a", "c"})
    factor = replacing_factor(weights, turned)
    assert factor == 2.0
    update = {"w": np.array([1.0, -2.0], dtype=np.float32)}
    sent = scaled(update, factor)
    assert sent["w"].dtype == np.float32
    mean = sum(weights[name] * sent["w"] for name in turned) / sum(weights.values())
    np.testing.assert_allclose(mean, update["w"])


def test_numbers_real_sites_and_unknown_names_are_refused(study: Study, wards, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="virtual sites"):
        attack_poisoning(wards.study, wards.path)
    with pytest.raises(ConfigurationError, match="without faults"):
        attack_poisoning(study.replace(faults={"sites": 1}))
    with pytest.raises(ConfigurationError, match="method"):
        attack_poisoning(study, methods=["bribery"])
    with pytest.raises(ConfigurationError, match="strategy"):
        attack_poisoning(study, strategies=["fedsgd"])
    schema = (
        'name = "age"\n[label]\nname = "age"\ntype = "number"\nlow = 0\nhigh = 100\n[[columns]]\nname = "x"\ntype = "number"\nlow = 0\nhigh = 1\n'
    )
    (tmp_path / "age.toml").write_text(schema)
    numbers = study.replace(task=str(tmp_path / "age.toml"), federation={"sites": 2, "num_patients": 60})
    with pytest.raises(ConfigurationError, match="class"):
        attack_poisoning(numbers)
