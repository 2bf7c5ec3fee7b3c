"""Single layers on a mesh: `spread` makes a layer one whose calls run on the devices of the current mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from gqa_jax.config import AttentionConfig
from gqa_jax.layers import dropout
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.checks import check_call
from gqa_jax.layers.cross_attention import CrossAttention, ProjectedMemory
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.mlp import MLP
from gqa_jax.layers.moe import MoE, MoEOutput
from gqa_jax.models.decoder_layer import Embedding
from gqa_jax.parallel import region, sharding
from gqa_jax.parallel.caches import cache_specs_of, check_capacity, part_of, spread_over_tokens
from gqa_jax.parallel.context.order import ContextParallel
from gqa_jax.parallel.decoder import check_axes, check_row, check_rows, positions_spec
from gqa_jax.parallel.sharding import MeshAxes


def spread[Layer: nnx.Module](
    layer: Layer, *, axes: MeshAxes, context_parallel: ContextParallel | None = None
) -> Layer:
    """The same layer, whose calls run on the devices of the current mesh (`jax.set_mesh`), also inside `jax.jit`.

    The result is of a subclass, with the layer's parameters under the same names; `sharding.shard_parameters` puts them
    where they belong. Rows `[B, T, M]` go in and come out laid out as `axes.residual`. A decoder takes `axes` itself.

    Args:
      layer: `SelfAttention`, `CrossAttention`, `GatedDeltaNet`, `MLP`, `MoE` or `Embedding`.
      axes: names of mesh axes. In `CrossAttention` `axes.seq` splits the tokens of x, in any order, not the memory.
      context_parallel: how, where `axes.seq` splits the tokens of `SelfAttention` and `GatedDeltaNet`.

    Raises:
      TypeError: another module.
      ValueError: one of `axes.seq` and `context_parallel` without the other.
    """
    kind = next((cls for cls in _ON_MESH if cls.alone is type(layer)), None)
    if kind is None:
        known = ", ".join(cls.alone.__name__ for cls in _ON_MESH)
        raise TypeError(f"`layer` must be one of {known}, got {type(layer).__name__}")
    if kind in (SelfAttentionOnMesh, GatedDeltaNetOnMesh):
        check_axes(axes, context_parallel)
    leaves, treedef = jax.tree.flatten(layer)
    copy = jax.tree.unflatten(treedef, leaves)
    region.become(copy, kind, axes=axes, context_parallel=context_parallel)
    return copy


class OnMesh(nnx.Module):
    """What the layers on a mesh have in common.

    Attributes:
      alone: the class on one device.
      axes, context_parallel: of `spread`.
    """

    alone: type
    axes: MeshAxes
    context_parallel: ContextParallel | None

    def on_mesh(
        self,
        body: Any,
        x: Array,
        inputs: tuple,
        *,
        in_specs: tuple,
        extras: object = None,
        axes: MeshAxes | None = None,
    ) -> tuple[Array, Any]:
        """Runs `body(local_layer, x, *inputs) -> (partial output, extras)` on every device.

        Returns:
          the sum over `axes.heads`, laid out as the residual stream as `x` is, and the extras, laid out as `extras`.
        """
        axes = axes or self.axes
        if not sharding.is_manual(axes):
            check_rows(x, axes, self.context_parallel, name="x")

        def run(local, x, *inputs):
            out, rest = body(local, region.gather_tokens(x, axes), *inputs)
            return region.sum_over_heads(out, axes), rest

        return region.run(
            self,
            run,
            (x, *inputs),
            axes=axes,
            in_specs=(axes.residual, *in_specs),
            out_specs=(axes.residual, extras),
            context_parallel=self.context_parallel if axes.seq is not None else None,
        )

    def step(self, x: Array, cache: Any, **options: Array | None) -> tuple[Array, Any]:
        """As on one device, with heads split as in calls and the tokens of the step on every device of `axes.seq`.

        A `KVCache` is split over `axes.seq` by slots: the owner of a slot writes it, partial softmaxes merge.

        Raises:
          ValueError: a capacity that `axes.seq` does not divide.
          NotImplementedError: as `cache_specs`.
        """
        axes, plain = self.axes, self.axes.without_seq
        check_capacity(cache, axes)
        specs = cache_specs_of(cache, self)

        def body(local, x, cache, options):
            out, cache = local.step(x, spread_over_tokens(cache, axes), **options)
            return out, part_of(cache)

        three = lambda value: value is not None and value.ndim == 3
        rows = jax.P(plain.tokens[0])
        of_options = {
            name: jax.P(None, *rows) if three(value) else rows for name, value in options.items()
        }
        in_specs = (specs, of_options)
        return self.on_mesh(body, x, (cache, options), in_specs=in_specs, extras=specs, axes=plain)


class SelfAttentionOnMesh(OnMesh, SelfAttention):
    """`SelfAttention` on a mesh."""

    alone = SelfAttention

    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        dropout_offset: object = None,
        rngs: Any = None,
        split_qkv: bool = True,
    ) -> Array:
        """As on one device.

        Raises:
          NotImplementedError: a mask per head where a group's queries are split over devices, or dropout where those of
            several groups are.
          ValueError: what context parallelism cannot be given: a mask, a fused call, layout "positions" without them.
        """
        axes, plan, config = self.axes, self.context_parallel, self.config
        positions, segment_ids = _checked(self, x, positions, segment_ids, mask)
        if plan is not None:
            if mask is not None:
                raise ValueError(
                    "`mask` must be None under context parallelism; say it by `segment_ids` and `positions`"
                )
            if not split_qkv:
                raise ValueError("`split_qkv` must be True under context parallelism, got False")
            windowed = config.sliding_window is not None
            check_row(x, axes, plan, positions, segment_ids, gaps=windowed, whole=windowed)
        drop: dict[str, Any] = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        key = _key_of_call(self, dropout_offset, **drop)

        def body(local, x, positions, segment_ids, mask, key):
            marks = dict(positions=positions, segment_ids=segment_ids, mask=mask)
            return local(x, split_qkv=split_qkv, **marks, **_drop(self, x, key)), None

        in_specs = (
            positions_spec(positions, axes),
            axes.tokens,
            _mask_spec(self, mask, None),
            jax.P(),
        )
        inputs = (positions, segment_ids, mask, key)
        return self.on_mesh(body, x, inputs, in_specs=in_specs)[0]


class CrossAttentionOnMesh(OnMesh, CrossAttention):
    """`CrossAttention` on a mesh."""

    alone = CrossAttention

    def __call__(
        self,
        x: Array,
        memory: Any,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        dropout_offset: object = None,
        rngs: Any = None,
    ) -> Array:
        """As on one device.

        Raises:
          NotImplementedError: as `SelfAttentionOnMesh`, and dropout where `axes.seq` splits the tokens.
          ValueError: a rotary embedding without `positions` where `axes.seq` splits the tokens.
        """
        axes = self.axes
        drop: dict[str, Any] = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        key = _key_of_call(self, dropout_offset, **drop)
        if axes.seq is not None and key is not None:
            raise NotImplementedError(
                f"dropout of cross-attention goes by the index of a token, which axes.seq={axes.seq!r} hides"
            )
        if axes.seq is not None and self.config.rope is not None and positions is None:
            raise ValueError(
                f"`positions` must be given where axes.seq={axes.seq!r} splits the tokens, got None"
            )

        def body(local, x, memory, positions, segment_ids, mask, key):
            marks = dict(positions=positions, segment_ids=segment_ids, mask=mask)
            return local(x, memory, **marks, **_drop(self, x, key)), None

        rows = jax.P(axes.tokens[0])
        of_memory: Any = rows
        if isinstance(memory, ProjectedMemory):
            by_group = self._projected_spec()
            of_memory = dataclasses.replace(memory, key=by_group, value=by_group, segment_ids=rows)
        mask_spec = _mask_spec(self, mask, axes.tokens[1])
        in_specs = (of_memory, positions_spec(positions, axes), axes.tokens, mask_spec, jax.P())
        inputs = (memory, positions, segment_ids, mask, key)
        return self.on_mesh(body, x, inputs, in_specs=in_specs)[0]

    def project_memory(
        self, memory: Array, *, positions: Array | None = None, segment_ids: Array | None = None
    ) -> ProjectedMemory:
        """As on one device; key and value are split by rows and groups."""
        axes = self.axes
        mesh = sharding.current_mesh(axes)
        sharing = sharding.split_groups(axes, self.config.num_kv_heads, mesh)[1]

        def body(local, memory, positions, segment_ids):
            projected = local.project_memory(memory, positions=positions, segment_ids=segment_ids)
            if not sharing:
                return projected
            # Equal on devices that share a group, which they gathered: one speaks for all.
            both = projected.key, projected.value
            speaks = lax.axis_index(sharing) == 0
            both = jax.tree.map(lambda x: jnp.where(speaks, x, jnp.zeros_like(x)), both)
            key, value = lax.psum(both, sharing)
            return dataclasses.replace(projected, key=key, value=value)

        if not sharding.is_manual(axes):
            check_rows(memory, axes.without_seq, None, name="memory")
        rows, by_group = jax.P(axes.tokens[0]), self._projected_spec()
        specs: Any = (by_group, by_group, rows)
        return region.run(
            self,
            body,
            (memory, positions, segment_ids),
            axes=axes,
            in_specs=(rows, rows, rows),
            out_specs=ProjectedMemory(*specs),
        )

    def _projected_spec(self) -> jax.P:
        """Of `[B, S, K, D]`."""
        mesh = sharding.current_mesh(self.axes)
        groups = sharding.split_groups(self.axes, self.config.num_kv_heads, mesh)[0]
        return jax.P(self.axes.tokens[0], None, groups or None)


class GatedDeltaNetOnMesh(OnMesh, GatedDeltaNet):
    """`GatedDeltaNet` on a mesh."""

    alone = GatedDeltaNet

    def __call__(
        self, x: Array, *, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """As on one device.

        Raises:
          ValueError: `positions` without layout "positions", or the layout without them.
        """
        axes, plan = self.axes, self.context_parallel
        positions, segment_ids = _checked(self, x, positions, segment_ids, None)
        any_order = plan is not None and plan.layout == "positions"
        if any_order != (positions is not None):
            raise ValueError(
                "`positions` must be given with layout 'positions' and only then, got "
                f"positions={'None' if positions is None else positions.shape}, context_parallel={plan}"
            )
        if plan is not None:
            check_row(x, axes, plan, positions, segment_ids, gaps=True, whole=False)

        def body(local, x, positions, segment_ids):
            places = {} if positions is None else dict(positions=positions)
            return local(x, segment_ids=segment_ids, **places), None

        inputs = (positions, segment_ids)
        return self.on_mesh(body, x, inputs, in_specs=(axes.tokens, axes.tokens))[0]


class MLPOnMesh(OnMesh, MLP):
    """`MLP` on a mesh: channels are split."""

    alone = MLP

    def __call__(self, x: Array) -> Array:
        """As on one device, of `[B, T, M]`."""
        return self.on_mesh(lambda local, x: (local(x), None), x, (), in_specs=())[0]


class MoEOnMesh(OnMesh, MoE):
    """`MoE` on a mesh: every device holds its channels of every expert."""

    alone = MoE

    def with_statistics(self, x: Array, *, real: Array | None = None) -> MoEOutput:
        """As on one device, of `[B, T, M]`."""
        body = lambda local, x, real: tuple(local.with_statistics(x, real=real))
        return MoEOutput(
            *self.on_mesh(body, x, (real,), in_specs=(self.axes.tokens,), extras=jax.P())
        )


class EmbeddingOnMesh(OnMesh, Embedding):
    """`Embedding` on a mesh: the vocabulary is split."""

    alone = Embedding

    def __call__(self, tokens: Array, segment_ids: Array | None = None) -> Array:
        """As on one device."""
        axes = self.axes
        return region.run(
            self,
            lambda local, tokens, segment_ids: local(tokens, segment_ids),
            (tokens, segment_ids),
            axes=axes,
            in_specs=(axes.tokens, axes.tokens),
            out_specs=axes.residual,
        )


_ON_MESH = (
    SelfAttentionOnMesh,
    CrossAttentionOnMesh,
    GatedDeltaNetOnMesh,
    MLPOnMesh,
    MoEOnMesh,
    EmbeddingOnMesh,
)


def _checked(
    layer: Any, x: Array, positions: Array | None, segment_ids: Array | None, mask: Array | None
) -> tuple[Array | None, Array | None]:
    """`check_call`; inside a caller's `shard_map`, where `x` may lack tokens, the local layer checks instead."""
    if sharding.is_manual(layer.axes):
        return positions, segment_ids
    marks: dict[str, Any] = dict(positions=positions, segment_ids=segment_ids, mask=mask)
    return check_call(x, layer.config.model_dim, **marks)


def _key_of_call(
    layer: Any, dropout_offset: object, *, deterministic: bool | None, **drop: Any
) -> Any:
    """The key by which a call drops, or None."""
    if dropout_offset is not None:
        raise ValueError(
            f"`dropout_offset` must be None for a layer with `axes`, which tell it, got {dropout_offset}"
        )
    quiet = layer.deterministic if deterministic is None else deterministic
    return dropout.key_of_call(layer.rngs, layer.config.dropout_rate, deterministic=quiet, **drop)


def _drop(layer: Any, x: Array, key: Array | None) -> dict[str, Any]:
    """Arguments of the local layer's call."""
    if key is None:
        return dict(deterministic=True)
    offset = region.dropout_offset(layer.config, x.shape[0], layer.axes)
    return dict(deterministic=False, dropout_key=key, dropout_offset=offset)


def _mask_spec(layer: Any, mask: Array | None, of_queries: sharding.Axis) -> jax.P | None:
    """Of a mask `[B or 1, N or 1, T, S]`.

    Raises:
      NotImplementedError: one per head where devices share a group.
    """
    if mask is None:
        return None
    axes, config = layer.axes, layer.config
    assert isinstance(config, AttentionConfig)
    by_head = axes.logits[2] if mask.shape[1] > 1 else None
    mesh = sharding.current_mesh(axes)
    if by_head is not None and sharding.split_groups(axes, config.num_kv_heads, mesh)[1]:
        raise NotImplementedError(
            f"`mask` must be the same for all heads where devices share a key/value head, got {mask.shape}"
        )
    return jax.P(axes.tokens[0] if mask.shape[0] > 1 else None, by_head, of_queries)
