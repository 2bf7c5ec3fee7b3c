"""What nobody sees is inert, NaN and infinity included: 0 times NaN is NaN, so zeros take their place in products."""

import jax
import jax.numpy as jnp


def finite_part(array: jax.Array) -> jax.Array:
    """`array` with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))


def spoil(array: jax.Array, where: jax.Array) -> jax.Array:
    """NaN `where` something was seen that is not finite; the derivative is that of `array`."""
    # A sum keeps no mask for the backward pass, and adding -0.0 keeps every bit.
    return array + jnp.where(where, jnp.nan, -0.0).astype(array.dtype)
