"""Models as both sides build them, and parameters as they cross the wire: a dict of NumPy arrays in the order of the state."""

import copy
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.errors import ProtocolError
from shared.seeding import derive

Parameters = dict[str, NDArray[np.floating]]
_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def mlp(num_features: int, num_outputs: int, *, hidden: Sequence[int] = (), dropout: float = 0.0, normalise: bool = False) -> nn.Sequential:
    """A multilayer perceptron with tanh, `(N, num_features) -> (N, num_outputs)`; no hidden layer is logistic regression.

    `normalise` puts LayerNorm before each tanh: each record by itself, so that it suits private training.

    Tanh keeps activations bounded, which suits clipped gradients (Papernot et al. 2021).
    """
    layers: list[nn.Module] = []
    width = num_features
    for size in hidden:
        layers += [nn.Linear(width, size), *([nn.LayerNorm(size)] if normalise else []), nn.Tanh()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def make_private(model: nn.Module) -> nn.Module:
    """A copy of `model` whose layers treat every record on its own, as private training needs; a model that does so already comes out equal.

    BatchNorm becomes GroupNorm, InstanceNorm loses its running statistics, LSTM, GRU and RNN become Opacus' layers, MultiheadAttention (also
    inside transformer layers) becomes linear layers, and in-place activations are no longer in place. Weights are carried over. Names of
    parameters may change with the layers, always in the same way; so call it in the task's `model`, on both sides, before the first round.

    Raises:
        ModelRefusedError: a layer is configured in a way that its replacement does not know, such as an LSTM with projections.

    >>> make_private(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))[1]
    GroupNorm(8, 8, eps=1e-05, affine=True)
    """
    from shared.private_layers import replacement  # Opacus, seconds to import, only where it is used

    model = copy.deepcopy(model)
    replaced = {module: replacement(module, name) for name, module in model.named_modules()}  # one for each, so what was shared stays shared
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and replaced[child] is not child:
                setattr(module, name, replaced[child])
    model = replaced[model]
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # an option of theirs, not a submodule
    return model


def initial_parameters(model: nn.Module, seed: int) -> Parameters:
    """Parameters of `model` after a seeded re-initialisation of every layer that can be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial parameters") % 2**32)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return get_parameters(model)


def get_parameters(model: nn.Module) -> Parameters:
    """Copies of the shared state: every floating-point parameter and buffer, by name."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items() if value.is_floating_point()}


def set_parameters(model: nn.Module, parameters: Mapping[str, NDArray[np.generic]]) -> None:
    """Load `parameters` into `model`; the arrays are copied.

    Raises:
        ProtocolError: names, order, shapes or types are not the model's, or a value is not finite; nothing was loaded.
    """
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    check_parameters(parameters, {name: (value.shape, _DTYPE_NAMES[value.dtype]) for name, value in state.items()})
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(np.array(parameters[name])))


def arrays_digest(arrays: Mapping[str, NDArray[np.floating]]) -> str:
    """SHA-256 (hex) over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in arrays.items():
        digest.update(f"{name}\n{value.dtype.str}{value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


Template = dict[str, tuple[tuple[int, ...], str]]


def template_of(parameters: Mapping[str, NDArray[np.generic]]) -> Template:
    """Name -> (shape, dtype) of these arrays."""
    return {name: (value.shape, str(value.dtype)) for name, value in parameters.items()}


def check_parameters(parameters: Mapping[str, NDArray[np.generic]], template: Template) -> None:
    """Names, order, shapes and dtypes are exactly the template's, and every value is finite.

    Raises:
        ProtocolError: the first thing that is not.
    """
    if list(parameters) != list(template):
        missing, extra = [n for n in template if n not in parameters], sum(n not in template for n in parameters)  # a foreign name may say anything
        raise ProtocolError(f"expected {len(template)} named tensors, got {len(parameters)} (missing: {missing[:3]}, undeclared: {extra})")
    for name, (shape, dtype) in template.items():
        value = parameters[name]
        if value.shape != shape or str(value.dtype) != dtype:
            raise ProtocolError(f"tensor {name}: expected {shape} {dtype}, got {value.shape} {value.dtype}")
        if not np.isfinite(value).all():
            raise ProtocolError(f"tensor {name}: expected finite values, got NaN or infinity")


def predict_in_batches(model: nn.Module, inputs: tuple[NDArray[np.generic], ...], *, batch_size: int = 1024) -> torch.Tensor:
    """Outputs of `model` in evaluation mode, `(N, ...)`, in batches of bounded size; made where its parameters are, and given on the CPU."""
    model.eval()
    outputs = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for start in range(0, len(inputs[0]), batch_size):
            outputs.append(model(*(torch.from_numpy(values[start : start + batch_size]).to(device) for values in inputs)).cpu())
    return torch.cat(outputs)
