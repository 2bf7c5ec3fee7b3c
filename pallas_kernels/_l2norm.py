"""The l2 norm of queries and keys, in the one formula of the operators that apply it."""

import jax
import jax.numpy as jnp

# What a sum of squares is increased by, so that a row close to zero is not blown up to length 1.
EPSILON = 1e-6


def l2_normalize(x):
    """`x * rsqrt(sum(x^2) + 1e-6)` over the last axis in float32; zero rows have zero gradient."""
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    wide = x.astype(compute)
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    is_zero = squared == 0.0
    inverse = jax.lax.rsqrt(jnp.where(is_zero, 1.0, squared) + jnp.asarray(EPSILON, compute))
    return jnp.where(is_zero, 0.0, wide * inverse)
