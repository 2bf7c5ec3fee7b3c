"""What masks are made of: where a token stands and which segment it belongs to. They travel with keys and values."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import AttentionOutput


class Dropout(NamedTuple):
    """Where queries stand in the whole computation, by which dropout goes besides their marks.

    Attributes:
      key: a JAX random key.
      offset: `[2]` int32, (first batch row, first query head).
    """

    key: Array
    offset: Int[Array, "2"]

    def from_head(self, first: Array) -> "Dropout":
        """For the query heads from `first` on."""
        return self._replace(offset=self.offset + jnp.stack([jnp.zeros_like(first), first]))


class Marks(NamedTuple):
    """Of the tokens on one device, or of all.

    Attributes:
      positions: `[B, T]` int32, places in the row; causality and window compare them.
      segment_ids: `[B, T]` int32, or None.
      dropout: of queries; None for none, and of keys.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    dropout: Dropout | None = None


Attend = Callable[[Array, Array, Array, Marks, Marks], AttentionOutput]
"""`attend(query, key, value, query_marks, kv_marks)`: attention on one device."""
