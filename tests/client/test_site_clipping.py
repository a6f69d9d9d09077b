"""A site clips its own update before it is rounded and masked: what it is in a sum is no longer than was promised, whatever the roundings."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.secure_updates import clipped_for_sum
from server.strategies.dp_fedavg import NoisedMean, SiteNoise
from shared.errors import ConfigurationError
from shared.noise import NoiseGrid
from shared.secure_sum.quantisation import FixedPoint
from shared.secure_sum.setting import SumForm
from shared.study import Study

KEYS = st.binary(min_size=32, max_size=32)


def form_of(size: int, max_norm: float, max_value: float = 10.0) -> SumForm:
    study = Study.from_table({
        "name": "s", "task": "t", "strategy": {"weights": "equal"}, "privacy": {"unit": "site", "epsilon": 8.0, "max_site_norm": max_norm},
        "secure_aggregation": {"max_value": max_value},
    })  # fmt: skip
    return SumForm.of_study(study, num_values=size, num_trainable=size)


def encoding_of(form: SumForm, num_sites: int) -> FixedPoint:
    return FixedPoint.finest(num_sites=num_sites, max_value=form.max_value, max_weight=form.max_weight)


def length(values: np.ndarray) -> float:
    return math.sqrt(math.fsum(value * value for value in values.tolist()))


@given(
    size=st.sampled_from([1, 2, 31, 500, 4096]), num_sites=st.sampled_from([3, 50, 127, 128, 1000]), scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e9]),
    max_norm=st.sampled_from([1e-6, 0.3, 1.0, 700.0]), max_value=st.sampled_from([1e-3, 10.0]), seed=st.integers(0, 2**32), key=KEYS,
)  # fmt: skip
def test_what_a_site_is_in_a_sum_is_no_longer_than_the_norm(
    size: int, num_sites: int, scale: float, max_norm: float, max_value: float, seed: int, key: bytes
) -> None:
    """Its words alone, read as what they add: at most S, roundings and arithmetic included; a short update stays as it is, but for its roundings."""
    rng, form = np.random.default_rng(seed), form_of(size, max_norm, max_value)
    encoding = encoding_of(form, num_sites)
    update = scale * max_norm * rng.choice([rng.normal(size=size), np.eye(1, size)[0], np.ones(size)])
    clipped = clipped_for_sum(update, max_norm, form)
    words = encoding.encode(clipped, 1, key=key)
    added, weight = encoding.decode(words, num_summed=1)
    assert weight == 1 and length(added) <= max_norm
    if length(update) < max_norm * (1 - 2e-3):
        assert clipped is update and np.abs(added - np.clip(update, -form.max_value, form.max_value)).max() <= encoding.step
    elif length(clipped) < length(update):
        assert length(clipped) > max_norm * (1 - 2e-3)  # little of the norm is given away
        np.testing.assert_allclose(clipped / length(clipped), update / length(update), atol=1e-9)


@given(
    size=st.sampled_from([1, 9, 300]), others=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e6]), min_size=2, max_size=6), scale=st.sampled_from([1e-3, 1.0, 1e6]),
    max_norm=st.sampled_from([1e-3, 0.5, 20.0]), seed=st.integers(0, 2**32), keys=st.lists(KEYS, min_size=7, max_size=7),
)  # fmt: skip
def test_one_site_moves_the_decoded_sum_by_at_most_the_norm_and_its_release_by_the_sensitivity(
    size: int, others: list[float], scale: float, max_norm: float, seed: int, keys: list[bytes]
) -> None:
    """Zero-out: the same sites in the sum, one of them with zeros. Masks cancel, so words are added without."""
    rng, form = np.random.default_rng(seed), form_of(size, max_norm)
    encoding, updates = encoding_of(form, len(others) + 1), [size_ * rng.normal(size=size) for size_ in [*others, scale]]
    words = [encoding.encode(clipped_for_sum(update, max_norm, form), 1, key=key) for update, key in zip(updates, keys, strict=False)]
    none = encoding.encode(np.zeros(size), 1, key=keys[len(others)])

    def decoded(last: np.ndarray) -> np.ndarray:
        return encoding.decode(np.sum([*words[:-1], last], axis=0, dtype=encoding.dtype), num_summed=len(words))[0]

    with_it, without = decoded(words[-1]), decoded(none)
    assert length(with_it - without) <= max_norm * (1 + 2**-40)  # the sums' own last bits
    grid = NoiseGrid.of(max_norm, size)
    assert length(np.rint(with_it / grid.spacing) - np.rint(without / grid.spacing)) * grid.spacing <= grid.sensitivity
    released = [
        NoisedMean(
            SiteNoise(max_norm=max_norm, noise_multiplier=2.0, released=frozenset({"w"}), seed=5), num_asked=len(words), fold=1, round_number=1
        ).release({"w": total.copy()})["w"]
        for total in (with_it, without)
    ]
    assert length(released[0] - released[1]) * len(words) <= grid.sensitivity * (1 + 2**-40)  # the same noise in both


def test_values_take_no_digits_beyond_the_norm() -> None:
    assert form_of(5, 0.5).max_value == 0.5 and form_of(5, 0.5, 0.1).max_value == 0.1
    fine, coarse = encoding_of(form_of(5, 0.5), 50), FixedPoint.finest(num_sites=50, max_value=10.0, max_weight=1)
    assert fine.step == pytest.approx(coarse.step / 20) and fine.num_bytes == coarse.num_bytes == 4


def test_the_bound_does_not_depend_on_who_else_is_in_the_sum() -> None:
    """A round that is begun anew with fewer sites has the same input of this one: two sums never differ by one of them."""
    assert all(encoding_of(form_of(5, 0.5), sites).step * (1 + 2**-19) <= 0.5 * 2.0**-24 * (1 + 2**-27) for sites in range(3, 1001))


def test_more_values_than_a_norm_has_steps_for_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"privacy\.max_site_norm: expected a norm that rounding leaves something of"):
        clipped_for_sum(np.ones(3), 1.0, form_of(2**48, 1.0))
