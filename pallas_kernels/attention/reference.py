"""Grouped-query attention as one page of `jax.numpy`: the oracle. O(T S) memory, any float dtype, any derivative.

What is not finite is computed as zeros, and a query that sees any of it then becomes NaN: so no product meets 0 times
NaN, in no derivative either.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._inert import finite_part, spoil
from pallas_kernels._precision import compute_dtype
from pallas_kernels.attention import algebra


def attention(
    inputs: algebra.Inputs, context: algebra.Context, options: algebra.Options
) -> tuple[jax.Array, jax.Array]:
    """Returns `(out [B, T, N, Dv], lse [B, T, N])`; float32 inside (float64 for float64 inputs)."""
    batch, q_len, num_heads, head_dim = inputs.query.shape
    kv_len, num_kv_heads = inputs.key.shape[1:3]
    compute = compute_dtype(inputs.query.dtype)
    query, key, value = (finite_part(array.astype(compute)) for array in inputs[:3])
    spoiled = _per_head(~algebra.finite_tokens(inputs.key, inputs.value), num_heads)[:, :, None]
    spoiled = spoiled | _per_head(~algebra.finite_tokens(inputs.query), num_heads)[..., None]
    grouped = query.reshape(batch, q_len, num_kv_heads, -1, head_dim)
    logits = options.scale * jnp.einsum("btkrd,bskd->bkrts", grouped, key, precision="highest")
    logits = logits.reshape(batch, num_heads, q_len, kv_len)
    if options.logits_soft_cap is not None:
        logits = options.logits_soft_cap * jnp.tanh(logits / options.logits_soft_cap)
    seen = []
    if inputs.bias is not None:
        bias = jnp.broadcast_to(inputs.bias.astype(compute), logits.shape)
        logits = logits + finite_part(bias)
        spoiled = spoiled | ~(bias < jnp.inf)
        seen.append(~jnp.isneginf(bias))
    queries, keys = algebra.tokens(inputs, context, options)
    visible = algebra.visible(queries, keys, options)
    if visible is not None:
        seen.append(jnp.broadcast_to(visible[:, None], logits.shape))
    if context.mask is not None:
        seen.append(jnp.broadcast_to(context.mask, logits.shape))
    for each in seen:
        logits = jnp.where(each, logits, -jnp.inf)
        spoiled = spoiled & each
    spoiled = jnp.swapaxes(spoiled.any(-1), 1, 2)  # [B, T, N]

    top = logits.max(axis=-1, initial=-jnp.inf)  # [B, N, T]
    sinks = None
    if inputs.sinks is not None:
        sinks = jnp.broadcast_to(inputs.sinks.astype(compute)[:, None], top.shape)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
    weights = weights / safe[..., None]
    if context.dropout_seeds is not None:
        kept = algebra.dropout_kept(
            context.dropout_seeds,
            jnp.arange(batch),
            jnp.arange(num_heads),
            queries,
            keys,
            options.dropout_rate,
        )
        weights = jnp.where(kept, weights / (1.0 - options.dropout_rate), 0.0)
    weights = weights.reshape(batch, num_kv_heads, -1, q_len, kv_len)
    out = jnp.einsum("bkrts,bskd->btkrd", weights, value, precision="highest")
    out = out.reshape(batch, q_len, num_heads, -1).astype(inputs.query.dtype)
    return spoil(out, spoiled[..., None]), spoil(jnp.swapaxes(lse, 1, 2), spoiled)


def _per_head(tokens, num_heads):
    """`[B, length, heads]` to `[B, N, length]`."""
    tokens = jnp.swapaxes(tokens, 1, 2)
    return jnp.repeat(tokens, num_heads // tokens.shape[1], axis=1)
