"""Self-attention over one fused projection `[Q_g | K_g | V_g]` per key/value group."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.cache import KVCache, check_step
from gqa_jax.config import AttentionConfig
from gqa_jax.norms import L2Norm, RMSNorm
from gqa_jax.projection import Projection
from gqa_jax.rotary import apply_rotary, rotary_tables
from pallas_kernels import decode_attention, gqa_attention

MAX_DECODE_TOKENS = 16  # what `decode_attention` takes; longer steps are prefill


def _head_norm(config: AttentionConfig, param_dtype) -> nnx.Module | None:
    match config.qk_norm:
        case "none":
            return None
        case "l2":
            return L2Norm(eps=config.norm_eps)
        case kind:
            return RMSNorm(
                config.head_dim,
                eps=config.norm_eps,
                zero_centred=kind == "rms_zero_centred",
                param_dtype=param_dtype,
            )


class SelfAttention(nnx.Module):
    """Grouped-query self-attention: `__call__` trains, `step` advances a cache.

    Projection, query/key norm and rotary embedding (in the configured order), attention, output gate, output
    projection. Query head h reads key/value head h // R.

    Attributes:
      qkv: kernel `[M, K, R + 2, D]`, bias `[K, R + 2, D]`; with an output gate `2R + 2`, ordered queries, gates,
        key, value within each group.
      out: kernel `[K, R, D, M]`, bias `[M]`.
      q_norm, k_norm: scale `[D]`, or None.
      sinks: `[K, R]` learnable logits, or None.
    """

    def __init__(
        self, config: AttentionConfig, *, rngs: nnx.Rngs, dtype=None, param_dtype=jnp.float32
    ):
        """Builds the layer.

        Args:
          config: sizes and switches.
          rngs: the `params` stream initialises the kernels.
          dtype: dtype of the computation; None takes what inputs and parameters promote to.
          param_dtype: dtype of the parameters.
        """
        self.config = config
        groups, per_group = config.num_kv_heads, config.q_per_kv
        width = per_group * (2 if config.output_gate else 1) + 2
        self.qkv = Projection(
            (config.model_dim,),
            (groups, width, config.head_dim),
            use_bias=config.qkv_bias,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.out = Projection(
            (groups, per_group, config.head_dim),
            (config.model_dim,),
            use_bias=config.out_bias,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.q_norm = _head_norm(config, param_dtype)
        self.k_norm = _head_norm(config, param_dtype)
        learnable = config.sinks == "learnable"
        self.sinks = nnx.Param(jnp.zeros((groups, per_group), param_dtype)) if learnable else None

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B N T T"] | None = None,
        deterministic: bool = True,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T M"]:
        """Attention within each row.

        Args:
          x: `[B, T, M]`.
          positions: for the rotary embedding; None means the index in the row. Causality and window go by index.
          segment_ids: `[B, T]`; tokens attend within equal ids; negative ids are padding.
          mask: `[B or 1, N or 1, T, T]`, True where the query (rows) may attend, besides the rules above.
          deterministic: False drops attention weights at the configured rate.
          dropout_key: needed for that.

        Returns:
          `[B, T, M]`.

        Raises:
          ValueError: shapes that do not fit, or dropout without a key.
        """
        config = self.config
        if x.ndim != 3 or x.shape[-1] != config.model_dim:
            raise ValueError(f"`x` must have shape [B, T, M={config.model_dim}], got {x.shape}")
        dropout_rate = 0.0 if deterministic else config.dropout_rate
        if dropout_rate > 0.0 and dropout_key is None:
            raise ValueError(
                f"`dropout_key` must be given when deterministic=False and dropout_rate={dropout_rate}"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        query, key, value, gate = self._project(x, positions)
        out = gqa_attention(
            query,
            key,
            value,
            is_causal=config.is_causal,
            mask=mask,
            query_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            **self._logit_options(),
        )
        return self._finish(out, gate)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype=None,
        policy: Literal["full"] = "full",
    ) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens.

        Args:
          batch_size, max_length: B and S.
          dtype: of keys and values; None means the dtype of the computation.
          policy: "full" keeps every token.

        Raises:
          ValueError: sizes that are not positive, an unknown policy, or an encoder (which has nothing to decode).
        """
        config = self.config
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"`batch_size` and `max_length` must be positive, got {batch_size} and {max_length}"
            )
        if policy != "full":
            raise ValueError(f"`policy` must be 'full', got {policy!r}")
        if not config.is_causal:
            raise ValueError("`is_causal` must be True for a layer that decodes, got False")
        dtype = dtype or self.qkv.dtype or self.qkv.kernel[...].dtype
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size,), jnp.int32)
        )

    def step(
        self,
        x: Float[Array, "B T M"],
        cache: KVCache,
        *,
        lengths: Int[Array, "B"] | None = None,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], KVCache]:
        """Appends T >= 1 tokens to each row and attends from them: prefill, in any split, and decoding.

        Args:
          x: `[B, T, M]`, right-padded.
          cache: what `init_cache` or the last step returned. Donate it, and it is updated in place.
          lengths: `[B]`, how many of the T tokens are real; None means all.
          positions: for the rotary embedding; None continues each row's count.

        Returns:
          `[B, T, M]` (rows beyond `lengths` hold no meaning) and the advanced cache.

        Raises:
          ValueError: shapes that do not fit, or a cache too short. Inside `jit`, where lengths cannot be read,
            rows that overflow return NaN instead.
        """
        check_step(x, cache, lengths)
        batch, num_new = x.shape[:2]
        start = cache.length
        if lengths is None:
            lengths = jnp.full((batch,), num_new, jnp.int32)
        if positions is None:
            positions = start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
        query, key, value, gate = self._project(x, positions)
        cache = cache.append(key, value, lengths)
        if num_new <= MAX_DECODE_TOKENS:
            out = decode_attention(
                query, cache.key, cache.value, start + num_new, **self._logit_options()
            )
        else:
            out = gqa_attention(
                query,
                jnp.swapaxes(cache.key, 1, 2).astype(query.dtype),
                jnp.swapaxes(cache.value, 1, 2).astype(query.dtype),
                is_causal=True,
                q_offset=start,
                **self._logit_options(),
            )
        lost = cache.overflowed()[:, None, None, None]
        out = jnp.where(lost, jnp.asarray(jnp.nan, out.dtype), out)
        return self._finish(out, gate), cache

    def _logit_options(self) -> dict:
        config = self.config
        sinks = None
        if config.sinks == "zero":
            sinks = jnp.zeros((config.num_heads,), jnp.float32)
        elif self.sinks is not None:
            sinks = self.sinks[...].reshape(config.num_heads)
        return dict(
            scale=config.scale,
            sliding_window=config.sliding_window,
            sinks=sinks,
            logits_soft_cap=config.logits_soft_cap,
        )

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array, Array | None]:
        """Query `[B, T, N, D]`, key and value `[B, T, K, D]`, gate `[B, T, K, R, D]` or None."""
        config = self.config
        fused = self.qkv(x)  # [B, T, K, R + 2 or 2R + 2, D]
        per_group = config.q_per_kv
        query, key, value = fused[..., :per_group, :], fused[..., -2, :], fused[..., -1, :]
        gate = fused[..., per_group : 2 * per_group, :] if config.output_gate else None
        query = query.reshape(*x.shape[:2], config.num_heads, config.head_dim)

        def normalise(query, key):
            if self.q_norm is None or self.k_norm is None:
                return query, key
            return self.q_norm(query), self.k_norm(key)

        if config.qk_norm_position == "before_rope":
            query, key = normalise(query, key)
        if config.rope is not None:
            cos, sin = rotary_tables(config.rope, config.head_dim, positions)
            query = apply_rotary(query, cos, sin, pairing=config.rope.pairing)
            key = apply_rotary(key, cos, sin, pairing=config.rope.pairing)
        if config.qk_norm_position == "after_rope":
            query, key = normalise(query, key)
        return query, key, value, gate

    def _finish(self, out: Array, gate: Array | None) -> Array:
        """Output gate and projection of `[B, T, N, D]`."""
        config = self.config
        out = out.reshape(*out.shape[:2], config.num_kv_heads, config.q_per_kv, config.head_dim)
        if gate is not None:
            if config.output_gate_dtype == "float32":
                wide = out.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
                out = wide.astype(out.dtype)
            else:
                out = out * jax.nn.sigmoid(gate)
        return self.out(out)
