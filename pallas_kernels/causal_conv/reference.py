"""Causal depthwise convolution in `jax.numpy`: W shifted products, exact across packed segments."""

import jax.numpy as jnp


def causal_conv(x, weight, *, bias, activation, initial_state, segment_ids):
    """Returns `(out [B, T, F], final_state [B, W, F])`; sums in float32 (float64 for float64)."""
    batch, length, features = x.shape
    width = weight.shape[0]
    compute = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, features), x.dtype)
    history = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)  # [B, W + T, F]
    total = jnp.zeros((batch, length, features), compute)
    if segment_ids is not None:
        first = segment_ids[:, :1]
        past_ids = jnp.concatenate([jnp.broadcast_to(first, (batch, width)), segment_ids], axis=1)
    for lag in range(width):
        window = history[:, width - lag : width - lag + length]
        if segment_ids is not None:
            same = past_ids[:, width - lag : width - lag + length] == segment_ids
            window = jnp.where(same[..., None], window, jnp.zeros((), x.dtype))
        total = total + window.astype(compute) * weight[width - 1 - lag].astype(compute)[None, None]
    if bias is not None:
        total = total + bias.astype(compute)[None, None]
    if activation is not None:
        total = activation(total)
    return total.astype(x.dtype), history[:, length:]
