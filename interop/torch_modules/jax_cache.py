"""What torch layers share: functions bound to a config, and decoding state in PyTorch's or in JAX's hands."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import torch
from torch import Tensor

from interop.dlpack import to_torch, tree_to_jax, tree_to_torch

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


def new_cache(owner: CacheOwner, make: Callable[[], Any]) -> Any:
    """What `make` returns (a pytree of JAX arrays), owned by `owner`.

    Raises:
      ValueError: the owner is neither "torch" nor "jax".
    """
    if owner not in ("torch", "jax"):
        raise ValueError(f"`owner` must be 'torch' or 'jax', got {owner!r}")
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
    out, cache.arrays = step(tree_to_jax(inputs), cache.arrays, tree_to_jax(options, wide="cast"))
    return to_torch(out)


def check_room(cache: Any, num_new: int, lengths: Tensor | None) -> None:
    """Raises `ValueError` where a row would overflow.

    On a GPU and under `torch.compile` such rows return NaN: looking would wait for the GPU, or break the graph.
    """
    if torch.compiler.is_compiling():
        return
    arrays = cache.arrays if isinstance(cache, JaxCache) else cache
    capacity = getattr(arrays, "max_tokens", None)
    if capacity is None:
        return
    length = arrays.length
    on_cpu = (
        length.device.type == "cpu" if isinstance(length, Tensor) else length.platform() == "cpu"
    )
    if not on_cpu or (lengths is not None and lengths.device.type != "cpu"):
        return
    longest = max(
        int(held) + (num_new if lengths is None else int(lengths[row]))
        for row, held in enumerate(length.tolist())
    )
    if longest > capacity:
        raise ValueError(
            f"`cache` must hold {longest} tokens after this step, got capacity {capacity}"
        )
