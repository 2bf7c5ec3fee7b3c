"""Reuse of what a cache already holds of a new prompt."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gqa_jax.cache.rewinding import Rewound, target_positions


def common_prefix(cached: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> int:
    """How many leading tokens need no prefill: exact equality, and at least one token is always left to run.

    Args:
      cached: `[S]`, the tokens that a row of the cache holds.
      tokens: `[T]`, the new prompt, T >= 1.

    Raises:
      ValueError: an empty prompt or more than one dimension.

    Example:
      >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
      2
    """
    held, new = np.asarray(cached), np.asarray(tokens)
    if held.ndim != 1 or new.ndim != 1 or new.size == 0:
        raise ValueError(
            f"`cached` and `tokens` must have shape [S] and [T >= 1], got {held.shape} and {new.shape}"
        )
    shared = min(held.size, new.size)
    differs = np.flatnonzero(held[:shared] != new[:shared])
    return min(int(differs[0]) if differs.size else shared, new.size - 1)


def rewind(caches: Any, position: int | Int[Array, "B"]) -> Rewound:
    """Rewinds the caches of all layers to `position`, in the rows where every layer can; the others stay as they are.

    Args:
      caches: any pytree of caches, such as a decoder's tuple; entries may be stacked over a leading axis of layers.
      position: one for all rows, or `[B]`.

    Example:
      >>> caches, accepted = rewind(caches, common_prefix(held_tokens, prompt))
    """
    layers, tree = jax.tree.flatten(caches, is_leaf=lambda node: hasattr(node, "rewind"))
    if not layers:
        raise ValueError("`caches` must hold at least one cache")
    position = target_positions(position, jnp.zeros(layers[0].batch_size, jnp.int32))
    accepted = jnp.ones(position.shape, bool)
    for layer in layers:
        rows = layer.rewind(position).accepted
        accepted &= rows.reshape(-1, rows.shape[-1]).all(axis=0)
    moved = []
    for layer in layers:
        target = jnp.where(accepted, position, -1)  # -1 is always refused
        moved.append(layer.rewind(target).cache)
    return Rewound(jax.tree.unflatten(tree, moved), accepted)
