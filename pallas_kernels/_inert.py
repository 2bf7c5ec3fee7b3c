"""What nobody sees is inert, NaN and infinity included: 0 times NaN is NaN, so zeros take their place in products."""

import functools

import jax
import jax.numpy as jnp


def finite_part(array: jax.Array) -> jax.Array:
    """`array` with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))


def spoil(array: jax.Array, where: jax.Array) -> jax.Array:
    """NaN `where` something was seen that is not finite; the derivative is that of `array`."""
    # A sum keeps no mask for the backward pass, and adding -0.0 keeps every bit.
    return array + jnp.where(where, jnp.nan, -0.0).astype(array.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(bilinear, left, right):
    """`bilinear(left, right)`, in whose derivative what is not finite is 0: a cotangent of 0 times NaN would be NaN."""
    return bilinear(left, right)


@product.defjvp
def _product_jvp(bilinear, primals, tangents):
    (left, right), (d_left, d_right) = primals, tangents
    d_product = bilinear(d_left, finite_part(right)) + bilinear(finite_part(left), d_right)
    return product(bilinear, left, right), d_product


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def guarded(function, array):
    """`function(array)`, of the same shape; where it is not finite, its derivative is 1."""
    return function(array)


@guarded.defjvp
def _guarded_jvp(function, primals, tangents):
    (array,), (d_array,) = primals, tangents
    out = guarded(function, array)
    is_finite = jnp.isfinite(out)
    d_out = jax.jvp(function, (array,), (jnp.where(is_finite, d_array, 0.0),))[1]
    return out, d_out + jnp.where(is_finite, 0.0, d_array)
