"""Causal depthwise convolution in `jax.numpy`: W shifted products, exact across packed segments and padding.

Shifted products fuse into one pass over x; a grouped `conv_general_dilated` is many times slower on CPU, forward and
backward (benchmark suite `delta_rule_cpu`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="activation", inline=True)
def causal_conv(x, weight, *, bias, activation, initial_state, segment_ids):
    """Returns `(out [B, T, F], final_state [B, W, F])`; sums in float32 (float64 for float64)."""
    batch, length, features = x.shape
    width = weight.shape[0]
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    if initial_state is None:
        before = jnp.zeros((batch, width, features), x.dtype)
    else:
        before = initial_state.astype(x.dtype)
    history = jnp.concatenate([before, x], axis=1)  # token t stands at W + t
    rows = None
    if segment_ids is not None:
        rows = _Rows.of(segment_ids, width)
        history = jax.vmap(_place)(history, before, rows.first)

    total = jnp.zeros((batch, length, features), compute)
    for lag in range(width):
        window = history[:, width - lag : width - lag + length]
        if rows is not None:
            same = rows.ids[:, width - lag : width - lag + length] == segment_ids
            window = jnp.where((same & rows.real)[..., None], window, 0)
        total = total + window.astype(compute) * weight[width - 1 - lag].astype(compute)[None, None]
    if bias is not None:
        total = total + bias.astype(compute)[None, None]
    if activation is not None:
        total = activation(total)
    if rows is None:
        return total.astype(x.dtype), history[:, length:]
    out = jnp.where(rows.real[..., None], total, 0.0).astype(x.dtype)
    return out, jax.vmap(_last_window, in_axes=(0, 0, 0, None))(history, rows.ids, rows.end, width)


class _Rows(NamedTuple):
    """Where the real tokens of each row lie.

    Attributes:
      real: `[B, T]` bool.
      first, end: `[B]`, the first real token and one past the last; both 0 in a row of padding.
      ids: `[B, W + T]`, the segment of each place of the history; the W places before the first real token, which
        the initial state fills, have that token's.
    """

    real: jax.Array
    first: jax.Array
    end: jax.Array
    ids: jax.Array

    @classmethod
    def of(cls, segment_ids, width) -> "_Rows":
        real = segment_ids >= 0
        length = segment_ids.shape[1]
        place = jnp.arange(length, dtype=jnp.int32)[None]
        end = jnp.max(jnp.where(real, place + 1, 0), axis=1, initial=0)
        first = jnp.min(jnp.where(real, place, length), axis=1, initial=length)
        first = jnp.where(end == 0, 0, first)
        own = jnp.zeros_like(segment_ids, shape=(segment_ids.shape[0], 1))
        if length:
            own = jnp.take_along_axis(segment_ids, first[:, None], axis=1)
        before = jnp.broadcast_to(own, (own.shape[0], width))
        ids = jnp.pad(segment_ids, ((0, 0), (width, 0)), constant_values=-1)
        return cls(real, first, end, jax.vmap(_place)(ids, before, first))


def _place(history, before, first):
    """One row's `history` with `before` written where it ends at the first real token."""
    return jax.lax.dynamic_update_slice_in_dim(history, before, first, axis=0)


def _last_window(history, ids, end, width):
    """The W inputs up to the last real token; those of other segments and of padding are 0."""
    window = jax.lax.dynamic_slice_in_dim(history, end, width, axis=0)
    own = jax.lax.dynamic_slice_in_dim(ids, end, width, axis=0)
    return jnp.where((own == own[-1])[:, None], window, 0)
