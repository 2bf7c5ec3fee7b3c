"""One `shard_map` per layer: inside, every device is the ordinary layer of its own heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from gqa_jax.config import AttentionConfig, GatedDeltaNetConfig
from gqa_jax.layers import masks
from gqa_jax.parallel import sharding
from gqa_jax.parallel.context.order import ContextParallel, num_slots
from gqa_jax.parallel.sharding import MeshAxes, names
from gqa_jax.train.lora import LoRAProjection
from gqa_jax.train.qk_clip import without_records


def check_layer(axes: MeshAxes | None, context_parallel: ContextParallel | None) -> None:
    """Raises `ValueError` where a layer's `axes` and `context_parallel` do not belong together."""
    has_seq = axes is not None and axes.seq is not None
    if has_seq != (context_parallel is not None):
        raise ValueError(
            "`context_parallel` and `axes.seq` must be given together, got "
            f"context_parallel={context_parallel}, axes={axes}"
        )


def check_positions(context_parallel: ContextParallel | None) -> None:
    """Raises `ValueError` where positions in packed rows would be counted on a part of the row."""
    if context_parallel is not None:
        raise ValueError(
            "`positions` must be given with `segment_ids` under context parallelism, got None"
        )


def on_mesh(
    layer: Any,
    body: Callable[..., tuple[Array, Any]],
    x: Float[Array, "B T M"],
    inputs: tuple,
    *,
    axes: MeshAxes,
    input_specs: tuple,
    extra_specs: Any = None,
) -> tuple[Float[Array, "B T M"], Any]:
    """Runs `body(local_layer, x, *inputs) -> (partial output, extras)` on every device.

    Args:
      layer: a module whose parameters have rules.
      body: the layer's one-device code; its output is summed over `axes.heads`.
      x: `[B, T, M]`, laid out as the residual stream.
      inputs: further arrays (pytrees, None).
      axes: names of mesh axes.
      input_specs: their PartitionSpecs.
      extra_specs: those of what else `body` returns.

    Returns:
      the output, laid out as the residual stream, and the extras.

    Raises:
      ValueError: no mesh, axes that it lacks, sizes that its axes do not divide.
    """

    def run(local, x, inputs):
        out, extras = body(local, gather_tokens(x, axes), *inputs)
        return sum_over_heads(out, axes), extras

    if not sharding.is_manual(axes):
        check_rows(x, axes, layer)
    return spread(
        layer,
        run,
        (x, inputs),
        axes=axes,
        in_specs=(axes.residual, input_specs),
        out_specs=(axes.residual, extra_specs),
    )


def spread(
    layer: Any,
    run: Callable[..., Any],
    arguments: tuple,
    *,
    axes: MeshAxes,
    in_specs: tuple,
    out_specs: Any,
) -> Any:
    """`run(local_layer, *arguments)` on every device; inside a caller's `shard_map`, on this one.

    Args:
      layer: a module whose parameters have rules.
      run: what a device does with the ordinary layer of its own heads.
      arguments: arrays (pytrees, None).
      axes: names of mesh axes.
      in_specs, out_specs: how arguments and results lie.

    Raises:
      ValueError: as `on_mesh`.
    """
    mesh = sharding.current_mesh(axes)
    layer = without_records(layer)
    if getattr(layer, "rngs", None) is not None:  # the caller has drawn the key
        layer.rngs = None
    leaves, treedef = jax.tree.flatten(layer)

    def on_device(leaves, *arguments):
        return run(_local(jax.tree.unflatten(treedef, leaves), axes, mesh), *arguments)

    if sharding.is_manual(axes):
        return on_device(leaves, *arguments)
    in_specs = (sharding.parameter_specs(layer, axes, mesh), *in_specs)
    arguments = laid_out((leaves, *arguments), in_specs)
    return jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs)(*arguments)


def check_rows(x: Array | np.ndarray, axes: MeshAxes, layer: Any, *, name: str = "x") -> None:
    """Raises `ValueError` for a batch or length that the mesh does not divide."""
    mesh = sharding.current_mesh(axes)
    rows = sharding.size(axes.batch, mesh)
    if x.shape[0] % rows:
        raise ValueError(
            f"`{name}` must have a batch that is a multiple of {rows} (mesh axes {names(axes.batch)}), got "
            f"B={x.shape[0]}"
        )
    devices = sharding.size(axes.seq, mesh)
    context = getattr(layer, "context_parallel", None) if axes.seq is not None else None
    chunks = devices * (1 if context is None else num_slots(context.layout))
    parts = devices * sharding.size(axes.seq_residual, mesh)
    for multiple in (chunks, parts):
        if x.shape[1] % multiple:
            raise ValueError(
                f"`{name}` must have a length that is a multiple of {multiple} (mesh axes "
                f"{names(axes.seq) + names(axes.seq_residual)}), got T={x.shape[1]}"
            )


def hide_padding(x: Array, segment_ids: Array | None, axes: MeshAxes | None) -> Array:
    """`masks.hide_padding` of the residual stream."""
    if segment_ids is not None and axes is not None:
        segment_ids = sharding.constrain(segment_ids, jax.P(*axes.residual[:2]))
        if segment_ids.shape[1] != x.shape[1]:  # in a `shard_map`, `seq_residual` splits x further
            start = lax.axis_index(names(axes.seq_residual)) * x.shape[1]
            segment_ids = lax.dynamic_slice_in_dim(segment_ids, start, x.shape[1], axis=1)
    return masks.hide_padding(x, segment_ids)


def laid_out(tree: Any, specs: Any) -> Any:
    """Every array of the tree laid out as its spec; one spec may stand for a subtree."""
    spread = jax.tree.broadcast(specs, tree, is_leaf=lambda s: isinstance(s, jax.P))
    return jax.tree.map(sharding.constrain, tree, spread)


def gather_tokens(x: Array, axes: MeshAxes) -> Array:
    """All of this device's tokens, where the residual stream is split over heads' axes too."""
    if axes.seq_residual is None:
        return x
    return lax.all_gather(x, names(axes.heads), axis=1, tiled=True)


def sum_over_heads(x: Array, axes: MeshAxes) -> Array:
    """The sum of partial results, laid out as the residual stream."""
    if not names(axes.heads):
        return x
    if axes.seq_residual is not None:
        return lax.psum_scatter(x, names(axes.heads), scatter_dimension=1, tiled=True)
    return lax.psum(x, names(axes.heads))


def _local(layer: Any, axes: MeshAxes, mesh: Any) -> Any:
    """The ordinary layer of this device's groups: parameters gathered over fsdp, sizes of the config divided."""
    config = getattr(layer, "config", None)
    within: tuple[str, ...] = ()
    shares = (1, 1)
    if isinstance(config, AttentionConfig):
        groups, within = sharding.split_groups(axes, config.num_kv_heads, mesh)
        shares = sharding.size(groups, mesh), sharding.size(within, mesh)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(layer)
    gathered = []
    for path, leaf in leaves:
        name = sharding.path_name(path)
        for dim, spread in enumerate(sharding.gathered_dimensions(name, axes, within)):
            if spread:
                leaf = lax.all_gather(leaf, spread, axis=dim, tiled=True)
        is_summed = name in ("out.bias", "out.base.bias")
        if is_summed and names(axes.heads):  # the sum over devices counts it once
            leaf = jnp.where(lax.axis_index(names(axes.heads)) == 0, leaf, jnp.zeros_like(leaf))
        gathered.append(leaf)
    local = jax.tree.unflatten(treedef, gathered)
    local.axes = None
    for _, module in nnx.iter_modules(local):
        for name in ("out", "down"):  # their inputs are what heads split
            projection = getattr(module, name, None)
            if isinstance(projection, LoRAProjection):
                projection.split_over = names(axes.heads)
    if getattr(layer, "context_parallel", None) is not None:
        plan = dataclasses.replace(layer.context_parallel, axis_name=names(axes.seq))
        local.context_parallel = plan if axes.seq is not None else None
    if isinstance(config, AttentionConfig):
        _take_queries(local, config, within, shares[1])
        kv_heads = config.num_kv_heads // shares[0]
        local.config = dataclasses.replace(
            config, num_kv_heads=kv_heads, num_heads=kv_heads * (config.q_per_kv // shares[1])
        )
    elif isinstance(config, GatedDeltaNetConfig):
        share = sharding.size(axes.heads, mesh)
        local.config = dataclasses.replace(
            config,
            num_key_heads=config.num_key_heads // share,
            num_value_heads=config.num_value_heads // share,
        )
    return local


def _take_queries(
    local: Any, config: AttentionConfig, within: tuple[str, ...], shares: int
) -> None:
    """Where more devices than groups share a group's key and value, each keeps its own queries (and gates)."""
    if not within:
        return
    mine, start = config.q_per_kv // shares, lax.axis_index(within) * (config.q_per_kv // shares)
    has_tail = hasattr(local, "qkv")  # key and value behind the queries
    projection = local.qkv if has_tail else local.q

    def take(parameter: Any, axis: int) -> None:
        if parameter is None:
            return
        fused = parameter[...]
        blocks = [
            lax.dynamic_slice_in_dim(fused, first * config.q_per_kv + start, mine, axis)
            for first in range(2 if config.output_gate else 1)
        ]
        if has_tail:
            blocks.append(lax.slice_in_dim(fused, fused.shape[axis] - 2, None, axis=axis))
        parameter.set_value(jnp.concatenate(blocks, axis=axis))

    take(projection.kernel, 2)
    take(projection.bias, 1)
    if isinstance(projection, LoRAProjection):
        take(projection.lora_b, 2)
        take(projection.magnitude, 1)
