"""The coordinator's side of a secure sum: five requests to every site, and the sum of those that stayed, of which it never holds a term.

It keeps public keys, sealed shares that it cannot open, and one running sum of masked inputs, to which each is added as it comes. A site that does not
answer a stage, or answers it wrongly, is out; the others go on while at least the threshold is left, and below that the round fails by name: what
was sent is masked still, and is forgotten. Who is lost once its masked input came is in the sum all the same. Only in the last stage are secrets
restored, of each site one: the self-mask seed where its input is in the sum, the mask key where it dropped out. Nobody is asked for the other, and
sites would refuse (`client.secure_sum`).

    asked = SecureSum(setting, roster=roster)
    for _ in STAGES:
        for name, task in asked.tasks().items():
            asked.take(name, *answer_of(name, task))     # ProtocolError, SealError: that site is out
        asked.close_stage()                              # QuorumLostError: too few are left
    asked.total.mean()
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from shared.errors import ProtocolError, QuorumLostError, WardroundError
from shared.secure_sum.agreement import PairKeys, commitment, public_key, self_mask_key, verify_keys, verify_survivors
from shared.secure_sum.graph import SEED_BYTES, GraphPlan, neighbours, plan_graph
from shared.secure_sum.masks import Words, add_masks
from shared.secure_sum.messages import (
    AdvertisedKeys,
    AdvertiseKeysTask,
    MaskedInput,
    MaskInputTask,
    SharedKeys,
    ShareKeysTask,
    SignedSurvivors,
    SignSurvivorsTask,
    SumReply,
    SumTask,
    Unmasked,
    UnmaskTask,
)
from shared.secure_sum.quantisation import EXTRA_WORDS
from shared.secure_sum.setting import RandomBytes, SumSetting
from shared.secure_sum.sharing import restore_secret


class Stage(IntEnum):
    """What is asked, or that nothing is any more."""

    ADVERTISE_KEYS, SHARE_KEYS, MASK_INPUT, SIGN_SURVIVORS, UNMASK, DONE, FAILED = range(7)


STAGES = (Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS, Stage.MASK_INPUT, Stage.SIGN_SURVIVORS, Stage.UNMASK)
_REPLY = dict(zip(STAGES, (AdvertisedKeys, SharedKeys, MaskedInput, SignedSurvivors, Unmasked), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class SumResult:
    """What a round says: the sum of weight x value, `(num_values,)` float64, and of the weights, over `sites`."""

    values: NDArray[np.float64]
    weight: int
    sites: tuple[str, ...]

    def mean(self) -> NDArray[np.float64]:
        """The weighted mean."""
        return self.values / self.weight


class SecureSum:
    """One round, from the first request to the sum.

    Attributes:
        model: digest of what the sites are to train on, as they find it themselves; set before the last stage.

    Args:
        setting: what is summed, of whom, above which threshold.
        roster: the sites' long-lived Ed25519 keys.
        random_bytes: draws the graph; the operating system's, or a test's.
    """

    def __init__(self, setting: SumSetting, *, roster: Mapping[str, Ed25519PublicKey], random_bytes: RandomBytes = os.urandom) -> None:
        self._setting = setting
        self._roster = roster
        self._random_bytes = random_bytes
        self._stage = Stage.ADVERTISE_KEYS
        self._asked = setting.sites
        self._answered: set[str] = set()
        self._out: dict[str, WardroundError] = {}
        self._keys: dict[str, AdvertisedKeys] = {}
        self._seed = b""
        self._plan = GraphPlan(degree=0, share_threshold=0)
        self._neighbours: dict[str, tuple[str, ...]] = {}
        self._sealed: dict[str, dict[str, str]] = {}  # by receiver and sender
        self._sharing: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._signatures: dict[str, str] = {}  # on the list of survivors, by site
        self._sum: Words = np.zeros(0, setting.encoding.dtype)
        self._self_masks: dict[str, dict[int, bytes]] = {}  # shares by owner and the holder's number
        self._mask_keys: dict[str, dict[int, bytes]] = {}
        self._total: SumResult | None = None
        self.model = ""

    @property
    def stage(self) -> Stage:
        """What is asked now."""
        return self._stage

    @property
    def setting(self) -> SumSetting:
        """What is summed."""
        return self._setting

    @property
    def asked(self) -> tuple[str, ...]:
        """The sites that are asked now."""
        return self._asked

    @property
    def out(self) -> Mapping[str, WardroundError]:
        """The sites whose answer was refused, and why."""
        return self._out

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose inputs are in the sum; empty before the third stage was closed."""
        return self._survivors

    @property
    def total(self) -> SumResult:
        """The sum; there only when the last stage was closed."""
        assert self._total is not None
        return self._total

    def tasks(self) -> dict[str, SumTask]:
        """The request of this stage for each site that is asked."""
        return {name: self._task(name) for name in self._asked}

    def _task(self, name: str) -> SumTask:
        of = self._setting.of
        if self._stage == Stage.ADVERTISE_KEYS:
            roster = {site: self._roster[site].public_bytes_raw().hex() for site in self._setting.sites}
            return AdvertiseKeysTask(
                of=of, sites=self._setting.sites, threshold=self._setting.threshold, noise_multiplier=self._setting.noise_multiplier, roster=roster
            )
        if self._stage == Stage.SHARE_KEYS:
            keys = tuple(self._keys[other] for other in self._neighbours[name])
            return ShareKeysTask(of=of, sites=self._asked, graph_seed=self._seed.hex(), keys=keys)
        if self._stage == Stage.MASK_INPUT:
            return MaskInputTask(of=of, sites=self._sharing, shares=self._sealed[name])
        if self._stage == Stage.SIGN_SURVIVORS:
            return SignSurvivorsTask(of=of, survivors=self._survivors)
        assert self._stage == Stage.UNMASK
        return UnmaskTask(of=of, signatures={signer: self._signatures[signer] for signer in self._asked[: self._setting.threshold]})

    def take(self, name: str, reply: SumReply, payload: NDArray[np.uint8] | None = None) -> None:
        """Judge the answer of the site `name`, as whoever carried it knows it, and keep what counts.

        Raises:
            ProtocolError, SealError: it is late, a second one, or not as it should be. In the last case, the site is out of this round; whatever else
                stands.
        """
        if self._stage not in _REPLY or name not in self._asked or name in self._answered:
            raise ProtocolError(f"secure sum: expected one answer of each site that is asked, got another of site {name}")
        if name in self._out:
            raise ProtocolError(f"secure sum: expected nothing more of site {name} in this round, which is out, got an answer")
        try:
            self._take(name, reply, payload)
        except WardroundError as error:
            self._out[name] = error
            raise
        self._answered.add(name)

    def _take(self, name: str, reply: SumReply, payload: NDArray[np.uint8] | None) -> None:
        if type(reply) is not _REPLY[self._stage] or reply.of != self._setting.of or reply.name != name:
            raise ProtocolError(f"secure sum: site {name}: expected {_REPLY[self._stage].__name__} of its own in this round, got another message")
        if (payload is not None) != isinstance(reply, MaskedInput):
            raise ProtocolError(f"secure sum: site {name}: expected an array with a masked input and no other message, got otherwise")
        if isinstance(reply, AdvertisedKeys):
            self._take_keys(reply)
        elif isinstance(reply, SharedKeys):
            self._take_sealed(reply)
        elif isinstance(reply, MaskedInput):
            assert payload is not None
            self._sum += self._setting.encoding.unpack(payload, self._setting.form.num_values)
        elif isinstance(reply, SignedSurvivors):
            verify_survivors(name, reply.signature, self._survivors, setting=self._setting, roster=self._roster)
            self._signatures[name] = reply.signature
        elif isinstance(reply, Unmasked):
            self._take_shares(reply)

    def _take_keys(self, reply: AdvertisedKeys) -> None:
        verify_keys(reply, self._setting, self._roster)
        known = {key for keys in self._keys.values() for key in (keys.mask_key, keys.share_key)}
        if reply.mask_key == reply.share_key or {reply.mask_key, reply.share_key} & known:
            raise ProtocolError(f"secure sum: site {reply.name}: expected keys that nobody else has, got some twice")
        self._keys[reply.name] = reply

    def _take_sealed(self, reply: SharedKeys) -> None:
        if set(reply.shares) != set(self._neighbours[reply.name]):
            raise ProtocolError(f"secure sum: site {reply.name}: expected shares for each of its neighbours, got shares for others")
        for receiver, sealed in reply.shares.items():
            self._sealed[receiver][reply.name] = sealed

    def _take_shares(self, reply: Unmasked) -> None:
        """Of itself and each neighbour in the sum the one share, of each that dropped out the other."""
        name, inside = reply.name, set(self._survivors)
        near = set(self._neighbours[name]) & set(self._sharing)
        if set(reply.self_masks) != (near & inside) | {name} or set(reply.mask_keys) != near - inside:
            raise ProtocolError(f"secure sum: site {name}: expected one share of each of its neighbours, got shares of others")
        number = self._setting.number_of(name)
        for kept, given in ((self._self_masks, reply.self_masks), (self._mask_keys, reply.mask_keys)):
            for owner, share in given.items():
                kept.setdefault(owner, {})[number] = bytes.fromhex(share)

    def close_stage(self) -> None:
        """Go on with the sites that answered; after the last stage, `total` is there.

        Raises:
            QuorumLostError: fewer answered than the threshold, or too few to restore a secret. The round is over, and nothing was learnt.
            ProtocolError: what was restored does not fit what sites committed to, or comes to no sum.
        """
        assert self._stage in STAGES
        stayed = tuple(name for name in self._asked if name in self._answered)
        try:
            if len(stayed) < self._setting.threshold:
                raise QuorumLostError(
                    f"secure sum: stage {self._stage.name}: expected {self._setting.threshold} sites or more, got {len(stayed)}",
                    "the round is lost; wait for more sites, or begin a study with a lower threshold (never under 3 or half)",
                )
            self._go_on(stayed)
        except WardroundError:
            self._forget(Stage.FAILED)
            raise
        self._answered = set()

    def _go_on(self, stayed: tuple[str, ...]) -> None:
        if self._stage == Stage.ADVERTISE_KEYS:
            self._plan = plan_graph(len(stayed), self._setting.threshold, self._setting.num_colluding)
            self._seed = self._random_bytes(SEED_BYTES)
            self._neighbours = neighbours(stayed, seed=self._seed, degree=self._plan.degree)
            self._sealed = {name: {} for name in stayed}
        elif self._stage == Stage.SHARE_KEYS:
            self._sharing = stayed
            self._sum = np.zeros(self._setting.form.num_values + EXTRA_WORDS, self._setting.encoding.dtype)
        elif self._stage == Stage.MASK_INPUT:
            self._survivors, self._sealed = stayed, {}
        elif self._stage == Stage.UNMASK:
            self._total = self._unmask()
            return self._forget(Stage.DONE)
        self._stage, self._asked = Stage(self._stage + 1), stayed
        return None

    def _forget(self, stage: Stage) -> None:
        """Nothing is kept of a round that is over, but who was out, and the sum."""
        self._stage, self._asked, self._answered = stage, (), set()
        self._sealed, self._self_masks, self._mask_keys = {}, {}, {}
        self._sum = np.zeros(0, self._sum.dtype)

    def _unmask(self) -> SumResult:
        """All secrets first, then the sum without its masks."""
        setting, inside = self._setting, set(self._survivors)
        dropped = [name for name in self._sharing if name not in inside]
        self_masks = {name: self._self_mask(name) for name in self._survivors}
        mask_keys = {name: self._mask_key(name) for name in dropped}
        minus = [self_mask_key(seed, setting=setting, site=name) for name, seed in self_masks.items()]
        plus: list[bytes] = []
        for name, private in mask_keys.items():
            pairs = PairKeys(setting, name, private)
            for other in self._neighbours[name]:
                if other in inside:  # it added the mask where it comes first, and subtracted it where it does not
                    (minus if other < name else plus).append(pairs.mask(other, self._keys[other].mask_key, self.model))
        add_masks(self._sum, plus=plus, minus=minus)
        values, weight = setting.encoding.decode(self._sum, num_summed=len(inside))
        return SumResult(values=values, weight=weight, sites=self._survivors)

    def _self_mask(self, name: str) -> bytes:
        for seed in self._candidates(name, self._self_masks):
            if commitment(seed, setting=self._setting, site=name).hex() == self._keys[name].self_mask:
                return seed
        raise _not_restored(name)

    def _mask_key(self, name: str) -> bytes:
        for private in self._candidates(name, self._mask_keys):
            if public_key(private).hex() == self._keys[name].mask_key:
                return private
        raise _not_restored(name)

    def _candidates(self, name: str, kept: Mapping[str, Mapping[int, bytes]]) -> "itertools.chain[bytes]":
        """The secret as all shares say it, then as they say it without one of those used: a single false share does no harm if there is another."""
        shares, threshold = kept.get(name, {}), self._plan.share_threshold
        if len(shares) < threshold:
            raise QuorumLostError(
                f"secure sum: expected {threshold} shares of site {name}'s secret, got {len(shares)}", "too many of its neighbours dropped out"
            )
        used = sorted(shares)[:threshold]
        without = ({other: share for other, share in shares.items() if other != left} for left in used if len(shares) > threshold)
        return itertools.chain.from_iterable(_restored(some, threshold) for some in itertools.chain([shares], without))


def _restored(shares: Mapping[int, bytes], threshold: int) -> Sequence[bytes]:
    """The secret, or none where the shares do not fit together."""
    try:
        return [restore_secret(shares, threshold=threshold)]
    except ProtocolError:
        return []


def _not_restored(name: str) -> ProtocolError:
    return ProtocolError(
        f"secure sum: expected shares that restore the secret of site {name}, got false ones", "the round is lost; its sum was not learnt"
    )
