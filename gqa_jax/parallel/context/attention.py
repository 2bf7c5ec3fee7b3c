"""Attention over rows that are spread over devices: choice of exchange, sinks, checks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gqa_jax.layers import masks
from gqa_jax.parallel.context import all_gather, all_to_all, halo, ring
from gqa_jax.parallel.context.marks import Dropout, Marks
from gqa_jax.parallel.context.order import ContextParallel, local_positions, num_slots
from gqa_jax.parallel.context.row import in_row_order, is_permutation, lose
from gqa_jax.parallel.sharding import cast_like, names
from pallas_kernels import AttentionOutput, as_int32, gqa_attention_with_lse


def context_attention(query, key, value, **options: Any) -> Float[Array, "B T N Dv"]:
    """`context_attention_with_lse(...).out`; see there."""
    return context_attention_with_lse(query, key, value, **options).out


def context_attention_with_lse(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    *,
    context_parallel: ContextParallel,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    dropout_offset: tuple[int, int] | Int[Array, "2"] | None = None,
    implementation: Any = None,
) -> AttentionOutput:
    """Grouped-query attention over the tokens of all devices along an axis. Call it inside `shard_map`.

    Masks are made of positions and segment ids that travel with keys and values, so every mode is right for every
    layout, with packing and windows.

    Args:
      query, key, value: this device's tokens, T of them, in the order of `context_parallel.layout`.
      context_parallel: mode, layout and `axis_name`.
      positions: `[B, T]`, places in the row by which causality and window go; needed with layout "positions" and
        refused with the others, which know them.
      segment_ids: `[B, T]`; tokens attend within equal ids; negative ids are padding.
      is_causal, sliding_window, scale, sinks, logits_soft_cap, implementation: as for `gqa_attention`.
      dropout_rate, dropout_key: the same; what is dropped goes by places in the row, so it is what one device drops.
      dropout_offset: (first batch row, first query head) of these arrays in the whole.

    Returns:
      output `[B, T, N, Dv]` and lse `[B, T, N]` of this device's tokens. NaN in rows whose positions are not each of
      0 .. n T - 1 once, and, with a window, in rows whose segments are split by padding or by each other.

    Raises:
      ValueError: lengths, heads or arguments that do not fit the mode or layout.
    """
    layout, mode, axis_name = context_parallel.layout, context_parallel.mode, context_parallel.axis
    batch, length = query.shape[:2]
    positions = as_int32("positions", positions)
    segment_ids = as_int32("segment_ids", segment_ids)
    if key.shape[1] != length:
        raise ValueError(f"`key` must hold the T={length} tokens of `query`, got {key.shape[1]}")
    if (positions is None) == (layout == "positions"):
        rule = "given with" if positions is None else "None without"
        raise ValueError(f"`positions` must be {rule} layout 'positions', got layout {layout!r}")
    if length % num_slots(layout):
        raise ValueError(f"layout 'zigzag' must have an even T on each device, got T={length}")
    if positions is None:
        positions = jnp.broadcast_to(local_positions(length, axis_name, layout), (batch, length))
    dropout = None
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError(
                f"`dropout_key` must be given with `dropout_rate={dropout_rate}`, got None"
            )
        offset = jnp.asarray((0, 0) if dropout_offset is None else dropout_offset, jnp.int32)
        dropout = Dropout(dropout_key, offset)
    ids = None if segment_ids is None else cast_like(segment_ids, query)
    marks = Marks(cast_like(positions, query), ids, dropout)

    def attend(query, key, value, query_marks: Marks, kv_marks: Marks) -> AttentionOutput:
        drop: dict[str, Any] = {}
        if query_marks.dropout is not None:
            drop = dict(
                dropout_key=query_marks.dropout.key, dropout_offset=query_marks.dropout.offset
            )
        return gqa_attention_with_lse(
            query,
            key,
            value,
            is_causal=is_causal,
            sliding_window=sliding_window,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            query_positions=query_marks.positions,
            kv_positions=kv_marks.positions,
            query_segment_ids=query_marks.segment_ids,
            kv_segment_ids=kv_marks.segment_ids,
            dropout_rate=dropout_rate,
            implementation=implementation,
            **drop,
        )

    def whole_rows(query, key, value, marks):
        return attend(query, key, value, marks, marks)

    def masked(query_marks: Marks, kv_marks: Marks) -> Array:
        first, last = query_marks.positions.min(), query_marks.positions.max()
        unseen = kv_marks.positions.min() > last
        if sliding_window is not None:
            unseen |= first - kv_marks.positions.max() >= sliding_window
        return unseen

    # In zig-zag every device's second chunk sees something of every other device: the test would only cost.
    skips = is_causal and layout != "zigzag"
    around: dict[str, Any] = dict(
        masked=masked if skips else None, past_only=is_causal and layout == "contiguous"
    )
    # The halo folds chunks into rows of the batch, and by rows dropout goes.
    reach = None if dropout else halo.chunks_to_fetch(length, axis_name, sliding_window, layout)
    common: dict[str, Any] = dict(axis_name=axis_name, attend=attend)
    if mode == "a2a":
        result = all_to_all.attention(
            query, key, value, marks, axis_name=axis_name, attend=whole_rows
        )
    elif mode == "a2a+ring":
        *outer, inner = names(axis_name)
        if not outer:
            raise ValueError(f"mode 'a2a+ring' must have two axes or more, got {axis_name!r}")

        def along_outer(query, key, value, marks):
            return ring.attention(
                query, key, value, marks, axis_name=tuple(outer), attend=attend, **around
            )

        result = all_to_all.attention(query, key, value, marks, axis_name=inner, attend=along_outer)
    elif reach is not None:
        result = halo.attention(query, key, value, marks, layout=layout, reach=reach, **common)
    elif mode == "ring":
        result = ring.attention(query, key, value, marks, **common, **around)
    else:
        result = all_gather.attention(query, key, value, marks, **common)
    result = _with_sinks(result, sinks, query.dtype)
    if layout == "positions":
        good = is_permutation(lax.all_gather(marks.positions, axis_name, axis=1, tiled=True))
        result = AttentionOutput(*(lose(x, good) for x in result))
    if sliding_window is not None and ids is not None:
        row = in_row_order(ids, marks.positions, axis_name)
        index = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
        good = (masks.order_by_segment(row) == index).all(axis=1)
        result = AttentionOutput(*(lose(x, good) for x in result))
    return result


def _with_sinks(result: AttentionOutput, sinks: Array | None, dtype) -> AttentionOutput:
    """A sink takes softmax mass once, whatever the number of blocks: so it joins at the end."""
    out, lse = result
    if sinks is not None:
        sinks = cast_like(sinks.astype(lse.dtype)[None, None], lse)
        total = jnp.logaddexp(lse, sinks)
        out = out * jnp.exp(lse - total)[..., None].astype(np.promote_types(out.dtype, lse.dtype))
        lse = total
    return AttentionOutput(out.astype(dtype), lse)
