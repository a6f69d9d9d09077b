"""A site's side of a secure sum: five requests, five answers, and what it refuses whoever asks (`shared.secure_sum.setting` says what that promises).

A refused request changes nothing, and each stage is answered once; so however a server asks, a site

- begins only with sites on its roster, itself among them, and a threshold of more than half of them and at least 3;
- agrees keys only with neighbours that signed theirs for this very round, in a graph that it draws itself from the seed and the names;
- masks only with at least the threshold of sites that shared keys, and shares that opened for all its neighbours among them; and, in one round, one input
  on one model at one noise multiplier, however often the round is begun;
- signs one list of survivors a round: of at least the threshold of those, itself in it;
- unmasks for that list alone, once it has seen the signatures of at least the threshold of sites (its own counted) on the very same list, and gives one
  share a neighbour: of the self-mask seed of one that is in the sum, of the mask key of one that is not. Keys and shares are forgotten with that.

What a site knows between stages is in memory alone: one that restarts has dropped out. A round may begin anew, with new keys; but who signed a list
masks again only among exactly its sites and the same input, and who masked an input masks no other one on that model, for of two sums over the same sites
the difference would tell an input; these two say the same but for their roundings. By what it is `Bound` is written down before it leaves.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from shared.clipped_updates import log_clipped
from shared.errors import BoundToSumError, PolicyRefusedError, ProtocolError
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
    survivors_statement,
    verify_keys,
    verify_survivors,
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
    SignedSurvivors,
    SignSurvivorsTask,
    SumMessage,
    Unmasked,
    UnmaskTask,
)
from shared.secure_sum.setting import RandomBytes, SumForm, SumRound, SumSetting
from shared.secure_sum.sharing import split_secret

logger = logging.getLogger(__name__)

NEVER = (-(2**31) - 1, 0)  # before every fold and round
MOST_INPUTS = 16  # of one round, on as many models or noise multipliers: an honest coordinator needs one or two


class _Stage(IntEnum):
    """What was answered last."""

    ADVERTISED, SHARED, MASKED, SIGNED = range(4)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a site has given of a run, and by what it is bound; it is kept where a restart must not let it give something else.

    Attributes:
        masked: the last (fold, round) that an input was masked in, and
        inputs: the digest of the input, by model and noise multiplier.
        signed: the last (fold, round) that a list of survivors was signed in, and
        survivors: which list, and
        input: the digest of this site's own input in that sum.
    """

    masked: tuple[int, int] = NEVER
    inputs: Mapping[str, str] = field(default_factory=dict)
    signed: tuple[int, int] = NEVER
    survivors: tuple[str, ...] = ()
    input: str = ""


UNBOUND = Bound()


class SumSite:
    """One site in the sums of one run.

    Args:
        run: the run, and
        study_hash: the study, that the site agreed to.
        form: what the study fixes of its sums.
        sign: the site's long-lived Ed25519 signature.
        roster: the sites' public keys, this one's among them.
        random_bytes: the operating system's; a test may seed it.
        bound: by what it is bound, where that is known from before a restart.
        keep: writes that down; called before anything that binds leaves, and where it raises nothing leaves and nothing has changed.
        sum_with: names of sites without which this one is in no sum.
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
        bound: Bound = UNBOUND,
        keep: Callable[[Bound], None] = lambda bound: None,
        sum_with: frozenset[str] = frozenset(),
    ) -> None:
        self._name = name
        self._form = form
        self._admitted = (run, study_hash)
        self._sign = sign
        self._roster = roster
        self._random_bytes = random_bytes
        self._bound = bound
        self._keep = keep
        self._sum_with = sum_with
        self._session: _Session | None = None

    @property
    def bound(self) -> Bound:
        """By what it is bound."""
        return self._bound

    def advertise_keys(self, task: AdvertiseKeysTask) -> AdvertisedKeys:
        """Stage 1: new keys, signed. A round that was under way is forgotten.

        Raises:
            ProtocolError: the run or study is another, the round is before the last that an input was masked or a list signed in, a site is not on the
                roster, or the threshold is too low.
            PolicyRefusedError: a site without which this one is in no sum is missing; as in the stages that follow.
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
        if (task.of.fold, task.of.round) < max(self._bound.signed, self._bound.masked):
            raise self._refusal("the last round that it masked an input or signed a list in, or a later one", "an earlier one")
        if self._name not in task.sites or not set(task.sites) <= set(self._roster):
            raise self._refusal("sites on its roster, itself among them", "others")
        self._check_policy(task.sites)
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
        self._check_bound(task.of, task.sites)
        sharing = set(task.sites)
        mine = [name for name in session.others if name in sharing]
        if set(task.shares) != set(mine) or len(mine) + 1 < plan.share_threshold:
            raise self._refusal(f"shares of all its neighbours that shared keys, {plan.share_threshold - 1} or more", f"{len(task.shares)}")
        if values.shape != (self._form.num_values,):
            raise self._refusal(f"values of shape ({self._form.num_values},)", str(values.shape))
        digest = hashlib.sha256(f"{weight}\n{model}\n".encode() + np.ascontiguousarray(values).tobytes()).hexdigest()
        bound = self._bound_by_input(setting, model, digest)
        held = self._open_shares(session, secrets, task, mine)
        words = setting.encoding.encode(values, weight, key=self._random_bytes(KEY_BYTES))
        clipped = 0 if self._form.noise is not None else int(np.count_nonzero(np.abs(values) > self._form.max_value))
        if clipped:
            log_clipped(
                logger, self._name, fold=task.of.fold, round_number=task.of.round, clipped=clipped, values=len(values), max_value=self._form.max_value
            )
        pairs = PairKeys(setting, self._name, secrets.mask_key)
        masks = {name: pairs.mask(name, session.others[name].mask_key, model) for name in mine}
        plus = [self_mask_key(secrets.self_mask, setting=setting, site=self._name), *(masks[name] for name in mine if self._name < name)]
        add_masks(words, plus=plus, minus=[masks[name] for name in mine if name < self._name])
        self._bind(bound)
        session.sharing, session.held, session.secrets, session.stage, session.input = task.sites, held, None, _Stage.MASKED, digest
        return MaskedInput(of=setting.of, name=self._name), setting.encoding.pack(words)

    def _bound_by_input(self, setting: SumSetting, model: str, digest: str) -> Bound:
        """What it will be bound by with this input; refused where it gave another on this model before, or signed for another."""
        number, bound = (setting.of.fold, setting.of.round), self._bound
        if number == bound.signed and digest != bound.input:
            raise self._refusal("its input to the sum of this round for which it signed before", "another")
        inputs = dict(bound.inputs) if number == bound.masked else {}
        if inputs.setdefault(f"{model} {setting.noise_multiplier.hex()}", digest) != digest:
            raise self._refusal("the input that it masked on this model in this round before", "another")
        if len(inputs) > MOST_INPUTS:
            raise self._refusal(f"at most {MOST_INPUTS} models in a round", "one more")
        return replace(bound, masked=number, inputs=inputs)

    def _bind(self, bound: Bound) -> None:
        if bound != self._bound:
            self._keep(bound)
            self._bound = bound

    def setting_to_mask(self, task: MaskInputTask) -> SumSetting:
        """The setting of the round in which this request would have an input masked.

        Raises:
            ProtocolError: there is no such round, it is at another stage, or this site signed another list of survivors in it.
        """
        session = self._at(task, _Stage.SHARED)
        self._check_bound(task.of, task.sites)
        return session.setting

    def _open_shares(self, session: _Session, secrets: RoundSecrets, task: MaskInputTask, mine: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        pairs, held = PairKeys(session.setting, self._name, secrets.share_key), {}
        for name in mine:
            key = pairs.shares(name, session.others[name].share_key, sender=name)
            held[name] = open_shares(key, task.shares[name], setting=session.setting, sender=name, receiver=self._name)
        return held

    def sign_survivors(self, task: SignSurvivorsTask) -> SignedSurvivors:
        """Stage 4: this site's signature on the one list that it signs in this round.

        Raises:
            ProtocolError: the request is of another round or stage, or its survivors are too few, not of those that shared keys, without this site, or
                others than it signed before in this round.
        """
        session = self._at(task, _Stage.MASKED)
        plan, survivors = session.plan, set(task.survivors)
        assert plan is not None
        self._check_sites(task.survivors, within=session.sharing, what="whose inputs are in the sum", threshold=session.setting.threshold)
        self._check_bound(task.of, task.survivors)
        inside = sum(name in survivors for name in session.held)
        if inside + 1 < plan.share_threshold:
            raise self._refusal(f"{plan.share_threshold - 1} of its neighbours or more in the sum", str(inside))
        signature = self._sign(survivors_statement(session.setting, self._name, task.survivors))
        self._bind(replace(self._bound, signed=(task.of.fold, task.of.round), survivors=task.survivors, input=session.input))
        session.stage = _Stage.SIGNED
        return SignedSurvivors(of=session.setting.of, name=self._name, signature=signature.hex())

    def unmask(self, task: UnmaskTask) -> Unmasked:
        """Stage 5: one share of each neighbour; with that the round is over here, and everything of it forgotten.

        Raises:
            ProtocolError: the request is of another round or stage, or too few sites, or others than those in the sum, are said to have signed.
            SealError: a signature is not that of the site that it is said to be of, on the very list that this one signed in this round.
        """
        session, survivors = self._at(task, _Stage.SIGNED), set(self._bound.survivors)
        self._check_signatures(session.setting, task.signatures)
        self_masks = {self._name: session.own_share.hex(), **{name: held[0].hex() for name, held in session.held.items() if name in survivors}}
        mask_keys = {name: held[1].hex() for name, held in session.held.items() if name not in survivors}
        self._session = None
        return Unmasked(of=session.setting.of, name=self._name, self_masks=self_masks, mask_keys=mask_keys)

    def _check_signatures(self, setting: SumSetting, signatures: Mapping[str, str]) -> None:
        """At least the threshold of sites, this one among them, signed the list that this one signed."""
        signers = {*signatures, self._name}
        if not signers <= set(self._bound.survivors):
            raise self._refusal("signatures of sites in the sum", "another's")
        if len(signers) < setting.threshold:
            raise self._refusal(f"{setting.threshold} signatures or more on its list of survivors", str(len(signers)))
        for name, signature in signatures.items():
            verify_survivors(name, signature, self._bound.survivors, setting=setting, roster=self._roster)

    def _check_bound(self, of: SumRound, sites: Sequence[str]) -> None:
        """Who signed a list is in no sum of that round with others."""
        if (of.fold, of.round) == self._bound.signed and tuple(sites) != self._bound.survivors:
            raise BoundToSumError(
                f"secure sum: site {self._name}: expected exactly the {len(self._bound.survivors)} sites for whose sum of round {of.round} it signed before, "
                f"got {len(sites)} that are not the same"
            )

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
        self._check_policy(sites)

    def _check_policy(self, sites: Sequence[str]) -> None:
        missing = self._sum_with - set(sites)
        if missing:
            rule = "policy.sum_with"
            raise PolicyRefusedError(
                f"{rule}: expected a sum with {', '.join(sorted(self._sum_with))} in it, got one without {', '.join(sorted(missing))}", rule=rule
            )

    def _refusal(self, expected: str, got: str) -> ProtocolError:
        return ProtocolError(f"secure sum: site {self._name}: expected {expected}, got {got}")


def _check_same_sum(message: SumMessage, setting: SumSetting, site: str) -> None:
    if message.of != setting.of:
        raise ProtocolError(f"secure sum: site {site}: expected a message of {_told(setting.of)}, got one of {_told(message.of)}")


def _told(of: SumRound) -> str:
    return f"round {of.round}, fold {of.fold} of run {of.run}, study {of.study_hash}"
