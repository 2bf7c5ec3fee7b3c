"""Attention of T new tokens over a head-major cache in `jax.numpy`: the oracle. Widens the whole cache to float32."""

import jax.numpy as jnp

from pallas_kernels.decode import algebra


def decode_attention(
    query, key_cache, value_cache, lengths, *, key_scale, value_scale, sliding_window, sinks,
    logits_soft_cap, scale,
):  # fmt: skip
    """Returns `[B, T, N, Dv]`; softmax in float32. `lengths` counts cached tokens, the T new ones included."""
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads, capacity = key_cache.shape[1:3]
    compute = algebra.compute_dtype(query.dtype)
    grouped = query.reshape(batch, num_new, num_kv_heads, -1, head_dim).astype(compute)
    logits = scale * jnp.einsum(
        "btkrd,bksd->bkrts", grouped, key_cache.astype(compute), precision="highest"
    )
    if key_scale is not None:
        logits = logits * key_scale.astype(compute)[:, :, None, None, :]
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    seen = algebra.visible(lengths, num_new, capacity, sliding_window)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(compute).reshape(1, num_kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    if value_scale is not None:
        weights = weights * value_scale.astype(compute)[:, :, None, None, :]
    out = jnp.einsum("bkrts,bksd->btkrd", weights, value_cache.astype(compute), precision="highest")
    return out.reshape(batch, num_new, num_heads, -1).astype(query.dtype)
