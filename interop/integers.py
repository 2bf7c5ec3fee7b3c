"""Integer tensors at the door: one rule for lengths, positions, offsets and ids, that of the JAX functions."""

import torch
from torch import Tensor

_LOW, _HIGH = -(2**31), 2**31 - 1
_FIT = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16)


def readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on a GPU that would wait for it, under `torch.compile` break the graph."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # fake tensors, tracers
        return False
    return all(x.device.type == "cpu" for x in tensors)


def as_int32(name: str, tensor: Tensor | None) -> Tensor | None:
    """The tensor as int32, whatever integer dtype it comes in; None stays None.

    Where values cannot be read, one that does not fit becomes the nearest that does, which lies outside every array.

    Args:
      name: the argument's name, for the message.
      tensor: of any integer dtype.

    Raises:
      TypeError: not a tensor, or not of integers (bool is none).
      ValueError: a value that does not fit int32, where it can be read.
    """
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"`{name}` must be an integer tensor, got {tensor.dtype}")
    if tensor.dtype in _FIT:
        return tensor.to(torch.int32)
    wide = tensor.to(
        torch.int64
    )  # uint64 beyond int64 turns negative: refused or clamped to another bad value
    if readable(wide):
        outside = wide[(wide < _LOW) | (wide > _HIGH)]
        if outside.numel():
            raise ValueError(f"`{name}` must fit int32, got {int(outside[0])}")
    return wide.clamp(_LOW, _HIGH).to(torch.int32)
