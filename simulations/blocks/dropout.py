"""Dropout for many sites at once: every site's masks come from its own key, drawn as the site alone draws them.

A lone site draws from torch's generator, whose state is that site's key's: for each batch that passes the model, layer after layer in the order of
the forward pass, a mask of the whole batch. A private site's batch is filled up to the public size, so that many rows are drawn, and more than that
come as several batches. Here the order of the layers and the shapes of their inputs are noted once, and all masks of a step are drawn before it.

S: sites. N: rows of each site. R = S x N.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import nn

from client.local_training import keyed_generator
from client.noise import subkey
from simulations.blocks.layers import NotStackableError

KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # the last three drop whole channels


class StackedDropout(nn.Module):
    """Multiplies by masks that were drawn before. While `noted` is a list it drops nothing, and notes the shapes that it is given."""

    def __init__(self, layer: nn.Module, name: str, noted: list["tuple[StackedDropout, tuple[int, ...]]"]) -> None:
        super().__init__()
        assert isinstance(layer, KINDS)
        self.keep = 1 - layer.p
        self.masks: deque[torch.Tensor] = deque()
        self.noting: int | None = None  # rows to expect
        self._name = name
        self._channels = type(layer) is not nn.Dropout
        self._noted = noted

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(R, ...)`, each row times its mask.

        Raises:
            NotStackableError: the leading axis is not that of rows.
        """
        if self.noting is None:
            return rows * self.masks.popleft()
        if len(rows) != self.noting or (self._channels and rows.dim() < 3):
            raise NotStackableError(f"layer {self._name!r} drops along an axis that is not that of records")
        shape = tuple(rows.shape[1:])
        self._noted.append((self, (shape[0], *[1] * (len(shape) - 1)) if self._channels else shape))
        return rows


class Masks:
    """The masks of all sites of a block for one round.

    Args:
        calls: the layers in the order in which they are called, with the shape of a row's mask.
        keys: of every site's randomness in this round.
        physical: of each site, rows of a private site's physical batch; None: a batch is passed as it is.
        like: of the type and on the device of the masks.
    """

    def __init__(
        self, calls: Sequence[tuple[StackedDropout, tuple[int, ...]]], keys: Sequence[bytes], *, physical: Sequence[int | None], like: torch.Tensor
    ) -> None:
        for layer, _ in calls:
            layer.masks.clear()  # of a block that failed on its way
        self._calls = calls
        self._generators = [keyed_generator(subkey(key, b"torch")) for key in keys]
        self._physical = physical
        self._dtype, self._device = like.dtype, like.device

    def draw(self, counts: Sequence[int], num_rows: int) -> None:
        """Give every layer its masks of the next step.

        Args:
            counts: records of each site that takes part, `(S,)`.
            num_rows: N; rows beyond a site's records are dropped.
        """
        masks = [torch.zeros(len(counts) * num_rows, *shape, dtype=self._dtype) for _, shape in self._calls]
        for site, (count, generator, size) in enumerate(zip(counts, self._generators, self._physical, strict=False)):
            step = size or max(count, 1)
            for start in range(0, count, step):
                rows = slice(site * num_rows + start, site * num_rows + min(start + step, count))
                for mask, (layer, shape) in zip(masks, self._calls, strict=True):
                    drawn = torch.empty(step, *shape, dtype=self._dtype).bernoulli_(layer.keep, generator=generator)
                    mask[rows] = drawn[: rows.stop - rows.start]
        for mask, (layer, _) in zip(masks, self._calls, strict=True):
            layer.masks.append(mask.div_(layer.keep).to(self._device))
