"""What a site keeps for a strategy between rounds: models of its own, control variates. It survives restarts, and is never sent.

Two states a fold are there, each of a round: what is made in a round is made of the last state before it, so a round that a crash cut off, or
that is asked again, is made of the same one.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from client.strategies.local_rule import Kept
from shared.errors import StorageError
from shared.files import storage_errors, write_atomic
from shared.models import Parameters, arrays_digest

NUM_STATES = 2
OWN = 0o600  # of a file: without privacy, a site's own model is made of its patients with no noise


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    fold: int
    round_number: int
    kept: Kept


class KeptState:
    """The states of one run at one cohort, in `folder`."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._run = hashlib.sha256(run.encode()).hexdigest()[:32]

    def _paths(self, fold: int) -> list[Path]:
        """Those of a fold stay until the run's files go: its closing evaluation may be asked for again."""
        return [self._folder / f"{self._run}-kept-{fold}-{number}.safetensors" for number in range(NUM_STATES)]

    def before(self, fold: int, round_number: int) -> Kept:
        """The state of the last round before this one in this fold; empty where there is none.

        Raises:
            StorageError: a file is there and damaged.
        """
        last = self._last(fold, round_number)
        return {} if last is None else last[1].kept

    def last(self, fold: int) -> Kept:
        """The state of the last round of this fold; empty where there is none. Errors as of `before`."""
        return self.before(fold, sys.maxsize)

    def keep(self, fold: int, round_number: int, kept: Kept) -> None:
        """Durably keep the state of a round, in the place of another than the last before it.

        Raises:
            StorageError: it cannot be written; then nothing that was made with it must leave either.
        """
        last = self._last(fold, round_number)
        path = self._paths(fold)[0 if last is None else (last[0] + 1) % NUM_STATES]
        named = {f"{index:06d} {group} {name}": value for index, (group, name, value) in enumerate(_flat(kept))}
        with storage_errors(path, "keep a site's state"):
            path.parent.mkdir(parents=True, exist_ok=True)
        ordered = {name: np.array(value, order="C") for name, value in named.items()}
        write_atomic(path, save(ordered, metadata={"fold": str(fold), "round": str(round_number), "sha256": arrays_digest(named)}), mode=OWN)

    def _last(self, fold: int, round_number: int) -> tuple[int, _State] | None:
        """The last state before this round, and which of the paths holds it."""
        states = [(number, _read(path)) for number, path in enumerate(self._paths(fold)) if path.exists()]
        earlier = [(number, state) for number, state in states if state.fold == fold and state.round_number < round_number]
        return max(earlier, key=lambda found: found[1].round_number) if earlier else None


def _flat(kept: Kept) -> list[tuple[str, str, NDArray[np.floating]]]:
    return [(group, name, value) for group, arrays in kept.items() for name, value in arrays.items()]


def _read(path: Path) -> _State:
    remedy = "restore it from a backup of the site's state; or end the study, and start a new run"
    try:
        with storage_errors(path, "read a site's state"), safe_open(path, framework="numpy") as file:
            metadata, named = file.metadata() or {}, {name: file.get_tensor(name) for name in sorted(file.keys())}
        if arrays_digest(named) != metadata["sha256"]:
            raise ValueError("other values")
        kept: dict[str, Parameters] = {}
        for name, value in named.items():
            _, group, own = name.split(" ", 2)
            kept.setdefault(group, {})[own] = value
        return _State(fold=int(metadata["fold"]), round_number=int(metadata["round"]), kept=kept)
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path}: expected what a site keeps between rounds, got a damaged file", remedy) from error
