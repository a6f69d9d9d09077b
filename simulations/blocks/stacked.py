"""A model with parameters of its own for each of many sites, run on all of them at once.

Every record is treated alone by a model that can be trained privately, so only its layers with parameters need to know whose record a row
is: they are replaced by layers with a leading axis of sites, and all else (activations, pooling, attention) runs on the rows of all sites
together, as it stands. Each layer also makes the norms and weighted sums of its records' gradients.

S: sites. N: rows of each site, so the model sees R = S x N rows, site after site. d: trainable parameters.
"""

import copy
import itertools
import sys

import torch
from torch import nn

from simulations.blocks.activations import with_fast_activations
from simulations.blocks.convolution import StackedConv
from simulations.blocks.dropout import KINDS, StackedDropout
from simulations.blocks.layers import NotStackableError, StackedAffine, StackedEmbedding, StackedLayer, StackedLinear
from simulations.blocks.recurrence import StackedSteps, forward_layer, linear_layers, loops_over


def _stacked(layer: nn.Module, name: str) -> StackedLayer:
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return StackedLinear(layer)
    if type(layer) is nn.LayerNorm:
        shape, eps = list(layer.normalized_shape), layer.eps
        return StackedAffine(layer, lambda rows: nn.functional.layer_norm(rows, shape, eps=eps), channels_at=None)
    if type(layer) is nn.GroupNorm:
        groups, eps = layer.num_groups, layer.eps
        return StackedAffine(layer, lambda rows: nn.functional.group_norm(rows, groups, eps=eps), channels_at=1)
    if type(layer) is nn.Conv1d or type(layer) is nn.Conv2d:
        return StackedConv(layer, name)
    if type(layer) is nn.Embedding:
        return StackedEmbedding(layer, name)
    raise NotStackableError(f"layer {name or '(root)'!r} ({type(layer).__name__}) has no form for many sites at once")


class StackedModel:
    """`model` for `num_sites` sites at once.

    Args:
        device: where its parameters are, and where rows must come.

    Attributes:
        flat: `(S, d)`, every site's trainable parameters in the model's order; training writes to it.
        gradients: `(S, d)`, where `write_weighted_sums` writes.
        spans: name in the model's state -> columns of `flat`, and the parameter's shape.

    Raises:
        NotStackableError: it cannot be.
    """

    def __init__(self, model: nn.Module, num_sites: int, device: str = "cpu") -> None:
        self._module = copy.deepcopy(model).to(device)
        self._module.train()
        _check_modules(self._module)
        trainable = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        ends = list(itertools.accumulate(parameter.numel() for parameter in trainable))
        places = {id(parameter): slice(end - parameter.numel(), end) for parameter, end in zip(trainable, ends, strict=True)}
        state = self._module.state_dict(keep_vars=True)  # names as they cross the wire; a recurrent layer's parameters have two
        self.spans = {name: (places[id(value)], value.shape) for name, value in state.items() if id(value) in places}
        replaced: dict[nn.Module, nn.Module] = {**_stacked_layers(self._module)}
        self.layers = [layer for layer in replaced.values() if isinstance(layer, StackedLayer)]
        self._dropped: list[tuple[StackedDropout, tuple[int, ...]]] = []
        self.dropouts = [StackedDropout(layer, name, self._dropped) for name, layer in _dropouts(self._module)]
        replaced |= dict(zip((layer for _, layer in _dropouts(self._module)), self.dropouts, strict=True))
        self._module = with_fast_activations(replaced.get(self._module) or self._module)
        for parent in list(self._module.modules()):
            for name, child in list(parent._modules.items()):
                if child in replaced:
                    setattr(parent, name, replaced[child])
        dtypes = {parameter.dtype for parameter in trainable}
        if len(dtypes) != 1:
            raise NotStackableError("its trainable parameters are not all of one type")
        self.flat = torch.zeros(num_sites, ends[-1], dtype=dtypes.pop(), device=device)
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

    def dropped(self, *inputs: torch.Tensor) -> list[tuple[StackedDropout, tuple[int, ...]]]:
        """The layers of dropout in the order in which they are called, with the shape of a row's mask; noted in a pass of these rows, once.

        Raises:
            NotStackableError: dropout is along another axis than that of records.
        """
        if self.dropouts and not self._dropped:
            with torch.no_grad():
                self.without_dropout(*inputs)
        return self._dropped

    def without_dropout(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of R rows of which nothing is dropped."""
        self._dropped.clear()
        for dropout in self.dropouts:
            dropout.noting = len(inputs[0])
        try:
            return self(*inputs)
        finally:
            for dropout in self.dropouts:
                dropout.noting = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of R rows; of layers of dropout, the masks must have been drawn."""
        for layer in self.layers:
            layer.forget()
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
            layer.drop(rows)

    def write_weighted_sums(self, weights: torch.Tensor) -> None:
        """`gradients` of the active sites become the sums of weight x gradient over their records; `weights` is `(S, N)`."""
        with torch.no_grad():
            for layer in self.layers:
                layer.write_weighted_sums(weights, {name: value[: self.num_sites] for name, value in self._into[layer].items()})


def _check_modules(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) looks at other records, or keeps what it saw")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 and (type(layer) not in KINDS or layer.p == 1):
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) draws from its site's own randomness")
        if isinstance(layer, _recurrent()) and any(isinstance(inner, KINDS) and inner.p > 0 for inner in layer.modules()):
            raise NotStackableError(f"layer {name!r} ({type(layer).__name__}) drops along its steps")


def _dropouts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, KINDS) and layer.p > 0]


def _stacked_layers(module: nn.Module) -> dict[nn.Module, StackedLayer]:
    """For each layer with trainable parameters the one that takes its place."""
    replaced: dict[nn.Module, StackedLayer] = {}
    owners: dict[int, str] = {}
    looped = _loop(module)
    for name, layer in list(module.named_modules()):
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, _recurrent()) or not any(parameter.requires_grad for parameter in own.values()):
            continue  # a recurrent layer only lists the parameters of the linear layers it is made of
        if not all(parameter.requires_grad for parameter in own.values()):
            raise NotStackableError(f"layer {name!r} is frozen in part")
        for parameter in own.values():
            if owners.setdefault(id(parameter), name) != name:
                raise NotStackableError(f"layers {owners[id(parameter)]!r} and {name!r} share a parameter")
        replaced[layer] = StackedSteps(layer) if layer in looped else _stacked(layer, name)
    if not replaced:
        raise NotStackableError("it has no trainable layer")
    return replaced


def _recurrent() -> tuple[type[nn.Module], ...]:
    """Opacus' recurrent layers; who has a model with any has imported them, and nobody else need wait for that."""
    layers = sys.modules.get("opacus.layers")
    return () if layers is None else (layers.DPRNN, layers.DPGRU, layers.DPLSTM)


def _loop(module: nn.Module) -> set[nn.Module]:
    """Have Opacus' recurrent layers run whole sequences; the linear layers of their cells."""
    looped: set[nn.Module] = set()
    if _recurrent():
        for layer in module.modules():
            if loops_over(layer, sys.modules["opacus.layers.dp_rnn"]) and all(parameter.requires_grad for parameter in layer.parameters()):
                setattr(layer, "forward_layer", forward_layer)  # noqa: B010  # a method of theirs, which mypy does not know
                looped |= set(linear_layers(layer))
    return looped
