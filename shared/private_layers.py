"""The layers that private training can use, in place of those it cannot: the one file outside `client` that imports Opacus, and only its layers.

Imported by `shared.models.make_private` alone, when it is called: Opacus takes seconds to import, and alters the root logger, which is put
back here.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from shared.errors import ModelRefusedError


@contextlib.contextmanager
def _root_log_unchanged() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


with _root_log_unchanged():
    from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention

MOST_GROUPS = 32  # Wu and He 2018


def replacement(layer: nn.Module, name: str) -> nn.Module:
    """A layer that treats every record on its own, with the weights of `layer`; `layer` itself where it does so already.

    Raises:
        ModelRefusedError: there is none for a layer configured so.
    """
    replace = next((rule for kind, rule in RULES.items() if isinstance(layer, kind)), None)
    if replace is None or not type(layer).__module__.startswith("torch.nn."):  # what somebody made of it is not ours to undo
        return layer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dropout option adds dropout")  # torch has said so when `layer` was made
            new = replace(layer)
    except (NotImplementedError, ValueError) as error:
        raise ModelRefusedError(f"model: layer {name or '(root)'!r} ({type(layer).__name__}) has no private counterpart: {error}") from error
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        new.requires_grad_(False)
    return new.train(layer.training)


def _group_norm(layer: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """Groups of channels instead of the batch: as many as divide them, up to 32.

    All features in one group after BatchNorm1d: on `(N, features)` a group of one is a single number, whose normalised value is always 0.
    """
    channels = layer.num_features
    groups = 1 if isinstance(layer, nn.BatchNorm1d) else max(n for n in range(1, min(MOST_GROUPS, channels) + 1) if channels % n == 0)
    new = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    return _with_weights(new, {name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})


def _instance_norm(layer: nn.modules.instancenorm._InstanceNorm) -> nn.Module:
    if not layer.track_running_stats:
        return layer
    new = type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine, track_running_stats=False)
    return _with_weights(new, {name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})


def _recurrent(layer: nn.RNNBase) -> nn.Module:
    kind = {"LSTM": DPLSTM, "GRU": DPGRU}.get(layer.mode, DPRNN)
    options = {} if kind is not DPRNN else {"nonlinearity": layer.mode.removeprefix("RNN_").lower()}
    new: nn.Module = kind(
        layer.input_size, layer.hidden_size, num_layers=layer.num_layers, bias=layer.bias, batch_first=layer.batch_first,
        dropout=layer.dropout, bidirectional=layer.bidirectional, proj_size=layer.proj_size, **options,
    )  # fmt: skip
    return _with_weights(new, layer.state_dict())


def _attention(layer: nn.MultiheadAttention) -> nn.Module:
    new: nn.Module = DPMultiheadAttention(
        layer.embed_dim, layer.num_heads, dropout=layer.dropout, bias=layer.in_proj_bias is not None, add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn, kdim=layer.kdim, vdim=layer.vdim, batch_first=layer.batch_first,
    )  # fmt: skip
    return _with_weights(new, layer.state_dict())


def _with_weights(new: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    if state:
        first = next(iter(state.values()))
        new.to(device=first.device, dtype=first.dtype)
        new.load_state_dict(state)
    return new


RULES: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.modules.batchnorm._BatchNorm: _group_norm,
    nn.modules.instancenorm._InstanceNorm: _instance_norm,
    nn.RNNBase: _recurrent,
    nn.MultiheadAttention: _attention,
}
