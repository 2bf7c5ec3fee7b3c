"""One region: a module runs inside one `shard_map`, where each device is the same module with its share of the heads.

`localize` walks a copy of the module once. Configs get this device's sizes; a parameter that is stored in parts is
gathered where it is read (so that a scan gathers one layer at a time); classes whose work crosses devices become their
counterparts. Partial results of row-parallel products are summed: one all-reduce per block forward and one backward
(Megatron, arXiv 1909.08053), or a reduce-scatter and an all-gather where the residual stream is split too
(arXiv 2205.05198). Inside a caller's own `shard_map` the same code runs as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from gqa_jax.config import AttentionConfig, GatedDeltaNetConfig
from gqa_jax.layers import records
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.moe import MoE, MoEOutput, RouterStatistics
from gqa_jax.models.decoder_layer import DecoderLayer, Embedding
from gqa_jax.parallel import sharding
from gqa_jax.parallel.context.layers import ContextGatedDeltaNet, ContextSelfAttention
from gqa_jax.parallel.context.order import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes, names
from gqa_jax.train.lora import LoRAProjection

Axes = tuple[str, ...]


def run(
    module: Any,
    body: Callable[..., Any],
    arguments: tuple,
    *,
    axes: MeshAxes,
    in_specs: tuple,
    out_specs: Any,
    context_parallel: ContextParallel | None = None,
) -> Any:
    """`body(local_module, *arguments)` on every device; inside a caller's `shard_map`, on this one.

    What `nnx.capture` records in the local module is added to `module`.

    Args:
      module: its parameters have rules in `sharding`.
      body: what a device does with its share.
      arguments: arrays (pytrees, None).
      axes: names of mesh axes.
      in_specs, out_specs: how arguments and results are laid out.
      context_parallel: how attention and delta rule cross `axes.seq`.

    Raises:
      ValueError: no mesh, axes that it lacks, sizes that its axes do not divide.
    """
    mesh = sharding.current_mesh(axes)
    bare = _without_streams(module)
    leaves, treedef = jax.tree.flatten(bare)

    def on_device(leaves, *arguments):
        local = jax.tree.unflatten(treedef, leaves)
        localize(local, axes, mesh, context_parallel)
        out = body(local, *arguments)
        tokens = names(axes.batch) + names(axes.seq)
        recorded = records.records(local)
        return out, jax.tree.map(lambda x: lax.pmax(x, tokens), recorded) if tokens else recorded

    if sharding.is_manual(axes):
        out, recorded = on_device(leaves, *arguments)
    else:
        in_specs = (sharding.parameter_specs(bare, axes, mesh), *in_specs)
        inputs = sharding.laid_out((leaves, *arguments), in_specs)
        out_specs = (out_specs, _record_spec(module, axes, mesh))
        region = jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs)
        out, recorded = region(*inputs)
    records.add_records(module, recorded)
    return out


def localize(
    module: Any, axes: MeshAxes, mesh: Any, context_parallel: ContextParallel | None
) -> None:
    """Makes a copy of a module, whose arrays are this device's parts, the module of this device's share.

    Raises:
      TypeError: a subclass of a class whose work crosses devices.
    """
    if context_parallel is not None:
        context_parallel = dataclasses.replace(context_parallel, axis_name=names(axes.seq))
    children: list[Any] = [child for _, child in nnx.iter_modules(module)]
    for child in children:
        if hasattr(type(child), "alone"):  # of `parallel.layers`
            become(child, type(child).alone)
        config = getattr(child, "config", None)
        if isinstance(config, AttentionConfig):
            groups, within = sharding.split_groups(axes, config.num_kv_heads, mesh)
            _read_through(child, axes, within, _query_blocks(child, within))
            kv_heads = config.num_kv_heads // sharding.size(groups, mesh)
            queries = config.q_per_kv // sharding.size(within, mesh)
            child.config = dataclasses.replace(
                config, num_kv_heads=kv_heads, num_heads=kv_heads * queries
            )
        elif isinstance(config, GatedDeltaNetConfig):
            share = sharding.size(axes.heads, mesh)
            child.config = dataclasses.replace(
                config,
                num_key_heads=config.num_key_heads // share,
                num_value_heads=config.num_value_heads // share,
            )
        for name in ("out", "down"):  # their inputs are what heads split
            projection = getattr(child, name, None)
            if isinstance(projection, LoRAProjection):
                projection.split_over = names(axes.heads)
        if counterpart := _counterpart(child, _ACROSS_DEVICES):
            become(child, counterpart, axes=axes)
        if context_parallel and (counterpart := _counterpart(child, _ACROSS_TOKENS)):
            become(child, counterpart, context_parallel=context_parallel)
    _read_through(module, axes, (), {})


def _counterpart(module: object, table: dict[type, type]) -> type | None:
    """What a module of a class in the table becomes on a mesh, or None.

    Raises:
      TypeError: a subclass of such a class.
    """
    for alone, counterpart in table.items():
        if isinstance(module, alone):
            if type(module) is not alone:
                raise TypeError(
                    f"a module on a mesh must be {alone.__name__} itself, got its subclass {type(module).__name__}: "
                    "what it does across devices is not known"
                )
            return counterpart
    return None


def become(module: object, cls: type, **attributes: object) -> None:
    """Makes a module, a copy, one of another class with the same parameters."""
    object.__setattr__(module, "__class__", cls)
    for name, value in attributes.items():
        setattr(module, name, value)


@dataclasses.dataclass(frozen=True)
class AtUse:
    """What a device does with its part of a parameter whenever a layer reads it: an `on_get_value` hook.

    Attributes:
      gather: for each dimension the axes over which it is gathered.
      queries: (dimension, queries per group, blocks of queries) where more devices than groups share a group's key and
        value: each keeps its own queries, of every block (queries, and output gates); what is behind them is whole.
      within: the axes of those devices.
      once: axes over which results are summed, so that only the first device may add the parameter.
    """

    gather: tuple[Axes, ...] = ()
    queries: tuple[int, int, int] | None = None
    within: Axes = ()
    once: Axes = ()

    def __call__(self, variable: nnx.Variable, value: Array) -> Array:
        del variable
        for dim, axis in enumerate(self.gather):
            if axis:
                value = lax.all_gather(value, axis, axis=dim, tiled=True)
        if self.once:
            value = jnp.where(lax.axis_index(self.once) == 0, value, jnp.zeros_like(value))
        if self.queries is not None:
            dim, per_group, blocks = self.queries
            mine = per_group // lax.axis_size(self.within)
            start = lax.axis_index(self.within) * mine
            parts = [
                lax.dynamic_slice_in_dim(value, block * per_group + start, mine, dim)
                for block in range(blocks)
            ]
            if value.shape[dim] > blocks * per_group:  # key and value
                parts.append(lax.slice_in_dim(value, blocks * per_group, None, axis=dim))
            value = jnp.concatenate(parts, axis=dim)
        return value


def _read_through(
    module: object, axes: MeshAxes, within: Axes, queries: dict[str, tuple[int, int, int]]
) -> None:
    """Gives the parameters of a module that need it, and have none yet, an `AtUse`."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    for path, variable in jax.tree_util.tree_leaves_with_path(module, is_leaf=is_variable):
        if not isinstance(variable, nnx.Param) or "on_get_value" in variable.get_metadata():
            continue
        name = sharding.path_name(path)
        summed = name.endswith(("out.bias", "out.base.bias"))
        use = AtUse(
            gather=tuple(sharding.gathered_dimensions(name, axes, within)),
            queries=queries.get(name),
            within=within,
            once=names(axes.heads) if summed else (),
        )
        if any(use.gather) or use.queries or use.once:
            variable.set_metadata(on_get_value=use)


def _query_blocks(layer: Any, within: Axes) -> dict[str, tuple[int, int, int]]:
    """`AtUse.queries` of an attention layer's parameters."""
    if not within:
        return {}
    config, name = layer.config, "qkv" if hasattr(layer, "qkv") else "q"
    of = lambda dim: (dim, config.q_per_kv, 2 if config.output_gate else 1)
    dims = {"kernel": 2, "bias": 1, "base.kernel": 2, "base.bias": 1, "lora_b": 2, "magnitude": 1}
    return {f"{name}.{parameter}": of(dim) for parameter, dim in dims.items()}


class LayerOnMesh(DecoderLayer):
    """A layer between a residual stream that may be split by tokens and blocks that are split by heads."""

    axes: MeshAxes

    def gather(self, x: Array) -> Array:
        return gather_tokens(x, self.axes)

    def reduce(self, out: Array) -> Array:
        return sum_over_heads(out, self.axes)


class EmbeddingOnMesh(Embedding):
    """A table whose vocabulary is split: each device looks up what it holds, the rest adds zeros."""

    axes: MeshAxes

    def __call__(self, tokens: Array, segment_ids: Array | None = None) -> Array:
        """As `Embedding`, laid out as the residual stream."""
        real = None if segment_ids is None else segment_ids >= 0
        heads = names(self.axes.heads)
        table = self.embedding[...]
        part = lax.axis_index(heads) if heads else 0
        known = (tokens >= 0) & (tokens < table.shape[0] * (lax.axis_size(heads) if heads else 1))
        row = tokens - part * table.shape[0]
        held = (row >= 0) & (row < table.shape[0])
        if real is not None:
            held, known = held & real, known | ~real
        found = table.at[jnp.where(held, row, 0)].get(mode="clip")
        found = jnp.where(held[..., None], found, jnp.zeros_like(found))
        out = sum_over_heads(found.astype(self.dtype or table.dtype), self.axes)
        if self.axes.seq_residual is not None:
            length = out.shape[1]
            known = lax.dynamic_slice_in_dim(known, part * length, length, axis=1)
        return jnp.where(known[..., None], out, jnp.asarray(jnp.nan, out.dtype))


class MoEOnMesh(MoE):
    """A mixture of which every device holds its channels of every expert; statistics are of all tokens."""

    axes: MeshAxes

    def with_statistics(self, x: Array, *, real: Array | None = None) -> MoEOutput:
        """As `MoE`; the output is this device's part of the sum."""
        out, statistics = super().with_statistics(x, real=real)
        tokens = names(self.axes.batch) + names(self.axes.seq)
        statistics = lax.psum(tuple(statistics), tokens) if tokens else tuple(statistics)
        if self.axes.seq_residual is not None:  # gathered: equal on all devices, not typed so
            statistics = lax.pmean(statistics, names(self.axes.heads))
        return MoEOutput(out, RouterStatistics(*statistics))


_ACROSS_DEVICES = {DecoderLayer: LayerOnMesh, Embedding: EmbeddingOnMesh, MoE: MoEOnMesh}
_ACROSS_TOKENS = {SelfAttention: ContextSelfAttention, GatedDeltaNet: ContextGatedDeltaNet}


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


def dropout_offset(config: AttentionConfig, rows: int, axes: MeshAxes) -> Array:
    """(first batch row, first query head) of this device in the whole, `[2]` int32. Inside `shard_map`.

    Args:
      config: of attention, undivided.
      rows: B of this device.
      axes: names of mesh axes.

    Raises:
      NotImplementedError: its heads are not consecutive.
    """
    mesh = sharding.current_mesh(axes)
    groups, within = sharding.split_groups(axes, config.num_kv_heads, mesh)
    held = config.num_kv_heads // sharding.size(groups, mesh)
    if within and held > 1:
        raise NotImplementedError(
            f"dropout needs devices with consecutive heads: mesh axes {within} split the queries of groups, of which a "
            f"device has {held}; factor `heads` so that it has one"
        )
    index = lambda axis: lax.axis_index(axis) if axis else jnp.int32(0)
    own = config.q_per_kv // sharding.size(within, mesh)
    head = index(groups) * (held * config.q_per_kv) + index(within) * own
    return jnp.stack([index(names(axes.batch)) * rows, head])


def _without_streams(module: object) -> Any:
    """A copy without streams of random numbers (the caller has drawn the key) and with nothing recorded yet."""
    leaves, treedef = jax.tree.flatten(module)
    copy = jax.tree.unflatten(treedef, leaves)
    records.start_records(copy)
    children: list[Any] = [child for _, child in nnx.iter_modules(copy)]
    for child in children:
        if getattr(child, "rngs", None) is not None:
            child.rngs = None
    return copy


def _record_spec(module: object, axes: MeshAxes, mesh: Any) -> jax.P:
    """Of what attention layers record, `[K, R]`, stacked where the module scans its layers."""
    config = getattr(module, "config", None)
    stacked = (None,) if getattr(config, "scan_layers", False) else ()
    config = getattr(config, "attention", config)
    if not isinstance(config, AttentionConfig):
        return jax.P()
    groups, within = sharding.split_groups(axes, config.num_kv_heads, mesh)
    return jax.P(*stacked, groups or None, within or None)
