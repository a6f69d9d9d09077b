"""The gradient of every record alone, and float64 sums of them.

Opacus gives the gradients, layer by layer, as a tensor of shape `(N, *parameter.shape)`. For a linear layer on `(N, in)` inputs that
tensor is never multiplied out: a record's gradient is b a^T, so its norm is |b| |a| (Goodfellow 2015, arXiv:1510.01799) and a weighted sum
is one product of matrices (the "book-keeping" of Bu et al. 2023, arXiv:2210.00038). Both are exact identities of the same float32 numbers,
and nothing cancels in either, so in float64 they are as good as the sum written out. That is not so for sequences, where a norm from Gram
matrices can lose everything to cancellation, so there and in all other layers the gradients are multiplied out.

N: records of the batch.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn

CHUNK_ENTRIES = 2**17  # float64 entries of a batch's gradients at once: 1 MiB, which stays in cache


class RecordGradients(GradSampleModule):  # type: ignore[misc]  # opacus is untyped
    """A model that keeps each record's gradient of the last backward pass; the loss must be a sum over records.

    Buffers are allowed here: whether they stay as they are is for the probe, and for the round, to see.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, loss_reduction="sum", strict=False)
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}  # weight -> b (N, out), a (N, in)
        self._scratch = torch.empty(CHUNK_ENTRIES, dtype=torch.float64)  # used again and again: fresh memory costs more than the sums

    def capture_backprops_hook(
        self, module: nn.Module, _forward_input: torch.Tensor, forward_output: torch.Tensor, loss_reduction: str, batch_first: bool
    ) -> None:
        """Opacus' hook after a layer's backward pass; where nothing has to be added up over several uses, without its copies."""
        if not (self.hooks_enabled and _used_once(module)):
            super().capture_backprops_hook(module, _forward_input, forward_output, loss_reduction, batch_first)
            return
        inputs, backprops = self.rearrange_grad_samples(
            module=module, backprops=forward_output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        del module.max_batch_len
        samples: dict[nn.Parameter, torch.Tensor]
        if type(module) is nn.Linear and inputs[0].dim() == 2:
            weight, bias = module.weight, module.bias
            samples = {bias: backprops}
            if weight.requires_grad:
                self._factors[weight] = (backprops, inputs[0])
        else:
            samples = self.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)(module, inputs, backprops)
        for parameter in _trainable(module):
            parameter._forward_counter -= 1  # type: ignore[attr-defined]  # Opacus sets it
            if parameter not in self._factors:
                parameter.grad_sample = samples[parameter]  # type: ignore[attr-defined]  # Opacus sets it

    def forget(self) -> None:
        """Drop all that the last passes left, on the layers too, where Opacus keeps inputs until a backward pass that may never come."""
        self._factors.clear()
        self.zero_grad(set_to_none=True)
        for parameter in self._module.parameters():
            vars(parameter).pop("_current_grad_sample", None)
            parameter._forward_counter = 0
        for module in self._module.modules():
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)

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
        sample: torch.Tensor | None = getattr(parameter, "grad_sample", None)
        if sample is None:
            raise ValueError("a parameter takes no part in the loss")
        return sample

    def add_weighted_sum(self, parameter: nn.Parameter, weights: torch.Tensor, into: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """Add sum over `rows` of weight x gradient to `into`, `parameter.shape` float64; only rows with finite gradients may be asked for."""
        if parameter in self._factors:
            backprops, inputs = (factor[rows].to(torch.float64) for factor in self._factors[parameter])
            into.addmm_((weights[:, None] * backprops).t(), inputs)
            return
        sample, flat = self._sample(parameter)[rows], into.view(-1)
        for columns, chunk in self._chunks(sample.reshape(len(weights), parameter.numel())):
            flat[columns].addmv_(chunk.t(), weights)


def _used_once(module: nn.Module) -> bool:
    """True for a layer that the model has called once, and that shares no parameter with another call; packed sequences are left to Opacus."""
    own = vars(module)
    return (
        len(own.get("activations", ())) == 1
        and "max_batch_len" not in own
        and all(parameter._forward_counter == 1 and not hasattr(parameter, "_current_grad_sample") for parameter in _trainable(module))  # type: ignore[attr-defined]
    )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def record_gradients(model: nn.Module) -> Iterator[RecordGradients]:
    """The model with the gradients of its records, for the block; after it the model is a plain module again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # expected: a cohort's inputs need no gradient
        gradients = RecordGradients(model)
        try:
            yield gradients
        finally:
            gradients.forget()
            gradients.to_standard_module()
