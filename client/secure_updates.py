"""A site's updates under secure aggregation: what it keeps of the sums of one run, and what it checks before it masks.

The coordinator cannot judge a masked update, so the site's own code does: names and shapes are its own, values must be finite, the norm within the
study's bound, and no entry beyond its largest value (those are clipped). A site that runs other code can break a round or bias it; that is outside
what secure aggregation promises.

Which round was unmasked last, with whom and with what, is on disk before the shares leave: after a restart the same round is unmasked again only with
the same sites and the same update, so that two sums never differ by one of them.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from client.noise import KeyedStream
from client.secure_sum import NEVER, SumSite
from shared.distributed_noise import MORE, check_room
from shared.errors import ProtocolError, StorageError
from shared.files import storage_errors, write_atomic
from shared.models import Parameters
from shared.plan import SitePlan
from shared.secure_sum.messages import AdvertiseKeysTask, MaskedInput, MaskInputTask, SecureTrainTask, ShareKeysTask, SumReply, SumTask, UnmaskTask
from shared.secure_sum.setting import SumForm
from shared.seeding import derive_key

T = TypeVar("T")
OWN = 0o600


class SecureUpdates:
    """The sums of one run at one site.

    Args:
        form: what the study fixes of its sums.
        plan: of this site.
        signer: the site's long-lived key; a virtual site has one for the run.
        folder: where it is kept which round was unmasked last, and the other sites' keys.
        largest_norm: of an update, in L2; None: no bound of the study.
        seed: of a simulation, from which its keys and roundings follow; None: the operating system's randomness.
    """

    def __init__(
        self, form: SumForm, *, plan: SitePlan, name: str, run: str, study_hash: str, signer: Ed25519PrivateKey, folder: Path,
        largest_norm: float | None, seed: int | None,
    ) -> None:  # fmt: skip
        self.noise = form.noise
        self._plan = plan
        self._name = name
        self._path = folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-sum.json"
        self._largest_norm = largest_norm
        self._seed = seed
        self._stream: KeyedStream | None = None
        self._roster: dict[str, Ed25519PublicKey] = {}
        unmasked, survivors, last_input, self._pins = self._read()
        self._last_share = 0.0
        self._site = SumSite(
            name, form, run=run, study_hash=study_hash, sign=signer.sign, roster=self._roster, random_bytes=self._random_bytes, unmasked=unmasked,
            survivors=survivors, last_input=last_input,
        )  # fmt: skip
        self._last: tuple[SumTask, object] | None = None  # a question that comes again, because its answer was lost, has the same answer

    def answer(self, task: SumTask) -> SumReply:
        """The reply to a stage without an update.

        Raises:
            ProtocolError, SealError: the refusal; see `client.secure_sum`.
            StorageError: what is to be unmasked could not be written down.
        """
        match task:
            case AdvertiseKeysTask():
                self._check_noise(task)
                self._meet(task)
                self._last = None
                if self._seed is not None:
                    self._stream = KeyedStream(derive_key(self._seed, "secure sum", self._name, task.of.fold, task.of.round))
                return self._site.advertise_keys(task)
            case ShareKeysTask():
                return self._once(task, lambda: self._site.share_keys(task))
            case UnmaskTask():
                return self._once(task, lambda: self._unmask(task))
            case _:
                raise ProtocolError("secure sum: expected a masked input with an update, got a request for it without")

    def mask(self, task: MaskInputTask, update: Parameters, weight: int, *, model: str) -> tuple[MaskedInput, NDArray[np.uint8]]:
        """An update under masks.

        Args:
            model: `arrays_digest` of what it was trained on.

        Raises:
            ProtocolError: it is not finite, or too long; or the refusal, see `client.secure_sum`.
        """
        flat = np.concatenate([value.reshape(-1).astype(np.float64) for value in update.values()])
        if self.noise is not None:
            return self._once(task, lambda: self._site.mask_input(task, flat.astype(np.int64), weight, model=model))
        norm = math.sqrt(float(np.square(flat).sum()))
        if not math.isfinite(norm):
            raise ProtocolError("update: expected finite values, got NaN or infinity")
        if self._largest_norm is not None and norm > self._largest_norm:
            raise ProtocolError(f"update: expected a norm of at most {self._largest_norm:g} (strategy.largest_update), got a larger one")
        return self._once(task, lambda: self._site.mask_input(task, flat, weight, model=model))

    def _meet(self, task: AdvertiseKeysTask) -> None:
        """Take the other sites' keys as they are first told, and durably: nobody's may change while the run lasts.

        Raises:
            ProtocolError: a key is another than before.
        """
        changed = {name for name, key in task.roster.items() if self._pins.get(name, key) != key}
        if changed:
            raise ProtocolError(f"secure sum: expected the key of site {min(changed)} that this run began with, got another")
        if task.roster.keys() - self._pins.keys():
            self._pins |= task.roster
            self._roster |= {name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for name, key in task.roster.items()}
            self._write()

    def _check_noise(self, task: AdvertiseKeysTask) -> None:
        """Return where what all sites together add is enough for this one's plan.

        Raises:
            ProtocolError: it is not.
            ConfigurationError: what the theorem adds to epsilon is more than the noise beyond the plan's makes up for.
        """
        if self.noise is None:
            return
        needed = (self._plan.noise_multiplier or 0.0) * MORE
        if task.noise_multiplier < needed * (1 - 1e-12):
            raise ProtocolError(
                f"secure sum: expected a noise multiplier of at least {needed:g} of all sites together, got {task.noise_multiplier:g}"
            )
        check_room(self._plan, self.noise)

    def check(self, task: SecureTrainTask, weight: int) -> None:
        """Return where an update may be made and masked for this request, before anything is trained.

        Raises:
            ProtocolError: it is for another round than the one that it is to be summed in, at another weight, or no round is at that stage.
        """
        of, train = task.mask_input.of, task.train
        if (of.run, of.study_hash, of.fold, of.round) != (train.run, train.study_hash, train.fold, train.round):
            raise ProtocolError("secure sum: expected an update in the sum of its own round, got a request for another")
        if task.weight != weight:
            raise ProtocolError(f"secure sum: expected this site's own weight, {weight}, got {task.weight}")
        if self._last is None or self._last[0] != task.mask_input:  # else it is answered as before
            self._site.setting_to_mask(task.mask_input)

    def share_std(self, task: MaskInputTask) -> float:
        """Standard deviation of this site's share of the noise in the sum that it is asked to be in, in grid points.

        Raises:
            ProtocolError: no round is at that stage.
        """
        assert self.noise is not None
        if self._last is not None and self._last[0] == task:
            return self._last_share
        self._last_share = self.noise.share_std(self._site.setting_to_mask(task).noise_multiplier)
        return self._last_share

    def _once(self, task: SumTask, make: Callable[[], T]) -> T:
        if self._last is None or self._last[0] != task:
            self._last = task, make()
        return self._last[1]  # type: ignore[return-value]

    def _unmask(self, task: UnmaskTask) -> SumReply:
        reply = self._site.unmask(task)
        self._write()
        return reply

    def _write(self) -> None:
        fold, number = self._site.last_unmasked
        told = {"fold": fold, "round": number, "survivors": list(self._site.last_survivors), "input": self._site.last_input, "keys": self._pins}
        with storage_errors(self._path, "keep what a secure sum needs"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(told), mode=OWN)

    def _read(self) -> tuple[tuple[int, int], tuple[str, ...], str, dict[str, str]]:
        if not self._path.exists():
            return NEVER, (), "", {}
        try:
            with storage_errors(self._path, "read which sum was unmasked"):
                table = json.loads(self._path.read_bytes())
            self._roster |= {name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for name, key in table["keys"].items()}
            return (int(table["fold"]), int(table["round"])), tuple(map(str, table["survivors"])), str(table["input"]), dict(table["keys"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{self._path}: expected which sum was unmasked last, got a damaged file", "end the study; begin a new run") from error

    def _random_bytes(self, count: int) -> bytes:
        if self._stream is None:
            return os.urandom(count)
        drawn = bytearray(count)
        self._stream.fill_bytes(memoryview(drawn))
        return bytes(drawn)
