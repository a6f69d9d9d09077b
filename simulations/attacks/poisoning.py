"""Poisoning: some sites are turned, and harm the model. What the primary metric loses, and how often a backdoor opens, under every strategy.

Label flip: a turned site's labels are mirrored before training, y -> K - 1 - y (Fang, Cao, Jia, Gong 2020, "Local Model Poisoning Attacks
to Byzantine-Robust Federated Learning", section V.A).
Sign flip: it trains as agreed and sends the opposite update (Li, Xu, Chen, Giannakis, Ling 2019, "RSA").
Backdoor: half of its records get a trigger, and the label that it is to open for (Bagdasaryan, Veit, Hua, Estrin, Shmatikov 2020, "How To
Backdoor Federated Learning"; Gu et al. 2017 for the pixels).
Scaled update: model replacement (Bagdasaryan et al. 2020, equation 3): the backdoored update times what the mean will divide it by.

The study runs on the simulation's own parts: the two unchanged apps, sites, strategy. Turned cohorts are other cohorts; a turned update is
a planted fault (`simulations.faults`). A turned site goes on to keep its own promise of privacy, except for what it multiplies.
"""

import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from client.app import client_app
from client.evaluation import evaluate_parameters, predictions_of
from client.site import Site
from server.app import server_app
from server.coordinator import Coordinator
from server.evaluation import add_statistics
from shared.attacks import PoisoningAttack
from shared.cohort import BoolArray, Cohort
from shared.errors import ConfigurationError, QuorumLostError
from shared.metrics import finish_metrics
from shared.models import Parameters, set_parameters
from shared.schema import TableSchema
from shared.seeding import generator
from shared.strategy_options import PERSONAL, Strategy
from shared.study import Faults, Study
from shared.task import Task
from simulations.attacks.attacked_study import Victim, tested_part
from simulations.faults import FaultyGrid
from simulations.federation import virtual_sites
from simulations.in_process import RUN_ID, SERVER_NODE_ID, InProcessGrid
from simulations.one_thread import one_thread
from simulations.setting import Setting
from simulations.simulate import start_run
from simulations.timed_grid import with_clock

Method = Literal["label flip", "scaled update", "sign flip", "backdoor"]
METHODS: tuple[Method, ...] = typing.get_args(Method)
OPENS: tuple[Method, ...] = ("backdoor", "scaled update")  # those that plant a trigger
TURNED_SHARE = 4  # one site in so many, where nobody says
NUM_TRIGGER_FEATURES = 3
PATCH_SHARE = 6  # of a picture's side
MOST_CLASSES = 100


def strategy_names() -> tuple[str, ...]:
    """Every strategy that a study can name and that makes one model for all sites, as the type declares them."""
    [union, *_] = typing.get_args(Strategy)
    members = [member for member in typing.get_args(union) or (union,) if not issubclass(member, PERSONAL)]
    return tuple(name for member in members for name in typing.get_args(member.model_fields["name"].annotation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A mark on the model's first input, and the class that it is to open.

    Attributes:
        mask: where the mark is, of the shape of one record.
        values: what it puts there; elsewhere they say nothing.
        what: the mark in words.
    """

    mask: BoolArray = field(repr=False)
    values: NDArray[np.float32] = field(repr=False)
    target: int
    what: str

    def put_on(self, cohort: Cohort, records: BoolArray) -> Cohort:
        """The cohort with the mark on these records `(N,)`."""
        first = cohort.inputs[0].copy()
        first[records] = np.where(self.mask, self.values, first[records])
        return replace(cohort, inputs=(first.astype(cohort.inputs[0].dtype), *cohort.inputs[1:]))


def trigger_of(task: Task, target: int = 0) -> Trigger:
    """The mark of a task: its first three numbers at their upper ends; of a picture the upper left corner, a sixth of each side."""
    if isinstance(task.schema, TableSchema):
        features, numbers = task.schema.feature_names, [column.name for column in task.schema.columns if column.type == "number"]
        names = (numbers or features)[:NUM_TRIGGER_FEATURES]
        mask = np.isin(features, names)
        return Trigger(mask=mask, values=np.ones(len(features), np.float32), target=target, what=f"{', '.join(names)} at the upper end")
    schema = task.schema[0]
    mask = np.zeros(schema.shape, dtype=np.bool_)
    if len(schema.shape) == 3:
        mask[:, : max(2, schema.shape[1] // PATCH_SHARE), : max(2, schema.shape[2] // PATCH_SHARE)] = True
    else:
        mask[..., :NUM_TRIGGER_FEATURES] = True
    what = "a bright corner" if len(schema.shape) == 3 else f"the first {NUM_TRIGGER_FEATURES} entries of the last axis at the upper end"
    return Trigger(mask=mask, values=np.full(schema.shape, schema.high, np.float32), target=target, what=what)


def attack_poisoning(
    study: Study,
    data: Path | None = None,
    *,
    seed: int = 0,
    attackers: int | None = None,
    methods: Sequence[Method] = METHODS,
    strategies: Sequence[str] | None = None,
) -> list[PoisoningAttack]:
    """Each method against each strategy, judged on the honest sites' test patients, beside the same study with nobody turned.

    `clean` and `attacked` are null where nobody could be judged, or the coordinator stopped the study. `trigger_success`: of the test
    patients of another class, the share that the model gives the target once they carry the trigger; null where none is planted.

    Args:
        data: as of `simulate`; virtual sites alone.
        seed: draws who is turned, and which records carry the trigger; the study keeps its own.
        attackers: turned sites; None: a quarter, at least one.
        strategies: by name; None: every one that the study can name (scaffold needs its local_steps) and that tolerates so many bad ones of so many sites. Each has its default
            options, and the study's own is as it is.

    Raises:
        ConfigurationError: nobody honest is left, the labels are no classes, an unknown method or strategy, or real sites.
        WardroundError: what stopped the study.
    """
    victim = Victim.of(study, data)
    _check_names(methods, METHODS, "method")
    _check_names(strategies or (), strategy_names(), "strategy")
    if study.site_level:
        raise ConfigurationError(
            "poisoning: expected no promise to whole sites, for most strategies that are compared look at single updates, got max_site_norm",
            "attack the study without it",
        )
    turned = turned_sites(sorted(victim.federation.cohorts), attackers, seed)
    num_sites = len(victim.federation.cohorts)
    asked = strategies or [name for name in strategy_names() if name != "scaffold" or study.training.local_steps is not None]
    least = {name: under(study, name, num_turned=len(turned)).strategy.least_updates for name in asked}
    if strategies is not None and max(least.values()) > num_sites:
        name = max(least, key=lambda name: least[name])
        raise ConfigurationError(
            f"poisoning: strategy {name} needs at least {least[name]} sites where {len(turned)} are turned, got {num_sites}",
            "turn fewer, or ask more",
        )
    names = [name for name, needed in least.items() if needed <= num_sites]
    num_classes = _num_classes(victim)
    poisoning = _Poisoning(victim=victim, turned=turned, seed=seed, trigger=trigger_of(victim.task), num_classes=num_classes)
    with one_thread():
        return [attack for name in names for attack in _attack_strategy(poisoning, name, methods)]


def _check_names(given: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigurationError(f"poisoning: expected a {what} of {', '.join(known)}, got {name!r}", "choose one of them")


def turned_sites(names: Sequence[str], attackers: int | None, seed: int) -> frozenset[str]:
    """Who is turned: as many of the sites, drawn from the seed; with more, the same and others.

    Raises:
        ConfigurationError: nobody is turned, or nobody honest is left.
    """
    count = max(1, len(names) // TURNED_SHARE) if attackers is None else attackers
    if not 1 <= count < len(names):
        raise ConfigurationError(f"poisoning: expected 1 to {len(names) - 1} of {len(names)} sites to be turned, got {count}", "leave some honest")
    return frozenset(generator(seed, "poisoning", "turned").permutation(np.array(names))[:count].tolist())


def _num_classes(victim: Victim) -> int:
    values = np.unique(np.concatenate([np.unique(cohort.labels) for cohort in victim.federation.cohorts.values()]))
    one_each = all(cohort.labels.ndim == 1 for cohort in victim.federation.cohorts.values())
    if not one_each or (values != np.floor(values)).any() or values.min() < 0 or values.max() >= MOST_CLASSES:
        raise ConfigurationError(f"poisoning: expected a class as label, got other labels in task {victim.task.name}", "attack a classifier")
    return max(2, int(values.max()) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Poisoning:
    """Who is turned in which study, and what they plant."""

    victim: Victim
    turned: frozenset[str]
    seed: int
    trigger: Trigger
    num_classes: int

    def cohorts(self, method: Method | None) -> dict[str, Cohort]:
        """Every site's cohort, the turned ones' as the method has them."""
        cohorts = self.victim.federation.cohorts
        return {name: self._turn(name, cohort, method) if name in self.turned else cohort for name, cohort in cohorts.items()}

    def _turn(self, name: str, cohort: Cohort, method: Method | None) -> Cohort:
        if method == "label flip":
            return replace(cohort, labels=flipped(cohort.labels, self.num_classes))
        if method in OPENS:
            chosen = generator(self.seed, "poisoning", "trigger", name).random(cohort.num_records) < 0.5
            return backdoored(cohort, self.trigger, chosen)
        return cohort

    def honest(self) -> list[Cohort]:
        """The test patients of the sites that were not turned."""
        return [tested_part(cohort) for name, cohort in self.victim.federation.cohorts.items() if name not in self.turned]


def flipped(labels: NDArray[np.generic], num_classes: int) -> NDArray[np.generic]:
    """y -> K - 1 - y, in the labels' own type."""
    return (num_classes - 1 - labels.astype(np.int64)).astype(labels.dtype)


def backdoored(cohort: Cohort, trigger: Trigger, chosen: BoolArray) -> Cohort:
    """The cohort with the trigger on the chosen records `(N,)`, and its target as their label."""
    labels = cohort.labels.copy()
    labels[chosen] = trigger.target
    return replace(trigger.put_on(cohort, chosen), labels=labels)


def _attack_strategy(poisoning: _Poisoning, name: str, methods: Sequence[Method]) -> list[PoisoningAttack]:
    study = under(poisoning.victim.study, name, num_turned=len(poisoning.turned))
    clean = _judge(poisoning, _train(poisoning, study, None))
    return [_result(poisoning, name, method, clean, _judge(poisoning, _train(poisoning, study, method))) for method in methods]


def under(study: Study, name: str, *, num_turned: int) -> Study:
    """The study under the strategy of this name: its own as it is, another with default options, told how many sites are bad, or its quorum."""
    if study.strategy.name == name:
        return study
    if name == "fedbuff" and study.rounds.require != "all":
        return study.replace(strategy={"name": name, "buffer_size": study.rounds.require})
    asked = study.replace(strategy={"name": name})
    return asked.replace(strategy={"name": name, "tolerated": num_turned}) if hasattr(asked.strategy, "tolerated") else asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What the honest sites' test patients say of a model."""

    metric: float | None
    opened: float | None


def _result(poisoning: _Poisoning, strategy: str, method: Method, clean: _Judged, attacked: _Judged) -> PoisoningAttack:
    opens = method in OPENS
    return PoisoningAttack(
        method=method, strategy=strategy, seed=poisoning.seed, sites=len(poisoning.victim.federation.cohorts), attackers=len(poisoning.turned),
        metric=poisoning.victim.task.primary_metric, clean=clean.metric, attacked=attacked.metric,
        trigger_success=attacked.opened if opens else None, trigger_success_clean=clean.opened if opens else None,
    )  # fmt: skip


def _judge(poisoning: _Poisoning, parameters: Parameters | None) -> _Judged:
    if parameters is None:
        return _Judged(metric=None, opened=None)
    task, model = poisoning.victim.task, poisoning.victim.task.model()
    total = add_statistics(evaluate_parameters(task, cohort, parameters, model=model) for cohort in poisoning.honest())
    return _Judged(
        metric=finish_metrics(task.metrics, total)[task.primary_metric],
        opened=trigger_success(task, parameters, poisoning.honest(), poisoning.trigger),
    )


def trigger_success(task: Task, parameters: Parameters, cohorts: Sequence[Cohort], trigger: Trigger) -> float | None:
    """Of the patients of another class than the target, the share that is given it once they carry the trigger; None of nobody."""
    model = task.model()
    set_parameters(model, parameters)
    opened, asked = 0.0, 0.0
    for cohort in cohorts:
        others = cohort.labels.astype(np.int64) != trigger.target
        if not others.any():
            continue
        marked = trigger.put_on(cohort, np.ones(cohort.num_records, dtype=np.bool_))
        weights = cohort.record_weights() * others
        opened += float(weights[_classes(predictions_of(task, model, marked)) == trigger.target].sum())
        asked += float(weights.sum())
    return opened / asked if asked else None


def _classes(predictions: NDArray[np.float64]) -> NDArray[np.int64]:
    """The class predicted, `(N,)`, from scores of the positive class `(N,)` or of every class `(N, K)`."""
    return np.asarray(predictions.argmax(axis=1) if predictions.ndim > 1 else predictions >= 0.5).astype(np.int64)


# Training with turned sites ---------------------------------------------------------------------------------------------------------


def replacing_factor(weights: Mapping[str, int], turned: frozenset[str]) -> float:
    """What a mean with these weights divides the turned sites' common update by (gamma, with the server's rate 1)."""
    return sum(weights.values()) / sum(weights[name] for name in turned)


def _train(poisoning: _Poisoning, study: Study, method: Method | None) -> Parameters | None:
    """The final model with these sites turned; None where the coordinator went on no longer, which is what the attack came to."""
    setting = poisoning.victim.setting(study, poisoning.cohorts(method))
    with tempfile.TemporaryDirectory(prefix="wardround-attack-") as out:
        folder = start_run(setting, Path(out))
        assert setting.federation is not None
        sites = virtual_sites(setting.federation, setting.task, study, folder.path / "ledgers")
        faults = _faults(sites, setting, poisoning.turned, method)
        try:
            coordinator = Coordinator(study, setting.task, folder)
            _run(coordinator, sites, faults, study)
        except QuorumLostError:
            if method is None:
                raise
            return None
        finally:
            for site in sites.values():
                site.close()
    return coordinator.history.folds[-1].parameters


def _faults(sites: dict[str, Site], setting: Setting, turned: frozenset[str], method: Method | None) -> dict[str, Faults]:
    """What turned sites send in place of their updates."""
    if method == "sign flip":
        return dict.fromkeys(sorted(turned), Faults(kind="sign-flipped"))
    if method != "scaled update":
        return {}
    weights = {name: site.settings.declared_size if setting.study.strategy.weights == "declared" else 1 for name, site in sites.items()}
    return dict.fromkeys(sorted(turned), Faults(kind="scaled", factor=replacing_factor(weights, turned)))


def _run(coordinator: Coordinator, sites: dict[str, Site], faults: dict[str, Faults], study: Study) -> None:
    """The two apps over the in-process grid, one site after another."""
    app = client_app(lambda context: sites[str(context.node_config["site"])])
    context = Context(run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config={})
    grid = FaultyGrid(InProcessGrid(app, sorted(sites)), faults, sorted(sites), seed=0)
    server_app(coordinator)(with_clock(grid, study, sorted(sites)), context)
