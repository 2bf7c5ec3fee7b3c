"""Steps on a mesh: caches split by heads and, for long contexts, by tokens."""

from collections.abc import Callable
from typing import Any

import jax

from gqa_jax.cache import GatedDeltaNetState, KVCache
from gqa_jax.parallel import sharding
from gqa_jax.parallel.context.decode import SpreadKVCache
from gqa_jax.parallel.sharding import MeshAxes, names


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


def cache_specs_of(cache: Any, layer: Any) -> Any:
    """`cache_specs` of the cache of a mixer on a mesh, or of every entry of a decoder's."""
    mesh = sharding.current_mesh(layer.axes)
    attention = getattr(layer.config, "attention", layer.config)
    groups = getattr(attention, "num_kv_heads", None)
    if not hasattr(layer, "layers"):
        return cache_specs(cache, layer.axes, groups, mesh)
    return tuple(cache_specs(entry, layer.axes, groups, mesh) for entry in cache)


def shard_cache(cache: Any, layer: Any) -> Any:
    """An empty cache, as `layer.init_cache` made it, laid out on the current mesh: the first step need not move it.

    Args:
      cache, layer: of a decoder with `axes`, or of a layer on a mesh.

    Raises:
      NotImplementedError: as `cache_specs`.
    """
    return jax.tree.map(sharding.constrain, cache, cache_specs_of(cache, layer))


def check_capacity(cache: Any, axes: MeshAxes) -> None:
    """Raises `ValueError` for a capacity that `axes.seq` does not divide."""
    parts = sharding.size(axes.seq, sharding.current_mesh(axes))
    if isinstance(cache, KVCache) and not sharding.is_manual(axes) and cache.capacity % parts:
        raise ValueError(
            f"`cache` must have a capacity that is a multiple of {parts} (mesh axes {names(axes.seq)}), got "
            f"{cache.capacity}"
        )


def spread_over_tokens(cache: Any, axes: MeshAxes) -> Any:
    """A device's part of a layer's cache as its `step` takes it: slots may be split over `axes.seq`."""
    if axes.seq is None or not isinstance(cache, KVCache):
        return cache
    return SpreadKVCache(cache, names(axes.seq))


def part_of(cache: Any) -> Any:
    """The inverse of `spread_over_tokens`."""
    return cache.part if isinstance(cache, SpreadKVCache) else cache


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
