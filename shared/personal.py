"""Which parameters of a model stay at the sites: both sides find the same ones, from the study's strategy and the task's model."""

from torch import nn

from shared.errors import ConfigurationError
from shared.strategy_options import PARTIAL, FedBN, FedPer, FedRep, Strategy

NORMALISATION = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm,
)  # fmt: skip


def personal_names(strategy: Strategy, model: nn.Module) -> frozenset[str]:
    """Names of the entries of the model's state that are never sent; none where the strategy shares the whole model.

    Raises:
        ConfigurationError: the model has no such layer, or nothing else.
    """
    if not isinstance(strategy, PARTIAL):
        return frozenset()
    state = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    layers = _normalisation(model) if isinstance(strategy, FedBN) else _head(strategy, model)
    names = frozenset(name for name in state if any(name == layer or name.startswith(f"{layer}.") for layer in layers))
    if not names or names == state:
        what = "a normalisation layer" if isinstance(strategy, FedBN) else "a head and a body"
        raise ConfigurationError(f"strategy {strategy.name}: expected a model with {what}, got one without", "choose another strategy or model")
    return names


def _normalisation(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, NORMALISATION)]


def _head(strategy: FedPer | FedRep, model: nn.Module) -> list[str]:
    """The layers that the study names, or the last one with parameters of its own."""
    layers = {name: layer for name, layer in model.named_modules() if name}
    unknown = [name for name in strategy.head if name not in layers]
    if unknown:
        raise ConfigurationError(f"strategy.head: expected layers of the model, got {unknown[0]!r}", f"known: {', '.join(layers)}")
    return list(strategy.head) or [name for name, layer in layers.items() if list(layer.parameters(recurse=False))][-1:]
