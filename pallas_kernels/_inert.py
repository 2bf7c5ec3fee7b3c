"""What nobody sees is inert, NaN and infinity included: 0 times NaN is NaN, so zeros take their place in products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def finite_part(array: jax.Array) -> jax.Array:
    """`array` with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))


def spoil(array: jax.Array, where: jax.Array) -> jax.Array:
    """NaN `where` something was seen that is not finite; the derivative is that of `array`."""
    # A sum keeps no mask for the backward pass, and adding -0.0 keeps every bit.
    return array + jnp.where(where, jnp.nan, -0.0).astype(array.dtype)


def product(
    bilinear: Callable[[jax.Array, jax.Array], jax.Array], left: jax.Array, right: jax.Array
) -> jax.Array:
    """`bilinear(left, right)`, in whose derivative what is not finite is 0: a cotangent of 0 times NaN would be NaN."""
    result: Any = _product(bilinear, left, right)
    return result


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(bilinear, left, right):
    return bilinear(left, right)


@_product.defjvp
def _product_jvp(bilinear, primals, tangents):
    (left, right), (d_left, d_right) = primals, tangents
    d_product = bilinear(d_left, finite_part(right)) + bilinear(finite_part(left), d_right)
    return _product(bilinear, left, right), d_product


def guarded(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """`function(array)`, of the same shape and dtype; where it is not finite, its derivative is 1."""
    result: Any = _guarded(function, array)
    return result


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guarded(function, array):
    return function(array)


@_guarded.defjvp
def _guarded_jvp(function, primals, tangents):
    (array,), (d_array,) = primals, tangents
    out: Any = _guarded(function, array)
    is_finite = jnp.isfinite(out)
    d_out = jax.jvp(function, (array,), (jnp.where(is_finite, d_array, 0.0),))[1]
    return out, d_out + jnp.where(is_finite, 0.0, d_array)
