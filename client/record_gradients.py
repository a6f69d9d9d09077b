"""The gradient of every record alone, and float64 sums of them.

A backward pass goes to the outputs of the layers; from what a layer took in and the gradient of what it gave, Opacus' rule for that kind of
layer (or torch.func, for one without a rule) makes the gradients of its parameters for each record, `(N, *parameter.shape)`.

For a linear layer on `(N, in)` inputs that tensor is never multiplied out: a record's gradient is b a^T, so its norm is |b| |a| (Goodfellow
2015, arXiv:1510.01799) and a weighted sum is one product of matrices (the "book-keeping" of Bu et al. 2023, arXiv:2210.00038). Both are
identities of the same float32 numbers, and nothing cancels in either, so in float64 they are as good as the sum written out. That is not so
for sequences, where a norm from Gram matrices can lose everything to cancellation (Opacus' ghost clipping gives norm 0 for a gradient of
norm 50 from inputs 1e6 and 1e6 + 50), so there and in all other layers it is multiplied out.

N: records of the batch.
"""

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn

RULES = GradSampleModule.GRAD_SAMPLERS
RECURRENT = (DPRNN, DPGRU, DPLSTM)  # made of linear layers, which have the rule
CHUNK_ENTRIES = 2**17  # float64 entries of a batch's gradients at once: 1 MiB, which stays in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One use of a layer in a forward pass."""

    layer: nn.Module
    inputs: list[torch.Tensor]
    output: torch.Tensor
    versions: list[int]

    def versions_now(self) -> list[int]:
        """How often each of the tensors has been written to."""
        return [tensor._version for tensor in (*self.inputs, self.output)]


class RecordGradients:
    """The gradients of each record in the last `backward`, parameter by parameter. Use it as `with record_gradients(model)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._calls: list[_Call] = []
        self._factors: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}  # weight -> b (N, out), a (N, in)
        self._samples: dict[torch.Tensor, torch.Tensor] = {}
        self._scratch = torch.empty(CHUNK_ENTRIES, dtype=torch.float64)  # used again and again: fresh memory costs more than the sums
        self._layers = layers_with_parameters(model)
        for layer in self._layers:
            if type(layer) not in RULES:
                prepare_layer(layer)
        self._hooks = [layer.register_forward_hook(self._remember) for layer in self._layers]

    def close(self) -> None:
        """The model is a plain module again."""
        self.forget()
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            vars(layer).pop("ft_compute_sample_grad", None)

    def forget(self) -> None:
        """Drop all that the last passes left."""
        self._calls.clear()
        self._factors.clear()
        self._samples.clear()

    def _remember(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            versions = [tensor._version for tensor in (*inputs, output)]
            self._calls.append(_Call(layer=layer, inputs=[tensor.detach() for tensor in inputs], output=output, versions=versions))

    def backward(self, losses: torch.Tensor) -> None:
        """Keep each record's gradient of its own loss, `(N,)`, since the last `forget`; gradients of the parameters themselves are not made.

        Raises:
            RuntimeError: what a layer took in or gave was changed in place since, so its gradients cannot be told.
        """
        uses: collections.Counter[torch.Tensor] = collections.Counter(parameter for call in self._calls for parameter in _trainable(call.layer))
        backprops = torch.autograd.grad(losses.sum(), [call.output for call in self._calls], allow_unused=True)
        with torch.no_grad():
            for call, gradient in zip(self._calls, backprops, strict=True):
                if call.versions_now() != call.versions:
                    raise RuntimeError(f"the input or output of a layer ({type(call.layer).__name__}) was changed in place")
                if gradient is not None:
                    self._keep(call, gradient, uses, len(losses))
        self._calls.clear()

    def _keep(self, call: _Call, gradient: torch.Tensor, uses: "collections.Counter[torch.Tensor]", num_records: int) -> None:
        layer, inputs = call.layer, call.inputs
        if type(layer) is nn.Linear and inputs[0].dim() == 2 and len(gradient) == num_records and uses[layer.weight] <= 1:
            self._factors[layer.weight] = (gradient, inputs[0])
            samples = {layer.bias: gradient}
        else:
            samples = RULES.get(type(layer), ft_compute_per_sample_gradient)(layer, inputs, gradient)
        for parameter in _trainable(layer):
            if parameter not in self._factors:
                self._samples[parameter] = _added(self._samples.get(parameter), samples[parameter], num_records)

    def per_record(self, parameter: nn.Parameter) -> torch.Tensor:
        """Each record's gradient of `parameter`, multiplied out, `(N, *parameter.shape)`.

        Raises:
            ValueError: it took no part in the loss.
        """
        if parameter in self._factors:
            backprops, inputs = self._factors[parameter]
            return torch.einsum("ni,nj->nij", backprops, inputs)
        return self._sample(parameter)

    def norms(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """L2 norm of each record's gradient over all `parameters` together, `(N,)` float64; not finite where the gradient is not."""
        squares = [self._squared_norms(parameter) for parameter in parameters]
        return torch.stack(squares).sum(dim=0).sqrt_()

    def _squared_norms(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter in self._factors:
            backprops, inputs = self._factors[parameter]
            return self._row_squares(backprops) * self._row_squares(inputs)
        sample = self._sample(parameter)
        return self._row_squares(sample.reshape(len(sample), parameter.numel()))

    def _row_squares(self, rows: torch.Tensor) -> torch.Tensor:
        squares = torch.zeros(len(rows), dtype=torch.float64)
        for _, chunk in self._chunks(rows):
            squares += torch.linalg.vector_norm(chunk, dim=1).square_()
        return squares

    def _chunks(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """A few columns of `(N, k)` at a time, in float64; each chunk is gone with the next."""
        num_rows, num_columns = rows.shape
        width = max(1, CHUNK_ENTRIES // max(num_rows, 1))
        for start in range(0, num_columns, width):
            columns = slice(start, min(start + width, num_columns))
            size = (num_rows, columns.stop - columns.start)
            if size[0] * size[1] <= len(self._scratch):
                yield columns, self._scratch[: size[0] * size[1]].view(size).copy_(rows[:, columns])
            else:  # more rows than a chunk has entries
                yield columns, rows[:, columns].to(torch.float64)

    def _sample(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter not in self._samples:
            raise ValueError("a parameter takes no part in the loss")
        return self._samples[parameter]

    def add_weighted_sum(self, parameter: nn.Parameter, weights: torch.Tensor, into: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """Add sum over `rows` of weight x gradient to `into`, `parameter.shape` float64; only rows with finite gradients may be asked for."""
        if parameter in self._factors:
            backprops, inputs = (factor[rows].to(torch.float64) for factor in self._factors[parameter])
            into.addmm_((weights[:, None] * backprops).t(), inputs)
            return
        sample, flat = self._sample(parameter)[rows], into.view(-1)
        for columns, chunk in self._chunks(sample.reshape(len(weights), parameter.numel())):
            flat[columns].addmv_(chunk.t(), weights)


def layers_with_parameters(model: nn.Module) -> list[nn.Module]:
    """Layers with trainable parameters of their own, each once; what is inside one without a rule is left to torch.func, as part of it."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        own = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        if own and type(layer) not in RECURRENT:
            found[layer] = None
        if not own or type(layer) in RULES or type(layer) in RECURRENT:
            waiting.extend(layer.children())
    return list(found)


def _trainable(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _added(total: torch.Tensor | None, sample: torch.Tensor, num_records: int) -> torch.Tensor:
    """A parameter that is used several times has the sum over its uses; a packed sequence's later steps have the first records only."""
    if len(sample) < num_records:
        sample = torch.cat([sample, sample.new_zeros(num_records - len(sample), *sample.shape[1:])])
    return sample if total is None else total + sample


@contextlib.contextmanager
def record_gradients(model: nn.Module) -> Iterator[RecordGradients]:
    """The gradients of the model's records, for the block; after it the model is a plain module again."""
    gradients = RecordGradients(model)
    try:
        yield gradients
    finally:
        gradients.close()
