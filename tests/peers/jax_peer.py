"""`jax.nn.dot_product_attention(implementation="xla")` answered by `gqa_attention`."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk

_theirs = jax.nn.dot_product_attention


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
):
    """Same arguments; `implementation=None` is what they compare with, and stays theirs."""
    if implementation is None:
        return _theirs(
            query, key, value, bias, mask, scale=scale, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size,
            return_residual=return_residual,
        )  # fmt: skip
    alone = query.ndim == 3
    if alone:
        query, key, value = query[None], key[None], value[None]
    options = dict(scale=scale, is_causal=is_causal)
    if local_window_size is not None:
        left, right = (
            (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        )
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None]
        window = ((distance <= left) & (-distance <= right))[None, None]
        mask = window if mask is None else mask & window
    lifted = lambda x: None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
    mask, bias = lifted(mask), lifted(bias)
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        for name, array, lengths in (
            ("query_segment_ids", query, query_seq_lengths),
            ("kv_segment_ids", key, key_value_seq_lengths),
        ):
            index = jnp.arange(array.shape[1], dtype=jnp.int32)[None]
            real = True if lengths is None else index < lengths[:, None]
            options[name] = jnp.broadcast_to(jnp.where(real, 0, -1), array.shape[:2])
    out, lse = pk.gqa_attention_with_lse(query, key, value, mask=mask, bias=bias, **options)
    if alone:
        out, lse = out[0], lse[0]
    # Theirs passes no gradient through the residual; ours does.
    lse = jax.lax.stop_gradient(lse).astype(out.dtype)
    return (out, lse) if return_residual else out


jax.nn.dot_product_attention = dot_product_attention
