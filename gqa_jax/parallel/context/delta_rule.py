"""Gated DeltaNet over rows that are spread over devices: states travel, activations stay.

Over a chunk the state goes through an affine map, `S -> M S + E`. Each device finds (M, E) of its chunks from nothing
but its own tokens, the maps are combined in the order of the row (chunks may lie zig-zag), and every chunk then runs
as on one device, from the state that the row has there. The convolution reads W - 1 tokens of the chunk before.
(Sequence-parallel state passing as in flash-linear-attention's `cp`, here without reshuffling tokens.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gqa_jax.layers import masks
from gqa_jax.parallel.context.affine import Affine, incoming_states
from gqa_jax.parallel.context.order import (
    ContextParallel,
    Layout,
    chunks_of_row,
    num_slots,
    own_chunks,
    previous_chunk,
    to_slots,
)
from gqa_jax.parallel.context.row import is_permutation, lose
from gqa_jax.parallel.sharding import cast_like
from pallas_kernels import (
    GatedDeltaRuleOutput,
    as_int32,
    causal_conv1d,
    gated_delta_rule,
)

_NO_SEGMENT = -1  # the id of the first or last real token where there is none


def context_causal_conv1d(
    x: Float[Array, "B T F"],
    weight: Float[Array, "W F"],
    *,
    context_parallel: ContextParallel,
    bias: Float[Array, "F"] | None = None,
    activation: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T F"]:
    """`causal_conv1d(...).out` of this device's tokens; the W - 1 inputs before each chunk come from their owner.

    Raises:
      ValueError: chunks shorter than W - 1, or a layout without chunks.
    """
    segment_ids = as_int32("segment_ids", segment_ids)
    layout, axis_name = context_parallel.layout, context_parallel.axis
    slots, halo = _slots(layout), weight.shape[0] - 1
    chunk = x.shape[1] // slots
    if chunk < halo:
        raise ValueError(
            f"a chunk must hold at least W - 1 = {halo} tokens, got {chunk} (T={x.shape[1]} on each device in "
            f"{slots} chunks)"
        )

    def extended(x):
        own = to_slots(x, slots)
        if halo == 0:
            return own.reshape(-1, *own.shape[2:])
        past = previous_chunk(own[:, :, chunk - halo :], axis_name, layout)
        return jnp.concatenate([past, own], axis=2).reshape(-1, halo + chunk, *own.shape[3:])

    out = causal_conv1d(
        extended(x),
        weight,
        bias=bias,
        activation=activation,
        segment_ids=None if segment_ids is None else extended(segment_ids),
    ).out
    return out[:, halo:].reshape(x.shape)


def context_gated_delta_rule(
    query: Float[Array, "B T Hk Dk"],
    key: Float[Array, "B T Hk Dk"],
    value: Float[Array, "B T Hv Dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    *,
    context_parallel: ContextParallel,
    initial_state: Float[Array, "B Hv Dk Dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """`gated_delta_rule` over the tokens of all devices along an axis. Call it inside `shard_map`.

    Args:
      query, key, value, g, beta: this device's tokens, in the order of `context_parallel.layout`.
      context_parallel: layout, `axis_name`, and how summaries are exchanged.
      initial_state: the state before the row, the same on all devices.
      segment_ids: `[B, T]`; the state starts anew where the id changes; negative ids are padding.
      scale, use_qk_l2norm, chunk_size, implementation: as for `gated_delta_rule`.

    Returns:
      output of this device's tokens, and the state after the whole row, the same on all devices.

    Raises:
      ValueError: a length that does not divide into chunks, or a layout without chunks.
    """
    segment_ids = as_int32("segment_ids", segment_ids)
    layout, axis_name = context_parallel.layout, context_parallel.axis
    slots = _slots(layout)
    batch, length, heads, value_dim = value.shape
    if length % slots:
        raise ValueError(f"layout 'zigzag' must have an even T on each device, got T={length}")
    key_dim = query.shape[-1]
    wide = np.promote_types(value.dtype, jnp.float32)
    options: dict[str, Any] = dict(
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        chunk_size=chunk_size,
        implementation=implementation,
    )

    def rows(x):
        return to_slots(x, slots).reshape(batch * slots, -1, *x.shape[2:])

    query, key, value, g, beta = (rows(x) for x in (query, key, value, g, beta))
    ids = None if segment_ids is None else rows(segment_ids)
    # One pass over [v | 0] from [0 | I] gives the chunk's final state and its transition matrix.
    start = jnp.concatenate(
        [jnp.zeros((key_dim, value_dim), wide), jnp.eye(key_dim, dtype=wide)], axis=1
    )
    start = jnp.broadcast_to(start, (batch * slots, heads, *start.shape))
    no_value = jnp.zeros((*value.shape[:-1], key_dim), value.dtype)
    summary = gated_delta_rule(
        query,
        key,
        jnp.concatenate([value, no_value], axis=-1),
        g,
        beta,
        initial_state=cast_like(start, value),
        segment_ids=ids,
        **options,
    ).final_state
    summary = summary.reshape(batch, slots, *summary.shape[1:])
    maps = Affine(matrix=summary[..., value_dim:], offset=summary[..., :value_dim])
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), wide)
    initial_state = cast_like(initial_state.astype(wide), maps.offset)
    carried = None
    if segment_ids is not None:
        carried = _carried(to_slots(segment_ids, slots), axis_name, layout)
        keep = carried[..., None, None, None]
        maps = Affine(jnp.where(keep, maps.matrix, jnp.zeros((), wide)), maps.offset)
    incoming, final = incoming_states(
        maps,
        initial_state,
        axis_name=axis_name,
        layout=layout,
        exchange=context_parallel.state_exchange,
    )
    if carried is not None:
        incoming = jnp.where(carried[..., None, None, None], incoming, jnp.zeros((), wide))
    out = gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=incoming.reshape(batch * slots, *incoming.shape[2:]),
        segment_ids=ids,
        **options,
    ).out
    return GatedDeltaRuleOutput(out.reshape(batch, length, heads, value_dim), final)


def _slots(layout: Layout) -> int:
    if layout == "positions":
        raise ValueError(
            "`layout` must be 'contiguous' or 'zigzag' here, got 'positions': reorder the tokens first (`undo_order`)"
        )
    return num_slots(layout)


def _carried(ids: Int[Array, "B slots C"], axis_name: Any, layout: Layout) -> Array:
    """`[B, slots]` bool: the state before a chunk belongs to the chunk's first real token (or passes through)."""
    first_id = _first_real(ids)
    last_ids = lax.all_gather(
        _first_real(ids[..., ::-1]), axis_name
    )  # [n, B, slots], a few integers
    row = jnp.stack(chunks_of_row(last_ids, layout), axis=1)  # [B, chunks]
    own = jnp.stack(own_chunks(axis_name, layout))
    before = jnp.arange(row.shape[1], dtype=jnp.int32)[None] < own[:, None]  # [slots, chunks]
    earlier = jnp.where(before[None], row[:, None], _NO_SEGMENT)  # [B, slots, chunks]
    previous = _first_real(earlier[..., ::-1])
    return (previous == first_id) | (previous == _NO_SEGMENT) | (first_id == _NO_SEGMENT)


def _first_real(ids: Int[Array, "B slots C"]) -> Int[Array, "B slots"]:
    """The first id that is none of padding's, `_NO_SEGMENT` where all are."""
    first = jnp.argmax(ids >= 0, axis=2, keepdims=True)
    return jnp.maximum(jnp.take_along_axis(ids, first, axis=2)[..., 0], _NO_SEGMENT)


def undo_order(
    tree: Any, positions: Int[Array, "B T"], *, axis_name: Any
) -> tuple[Any, Int[Array, "B T"]]:
    """From any order of tokens to contiguous chunks: gathers, sorts by position, keeps this device's part.

    Args:
      tree: arrays `[B, T, ...]` of this device's tokens.
      positions: `[B, T]`, their places in the row; over all devices each of 0 .. n T - 1 once.
      axis_name: the axis that splits the tokens.

    Returns:
      the reordered arrays, and what `redo_order` needs. Where positions are not a permutation, floating-point arrays
      are NaN (values cannot raise inside `jit`; `check_permutation` raises outside).
    """
    positions = as_int32("positions", positions)
    all_positions = lax.all_gather(positions, axis_name, axis=1, tiled=True)  # [B, n T]
    length = positions.shape[1]
    order = jnp.argsort(all_positions, axis=1)
    valid = is_permutation(all_positions)
    start = lax.axis_index(axis_name) * length
    own_order = lax.dynamic_slice_in_dim(order, start, length, axis=1)  # [B, T]

    def reorder(x):
        row = lax.all_gather(x, axis_name, axis=1, tiled=True)
        own = masks.take(row, own_order)
        return lose(own, valid) if jnp.issubdtype(x.dtype, jnp.floating) else own

    return jax.tree.map(reorder, tree), positions


def redo_order(x: Array, positions: Int[Array, "B T"], *, axis_name: Any) -> Array:
    """Back from contiguous chunks to the order that `undo_order` met."""
    row = lax.all_gather(x, axis_name, axis=1, tiled=True)
    positions = as_int32("positions", positions)
    return masks.take(row, positions)
