"""What every implementation agrees on."""

import jax
import jax.numpy as jnp


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype of logits, softmax and accumulators: float32, or float64 for float64 queries."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def visible(
    lengths: jax.Array, num_new: int, capacity: int, sliding_window: int | None
) -> jax.Array:
    """Which slots each new token sees: boolean `[B, T, S]`; token t stands at position `lengths - T + t`."""
    position = lengths[:, None] - num_new + jnp.arange(num_new, dtype=lengths.dtype)[None, :]
    distance = position[:, :, None] - jnp.arange(capacity, dtype=lengths.dtype)[None, None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    return seen
