"""The layers that private training can use, in place of those it cannot: the one file outside `client` that imports Opacus, and only its layers.

Imported by `shared.models.make_private` alone, when it is called: Opacus takes seconds to import, and alters the root logger, which is put
back here.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from shared.errors import ModelRefusedError
from shared.root_log import root_log_unchanged

with root_log_unchanged():
    from opacus.layers import DPGRU, DPLSTM, DPRNN

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
    if layer.bias_k is not None or layer.add_zero_attn:
        raise NotImplementedError("add_bias_kv and add_zero_attn are not supported")
    new = RecordAttention(
        layer.embed_dim, layer.num_heads, dropout=layer.dropout, bias=layer.in_proj_bias is not None, kdim=layer.kdim, vdim=layer.vdim,
        batch_first=layer.batch_first,
    )  # fmt: skip
    old = layer.state_dict()
    weights = old["in_proj_weight"].chunk(3) if "in_proj_weight" in old else [old[f"{kind}_proj_weight"] for kind in "qkv"]
    state = {f"{name}.weight": weight for name, weight in zip(("query", "key", "value"), weights, strict=True)}
    if "in_proj_bias" in old:
        state |= {f"{name}.bias": bias for name, bias in zip(("query", "key", "value"), old["in_proj_bias"].chunk(3), strict=True)}
    return _with_weights(new, state | {key: value for key, value in old.items() if key.startswith("out_proj.")})


class RecordAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) as nn.MultiheadAttention computes it, made of linear layers that see the records first.

    Opacus' own DPMultiheadAttention (1.6) mixes heads with steps where batch_first=True, and has no per-record gradients where it is False.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, dropout: float = 0.0, bias: bool = True, kdim: int | None = None, vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.batch_first = num_heads, batch_first
        self.query = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.key = nn.Linear(kdim or embed_dim, embed_dim, bias=bias)
        self.value = nn.Linear(vdim or embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.in_proj_weight = self.in_proj_bias = None  # nn.TransformerEncoderLayer looks here whether it may take a faster way of its own
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes and arguments of nn.MultiheadAttention on a batch; `is_causal` needs its `attn_mask`, as there."""
        if query.dim() != 3 or (is_causal and attn_mask is None):
            raise ValueError("expected a batch of sequences, and attn_mask with is_causal")
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        num_records, num_steps, _ = query.shape
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (record, head, step, step looked at)
        if attn_mask is not None:
            scores = _masked(scores, attn_mask if attn_mask.dim() == 2 else attn_mask.view(scores.shape))
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None, :])
        weights = self.dropout(scores.softmax(dim=-1))
        output = self.out_proj((weights @ v).transpose(1, 2).reshape(num_records, num_steps, -1))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(dim=1) if average_attn_weights else weights

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(*values.shape[:2], self.num_heads, -1).transpose(1, 2)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


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
