"""Going back to an earlier length, row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import as_int32


class Rewound(NamedTuple):
    """What a rewind gives back.

    Attributes:
      cache: of the same kind; rows that were refused are as they were.
      accepted: `[B]` bool.
    """

    cache: Any
    accepted: jax.Array


def target_positions(position: int | Int[Array, "B"], length: Array) -> Array:
    """`position` for every row of `length`, int32.

    Raises:
      TypeError: not integer.
      ValueError: neither one position nor one per row.
    """
    array: Any = position if hasattr(position, "dtype") else np.asarray(position)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`position` must be an integer, got {dtype}")
    if array.shape not in ((), length.shape[-1:]):
        raise ValueError(
            f"`position` must be one integer or have shape [B={length.shape[-1]}], got {array.shape}"
        )
    return jnp.broadcast_to(as_int32("position", array), length.shape)
