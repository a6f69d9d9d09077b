"""Opacus' recurrent layers with parameters of their own for each of many sites.

Opacus' cell is called once a step, and autograd then walks back through a dozen operations of each. Here a sequence is one operation: a loop
of a few batched products and in-place functions forward, and one backward (backpropagation through time), which hands over the gradients of
the gates of all steps at once. So a record's gradient of a cell's matrices is one product over its steps.

S: sites. N: rows of each site; R = S x N. T: steps. H: width of the state. G: gates times H.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from simulations.blocks.layers import NotStackableError, StackedProducts

Gradients = tuple[torch.Tensor | None, ...]


class StackedSteps(StackedProducts):
    """A linear layer of a recurrent cell; a use is all steps of a sequence: it took in `(T, S, N, in)` and gave `(T, S, N, out)`."""

    def transposed(self) -> torch.Tensor:
        """`(S, in, out)`."""
        return self.part("weight").transpose(1, 2)

    def bias(self) -> torch.Tensor:
        """`(S, 1, out)`, zeros where there is none."""
        weight = self.part("weight")
        return self.part("bias").unsqueeze(1) if "bias" in self.parts else weight.new_zeros(()).expand(len(weight), 1, weight.shape[1])

    def num_rows(self) -> int:
        return self.calls[0][0].shape[1] * self.calls[0][0].shape[2]

    def sizes(self) -> tuple[int, int, int]:
        num_out, num_in = self.parts["weight"].shape[1:]
        return sum(len(taken) for taken, _ in self.calls), num_in, num_out

    def factors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taken, given = self._steps()
        return taken.flatten(1, 2)[:, rows].transpose(0, 1), given.flatten(1, 2)[:, rows].transpose(0, 1)

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer took in and the gradients of what it gave, over the steps of all uses."""
        return _together([taken for taken, _ in self.calls]), _together(self._backprops)

    def write_products(self, weights: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        """One batched product over all records and steps of a site."""
        taken, given = self._steps()
        by_site = (given * weights.unsqueeze(-1)).transpose(0, 1).flatten(1, 2)
        into["weight"].copy_(torch.bmm(by_site.transpose(1, 2), taken.transpose(0, 1).flatten(1, 2)))
        if "bias" in self.parts:
            torch.sum(by_site, dim=1, out=into["bias"])

    def num_near(self) -> int:
        return self.num_entries() // self.sizes()[0]

    def drop(self, rows: torch.Tensor) -> None:
        self.calls = [(taken.flatten(1, 2).index_fill(1, rows, 0.0).view(taken.shape), given) for taken, given in self.calls]
        self._backprops = [values.flatten(1, 2).index_fill(1, rows, 0.0).view(values.shape) for values in self._backprops]
        for sample in self._samples.values():
            sample.index_fill_(0, rows, 0.0)


def _together(uses: list[torch.Tensor]) -> torch.Tensor:
    """One after another; a single one is not copied."""
    return uses[0] if len(uses) == 1 else torch.cat(uses)


class _Lstm(torch.autograd.Function):
    """All states of the sequence, the first included, `(T + 1, S, N, H)`, and the last cell. Gates in Opacus' order: input, forget, cell, output."""

    @staticmethod
    def forward(ctx: Any, ih: StackedSteps, hh: StackedSteps, steps: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, cell, _ = state
        num_steps, size = len(steps), hidden.shape[-1]
        hiddens, cells = (values.new_empty(num_steps + 1, *values.shape) for values in (hidden, cell))
        hiddens[0], cells[0] = hidden, cell
        gates, tanhs = steps.new_empty(*steps.shape[:3], 4 * size), steps.new_empty(num_steps, *cell.shape)
        from_input, from_hidden, bias = ih.transposed(), hh.transposed(), ih.bias() + hh.bias()
        for t in range(num_steps):
            torch.baddbmm(bias, steps[t], from_input, out=gates[t])
            gate = gates[t].baddbmm_(hiddens[t], from_hidden)
            gate[..., : 2 * size].sigmoid_()
            gate[..., 2 * size : 3 * size].tanh_()
            gate[..., 3 * size :].sigmoid_()
            put, kept, new, out = torch.split(gate, size, dim=-1)
            torch.mul(kept, cells[t], out=cells[t + 1]).addcmul_(put, new)
            torch.tanh(cells[t + 1], out=tanhs[t])
            torch.mul(out, tanhs[t], out=hiddens[t + 1])
        ctx.save_for_backward(gates, hiddens, cells, tanhs)
        ctx.layers = (ih, hh)
        return hiddens, cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *backprops: torch.Tensor) -> Gradients:
        gates, _, cells, tanhs = ctx.saved_tensors  # gates become their own gradients, step by step: there is no second pass
        (ih, hh), given, hidden, cell = ctx.layers, backprops[0], torch.zeros_like(cells[0]), backprops[1].clone()
        to_input, to_hidden, inputs = ih.part("weight"), hh.part("weight"), _inputs(ctx, gates, ih)
        for t in reversed(range(len(gates))):
            put, kept, new, out = torch.split(gates[t], hidden.shape[-1], dim=-1)
            hidden.add_(given[t + 1])
            cell.add_(torch.ops.aten.tanh_backward(hidden * out, tanhs[t]))
            of_put, of_new, before = cell * new, cell * put, cell * kept
            torch.ops.aten.sigmoid_backward(of_put, put, grad_input=put)
            torch.ops.aten.sigmoid_backward(cell.mul_(cells[t]), kept, grad_input=kept)
            torch.ops.aten.tanh_backward(of_new, new, grad_input=new)
            torch.ops.aten.sigmoid_backward(hidden.mul_(tanhs[t]), out, grad_input=out)
            torch.bmm(gates[t], to_hidden, out=hidden)
            cell = before
            if inputs is not None:
                torch.bmm(gates[t], to_input, out=inputs[t])
        return None, None, inputs, hidden.add_(given[0]), cell, gates


class _Gru(torch.autograd.Function):
    """Gates in Opacus' order: reset, update, new; the new state's part of the hidden state is multiplied by reset after its bias."""

    @staticmethod
    def forward(ctx: Any, ih: StackedSteps, hh: StackedSteps, steps: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        hidden, size = state[0], state[0].shape[-1]
        hiddens = hidden.new_empty(len(steps) + 1, *hidden.shape)
        hiddens[0] = hidden
        gates = steps.new_empty(*steps.shape[:3], 3 * size)
        recurrent = torch.empty_like(gates)
        from_input, from_hidden, of_input, of_hidden = ih.transposed(), hh.transposed(), ih.bias(), hh.bias()
        for t in range(len(steps)):
            gate = torch.baddbmm(of_input, steps[t], from_input, out=gates[t])
            again = torch.baddbmm(of_hidden, hiddens[t], from_hidden, out=recurrent[t])
            gate[..., : 2 * size].add_(again[..., : 2 * size]).sigmoid_()
            reset, update, new = torch.split(gate, size, dim=-1)
            new.addcmul_(reset, again[..., 2 * size :]).tanh_()
            torch.sub(hiddens[t], new, out=hiddens[t + 1]).mul_(update).add_(new)
        ctx.save_for_backward(gates, recurrent, hiddens)
        ctx.layers = (ih, hh)
        return hiddens

    @staticmethod
    def backward(ctx: Any, *backprops: torch.Tensor) -> Gradients:
        gates, recurrent, hiddens = ctx.saved_tensors  # both become their own gradients
        (ih, hh), given, hidden = ctx.layers, backprops[0], torch.zeros_like(hiddens[0])
        to_input, to_hidden, size, inputs = ih.part("weight"), hh.part("weight"), hidden.shape[-1], _inputs(ctx, gates, ih)
        for t in reversed(range(len(gates))):
            reset, update, new = torch.split(gates[t], size, dim=-1)
            again = recurrent[t][..., 2 * size :]
            hidden.add_(given[t + 1])
            kept, of_update, of_new = hidden * update, hidden * (hiddens[t] - new), hidden * (1 - update)
            torch.ops.aten.tanh_backward(of_new, new, grad_input=new)
            of_again = new * reset
            torch.ops.aten.sigmoid_backward(new * again, reset, grad_input=reset)
            torch.ops.aten.sigmoid_backward(of_update, update, grad_input=update)
            recurrent[t][..., : 2 * size] = gates[t][..., : 2 * size]
            again.copy_(of_again)
            torch.baddbmm(kept, recurrent[t], to_hidden, out=hidden)
            if inputs is not None:
                torch.bmm(gates[t], to_input, out=inputs[t])
        return None, None, inputs, hidden.add_(given[0]), gates, recurrent


class _Elman(torch.autograd.Function):
    """One gate: tanh or ReLU."""

    @staticmethod
    def forward(ctx: Any, ih: StackedSteps, hh: StackedSteps, steps: torch.Tensor, *state: Any) -> torch.Tensor:
        hidden: torch.Tensor = state[0]
        relu, hiddens = bool(state[1]), hidden.new_empty(len(steps) + 1, *hidden.shape)
        hiddens[0] = hidden
        from_input, from_hidden, bias = ih.transposed(), hh.transposed(), ih.bias() + hh.bias()
        for t in range(len(steps)):
            gate = torch.baddbmm(bias, steps[t], from_input, out=hiddens[t + 1]).baddbmm_(hiddens[t], from_hidden)
            (torch.relu_ if relu else torch.tanh_)(gate)
        ctx.save_for_backward(hiddens)
        ctx.layers, ctx.relu = (ih, hh), relu
        return hiddens

    @staticmethod
    def backward(ctx: Any, *backprops: torch.Tensor) -> Gradients:
        [hiddens] = ctx.saved_tensors
        (ih, hh), given, hidden = ctx.layers, backprops[0], torch.zeros_like(hiddens[0])
        gates, to_input, to_hidden = torch.empty_like(given[1:]), ih.part("weight"), hh.part("weight")
        inputs = _inputs(ctx, gates, ih)
        for t in reversed(range(len(gates))):
            hidden.add_(given[t + 1])
            if ctx.relu:
                torch.mul(hidden, hiddens[t + 1] > 0, out=gates[t])
            else:
                torch.ops.aten.tanh_backward(hidden, hiddens[t + 1], grad_input=gates[t])
            torch.bmm(gates[t], to_hidden, out=hidden)
            if inputs is not None:
                torch.bmm(gates[t], to_input, out=inputs[t])
        return None, None, inputs, hidden.add_(given[0]), None, gates


def _inputs(ctx: Any, gates: torch.Tensor, ih: StackedSteps) -> torch.Tensor | None:
    """Room for the gradient of what the sequence took in, where it is asked for."""
    return gates.new_empty(*gates.shape[:3], ih.part("weight").shape[2]) if ctx.needs_input_grad[2] else None


def loops_over(layer: nn.Module, opacus_layers: ModuleType) -> bool:
    """Whether this is a recurrent layer of Opacus whose sequences `forward_layer` runs, with cells as Opacus wrote them."""
    known = (opacus_layers.DPRNNCell, opacus_layers.DPGRUCell, opacus_layers.DPLSTMCell)
    return (
        isinstance(layer, opacus_layers.DPRNNBase)
        and type(layer).forward is opacus_layers.DPRNNBase.forward
        and type(layer).forward_layer is opacus_layers.DPRNNBase.forward_layer
        and all(type(cell) in known for cell in layer.cells)
    )


def linear_layers(layer: Any) -> list[nn.Module]:
    """Two of each cell of such a layer."""
    return [linear for cell in layer.cells for linear in (cell.ih, cell.hh)]


def forward_layer(
    steps: torch.Tensor, *initial: torch.Tensor | None, cell: nn.Module, reverse_layer: bool, is_packed: bool, **_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In place of Opacus' method of that name: all states `(T, R, H)` of one direction, the last one, and the last cell.

    Args:
        initial: the state `(R, H)`, and the cell's where it has one.

    Raises:
        NotStackableError: the sequence is packed: its rows are not site after site.
    """
    if is_packed:
        raise NotStackableError("sequences are packed, and so not ordered by site")
    ih, hh = cell.ih, cell.hh
    assert isinstance(ih, StackedSteps) and isinstance(hh, StackedSteps)
    num_sites, num_rows = ih.num_sites, steps.shape[1]
    by_site = (num_sites, num_rows // num_sites, -1)
    sequence = (steps.flip(0) if reverse_layer else steps).contiguous().view(len(steps), *by_site)
    hidden, cell_state = initial[:2]
    assert hidden is not None
    state, of_input = hidden.reshape(by_site), _gates(ih, sequence)
    of_hidden, last = of_input, None  # what comes to the gates comes to both layers, but where one is scaled
    if cell_state is not None:
        states, last = _Lstm.apply(ih, hh, sequence, state, cell_state.reshape(by_site), of_input)  # type: ignore[no-untyped-call]
        last = last.flatten(0, 1)
    elif hasattr(cell, "nonlinearity"):
        states = _Elman.apply(ih, hh, sequence, state, cell.nonlinearity == "relu", of_input)  # type: ignore[no-untyped-call]
    else:
        of_hidden = _gates(ih, sequence)
        states = _Gru.apply(ih, hh, sequence, state, of_input, of_hidden)  # type: ignore[no-untyped-call]
    ih.keep(sequence, of_input)
    hh.keep(states[:-1], of_hidden)
    given = states[1:].flatten(1, 2)
    return (given.flip(0) if reverse_layer else given), given[-1], last


def _gates(ih: StackedSteps, sequence: torch.Tensor) -> torch.Tensor:
    """`(T, S, N, G)` that take no memory: what comes to them on the way back is the gradient of the gates before their activation."""
    gates = sequence.new_zeros(()).expand(*sequence.shape[:3], ih.part("weight").shape[1])
    return gates.requires_grad_() if torch.is_grad_enabled() else gates
