"""Cross-attention: queries from one sequence, keys and values from a memory that is projected once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.config import AttentionConfig
from gqa_jax.layers import dropout, masks
from gqa_jax.layers.attention import gated
from gqa_jax.layers.checks import check_call, positions_of_rows
from gqa_jax.layers.norms import check_injected_norms, head_norm
from gqa_jax.layers.projection import Projection
from gqa_jax.layers.rotary import apply_rotary, rotary_tables
from pallas_kernels import as_int32, gqa_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectedMemory:
    """Keys and values of a memory, computed once and read by every decoding step.

    Attributes:
      key: `[B, S, K, D]`, after norm and position embedding.
      value: `[B, S, K, D]`.
      segment_ids: `[B, S]` int32; negative ids are padding.
    """

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K D"]
    segment_ids: Int[Array, "B S"]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.key.shape[0]


class CrossAttention(dropout.Switched):
    """Grouped-query attention from `x` to a memory; query head h reads key/value head h // R.

    Attributes:
      q: kernel `[M, K, R, D]`, bias `[K, R, D]`; with an output gate `2R`, queries, then gates.
      kv: kernel `[Mm, K, 2, D]`, bias `[K, 2, D]`: key, value per group; Mm is the width of the memory.
      out: kernel `[K, R, D, M]`, bias `[M]`.
      q_norm, k_norm: scale `[D]`, or None.
      sinks: `[K, R]` learnable logits, or None.
      deterministic, rngs: as in `SelfAttention`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
        memory_dim: int | None = None,
        dtype=None,
        param_dtype=jnp.float32,
        q: Callable | None = None,
        kv: Callable | None = None,
        out: Callable | None = None,
        q_norm: Callable | None = None,
        k_norm: Callable | None = None,
        keep_rngs: bool = True,
    ):
        """Builds the layer.

        Args:
          config: as for `SelfAttention`, with is_causal=False, and mostly with rope=None.
          rngs, keep_rngs, dtype, param_dtype: as for `SelfAttention`.
          memory_dim: Mm; None means M.
          q: an NNX module or callable in place of ours, `[B, T, M] -> [B, T, K, R (or 2R), D]`.
          kv: the same, `[B, S, Mm] -> [B, S, K, 2, D]`.
          out: the same, `[B, T, K, R, D] -> [B, T, M]`.
          q_norm, k_norm: as for `SelfAttention`.

        Raises:
          ValueError: a causal config, a width that is not positive, or norms as for `SelfAttention`.
        """
        if config.is_causal:
            raise ValueError("`config.is_causal` must be False for cross-attention, got True")
        self.memory_dim = config.model_dim if memory_dim is None else memory_dim
        if self.memory_dim < 1:
            raise ValueError(f"`memory_dim` must be positive, got {memory_dim}")
        check_injected_norms(config, q_norm, k_norm)
        self.config = config
        common = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        groups, per_group, head_dim = config.num_kv_heads, config.q_per_kv, config.head_dim
        self.q = q or Projection(
            (config.model_dim,),
            (groups, per_group * (2 if config.output_gate else 1), head_dim),
            use_bias=config.qkv_bias,
            **common,
        )
        self.kv = kv or Projection(
            (self.memory_dim,), (groups, 2, head_dim), use_bias=config.qkv_bias, **common
        )
        self.out = out or Projection(
            (groups, per_group, head_dim), (config.model_dim,), use_bias=config.out_bias, **common
        )
        self.q_norm = q_norm or head_norm(config, param_dtype)
        self.k_norm = k_norm or head_norm(config, param_dtype)
        learnable = config.sinks == "learnable"
        self.sinks = nnx.Param(jnp.zeros((groups, per_group), param_dtype)) if learnable else None
        self.deterministic = True
        self.rngs = dropout.kept_stream(rngs, config.dropout_rate, keep=keep_rngs)

    def project_memory(
        self,
        memory: Float[Array, "B S Mm"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> ProjectedMemory:
        """Keys and values of the memory: compute them once, then attend from any number of queries.

        Args:
          memory: `[B, S, Mm]`; what stands on padding reaches nothing, no gradient either.
          positions: `[B, S]` for the rotary embedding; None means the index.
          segment_ids: `[B, S]`; queries of the same id see these tokens; negative ids are padding. None means 0.

        Raises:
          ValueError: shapes that do not fit.
        """
        self._check_memory(memory)
        shape = memory.shape[:2]
        positions = positions_of_rows(as_int32("positions", positions), *shape)
        segment_ids = as_int32("segment_ids", segment_ids)
        if segment_ids is None:
            segment_ids = jnp.zeros(shape, jnp.int32)
        if segment_ids.shape != shape:
            raise ValueError(f"`segment_ids` must have shape {shape}, got {segment_ids.shape}")
        memory = masks.hide_padding(memory, segment_ids)
        projected = checkpoint_name(self.kv(memory), "qkv")  # [B, S, K, 2, D]
        key = self._embed(projected[..., 0, :], self.k_norm, positions)
        return ProjectedMemory(key, projected[..., 1, :], segment_ids)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        memory: Float[Array, "B S Mm"] | ProjectedMemory,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B N T S"] | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        dropout_offset: tuple[int, int] | Int[Array, "2"] | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Float[Array, "B T M"]:
        """Attention from every token of `x` to the memory, in training and in decoding alike.

        Args:
          x: `[B, T, M]`.
          memory: `[B, S, Mm]`, or what `project_memory` returned.
          positions: `[B, T]` of the queries, for the rotary embedding; None means the index in `x` (in decoding,
            give the position of the step).
          segment_ids: `[B, T]`; a token sees memory of its own id; negative ids are padding. None means 0.
          mask: `[B or 1, N or 1, T, S]`, True where the query may attend, besides the ids.
          deterministic, dropout_key, dropout_offset, rngs: as for `SelfAttention`.

        Returns:
          `[B, T, M]`; zeros, also with a bias, where a token sees nothing. Its gradients are finite.

        Raises:
          ValueError: shapes that do not fit, or dropout without a key.
        """
        config = self.config
        projected = isinstance(memory, ProjectedMemory)
        if not projected:
            self._check_memory(memory)
        num_rows, num_keys = (memory.key if projected else memory).shape[:2]
        marks = dict(positions=positions, segment_ids=segment_ids, mask=mask)
        positions, segment_ids = check_call(x, config.model_dim, num_keys=num_keys, **marks)
        if num_rows != x.shape[0]:
            raise ValueError(
                f"`memory` must have the batch size of `x`, {x.shape[0]}, got {num_rows}"
            )
        if deterministic is None:
            deterministic = self.deterministic
        drop: dict[str, Any] = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        dropout_key = dropout.key_of_call(self.rngs, config.dropout_rate, **drop)
        if segment_ids is None:
            segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
        if not isinstance(memory, ProjectedMemory):
            shown = None
            if mask is not None:  # what no query sees counts as padding
                shown = jnp.where(mask.any(axis=(1, 2)), 0, masks.PADDING).astype(jnp.int32)
                shown = jnp.broadcast_to(shown, memory.shape[:2])
            memory = self.project_memory(memory, segment_ids=shown)
        x = masks.hide_padding(x, segment_ids)
        fused = checkpoint_name(self.q(x), "qkv")  # [B, T, K, R or 2R, D]
        query, gate = fused[..., : config.q_per_kv, :], fused[..., config.q_per_kv :, :]
        query = query.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        query = self._embed(query, self.q_norm, positions)
        sinks = None
        if config.sinks == "zero":
            sinks = jnp.zeros((config.num_heads,), jnp.float32)
        elif self.sinks is not None:
            sinks = self.sinks[...].reshape(config.num_heads)
        out = gqa_attention(
            query,
            memory.key.astype(query.dtype),
            memory.value.astype(query.dtype),
            mask=mask,
            query_segment_ids=segment_ids,
            kv_segment_ids=memory.segment_ids,
            scale=config.scale,
            sinks=sinks,
            logits_soft_cap=config.logits_soft_cap,
            dropout_rate=0.0 if dropout_key is None else config.dropout_rate,
            dropout_key=dropout_key,
            dropout_offset=dropout_offset,
        )
        out = checkpoint_name(out, "core_attention")
        out = out.reshape(*out.shape[:2], config.num_kv_heads, config.q_per_kv, config.head_dim)
        out = self.out(gated(out, gate, config) if config.output_gate else out)
        sees = sees_something(segment_ids, memory.segment_ids, mask)
        return jnp.where(sees[..., None], out, jnp.zeros((), out.dtype))

    def _check_memory(self, memory: Array) -> None:
        if memory.ndim != 3 or memory.shape[-1] != self.memory_dim:
            raise ValueError(
                f"`memory` must have shape [B, S, Mm={self.memory_dim}], got {memory.shape}"
            )

    def _embed(self, x: Array, norm: Callable | None, positions: Array | None) -> Array:
        """Norm and rotary embedding of `[B, T, heads, D]`, in the configured order."""
        config = self.config
        norm = (lambda x: x) if norm is None else norm
        if config.qk_norm_position == "before_rope":
            x = norm(x)
        if config.rope is not None:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            cos, sin = rotary_tables(config.rope, config.head_dim, positions)
            x = apply_rotary(x, cos, sin, pairing=config.rope.pairing)
        if config.qk_norm_position == "after_rope":
            x = norm(x)
        return x


def sees_something(query_ids: Array, memory_ids: Array, mask: Array | None) -> Array:
    """`[B, T]` bool: tokens to which some head shows some part of the memory."""
    visible = (query_ids[:, :, None] == memory_ids[:, None, :]) & (query_ids >= 0)[:, :, None]
    if mask is not None:
        visible = visible & mask.any(axis=1)
    return visible.any(axis=-1)
