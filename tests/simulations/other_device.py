"""A device that is none: tensors that say they are on "meta", are computed on the CPU, and refuse to meet a CPU's tensor, as an accelerator's do.

What runs on it, and gives the CPU's numbers, names no device of its own. It says nothing about speed, nor about an accelerator's kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

DEVICE = "meta"  # every build of torch has it, and it computes nothing by itself


class DeviceMismatchError(RuntimeError):
    """An operation met tensors of two devices."""


class OtherTensor(torch.Tensor):
    """A tensor of the other device; `own` is what it is on the CPU."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> "OtherTensor":
        """As `own`, elsewhere."""
        made: OtherTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=DEVICE
        )
        made.own = own
        return made

    def numpy(self, *_: object, **__: object) -> Any:  # type: ignore[override]
        """As torch says of any other device."""
        raise TypeError("can't convert another device's tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Never reached while `_Device` is on."""
        raise AssertionError(function)


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        there = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
        named = kwargs.get("device")
        if named is not None:
            kwargs["device"] = torch.device("cpu")
        given = function(*tree_map(_own, args), **tree_map(_own, kwargs))
        copies = function in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        if there and not copies and any(not isinstance(tensor, OtherTensor) and tensor.dim() for tensor in tensors):
            raise DeviceMismatchError(f"{function}: tensors of two devices")
        elsewhere = torch.device(named).type == DEVICE if named is not None else bool(there)
        if function is torch.ops.aten.copy_.default:
            return args[0]
        outs = {id(tensor.own): tensor for tensor in there}  # what was written in place is who it was
        return tree_map_only(torch.Tensor, lambda value: outs[id(value)] if id(value) in outs else OtherTensor(value), given) if elsewhere else given


def _own(value: Any) -> Any:
    return value.own if isinstance(value, OtherTensor) else value


@contextmanager
def other_device() -> Iterator[str]:
    """Inside, `DEVICE` can be named as any device."""
    with _Device():
        yield DEVICE
