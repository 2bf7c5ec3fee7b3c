"""Tokens per row, and rows that are lost: what a traced step cannot refuse must not pass for a result."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from gqa_jax.cache.checks import LOST, checked_lengths
from pallas_kernels import as_int32


def advance(length: Int[Array, "B"], lengths: Int[Array, "B"], num_new: int) -> tuple[Array, Array]:
    """How many of `num_new` tokens each row takes, and how many it has then, int32.

    Inside `jit` a row whose count lies outside `[0, num_new]` takes none and is lost: it has overflowed until `reset`.
    """
    lengths = checked_lengths(lengths, length.shape[0], num_new)
    bad = (lengths < 0) | (lengths > num_new)
    return jnp.where(bad, 0, lengths), jnp.where(bad, LOST, length + lengths)


def settle(out: Array, lengths: Array, lost: Array) -> Array:
    """`[B, T, ...]` results of a step: zero on padding, NaN in lost rows, where nothing can be raised inside `jit`."""
    real = (
        jnp.arange(out.shape[1], dtype=jnp.int32)[None, :] < as_int32("lengths", lengths)[:, None]
    )
    instead = jnp.where(lost, jnp.nan, 0.0).astype(out.dtype)[:, None]
    per_token = lambda x: x.reshape(*x.shape, *(1,) * (out.ndim - 2))
    return jnp.where(per_token(real & ~lost[:, None]), out, per_token(instead))
