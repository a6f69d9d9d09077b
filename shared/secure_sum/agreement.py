"""Keys of one round: X25519 (RFC 7748) for every pair of sites, HKDF-SHA256 (RFC 5869), and who vouches for them.

A site draws two key pairs, for masks and for shares, and a self-mask seed. What it says of them is signed with its long-lived Ed25519 key over the
digest of the setting, the stage and its name, so that it is good for one site in one round. From a pair's shared secret HKDF makes a key for one
purpose, with the setting's digest as salt and the two names as info: no two purposes, pairs or rounds share one. Shares are sealed with
ChaCha20-Poly1305 (RFC 8439) under a key for one sender, one receiver and one message, hence under a nonce of zeros.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import ProtocolError, SealError
from shared.secure_sum.messages import AdvertisedKeys
from shared.secure_sum.setting import RandomBytes, SumSetting
from shared.secure_sum.sharing import SHARE_BYTES

KEY_BYTES = 32
_NONCE = bytes(12)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RoundSecrets:
    """What a site draws anew for every round: two X25519 private keys, and the seed of its self-mask; 32 bytes each."""

    mask_key: bytes = field(repr=False)
    share_key: bytes = field(repr=False)
    self_mask: bytes = field(repr=False)

    @classmethod
    def draw(cls, random_bytes: RandomBytes) -> "RoundSecrets":
        """Independent and uniform."""
        return cls(mask_key=random_bytes(KEY_BYTES), share_key=random_bytes(KEY_BYTES), self_mask=random_bytes(KEY_BYTES))


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(self_mask: bytes, *, setting: SumSetting, site: str) -> bytes:
    """What a self-mask seed, once restored from shares, is held against; says nothing of it before."""
    return hashlib.sha256(_statement(setting, "self-mask", site) + self_mask).digest()


def keys_statement(setting: SumSetting, site: str, *, mask_key: str, share_key: str, self_mask: str) -> bytes:
    """What a site signs of its keys and commitment (hex)."""
    return _statement(setting, "advertise keys", site, mask_key, share_key, self_mask)


def verify_keys(keys: AdvertisedKeys, setting: SumSetting, roster: Mapping[str, Ed25519PublicKey]) -> None:
    """Return where the site that `keys` name signed them for this setting.

    Raises:
        SealError: it did not, or there is no such site.
    """
    statement = keys_statement(setting, keys.name, mask_key=keys.mask_key, share_key=keys.share_key, self_mask=keys.self_mask)
    try:
        _check_signature(roster[keys.name].public_bytes_raw(), keys.signature, statement)
    except KeyError:
        raise SealError(f"secure sum: expected keys of a site on the roster, got {keys.name}'s") from None
    except InvalidSignature:
        raise SealError(f"secure sum: expected the signature of site {keys.name} on its keys for this round, got another") from None


def survivors_statement(setting: SumSetting, site: str, survivors: Sequence[str]) -> bytes:
    """What a site signs of the list of survivors that it was told."""
    return _statement(setting, "sign survivors", site, hashlib.sha256(json.dumps(list(survivors)).encode()).hexdigest())


def verify_survivors(site: str, signature: str, survivors: Sequence[str], *, setting: SumSetting, roster: Mapping[str, Ed25519PublicKey]) -> None:
    """Return where this site signed this very list for this setting.

    Raises:
        SealError: it did not, or there is no such site.
    """
    try:
        _check_signature(roster[site].public_bytes_raw(), signature, survivors_statement(setting, site, survivors))
    except KeyError:
        raise SealError(f"secure sum: expected the signature of a site on the roster, got {site}'s") from None
    except InvalidSignature:
        raise SealError(f"secure sum: expected the signature of site {site} on the same list of survivors, got another") from None


@functools.lru_cache(maxsize=4096)
def _check_signature(public: bytes, signature: str, statement: bytes) -> None:
    """Return where the signature (hex) is this key's. What held once holds: the sites of a simulation, all in one process, look at the same signatures.

    Raises:
        InvalidSignature: it is not.
    """
    Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), statement)


class PairKeys:
    """The keys that a site has with one other, from its own two private keys and the other's public ones."""

    def __init__(self, setting: SumSetting, site: str, private: bytes) -> None:
        self._setting = setting
        self._site = site
        self._private = X25519PrivateKey.from_private_bytes(private)

    def mask(self, other: str, public: str, model: str) -> bytes:
        """The key of the mask between the two, the same at both where both trained on the model with this digest.

        Raises:
            ProtocolError: `public` (hex) is no key that anything could be agreed with.
        """
        return self._derive(other, public, "mask", *sorted((self._site, other)), model)

    def shares(self, other: str, public: str, *, sender: str) -> bytes:
        """The key of the shares that `sender`, one of the two, seals to the other.

        Raises:
            ProtocolError: as `mask`.
        """
        receiver = other if sender == self._site else self._site
        return self._derive(other, public, "shares", sender, receiver)

    def _derive(self, other: str, public: str, purpose: str, *names: str) -> bytes:
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
        except ValueError:  # of low order: the secret would be zero
            raise ProtocolError(f"secure sum: expected an X25519 key of site {other}, got one that agrees with nobody's") from None
        return derive_key(secret, self._setting, purpose, *names)


def self_mask_key(self_mask: bytes, *, setting: SumSetting, site: str) -> bytes:
    """The key of a site's self-mask."""
    return derive_key(self_mask, setting, "self-mask", site)


def derive_key(secret: bytes, setting: SumSetting, *purpose: str) -> bytes:
    """32 bytes for one purpose."""
    return HKDF(SHA256(), KEY_BYTES, salt=setting.digest, info=_info(*purpose)).derive(secret)


def seal_shares(key: bytes, self_mask: bytes, mask_key: bytes, *, setting: SumSetting, sender: str, receiver: str) -> str:
    """Two shares (66 bytes each) that only the receiver can read, hex; `key` seals nothing else."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, self_mask + mask_key, _statement(setting, "shares", sender, receiver)).hex()


def open_shares(key: bytes, sealed: str, *, setting: SumSetting, sender: str, receiver: str) -> tuple[bytes, bytes]:
    """The shares of the sender's self-mask seed and mask key.

    Raises:
        SealError: the sender did not seal them to the receiver for this round.
    """
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, bytes.fromhex(sealed), _statement(setting, "shares", sender, receiver))
    except InvalidTag:
        raise SealError(f"secure sum: expected shares of site {sender} for site {receiver} in this round, got other bytes") from None
    return plain[:SHARE_BYTES], plain[SHARE_BYTES:]


def _statement(setting: SumSetting, stage: str, *names: str) -> bytes:
    return b"wardround secure sum " + setting.digest + _info(stage, *names)


@functools.lru_cache(maxsize=4096)
def _info(*names: str) -> bytes:
    return json.dumps(names).encode()
