"""Decode attention, a few (row, kv head) pairs at a time: the cache is read once, in its own dtype where it can be.

The T * R queries of a kv head are the rows of one matrix product over its keys and one over its values, so that
nothing is repeated. An 8-bit cache is exact in bfloat16: with bfloat16 queries it is widened to that, otherwise to
float32, and only for the pairs at work. Scales of a quantised cache multiply logits and weights, never the cache.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode import algebra, tuning


def decode_attention(
    query, key_cache, value_cache, lengths, *, key_scale, value_scale, sliding_window, sinks,
    logits_soft_cap, scale,
):  # fmt: skip
    """Returns `[B, T, N, Dv]`; softmax in float32. `lengths` counts cached tokens, the T new ones included."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, capacity = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    compute = algebra.compute_dtype(query.dtype)
    grouped = query.reshape(batch, num_new, num_kv_heads, group, head_dim)
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, num_new * group, head_dim)
    seen = algebra.visible(lengths, num_new, capacity, sliding_window)

    def product(subscripts, left, right):
        narrow = query.dtype == jnp.bfloat16 and (
            right.dtype == jnp.bfloat16 or right.dtype.itemsize == 1
        )
        operand = jnp.dtype(jnp.bfloat16) if narrow else compute
        return jnp.einsum(
            subscripts, left.astype(operand), right.astype(operand),
            precision="default" if narrow else "highest", preferred_element_type=compute,
        )  # fmt: skip

    def one(pair):
        b, k = pair
        logits = scale * product("qd,sd->qs", rows[b, k], key_cache[b, k])
        if key_scale is not None:
            logits = logits * key_scale[b, k].astype(compute)[None]
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        visible = jnp.broadcast_to(seen[b][:, None], (num_new, group, capacity))
        logits = jnp.where(visible.reshape(logits.shape), logits, -jnp.inf)
        top = logits.max(axis=-1)
        if sinks is not None:
            sink = jnp.tile(sinks.reshape(num_kv_heads, group)[k].astype(compute), num_new)
            top = jnp.maximum(top, sink)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        weights = jnp.exp(logits - top[:, None])
        total = weights.sum(axis=-1)
        if sinks is not None:
            total = total + jnp.exp(sink - top)
        if value_scale is not None:
            weights = weights * value_scale[b, k].astype(compute)[None]
        out = product("qs,sd->qd", weights, value_cache[b, k])
        return (out / jnp.where(total == 0.0, 1.0, total)[:, None]).astype(query.dtype)

    pairs = jnp.divmod(jnp.arange(batch * num_kv_heads), num_kv_heads)
    together = tuning.pairs_at_once(batch * num_kv_heads)
    if together == batch * num_kv_heads:
        out = jax.vmap(one)(pairs)
    else:
        out = jax.lax.map(one, pairs, batch_size=None if together == 1 else together)
    out = out.reshape(batch, num_kv_heads, num_new, group, -1)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, num_new, num_heads, -1)
