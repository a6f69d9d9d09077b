"""Account first, act after: the one way by which anything with a privacy cost leaves a site.

`Charging.release` reserves the full charge durably, only then runs what needs patients, keeps the result where it could not be made again,
commits, and hands it over. Whatever fails in between leaves the full charge standing.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from client.account import AccountName, Event, Reserve
from client.ledger import Ledger
from client.noise import KEY_BYTES
from client.releases import Arrays, Releases
from shared.messages import WitnessedHead
from shared.models import Parameters, arrays_digest
from shared.privacy import PrivacyEvent
from shared.seeding import derive_key

KIND: dict[AccountName, str] = {"training": "update", "evaluation": "statistics"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked for: a round of training, or the closing evaluation of a fold, on these parameters."""

    run: str
    study_hash: str
    site: str
    account: AccountName
    fold: int
    round: int
    event: PrivacyEvent
    tuning: bool = False

    @property
    def kind(self) -> str:
        """Under which what was released is kept: the last of its kind, and of tuning, of each fold."""
        return f"tuned-{self.fold}" if self.tuning else KIND[self.account]

    def request(self, parameters: Parameters) -> str:
        """SHA-256 (hex) of all that determines the answer but for its noise."""
        return self.request_on(arrays_digest(parameters))

    def request_on(self, digest: str) -> str:
        """The same, for parameters whose `arrays_digest` is known."""
        text = f"{self.site}\n{self.run}\n{self.study_hash}\n{self.account}\n{self.fold}\n{self.round}\n{digest}"
        return hashlib.sha256(text.encode()).hexdigest()

    def key(self, seed: int | None) -> bytes:
        """The key of all its randomness: fresh from the operating system, or drawn from a simulation's seed."""
        return os.urandom(KEY_BYTES) if seed is None else release_key(seed, self.account, self.site, self.fold, self.round)


def release_key(seed: int, account: AccountName, site: str, fold: int, round_number: int) -> bytes:
    """The key of all a release's randomness in a simulation."""
    return derive_key(seed, account, site, fold, round_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charging:
    """A ledger and the releases kept beside it. `releases` is None where noise is seeded and every release can be made again."""

    ledger: Ledger
    releases: Releases | None
    seed: int | None

    def release(
        self, ask: Ask, parameters: Parameters, make: Callable[[bytes], tuple[Arrays, int]], *, witnessed: WitnessedHead | None = None
    ) -> Arrays:
        """The arrays that `make(key)` gives, with the steps it took, once they are charged; the identical ones if they were released before.

        Raises:
            BudgetExhaustedError: the plan has no steps left; `make` was not called.
        """
        request, kind = ask.request(parameters), ask.kind
        kept = self.releases.find(ask.run, kind, request) if self.releases is not None else None
        if kept is not None:
            return kept
        reserved = self.reserve(ask, request, witnessed=witnessed)
        arrays, steps = make(ask.key(self.seed))
        if self.releases is not None:
            self.releases.keep(ask.run, kind, request, arrays)
        self.ledger.commit(reserved, steps=steps, update=arrays_digest(arrays))
        return arrays

    def reserve(self, ask: Ask, request: str, *, witnessed: WitnessedHead | None = None) -> int:
        """Charge what is asked for in full, durably; the number of the charge.

        Raises:
            BudgetExhaustedError: the plan has no steps left.
        """
        entry = Reserve(
            run=ask.run, account=ask.account, fold=ask.fold, round=ask.round, request=request, event=Event.of(ask.event),
            witnessed_head=None if witnessed is None else witnessed.head, witness_signature=None if witnessed is None else witnessed.signature,
        )  # fmt: skip
        return self.ledger.reserve(entry, again=self.releases is not None)
