"""What nobody sees is inert, NaN and infinity included: 0 times NaN is NaN, so zeros take their place in products."""

import jax
import jax.numpy as jnp


def finite_part(array: jax.Array) -> jax.Array:
    """`array` with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))


def spoil(array: jax.Array, where: jax.Array) -> jax.Array:
    """NaN `where` something was seen that is not finite; the derivative is that of `array`."""
    return jnp.where(where, array + jnp.asarray(jnp.nan, array.dtype), array)
