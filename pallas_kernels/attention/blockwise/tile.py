"""The arithmetic of one tile."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._precision import compute_dtype
from pallas_kernels.attention import algebra
from pallas_kernels.attention.blockwise.layout import start_of, take, tile_tokens


def product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A batched matrix product accumulated in float32 (float64); float32 operands are not rounded first."""
    precision, compute = "highest", compute_dtype(left.dtype)
    if left.dtype == jnp.bfloat16:
        # Products of bfloat16 are exact in float32, and "highest" would cost XLA's CPU its bfloat16 instructions.
        precision = "default"
        # XLA's CPU chooses the kernel of a product before it undoes loops of one step; a transpose from outside of the
        # loop, folded into the left operand after that, leaves a product that no kernel can run.
        left = lax.optimization_barrier(left)
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=compute)


def tile_logits(problem, options, size, at, query: jax.Array, key: jax.Array, masked):
    """Logits `[b, k, R, t, s]` of a tile (-inf where hidden), their row maxima, and the soft cap's slope or None."""
    raw = product("bktd,bksd->bkts", query, key)
    raw = raw.reshape(*raw.shape[:2], -1, size.queries, size.keys)
    logits, slope = options.scale * raw, None
    if not masked and options.logits_soft_cap is None and problem.bias is None:
        # The maximum of the product itself: one pass over the tile less.
        extreme = raw.max(axis=-1) if options.scale >= 0 else raw.min(axis=-1)
        return logits, options.scale * extreme, None
    if options.logits_soft_cap is not None:
        bounded = jnp.tanh(logits / options.logits_soft_cap)
        logits, slope = options.logits_soft_cap * bounded, 1.0 - bounded * bounded
        slope = jnp.where(jnp.isnan(slope), 0.0, slope)  # may be hidden, and then meets a 0
    tile = (size.batch, size.heads, raw.shape[2], size.queries, size.keys)
    place = (at.batch, at.heads, 0, at.queries, at.keys)
    if problem.bias is not None:
        bias = take(problem.bias, place, tile).astype(logits.dtype)
        bias = jnp.broadcast_to(bias, logits.shape)
        logits = jnp.where(jnp.isneginf(bias), -jnp.inf, logits + bias)  # -inf hides NaN too
    if masked:
        hide = lambda seen: jnp.where(jnp.broadcast_to(seen, logits.shape), logits, -jnp.inf)
        seen = algebra.visible(*tile_tokens(problem, size, at), options)
        if problem.key_exists is not None:
            exists = take(problem.key_exists, (0, at.keys), (1, size.keys))[:, None]
            seen = exists if seen is None else seen & exists
        if seen is not None:
            logits = hide(seen[:, None, None])
        if problem.mask is not None:
            logits = hide(take(problem.mask, place, tile))
    return logits, logits.max(axis=-1), slope


def drop(problem, options, size, at, weights: jax.Array):
    """Dropout on a tile of weights, or on that of their cotangents."""
    if options.dropout_rate == 0.0:
        return weights
    group = weights.shape[2]
    kept = algebra.dropout_kept(
        problem.seeds,
        at.batch * size.batch + jnp.arange(size.batch),
        at.heads * size.heads * group + jnp.arange(size.heads * group),
        *tile_tokens(problem, size, at),
        options.dropout_rate,
    )
    return jnp.where(kept.reshape(weights.shape), weights / (1.0 - options.dropout_rate), 0.0)


def add_to_bias(d_bias: jax.Array, d_logits: jax.Array, size, at):
    """Adds a tile's share to the bias cotangent, summed over the dimensions in which the bias broadcasts."""
    shared = tuple(d for d in range(5) if d_bias.shape[d] == 1 and d_logits.shape[d] > 1)
    d_logits = d_logits.sum(shared, keepdims=True)
    start = start_of(d_bias, (at.batch, at.heads, 0, at.queries, at.keys), d_logits.shape)
    old = lax.dynamic_slice(d_bias, start, d_logits.shape)
    return lax.dynamic_update_slice(d_bias, old + d_logits, start)


def add_at(total: jax.Array, j, part):
    return lax.dynamic_update_index_in_dim(total, total[j] + part, j, 0)
