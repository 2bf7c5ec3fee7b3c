"""The dtype in which operators compute, and the l2 norm of queries and keys, which two of them apply."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels._inert import guarded

# What a sum of squares is increased by, so that a row close to zero is not blown up to length 1.
EPSILON = 1e-6


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Of logits, gates, states, norms and accumulators: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def l2_normalize(x: jax.Array) -> jax.Array:
    """`x * rsqrt(sum(x^2) + 1e-6)` over the last axis in float32; zero rows have zero gradient."""
    compute = compute_dtype(x.dtype)
    wide = x.astype(compute)
    # NaN for infinity: a row that is not finite has no finite result.
    return guarded(_normalized, jnp.where(jnp.isfinite(wide), wide, jnp.nan))


def _normalized(wide):
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    is_zero = squared == 0.0
    inverse = jax.lax.rsqrt(jnp.where(is_zero, 1.0, squared) + jnp.asarray(EPSILON, wide.dtype))
    return jnp.where(is_zero, 0.0, wide * inverse)
