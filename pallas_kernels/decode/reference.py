"""Attention of T new tokens over a head-major cache in `jax.numpy`: the oracle. Widens the whole cache to float32.

What is not finite is computed as zeros, and a query that sees any of it then becomes NaN, so that what stands behind
the lengths or outside of the window reaches nobody, in no derivative either.
"""

import jax.numpy as jnp

from pallas_kernels._inert import finite_part, spoil
from pallas_kernels._precision import compute_dtype
from pallas_kernels.decode import algebra


def decode_attention(operands: algebra.Operands, options: algebra.Options):
    """Returns `[B, T, N, Dv]`; softmax in float32."""
    batch, num_new, num_heads, head_dim = operands.query.shape
    num_kv_heads, capacity = operands.key_cache.shape[1:3]
    compute = compute_dtype(operands.query.dtype)
    query, key, value = (algebra.numbers(array).astype(compute) for array in operands[:3])
    spoiled = ~(jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1))  # [B, K, S]
    grouped = finite_part(query).reshape(batch, num_new, num_kv_heads, -1, head_dim)
    logits = options.scale * jnp.einsum(
        "btkrd,bksd->bkrts", grouped, finite_part(key), precision="highest"
    )
    if operands.key_scale is not None:
        key_scale = operands.key_scale.astype(compute)
        spoiled = spoiled | ~jnp.isfinite(key_scale)
        logits = logits * finite_part(key_scale)[:, :, None, None, :]
    if options.logits_soft_cap is not None:
        logits = options.logits_soft_cap * jnp.tanh(logits / options.logits_soft_cap)
    seen = algebra.visible(operands.lengths, num_new, capacity, options.sliding_window)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    sinks = None
    if operands.sinks is not None:
        sinks = operands.sinks.astype(compute).reshape(1, num_kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    if operands.value_scale is not None:
        value_scale = operands.value_scale.astype(compute)
        spoiled = spoiled | ~jnp.isfinite(value_scale)
        weights = weights * finite_part(value_scale)[:, :, None, None, :]
    out = jnp.einsum("bkrts,bksd->btkrd", weights, finite_part(value), precision="highest")
    by_keys = (seen[:, :, None] & spoiled[:, None]).any(-1)  # [B, T, K]
    by_itself = seen.any(-1)[..., None] & ~jnp.isfinite(query).all(-1)  # [B, T, N]
    spoiled = by_itself | jnp.repeat(by_keys, num_heads // num_kv_heads, axis=2)
    out = out.reshape(batch, num_new, num_heads, -1).astype(operands.query.dtype)
    return spoil(out, spoiled[..., None])
