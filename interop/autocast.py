"""`torch.autocast` for what JAX computes: the rule of PyTorch's own attention."""

from typing import Any

import torch


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on for their device: floating ones, but float64; None stays None.

    `torch.nn.functional.scaled_dot_product_attention` does the same with what it is given.

    Example:
      >>> with torch.autocast("cpu", torch.bfloat16):
      ...     autocast(torch.ones(1), None)[0].dtype
      torch.bfloat16
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if _eligible(x) else x for x in tensors)


def _eligible(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
