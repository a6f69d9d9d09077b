"""The parts of a secure sum, each held against arithmetic of its own: shares, masks, fixed point, graph, keys and messages."""

import itertools
import math
import random
from collections import deque
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import hypergeom

from shared.errors import ConfigurationError, ProtocolError, SealError
from shared.secure_sum.agreement import PairKeys, RoundSecrets, keys_statement, open_shares, public_key, seal_shares, verify_keys
from shared.secure_sum.graph import COMPLETE_UP_TO, CORRECTNESS_BITS, SECURITY_BITS, GraphPlan, neighbours, plan_graph
from shared.secure_sum.masks import BLOCK_BYTES, add_masks, stream_words
from shared.secure_sum.messages import AdvertisedKeys, AdvertiseKeysTask, Unmasked
from shared.secure_sum.quantisation import EXTRA_WORDS, FixedPoint
from shared.secure_sum.setting import SumForm, SumRound, SumSetting, least_threshold
from shared.secure_sum.sharing import PRIME, SHARE_BYTES, restore_secret, split_secret

OF = SumRound(run="r", study_hash="h", fold=1, round=1)
FORM = SumForm(num_values=3, max_value=1.0, max_weight=10)
SETTING = SumSetting(of=OF, sites=("a", "b", "c"), threshold=3, form=FORM)


# --- Shamir


@given(
    secret=st.binary(min_size=32, max_size=32), holders=st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True),
    data=st.data(), seed=st.integers(0, 2**32),
)  # fmt: skip
@example(secret=b"\xff" * 32, holders=[1, 2, 3], data=None, seed=0)
def test_any_threshold_of_the_shares_restores_the_secret(secret: bytes, holders: list[int], data: st.DataObject | None, seed: int) -> None:
    threshold = data.draw(st.integers(1, len(holders))) if data else 2
    shares = split_secret(secret, holders, threshold=threshold, random_bytes=random.Random(seed).randbytes)
    chosen = random.Random(seed).sample(holders, threshold)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    assert restore_secret({holder: shares[holder] for holder in chosen}, threshold=threshold) == secret
    with pytest.raises(ProtocolError):
        restore_secret({holder: shares[holder] for holder in chosen[1:]}, threshold=threshold)


def test_fewer_shares_fit_every_secret() -> None:
    """With t - 1 shares fixed, for any other secret there is exactly one polynomial that gives these shares: they say nothing."""
    shares = split_secret(bytes(32), (1, 2, 3), threshold=3, random_bytes=random.Random(1).randbytes)
    first, second = (int.from_bytes(shares[holder], "big") for holder in (1, 2))
    for other in (0, 1, 2**256 - 1):
        third = (other - 3 * first + 3 * second) % PRIME  # Lagrange at 0 on 1, 2, 3 has weights 3, -3, 1
        forged = {1: shares[1], 2: shares[2], 3: third.to_bytes(SHARE_BYTES, "big")}
        assert restore_secret(forged, threshold=3) == other.to_bytes(32, "big")


def test_the_field_is_a_prime_s() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7))
    value = 4  # Lucas and Lehmer: the proof for a Mersenne number
    for _ in range(519):
        value = (value * value - 2) % PRIME
    assert value == 0


def test_a_share_of_another_secret_is_found_out() -> None:
    shares = split_secret(bytes(32), (1, 2, 3), threshold=2, random_bytes=random.Random(1).randbytes)
    with pytest.raises(ProtocolError, match="do not fit"):
        restore_secret({1: shares[1], 2: bytes(SHARE_BYTES)}, threshold=2)


# --- masks


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("count", [0, 1, 5, BLOCK_BYTES // 4 + 3, BLOCK_BYTES // 2])
def test_masks_are_the_keystream_of_chacha20_and_come_off_again(dtype: str, count: int) -> None:
    keys = [bytes([number]) * 32 for number in range(4)]
    plain = np.arange(count).astype(dtype) * np.array(0x9E3779B9, dtype)
    streams = [
        np.frombuffer(Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(count * plain.itemsize)), dtype) for key in keys
    ]
    words = plain.copy()
    add_masks(words, plus=keys[:3], minus=keys[3:])
    assert words.tolist() == (plain + streams[0] + streams[1] + streams[2] - streams[3]).tolist()
    add_masks(words, plus=keys[3:], minus=keys[:3])
    assert words.tolist() == plain.tolist()


# --- fixed point

ENCODINGS = st.builds(
    FixedPoint.finest,
    num_sites=st.integers(1, 1000), max_value=st.floats(1e-6, 1e6), max_weight=st.integers(1, 10**7), least_levels=st.integers(1, 2**44),
)  # fmt: skip


@given(encoding=ENCODINGS)
@example(encoding=FixedPoint(num_sites=1, max_value=1.0, max_weight=1, levels=127))
@example(encoding=FixedPoint(num_sites=1, max_value=1.0, max_weight=1, levels=128))
def test_the_modulus_is_the_smallest_that_cannot_wrap(encoding: FixedPoint) -> None:
    largest = encoding.num_sites * max(encoding.levels, encoding.max_weight)
    assert 2 ** (8 * encoding.num_bytes - 9) <= largest < 2 ** (8 * encoding.num_bytes - 1) or encoding.num_bytes == 1


@given(encoding=ENCODINGS, sign=st.sampled_from([-1.0, 1.0]), num_summed=st.integers(1, 8))
def test_the_largest_sum_there_is_comes_back(encoding: FixedPoint, sign: float, num_summed: int) -> None:
    """All sites at the end of the range with the largest weight: what would wrap first, and is a whole number of levels, so exact."""
    values = np.array([sign * encoding.max_value, -sign * 2 * encoding.max_value, 0.0])
    one = encoding.encode(values, encoding.max_weight, key=bytes(32))
    for count in {min(num_summed, encoding.num_sites), encoding.num_sites}:
        total = one * one.dtype.type(count)
        decoded, weight = encoding.decode(encoding.unpack(encoding.pack(total), 3), num_summed=count)
        expected = count * encoding.levels * encoding.step * sign
        assert decoded.tolist() == pytest.approx([expected, -expected, 0.0], rel=1e-12)
        assert weight == count * encoding.max_weight


@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30), weight=st.integers(1, 500), seed=st.binary(min_size=32, max_size=32),
    least_levels=st.sampled_from([1, 100, 2**20, 2**40]),
)  # fmt: skip
def test_a_rounding_is_one_of_the_two_neighbours(values: list[float], weight: int, seed: bytes, least_levels: int) -> None:
    encoding = FixedPoint.finest(num_sites=20, max_value=1.5, max_weight=500, least_levels=least_levels)
    signed = encoding._signed(encoding.encode(np.array(values, np.float32), weight, key=seed))[:-EXTRA_WORDS]
    for value, rounded in zip(values, signed.tolist(), strict=True):
        exact = Fraction(min(max(value, -1.5), 1.5)) * weight * encoding.levels / (Fraction(3, 2) * 500)
        slack = Fraction(encoding.levels, 2**51)
        assert math.floor(exact - slack) <= rounded <= math.ceil(exact + slack)
        assert abs(rounded) <= encoding.levels


def test_rounding_is_unbiased_and_of_the_variance_of_a_coin() -> None:
    """400,000 roundings of a value at 0.3 of a step: mean and variance within five standard errors, a false alarm in 1,700,000 each."""
    encoding, count = FixedPoint(num_sites=10, max_value=1.0, max_weight=1, levels=1000), 400_000
    values = np.full(count, 0.0123)
    rounded = encoding._signed(encoding.encode(values, 1, key=b"k" * 32))[:-EXTRA_WORDS].astype(float)
    coin = 0.3 * 0.7
    assert abs(rounded.mean() - 12.3) < 5 * math.sqrt(coin / count)
    assert abs(rounded.var() - coin) < 5 * math.sqrt(coin * (1 - 4 * coin) / count)
    assert abs(np.corrcoef(rounded[1:], rounded[:-1])[0, 1]) < 5 / math.sqrt(count)


@pytest.mark.parametrize(("values", "weight"), [([math.nan], 1), ([math.inf], 1), ([0.0], 0), ([0.0], -1), ([0.0], 11)])
def test_what_is_no_input_is_refused(values: list[float], weight: int) -> None:
    with pytest.raises(ProtocolError):
        FixedPoint.finest(num_sites=3, max_value=1.0, max_weight=10).encode(np.array(values), weight, key=bytes(32))


def test_a_sum_that_was_unmasked_wrongly_is_no_sum() -> None:
    """The count of a random word fits for one key in 2**32; these keys are fixed."""
    encoding = FixedPoint.finest(num_sites=3, max_value=1.0, max_weight=10)
    words = sum(encoding.encode(np.zeros(2), 5, key=bytes(32)) for _ in range(3))
    assert encoding.decode(words, num_summed=3)[1] == 15
    for wrong in (words * np.uint32(2), words + stream_words(b"x" * 32, 4)):
        with pytest.raises(ProtocolError, match="none"):
            encoding.decode(wrong, num_summed=3)


@pytest.mark.parametrize("payload", [np.zeros(15, np.uint8), np.zeros(17, np.uint8), np.zeros(16, np.int8), np.zeros((4, 4), np.uint8)])
def test_a_payload_of_another_length_or_type_is_refused(payload: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="uint8"):
        FixedPoint.finest(num_sites=3, max_value=1.0, max_weight=10).unpack(payload, 2)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_range_must_be_one(bound: float) -> None:
    with pytest.raises(ConfigurationError):
        FixedPoint.finest(num_sites=3, max_value=bound, max_weight=10)
    with pytest.raises(ConfigurationError):
        FixedPoint.finest(num_sites=1000, max_value=1.0, max_weight=2**55)


# --- the graph

CASES = [(129, 65, 25), (200, 101, 40), (200, 180, 40), (500, 334, 100), (1000, 501, 200), (500, 251, 0), (300, 200, 10)]


@pytest.mark.parametrize(("num_sites", "threshold", "colluding"), CASES)
def test_the_three_failures_are_as_rare_as_promised(num_sites: int, threshold: int, colluding: int) -> None:
    """scipy's hypergeometric law as the oracle; one degree less, or a higher share threshold, and a bound does not hold."""
    dropped = num_sites - threshold

    def holds(degree: int, share_threshold: int) -> tuple[bool, bool]:
        curious = num_sites * hypergeom.sf(share_threshold - 1, num_sites - 1, colluding, degree)
        cut = math.comb(num_sites, 2) * hypergeom.pmf(degree, num_sites, colluding + dropped, degree)
        lost = num_sites * hypergeom.sf(degree - share_threshold, num_sites - 1, dropped, degree)
        return curious + cut < 2.0**-SECURITY_BITS, lost < 2.0**-CORRECTNESS_BITS

    plan = plan_graph(num_sites, threshold, colluding)
    assert plan.degree < num_sites - 1
    assert holds(plan.degree, plan.share_threshold) == (True, True)
    assert not holds(plan.degree, plan.share_threshold + 1)[1]
    assert not any(all(holds(plan.degree - 2, share_threshold)) for share_threshold in range(1, plan.degree))


@pytest.mark.parametrize(("num_sites", "degree", "share_threshold"), [(200, 120, 41), (300, 164, 58), (500, 224, 80), (1000, 306, 110)])
def test_the_table_of_the_documentation(num_sites: int, degree: int, share_threshold: int) -> None:
    assert plan_graph(num_sites, least_threshold(num_sites), num_sites // 5) == GraphPlan(degree=degree, share_threshold=share_threshold)


@pytest.mark.parametrize("num_sites", [3, 4, 10, COMPLETE_UP_TO])
def test_a_small_graph_is_complete_and_its_shares_need_the_threshold(num_sites: int) -> None:
    plan = plan_graph(num_sites, least_threshold(num_sites), num_sites // 5)
    assert (plan.degree, plan.share_threshold) == (num_sites - 1, least_threshold(num_sites))


@given(num_sites=st.integers(3, 40), half=st.integers(1, 20), seed=st.binary(min_size=32, max_size=32))
def test_a_graph_is_regular_and_mutual(num_sites: int, half: int, seed: bytes) -> None:
    sites = [f"s{number}" for number in range(num_sites)]
    degree = min(2 * half, num_sites - 1)
    near = neighbours(sites, seed=seed, degree=degree if degree % 2 == 0 or degree == num_sites - 1 else degree - 1)
    assert len({len(others) for others in near.values()}) == 1
    assert all(name in near[other] and name != other for name, others in near.items() for other in others)
    assert near == neighbours(reversed(sites), seed=seed, degree=len(near["s0"]))


def _connected(near: dict[str, tuple[str, ...]], stay: set[str]) -> bool:
    seen, queue = set(), deque(sorted(stay)[:1])
    while queue:
        name = queue.popleft()
        if name not in seen:
            seen.add(name)
            queue.extend(other for other in near[name] if other in stay)
    return seen == stay


def test_a_cut_needs_two_runs_of_half_the_degree() -> None:
    """Every subset of nine sites on a ring of degree 4: where those that stay fall apart, two runs of two or more are missing."""
    sites = [f"s{number}" for number in range(9)]
    near = neighbours(sites, seed=bytes(32), degree=4)
    ring = _ring(near)
    for stays in itertools.product((False, True), repeat=9):
        stay = {name for name, here in zip(ring, stays, strict=True) if here}
        turned = stays[stays.index(True) :] + stays[: stays.index(True)] if any(stays) else ()
        runs = [len(list(group)) for here, group in itertools.groupby(turned) if not here]
        if not _connected(near, stay):
            assert sum(run >= 2 for run in runs) >= 2


def _ring(near: dict[str, tuple[str, ...]]) -> list[str]:
    """The places of a ring of degree 4: next to each other are who share two neighbours beside themselves."""
    ring = [min(near)]
    while len(ring) < len(near):
        here = ring[-1]
        closest = [other for other in near[here] if len(set(near[here]) & set(near[other])) == 2]
        ring.append(next(other for other in sorted(closest) if other not in ring[-2:]))
    return ring


def test_places_on_the_ring_are_drawn_evenly() -> None:
    """Whether a is next to b on a ring of five (degree 2): one in two, over 4,000 seeds within five standard errors (a false alarm in 1,700,000)."""
    sites = list("abcde")
    found = sum("b" in neighbours(sites, seed=number.to_bytes(32, "big"), degree=2)["a"] for number in range(4000))
    assert abs(found / 4000 - 0.5) < 5 * 0.5 / math.sqrt(4000)


# --- keys


def _advertised(signer: Ed25519PrivateKey, setting: SumSetting = SETTING, name: str = "a") -> AdvertisedKeys:
    fields = {"mask_key": "11" * 32, "share_key": "22" * 32, "self_mask": "33" * 32}
    return AdvertisedKeys(of=setting.of, name=name, signature=signer.sign(keys_statement(setting, name, **fields)).hex(), **fields)


def test_a_signature_is_good_for_one_site_and_one_setting() -> None:
    signer = Ed25519PrivateKey.generate()
    roster = {name: signer.public_key() for name in "ab"}  # the same key under two names, so that only the statement tells
    keys = _advertised(signer)
    verify_keys(keys, SETTING, roster)
    others = [
        keys.model_copy(update={"name": "b"}), keys.model_copy(update={"name": "x"}), keys.model_copy(update={"mask_key": "44" * 32}),
        keys.model_copy(update={"share_key": "44" * 32}), keys.model_copy(update={"self_mask": "44" * 32}), _advertised(Ed25519PrivateKey.generate()),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(SealError):
            verify_keys(other, SETTING, roster)
    settings_of_others = [
        SumSetting(of=OF.model_copy(update=change), sites=SETTING.sites, threshold=3, form=FORM)
        for change in ({"run": "q"}, {"study_hash": "q"}, {"fold": 2}, {"round": 2})
    ]
    settings_of_others += [
        SumSetting(of=OF, sites=("a", "b", "d"), threshold=3, form=FORM),
        SumSetting(of=OF, sites=SETTING.sites, threshold=3, form=SumForm(num_values=3, max_value=1.0, max_weight=11)),
        SumSetting(of=OF, sites=SETTING.sites, threshold=3, form=SumForm(num_values=3, max_value=1.5, max_weight=10)),
        SumSetting(of=OF, sites=SETTING.sites, threshold=3, form=SumForm(num_values=4, max_value=1.0, max_weight=10)),
    ]
    for setting in settings_of_others:
        with pytest.raises(SealError):
            verify_keys(keys, setting, roster)
    four = SumSetting(of=OF, sites=("a", "b", "c", "d"), threshold=3, form=FORM)
    assert four.digest != SumSetting(of=OF, sites=four.sites, threshold=4, form=FORM).digest


def test_two_sites_agree_on_keys_that_differ_by_purpose_and_direction() -> None:
    draw = random.Random(1).randbytes
    mine, theirs = RoundSecrets.draw(draw), RoundSecrets.draw(draw)
    here, there = PairKeys(SETTING, "a", mine.mask_key), PairKeys(SETTING, "b", theirs.mask_key)
    of_here, of_there = public_key(mine.mask_key).hex(), public_key(theirs.mask_key).hex()
    keys = [here.mask("b", of_there, "m"), here.shares("b", of_there, sender="a"), here.shares("b", of_there, sender="b")]
    assert keys == [there.mask("a", of_here, "m"), there.shares("a", of_here, sender="a"), there.shares("a", of_here, sender="b")]
    elsewhere = PairKeys(replace(SETTING, of=OF.model_copy(update={"round": 2})), "a", mine.mask_key)
    assert len({*keys, elsewhere.mask("b", of_there, "m"), here.mask("b", of_there, "n")}) == 5
    with pytest.raises(ProtocolError, match="agrees with nobody"):
        here.mask("b", "00" * 32, "m")


def test_sealed_shares_open_for_one_receiver_from_one_sender() -> None:
    seed, key = b"s" * SHARE_BYTES, b"k" * SHARE_BYTES
    sealed = seal_shares(bytes(32), seed, key, setting=SETTING, sender="a", receiver="b")
    assert open_shares(bytes(32), sealed, setting=SETTING, sender="a", receiver="b") == (seed, key)
    altered = sealed[:-1] + ("0" if sealed[-1] != "0" else "1")
    for key_used, text, sender, receiver in ((bytes(32), altered, "a", "b"), (b"x" * 32, sealed, "a", "b"), (bytes(32), sealed, "b", "a")):
        with pytest.raises(SealError):
            open_shares(key_used, text, setting=SETTING, sender=sender, receiver=receiver)


def test_key_material_is_in_no_repr() -> None:
    secrets = RoundSecrets(mask_key=b"m" * 32, share_key=b"s" * 32, self_mask=b"b" * 32)
    share = "ab" * SHARE_BYTES
    reply = Unmasked(of=OF, name="a", self_masks={"a": share}, mask_keys={})
    for text in (repr(secrets), str(secrets), repr(reply), str(reply), f"{reply}"):
        assert not any(secret in text for secret in ("mmm", "sss", "bbb", "abab"))


# --- messages and settings


@pytest.mark.parametrize(
    "change",
    [{"sites": ("a", "b")}, {"sites": ("b", "a", "c")}, {"sites": ("a", "a", "b")}, {"sites": ("a", "b", "c" * 201)}, {"sites": ("a", "b", "c/")},
     {"threshold": 2}, {"threshold": 1001}, {"more": 1}, {"sites": tuple(f"s{number:04}" for number in range(1001))}],
)  # fmt: skip
def test_a_message_has_its_declared_form(change: dict) -> None:
    good = {"of": OF.model_dump(), "sites": ("a", "b", "c"), "threshold": 3}
    task = AdvertiseKeysTask.model_validate(good)
    assert AdvertiseKeysTask.model_validate_json(task.model_dump_json()) == task
    assert task.model_dump_json().startswith('{"kind":"advertise-keys"')  # where `shared.messages.decode` looks for it
    with pytest.raises(ValidationError):
        AdvertiseKeysTask.model_validate(good | change)


@given(num_sites=st.integers(3, 1000))
@settings(max_examples=30)
def test_a_threshold_is_more_than_half_and_at_least_three(num_sites: int) -> None:
    least = least_threshold(num_sites)
    assert least >= 3 and 2 * least > num_sites
    assert least == 3 or 2 * (least - 1) <= num_sites
    sites = tuple(f"s{number:04}" for number in range(num_sites))
    for wrong in (least - 1, num_sites + 1):
        with pytest.raises(ConfigurationError):
            SumSetting(of=OF, sites=sites, threshold=wrong, form=FORM)
