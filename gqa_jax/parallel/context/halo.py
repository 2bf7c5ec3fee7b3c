"""Sliding windows need the chunks just before one's own, not the whole row."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from gqa_jax.parallel.context.marks import Attend, Marks
from gqa_jax.parallel.context.order import Layout, num_slots, previous_chunk, to_slots
from pallas_kernels import AttentionOutput

_NEVER = jnp.iinfo(jnp.int32).max // 2  # a position that comes after every query


def chunks_needed(length: int, sliding_window: int, layout: Layout) -> int:
    """How many chunks before one's own a window reaches into."""
    chunk = length // num_slots(layout)
    return -(-(sliding_window - 1) // chunk)


def attention(
    query, key, value, marks: Marks, *, axis_name: Any, attend: Attend, layout: Layout, reach: int
) -> AttentionOutput:
    """Causal sliding-window attention after fetching `reach` earlier chunks for each slot."""
    slots, batch = num_slots(layout), query.shape[0]

    def own(x):
        return to_slots(x, slots)

    def rows(x):
        return x.reshape(batch * slots, *x.shape[2:])

    def with_past(x, absent: int = 0):
        chunks = [own(x)]
        first = own(marks.positions)[:, :, :1] // chunks[0].shape[2]  # index of each slot's chunk
        for distance in range(1, reach + 1):
            past = previous_chunk(own(x), axis_name, layout, distance=distance)
            if absent:
                past = jnp.where(first >= distance, past, absent)
            chunks.insert(0, past)
        return rows(jnp.concatenate(chunks, axis=2))

    ids = marks.segment_ids
    mine = Marks(rows(own(marks.positions)), None if ids is None else rows(own(ids)))
    theirs = Marks(with_past(marks.positions, _NEVER), None if ids is None else with_past(ids))
    out, lse = attend(rows(own(query)), with_past(key), with_past(value), mine, theirs)
    shape = query.shape[:2]
    return AttentionOutput(out.reshape(*shape, *out.shape[2:]), lse.reshape(*shape, -1))


def pays(length: int, axis_name: Any, sliding_window: int | None, layout: Layout) -> int | None:
    """The chunks to fetch where that is less than everything, else None."""
    if sliding_window is None or layout == "positions":
        return None
    reach = chunks_needed(length, sliding_window, layout)
    return reach if reach < lax.axis_size(axis_name) else None
