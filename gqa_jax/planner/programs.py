"""The programs that are planned: one update of training, one token of decoding, from shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from gqa_jax.cache import GatedDeltaNetState
from gqa_jax.config import AttentionConfig, DecoderConfig
from gqa_jax.models.decoder import Decoder
from gqa_jax.parallel import caches, sharding
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes
from gqa_jax.train.step import TrainState, train_step


class Program(NamedTuple):
    """What `jax.jit` takes.

    Attributes:
      function: its first argument is donated.
      arguments: of `jax.ShapeDtypeStruct` with shardings.
      parts: purpose -> the part of the arguments that serves it.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    parts: dict[str, Any]


def training(
    config: DecoderConfig,
    mesh: jax.sharding.Mesh,
    axes: MeshAxes,
    context_parallel: ContextParallel | None,
    *,
    batch: int,
    length: int,
    dtype: Any,
    param_dtype: Any,
) -> Program:
    """One AdamW update on `[batch, length]` tokens, whose labels are shifted already (as `to_layout` needs)."""
    optimizer = optax.adamw(1e-4)

    def create() -> TrainState:
        options: dict[str, Any] = dict(axes=axes, context_parallel=context_parallel)
        return TrainState.create(_decoder(config, dtype, param_dtype, options), optimizer)

    def step(state: TrainState, tokens, labels):
        return train_step(state, tokens, optimizer=optimizer, targets=labels)

    state = _placed(jax.eval_shape(create), mesh, axes)
    tokens = _tokens((batch, length), mesh, axes)
    parts = {"parameters": state.params, "optimizer": state.opt_state, "batch": (tokens, tokens)}
    return Program(step, (state, tokens, tokens), parts)


def decoding(
    config: DecoderConfig,
    mesh: jax.sharding.Mesh,
    axes: MeshAxes,
    context_parallel: ContextParallel | None,
    *,
    batch: int,
    length: int,
    dtype: Any,
    param_dtype: Any,
) -> Program:
    """One token for each of `batch` rows, from a cache of up to `length` tokens per row, updated in place."""

    def create():
        options: dict[str, Any] = dict(axes=axes, context_parallel=context_parallel)
        decoder = _decoder(config, dtype, param_dtype, options)
        return decoder, decoder.init_cache(batch, length)

    def step(cache, decoder, tokens):
        logits, cache = decoder.step(tokens, cache)
        return cache, logits

    decoder, cache = jax.eval_shape(create)
    decoder = _placed(decoder, mesh, axes)
    cache = tuple(
        _placed_cache(entry, config.attention, mesh, axes, stacked=config.scan_layers)
        for entry in cache
    )
    tokens = _tokens((batch, 1), mesh, axes.without_seq)
    parts = {"parameters": decoder, "cache": cache}
    return Program(step, (cache, decoder, tokens), parts)


def _decoder(config: DecoderConfig, dtype: Any, param_dtype: Any, options: dict) -> Decoder:
    options = options | dict(dtype=dtype, param_dtype=param_dtype, keep_rngs=False)
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def _placed(tree: Any, mesh: jax.sharding.Mesh, axes: MeshAxes) -> Any:
    shardings = sharding.parameter_shardings(tree, mesh, axes)
    return jax.tree.map(_struct, tree, shardings)


def _struct(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _tokens(shape: tuple[int, int], mesh: jax.sharding.Mesh, axes: MeshAxes) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, axes.tokens))


def _placed_cache(
    entry: Any,
    attention: AttentionConfig | None,
    mesh: jax.sharding.Mesh,
    axes: MeshAxes,
    *,
    stacked: bool,
) -> Any:
    """One entry of a decoder's cache; stacked over the repeats of the pattern, that axis is on every device."""
    single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[stacked:], x.dtype), entry)
    groups = None
    if not isinstance(entry, GatedDeltaNetState):
        assert attention is not None
        groups = attention.num_kv_heads
    specs = caches.cache_specs(single, axes, groups, mesh)

    def place(leaf, spec):
        spec = type(spec)(None, *spec) if stacked else spec
        return _struct(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, entry, specs)
