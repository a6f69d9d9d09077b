"""Convolutions with a kernel of their own for each of many sites.

S: sites. N: rows of each site; R = S x N. T: positions of the output, over all uses. G: groups of channels.
"""

import torch
from torch import nn

from simulations.blocks.layers import NotStackableError, StackedProducts


class StackedConv(StackedProducts):
    """`(R, in, *positions) -> (R, out, *positions)`: a kernel for each site, along one axis or two.

    Each site's rows go through torch's own convolution, channels last: as fast as one grouped convolution over all sites or a batched product
    of patches, and nothing is copied. Patches are made only for records' gradients, some rows at a time.

    Raises:
        NotStackableError: the rows are not filled up with zeros.
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, name: str) -> None:
        super().__init__(layer)
        if layer.padding_mode != "zeros":
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) is padded with {layer.padding_mode!r} instead of zeros")
        self.groups = layer.groups
        self._flat = isinstance(layer, nn.Conv1d)  # one axis: as two, of which the first has length 1
        first = (1,) if self._flat else ()
        self._kernel = (*first, *layer.kernel_size)
        self._stride = (*first, *layer.stride)
        self._dilation = (*first, *layer.dilation)
        self._padding = _padding(layer)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Site by site."""
        padded = nn.functional.pad(rows.unsqueeze(2) if self._flat else rows, self._padding).contiguous(memory_format=torch.channels_last)
        weights = self.part("weight").flatten(0, 1).view(self.num_sites, -1, self.part("weight").shape[2], *self._kernel)
        biases = self.part("bias").unbind(0) if "bias" in self.parts else [None] * self.num_sites
        given = torch.cat([
            nn.functional.conv2d(of_site, weight, bias, stride=self._stride, dilation=self._dilation, groups=self.groups).contiguous(
                memory_format=torch.channels_last  # which for a single channel it is not by itself; pooling is several times as fast
            )
            for of_site, weight, bias in zip(torch.split(padded, len(padded) // self.num_sites), weights.unbind(0), biases, strict=True)
        ])  # fmt: skip
        return self.keep(padded, given.squeeze(2) if self._flat else given)

    def num_near(self) -> int:
        """A site is worked on at a time, however many there are."""
        return 0

    def sizes(self) -> tuple[int, int, int]:
        num_out = self.parts["weight"].shape[1]
        return sum(given[0].numel() // num_out for _, given in self.calls), self.parts["weight"][0, 0].numel(), num_out // self.groups

    def factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taken, given = [], []
        for (padded, _), backprop in zip(self.calls, self._backprops, strict=True):
            b = (backprop.unsqueeze(2) if self._flat else backprop)[rows].permute(0, 2, 3, 1)
            taken.append(self._patches(padded[rows], b.shape[1], b.shape[2]))
            given.append(b.reshape(*b.shape[:3], self.groups, -1).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))
        return (taken[0], given[0]) if len(taken) == 1 else (torch.cat(taken, dim=1), torch.cat(given, dim=1))

    def _patches(self, padded: torch.Tensor, num_high: int, num_wide: int) -> torch.Tensor:
        """`(n G, T, kernel x in / G)`: what the kernel saw at each position."""
        num_rows, channels = padded.shape[:2]
        of_row, of_channel, of_high, of_wide = padded.stride()
        of_group = of_channel * (channels // self.groups)
        size = (num_rows, self.groups, num_high, num_wide, *self._kernel, channels // self.groups)
        strides = (
            of_row, of_group, of_high * self._stride[0], of_wide * self._stride[1],
            of_high * self._dilation[0], of_wide * self._dilation[1], of_channel,
        )  # fmt: skip
        patches = padded.as_strided(size, strides, padded.storage_offset())
        return patches.reshape(num_rows * self.groups, num_high * num_wide, -1)

    def write_products(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Torch's own gradient of a kernel, site by site."""
        for values in into.values():
            values.zero_()
        biased, shape = "bias" in self.parts, (*self.parts["weight"].shape[1:3], *self._kernel)
        options = (self._stride, (0, 0), self._dilation, False, (0, 0), self.groups, (False, True, biased))
        for (padded, _), backprop in zip(self.calls, self._backprops, strict=True):
            given = backprop.unsqueeze(2) if self._flat else backprop
            sites = zip(torch.split(padded, weights.shape[1]), torch.split(given * weights.reshape(-1, 1, 1, 1), weights.shape[1]), strict=True)
            for site, (taken, weighted) in enumerate(sites):
                kernel = self.parts["weight"][site].view(shape)
                _, weight, bias = torch.ops.aten.convolution_backward(weighted, taken, kernel, [shape[0]] if biased else None, *options)
                into["weight"][site] += weight.view(into["weight"].shape[1:])
                if biased:
                    into["bias"][site] += bias

    def write_weights(self, sums: torch.Tensor, into: torch.Tensor) -> None:
        """Of a kernel's entries the channel comes last in `sums`."""
        by_channel = sums.view(*into.shape[:2], *self._kernel, into.shape[2]).movedim(-1, 2)
        into.copy_(by_channel.reshape(into.shape))


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """As `nn.functional.pad` takes it: left and right of the last axis first."""
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            each = 0 if layer.padding == "valid" else int(layer.padding[axis])
            sides += [each, each]
    return sides
