"""What the attention layers and Gated DeltaNet refuse before they compute anything."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import as_int32


def check_call(
    x: Array,
    model_dim: int,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    mask: Array | None = None,
    num_keys: int | None = None,
) -> tuple[Array | None, Array | None]:
    """Raises unless the arrays of a call fit together.

    Args:
      x: `[B, T, M]`.
      model_dim: M.
      positions: `[B, T]`, `[1, T]`, or those with a leading axis of 3; or None.
      segment_ids: `[B, T]`, or None.
      mask: `[B or 1, N or 1, T, S]`, or None.
      num_keys: S; None means T.

    Returns:
      `positions` with B rows, and `segment_ids`, both int32.

    Raises:
      TypeError: positions or ids that are no integers.
      ValueError: shapes that do not fit.
    """
    positions = as_int32("positions", positions)
    segment_ids = as_int32("segment_ids", segment_ids)
    if x.ndim != 3 or x.shape[-1] != model_dim:
        raise ValueError(f"`x` must have shape [B, T, M={model_dim}], got {x.shape}")
    batch, length = x.shape[:2]
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(
            f"`segment_ids` must have shape [B={batch}, T={length}], got {segment_ids.shape}"
        )
    keys = length if num_keys is None else num_keys
    if mask is not None and (mask.ndim != 4 or mask.shape[2:] != (length, keys)):
        raise ValueError(
            f"`mask` must have shape [B or 1, N or 1, {length}, {keys}], got {mask.shape}"
        )
    return positions_of_rows(positions, batch, length), segment_ids


def positions_of_rows(
    positions: Array | None, batch: int, length: int, *, name: str = "positions"
) -> Array | None:
    """`positions` with B rows.

    Raises:
      ValueError: a shape other than `[B, T]`, `[1, T]`, `[3, B, T]` or `[3, 1, T]`.
    """
    if positions is None:
        return None
    *three, rows, columns = (0, 0, *positions.shape)[-max(positions.ndim, 2) :]
    if (rows not in (batch, 1) and batch > 0) or columns != length or three not in ([], [3]):
        raise ValueError(
            f"`{name}` must have shape [B={batch}, T={length}] or [3, {batch}, {length}], got {positions.shape}"
        )
    if rows == batch:
        return positions
    return jnp.broadcast_to(positions, (*three, batch, length))
