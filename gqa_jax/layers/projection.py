"""Linear projection whose kernel keeps its group and head axes, so that a shard is whole groups."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array


def compute_dtype(x: Array, kernel: Array, dtype: Any) -> Any:
    """The dtype of a product: the layer's, or what input and kernel promote to (float16 and bfloat16: float32).

    Raises:
      TypeError: an input that is no floating-point array.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"`x` must be a floating-point array, got {jnp.result_type(x)}")
    if dtype is not None:
        return dtype
    if {x.dtype, kernel.dtype} == {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}:
        return jnp.float32
    return np.promote_types(x.dtype, kernel.dtype)


class Projection(nnx.Module):
    """`x @ kernel + bias` over the last `len(in_shape)` axes of x.

    Attributes:
      kernel: `[*in_shape, *out_shape]`.
      bias: `[*out_shape]`, or None.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        self.num_in, self.num_out = len(in_shape), len(out_shape)
        self.dtype = dtype
        deviation = math.prod(in_shape) ** -0.5
        kernel = jax.random.truncated_normal(
            rngs.params(),
            -2,
            2,
            (*in_shape, *out_shape),
            np.promote_types(param_dtype, np.float32),
        )
        self.kernel = nnx.Param((kernel * (deviation / 0.8796)).astype(param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_shape, param_dtype)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """Returns `[..., *out_shape]` in `dtype`, or in the dtype that x and the kernel promote to."""
        kernel = self.kernel[...]
        dtype = compute_dtype(x, kernel, self.dtype)
        out = jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=self.num_in)
        if self.bias is not None:
            bias = self.bias[...].astype(dtype)
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        return out
