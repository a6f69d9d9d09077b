"""A model with parameters of its own for each of many sites, run on all of them at once.

Every record is treated alone by a model that can be trained privately, so only its layers with parameters need to know whose record a row
is: they are replaced by layers with a leading axis of sites, and all else (activations, pooling, attention, recurrence) runs on the rows of
all sites together, as it stands. Each layer also makes the norms and weighted sums of its records' gradients, from what it took in and the
gradient of what it gave, as `client.record_gradients` does for one site in float64.

S: sites. N: rows of each site, so the model sees R = S x N rows, site after site. d: trainable parameters. T: uses of a layer, or positions
along its middle axes.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import nn

MULTIPLIED_OUT = 2**22  # entries of records' gradients at once, where a norm needs them written out


class NotStackableError(Exception):
    """This model cannot be stacked; the text says why, in words for whoever wrote it."""


class StackedLayer(nn.Module):
    """A layer whose parameters have a leading axis of sites; `slots` says which of the model's parameters they are.

    Attributes:
        parts: own name -> `(S, *shape)`, views of the stacked model's flat parameters.
        calls: what each use in the last forward pass took in and gave.
    """

    replaces: ClassVar[type[nn.Module]]

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

    def take_backprops(self, backprops: list[torch.Tensor]) -> None:
        """The gradients of what each use gave, in order."""
        self._backprops = backprops

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer took in `(R, T, in)` and the gradients of what it gave `(R, T, out)`, over all uses and positions."""
        taken = [_with_positions(call[0]) for call in self.calls]
        given = [_with_positions(backprop) for backprop in self._backprops]
        return (taken[0], given[0]) if len(taken) == 1 else (torch.cat(taken, dim=1), torch.cat(given, dim=1))

    def squared_norms(self) -> torch.Tensor:
        """`(R,)`: of each record's gradient of all the parameters of this layer."""
        raise NotImplementedError

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """Write, for each site, sum of weight x gradient over its N records to `into[name]`, `(S, *shape)`.

        Args:
            weights: `(S, N)`.
        """
        raise NotImplementedError


def _with_positions(values: torch.Tensor) -> torch.Tensor:
    """`(R, in)` or `(R, ..., in)` as `(R, T, in)`."""
    return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)


class StackedLinear(StackedLayer):
    """`(R, ..., in) -> (R, ..., out)`, a matrix for each site."""

    replaces = nn.Linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Each site's rows by its own matrix, in one batched product."""
        weight = self.part("weight")
        by_site = rows.reshape(self.num_sites, -1, rows.shape[-1])
        columns = weight.transpose(1, 2)
        given = torch.baddbmm(self.part("bias").unsqueeze(1), by_site, columns) if "bias" in self.parts else torch.bmm(by_site, columns)
        return self.keep(rows, given.view(*rows.shape[:-1], weight.shape[1]))

    def squared_norms(self) -> torch.Tensor:
        """A record's gradient is sum over its T positions of b a^T; for one position its norm is |b| |a| (Goodfellow 2015)."""
        taken, given = self.rows()
        if taken.shape[1] == 1:
            return _squares(given[:, 0]) * (_squares(taken[:, 0]) + ("bias" in self.parts))
        squares = torch.cat([_squares(torch.bmm(b.transpose(1, 2), a).flatten(1)) for a, b in _in_pieces(taken, given)])
        return squares + _squares(given.sum(dim=1)) if "bias" in self.parts else squares

    def write_weighted_sums(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """One batched product over all records and positions of a site."""
        taken, given = self.rows()
        weighted = (given * weights.reshape(-1, 1, 1)).reshape(self.num_sites, -1, given.shape[-1])
        into["weight"].copy_(torch.bmm(weighted.transpose(1, 2), taken.reshape(self.num_sites, -1, taken.shape[-1])))
        if "bias" in self.parts:
            torch.sum(weighted, dim=1, out=into["bias"])


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
            by_site = sample.reshape(self.num_sites, weights.shape[1], -1)
            into[name].copy_(torch.bmm(weights.unsqueeze(1), by_site).reshape(into[name].shape))


def _squares(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()


def _in_pieces(taken: torch.Tensor, given: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    step = max(1, MULTIPLIED_OUT // (taken.shape[-1] * given.shape[-1]))
    return zip(torch.split(taken, step), torch.split(given, step), strict=True)


def _stacked(layer: nn.Module, name: str) -> StackedLayer:
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return StackedLinear(layer)
    if type(layer) is nn.LayerNorm:
        shape, eps = list(layer.normalized_shape), layer.eps
        return StackedAffine(layer, lambda rows: nn.functional.layer_norm(rows, shape, eps=eps), channels_at=None)
    if type(layer) is nn.GroupNorm:
        groups, eps = layer.num_groups, layer.eps
        return StackedAffine(layer, lambda rows: nn.functional.group_norm(rows, groups, eps=eps), channels_at=1)
    raise NotStackableError(f"layer {name or '(root)'!r} ({type(layer).__name__}) has no form for many sites at once")


class StackedModel:
    """`model` for `num_sites` sites at once.

    Attributes:
        flat: `(S, d)`, every site's trainable parameters in the model's order; training writes to it.
        gradients: `(S, d)`, where `write_weighted_sums` writes.
        spans: name in the model's state -> columns of `flat`, and the parameter's shape.

    Raises:
        NotStackableError: it cannot be.
    """

    def __init__(self, model: nn.Module, num_sites: int) -> None:
        self._module = copy.deepcopy(model)
        self._module.train()
        _check_modules(self._module)
        trainable = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        ends = list(itertools.accumulate(parameter.numel() for parameter in trainable))
        places = {id(parameter): slice(end - parameter.numel(), end) for parameter, end in zip(trainable, ends, strict=True)}
        state = self._module.state_dict(keep_vars=True)  # names as they cross the wire; a recurrent layer's parameters have two
        self.spans = {name: (places[id(value)], value.shape) for name, value in state.items() if id(value) in places}
        replaced = _stacked_layers(self._module)
        self._module = replaced.get(self._module) or self._module
        for parent in list(self._module.modules()):
            for name, child in list(parent._modules.items()):
                if child in replaced:
                    setattr(parent, name, replaced[child])
        self.layers = list(replaced.values())
        dtypes = {parameter.dtype for parameter in trainable}
        if len(dtypes) != 1:
            raise NotStackableError("its trainable parameters are not all of one type")
        self.flat = torch.zeros(num_sites, ends[-1], dtype=dtypes.pop())
        self.gradients = torch.zeros_like(self.flat)
        self._into: dict[StackedLayer, dict[str, torch.Tensor]] = {}
        for layer in self.layers:
            self._into[layer] = {}
            for own, parameter in layer.slots.items():
                span = places[id(parameter)]
                layer.parts[own] = self.flat[:, span].view(num_sites, *parameter.shape)
                self._into[layer][own] = self.gradients[:, span].view(num_sites, *parameter.shape)
        self.use(num_sites)

    def use(self, num_sites: int) -> None:
        """Only the first `num_sites` sites take part from here on."""
        self.num_sites = num_sites
        for layer in self.layers:
            layer.num_sites = num_sites

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of R rows."""
        for layer in self.layers:
            layer.calls.clear()
        outputs: torch.Tensor = self._module(*inputs)
        return outputs

    def backward(self, losses: torch.Tensor) -> None:
        """Keep what gives each record's gradient of its own loss, `(R,)`."""
        given = [call[1] for layer in self.layers for call in layer.calls]
        backprops = iter(torch.autograd.grad(losses.sum(), given))
        for layer in self.layers:
            layer.take_backprops([next(backprops) for _ in layer.calls])

    def squared_norms(self) -> torch.Tensor:
        """`(R,)`: of each record's gradient over all d parameters."""
        return torch.stack([layer.squared_norms() for layer in self.layers]).sum(dim=0)

    def drop(self, rows: torch.Tensor) -> None:
        """Make the gradients of these rows zero, whatever they were."""
        for layer in self.layers:
            layer.calls = [(taken.index_fill(0, rows, 0.0), given) for taken, given in layer.calls]
            layer.take_backprops([backprop.index_fill(0, rows, 0.0) for backprop in layer._backprops])

    def write_weighted_sums(self, weights: torch.Tensor) -> None:
        """`gradients` of the active sites become the sums of weight x gradient over their records; `weights` is `(S, N)`."""
        with torch.no_grad():
            for layer in self.layers:
                layer.write_weighted_sums(weights, {name: value[: self.num_sites] for name, value in self._into[layer].items()})


def _check_modules(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) looks at other records, or keeps what it saw")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) draws its mask site by site")


def _recurrent() -> tuple[type[nn.Module], ...]:
    """Opacus' recurrent layers; who has a model with any has imported them, and nobody else need wait for that."""
    layers = sys.modules.get("opacus.layers")
    return () if layers is None else (layers.DPRNN, layers.DPGRU, layers.DPLSTM)


def _stacked_layers(module: nn.Module) -> dict[nn.Module, StackedLayer]:
    """For each layer with trainable parameters the one that takes its place."""
    replaced: dict[nn.Module, StackedLayer] = {}
    owners: dict[int, str] = {}
    for name, layer in list(module.named_modules()):
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, _recurrent()) or not any(parameter.requires_grad for parameter in own.values()):
            continue  # a recurrent layer only lists the parameters of the linear layers it is made of
        if not all(parameter.requires_grad for parameter in own.values()):
            raise NotStackableError(f"layer {name!r} is frozen in part")
        for parameter in own.values():
            if owners.setdefault(id(parameter), name) != name:
                raise NotStackableError(f"layers {owners[id(parameter)]!r} and {name!r} share a parameter")
        replaced[layer] = _stacked(layer, name)
    if not replaced:
        raise NotStackableError("it has no trainable layer")
    return replaced
