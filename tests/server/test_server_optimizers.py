"""Server optimizers against a literal transcription of their papers, and against Flower's own where the two mean the same algorithm."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad as FlowerFedAdagrad
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import FedYogi as FlowerFedYogi

from server.strategies.choice import server_optimizer
from server.strategies.server_optimizer import ServerOptimizer, State
from shared import strategy_options as options
from simulations.in_process import InProcessGrid

NUM_ROUNDS = 6
SHAPES = {"w": (3, 2), "b": (4,)}


def mean_updates(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape) * 10.0 ** rng.integers(-3, 1) for name, shape in SHAPES.items()} for _ in range(NUM_ROUNDS)]


def trajectory(optimizer: ServerOptimizer, updates: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The parameters after every round, from ones."""
    parameters = {name: np.ones(shape) for name, shape in SHAPES.items()}
    state: State = {}
    path = []
    for update in updates:
        state, change = optimizer.step(state, update)
        parameters = {name: value + change[name] for name, value in parameters.items()}
        path.append(parameters)
    return path


def reddi_algorithm_2(update_v: Callable[[float, float, float], float], *, eta: float, tau: float, beta_1: float, beta_2: float) -> list[dict]:
    """Reddi et al. 2021, algorithm 2, number by number as it is printed (v_{-1} = tau^2, m_{-1} = 0)."""
    x = {name: np.ones(shape) for name, shape in SHAPES.items()}
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.full(shape, tau**2) for name, shape in SHAPES.items()}
    path = []
    for delta in mean_updates():
        for name, shape in SHAPES.items():
            for position in np.ndindex(shape):
                d = delta[name][position]
                m[name][position] = beta_1 * m[name][position] + (1 - beta_1) * d
                v[name][position] = update_v(v[name][position], d, beta_2)
                x[name][position] = x[name][position] + eta * m[name][position] / (v[name][position] ** 0.5 + tau)
        path.append({name: value.copy() for name, value in x.items()})
    return path


def adagrad(v: float, d: float, beta_2: float) -> float:
    return v + d * d


def adam(v: float, d: float, beta_2: float) -> float:
    return beta_2 * v + (1 - beta_2) * d * d


def yogi(v: float, d: float, beta_2: float) -> float:
    sign = int(v > d * d) - int(v < d * d)
    return v - (1 - beta_2) * d * d * sign


ADAPTIVE = [
    (options.FedAdagrad(name="fedadagrad", server_learning_rate=0.3, tau=0.01), adagrad, {"eta": 0.3, "tau": 0.01, "beta_1": 0.0, "beta_2": 0.0}),
    (
        options.FedAdam(name="fedadam", server_learning_rate=0.2, tau=0.05, beta_1=0.8, beta_2=0.95),
        adam,
        {"eta": 0.2, "tau": 0.05, "beta_1": 0.8, "beta_2": 0.95},
    ),
    (
        options.FedYogi(name="fedyogi", server_learning_rate=0.2, tau=0.05, beta_1=0.8, beta_2=0.95),
        yogi,
        {"eta": 0.2, "tau": 0.05, "beta_1": 0.8, "beta_2": 0.95},
    ),
]


@pytest.mark.parametrize(("study_options", "rule", "numbers"), ADAPTIVE, ids=["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_optimizers_are_algorithm_2_of_the_paper(study_options: options.Strategy, rule: Callable, numbers: dict[str, float]) -> None:
    for ours, paper in zip(trajectory(server_optimizer(study_options), mean_updates()), reddi_algorithm_2(rule, **numbers), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], paper[name], rtol=1e-12)


@pytest.mark.parametrize("study_options", [options.FedAvg(), options.FedProx(name="fedprox", proximal_mu=3.0)], ids=["fedavg", "fedprox"])
def test_fedavg_adds_the_mean_update_and_keeps_no_state(study_options: options.Strategy) -> None:
    updates = mean_updates()
    for number, parameters in enumerate(trajectory(server_optimizer(study_options), updates), start=1):
        for name, shape in SHAPES.items():
            expected = np.ones(shape)
            for update in updates[:number]:
                expected = expected + update[name]
            assert np.array_equal(parameters[name], expected)
    assert server_optimizer(study_options).step({}, updates[0])[0] == {}


def test_fedavgm_is_hsu_et_al_2019() -> None:
    eta, beta = 0.7, 0.9
    optimizer = server_optimizer(options.FedAvgM(name="fedavgm", server_learning_rate=eta, server_momentum=beta))
    updates = mean_updates()
    for number, parameters in enumerate(trajectory(optimizer, updates), start=1):
        for name, shape in SHAPES.items():
            expected = np.ones(shape)
            for round_number in range(number):  # v_t = sum over s <= t of beta^(t-s) update_s
                expected = expected + eta * sum(beta ** (round_number - past) * updates[past][name] for past in range(round_number + 1))
            np.testing.assert_allclose(parameters[name], expected, rtol=1e-12)


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain = server_optimizer(options.FedAvgM(name="fedavgm", server_learning_rate=1.0, server_momentum=0.0))
    for ours, fedavg in zip(trajectory(plain, mean_updates()), trajectory(server_optimizer(options.FedAvg()), mean_updates()), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], fedavg[name], rtol=1e-15)


def test_a_step_changes_neither_its_state_nor_its_update() -> None:
    """State in, state out: what a checkpoint holds stays what it was."""
    for study_options, _, _ in ADAPTIVE:
        optimizer = server_optimizer(study_options)
        state, _ = optimizer.step({}, mean_updates()[0])
        frozen = {part: {name: value.copy() for name, value in arrays.items()} for part, arrays in state.items()}
        update = mean_updates()[1]
        optimizer.step(state, update)
        for part, arrays in state.items():
            for name, value in arrays.items():
                assert np.array_equal(value, frozen[part][name])
        assert all(np.array_equal(update[name], mean_updates()[1][name]) for name in SHAPES)


def test_a_zero_update_moves_nothing_and_divides_by_nothing() -> None:
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for study_options, _, _ in ADAPTIVE:
        state, change = server_optimizer(study_options).step({}, zeros)
        state, change = server_optimizer(study_options).step(state, zeros)
        assert all(np.array_equal(value, zeros[name]) for name, value in change.items())


# Flower's own strategies, fed with the same models ---------------------------------------------------------------------------------


def flower_trajectory(strategy: FlowerFedAvg, updates: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The parameters after every round of a Flower strategy to which one site sends received + update, in float64."""
    InProcessGrid(lambda message, context: message, ["only"])  # sets the identity that Message(...) asks for
    current = {name: np.ones(shape) for name, shape in SHAPES.items()}
    path = []
    for number, update in enumerate(updates, start=1):
        strategy.current_arrays = (
            ArrayRecord({name: Array(value) for name, value in current.items()}) if isinstance(strategy, FlowerFedAvgM) else dict(current)
        )
        sent = {"arrays": ArrayRecord({name: Array(current[name] + update[name]) for name in SHAPES}), "metrics": MetricRecord({"num-examples": 5})}
        request = Message(RecordDict({"config": ConfigRecord({})}), 2, "train")
        arrays, _ = strategy.aggregate_train(number, [Message(RecordDict(sent), reply_to=request)])
        assert arrays is not None
        current = {name: array.numpy() for name, array in arrays.items()}
        path.append(current)
    return path


def test_fedavgm_agrees_with_flower() -> None:
    flower = FlowerFedAvgM(server_learning_rate=0.5, server_momentum=0.8)
    ours = server_optimizer(options.FedAvgM(name="fedavgm", server_learning_rate=0.5, server_momentum=0.8))
    for mine, theirs in zip(trajectory(ours, mean_updates()), flower_trajectory(flower, mean_updates()), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-9)


@pytest.mark.parametrize("kind", ["fedadagrad", "fedyogi"])
def test_adagrad_and_yogi_agree_with_flower_from_the_papers_start(kind: str) -> None:
    """Flower starts v at 0, the paper (and we) at tau^2: the one difference, taken away here by giving Flower the paper's start."""
    tau = 0.05
    if kind == "fedadagrad":
        flower: FlowerFedAvg = FlowerFedAdagrad(eta=0.2, tau=tau)
        ours = server_optimizer(options.FedAdagrad(name="fedadagrad", server_learning_rate=0.2, tau=tau))
    else:
        flower = FlowerFedYogi(eta=0.2, tau=tau, beta_1=0.8, beta_2=0.95)
        ours = server_optimizer(options.FedYogi(name="fedyogi", server_learning_rate=0.2, tau=tau, beta_1=0.8, beta_2=0.95))
    flower.v_t = {name: np.full(shape, tau**2) for name, shape in SHAPES.items()}
    for mine, theirs in zip(trajectory(ours, mean_updates()), flower_trajectory(flower, mean_updates()), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-9)


def test_fedadam_differs_from_flower_by_the_bias_correction_alone() -> None:
    """Flower multiplies eta by Kingma and Ba's correction, which algorithm 2 of Reddi et al. does not have; ours is the paper's."""
    tau, beta_1, beta_2 = 0.05, 0.8, 0.95
    flower = FlowerFedAdam(eta=0.2, tau=tau, beta_1=beta_1, beta_2=beta_2)
    flower.v_t = {name: np.full(shape, tau**2) for name, shape in SHAPES.items()}
    ours = server_optimizer(options.FedAdam(name="fedadam", server_learning_rate=0.2, tau=tau, beta_1=beta_1, beta_2=beta_2))
    start = [{name: np.ones(shape) for name, shape in SHAPES.items()}]
    mine, theirs = start + trajectory(ours, mean_updates()), start + flower_trajectory(flower, mean_updates())
    for number in range(1, NUM_ROUNDS + 1):
        correction = np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        assert correction != pytest.approx(1, abs=1e-3)
        for name in SHAPES:
            np.testing.assert_allclose(
                theirs[number][name] - theirs[number - 1][name], correction * (mine[number][name] - mine[number - 1][name]), rtol=1e-6, atol=1e-12
            )
