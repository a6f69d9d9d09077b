"""The exact mean: against arithmetic in fractions, and bit for bit under every order and grouping of arrivals."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import aggregation
from server.aggregation import MAX_UPDATES, MAX_WEIGHT, ExactMean
from shared.errors import ProtocolError

EXPONENTS = st.integers(-40, 10)  # 1e-12 to 1e3
SIGNIFICANDS = st.integers(-(2**24) + 1, 2**24 - 1)


@st.composite
def float32_values(draw: st.DrawFn) -> float:
    """A float32 of magnitude 0 or about 1e-12 to 1e3, of either sign, with a full significand."""
    return float(np.float32(draw(SIGNIFICANDS) * 2.0 ** (draw(EXPONENTS) - 24)))


def updates_of(num_values: int) -> st.SearchStrategy[list[tuple[list[float], int]]]:
    values = st.lists(float32_values(), min_size=num_values, max_size=num_values)
    return st.lists(st.tuples(values, st.integers(1, 100_000)), min_size=1, max_size=12)


def mean_of(updates: list[tuple[list[float], int]], *, pause_after: int | None = None) -> bytes:
    mean = ExactMean()
    for index, (values, weight) in enumerate(updates):
        mean.add({"w": np.array(values, dtype=np.float32)}, weight)
        if index == pause_after:
            mean.mean()  # groups what came so far, and must change nothing
    return mean.mean()["w"].tobytes()


@given(updates=updates_of(3), data=st.data())
def test_the_mean_does_not_care_about_order_or_grouping(updates: list[tuple[list[float], int]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(updates))
    pause = data.draw(st.integers(0, len(updates) - 1))
    assert mean_of(updates) == mean_of(shuffled) == mean_of(shuffled, pause_after=pause)


@given(updates=updates_of(2))
def test_the_mean_is_the_exact_one_rounded(updates: list[tuple[list[float], int]]) -> None:
    got = np.frombuffer(mean_of(updates))
    total = sum(weight for _, weight in updates)
    for position, value in enumerate(got):
        exact = sum(Fraction(values[position]) * weight for values, weight in updates) / total
        assert abs(Fraction(float(value)) - exact) <= abs(exact) * Fraction(4, 2**53)


@given(value=st.floats(min_value=0, max_value=2.0**-40, width=32), weight=st.integers(1, 1000))
def test_smaller_values_are_off_by_less_than_the_grid(value: float, weight: int) -> None:
    mean = ExactMean()
    mean.add({"w": np.array([value, -value], dtype=np.float32)}, weight)
    assert np.abs(mean.mean()["w"] - [value, -value]).max() <= 2.0**-70


def test_one_update_comes_back_as_it_was_sent() -> None:
    update = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for weight in (1, 3, 199, 303, MAX_WEIGHT):
        mean = ExactMean()
        mean.add({"w": update}, weight)
        assert np.array_equal(mean.mean()["w"], update.astype(np.float64))


def test_a_float32_sum_would_not_pass_these_tests() -> None:
    """The oracle bites: the ordinary float32 sum of the same updates depends on their order."""
    rng = np.random.default_rng(1)
    updates = (rng.normal(size=(200, 50)) * 10.0 ** rng.integers(-6, 3, size=(200, 50))).astype(np.float32)
    assert not np.array_equal(np.add.reduce(updates, axis=0), np.add.reduce(updates[::-1], axis=0))
    forward, backward = ExactMean(), ExactMean()
    for row, other in zip(updates, updates[::-1], strict=True):
        forward.add({"w": row}, 7)
        backward.add({"w": other}, 7)
    assert np.array_equal(forward.mean()["w"], backward.mean()["w"])


def test_carries_are_moved_up_and_nothing_is_lost() -> None:
    count = MAX_UPDATES * 2 + 17
    values = np.float32([2.0**-21, -(2.0**-21), 1e-12, 0.3])  # fine parts near the top of their range, so that they must carry
    mean = ExactMean()
    for index in range(count):
        mean.add({"w": values * np.float32(1 + index % 2)}, 3)
    assert mean.total_weight == 3 * count
    ones = (count + 1) // 2
    for value, got in zip(values, mean.mean()["w"], strict=True):
        doubled = float(np.float32(value) * np.float32(2))
        exact = (Fraction(float(value)) * ones + Fraction(doubled) * (count - ones)) / count
        assert abs(Fraction(float(got)) - exact) <= abs(exact) * Fraction(4, 2**53)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1, 10**18])
def test_a_bad_weight_is_refused_and_adds_nothing(weight: int) -> None:
    mean = ExactMean()
    mean.add({"w": np.float32([1.0])}, 2)
    with pytest.raises(ProtocolError, match="weight"):
        mean.add({"w": np.float32([9.0])}, weight)
    assert (mean.total_weight, mean.mean()["w"].tolist()) == (2, [1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 2.0**31, -(2.0**31)])
def test_a_value_that_could_overflow_is_refused_and_adds_nothing(bad: float) -> None:
    mean = ExactMean()
    mean.add({"a": np.float32([1.0]), "b": np.float32([2.0])}, 5)
    with pytest.raises(ProtocolError, match="update b"):
        mean.add({"a": np.float32([7.0]), "b": np.float32([bad])}, 5)
    assert mean.total_weight == 5
    assert {name: value.tolist() for name, value in mean.mean().items()} == {"a": [1.0], "b": [2.0]}


def test_the_bound_is_on_weight_times_value() -> None:
    mean = ExactMean()
    mean.add({"w": np.float32([2.0**30])}, 1)
    with pytest.raises(ProtocolError, match="update w"):
        mean.add({"w": np.float32([2.0**30])}, 2)


def test_many_large_updates_never_wrap_around() -> None:
    """Each passes its own bound; together they would pass int64. Either the mean is right or the update is refused."""
    largest = np.float32([2147483520.0, -2147483520.0])
    mean = ExactMean()
    added = 0
    for _ in range(2 * MAX_UPDATES + 10):
        try:
            mean.add({"w": largest}, 1)
        except ProtocolError:
            break
        added += 1
    assert added >= 1000
    assert np.array_equal(mean.mean()["w"], largest.astype(np.float64))


def test_empty_scalar_and_large_arrays_have_their_shapes() -> None:
    mean = ExactMean()
    update = {"none": np.zeros((0, 4), np.float32), "scalar": np.float32([[1.5]])[0, 0].reshape(()), "large": np.ones((3, 1, 2), np.float32)}
    mean.add(update, 4)
    assert {name: value.shape for name, value in mean.mean().items()} == {"none": (0, 4), "scalar": (), "large": (3, 1, 2)}


def test_what_was_sent_is_not_written_to() -> None:
    update = np.float32([1.0, 2.0])
    update.setflags(write=False)
    mean = ExactMean()
    mean.add({"w": update}, 3)
    mean.mean()["w"][:] = 99.0
    assert mean.mean()["w"].tolist() == [1.0, 2.0]


def test_memory_does_not_grow_with_the_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "MAX_UPDATES", 4)
    mean = ExactMean()
    for _ in range(50):
        mean.add({"w": np.ones(10, np.float32)}, 1)
    assert mean._coarse.nbytes + mean._fine.nbytes == 2 * 10 * 8
    assert mean.mean()["w"].tolist() == [1.0] * 10


@given(updates=updates_of(3))
def test_many_rows_at_once_are_the_same_bits_as_one_after_another(updates: list[tuple[list[float], int]]) -> None:
    mean, shapes = ExactMean(), {"w": (2,), "b": ()}
    rows = np.array([values for values, _ in updates * 9], dtype=np.float32)
    assert not any(mean.add_rows(shapes, rows, [weight for _, weight in updates * 9]))
    one = ExactMean()
    for values, weight in updates * 9:
        one.add({"w": np.float32(values[:2]), "b": np.float32(values[2])}, weight)
    assert {name: value.tobytes() for name, value in mean.mean().items()} == {name: value.tobytes() for name, value in one.mean().items()}
    assert mean.total_weight == one.total_weight


def test_a_row_that_cannot_be_added_costs_nobody_else_anything() -> None:
    rows = np.float32([[1.0, 2.0], [np.nan, 0.0], [np.inf, 0.0], [1e9, 0.0], [3.0, 4.0], [5.0, 5.0]])
    mean = ExactMean()
    refusals = mean.add_rows({"w": (2,)}, rows, [1, 1, 1, 5, 1, 0])
    assert [refusal is None for refusal in refusals] == [True, False, False, False, True, False]
    assert mean.mean()["w"].tolist() == [2.0, 3.0]


@given(updates=updates_of(3))
def test_a_mean_in_the_memory_of_its_sum_is_the_same(updates: list[tuple[list[float], int]]) -> None:
    one, other = ExactMean(), ExactMean()
    for values, weight in updates:
        for mean in (one, other):
            mean.add({"w": np.float32(values)}, weight)
    assert one.mean()["w"].tobytes() == other.take_mean()["w"].tobytes()
