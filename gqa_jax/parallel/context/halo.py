"""Sliding windows need the chunks just before one's own, not the whole row."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from gqa_jax.parallel.context.marks import Attend, Marks
from gqa_jax.parallel.context.order import Layout, num_slots, previous_chunk, to_slots
from pallas_kernels import AttentionOutput

_FUTURE = jnp.iinfo(jnp.int32).max // 2  # a position that comes after every query


def chunks_needed(length: int, sliding_window: int, layout: Layout) -> int:
    """How many chunks before one's own a window reaches into."""
    chunk = length // num_slots(layout)
    return -(-(sliding_window - 1) // chunk)


def attention(
    query, key, value, marks: Marks, *, axis_name: Any, attend: Attend, layout: Layout, reach: int
) -> AttentionOutput:
    """Causal sliding-window attention after fetching `reach` earlier chunks for each slot.

    A slot becomes a row of the batch: `[B, T, ...]` is `[B slots, C, ...]`; with the chunks before, keys and values are
    `[B slots, (reach + 1) C, ...]`.
    """
    slots, batch = num_slots(layout), query.shape[0]

    def rows(x):  # [B, slots, C, ...]
        return x.reshape(batch * slots, *x.shape[2:])

    def with_past(x):
        own = to_slots(x, slots)
        distances = range(reach, 0, -1)
        past = [previous_chunk(own, axis_name, layout, distance=distance) for distance in distances]
        return rows(jnp.concatenate([*past, own], axis=2))

    def own(x):
        return rows(to_slots(x, slots))

    ids, positions = marks.segment_ids, own(marks.positions)
    chunk = positions.shape[1]
    back = jnp.arange(-reach * chunk, chunk, dtype=positions.dtype)
    kv_positions = positions[:, :1] + back[None]
    kv_positions = jnp.where(kv_positions < 0, _FUTURE, kv_positions)  # before the row is nothing
    query_marks = Marks(positions, None if ids is None else own(ids))
    kv_marks = Marks(kv_positions, None if ids is None else with_past(ids))
    out, lse = attend(own(query), with_past(key), with_past(value), query_marks, kv_marks)
    shape = query.shape[:2]
    return AttentionOutput(out.reshape(*shape, *out.shape[2:]), lse.reshape(*shape, -1))


def chunks_to_fetch(
    length: int, axis_name: Any, sliding_window: int | None, layout: Layout
) -> int | None:
    """`chunks_needed`, or None where that is no less than the whole row."""
    if sliding_window is None or layout == "positions":
        return None
    reach = chunks_needed(length, sliding_window, layout)
    return reach if reach < lax.axis_size(axis_name) else None
