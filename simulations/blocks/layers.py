"""Layers with a leading axis of sites: the forward pass on the rows of all sites, and the norms and weighted sums of records' gradients.

They are made from what a layer took in and the gradient of what it gave, as `client.record_gradients` does for one site in float64. Norms are
exact: where a layer is used at several positions, a record's gradient is written out, as a norm from Gram matrices loses digits by
cancellation. Where it is no larger than what it is made of it is kept, and the weighted sum costs next to nothing.

S: sites. N: rows of each site, so a layer sees R = S x N rows, site after site. T: uses of a layer, or positions along its middle axes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

PIECE = 2**18  # entries at once, of records' gradients and what they are made of: they stay in cache
KEPT = 2  # times the entries that they are made of: larger gradients of records are made again for the sums


class NotStackableError(Exception):
    """This model cannot be stacked; the text says why, in words for whoever wrote it."""


class StackedLayer(nn.Module):
    """A layer whose parameters have a leading axis of sites; `slots` says which of the model's parameters they are.

    Attributes:
        parts: own name -> `(S, *shape)`, views of the stacked model's flat parameters.
        calls: what each use in the last forward pass took in and gave.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.slots = dict(layer.named_parameters(recurse=False))
        self.parts: dict[str, torch.Tensor] = {}
        self.num_sites = 0
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._backprops: list[torch.Tensor] = []

    def part(self, name: str) -> torch.Tensor:
        """The parameters `name` of the active sites."""
        return self.parts[name][: self.num_sites]

    def keep(self, taken: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Remember a use, and let gradients come to what the layer gave."""
        if torch.is_grad_enabled():
            if not given.requires_grad:
                given.requires_grad_()
            self.calls.append((taken.detach(), given))
        return given

    def forget(self) -> None:
        """Drop what the last passes left."""
        self.calls.clear()
        self._backprops = []

    def take_backprops(self, backprops: list[torch.Tensor]) -> None:
        """The gradients of what each use gave, in order."""
        self._backprops = backprops

    def num_entries(self) -> int:
        """Entries that the last forward pass and the gradients to come hold, of all rows."""
        return sum(taken.numel() + 2 * given.numel() for taken, given in self.calls)

    def num_near(self) -> int:
        """Those of them that are worked on at a time, where more sites are more."""
        return self.num_entries()

    def squared_norms(self) -> torch.Tensor:
        """`(R,)`: of each record's gradient of all the parameters of this layer."""
        raise NotImplementedError

    def drop(self, rows: torch.Tensor) -> None:
        """Make the gradients of these rows zero, whatever they were."""
        self.calls = [(taken.index_fill(0, rows, 0), given) for taken, given in self.calls]
        self._backprops = [backprop.index_fill(0, rows, 0.0) for backprop in self._backprops]

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Write, for each site, sum of weight x gradient over its N records to `into[name]`, `(S, *shape)`.

        Args:
            weights: `(S, N)`.
        """
        raise NotImplementedError


class StackedProducts(StackedLayer):
    """A layer where a record's gradient of the weight is the sum over its T positions of b a^T, and of the bias the sum of b.

    A record has `groups` such matrices, one after another: `(R G, out, in)`.
    """

    groups = 1

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._samples: dict[str, torch.Tensor] = {}
        self._room = torch.empty(0)  # for the records' gradients of every step: fresh memory costs more than they do

    def factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """a `(n G, T, in)` and b `(n G, T, out)` of these rows, over all uses and positions."""
        raise NotImplementedError

    def sizes(self) -> tuple[int, int, int]:
        """T over all uses, in and out."""
        raise NotImplementedError

    def num_rows(self) -> int:
        """R."""
        return len(self.calls[0][0])

    def write_weights(self, sums: torch.Tensor, into: torch.Tensor) -> None:
        """Write `(S, G out in)` to the parameter `(S, *shape)`."""
        into.copy_(sums.view(into.shape))

    def forget(self) -> None:
        super().forget()
        self._samples = {}

    def drop(self, rows: torch.Tensor) -> None:
        super().drop(rows)
        for sample in self._samples.values():
            sample.index_fill_(0, rows, 0.0)

    def num_entries(self) -> int:
        positions, num_in, num_out = self.sizes()
        written = self.num_rows() * self.groups * num_in * num_out if positions > 1 and self._keeps() else 0
        return super().num_entries() + written

    def _keeps(self) -> bool:
        positions, num_in, num_out = self.sizes()
        return num_in * num_out <= KEPT * positions * (num_in + num_out)

    def squared_norms(self) -> torch.Tensor:
        """For one position its norm is |b| |a| (Goodfellow 2015, arXiv:1510.01799); for several it is written out, some records at a time."""
        positions, num_in, num_out = self.sizes()
        if positions == 1 and self.groups == 1:
            taken, given = self.factors(slice(None))
            return _squares(given[:, 0]) * (_squares(taken[:, 0]) + ("bias" in self.parts))
        num_rows, size, like = self.num_rows(), self.groups * num_in * num_out, self._backprops[0]
        squares, step = like.new_empty(num_rows), self._rows_at_once()
        weights = self._rows_of_room(num_rows if self._keeps() else min(step, num_rows), size, like)
        biases = like.new_empty(num_rows, self.groups * num_out) if "bias" in self.parts else None
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            taken, given = self.factors(rows)
            piece = weights[rows] if self._keeps() else weights[: rows.stop - start]
            torch.bmm(given.transpose(1, 2), taken, out=piece.view(-1, num_out, num_in))
            squares[rows] = _squares(piece)
            if biases is not None:
                torch.sum(given.reshape(-1, self.groups, positions, num_out), dim=2, out=biases[rows].view(-1, self.groups, num_out))
        self._samples = {"weight": weights} if self._keeps() else {}
        if biases is not None:
            self._samples["bias"] = biases
            squares += _squares(biases)
        return squares

    def _rows_of_room(self, num_rows: int, size: int, like: torch.Tensor) -> torch.Tensor:
        if len(self._room) < num_rows * size:
            self._room = like.new_empty(num_rows * size)
        return self._room[: num_rows * size].view(num_rows, size)

    def _rows_at_once(self) -> int:
        positions, num_in, num_out = self.sizes()
        return max(1, PIECE // (self.groups * max(num_in * num_out, positions * (num_in + num_out))))

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """A product of weights and records' gradients, where these are kept; else one over all records and positions of a site."""
        if "weight" in self._samples:
            self.write_weights(_weighted(weights, self._samples["weight"]), into["weight"])
            if "bias" in self.parts:
                into["bias"].copy_(_weighted(weights, self._samples["bias"]))
            return
        self.write_products(weights, into)

    def write_products(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Write the weighted sums without records' gradients."""
        raise NotImplementedError


class StackedLinear(StackedProducts):
    """`(R, ..., in) -> (R, ..., out)`, a matrix for each site."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Each site's rows by its own matrix, in one batched product."""
        weight = self.part("weight")
        by_site = rows.reshape(self.num_sites, -1, rows.shape[-1])
        columns = weight.transpose(1, 2)
        given = torch.baddbmm(self.part("bias").unsqueeze(1), by_site, columns) if "bias" in self.parts else torch.bmm(by_site, columns)
        return self.keep(rows, given.view(*rows.shape[:-1], weight.shape[1]))

    def sizes(self) -> tuple[int, int, int]:
        num_out, num_in = self.parts["weight"].shape[1:]
        return sum(taken[0].numel() // num_in for taken, _ in self.calls), num_in, num_out

    def factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taken = [_with_positions(call[0][rows]) for call in self.calls]
        given = [_with_positions(backprop[rows]) for backprop in self._backprops]
        return (taken[0], given[0]) if len(taken) == 1 else (torch.cat(taken, dim=1), torch.cat(given, dim=1))

    def write_products(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """One batched product over all records and positions of a site."""
        taken, given = self.factors(slice(None))
        weighted = (given * weights.reshape(-1, 1, 1)).reshape(self.num_sites, -1, given.shape[-1])
        into["weight"].copy_(torch.bmm(weighted.transpose(1, 2), taken.reshape(self.num_sites, -1, taken.shape[-1])))
        if "bias" in self.parts:
            torch.sum(weighted, dim=1, out=into["bias"])


class StackedEmbedding(StackedLayer):
    """`(R, ...) -> (R, ..., width)`: every token's row of its site's own table.

    The row of `padding_idx` is treated as a lone site treats it: without privacy it is not trained; with privacy Opacus' rule does train it.

    Raises:
        NotStackableError: a forward pass would write to the table, or gradients are scaled by counts of other records' tokens.
    """

    def __init__(self, layer: nn.Embedding, name: str) -> None:
        super().__init__(layer)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, option):
                raise NotStackableError(f"layer {name!r} (Embedding) has {option}")
        self._padding = layer.padding_idx
        self._sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """One look-up in the tables of all sites, one after another.

        Raises:
            IndexError: a token has no row.
        """
        table = self.part("weight")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < table.shape[1]:
            raise IndexError("a token has no row in the table")
        starts = torch.arange(self.num_sites, device=tokens.device).repeat_interleave(len(tokens) // self.num_sites) * table.shape[1]
        rows = tokens + starts.view(-1, *[1] * (tokens.dim() - 1))
        return self.keep(tokens, nn.functional.embedding(rows, table.reshape(-1, table.shape[2])))

    def forget(self) -> None:
        super().forget()
        self._sums = None

    def _by_token(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Records' gradients without their zeros: record `(U,)`, token `(U,)` and the sum of b over its places in that record, `(U, width)`."""
        num_tokens, width = self.parts["weight"].shape[1:]
        keys = [
            (tokens.flatten(1) + num_tokens * torch.arange(len(tokens), device=tokens.device).unsqueeze(1)).flatten()
            for tokens, _ in _flat_rows(self.calls)
        ]
        given = torch.cat([backprop.reshape(-1, width) for backprop in self._backprops])
        unique, place = torch.unique(torch.cat(keys), return_inverse=True)
        sums = given.new_zeros(len(unique), width).index_add_(0, place, given)
        return unique // num_tokens, unique % num_tokens, sums

    def squared_norms(self) -> torch.Tensor:
        """Equal tokens of a record are summed first, so it is exact."""
        self._sums = self._by_token()
        records, _, sums = self._sums
        return sums.new_zeros(len(self.calls[0][0])).index_add_(0, records, _squares(sums))

    def drop(self, rows: torch.Tensor) -> None:
        super().drop(rows)
        self._sums = self._by_token()

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Each token's sum of its record, weighted, to its row."""
        records, tokens, sums = self._by_token() if self._sums is None else self._sums
        factors = weights.reshape(-1)[records]
        if self._sums is None and self._padding is not None:  # no norms were asked for, so without privacy
            factors = factors * (tokens != self._padding)
        num_sites, num_tokens, width = into["weight"].shape
        total = sums.new_zeros(num_sites * num_tokens, width)
        total.index_add_(0, records // weights.shape[1] * num_tokens + tokens, sums * factors.unsqueeze(1))
        into["weight"].copy_(total.view(into["weight"].shape))


def _flat_rows(calls: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Calls with one token a row as with several."""
    return ((tokens.view(len(tokens), -1), given) for tokens, given in calls)


class StackedAffine(StackedLayer):
    """The affine part after a normalisation: `(R, ...)` times a scale plus a shift for each site; what is normalised is the record alone."""

    def __init__(self, layer: nn.LayerNorm | nn.GroupNorm, normalise: Callable[[torch.Tensor], torch.Tensor], *, channels_at: int | None) -> None:
        super().__init__(layer)
        self._normalise = normalise
        self._channels_at = channels_at  # 1: one number a channel, along axis 1; None: the whole of the trailing axes

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalised, scaled and shifted."""
        plain = self._normalise(rows)
        given = plain * self._spread("weight", plain)
        if "bias" in self.parts:
            given = given + self._spread("bias", plain)
        return self.keep(plain, given)

    def _spread(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The parameters of each row's site, in a shape that multiplies `rows`."""
        part = self.part(name)
        by_row = part.repeat_interleave(len(rows) // self.num_sites, dim=0)
        if self._channels_at is not None:
            return by_row.reshape(*by_row.shape, *[1] * (rows.dim() - 2))
        return by_row.reshape(len(rows), *[1] * (rows.dim() - 1 - (part.dim() - 1)), *part.shape[1:])

    def _samples(self) -> dict[str, torch.Tensor]:
        """Each record's gradient, `(R, *shape)`."""
        shape = next(iter(self.parts.values())).shape[1:]
        samples = {}
        for name in self.parts:
            total: torch.Tensor | None = None
            for (taken, _), given in zip(self.calls, self._backprops, strict=True):
                product = given * taken if name == "weight" else given
                by_entry = (
                    product.unsqueeze(-1).flatten(2) if self._channels_at is not None else product.reshape(len(product), -1, *shape).movedim(1, -1)
                )
                sample = by_entry.sum(dim=-1)
                total = sample if total is None else total + sample
            assert total is not None
            samples[name] = total
        return samples

    def squared_norms(self) -> torch.Tensor:
        """They are small, and written out."""
        return torch.stack([_squares(sample.flatten(1)) for sample in self._samples().values()]).sum(dim=0)

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """As a product of each site's weights with its records' gradients."""
        for name, sample in self._samples().items():
            into[name].copy_(_weighted(weights, sample.flatten(1)).view(into[name].shape))


def _with_positions(values: torch.Tensor) -> torch.Tensor:
    """`(R, in)` or `(R, ..., in)` as `(R, T, in)`."""
    return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()


def _weighted(weights: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """`(S, k)`: sums of the rows of `(R, k)`, each times its weight."""
    return torch.bmm(weights.unsqueeze(1), samples.view(len(weights), weights.shape[1], -1)).squeeze(1)
