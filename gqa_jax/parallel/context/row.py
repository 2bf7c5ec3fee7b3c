"""What a device of a spread row must know of the rest: places, positions, and whether they are what they must be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from gqa_jax.layers import masks
from gqa_jax.parallel.context.order import ContextParallel, Layout, local_positions, token_order
from gqa_jax.parallel.sharding import cast_like
from pallas_kernels import as_int32


class RowMarks(NamedTuple):
    """Of the tokens on this device.

    Attributes:
      places: `[B, T]` int32, places in the row.
      rotary: `[B, T]` or `[3, B, T]`, positions for the rotary embedding.
      segment_ids: `[B, T]`, or None.
      axis: the mesh axes that split the row.
    """

    places: Int[Array, "B T"]
    rotary: Array
    segment_ids: Array | None
    axis: Any

    def gather(self, x: Array) -> Array:
        """`[B, T, ...]` of all devices, `[B, n T, ...]`."""
        return lax.all_gather(x, self.axis, axis=1, tiled=True)

    def of_logits(self) -> dict[str, Array | None]:
        """Arguments of `qk_clip.max_logits`: of the queries on this device and the keys on all."""
        ids = self.segment_ids
        return dict(
            positions=self.places,
            kv_positions=self.gather(self.places),
            segment_ids=ids,
            kv_segment_ids=None if ids is None else self.gather(ids),
        )


def row_marks(
    x: Array,
    plan: ContextParallel,
    *,
    positions: Array | None,
    segment_ids: Array | None,
) -> RowMarks:
    """The marks of this device's tokens, in `shard_map`.

    Args:
      x: `[B, T, M]`.
      plan: layout and axis.
      positions: with layout "positions" the places, which the rotary embedding then goes by; else for that alone, and
        None counts the tokens of each segment.
      segment_ids: `[B, T]`, or None.
    """
    if plan.layout == "positions":
        assert positions is not None
        return RowMarks(positions, positions, segment_ids, plan.axis)
    places = local_positions(x.shape[1], plan.axis, plan.layout)
    places = jnp.broadcast_to(places, x.shape[:2])
    if positions is None and segment_ids is not None:
        row = in_row_order(segment_ids, places, plan.axis)
        positions = masks.take(masks.positions_in_segments(row), places)
    return RowMarks(places, places if positions is None else positions, segment_ids, plan.axis)


def in_row_order(x: Array, places: Int[Array, "B T"], axis_name: Any) -> Array:
    """The whole row of `x [B, T, ...]`, `[B, n T, ...]`, on every device."""
    everywhere = lambda x: lax.all_gather(x, axis_name, axis=1, tiled=True)
    return masks.take(everywhere(x), jnp.argsort(everywhere(places), axis=1))


def is_permutation(places: Int[Array, "B T"]) -> Bool[Array, "B"]:
    """Whether a row's places, those of all devices, are each of 0 .. T - 1 once."""
    index = jnp.arange(places.shape[1], dtype=places.dtype)
    return (jnp.sort(places, axis=1) == index[None]).all(axis=1)


def lose(x: Array, good: Bool[Array, "B"]) -> Array:
    """`x [B, ...]`, NaN in rows that are not good."""
    return jnp.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.asarray(jnp.nan, x.dtype))


def lose_rows_with_gaps(out: Array, segment_ids: Int[Array, "B T"], plan: ContextParallel) -> Array:
    """`out [B, T, ...]`, NaN in rows in which padding stands between tokens of one segment. In `shard_map`."""
    places = local_positions(out.shape[1], plan.axis, plan.layout)
    places = cast_like(jnp.broadcast_to(places, out.shape[:2]), segment_ids)
    row = in_row_order(segment_ids, places, plan.axis)
    index = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
    return lose(out, (masks.order_without_gaps(row) == index).all(axis=1))


def check_permutation(positions: Int[Array, "B T"]) -> None:
    """Raises `ValueError` unless each row of `positions` (all devices' tokens) holds 0 .. T - 1 once each."""
    values = np.asarray(as_int32("positions", positions))
    bad = (np.sort(values, axis=1) != np.arange(values.shape[1])[None]).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"`positions` must hold each of 0 .. {values.shape[1] - 1} once per row with layout 'positions', got "
            f"{values[row].tolist()} in row {row}"
        )


def check_gaps(segment_ids: Any, places: Any, *, whole_segments: bool) -> None:
    """Raises `ValueError` where tokens of a segment stand apart, if ids and places can be read.

    Args:
      segment_ids: `[B, T]` of all devices, as they are laid out.
      places: `[B or 1, T]`, of each token in the row.
      whole_segments: also where tokens of another segment, not padding alone, stand between them.
    """
    if not (can_be_read(segment_ids) and can_be_read(places)):
        return
    ids = np.asarray(segment_ids)
    row = np.take_along_axis(ids, np.argsort(np.broadcast_to(places, ids.shape), axis=1), axis=1)
    for b, own in enumerate(row):
        real = np.flatnonzero(own >= 0)
        previous = real[:-1]
        apart = (own[real[1:]] == own[previous]) & (np.diff(real) > 1)
        starts = np.diff(own[real], prepend=-1) != 0
        if apart.any() or (whole_segments and starts.sum() > np.unique(own[real]).size):
            order = "order_by_segment" if whole_segments else "order_without_gaps"
            raise ValueError(
                "`segment_ids` must not split a segment under context parallelism, by padding or (with a sliding "
                f"window) by another segment, got {own.tolist()} in row {b}; bring the batch into "
                f"`masks.{order}(segment_ids)` before it is laid out"
            )


def can_be_read(x: Any) -> bool:
    """Whether the values of an array are known now, on this process."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def place_of_token(
    length: int, devices: int, layout: Layout, positions: Any
) -> np.ndarray | jax.Array:
    """`[B or 1, T]`: the place in the row of every token, as all devices hold them."""
    return positions if layout == "positions" else token_order(length, devices, layout)[None]
