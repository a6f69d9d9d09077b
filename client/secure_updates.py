"""A site's updates under secure aggregation: what it keeps of the sums of one run, and what it checks before it masks.

The coordinator cannot judge a masked update, so the site's own code does: names and shapes are its own, values must be finite, the norm within the
study's bound, and no entry beyond its largest value (those are clipped). Where the study makes a promise to whole sites, it clips the update, for nobody
else can (`clipped_for_sum`). A site that runs other code can break a round or bias it; that is outside what secure aggregation promises.

What was masked, and which list of survivors was signed, in the last round of each, is on disk before it leaves (`client.secure_sum.Bound`): after a restart
too no second input is masked on one model, and no second list signed, in that round, so that two sums never differ by one site's input.

Who the other sites are, a coordinator says. A site keeps their keys as it was told them first, and writes them into its log, where a hospital can
compare them with the other hospitals; those that its policy names (`sum_with`) must be in each sum, with the keys that it names.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from client.noise import KeyedStream
from client.secure_sum import UNBOUND, Bound, SumSite
from shared.distributed_noise import MORE, check_room
from shared.errors import ConfigurationError, PolicyRefusedError, ProtocolError, StorageError
from shared.files import storage_errors, write_atomic
from shared.models import Parameters
from shared.plan import SitePlan
from shared.secure_sum.messages import (
    AdvertiseKeysTask,
    MaskedInput,
    MaskInputTask,
    SecureTrainTask,
    ShareKeysTask,
    SignSurvivorsTask,
    SumReply,
    SumTask,
    UnmaskTask,
)
from shared.secure_sum.quantisation import LEAST_LEVELS
from shared.secure_sum.setting import SumForm
from shared.seeding import derive_key

logger = logging.getLogger(__name__)

T = TypeVar("T")
OWN = 0o600
MOST_KEYS = 1000  # of other sites, over a run
ARITHMETIC = 1 - 2.0**-40  # of norms, factors and products in float64, which are off by less


def clipped_for_sum(update: NDArray[np.float64], max_site_norm: float, form: SumForm) -> NDArray[np.float64]:
    """The update, scaled down where it must be, so that what it is in a sum of this form has an L2 norm of at most `max_site_norm`: roundings included.

    Theorem. For updates of weight 1, the word that stands for a value v is one of the two neighbours of v / s (`FixedPoint`), whatever is drawn, so
    it is off by less than s (1 + L 2**-51) for L levels and the step s = V / L, V the form's largest value. L is at least 2**24, so that is at most
    e = V (2**-24 + 2**-51), whoever else is in the sum. With d values the rounded vector is less than e sqrt(d) longer than the clipped one, and the
    clipped one is at most (S - e sqrt(d)) (1 - 2**-40) long. Entries beyond V are cut to it afterwards, and a zero is rounded to zero: neither makes
    it longer.

    Args:
        update: `(d,)` with a finite norm.

    Raises:
        ConfigurationError: with so many values, rounding alone may add up to more than the norm.
    """
    error = form.max_value * (1 / LEAST_LEVELS + 2.0**-51)
    most = (max_site_norm - error * math.sqrt(form.num_values)) * ARITHMETIC
    if most <= 0:
        raise ConfigurationError(
            f"privacy.max_site_norm: expected a norm that rounding leaves something of, got {max_site_norm:g}", "ask for a smaller model"
        )
    norm = math.sqrt(float(np.square(update).sum()))
    return update if norm <= most else update * (most / norm)


class SecureUpdates:
    """The sums of one run at one site.

    Args:
        form: what the study fixes of its sums.
        plan: of this site.
        signer: the site's long-lived key; a virtual site has one for the run.
        folder: where it is kept what was masked and signed last, and the other sites' keys.
        largest_norm: of an update, in L2; None: no bound of the study.
        max_site_norm: to which an update is clipped, in L2, of a promise to whole sites; None: there is none.
        seed: of a simulation, from which its keys and roundings follow; None: the operating system's randomness.
        sum_with: the hospital's policy: sites that must be in each sum, and their keys (hex); None for a virtual site, which has nobody to show keys to.
    """

    def __init__(
        self, form: SumForm, *, plan: SitePlan, name: str, run: str, study_hash: str, signer: Ed25519PrivateKey, folder: Path,
        largest_norm: float | None, max_site_norm: float | None = None, seed: int | None, sum_with: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.noise = form.noise
        self._form = form
        self._max_site_norm = max_site_norm
        self._plan = plan
        self._name = name
        self._run = run
        self._path = folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-sum.json"
        self._largest_norm = largest_norm
        self._seed = seed
        self._stream: KeyedStream | None = None
        self._roster: dict[str, Ed25519PublicKey] = {}
        self._sum_with = sum_with
        bound, self._pins = self._read()
        self._last_share = 0.0
        self._site = SumSite(
            name, form, run=run, study_hash=study_hash, sign=signer.sign, roster=self._roster, random_bytes=self._random_bytes, bound=bound,
            keep=self._write, sum_with=frozenset(sum_with or ()),
        )  # fmt: skip
        self._last: tuple[SumTask, object] | None = None  # a question that comes again, because its answer was lost, has the same answer

    def answer(self, task: SumTask) -> SumReply:
        """The reply to a stage without an update.

        Raises:
            ProtocolError, SealError, PolicyRefusedError, BoundToSumError: the refusal; see `client.secure_sum`.
            StorageError: what is to be signed could not be written down; nothing was signed.
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
            case SignSurvivorsTask():
                return self._once(task, lambda: self._site.sign_survivors(task))
            case UnmaskTask():
                return self._once(task, lambda: self._site.unmask(task))
            case _:
                raise ProtocolError("secure sum: expected a masked input with an update, got a request for it without")

    def mask(self, task: MaskInputTask, update: Parameters, weight: int, *, model: str) -> tuple[MaskedInput, NDArray[np.uint8]]:
        """An update under masks.

        Args:
            model: `arrays_digest` of what it was trained on.

        Raises:
            ProtocolError: it is not finite, or too long; or the refusal, see `client.secure_sum`.
            StorageError: what is to be masked could not be written down; nothing leaves.
        """
        flat = np.concatenate([value.reshape(-1).astype(np.float64) for value in update.values()])
        if self.noise is not None:
            return self._once(task, lambda: self._site.mask_input(task, flat.astype(np.int64), weight, model=model))
        norm = math.sqrt(float(np.square(flat).sum()))
        if not math.isfinite(norm):
            raise ProtocolError("update: expected finite values, got NaN or infinity")
        if self._largest_norm is not None and norm > self._largest_norm:
            raise ProtocolError(f"update: expected a norm of at most {self._largest_norm:g} (strategy.largest_update), got a larger one")
        if self._max_site_norm is not None:
            flat = clipped_for_sum(flat, self._max_site_norm, self._form)
        return self._once(task, lambda: self._site.mask_input(task, flat, weight, model=model))

    def _meet(self, task: AdvertiseKeysTask) -> None:
        """Take the other sites' keys as they are first told, and durably: nobody's may change while the run lasts.

        Raises:
            ProtocolError: a key is another than before.
            PolicyRefusedError: a key is another than the hospital's policy names, told now or before.
        """
        told = {**self._pins, **task.roster}
        foreign = {name for name, key in (self._sum_with or {}).items() if told.get(name, key) != key}
        if foreign:
            rule = "policy.sum_with"
            raise PolicyRefusedError(f"{rule}: expected of site {min(foreign)} the key that is written there, got another", rule=rule)
        changed = {name for name, key in task.roster.items() if self._pins.get(name, key) != key}
        if changed:
            raise ProtocolError(f"secure sum: expected the key of site {min(changed)} that this run began with, got another")
        new = task.roster.keys() - self._pins.keys()
        if len(told) > MOST_KEYS:
            raise ProtocolError(f"secure sum: expected at most {MOST_KEYS} sites in a run, got more")
        if new:
            before, self._pins = self._pins, told
            try:
                self._write(self._site.bound)
            except StorageError:
                self._pins = before
                raise
            self._roster |= {name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for name, key in task.roster.items()}
            self._show(task.of.run, sorted(new))

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

    def _show(self, run: str, names: list[str]) -> None:
        """Tell the hospital with whom it sums: whoever runs the coordinator could have invented sites, and only people can tell."""
        if self._sum_with is not None:
            for name in names:
                told = "compared by this hospital" if name in self._sum_with else "as the coordinator says"
                whose = "this site's own key" if name == self._name else told
                logger.info("site %s: run %s: secure sums with site %s, key %s (%s)", self._name, run, name, self._pins[name], whose)

    def _write(self, bound: Bound) -> None:
        told = {**dataclasses.asdict(bound), "run": self._run, "keys": self._pins}
        with storage_errors(self._path, "keep what a secure sum needs"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(told), mode=OWN)

    def _read(self) -> tuple[Bound, dict[str, str]]:
        if not self._path.exists():
            return UNBOUND, {}
        with storage_errors(self._path, "read what was masked and signed"):
            data = self._path.read_bytes()
        try:
            table = json.loads(data)
            if table["run"] != self._run or not isinstance(table["survivors"], list):
                raise ValueError("another run's")
            self._roster |= {name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for name, key in table["keys"].items()}
            bound = Bound(
                masked=_number(table["masked"]), inputs={str(key): str(value) for key, value in table["inputs"].items()},
                signed=_number(table["signed"]), survivors=tuple(map(str, table["survivors"])), input=str(table["input"]),
            )  # fmt: skip
            return bound, dict(table["keys"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self._path}: expected what was masked and signed last in this run, got a damaged file", "end the study; begin a new run"
            ) from error

    def _random_bytes(self, count: int) -> bytes:
        if self._stream is None:
            return os.urandom(count)
        drawn = bytearray(count)
        self._stream.fill_bytes(memoryview(drawn))
        return bytes(drawn)


def _number(pair: list[int]) -> tuple[int, int]:
    fold, number = pair
    return int(fold), int(number)
