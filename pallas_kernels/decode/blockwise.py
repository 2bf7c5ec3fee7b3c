"""Decode attention, a few (row, kv head) pairs at a time: the cache is read once, in its own dtype where it can be.

The T * R queries of a kv head are the rows of one matrix product over its keys and one over its values, so that
nothing is repeated. An 8-bit cache is exact in bfloat16: with bfloat16 queries it is widened to that, otherwise to
float32, and only for the pairs at work. Scales of a quantised cache multiply logits and weights, never the cache.

Pairs of which anything comes out that is not finite are computed again, one by one, with zeros for the values that are
not: what is hidden has weight 0, and 0 times NaN is NaN.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels._inert import finite_part
from pallas_kernels._precision import compute_dtype
from pallas_kernels.decode import algebra, tuning


def decode_attention(operands: algebra.Operands, options: algebra.Options):
    """Returns `[B, T, N, Dv]`; softmax in float32."""
    batch, num_new, num_heads, head_dim = operands.query.shape
    num_kv_heads, capacity = operands.key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    grouped = operands.query.reshape(batch, num_new, num_kv_heads, group, head_dim)
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, num_new * group, head_dim)
    seen = algebra.visible(operands.lengths, num_new, capacity, options.sliding_window)
    sinks = None if operands.sinks is None else operands.sinks.reshape(num_kv_heads, group)
    caches = (operands.key_cache, operands.value_cache, operands.key_scale, operands.value_scale)
    of_pairs, attend = (rows, *caches), functools.partial(_pair, options)

    def of_pair(pair, is_clean=True):
        b, k = pair
        taken = jax.tree.map(lambda x: x[b, k], of_pairs)
        return attend(taken, seen[b], None if sinks is None else sinks[k], is_clean=is_clean)

    def repaired(out, pairs):
        again = functools.partial(jax.lax.map, functools.partial(of_pair, is_clean=False), pairs)
        return jax.lax.cond(jnp.isfinite(out).all(), lambda: out, again)

    count = batch * num_kv_heads
    pairs = jnp.divmod(jnp.arange(count), num_kv_heads)
    size = tuning.pairs_at_once(count)
    if isinstance(count, int):  # not a symbol of jax.export
        size = math.gcd(count, size)
    if size == count:
        # By axes, not by indices: a gather of all pairs would be a copy of the caches.
        of_row = jax.vmap(attend, in_axes=(0, None, 0))
        out = jax.vmap(of_row, in_axes=(0, 0, None))(of_pairs, seen, sinks)
        out = repaired(out.reshape(count, *out.shape[2:]), pairs)
    else:
        few = tuple(index.reshape(-1, size) for index in pairs)
        out = jax.lax.map(lambda pairs: repaired(jax.vmap(of_pair)(pairs), pairs), few)
    out = out.reshape(batch, num_kv_heads, num_new, group, -1)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, num_new, num_heads, -1)


def _pair(options: algebra.Options, of_pair, seen, sinks: jax.Array | None, is_clean=True):
    """`[T * R, Dv]` of one row and kv head.

    Args:
      options: of the call.
      of_pair: queries `[T * R, D]`, keys `[S, D]`, values `[S, Dv]` and their scales `[S]` or None.
      seen: `[T, S]`.
      sinks: `[R]`, or None.
      is_clean: no value is NaN or infinite.
    """
    rows, key, value, key_scale, value_scale = of_pair
    num_new, capacity = seen.shape
    group = rows.shape[0] // num_new
    compute = compute_dtype(rows.dtype)

    def widened(cache):
        cache = algebra.numbers(cache)
        narrow = rows.dtype == jnp.bfloat16 and (
            cache.dtype == jnp.bfloat16 or cache.dtype.itemsize == 1
        )
        return cache.astype(jnp.bfloat16 if narrow else compute)

    def product(subscripts, left, right):
        return jnp.einsum(
            subscripts,
            left.astype(right.dtype),
            right,
            preferred_element_type=compute,
            precision="default" if right.dtype == jnp.bfloat16 else "highest",
        )

    value = widened(value)
    if value_scale is not None:
        value_scale = value_scale.astype(compute)
    logits = options.scale * product("qd,sd->qs", rows, widened(key))
    if key_scale is not None:
        logits = logits * key_scale.astype(compute)[None]
    if options.logits_soft_cap is not None:
        logits = options.logits_soft_cap * jnp.tanh(logits / options.logits_soft_cap)
    if not is_clean:  # who sees such a token is NaN by its logit
        finite = jnp.isfinite(value).all(-1)
        value = finite_part(value)
        if value_scale is not None:
            finite, value_scale = finite & jnp.isfinite(value_scale), finite_part(value_scale)
        logits = jnp.where(finite[None], logits, jnp.nan)
    visible = jnp.broadcast_to(seen[:, None], (num_new, group, capacity))
    logits = jnp.where(visible.reshape(logits.shape), logits, -jnp.inf)
    top = logits.max(axis=-1)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(compute), num_new)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top[:, None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    if value_scale is not None:
        weights = weights * value_scale[None]
    out = product("qs,sd->qd", weights, value)
    return (out / jnp.where(total == 0.0, 1.0, total)[:, None]).astype(rows.dtype)
