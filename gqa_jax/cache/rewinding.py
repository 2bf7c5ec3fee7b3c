"""Going back to an earlier length, row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


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
    position = jnp.asarray(position)
    if not jnp.issubdtype(position.dtype, jnp.integer):
        raise TypeError(f"`position` must be an integer, got {position.dtype}")
    if position.shape not in ((), length.shape[-1:]):
        raise ValueError(
            f"`position` must be one integer or have shape [B={length.shape[-1]}], got {position.shape}"
        )
    return jnp.broadcast_to(position.astype(jnp.int32), length.shape)
