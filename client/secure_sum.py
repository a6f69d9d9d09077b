"""A site's side of a secure sum: four requests, four answers, and what it refuses whoever asks (`shared.secure_sum.setting` says what that promises).

A refused request changes nothing, and each stage is answered once; so however a server asks, a site

- begins only with sites on its roster, itself among them, and a threshold of more than half of them and at least 3;
- agrees keys only with neighbours that signed theirs for this very round, in a graph that it draws itself from the seed and the names;
- masks only with at least the threshold of sites that shared keys, and shares that opened for all its neighbours among them;
- unmasks once a round, for one list of at least the threshold of those, itself in it, and gives one share a neighbour: of the self-mask seed of
  one that is in the sum, of the mask key of one that is not. Keys and shares are forgotten with that.

What a site knows between stages is in memory alone: one that restarts has dropped out. A round may begin anew, with new keys; but one that was unmasked
is unmasked again for the same survivors and of the same input alone, since the difference of two sums would tell an input else; these two say the same
but for their roundings.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from shared.errors import ProtocolError
from shared.secure_sum.agreement import (
    KEY_BYTES,
    PairKeys,
    RoundSecrets,
    commitment,
    keys_statement,
    open_shares,
    public_key,
    seal_shares,
    self_mask_key,
    verify_keys,
)
from shared.secure_sum.graph import GraphPlan, neighbours, plan_graph
from shared.secure_sum.masks import add_masks
from shared.secure_sum.messages import (
    AdvertisedKeys,
    AdvertiseKeysTask,
    MaskedInput,
    MaskInputTask,
    SharedKeys,
    ShareKeysTask,
    SumMessage,
    Unmasked,
    UnmaskTask,
)
from shared.secure_sum.setting import RandomBytes, SumForm, SumRound, SumSetting
from shared.secure_sum.sharing import split_secret

logger = logging.getLogger(__name__)

NEVER = (-(2**31) - 1, 0)  # before every fold and round


class _Stage(IntEnum):
    """What was answered last."""

    ADVERTISED, SHARED, MASKED = range(3)


@dataclass(slots=True, kw_only=True, repr=False)
class _Session:
    """One round as this site knows it; forgotten when it has unmasked, or another begins."""

    setting: SumSetting
    keys: AdvertisedKeys
    secrets: RoundSecrets | None
    stage: _Stage = _Stage.ADVERTISED
    advertised: tuple[str, ...] = ()
    plan: GraphPlan | None = None
    others: dict[str, AdvertisedKeys] = field(default_factory=dict)  # of the neighbours
    own_share: bytes = b""  # of the self-mask seed
    sharing: tuple[str, ...] = ()
    input: str = ""  # its digest
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # by neighbour: shares of its self-mask seed and mask key


class SumSite:
    """One site in the sums of one run.

    Args:
        run: the run, and
        study_hash: the study, that the site agreed to.
        form: what the study fixes of its sums.
        sign: the site's long-lived Ed25519 signature.
        roster: the sites' public keys, this one's among them.
        random_bytes: the operating system's; a test may seed it.
        unmasked: the last (fold, round) that was unmasked, where that is known from before a restart (`last_unmasked`), and
        survivors: for whom, and
        last_input: the digest of this site's own.
    """

    def __init__(
        self,
        name: str,
        form: SumForm,
        *,
        run: str,
        study_hash: str,
        sign: Callable[[bytes], bytes],
        roster: Mapping[str, Ed25519PublicKey],
        random_bytes: RandomBytes = os.urandom,
        unmasked: tuple[int, int] = NEVER,
        survivors: tuple[str, ...] = (),
        last_input: str = "",
    ) -> None:
        self._name = name
        self._form = form
        self._admitted = (run, study_hash)
        self._sign = sign
        self._roster = roster
        self._random_bytes = random_bytes
        self._unmasked = unmasked
        self._survivors = survivors
        self._input = last_input
        self._session: _Session | None = None

    @property
    def last_unmasked(self) -> tuple[int, int]:
        """The last (fold, round) that this site gave shares in; to be kept where a restart must not let it be asked for again."""
        return self._unmasked

    @property
    def last_survivors(self) -> tuple[str, ...]:
        """For whom; to be kept with it."""
        return self._survivors

    @property
    def last_input(self) -> str:
        """The digest of what this site had in that sum; to be kept with it."""
        return self._input

    def advertise_keys(self, task: AdvertiseKeysTask) -> AdvertisedKeys:
        """Stage 1: new keys, signed. A round that was under way is forgotten.

        Raises:
            ProtocolError: the run or study is another, the round is before the last that was unmasked, a site is not on the roster, or the threshold is too low.
            ConfigurationError: no sum of so many sites could be encoded.
        """
        setting = self._judge(task)
        secrets = RoundSecrets.draw(self._random_bytes)
        mask_key, share_key = public_key(secrets.mask_key).hex(), public_key(secrets.share_key).hex()
        self_mask = commitment(secrets.self_mask, setting=setting, site=self._name).hex()
        statement = keys_statement(setting, self._name, mask_key=mask_key, share_key=share_key, self_mask=self_mask)
        keys = AdvertisedKeys(
            of=setting.of, name=self._name, mask_key=mask_key, share_key=share_key, self_mask=self_mask, signature=self._sign(statement).hex()
        )
        self._session = _Session(setting=setting, keys=keys, secrets=secrets)
        return keys

    def _judge(self, task: AdvertiseKeysTask) -> SumSetting:
        if (task.of.run, task.of.study_hash) != self._admitted:
            raise self._refusal("the run and study that it agreed to", "others")
        if (task.of.fold, task.of.round) < self._unmasked:
            raise self._refusal("the last round that it unmasked, or a later one", "an earlier one")
        if self._name not in task.sites or not set(task.sites) <= set(self._roster):
            raise self._refusal("sites on its roster, itself among them", "others")
        least = self._form.least_in_sum(len(task.sites))
        if not least <= task.threshold <= len(task.sites):
            raise self._refusal(f"a threshold of {least} to {len(task.sites)}", str(task.threshold))
        return SumSetting(of=task.of, sites=task.sites, threshold=task.threshold, form=self._form, noise_multiplier=task.noise_multiplier)

    def share_keys(self, task: ShareKeysTask) -> SharedKeys:
        """Stage 2: shares of both secrets, sealed to each neighbour.

        Raises:
            ProtocolError: the request is of another round or stage, of too few sites, or not of exactly this site's neighbours.
            SealError: a neighbour did not sign its keys for this round.
        """
        session = self._at(task, _Stage.ADVERTISED)
        setting, secrets = session.setting, session.secrets
        assert secrets is not None
        self._check_sites(task.sites, within=setting.sites, what="that advertised keys", threshold=setting.threshold)
        plan = plan_graph(len(task.sites), setting.threshold, setting.num_colluding)
        mine = neighbours(task.sites, seed=bytes.fromhex(task.graph_seed), degree=plan.degree)[self._name]
        others = self._neighbours_keys(session, task, mine)
        numbers = [setting.number_of(name) for name in (self._name, *mine)]
        of_seed, of_key = (
            split_secret(secret, numbers, threshold=plan.share_threshold, random_bytes=self._random_bytes)
            for secret in (secrets.self_mask, secrets.mask_key)
        )
        pairs = PairKeys(setting, self._name, secrets.share_key)
        sealed = {}
        for name, keys in others.items():
            key, number = pairs.shares(name, keys.share_key, sender=self._name), setting.number_of(name)
            sealed[name] = seal_shares(key, of_seed[number], of_key[number], setting=setting, sender=self._name, receiver=name)
        session.advertised, session.plan, session.others = task.sites, plan, others
        session.own_share, session.stage = of_seed[setting.number_of(self._name)], _Stage.SHARED
        return SharedKeys(of=setting.of, name=self._name, shares=sealed)

    def _neighbours_keys(self, session: _Session, task: ShareKeysTask, mine: Sequence[str]) -> dict[str, AdvertisedKeys]:
        """The neighbours' keys, each signed, and no two the same."""
        others = {keys.name: keys for keys in task.keys}
        if len(task.keys) != len(others) or set(others) != set(mine):
            raise self._refusal(f"the keys of its {len(mine)} neighbours", f"{len(task.keys)} others")
        for keys in task.keys:
            _check_same_sum(keys, session.setting, self._name)
            verify_keys(keys, session.setting, self._roster)
        public = [key for keys in (*task.keys, session.keys) for key in (keys.mask_key, keys.share_key)]
        if len(set(public)) != len(public):
            raise self._refusal("different keys of different sites", "the same key twice")
        return {name: others[name] for name in mine}

    def mask_input(
        self, task: MaskInputTask, values: NDArray[np.floating] | NDArray[np.int64], weight: int, *, model: str = ""
    ) -> tuple[MaskedInput, NDArray[np.uint8]]:  # fmt: skip
        """Stage 3: values times weight, and the weight, under masks.

        Args:
            values: `(num_values,)`, finite; what is beyond the study's largest value is clipped.
            weight: 1 to the study's largest.
            model: digest of what the values were trained on; the masks of two sites cancel where both have the same.

        Returns:
            The reply, and what rides beside it: `(B (num_values + 2),)`.

        Raises:
            ProtocolError: the request is of another round or stage, of too few sites or not with exactly the neighbours' shares among them, or the
                values or the weight are not as declared.
            SealError: shares are not of the neighbour that they are said to be of.
        """
        session = self._at(task, _Stage.SHARED)
        setting, secrets, plan = session.setting, session.secrets, session.plan
        assert secrets is not None and plan is not None
        self._check_sites(task.sites, within=session.advertised, what="that shared keys", threshold=setting.threshold)
        sharing = set(task.sites)
        mine = [name for name in session.others if name in sharing]
        if set(task.shares) != set(mine) or len(mine) + 1 < plan.share_threshold:
            raise self._refusal(f"shares of all its neighbours that shared keys, {plan.share_threshold - 1} or more", f"{len(task.shares)}")
        if values.shape != (self._form.num_values,):
            raise self._refusal(f"values of shape ({self._form.num_values},)", str(values.shape))
        digest = hashlib.sha256(f"{weight}\n{model}\n".encode() + np.ascontiguousarray(values).tobytes()).hexdigest()
        if (task.of.fold, task.of.round) == self._unmasked and digest != self._input:
            raise self._refusal("the input of this round that was unmasked before", "another")
        held = self._open_shares(session, secrets, task, mine)
        words = setting.encoding.encode(values, weight, key=self._random_bytes(KEY_BYTES))
        clipped = 0 if self._form.noise is not None else int(np.count_nonzero(np.abs(values) > self._form.max_value))
        if clipped:
            logger.warning("secure sum: %d of %d values were beyond %g, and clipped to it", clipped, len(values), self._form.max_value)
        pairs = PairKeys(setting, self._name, secrets.mask_key)
        masks = {name: pairs.mask(name, session.others[name].mask_key, model) for name in mine}
        plus = [self_mask_key(secrets.self_mask, setting=setting, site=self._name), *(masks[name] for name in mine if self._name < name)]
        add_masks(words, plus=plus, minus=[masks[name] for name in mine if name < self._name])
        session.sharing, session.held, session.secrets, session.stage, session.input = task.sites, held, None, _Stage.MASKED, digest
        return MaskedInput(of=setting.of, name=self._name), setting.encoding.pack(words)

    def setting_to_mask(self, task: MaskInputTask) -> SumSetting:
        """The setting of the round in which this request would have an input masked.

        Raises:
            ProtocolError: there is no such round, or it is at another stage.
        """
        return self._at(task, _Stage.SHARED).setting

    def _open_shares(self, session: _Session, secrets: RoundSecrets, task: MaskInputTask, mine: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        pairs, held = PairKeys(session.setting, self._name, secrets.share_key), {}
        for name in mine:
            key = pairs.shares(name, session.others[name].share_key, sender=name)
            held[name] = open_shares(key, task.shares[name], setting=session.setting, sender=name, receiver=self._name)
        return held

    def unmask(self, task: UnmaskTask) -> Unmasked:
        """Stage 4: one share of each neighbour; with that the round is over here, and everything of it forgotten.

        Raises:
            ProtocolError: the request is of another round or stage, or its survivors are too few, not of those that shared keys, or without this site.
        """
        session = self._at(task, _Stage.MASKED)
        plan, survivors = session.plan, set(task.survivors)
        assert plan is not None
        self._check_sites(task.survivors, within=session.sharing, what="whose inputs are in the sum", threshold=session.setting.threshold)
        if (task.of.fold, task.of.round) == self._unmasked and task.survivors != self._survivors:
            raise self._refusal("the survivors for whom this round was unmasked before", "others")
        inside = [name for name in session.held if name in survivors]
        if len(inside) + 1 < plan.share_threshold:
            raise self._refusal(f"{plan.share_threshold - 1} of its neighbours or more in the sum", str(len(inside)))
        self_masks = {self._name: session.own_share.hex(), **{name: session.held[name][0].hex() for name in inside}}
        mask_keys = {name: shares[1].hex() for name, shares in session.held.items() if name not in survivors}
        self._unmasked, self._survivors, self._input = (task.of.fold, task.of.round), task.survivors, session.input
        self._session = None
        return Unmasked(of=session.setting.of, name=self._name, self_masks=self_masks, mask_keys=mask_keys)

    def _at(self, task: SumMessage, stage: _Stage) -> _Session:
        """The session that this request is of, if it is at that stage."""
        if self._session is None:
            raise self._refusal("a request of a round that is under way", f"one of {_told(task.of)}")
        _check_same_sum(task, self._session.setting, self._name)
        if self._session.stage != stage:
            raise self._refusal("the request of the next stage, once", f"{task.kind!r}")
        return self._session

    def _check_sites(self, sites: Sequence[str], *, within: Sequence[str], what: str, threshold: int) -> None:
        if self._name not in sites or not set(sites) <= set(within):
            raise self._refusal(f"sites {what}, itself among them, of those known from the stage before", "others")
        if len(sites) < threshold:
            raise self._refusal(f"{threshold} sites or more {what}", str(len(sites)))

    def _refusal(self, expected: str, got: str) -> ProtocolError:
        return ProtocolError(f"secure sum: site {self._name}: expected {expected}, got {got}")


def _check_same_sum(message: SumMessage, setting: SumSetting, site: str) -> None:
    if message.of != setting.of:
        raise ProtocolError(f"secure sum: site {site}: expected a message of {_told(setting.of)}, got one of {_told(message.of)}")


def _told(of: SumRound) -> str:
    return f"round {of.round}, fold {of.fold} of run {of.run}, study {of.study_hash}"
