"""Steps on a mesh: caches split by heads and, for long contexts, by tokens."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from gqa_jax.cache import GatedDeltaNetState, KVCache
from gqa_jax.config import AttentionConfig
from gqa_jax.parallel import sharding
from gqa_jax.parallel.context.decode import SpreadKVCache
from gqa_jax.parallel.sharding import MeshAxes, names
from gqa_jax.parallel.tensor.on_mesh import on_mesh


def cache_specs(cache: Any, axes: MeshAxes, num_kv_heads: int | None, mesh: Any) -> Any:
    """A cache of PartitionSpecs for the cache of one layer.

    Args:
      cache: of a layer, or of the layers of a scan, stacked; a `KVCache` is split by heads and, where `axes.seq` is
        set, by slots.
      axes: names of mesh axes.
      num_kv_heads: K of an attention layer, None for Gated DeltaNet.
      mesh: with the axes.

    Raises:
      NotImplementedError: `axes.seq` with a cache other than `KVCache` or `GatedDeltaNetState`.
    """
    rows, seq = axes.tokens[0], axes.tokens[1]
    repeats = (None,) * (cache.length.ndim - 1)
    spec = lambda *dims: jax.P(*repeats, *dims)
    if isinstance(cache, GatedDeltaNetState):
        heads = axes.logits[2]
        specs: Any = spec(rows, None, heads), spec(rows, heads), spec(rows)
        return GatedDeltaNetState(*specs)
    if seq is not None and not isinstance(cache, KVCache):
        raise NotImplementedError(
            f"only policy 'full' splits its slots over axes.seq={axes.seq!r}, got {type(cache).__name__}"
        )
    assert num_kv_heads is not None
    groups = sharding.split_groups(axes, num_kv_heads, mesh)[0] or None
    by_row = len(repeats) + 1
    return jax.tree.map(lambda x: spec(rows, groups, seq) if x.ndim > by_row else spec(rows), cache)


def shard_cache(cache: Any, layer: Any) -> Any:
    """An empty cache laid out on the current mesh, so that the first step need not move it.

    Args:
      cache: what `layer.init_cache` made.
      layer: a mixer, or a whole decoder.

    Raises:
      NotImplementedError: as `cache_specs`.
    """
    if isinstance(cache, tuple) and hasattr(layer, "layers"):
        pairs = zip(cache, layer.layers, strict=True)
        return tuple(shard_cache(entry, one.mixer) for entry, one in pairs)
    config = layer.config
    groups = config.num_kv_heads if isinstance(config, AttentionConfig) else None
    specs = cache_specs(cache, layer.axes, groups, sharding.current_mesh(layer.axes))
    return jax.tree.map(sharding.constrain, cache, specs)


def divisible_capacity(capacity: int, axes: MeshAxes | None) -> int:
    """The least capacity of a cache, from `capacity` on, that `axes.seq` divides."""
    if axes is None:
        return capacity
    parts = sharding.size(axes.seq, sharding.current_mesh(axes))
    return -(-capacity // parts) * parts


def on_every_device(run: Callable[..., Any], *arguments: Any, axes: MeshAxes | None) -> Any:
    """`run(*arguments)`, small results, whole on every device; `run` must close over no array.

    Inside, the compiler lays out what it likes: not every operation has a rule for axes that are Explicit.
    """
    if axes is None or sharding.is_manual(axes):
        return run(*arguments)
    out = jax.sharding.auto_axes(run, out_sharding=jax.P())(*arguments)
    return jax.tree.map(lambda x: sharding.constrain(x, jax.P()), out)


def for_steps(layer: Any) -> Any:
    """The layer as a step calls it: the few tokens of a step are on every device, whatever splits those of training."""
    if layer.axes is None:
        return layer
    leaves, treedef = jax.tree.flatten(layer)
    copy = jax.tree.unflatten(treedef, leaves)
    copy.axes = layer.axes.without_seq
    return copy


def step(
    layer: Any, x: Array, cache: Any, *, lengths: Array | None, positions: Array | None = None
) -> tuple[Array, Any]:
    """`step` of a mixer on a mesh: heads split as in training, tokens of the step on every device of `axes.seq`.

    A `KVCache` is split over `axes.seq` by slots: the owner of a slot writes it, partial softmaxes merge.

    Raises:
      ValueError: a capacity that `axes.seq` does not divide.
      NotImplementedError: as `cache_specs`.
    """
    mesh = sharding.current_mesh(layer.axes)
    plain = layer.axes.without_seq
    groups = layer.config.num_kv_heads if isinstance(layer.config, AttentionConfig) else None
    specs = cache_specs(cache, layer.axes, groups, mesh)
    spread = layer.axes.seq is not None and isinstance(cache, KVCache)
    parts = sharding.size(layer.axes.seq, mesh)
    if spread and not sharding.is_manual(layer.axes) and cache.capacity % parts:
        raise ValueError(
            f"`cache` must have a capacity that is a multiple of {parts} (mesh axes {names(layer.axes.seq)}), got "
            f"{cache.capacity}"
        )

    def body(local, x, cache, lengths, positions):
        options = {} if positions is None else {"positions": positions}
        if spread:
            cache = SpreadKVCache(cache, names(layer.axes.seq))
        out, cache = local.step(x, cache, lengths=lengths, **options)
        return out, cache.part if spread else cache

    rows = jax.P(plain.tokens[0])
    three = positions is not None and positions.ndim == 3
    input_specs = (specs, rows, jax.P(None, *rows) if three else rows)
    inputs = (cache, lengths, positions)
    return on_mesh(layer, body, x, inputs, input_specs=input_specs, extra_specs=specs, axes=plain)
