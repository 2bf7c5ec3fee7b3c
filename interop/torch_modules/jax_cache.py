"""What torch layers share: functions bound to a config, and decoding state in PyTorch's or in JAX's hands."""

import contextlib
import types
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import torch
from torch import Tensor

from gqa_jax.cache import check_step as check_arrays
from interop.dlpack import dtype_to_jax, on_device, to_torch, tree_to_jax, tree_to_torch
from interop.integers import as_int32, readable

CacheOwner = Literal["torch", "jax"]


class JaxCache:
    """Decoding state that stays in JAX: every step donates it, so it is updated in place and never copied.

    Inference only. The cache of `owner="torch"` is a tree of tensors instead, which a step returns anew.

    Attributes:
      arrays: the state now, a pytree of JAX arrays. A step invalidates what was read here before.
    """

    def __init__(self, arrays: Any):
        self.arrays = arrays

    def to_torch(self) -> Any:
        """The state as tensors with their own memory, for a layer that takes caches of torch."""
        return tree_to_torch(self.arrays, copy=True)

    @classmethod
    def from_torch(cls, cache: Any) -> "JaxCache":
        """A JAX-owned copy of a cache of tensors."""
        return cls(tree_to_jax(cache, copy=True))


class JaxBacked(torch.nn.Module):
    """A layer whose JAX functions are found again after `deepcopy` and `pickle`, which cannot copy them."""

    def _bind(self) -> dict[str, Callable]:
        """Attribute -> function, from what the layer was built with."""
        raise NotImplementedError

    def bind(self) -> None:
        """Looks the functions up and sets them as attributes."""
        for name, function in self._bind().items():
            object.__setattr__(self, name, function)

    def __getstate__(self) -> dict:
        bound = self._bind()
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.bind()


def new_cache(
    owner: CacheOwner, make: Callable[[], Any], dtype: torch.dtype | None, device: torch.device
) -> Any:
    """What `make` returns (a pytree of JAX arrays) on a device, owned by `owner`; `dtype` is that of keys and values.

    Raises:
      ValueError: the owner is neither "torch" nor "jax".
    """
    if owner not in ("torch", "jax"):
        raise ValueError(f"`owner` must be 'torch' or 'jax', got {owner!r}")
    with on_device(device), x64(dtype):
        arrays = jax.tree.map(lambda a: a.copy(), make())
        return JaxCache(arrays) if owner == "jax" else tree_to_torch(arrays, copy=True)


@torch.compiler.disable(
    reason="a JaxCache is changed in place by JAX and cannot be traced: use init_cache(owner='torch')"
)
def step_in_place(step: Callable, inputs: Any, cache: JaxCache, **options: Tensor | None) -> Tensor:
    """Runs `step(inputs, cache arrays, options) -> (out, cache)`, which donates the cache.

    Raises:
      RuntimeError: a gradient would be needed.
    """
    tensors = [x for x in jax.tree.leaves((inputs, options)) if x.requires_grad]
    if torch.is_grad_enabled() and tensors:
        raise RuntimeError(
            "a JaxCache is changed in place and has no gradients: use torch.no_grad(), or init_cache(owner='torch')"
        )
    leaves = jax.tree.leaves(inputs)
    wide = any(x.dtype == torch.float64 for x in leaves)
    with on_device(leaves[0].device), x64(torch.float64 if wide else None):
        arguments = tree_to_jax(inputs), cache.arrays, tree_to_jax(options, wide="cast")
        out, cache.arrays = step(*arguments)
        return to_torch(out)


def check_step(x: Tensor, cache: Any, lengths: Tensor | None) -> Tensor | None:
    """`lengths` as int32, after `gqa_jax.cache.check_step` where values may be read.

    On a GPU and under `torch.compile` rows that overflow, or whose length is not in [0, T], return NaN instead.

    Raises:
      ValueError, TypeError: as there.
    """
    lengths = as_int32("lengths", lengths)
    arrays = cache.arrays if isinstance(cache, JaxCache) else cache
    held = getattr(arrays, "length", None)
    if held is None:
        kind = type(cache).__name__
        raise TypeError(f"`cache` must be what this layer's `init_cache` made, got {kind}")
    on_cpu = readable(*[t for t in (held, lengths) if isinstance(t, Tensor)])
    if on_cpu and (isinstance(held, Tensor) or held.platform() == "cpu"):
        seen = types.SimpleNamespace(
            batch_size=arrays.batch_size, max_tokens=arrays.max_tokens, length=np.asarray(held)
        )
        shape: Any = jax.ShapeDtypeStruct(tuple(x.shape), dtype_to_jax(x.dtype))
        new_lengths: Any = None if lengths is None else lengths.numpy()
        check_arrays(
            shape, seen, new_lengths, width=x.shape[-1], rows={}
        )  # the traced step checks those
    return lengths


def x64(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """64-bit JAX for float64, 32-bit else."""
    return jax.enable_x64(dtype == torch.float64)
