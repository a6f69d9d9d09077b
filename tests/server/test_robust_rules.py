"""Robust rules beside what their papers say, written out; and what no bad site can do to them."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from server import kept_updates
from server.aggregation import ExactMean
from server.kept_updates import KeptUpdates, squared_distances
from server.strategies.choice import aggregator
from shared.errors import ConfigurationError, ProtocolError
from shared.study import Study
from simulations.simulate import prepare

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
RULES = {
    "median": {"name": "median"},
    "trimmed-mean": {"name": "trimmed-mean", "tolerated": 2},
    "krum": {"name": "krum", "tolerated": 2},
    "multi-krum": {"name": "multi-krum", "tolerated": 2},
    "bulyan": {"name": "bulyan", "tolerated": 2},
    "rfa": {"name": "rfa"},
}
NUM_SITES, SIZE = 11, 6  # 4 x 2 + 3: as many as Bulyan needs


def study_with(strategy: dict[str, object]) -> Study:
    return Study.from_table({"name": "robust", "task": "breast-cancer", "privacy": {"unit": "none"}, "strategy": strategy})


def come_to(strategy: dict[str, object], updates: Matrix, weights: list[int] | None = None, order: list[int] | None = None) -> Matrix:
    """What the rule makes of these rows, sent as two tensors."""
    rule = aggregator(study_with(strategy).strategy)
    for row in order or range(len(updates)):
        rule.add({"a": updates[row, :2].reshape(2, 1), "b": updates[row, 2:]}, (weights or [1] * len(updates))[row], site=f"site-{row:02d}")
    given = rule.take_mean()
    assert {name: value.shape for name, value in given.items()} == {"a": (2, 1), "b": (updates.shape[1] - 2,)}
    return np.concatenate([given["a"].ravel(), given["b"]])


def updates_of(seed: int, num_sites: int = NUM_SITES, size: int = SIZE) -> Matrix:
    return np.random.default_rng(seed).normal(size=(num_sites, size)).astype(np.float32).astype(np.float64)


# The papers, written out ---------------------------------------------------------------------------------------------------------


def trimmed_by_hand(updates: Matrix) -> Matrix:
    return np.array([np.mean(sorted(column)[2:-2]) for column in updates.T])


def krum_scores_by_hand(updates: list[Matrix], tolerated: int) -> list[float]:
    """For each i the sum over i -> j of |V_i - V_j|^2, where i -> j says that j is among the n - f - 2 nearest others."""
    return [
        sum(sorted(float(np.sum((one - other) ** 2)) for j, other in enumerate(updates) if j != i)[: max(1, len(updates) - tolerated - 2)])
        for i, one in enumerate(updates)
    ]


def krum_by_hand(updates: Matrix, selected: int) -> Matrix:
    best = np.argsort(krum_scores_by_hand(list(updates), 2), kind="stable")[:selected]
    return np.asarray(updates[best].mean(axis=0))


def bulyan_by_hand(updates: Matrix) -> Matrix:
    left, selected = list(updates), []
    for _ in range(len(updates) - 4):
        best = int(np.argmin(krum_scores_by_hand(left, 2))) if len(left) > 1 else 0
        selected.append(left.pop(best))
    columns = np.array(selected).T
    return np.array([np.mean(sorted(column, key=lambda value: abs(value - np.median(column)))[: len(selected) - 4]) for column in columns])


def geometric_median_by_hand(updates: Matrix) -> Matrix:
    found = minimize(lambda point: np.linalg.norm(updates - point, axis=1).sum(), np.median(updates, axis=0), tol=1e-12)
    return np.asarray(found.x)


BY_HAND: dict[str, Callable[[Matrix], Matrix]] = {
    "median": lambda updates: np.median(updates, axis=0),
    "trimmed-mean": trimmed_by_hand,
    "krum": lambda updates: krum_by_hand(updates, 1),
    "multi-krum": lambda updates: krum_by_hand(updates, NUM_SITES - 4),
    "bulyan": bulyan_by_hand,
    "rfa": geometric_median_by_hand,
}


@pytest.mark.parametrize("piece", [2**23, 2 * NUM_SITES, 1])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_what_its_paper_says_however_few_columns_it_sees_at_a_time(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_updates, "PIECE", piece)
    for seed in range(5):
        updates = updates_of(seed)
        np.testing.assert_allclose(come_to(RULES[name], updates), BY_HAND[name](updates), rtol=1e-9, atol=1e-5 if name == "rfa" else 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_replies_makes_no_difference_to_any_bit(name: str) -> None:
    updates = updates_of(3)
    orders = [list(range(NUM_SITES)), list(reversed(range(NUM_SITES))), np.random.default_rng(0).permutation(NUM_SITES).tolist()]
    assert len({come_to(RULES[name], updates, order=order).tobytes() for order in orders}) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(RULES)), st.integers(0, 1000), st.sampled_from(["huge", "opposite", "one", "apart", "zero"]), st.sampled_from([1, 2])
)  # fmt: skip
def test_two_bad_sites_of_eleven_do_not_move_a_rule_out_of_where_the_honest_are(name: str, seed: int, kind: str, count: int) -> None:
    """Honest updates are within 1 of each other in every coordinate; the rule stays within 1 of their range, whatever the bad ones send."""
    rng = np.random.default_rng(seed)
    updates = 5 + rng.uniform(0, 1, size=(NUM_SITES, SIZE))
    bad = rng.permutation(NUM_SITES)[:count]
    sent = {"huge": 1e6, "opposite": -50 * updates[bad], "one": updates[bad] * 10, "apart": rng.normal(size=(count, SIZE)) * 1e4, "zero": 0.0}[kind]
    updates[bad] = sent
    got = come_to(RULES[name], updates)
    assert (got > 4).all() and (got < 7).all()
    assert not ((ExactMean_mean(updates) > 4) & (ExactMean_mean(updates) < 7)).all() or kind in ("zero", "one")


def ExactMean_mean(updates: Matrix) -> Matrix:  # noqa: N802
    mean = ExactMean()
    for row in updates:
        mean.add({"w": row}, 1)
    return mean.mean()["w"]


def test_one_huge_update_takes_no_digits_from_the_distances_of_the_others() -> None:
    updates = updates_of(1) * 1e-3
    updates[0] = 1e9
    rows = kept_updates._Rows(updates, np.arange(NUM_SITES), np.ones(NUM_SITES))
    found = squared_distances(rows)
    for i, j in itertools.combinations(range(1, NUM_SITES), 2):
        assert found[i, j] == pytest.approx(np.sum((updates[i] - updates[j]) ** 2), rel=1e-9)
    assert found[0, 1] == pytest.approx(np.sum((updates[0] - updates[1]) ** 2), rel=1e-9)


def test_the_geometric_median_goes_with_half_of_the_weight_not_of_the_sites() -> None:
    updates = np.concatenate([np.zeros((2, SIZE)), np.full((5, SIZE), 9.0)])
    assert np.abs(come_to(RULES["rfa"], updates, weights=[100, 100, 1, 1, 1, 1, 1])).max() < 1e-3
    assert np.abs(come_to(RULES["rfa"], updates) - 9).max() < 1e-3


def test_equal_updates_come_to_themselves() -> None:
    for name, strategy in RULES.items():
        np.testing.assert_allclose(come_to(strategy, np.tile(updates_of(1)[:1], (NUM_SITES, 1))), updates_of(1)[0], rtol=1e-12, err_msg=name)


def test_multi_krum_averages_as_many_as_it_is_told_and_no_more_than_are_safe() -> None:
    updates = updates_of(2)
    told = {"name": "multi-krum", "tolerated": 2, "selected": 3}
    np.testing.assert_allclose(come_to(told, updates), krum_by_hand(updates, 3), rtol=1e-12)
    np.testing.assert_allclose(come_to({**told, "selected": 50}, updates), krum_by_hand(updates, NUM_SITES - 4), rtol=1e-12)


@pytest.mark.parametrize("name", [*RULES, "norm-bounding"])
def test_updates_that_come_in_a_block_are_taken_as_alone(name: str) -> None:
    updates, weights = updates_of(4).astype(np.float32), list(range(1, NUM_SITES + 1))
    strategy = study_with(RULES.get(name, {"name": "norm-bounding", "max_update_norm": 2.0})).strategy
    alone, together = aggregator(strategy), aggregator(strategy)
    sites = [f"site-{row:02d}" for row in range(NUM_SITES)]
    for site, row, weight in zip(sites, updates, weights, strict=True):
        alone.add({"a": row[:2], "b": row[2:]}, weight, site=site)
    assert together.add_rows({"a": (2,), "b": (SIZE - 2,)}, updates, weights, sites=sites) == [None] * NUM_SITES
    assert alone.total_weight == together.total_weight == sum(weights)
    one, other = alone.take_mean(), together.take_mean()
    assert all(one[key].tobytes() == other[key].tobytes() for key in one)


def test_bounded_updates_count_for_no_more_than_the_bound() -> None:
    updates = updates_of(5) * np.array([[0.01], [1.0], *[[3.0]] * 9])
    bound = 1.5
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    assert (norms < bound).any() and (norms > bound).any()
    expected = (updates * np.minimum(1, bound / norms)).mean(axis=0)
    np.testing.assert_allclose(come_to({"name": "norm-bounding", "max_update_norm": bound}, updates), expected, rtol=1e-9)


def test_a_value_whose_distance_could_overflow_costs_its_site_the_round() -> None:
    rule = aggregator(study_with(RULES["krum"]).strategy)
    with pytest.raises(ProtocolError, match="larger ones"):
        rule.add({"w": np.array([1e200])}, 1, site="a")
    assert rule.total_weight == 0
    refusals = rule.add_rows({"w": (1,)}, np.array([[1.0], [np.nan], [2.0]]), [1, 1, 1], sites=["a", "b", "c"])
    assert [refusal is None for refusal in refusals] == [True, False, True]
    assert isinstance(rule, KeptUpdates) and rule.total_weight == 2


@pytest.mark.parametrize(("strategy", "least"), [("median", 3), ("trimmed-mean", 5), ("krum", 7), ("multi-krum", 7), ("bulyan", 11), ("rfa", 3)])
def test_a_study_of_fewer_sites_than_its_strategy_needs_is_refused_before_it_begins(strategy: str, least: int) -> None:
    study = study_with(RULES[strategy])
    assert study.strategy.least_updates == least
    with pytest.raises(ConfigurationError, match=f"strategy {strategy}: expected at least {least} sites asked in a round, got {least - 1}"):
        prepare(study.replace(federation={"sites": least - 1}), None)
    prepare(study.replace(federation={"sites": least}), None)
    with pytest.raises(ConfigurationError, match="sites asked in a round"):
        prepare(study.replace(federation={"sites": least}, strategy={**RULES[strategy], "fraction": 0.5}), None)
