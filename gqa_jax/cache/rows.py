"""Rows of a batch of caches: for beam search, for requests that end, and for one prompt with many continuations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from gqa_jax.cache.checks import LOST
from pallas_kernels import as_int32


def select_rows(caches: Any, rows: Int[Array, "n"]) -> Any:
    """New caches whose row i is row `rows[i]` of the old ones: rows can be dropped, repeated and put in another order.

    Args:
      caches: any pytree of caches, such as a decoder's tuple; entries may be stacked over a leading axis of layers.
      rows: `[n]` in [0, B), n >= 1; the new batch size is n.

    Returns:
      caches of the same kind. Inside `jit`, a row out of range has overflowed: steps give NaN for it.

    Raises:
      TypeError: `rows` is no integer array.
      ValueError: no caches, or `rows` of the wrong shape or, where it can be read, out of range.

    Example:
      >>> caches = select_rows(caches, jnp.asarray([2, 2, 0]))  # two beams go on from row 2, one from row 0
    """
    entries, tree = jax.tree.flatten(caches, is_leaf=lambda node: hasattr(node, "rewind"))
    if not entries or not all(hasattr(entry, "rewind") for entry in entries):
        raise ValueError("`caches` must hold caches, and at least one")
    rows, batch = as_int32("rows", rows), entries[0].batch_size
    if rows.ndim != 1 or rows.size == 0:
        raise ValueError(f"`rows` must have shape [n >= 1], got {rows.shape}")
    if not isinstance(rows, Tracer):
        outside = np.asarray(rows)[(np.asarray(rows) < 0) | (np.asarray(rows) >= batch)]
        if outside.size:
            raise ValueError(f"`rows` must lie in [0, B={batch}), got {outside[0]}")
    missing = (rows < 0) | (rows >= batch)

    def select(entry):
        axis = entry.length.ndim - 1
        taken = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis, mode="clip"), entry)
        return dataclasses.replace(taken, length=jnp.where(missing, LOST, taken.length))

    return jax.tree.unflatten(tree, [select(entry) for entry in entries])
