"""What a coordinator asks and a site answers in the five stages of a sum: one request and one reply each.

Everything is JSON of bounded length, but for the masked input, `(B (num_values + 2),)` uint8 beside it (`FixedPoint.pack`). Keys, shares and
signatures are hex. Nothing here is secret but what its receiver alone can open, and the shares of the last stage.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from shared.messages import Content, Name, Trained, TrainTask
from shared.secure_sum.setting import MAX_SITES, MIN_THRESHOLD, SumRound
from shared.secure_sum.sharing import SHARE_BYTES

TAG_BYTES = 16


def _in_order(sites: tuple[str, ...]) -> tuple[str, ...]:
    if list(sites) != sorted(set(sites)):
        raise ValueError("expected different names in order")
    return sites


Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]
SealedShares = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (2 * SHARE_BYTES + TAG_BYTES)}}}$")]
Sites = Annotated[tuple[Name, ...], Field(min_length=MIN_THRESHOLD, max_length=MAX_SITES), AfterValidator(_in_order)]


class SumMessage(Content):
    """Which sum this is of; `kind` comes first in the JSON."""

    kind: str
    of: SumRound


class SumReply(SumMessage):
    """A site's answer."""

    name: Name


class AdvertiseKeysTask(SumMessage):
    """A sum begins, of these sites, and says nothing unless `threshold` of them are in it. `roster`: their long-lived Ed25519 keys.

    `noise_multiplier` is of distributed noise: what all sites together add.
    """

    kind: Literal["advertise-keys"] = "advertise-keys"
    sites: Sites
    threshold: Annotated[int, Field(ge=MIN_THRESHOLD, le=MAX_SITES)]
    noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    roster: dict[Name, Hex32] = Field(default_factory=dict, max_length=MAX_SITES)


class AdvertisedKeys(SumReply):
    """A site's two X25519 keys and the commitment to its self-mask for this round, and its signature on them (`agreement.keys_statement`)."""

    kind: Literal["advertised-keys"] = "advertised-keys"
    mask_key: Hex32
    share_key: Hex32
    self_mask: Hex32
    signature: Signature


class ShareKeysTask(SumMessage):
    """These sites advertised keys; here are your neighbours' in the graph that `graph_seed` draws."""

    kind: Literal["share-keys"] = "share-keys"
    sites: Sites
    graph_seed: Hex32
    keys: Annotated[tuple[AdvertisedKeys, ...], Field(max_length=MAX_SITES)]


class SharedKeys(SumReply):
    """Shares sealed to every neighbour, by the neighbour's name."""

    kind: Literal["shared-keys"] = "shared-keys"
    shares: Annotated[dict[Name, SealedShares], Field(max_length=MAX_SITES)]


class MaskInputTask(SumMessage):
    """These sites shared their keys; here is what those of them that are your neighbours sealed to you, by the sender's name."""

    kind: Literal["mask-input"] = "mask-input"
    sites: Sites
    shares: Annotated[dict[Name, SealedShares], Field(max_length=MAX_SITES)]


class MaskedInput(SumReply):
    """The masked input rides beside this."""

    kind: Literal["masked-input"] = "masked-input"


class SignSurvivorsTask(SumMessage):
    """These sites' inputs, and no others, are in the sum: sign it, for the others to see that you were told the same."""

    kind: Literal["sign-survivors"] = "sign-survivors"
    survivors: Sites


class SignedSurvivors(SumReply):
    """A site's signature on the one list that it signs in a round (`agreement.survivors_statement`)."""

    kind: Literal["signed-survivors"] = "signed-survivors"
    signature: Signature


class UnmaskTask(SumMessage):
    """So many sites signed the list that you signed: here are their signatures, by name; give your shares for that list."""

    kind: Literal["unmask"] = "unmask"
    signatures: Annotated[dict[Name, Signature], Field(max_length=MAX_SITES)]


class Unmasked(SumReply):
    """Shares of self-mask seeds of those in the sum, and of mask keys of those that dropped out; of each neighbour one or the other."""

    kind: Literal["unmasked"] = "unmasked"
    self_masks: Annotated[dict[Name, Share], Field(max_length=MAX_SITES)]
    mask_keys: Annotated[dict[Name, Share], Field(max_length=MAX_SITES)]

    def __repr__(self) -> str:
        return f"Unmasked(name={self.name!r}, of={self.of!r})"  # shares are key material

    __str__ = __repr__


class SecureTrainTask(Content):
    """Train, and send the update under masks, with this weight."""

    kind: Literal["secure-train"] = "secure-train"
    train: TrainTask
    mask_input: MaskInputTask
    weight: Annotated[int, Field(ge=1)]


class SecureTrained(Content):
    """As an update in the clear is told of; the masked one rides beside this."""

    kind: Literal["secure-trained"] = "secure-trained"
    trained: Trained
    masked: MaskedInput


SumTask = AdvertiseKeysTask | ShareKeysTask | MaskInputTask | SignSurvivorsTask | UnmaskTask
