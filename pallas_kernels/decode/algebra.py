"""What every implementation agrees on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """The arrays of a call, as the operator takes them; `lengths` counts cached tokens, the T new ones included."""

    query: jax.Array
    key_cache: jax.Array
    value_cache: jax.Array
    lengths: jax.Array
    key_scale: jax.Array | None
    value_scale: jax.Array | None
    sinks: jax.Array | None


class Options(NamedTuple):
    """Everything static about a call."""

    sliding_window: int | None
    logits_soft_cap: float | None
    scale: float


def numbers(codes: jax.Array) -> jax.Array:
    """uint8 as the float8_e4m3fn whose bits it holds; anything else as it is."""
    return codes.view(jnp.float8_e4m3fn) if codes.dtype == jnp.uint8 else codes


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
