"""What masks are made of: where a token stands and which segment it belongs to. They travel with keys and values."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int

from pallas_kernels import AttentionOutput


class Marks(NamedTuple):
    """Of the tokens on one device, or of all.

    Attributes:
      positions: `[B, T]` int32, places in the row; causality and window compare them.
      segment_ids: `[B, T]` int32, or None.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None


Attend = Callable[[Array, Array, Array, Marks, Marks], AttentionOutput]
"""`attend(query, key, value, query_marks, kv_marks)`: attention on one device."""
