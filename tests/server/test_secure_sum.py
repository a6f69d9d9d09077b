"""Whole secure sums in memory: the right sum or a named failure, and what sites refuse to a server that does not follow the protocol.

Every message goes through its JSON. Randomness is seeded; where a site rounded its input is known from what it drew, so that sums are compared exactly.
"""

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

import client.secure_sum
import server.secure_sum
from client.secure_sum import UNBOUND, Bound, SumSite
from server.secure_sum import STAGES, SecureSum, Stage
from shared.clipped_updates import clipped_updates
from shared.errors import BoundToSumError, PolicyRefusedError, ProtocolError, QuorumLostError, SealError, StorageError, WardroundError
from shared.messages import Content
from shared.secure_sum.agreement import keys_statement, survivors_statement
from shared.secure_sum.graph import GraphPlan
from shared.secure_sum.messages import (
    AdvertisedKeys,
    AdvertiseKeysTask,
    MaskedInput,
    MaskInputTask,
    SharedKeys,
    ShareKeysTask,
    SignedSurvivors,
    SignSurvivorsTask,
    Unmasked,
    UnmaskTask,
)
from shared.secure_sum.quantisation import EXTRA_WORDS
from shared.secure_sum.setting import SumForm, SumRound, SumSetting, least_threshold
from shared.secure_sum.sharing import PRIME, SHARE_BYTES, restore_secret

OF = SumRound(run="r", study_hash="h", fold=1, round=1)
FORM = SumForm(num_values=5, max_value=1.0, max_weight=100)


class Draws:
    """Seeded random bytes that remember what was drawn last."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.last = b""

    def __call__(self, count: int) -> bytes:
        self.last = self._random.randbytes(count)
        return self.last


@dataclass
class Federation:
    """Sites with inputs, and one round among them."""

    num_sites: int
    threshold: int
    form: SumForm = FORM
    seed: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f"s{number:03}" for number in range(self.num_sites)]
        self.names = tuple(names)
        self.signers = {name: Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")) for number, name in enumerate(names)}
        self.roster = {name: signer.public_key() for name, signer in self.signers.items()}
        self.draws = {name: Draws(self.seed * 1000 + number) for number, name in enumerate(names)}
        self.sites = {name: self.site(name) for name in names}
        rng = np.random.default_rng(self.seed)
        self.values = {name: rng.uniform(-1, 1, self.form.num_values) * self.form.max_value for name in names}
        self.setting = SumSetting(of=OF, sites=self.names, threshold=self.threshold, form=self.form)
        self.server = SecureSum(self.setting, roster=self.roster, random_bytes=Draws(self.seed))
        self.masked: dict[str, np.ndarray] = {}
        self.rounding: dict[str, bytes] = {}

    def site(self, name: str) -> SumSite:
        return SumSite(
            name, self.form, run=OF.run, study_hash=OF.study_hash, sign=self.signers[name].sign, roster=self.roster, random_bytes=self.draws[name]
        )

    def weight(self, name: str) -> int:
        return self.weights.get(name, 1 + int(name[1:]) % self.form.max_weight)

    def answer(self, name: str, task: Content) -> tuple[Content, np.ndarray | None]:
        """What the site says; both messages go through JSON."""
        site, task = self.sites[name], type(task).model_validate_json(task.model_dump_json())
        payload = None
        if isinstance(task, AdvertiseKeysTask):
            reply: Content = site.advertise_keys(task)
        elif isinstance(task, ShareKeysTask):
            reply = site.share_keys(task)
        elif isinstance(task, MaskInputTask):
            reply, payload = site.mask_input(task, self.values[name], self.weight(name))
            self.masked[name], self.rounding[name] = payload.copy(), self.draws[name].last
        elif isinstance(task, SignSurvivorsTask):
            reply = site.sign_survivors(task)
        else:
            assert isinstance(task, UnmaskTask)
            reply = site.unmask(task)
        return type(reply).model_validate_json(reply.model_dump_json()), payload

    def stage(self, *, lost: frozenset[str] = frozenset(), refusals: bool = False) -> None:
        """Ask everybody but the lost, and close the stage."""
        for name, task in self.server.tasks().items():
            if name not in lost:
                try:
                    self.server.take(name, *self.answer(name, task))
                except WardroundError:
                    if not refusals:
                        raise
        self.server.close_stage()

    def until(self, stage: Stage, lost: Mapping[Stage, frozenset[str]] = {}) -> None:
        while self.server.stage < stage:
            self.stage(lost=lost.get(self.server.stage, frozenset()))

    def quantised(self, names: tuple[str, ...]) -> tuple[np.ndarray, int]:
        """The sum of what these sites rounded their inputs to, in whole numbers."""
        encoding = self.setting.encoding
        words = [encoding._signed(encoding.encode(self.values[name], self.weight(name), key=self.rounding[name])) for name in names]
        total = np.sum([word.astype(object) for word in words], axis=0)
        return total[:-EXTRA_WORDS], int(total[-2])


def check_sum(federation: Federation, expected: tuple[str, ...]) -> None:
    """Exactly the sum of the rounded inputs, and the plain sum to the error bound."""
    total, encoding = federation.server.total, federation.setting.encoding
    rounded, weight = federation.quantised(expected)
    assert total.sites == expected
    assert total.weight == weight == sum(federation.weight(name) for name in expected)
    assert total.values.tolist() == [float(value) * encoding.step for value in rounded]
    plain = sum(federation.values[name] * federation.weight(name) for name in expected)
    assert np.abs(total.values - plain).max(initial=0.0) < encoding.largest_error(len(expected))
    assert np.abs(total.mean() - plain / weight).max(initial=0.0) < encoding.largest_error(len(expected)) / weight + 1e-12


def lost_by_stage(names: tuple[str, ...], when: list[int]) -> dict[Stage, frozenset[str]]:
    return {stage: frozenset(name for name, at in zip(names, when, strict=True) if at == stage) for stage in STAGES}


# --- the sum


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    when=st.lists(st.sampled_from([*STAGES, Stage.DONE, Stage.DONE, Stage.DONE, Stage.DONE]), min_size=3, max_size=9),
    data=st.data(), seed=st.integers(0, 10**6),
    form=st.builds(SumForm, num_values=st.integers(0, 9), max_value=st.floats(1e-3, 1e3), max_weight=st.sampled_from([1, 100, 10**7, 2**40])),
)  # fmt: skip
def test_a_round_gives_the_exact_sum_of_who_stayed_or_fails_by_name(when: list[int], data: st.DataObject, seed: int, form: SumForm) -> None:
    """Sites are lost at any stage; the sum is of those whose masked input came, and below the threshold nothing is."""
    threshold = data.draw(st.integers(least_threshold(len(when)), len(when)))
    names = tuple(f"s{number:03}" for number in range(len(when)))
    weights = {name: data.draw(st.integers(1, form.max_weight)) for name in names}
    federation = Federation(len(when), threshold, form=form, seed=seed, weights=weights)
    lost = lost_by_stage(names, when)
    if sum(at == Stage.DONE for at in when) < threshold:
        with pytest.raises(QuorumLostError):
            federation.until(Stage.DONE, lost)
        assert federation.server.stage == Stage.FAILED
        with pytest.raises(AssertionError):
            _ = federation.server.total
    else:
        federation.until(Stage.DONE, lost)
        check_sum(federation, tuple(name for name, at in zip(names, when, strict=True) if at >= Stage.SIGN_SURVIVORS))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(when=st.lists(st.sampled_from([*STAGES, *[Stage.DONE] * 12]), min_size=9, max_size=14), seed=st.integers(0, 10**6))
@example(when=[Stage.DONE] * 10, seed=0)
@example(when=[Stage.MASK_INPUT, *[Stage.DONE] * 10], seed=0)
def test_a_sparse_graph_gives_the_same_sum(when: list[int], seed: int) -> None:
    """Degree 4, any 3 of 5 holders: where too many of a site's neighbours are lost the round fails by name, and else the sum is exact."""
    names = tuple(f"s{number:03}" for number in range(len(when)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (client.secure_sum, server.secure_sum):
            patch.setattr(module, "plan_graph", lambda count, threshold, colluding: GraphPlan(degree=4, share_threshold=3))
        federation = Federation(len(when), least_threshold(len(when)), seed=seed)
        lost = lost_by_stage(names, when)
        try:
            while federation.server.stage < Stage.DONE:
                federation.stage(lost=lost.get(federation.server.stage, frozenset()), refusals=True)
        except (QuorumLostError, ProtocolError):
            assert any(at != Stage.DONE for at in when)
            assert federation.server.stage == Stage.FAILED
        else:
            check_sum(federation, federation.server.total.sites)


@pytest.mark.slow
def test_a_large_round_on_the_graph_that_its_size_asks_for() -> None:
    """140 sites, of which a tenth are lost at each of the last three stages."""
    federation = Federation(140, 71)
    gone = [frozenset(federation.names[start::10]) for start in (0, 1, 2)]
    federation.until(Stage.DONE, {Stage.MASK_INPUT: gone[0], Stage.SIGN_SURVIVORS: gone[1], Stage.UNMASK: gone[2]})
    assert len(federation.server._neighbours["s000"]) < 139
    check_sum(federation, tuple(name for name in federation.names if name not in gone[0]))


def test_what_a_site_sends_is_uniform_beside_what_it_has() -> None:
    """Equal inputs of zero: 40,000 masked bytes a site are as even as chance has it (chi squared, 255 degrees, below 375: a false alarm in a million)."""
    form = SumForm(num_values=10_000, max_value=1.0, max_weight=1)
    federation = Federation(3, 3, form=form, weights=dict.fromkeys(("s000", "s001", "s002"), 1))
    federation.values = {name: np.zeros(10_000) for name in federation.names}
    federation.until(Stage.DONE)
    for payload in [*federation.masked.values(), federation.masked["s000"] - federation.masked["s001"]]:
        counts = np.bincount(payload, minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 375
    assert federation.server.total.values.tolist() == [0.0] * 10_000


def test_seeded_randomness_gives_the_same_messages_and_fresh_randomness_others() -> None:
    payloads = []
    for seed in (1, 1, 2):
        federation = Federation(4, 3, seed=seed)
        federation.values = {name: np.zeros(5) for name in federation.names}
        federation.until(Stage.UNMASK)
        payloads.append(federation.masked["s000"].tobytes())
    assert payloads[0] == payloads[1] != payloads[2]


def test_a_site_s_log_tells_how_much_of_its_update_was_clipped(caplog: pytest.LogCaptureFixture) -> None:
    federation = Federation(3, 3)
    federation.values["s001"] = np.array([-7.0, 0.5, 1.0, 1.5, 0.0])
    federation.until(Stage.DONE)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("site s001: secure sum of round 1 of fold 1: 2 of 5 values of its update were beyond 1 ")
    found = clipped_updates([said, "site s001: another line", said])
    assert found is not None and (found.sites, found.rounds, found.share, found.max_value) == (1, 1, 0.4, 1.0)
    federation.values["s001"] = np.array([-1.0, 0.5, 1.0, 1.0, 0.0])
    check_sum(federation, federation.names)


# --- what reaches the server


def test_nothing_is_restored_of_a_round_that_lost_its_quorum() -> None:
    """At each stage: below the threshold the round is over, all that came is forgotten, and no later answer is taken."""
    for stage in STAGES:
        federation = Federation(5, 4)
        federation.until(stage)
        replies = {name: federation.answer(name, task) for name, task in federation.server.tasks().items()}
        for name in federation.names[:3]:
            federation.server.take(name, *replies[name])
        with pytest.raises(QuorumLostError, match=stage.name):
            federation.server.close_stage()
        kept = federation.server
        assert kept.stage == Stage.FAILED
        assert (kept._self_masks, kept._mask_keys, kept._sealed, kept._sum.size) == ({}, {}, {}, 0)
        with pytest.raises(ProtocolError):
            kept.take("s003", *replies["s003"])


def test_the_server_never_holds_both_secrets_of_a_site_nor_a_single_input() -> None:
    federation = Federation(6, 4)
    federation.until(Stage.UNMASK, {Stage.MASK_INPUT: frozenset({"s001"}), Stage.UNMASK: frozenset({"s002"})})
    held = federation.server._sum.copy()
    assert all(federation.setting.encoding.unpack(payload, 5).tolist() != held.tolist() for payload in federation.masked.values())
    for name, task in federation.server.tasks().items():
        reply, _ = federation.answer(name, task)
        assert isinstance(reply, Unmasked)
        assert set(reply.self_masks) == set(federation.names) - {"s001"} and set(reply.mask_keys) == {"s001"}
        federation.server.take(name, reply)
    assert set(federation.server._mask_keys) == {"s001"}
    assert set(federation.server._self_masks) == set(federation.names) - {"s001"}


def test_a_late_input_is_refused_and_stays_masked() -> None:
    """The self-mask is there for this: when the server knows the mask key of a site that was slow, its input must say nothing still."""
    federation = Federation(5, 3)
    federation.until(Stage.MASK_INPUT)
    late = federation.answer("s004", federation.server.tasks()["s004"])
    federation.stage(lost=frozenset({"s004"}))
    with pytest.raises(ProtocolError, match="s004"):
        federation.server.take("s004", *late)
    federation.until(Stage.DONE)
    check_sum(federation, federation.names[:4])


BAD_REPLIES: dict[str, Callable[[Content], Content]] = {
    "of another round": lambda reply: reply.model_copy(update={"of": OF.model_copy(update={"round": 2})}),
    "of another study": lambda reply: reply.model_copy(update={"of": OF.model_copy(update={"study_hash": "other"})}),
    "of another run": lambda reply: reply.model_copy(update={"of": OF.model_copy(update={"run": "other"})}),
    "under another name": lambda reply: reply.model_copy(update={"name": "s001"}),
    "of another stage": lambda reply: MaskedInput(of=OF, name="s000") if not isinstance(reply, MaskedInput) else SharedKeys(of=OF, name="s000", shares={}),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", BAD_REPLIES)
def test_a_wrong_reply_costs_its_site_the_round_and_nobody_else(stage: Stage, what: str) -> None:
    federation = Federation(5, 3)
    federation.until(stage)
    for name, task in federation.server.tasks().items():
        reply, payload = federation.answer(name, task)
        if name == "s000":
            with pytest.raises(ProtocolError, match="s000"):
                federation.server.take(name, BAD_REPLIES[what](reply), payload)
            with pytest.raises(ProtocolError, match="out"):
                federation.server.take(name, reply, payload)
        else:
            federation.server.take(name, reply, payload)
            with pytest.raises(ProtocolError, match=name):
                federation.server.take(name, reply, payload)  # a duplicate, which is not added twice
    federation.server.close_stage()
    assert set(federation.server.out) == {"s000"}
    federation.until(Stage.DONE)
    check_sum(federation, federation.names if stage >= Stage.SIGN_SURVIVORS else federation.names[1:])


@pytest.mark.parametrize("payload", [None, np.zeros(3, np.uint8), np.zeros(28, np.int8), np.zeros((7, 4), np.uint8)])
def test_a_masked_input_of_another_form_is_refused(payload: np.ndarray | None) -> None:
    federation = Federation(5, 3)
    federation.until(Stage.MASK_INPUT)
    with pytest.raises(ProtocolError, match="expected"):
        federation.server.take("s000", MaskedInput(of=OF, name="s000"), payload)
    federation.stage(lost=frozenset({"s000"}))
    federation.until(Stage.DONE)
    check_sum(federation, federation.names[1:])


def test_foreign_and_forged_keys_are_refused() -> None:
    federation = Federation(5, 3)
    replies = {name: federation.answer(name, task)[0] for name, task in federation.server.tasks().items()}
    with pytest.raises(ProtocolError, match="stranger"):
        federation.server.take("stranger", replies["s000"])
    with pytest.raises(SealError, match="s000"):
        federation.server.take("s000", replies["s000"].model_copy(update={"mask_key": "11" * 32}))
    for name in federation.names[1:]:
        federation.server.take(name, replies[name])
    federation.server.close_stage()
    federation.until(Stage.DONE)
    check_sum(federation, federation.names[1:])


def test_keys_that_two_sites_have_are_refused() -> None:
    """A site that takes another's keys for its own would share that one's masks; both are signed, so only the comparison tells."""
    federation = Federation(5, 3)
    replies = {name: federation.answer(name, task)[0] for name, task in federation.server.tasks().items()}
    taken = _signed_anew(federation, replies["s001"], "s002")
    for name in federation.names:
        if name == "s002":
            refused(lambda: federation.server.take("s002", taken), "s002")
        else:
            federation.server.take(name, replies[name])
    federation.server.close_stage()
    federation.until(Stage.DONE)
    check_sum(federation, ("s000", "s001", "s003", "s004"))


def _signed_anew(federation: Federation, keys: Content, name: str) -> AdvertisedKeys:
    assert isinstance(keys, AdvertisedKeys)
    statement = keys_statement(federation.setting, name, mask_key=keys.mask_key, share_key=keys.share_key, self_mask=keys.self_mask)
    return keys.model_copy(update={"name": name, "signature": federation.signers[name].sign(statement).hex()})


def test_shares_for_or_of_others_than_the_neighbours_are_refused() -> None:
    for stage in (Stage.SHARE_KEYS, Stage.UNMASK):
        federation = Federation(5, 3)
        federation.until(stage, {Stage.MASK_INPUT: frozenset({"s004"})})
        for name, task in federation.server.tasks().items():
            reply, _ = federation.answer(name, task)
            if name != "s000":
                federation.server.take(name, reply)
            elif isinstance(reply, SharedKeys):
                fewer = {other: sealed for other, sealed in reply.shares.items() if other != "s001"}
                refused(lambda reply=reply, fewer=fewer: federation.server.take("s000", reply.model_copy(update={"shares": fewer})), "neighbours")  # noqa: B023
            else:
                assert isinstance(reply, Unmasked)
                both = reply.model_copy(update={"mask_keys": reply.mask_keys | {"s001": "00" * SHARE_BYTES}})
                refused(lambda both=both: federation.server.take("s000", both), "neighbours")  # noqa: B023
        federation.server.close_stage()
        federation.until(Stage.DONE)
        check_sum(federation, federation.names[1:] if stage == Stage.SHARE_KEYS else federation.names[:4])


def test_a_share_that_moves_a_secret_by_one_is_found_out_by_the_commitment() -> None:
    """The restored secret is 32 bytes still, so nothing but what the site committed to, or its public key, tells."""
    federation = Federation(6, 4)
    federation.until(Stage.UNMASK, {Stage.MASK_INPUT: frozenset({"s005"})})
    for name, task in federation.server.tasks().items():
        reply, _ = federation.answer(name, task)
        assert isinstance(reply, Unmasked)
        if name == "s001":
            reply = reply.model_copy(update={"self_masks": _moved(reply.self_masks, 2), "mask_keys": _moved(reply.mask_keys, 2)})
        federation.server.take(name, reply)
    federation.server.close_stage()
    check_sum(federation, federation.names[:5])


def _moved(shares: Mapping[str, str], number: int) -> dict[str, str]:
    """The shares of holder `number` of 1 to 4, so that the secret comes out 256 higher: by 256 / weight, with the weight of Lagrange at 0."""
    weight = Fraction(1)
    for other in {1, 2, 3, 4} - {number}:
        weight *= Fraction(other, other - number)
    step = 256 * weight.denominator * pow(weight.numerator, -1, PRIME)
    return {owner: f"{(int(share, 16) + step) % PRIME:0{2 * SHARE_BYTES}x}" for owner, share in shares.items()}


def _falsified(reply: Content) -> Content:
    """Every share of a dishonest holder is another number."""
    assert isinstance(reply, Unmasked)
    false = "01" * SHARE_BYTES
    return reply.model_copy(update={"self_masks": dict.fromkeys(reply.self_masks, false), "mask_keys": dict.fromkeys(reply.mask_keys, false)})


@pytest.mark.parametrize(("liars", "right"), [(("s000",), True), (("s002",), True), (("s004",), True), (("s000", "s001", "s002"), False)])
def test_a_false_share_is_left_aside_and_many_end_the_round(liars: tuple[str, ...], right: bool) -> None:
    federation = Federation(6, 4)
    federation.until(Stage.UNMASK, {Stage.MASK_INPUT: frozenset({"s005"})})
    for name, task in federation.server.tasks().items():
        reply, _ = federation.answer(name, task)
        federation.server.take(name, _falsified(reply) if name in liars else reply)
    if right:
        federation.server.close_stage()
        check_sum(federation, federation.names[:5])
    else:
        with pytest.raises(ProtocolError, match="restore the secret"):
            federation.server.close_stage()
        assert federation.server.stage == Stage.FAILED


def test_an_input_outside_the_protocol_is_no_silent_sum() -> None:
    """A site that sends other bytes under its masks: count, weight or range tell (but for one in 2**32)."""
    federation = Federation(4, 3)
    federation.until(Stage.MASK_INPUT)
    for name, task in federation.server.tasks().items():
        reply, payload = federation.answer(name, task)
        federation.server.take(name, reply, payload if name != "s000" else payload[::-1].copy())
    federation.server.close_stage()
    with pytest.raises(ProtocolError, match="words that are none"):
        federation.until(Stage.DONE)


# --- a server that does not follow the protocol


def at_stage(stage: Stage, *, num_sites: int = 6, threshold: int = 4) -> tuple[Federation, SumSite, Content]:
    """A federation that has come to this stage, one of its sites, and the honest request to it."""
    federation = Federation(num_sites, threshold)
    federation.until(stage)
    return federation, federation.sites["s000"], federation.server.tasks()["s000"]


def refused(ask: Callable[[], object], match: str, kind: type[WardroundError] = ProtocolError) -> None:
    with pytest.raises(kind, match=match):
        ask()


@pytest.mark.parametrize(
    ("change", "match"),
    [({"sites": ("s000", "s001", "stranger")}, "roster"), ({"sites": ("s001", "s002", "s003")}, "itself"), ({"threshold": 3}, "threshold"),
     ({"threshold": 7}, "threshold"), ({"of": OF.model_copy(update={"run": "q"})}, "agreed to"), ({"of": OF.model_copy(update={"study_hash": "q"})}, "agreed to")],
)  # fmt: skip
def test_a_site_begins_with_its_roster_and_a_threshold_of_more_than_half(change: dict, match: str) -> None:
    federation, site, task = at_stage(Stage.ADVERTISE_KEYS)
    refused(lambda: site.advertise_keys(task.model_copy(update=change)), match)
    federation.until(Stage.DONE)
    check_sum(federation, federation.names)


def _with_key(task: Content, keys: AdvertisedKeys) -> Content:
    assert isinstance(task, ShareKeysTask)
    return task.model_copy(update={"keys": tuple(keys if known.name == keys.name else known for known in task.keys)})


def test_a_site_agrees_on_no_substituted_swapped_or_replayed_keys() -> None:
    federation, site, task = at_stage(Stage.SHARE_KEYS)
    assert isinstance(task, ShareKeysTask)
    theirs = {keys.name: keys for keys in task.keys}
    mine = "77" * 32
    for change in ({"mask_key": mine}, {"share_key": mine}, {"self_mask": mine}, {"signature": "00" * 64}):
        refused(lambda change=change: site.share_keys(_with_key(task, theirs["s001"].model_copy(update=change))), "signature of site s001", SealError)
    swapped = theirs["s002"].model_copy(update={"name": "s001"})
    refused(lambda: site.share_keys(_with_key(task, swapped)), "s001", SealError)
    other = Federation(6, 5, seed=2)  # the very round, under another threshold
    other.until(Stage.SHARE_KEYS)
    refused(lambda: site.share_keys(_with_key(task, other.server._keys["s001"])), "signature of site s001", SealError)
    earlier = theirs["s001"].model_copy(update={"of": OF.model_copy(update={"round": 0})})
    refused(lambda: site.share_keys(_with_key(task, earlier)), "round 0")
    federation.until(Stage.DONE)  # a refused request changed nothing
    check_sum(federation, federation.names)


def test_a_site_takes_no_key_for_two_sites() -> None:
    federation, site, task = at_stage(Stage.SHARE_KEYS)
    assert isinstance(task, ShareKeysTask)
    theirs = {keys.name: keys for keys in task.keys}
    refused(lambda: site.share_keys(_with_key(task, _signed_anew(federation, theirs["s001"], "s002"))), "the same key twice")
    refused(lambda: site.share_keys(_with_key(task, _signed_anew(federation, federation.server._keys["s000"], "s002"))), "the same key twice")


def test_a_site_wants_enough_neighbours_in_a_sparse_graph() -> None:
    """Degree 4, any 4 of 5 holders, 12 sites of which 7 must stay: with two neighbours missing nothing is masked, and nothing signed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (client.secure_sum, server.secure_sum):
            patch.setattr(module, "plan_graph", lambda count, threshold, colluding: GraphPlan(degree=4, share_threshold=4))
        for stage in (Stage.MASK_INPUT, Stage.SIGN_SURVIVORS):
            federation, _, task = at_stage(stage, num_sites=12, threshold=7)
            near = federation.server._neighbours["s000"]
            for missing in (near[:2], near[1:4]):
                sites = tuple(name for name in federation.names if name not in missing)
                if isinstance(task, MaskInputTask):
                    shares = {name: sealed for name, sealed in task.shares.items() if name in sites}
                    less: Content = task.model_copy(update={"sites": sites, "shares": shares})
                else:
                    less = task.model_copy(update={"survivors": sites})
                refused(lambda less=less, federation=federation: federation.answer("s000", less), "neighbours")
            federation.until(Stage.DONE)
            check_sum(federation, federation.names)


def test_a_site_shares_with_exactly_its_neighbours_of_enough_sites() -> None:
    federation, site, task = at_stage(Stage.SHARE_KEYS)
    assert isinstance(task, ShareKeysTask)
    few = task.sites[:3]
    refused(lambda: site.share_keys(task.model_copy(update={"keys": task.keys[1:]})), "neighbours")
    refused(lambda: site.share_keys(task.model_copy(update={"keys": (*task.keys, task.keys[0])})), "neighbours")
    refused(lambda: site.share_keys(task.model_copy(update={"keys": (*task.keys[1:], federation.server._keys["s000"])})), "neighbours")
    refused(lambda: site.share_keys(task.model_copy(update={"sites": few, "keys": task.keys[:2]})), "4 sites")
    refused(lambda: site.share_keys(task.model_copy(update={"sites": (*task.sites, "s999")})), "known from the stage before")
    assert site.share_keys(task).shares.keys() == set(federation.names[1:])
    refused(lambda: site.share_keys(task), "once")


def test_a_site_masks_with_all_the_shares_of_enough_sites() -> None:
    federation, site, task = at_stage(Stage.MASK_INPUT)
    assert isinstance(task, MaskInputTask)
    values = np.zeros(5)

    def ask(**change: object) -> Callable[[], object]:
        return lambda: site.mask_input(task.model_copy(update=change), values, 1)

    shares = dict(task.shares)
    refused(ask(sites=task.sites[:3], shares={name: shares[name] for name in task.sites[1:3]}), "4 sites")
    refused(ask(sites=task.sites[1:]), "itself")
    refused(ask(shares={name: shares[name] for name in task.sites[1:5]}), "neighbours")
    refused(ask(shares=shares | {"s001": shares["s002"]}), "shares of site s001", SealError)
    refused(ask(shares=shares | {"s001": federation.server._sealed["s002"]["s001"]}), "shares of site s001", SealError)
    refused(lambda: site.mask_input(task, np.zeros(6), 1), "shape")
    refused(lambda: site.mask_input(task, np.full(5, np.nan), 1), "finite")
    refused(lambda: site.mask_input(task, values, 101), "weight")
    federation.answer("s000", task)
    refused(ask(), "once")  # a second input under the same masks would give the difference of two


SURVIVORS = ("s000", "s001", "s002", "s003", "s004")


@pytest.mark.parametrize(
    ("survivors", "match"),
    [(("s000", "s001", "s002"), "4 sites"), (("s001", "s002", "s003", "s004"), "itself"), ((*SURVIVORS, "s005"), "known from"), ((*SURVIVORS, "zz"), "known from")],
)  # fmt: skip
def test_a_site_signs_no_list_that_no_honest_server_has(survivors: tuple[str, ...], match: str) -> None:
    """s005 shared no keys, and is nobody's neighbour."""
    federation = Federation(6, 4)
    federation.until(Stage.SIGN_SURVIVORS, {Stage.SHARE_KEYS: frozenset({"s005"})})
    refused(lambda: federation.sites["s000"].sign_survivors(SignSurvivorsTask(of=OF, survivors=survivors)), match)
    federation.until(Stage.DONE)
    check_sum(federation, SURVIVORS)


def signature(federation: Federation, name: str, survivors: tuple[str, ...], setting: SumSetting | None = None) -> str:
    """What a colluding site, or one that was told so, would sign."""
    return federation.signers[name].sign(survivors_statement(setting or federation.setting, name, survivors)).hex()


def test_a_site_signs_one_list_a_round_and_gives_one_share_a_neighbour_once() -> None:
    federation, site, _ = at_stage(Stage.SIGN_SURVIVORS)
    told = site.sign_survivors(SignSurvivorsTask(of=OF, survivors=SURVIVORS))
    assert told.signature == signature(federation, "s000", SURVIVORS)
    for survivors in (SURVIVORS, federation.names, ("s000", "s001", "s002", "s005")):
        refused(lambda survivors=survivors: site.sign_survivors(SignSurvivorsTask(of=OF, survivors=survivors)), "once")
    unmask = UnmaskTask(of=OF, signatures={name: signature(federation, name, SURVIVORS) for name in SURVIVORS[1:4]})
    reply = site.unmask(unmask)
    assert set(reply.self_masks) == set(SURVIVORS) and set(reply.mask_keys) == {"s005"}
    refused(lambda: site.unmask(unmask), "under way")
    begin = next(iter(SecureSum(federation.setting, roster=federation.roster).tasks().values()))
    earlier = begin.model_copy(update={"of": OF.model_copy(update={"round": 0})})
    refused(lambda: site.advertise_keys(earlier), "the last round that it masked an input or signed a list in, or a later one")
    restarted = again_from(federation, site, "s000")
    refused(lambda: restarted.advertise_keys(earlier), "the last round that it masked an input or signed a list in, or a later one")
    refused(lambda: restarted.unmask(unmask), "under way")
    assert restarted.advertise_keys(begin.model_copy(update={"of": OF.model_copy(update={"round": 2})})).name == "s000"


def again_from(federation: Federation, site: SumSite, name: str) -> SumSite:
    """The site after a restart, with what it wrote down."""
    return SumSite(
        name, FORM, run="r", study_hash="h", sign=federation.signers[name].sign, roster=federation.roster, bound=site.bound,
    )  # fmt: skip


def test_a_site_gives_no_share_without_the_threshold_of_signatures_on_its_own_list() -> None:
    """Six sites, threshold 4; each request but the last says that the others were told the same, and proves it not."""
    federation, site, _ = at_stage(Stage.SIGN_SURVIVORS)
    site.sign_survivors(SignSurvivorsTask(of=OF, survivors=SURVIVORS))
    right = {name: signature(federation, name, SURVIVORS) for name in SURVIVORS[1:]}
    elsewhere = SumSetting(of=OF.model_copy(update={"round": 2}), sites=federation.names, threshold=4, form=FORM)
    other_list = {"s003": signature(federation, "s003", (*SURVIVORS, "s005"))}
    first = dict(list(right.items())[:2])
    for signatures, match, kind in (
        ({}, "4 signatures or more", ProtocolError),
        (first, "4 signatures or more", ProtocolError),
        (first | {"s000": signature(federation, "s000", SURVIVORS)}, "4 signatures or more", ProtocolError),  # its own counts once
        (first | other_list, "signature of site s003 on the same list", SealError),
        (right | other_list, "signature of site s003 on the same list", SealError),
        (first | {"s003": right["s004"]}, "signature of site s003 on the same list", SealError),
        (first | {"s003": signature(federation, "s003", SURVIVORS, elsewhere)}, "signature of site s003 on the same list", SealError),
        (first | {"s005": signature(federation, "s005", SURVIVORS)}, "sites in the sum", ProtocolError),  # who is not in it says nothing
        (first | {"zz": right["s004"]}, "sites in the sum", ProtocolError),
    ):
        refused(lambda signatures=signatures: site.unmask(UnmaskTask(of=OF, signatures=signatures)), match, kind)
    assert set(site.unmask(UnmaskTask(of=OF, signatures=first | {"s004": right["s004"]})).self_masks) == set(SURVIVORS)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("signed_by", [SURVIVORS, SURVIVORS[:1]])
def test_a_round_that_was_signed_is_begun_anew_for_the_same_sites_and_inputs_alone(restart: bool, signed_by: tuple[str, ...]) -> None:
    """Else the difference of the two sums would be one site's input, or its change. A signature binds as much as a share."""
    first, out = Federation(6, 4), {Stage.MASK_INPUT: frozenset({"s005"})}
    first.until(Stage.SIGN_SURVIVORS, out)
    if signed_by == SURVIVORS:
        first.until(Stage.DONE)
    else:
        refused(lambda: first.stage(lost=frozenset(first.names) - set(signed_by)), "SIGN_SURVIVORS", QuorumLostError)

    def again(out: dict[Stage, frozenset[str]], stage: Stage) -> Federation:
        other = Federation(6, 4)
        for name, site in first.sites.items():
            other.sites[name] = again_from(first, site, name) if restart else site
        other.until(stage, out)
        return other

    everyone = again({}, Stage.MASK_INPUT)
    asked = everyone.server.tasks()["s000"]
    refused(lambda: everyone.sites["s000"].setting_to_mask(asked), "exactly the 5 sites for whose sum of round 1", BoundToSumError)
    refused(lambda: everyone.answer("s000", asked), "exactly the 5 sites for whose sum of round 1", BoundToSumError)
    same = {Stage.SHARE_KEYS: frozenset({"s005"})}
    changed = again(same, Stage.MASK_INPUT)
    task, site, values, weight = changed.server.tasks()["s000"], changed.sites["s000"], first.values["s000"], first.weight("s000")
    refused(lambda: site.mask_input(task, values * 0.5, weight), "its input to the sum")
    refused(lambda: site.mask_input(task, values, weight + 1), "its input to the sum")
    refused(lambda: site.mask_input(task, values, weight, model="another"), "its input to the sum")
    fewer = again(same, Stage.SIGN_SURVIVORS)
    refused(lambda: fewer.sites["s000"].sign_survivors(SignSurvivorsTask(of=OF, survivors=SURVIVORS[:4])), "exactly the 5", BoundToSumError)
    found = again(same, Stage.DONE)
    plain = sum(first.values[name] * first.weight(name) for name in SURVIVORS)
    assert found.server.total.sites == SURVIVORS
    np.testing.assert_allclose(found.server.total.values, plain, atol=found.setting.encoding.largest_error(5))


@pytest.mark.parametrize("restart", [False, True])
def test_who_did_not_sign_masks_no_other_input_on_that_model_either(restart: bool) -> None:
    """Three of four sign, which is enough; the fourth is in the sum all the same, so a second sum over the same list would tell its input, or its change."""
    lost = {Stage.SIGN_SURVIVORS: frozenset({"s003"})}
    first = Federation(4, 3)
    first.until(Stage.DONE, lost)
    assert "s003" in first.server.total.sites and first.sites["s003"].bound.signed == UNBOUND.signed

    def again() -> Federation:
        other = Federation(4, 3)
        for name, site in first.sites.items():
            other.sites[name] = again_from(first, site, name) if restart else site
        other.until(Stage.MASK_INPUT)
        return other

    second, values = again(), first.values["s003"]
    task, site, weight = second.server.tasks()["s003"], second.sites["s003"], first.weight("s003")
    for changed, heavier, model in ((np.zeros_like(values), weight, second.server.model), (values, weight + 1, second.server.model)):
        refused(
            lambda changed=changed, heavier=heavier, model=model: site.mask_input(task, changed, heavier, model=model), "on this model in this round"
        )
    masked, _ = site.mask_input(task, values * 0.5, weight, model="another")  # whose masks cancel with nobody's on the first model
    assert masked.name == "s003"
    third = again()
    third.until(Stage.DONE, lost)
    np.testing.assert_allclose(third.server.total.values, first.server.total.values, atol=2 * first.setting.encoding.largest_error(4))


def test_a_site_goes_back_to_no_round_before_one_that_it_masked_in() -> None:
    federation = Federation(4, 3)
    federation.until(Stage.SIGN_SURVIVORS)
    begin = next(iter(SecureSum(federation.setting, roster=federation.roster).tasks().values()))
    earlier = begin.model_copy(update={"of": OF.model_copy(update={"round": 0})})
    refused(lambda: federation.sites["s003"].advertise_keys(earlier), "masked an input")


def test_nothing_leaves_and_nothing_is_bound_where_it_cannot_be_written_down() -> None:
    federation = Federation(4, 3)

    def full(bound: Bound) -> None:
        raise StorageError("no room")

    name = "s001"
    federation.sites[name] = SumSite(
        name, FORM, run="r", study_hash="h", sign=federation.signers[name].sign, roster=federation.roster, keep=full
    )  # fmt: skip
    federation.until(Stage.MASK_INPUT)
    site, task = federation.sites[name], federation.server.tasks()[name]
    refused(lambda: site.mask_input(task, federation.values[name], federation.weight(name), model=federation.server.model), "no room", StorageError)
    assert site.bound == UNBOUND
    refused(lambda: site.sign_survivors(SignSurvivorsTask(of=OF, survivors=federation.names)), "next stage")


def test_who_must_be_in_each_sum_is_missed_at_every_stage() -> None:
    """A hospital's own list of sites whose keys it has compared: without them it is in no sum, whatever the coordinator says."""
    for stage in STAGES[:4]:
        federation = Federation(6, 4)
        mine = SumSite(
            "s000", FORM, run="r", study_hash="h", sign=federation.signers["s000"].sign, roster=federation.roster, sum_with=frozenset({"s005"}),
            random_bytes=federation.draws["s000"],
        )  # fmt: skip
        federation.sites["s000"] = mine
        federation.until(stage)
        task = federation.server.tasks()["s000"]
        field_name = "survivors" if stage == Stage.SIGN_SURVIVORS else "sites"
        without: Content = task.model_copy(update={field_name: SURVIVORS})
        refused(
            lambda without=without, federation=federation: federation.answer("s000", without), "policy.sum_with: .* without s005", PolicyRefusedError
        )
        federation.until(Stage.DONE)
        check_sum(federation, federation.names)


def test_sites_that_were_sent_different_models_have_no_sum() -> None:
    """Pasquini et al. 2022: a server that gives one site another model would learn from the sum what that one alone did."""
    federation = Federation(5, 3)
    federation.until(Stage.MASK_INPUT)
    tasks = federation.server.tasks()
    for name, task in tasks.items():
        reply, payload = federation.sites[name].mask_input(
            task, federation.values[name], federation.weight(name), model="b" if name == "s002" else "a"
        )
        federation.server.take(name, reply, payload)
    federation.server.model = "a"
    federation.server.close_stage()
    federation.stage()
    for name, task in federation.server.tasks().items():
        federation.server.take(name, federation.sites[name].unmask(task))
    with pytest.raises(ProtocolError, match="expected a sum over 5 sites, got words that are none"):
        federation.server.close_stage()


@pytest.mark.parametrize(("num_sites", "threshold", "colluding"), [(5, 3, 0), (6, 4, 1), (5, 4, 2), (6, 5, 3)])
def test_a_server_that_tells_two_lists_gets_shares_for_one_at_most(num_sites: int, threshold: int, colluding: int) -> None:
    """It tells some honest sites that s000 is in the sum, others that it is not, in every way; c = 2T - n - 1 others collude, and sign both lists.

    The theorem of `shared.secure_sum.setting`: only with one site more that colludes were there signatures for both.
    """
    names = Federation(num_sites, threshold).names
    without, helpers = names[1:], names[num_sites - colluding :]
    honest = [name for name in names if name not in helpers]
    for told in itertools.product((True, False), repeat=len(honest) - 1):
        federation = Federation(num_sites, threshold)
        federation.until(Stage.SIGN_SURVIVORS)
        lists = {name: names if stayed else without for name, stayed in zip(honest, (True, *told), strict=True)}
        given = {which: {name: signature(federation, name, which) for name in helpers} for which in (names, without)}
        for name, which in lists.items():
            given[which][name] = federation.sites[name].sign_survivors(SignSurvivorsTask(of=OF, survivors=which)).signature
        unmasked = set()
        for name, which in lists.items():
            try:
                reply = federation.sites[name].unmask(UnmaskTask(of=OF, signatures=given[which]))
            except ProtocolError:
                continue
            assert ("s000" in reply.self_masks, "s000" in reply.mask_keys) == (which == names, which != names)
            unmasked.add(which)
        assert unmasked == {which for which, signatures in given.items() if len(signatures) >= threshold}
        assert len(unmasked) <= 1


def test_with_one_colluding_site_more_both_lists_are_signed() -> None:
    """The bound of the theorem is sharp: n = 5, T = 3 and c = 1 = 2T - n, and both secrets of s000 are had."""
    federation = Federation(5, 3)
    federation.until(Stage.SIGN_SURVIVORS)
    names, without = federation.names, federation.names[1:]
    lists = {"s000": names, "s001": names, "s002": without, "s003": without}
    given = {which: {"s004": signature(federation, "s004", which)} for which in (names, without)}
    for name, which in lists.items():
        given[which][name] = federation.sites[name].sign_survivors(SignSurvivorsTask(of=OF, survivors=which)).signature
    held = federation.sites["s004"]._session.held["s000"]
    number = federation.setting.number_of
    seeds, keys = {number("s004"): held[0]}, {number("s004"): held[1]}
    for name, which in lists.items():
        reply = federation.sites[name].unmask(UnmaskTask(of=OF, signatures=given[which]))
        for shares, kept in ((reply.self_masks, seeds), (reply.mask_keys, keys)):
            if "s000" in shares:
                kept[number(name)] = bytes.fromhex(shares["s000"])
    assert all(len(restore_secret(shares, threshold=3)) == 32 for shares in (seeds, keys))


def test_a_site_that_was_told_of_few_others_is_not_unmasked_apart_from_those_that_signed() -> None:
    """Part (iii) of the theorem: s004 is told that only s003 and s001 shared keys beside it, s001 and s003 are then said to have dropped out; nobody
    signs a list without three signatures, and s004 itself none with sites that it shared no masks with."""
    federation = Federation(5, 3)
    federation.until(Stage.MASK_INPUT)
    tasks = federation.server.tasks()
    narrow = tasks["s004"]
    assert isinstance(narrow, MaskInputTask)
    shares = {name: narrow.shares[name] for name in ("s001", "s003")}
    narrow = narrow.model_copy(update={"sites": ("s001", "s003", "s004"), "shares": shares})
    for name in federation.names:
        federation.answer(name, narrow if name == "s004" else tasks[name])
    apart = ("s000", "s002", "s004")
    refused(lambda: federation.sites["s004"].sign_survivors(SignSurvivorsTask(of=OF, survivors=apart)), "known from the stage before")
    given = {name: federation.sites[name].sign_survivors(SignSurvivorsTask(of=OF, survivors=apart)).signature for name in ("s000", "s002")}
    for name in given:
        refused(lambda name=name: federation.sites[name].unmask(UnmaskTask(of=OF, signatures=given)), "3 signatures or more")


def test_a_false_signature_costs_its_site_the_rest_of_the_round_and_not_its_input() -> None:
    federation = Federation(5, 3)
    federation.until(Stage.SIGN_SURVIVORS)
    for name, task in federation.server.tasks().items():
        reply, _ = federation.answer(name, task)
        assert isinstance(reply, SignedSurvivors)
        if name == "s002":
            wrong = reply.model_copy(update={"signature": signature(federation, name, federation.names[:4])})
            refused(lambda wrong=wrong: federation.server.take("s002", wrong), "signature of site s002", SealError)
        else:
            federation.server.take(name, reply)
    federation.server.close_stage()
    assert federation.server.asked == ("s000", "s001", "s003", "s004")
    federation.until(Stage.DONE)
    check_sum(federation, federation.names)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_request_of_another_round_stage_or_run_changes_nothing(stage: Stage) -> None:
    federation, site, task = at_stage(stage)
    earlier, _, begun = at_stage(Stage.ADVERTISE_KEYS)

    def ask(changed: Content) -> object:
        return federation.answer("s000", changed)

    for change in ({"round": 2}, {"round": 0}, {"fold": 2}, {"run": "q"}, {"study_hash": "q"}):
        refused(lambda change=change: ask(task.model_copy(update={"of": OF.model_copy(update=change)})), "another|got one of|under way")
    others = {at: at_stage(at)[2] for at in STAGES[1:] if at != stage}
    for other in others.values():
        refused(lambda other=other: ask(other), "once")
    federation.until(Stage.DONE)
    check_sum(federation, federation.names)
    del earlier, begun, site


def test_a_restarted_site_has_dropped_out_and_the_round_goes_on() -> None:
    for stage in STAGES[1:]:
        federation = Federation(5, 4)
        federation.until(stage)
        federation.sites["s002"] = federation.site("s002")
        refused(lambda federation=federation: federation.answer("s002", federation.server.tasks()["s002"]), "under way")
        federation.stage(lost=frozenset({"s002"}))
        federation.until(Stage.DONE)
        check_sum(federation, tuple(name for name in federation.names if name != "s002" or stage >= Stage.SIGN_SURVIVORS))


def test_a_failed_round_may_begin_anew_with_other_keys() -> None:
    federation = Federation(5, 4)
    federation.until(Stage.MASK_INPUT)
    refused(lambda: federation.stage(lost=frozenset({"s000", "s001"})), "MASK_INPUT", QuorumLostError)
    first = federation.masked["s004"]
    federation.server = SecureSum(federation.setting, roster=federation.roster)
    federation.until(Stage.DONE)
    check_sum(federation, federation.names)
    assert federation.masked["s004"].tobytes() != first.tobytes()


def test_no_error_or_repr_tells_key_material() -> None:
    """Everything a site drew or holds, searched for in the words of its objects and of refusals."""
    federation, site, task = at_stage(Stage.UNMASK)
    session = site._session
    assert session is not None
    secret = [session.own_share.hex(), *(share.hex() for held in session.held.values() for share in held)]
    told = [repr(site), repr(session), repr(federation.server), str(site.unmask(task))]
    try:
        site.unmask(task)
    except ProtocolError as error:
        told.append(str(error))
    assert len(told) == 5
    assert not any(text[:32] in words for words in told for text in secret)
