"""The layers' calls on a mesh: which arrays go along, how they lie, what cannot be asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gqa_jax.parallel import sharding
from gqa_jax.parallel.context import redo_order, undo_order
from gqa_jax.parallel.context.row import (
    can_be_read,
    check_gaps,
    check_permutation,
    place_of_token,
)
from gqa_jax.parallel.sharding import cast_like, names
from gqa_jax.parallel.tensor.on_mesh import check_rows, on_mesh, spread
from gqa_jax.train import qk_clip


def self_attention(
    layer: Any,
    x: Array,
    *,
    positions: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    dropout_key: Array | None,
    split_qkv: bool,
) -> tuple[Array, Array | None]:
    """`SelfAttention.__call__` on a mesh; without `dropout_key` nothing is dropped.

    Returns:
      the output, and `[K, R]` the largest logits where `qk_clip` records them.

    Raises:
      NotImplementedError: a mask per head where a group's queries are split over devices, or dropout where those of
        several groups are.
      ValueError: what context parallelism cannot be given: a mask, a fused call, layout "positions" without positions.
    """
    axes, plan = layer.axes, layer.context_parallel
    if plan is not None:
        if mask is not None:
            raise ValueError(
                "`mask` must be None under context parallelism; say it by `segment_ids` and `positions`"
            )
        if not split_qkv:
            raise ValueError("`split_qkv` must be True under context parallelism, got False")
        windowed = layer.config.sliding_window is not None
        check_row(layer, x, positions, segment_ids, whole_segments=windowed, any_gap=windowed)
    recording = qk_clip.is_recording(layer) and split_qkv

    def body(local, x, positions, segment_ids, mask, dropout_key):
        offset = None if dropout_key is None else dropout_offset(layer, local, x.shape[0])
        out, top = local.attend(
            x,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            dropout_key=dropout_key,
            dropout_offset=offset,
            split_qkv=split_qkv,
            recording=recording,
        )
        return out, None if top is None else _of_all_heads(top, layer)

    specs = (
        axes.tokens if positions is None or positions.ndim == 2 else jax.P(None, *axes.tokens),
        axes.tokens,
        _mask_spec(layer, mask, None),
        jax.P(),
    )
    inputs = (positions, segment_ids, mask, dropout_key)
    return on_mesh(layer, body, x, inputs, axes=axes, input_specs=specs, extra_specs=jax.P())


def _of_all_heads(top: Array, layer: Any) -> Array:
    """The largest logits `[K, R]` of the whole batch on every device, from those of this one. Inside `shard_map`."""
    axes, config = layer.axes, layer.config
    groups, within = sharding.split_groups(axes, config.num_kv_heads, sharding.current_mesh(axes))
    index = lambda axis: lax.axis_index(axis) if axis else jnp.int32(0)
    start = index(groups) * top.shape[0], index(within) * top.shape[1]
    empty = jnp.full((config.num_kv_heads, config.q_per_kv), -jnp.inf, top.dtype)
    return lax.pmax(lax.dynamic_update_slice(cast_like(empty, top), top, start), axes.used)


def check_row(
    layer: Any,
    x: Array,
    positions: Array | None,
    segment_ids: Array | None,
    *,
    whole_segments: bool,
    any_gap: bool = True,
) -> None:
    """Raises `ValueError` for marks that context parallelism cannot work with, as far as they can be read.

    Args:
      layer, x, positions, segment_ids: of the call.
      whole_segments, any_gap: whether the layer needs the tokens of a segment next to each other, see `check_gaps`.
    """
    plan, axes = layer.context_parallel, layer.axes
    if plan.layout == "positions":
        if positions is None:
            raise ValueError("`positions` must be given with layout 'positions', got None")
        if positions.ndim != 2:
            raise ValueError(
                f"`positions` must have shape [B, T] with layout 'positions', got {positions.shape}"
            )
    if sharding.is_manual(axes):
        return
    if plan.layout == "positions" and positions is not None and can_be_read(positions):
        check_permutation(positions)
    if any_gap and segment_ids is not None:
        check_rows(x, axes, layer)
        devices = sharding.size(axes.seq, sharding.current_mesh(axes))
        places = place_of_token(x.shape[1], devices, plan.layout, positions)
        check_gaps(segment_ids, places, whole_segments=whole_segments)


def cross_attention(
    layer: Any,
    x: Array,
    memory: Any,
    *,
    positions: Array | None,
    segment_ids: Array,
    mask: Array | None,
    dropout_key: Array | None,
) -> Array:
    """`CrossAttention.__call__` on a mesh; without `dropout_key` nothing is dropped.

    Args:
      layer, x, positions, segment_ids, mask: of the call; `axes.seq` splits tokens in any order.
      memory: an array, or projected; every device of `axes.seq` has it whole.
      dropout_key: or None.

    Raises:
      NotImplementedError: as `self_attention`, and dropout where `axes.seq` splits the tokens.
      ValueError: a rotary embedding without `positions` where `axes.seq` splits the tokens.
    """
    axes = layer.axes
    if axes.seq is not None and dropout_key is not None:
        raise NotImplementedError(
            f"dropout of cross-attention goes by the index of a token, which axes.seq={axes.seq!r} hides"
        )
    if axes.seq is not None and layer.config.rope is not None and positions is None:
        raise ValueError(
            f"`positions` must be given where axes.seq={axes.seq!r} splits the tokens, got None"
        )

    def body(local, x, memory, positions, segment_ids, mask, dropout_key):
        drop: dict[str, Any] = dict(deterministic=dropout_key is None, dropout_key=dropout_key)
        if dropout_key is not None:
            drop["dropout_offset"] = dropout_offset(layer, local, x.shape[0])
        marks = dict(positions=positions, segment_ids=segment_ids, mask=mask)
        return local(x, memory, **marks, **drop), None

    rows = jax.P(axes.tokens[0])
    of_memory: Any = rows
    if not hasattr(memory, "ndim"):  # projected
        by_group = _projected_spec(layer)
        of_memory = dataclasses.replace(memory, key=by_group, value=by_group, segment_ids=rows)
    specs = (of_memory, axes.tokens, axes.tokens, _mask_spec(layer, mask, axes.tokens[1]), jax.P())
    inputs = (memory, positions, segment_ids, mask, dropout_key)
    return on_mesh(layer, body, x, inputs, axes=axes, input_specs=specs)[0]


def project_memory(
    layer: Any, memory: Array, *, positions: Array | None, segment_ids: Array
) -> tuple[Array, Array]:
    """Key and value of `CrossAttention.project_memory` on a mesh, split by rows and groups."""
    axes = layer.axes
    mesh = sharding.current_mesh(axes)
    sharing = sharding.split_groups(axes, layer.config.num_kv_heads, mesh)[1]

    def run(local, memory, positions, segment_ids):
        projected = local.project_memory(memory, positions=positions, segment_ids=segment_ids)
        both = projected.key, projected.value
        if sharing:  # equal on devices that share a group, which they gathered: one speaks for all
            speaks = lax.axis_index(sharing) == 0
            both = jax.tree.map(lambda x: jnp.where(speaks, x, jnp.zeros_like(x)), both)
            both = lax.psum(both, sharing)
        return both

    if not sharding.is_manual(axes):
        check_rows(memory, axes.without_seq, layer, name="memory")
    rows, by_group = jax.P(axes.tokens[0]), _projected_spec(layer)
    return spread(
        layer,
        run,
        (memory, positions, segment_ids),
        axes=axes,
        in_specs=(rows, rows, rows),
        out_specs=(by_group, by_group),
    )


def _projected_spec(layer: Any) -> jax.P:
    """Of `[B, S, K, D]`."""
    axes = layer.axes
    mesh = sharding.current_mesh(axes)
    groups = sharding.split_groups(axes, layer.config.num_kv_heads, mesh)[0]
    return jax.P(axes.tokens[0], None, groups or None)


def _mask_spec(layer: Any, mask: Array | None, of_queries: Any) -> jax.P | None:
    """Of a mask `[B or 1, N or 1, T, S]`.

    Raises:
      NotImplementedError: one per head where devices share a group.
    """
    if mask is None:
        return None
    axes = layer.axes
    by_head = axes.logits[2] if mask.shape[1] > 1 else None
    mesh = sharding.current_mesh(axes)
    if by_head is not None and sharding.split_groups(axes, layer.config.num_kv_heads, mesh)[1]:
        raise NotImplementedError(
            f"`mask` must be the same for all heads where devices share a key/value head, got {mask.shape}"
        )
    return jax.P(axes.tokens[0] if mask.shape[0] > 1 else None, by_head, of_queries)


def dropout_offset(layer: Any, local: Any, rows: int) -> Array:
    """(first batch row, first query head) of this device in the whole, `[2]` int32. Inside `shard_map`.

    Raises:
      NotImplementedError: its heads are not consecutive.
    """
    axes, config = layer.axes, layer.config
    groups, within = sharding.split_groups(axes, config.num_kv_heads, sharding.current_mesh(axes))
    held = local.config.num_kv_heads
    if within and held > 1:
        raise NotImplementedError(
            f"dropout needs devices with consecutive heads: mesh axes {within} split the queries of groups, of which a "
            f"device has {held}; factor `heads` so that it has one"
        )
    index = lambda axis: lax.axis_index(axis) if axis else jnp.int32(0)
    head = index(groups) * (held * config.q_per_kv) + index(within) * local.config.q_per_kv
    return jnp.stack([index(names(axes.batch)) * rows, head])


def gated_deltanet(
    layer: Any, x: Array, *, positions: Array | None, segment_ids: Array | None
) -> Array:
    """`GatedDeltaNet.__call__` on a mesh.

    Raises:
      ValueError: `positions` without layout "positions", or the layout without them.
    """
    plan = layer.context_parallel
    any_order = plan is not None and plan.layout == "positions"
    if any_order != (positions is not None):
        raise ValueError(
            "`positions` must be given with layout 'positions' and only then, got "
            f"positions={'None' if positions is None else positions.shape}, context_parallel={plan}"
        )
    if plan is not None:
        check_row(layer, x, positions, segment_ids, whole_segments=False)

    def body(local, x, positions, segment_ids):
        if not any_order:
            return local(x, segment_ids=segment_ids), None
        axis = local.context_parallel.axis
        (x, segment_ids), places = undo_order((x, segment_ids), positions, axis_name=axis)
        local.context_parallel = dataclasses.replace(local.context_parallel, layout="contiguous")
        return redo_order(local(x, segment_ids=segment_ids), places, axis_name=axis), None

    specs = (layer.axes.tokens, layer.axes.tokens)
    return on_mesh(layer, body, x, (positions, segment_ids), axes=layer.axes, input_specs=specs)[0]


def mlp(layer: Any, x: Array) -> Array:
    """`MLP.__call__` on a mesh."""
    return on_mesh(
        layer, lambda local, x: (local(x), None), x, (), axes=layer.axes, input_specs=()
    )[0]


def moe(layer: Any, x: Array, real: Array | None) -> tuple[Array, tuple[Array, Array, Array]]:
    """`MoE.with_statistics` on a mesh: every device holds its channels of every expert."""
    axes = layer.axes
    tokens = names(axes.batch) + names(axes.seq)

    def body(local, x, real):
        out, statistics = local.with_statistics(x, real=real)
        if tokens:
            statistics = lax.psum(statistics, tokens)
        if (
            axes.seq_residual is not None
        ):  # gathered tokens: the same on all devices, but not known to be
            statistics = lax.pmean(statistics, names(axes.heads))
        return out, tuple(statistics)

    everywhere = (jax.P(), jax.P(), jax.P())
    return on_mesh(
        layer, body, x, (real,), axes=axes, input_specs=(axes.tokens,), extra_specs=everywhere
    )
