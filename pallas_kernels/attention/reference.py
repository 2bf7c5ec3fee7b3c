"""Grouped-query attention as one page of `jax.numpy`: the oracle. O(T S) memory, any float dtype, autodiff."""

import jax
import jax.numpy as jnp


def attention(
    query, key, value, *, scale, is_causal, causal_alignment, q_offset, sliding_window, mask, bias,
    query_segment_ids, kv_segment_ids, query_positions, kv_positions, sinks, logits_soft_cap, dropout_rate,
    dropout_key,
):  # fmt: skip
    """Returns `(out [B, T, N, Dv], lse [B, T, N])`; float32 inside (float64 for float64 inputs)."""
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, num_kv_heads = key.shape[1:3]
    compute = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, q_len, num_kv_heads, -1, head_dim).astype(compute)
    logits = scale * jnp.einsum(
        "btkrd,bskd->bkrts", grouped, key.astype(compute), precision="highest"
    )
    logits = logits.reshape(batch, num_heads, q_len, kv_len)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(compute), logits.shape)

    visible = visibility(
        q_len, kv_len, is_causal=is_causal, causal_alignment=causal_alignment, q_offset=q_offset,
        sliding_window=sliding_window, mask=mask, query_segment_ids=query_segment_ids,
        kv_segment_ids=kv_segment_ids, query_positions=query_positions, kv_positions=kv_positions,
    )  # fmt: skip
    logits = jnp.where(jnp.broadcast_to(visible, logits.shape), logits, -jnp.inf)
    top = logits.max(axis=-1, initial=-jnp.inf)  # [B, N, T]
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(compute)[:, None], top.shape)
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
    if dropout_rate > 0.0:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    weights = weights.reshape(batch, num_kv_heads, -1, q_len, kv_len)
    out = jnp.einsum("bkrts,bskd->btkrd", weights, value.astype(compute), precision="highest")
    out = out.reshape(batch, q_len, num_heads, -1).astype(query.dtype)
    return out, jnp.swapaxes(lse, 1, 2)


def visibility(
    q_len, kv_len, *, is_causal, causal_alignment, q_offset, sliding_window, mask, query_segment_ids,
    kv_segment_ids, query_positions, kv_positions,
):  # fmt: skip
    """Which keys each query may attend to: boolean, broadcastable to `[B, N, T, S]`.

    Tokens with a negative segment id are padding: they see nothing and nothing sees them.
    """
    visible = jnp.ones((1, 1, q_len, kv_len), jnp.bool_)
    if query_positions is None:
        offset = 0 if q_offset is None else q_offset
        if causal_alignment == "bottom_right":
            offset = offset + (kv_len - q_len)
        query_positions = jnp.arange(q_len)[None, :] + jnp.atleast_1d(jnp.asarray(offset))[:, None]
        kv_positions = jnp.arange(kv_len)[None, :]
    distance = query_positions[:, None, :, None] - kv_positions[:, None, None, :]
    if is_causal:
        visible = visible & (distance >= 0)
    if sliding_window is not None:
        visible = visible & (distance < sliding_window)
    if query_segment_ids is not None:
        same = query_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]
        visible = visible & same & (query_segment_ids >= 0)[:, None, :, None]
    if mask is not None:
        visible = visible & mask
    return visible
