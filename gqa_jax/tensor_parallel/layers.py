"""The layers' calls on a mesh: which arrays go along, how they lie, what cannot be asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gqa_jax import qk_clip, sharding
from gqa_jax.context_parallel import redo_order, undo_order
from gqa_jax.context_parallel.order import local_positions
from gqa_jax.sharding import names
from gqa_jax.tensor_parallel.on_mesh import on_mesh


def self_attention(
    layer: Any,
    x: Array,
    *,
    positions: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    dropout_rate: float,
    split_qkv: bool,
) -> Array:
    """`SelfAttention.__call__` on a mesh.

    Raises:
      NotImplementedError: dropout, recording of the largest logits, or a mask per head where a group's queries are
        split over devices.
      ValueError: what context parallelism cannot be given: a mask, a fused call, layout "positions" without positions.
    """
    axes, plan = layer.axes, layer.context_parallel
    if dropout_rate > 0.0:
        raise NotImplementedError(
            f"attention dropout does not run on a mesh, got dropout_rate={dropout_rate}"
        )
    if qk_clip.is_recording(layer):
        raise NotImplementedError("`qk_clip.MaxLogits` are not recorded on a mesh")
    if plan is not None:
        if mask is not None:
            raise ValueError(
                "`mask` must be None under context parallelism; say it by `segment_ids` and `positions`"
            )
        if not split_qkv:
            raise ValueError("`split_qkv` must be True under context parallelism, got False")
        if plan.layout == "positions" and positions is None:
            raise ValueError("`positions` must be given with layout 'positions', got None")
    by_head = axes.logits[2] if mask is not None and mask.shape[1] > 1 else None
    if mask is not None and by_head is not None:
        mesh = sharding.current_mesh(axes)
        if sharding.split_groups(axes, layer.config.num_kv_heads, mesh)[1]:
            raise NotImplementedError(
                "`mask` must be the same for all heads where devices share a key/value head, got "
                f"{mask.shape}"
            )

    def body(local, x, positions, segment_ids, mask):
        if plan is not None and positions is None:
            places = local_positions(x.shape[1], names(axes.seq), plan.layout)
            positions = jnp.broadcast_to(places, x.shape[:2])
        out = local(x, positions=positions, segment_ids=segment_ids, mask=mask, split_qkv=split_qkv)
        return out, None

    specs = (
        axes.tokens if positions is None or positions.ndim == 2 else jax.P(None, *axes.tokens),
        axes.tokens,
        None if mask is None else jax.P(axes.tokens[0] if mask.shape[0] > 1 else None, by_head),
    )
    return on_mesh(layer, body, x, (positions, segment_ids, mask), axes=axes, input_specs=specs)[0]


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
