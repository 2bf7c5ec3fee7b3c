"""Self-attention over one fused projection `[Q_g | K_g | V_g]` per key/value group."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.cache import AttentionCache, Policy, allocate, check_step
from gqa_jax.config import AttentionConfig
from gqa_jax.layers import dropout, masks, records
from gqa_jax.layers.checks import check_call
from gqa_jax.layers.norms import check_injected_norms, head_norm
from gqa_jax.layers.projection import Projection
from gqa_jax.layers.rotary import apply_rotary, rotary_tables
from gqa_jax.layers.rows import Row
from pallas_kernels import as_int32, gqa_attention, gqa_attention_qkv


def gated(out: Array, gate: Array, config: AttentionConfig) -> Array:
    """`out * sigmoid(gate)` in the configured precision, in the dtype of `out`."""
    if config.output_gate_dtype == "model":
        return out * jax.nn.sigmoid(gate)
    wide = out.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
    return wide.astype(out.dtype)


class SelfAttention(dropout.Switched):
    """Grouped-query self-attention: `__call__` trains, `step` advances a cache.

    Projection, query/key norm and rotary embedding (in the configured order), attention, output gate, output
    projection. Query head h reads key/value head h // R.

    Attributes:
      qkv: kernel `[M, K, R + 2, D]`, bias `[K, R + 2, D]`; with an output gate `2R + 2`, ordered queries, gates,
        key, value within each group.
      out: kernel `[K, R, D, M]`, bias `[M]`.
      q_norm, k_norm: scale `[D]`, or None.
      sinks: `[K, R]` learnable logits, or None.
      deterministic: False drops attention weights; `train()` and `eval()` set it, a call's own argument goes before.
      rngs: a fork of the stream "dropout" (or the default one) of the constructor's `rngs`, if `config.dropout_rate`
        is not 0; or None.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
        qkv: Callable | None = None,
        out: Callable | None = None,
        q_norm: Callable | None = None,
        k_norm: Callable | None = None,
        keep_rngs: bool = True,
    ):
        """Builds the layer, with `deterministic` True.

        Args:
          config: sizes and switches.
          rngs: the `params` stream initialises the kernels; with dropout, a fork of the `dropout` stream is kept for
            calls. The default stream stands in for both.
          dtype: dtype of the computation; None takes what inputs and parameters promote to.
          param_dtype: dtype of the parameters.
          qkv: an NNX module or callable in place of ours, `[B, T, M] -> [B, T, K, R + 2 (or 2R + 2), D]`.
          out: the same, `[B, T, K, R, D] -> [B, T, M]`.
          q_norm, k_norm: the same, `[B, T, heads, D] -> [B, T, heads, D]`, applied where the config says.
          keep_rngs: False keeps no stream, so that `jax.grad` accepts the whole module.

        Raises:
          ValueError: one norm without the other, or norms while `config.qk_norm` is "none".
        """
        check_injected_norms(config, q_norm, k_norm)
        self.config = config
        self.dtype, self.param_dtype = dtype, param_dtype
        groups, per_group = config.num_kv_heads, config.q_per_kv
        width = per_group * (2 if config.output_gate else 1) + 2
        self.qkv = qkv or Projection(
            (config.model_dim,),
            (groups, width, config.head_dim),
            use_bias=config.qkv_bias,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.out = out or Projection(
            (groups, per_group, config.head_dim),
            (config.model_dim,),
            use_bias=config.out_bias,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.q_norm = q_norm or head_norm(config, param_dtype)
        self.k_norm = k_norm or head_norm(config, param_dtype)
        learnable = config.sinks == "learnable"
        self.sinks = nnx.Param(jnp.zeros((groups, per_group), param_dtype)) if learnable else None
        self.deterministic = True
        self.rngs = dropout.kept_stream(rngs, config.dropout_rate, keep=keep_rngs)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B N T T"] | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        dropout_offset: tuple[int, int] | Int[Array, "2"] | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        split_qkv: bool = True,
    ) -> Float[Array, "B T M"]:
        """Attention within each row.

        Under `nnx.capture(qk_clip.MaxLogits)` it also records the largest logit of each head (see `qk_clip`).

        Args:
          x: `[B, T, M]`; what stands on padding reaches nothing, no gradient either.
          positions: for the rotary embedding; None counts the tokens of each segment (`masks.positions_in_segments`).
            Causality and window go by the order of a segment's tokens, whatever stands between them.
          segment_ids: `[B, T]`; tokens attend within equal ids; negative ids are padding, anywhere.
          mask: `[B or 1, N or 1, T, T]`, True where the query (rows) may attend, besides the rules above.
          deterministic: False drops attention weights at the configured rate; None asks the module's attribute.
          dropout_key: by which it drops. What is dropped does not depend on the mesh.
          dropout_offset: (first batch row, first query head) of this call in the whole, in a `shard_map`; None means
            (0, 0).
          rngs: draws the key, in place of the module's own stream. A stream advances only where its new count comes
            back: in `nnx.jit` and without `jit`, not in `jax.jit`, to which a new key must be given for each call.
          split_qkv: False hands the fused projection to the operator as it is, for layers that do nothing in between.

        Returns:
          `[B, T, M]`; zeros on padding.

        Raises:
          ValueError: shapes that do not fit, dropout without a key, or split_qkv=False with a norm, a rotary
            embedding or a gate.
        """
        config = self.config
        marks: dict[str, Any] = dict(positions=positions, segment_ids=segment_ids, mask=mask)
        positions, segment_ids = check_call(x, config.model_dim, **marks)
        if deterministic is None:
            deterministic = self.deterministic
        drop: dict[str, Any] = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        key = dropout.key_of_call(self.rngs, config.dropout_rate, **drop)
        if not split_qkv:
            self._check_fused(positions)
        row = self.arrange(masks.hide_padding(x, segment_ids), positions, segment_ids, mask)
        options: dict[str, Any] = dict(
            is_causal=config.is_causal,
            dropout_rate=0.0 if key is None else config.dropout_rate,
            dropout_key=key,
            dropout_offset=dropout_offset,
            **self._logit_options(),
        )
        if split_qkv:
            query, key, value, gate = self.project(row.x, row.positions)
            if records.is_recording(self):
                top = row.largest_logits(query, key, config)
                self.sow(records.MaxLogits, "max_logits", top, capture_noop=True)
            out = self.attend(query, key, value, **row.marks, **options)
        else:
            fused, gate = checkpoint_name(self.qkv(row.x), "qkv"), None
            out = gqa_attention_qkv(fused, segment_ids=row.segment_ids, mask=row.mask, **options)
        return masks.hide_padding(row.restore(self._finish(out, gate)), segment_ids)

    attend = staticmethod(gqa_attention)  # over devices, another operator

    def arrange(
        self, x: Array, positions: Array | None, segment_ids: Array | None, mask: Array | None
    ) -> Row:
        """The row as `attend` takes it, see `Row`; arguments of a call."""
        return Row.of(x, positions, segment_ids, mask, self.config)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype=None,
        policy: Policy = "full",
        chunk_size: int | None = None,
    ) -> AttentionCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens.

        Args:
          batch_size, max_length: B and S.
          dtype: of keys and values; None means the dtype of the computation.
          policy: "full", "ring", "int8" or "fp8"; see `gqa_jax.cache.allocate`.
          chunk_size: with "ring", the most tokens that a step writes in place.

        Raises:
          ValueError: sizes that are not positive, an unknown policy, arguments that the policy has no use for, or an
            encoder (which has nothing to decode).
        """
        config = self.config
        if not config.is_causal:
            raise ValueError("`is_causal` must be True for a layer that decodes, got False")
        if dtype is None and policy in ("full", "ring"):
            dtype = self._compute_dtype()
        return allocate(
            policy,
            batch_size=batch_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_length=max_length,
            dtype=dtype,
            sliding_window=config.sliding_window,
            chunk_size=chunk_size,
        )

    def step(
        self,
        x: Float[Array, "B T M"],
        cache: AttentionCache,
        *,
        lengths: Int[Array, "B"] | None = None,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], AttentionCache]:
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
        sizes = (self.config.num_kv_heads, None, self.config.head_dim)
        rows: dict = dict(key=sizes, value=sizes)
        lengths = check_step(x, cache, lengths, width=self.config.model_dim, rows=rows)
        positions = as_int32("positions", positions)
        batch, num_new = x.shape[:2]
        start = cache.length
        if lengths is None:
            lengths = jnp.full((batch,), num_new, jnp.int32)
        if positions is None:
            positions = start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
        query, key, value, gate = self.project(x, positions)
        out, cache = cache.append_and_attend(query, key, value, lengths, **self._logit_options())
        return self._finish(out, gate), cache

    def _compute_dtype(self):
        if self.dtype is not None:
            return self.dtype
        kernel = getattr(self.qkv, "kernel", None)
        return self.param_dtype if kernel is None else kernel[...].dtype

    def _check_fused(self, positions: Array | None) -> None:
        config = self.config
        between = {
            "a query/key norm": self.q_norm is not None,
            "a rotary embedding": config.rope is not None,
            "an output gate": config.output_gate,
            "`positions`": positions is not None,
        }
        found = [name for name, present in between.items() if present]
        if found:
            raise ValueError(f"`split_qkv` must be True with {' and '.join(found)}, got False")

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

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array, Array | None]:
        """What attention reads: query `[B, T, N, D]`, key, value `[B, T, K, D]`, gate `[B, T, K, R, D]` or None."""
        config = self.config
        fused = checkpoint_name(self.qkv(x), "qkv")  # [B, T, K, R + 2 or 2R + 2, D]
        per_group = config.q_per_kv
        query, key, value = fused[..., :per_group, :], fused[..., -2, :], fused[..., -1, :]
        gate = fused[..., per_group : 2 * per_group, :] if config.output_gate else None
        query = query.reshape(*x.shape[:2], config.num_heads, config.head_dim)

        def normalise(query, key):
            if self.q_norm is None or self.k_norm is None:
                return query, key
            normed = self.q_norm(query), self.k_norm(key)
            return tuple(checkpoint_name(x, "norm_out") for x in normed)

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
        out = checkpoint_name(out, "core_attention")
        out = out.reshape(*out.shape[:2], config.num_kv_heads, config.q_per_kv, config.head_dim)
        return self.out(out if gate is None else gated(out, gate, config))
