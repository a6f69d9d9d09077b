"""Replies of many virtual sites in one piece, as a simulation that trains them together gives them: no message a site, no copy of its update.

Only an engine in this process can give them; over a network every site answers for itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from shared.messages import Refused, Statistics, Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What S sites answer to one task.

    Attributes:
        node_ids: S nodes.
        replies: S answers.
        shapes: of the named arrays that stand in a row of `updates`, one after another.
        updates: `(S, D)`; the row of a site that refused says nothing. Read at once: its memory is used again.
        statistics: S sums, or None where nothing may leave.
    """

    node_ids: tuple[int, ...]
    replies: tuple[Trained | Refused, ...]
    shapes: Mapping[str, tuple[int, ...]]
    updates: NDArray[np.floating]
    statistics: tuple[Statistics | None, ...]


@runtime_checkable
class BlockGrid(Protocol):
    """A grid that can answer for many sites at once."""

    def send_in_blocks(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message | Block]:
        """As `Grid.send_and_receive`, with blocks among the replies."""
