"""Gated DeltaNet (arXiv 2412.06464): short convolution, gated delta rule, gated norm."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gqa_jax.cache import GatedDeltaNetState, check_step
from gqa_jax.cache.checks import check_size
from gqa_jax.cache.lengths import advance, settle
from gqa_jax.config import GatedDeltaNetConfig
from gqa_jax.layers import masks
from gqa_jax.layers.checks import check_call
from gqa_jax.layers.masks import right_padding_segment_ids
from gqa_jax.layers.norms import GatedRMSNorm
from gqa_jax.layers.projection import Projection
from pallas_kernels import (
    MAX_STEP_TOKENS,
    GatedDeltaRuleOutput,
    QKVConvOutput,
    causal_conv1d_qkv,
    gated_delta_rule,
    gated_deltanet_gates,
    gated_deltanet_step,
)


class DepthwiseConv(nnx.Module):
    """Parameters of the causal convolution, with the channels kept by key head.

    Attributes:
      kernel: `[W, Hk, 2 Dk + n Dv]`; the last tap multiplies the current token.
      bias: `[Hk, 2 Dk + n Dv]`, or None.
    """

    def __init__(
        self, width: int, channels: tuple[int, int], *, use_bias: bool, rngs: nnx.Rngs, param_dtype
    ):
        limit = width**-0.5  # fan-in of a depthwise filter is its width
        shape = (width, *channels)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit).astype(param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype)) if use_bias else None

    def qkv(
        self,
        projected: Array,
        *,
        dims: tuple[int, int],
        initial_state: Array | None,
        segment_ids: Array | None,
    ) -> QKVConvOutput:
        """Queries, keys and values of `[B, T, Hk, q | k | v | ...]`; `dims` are Dk and Dv.

        Queries and keys are not normalised here: XLA would need a pass more, which the delta rule does without.
        """
        dtype = projected.dtype
        return causal_conv1d_qkv(
            projected,
            self.kernel[...].astype(dtype),
            key_dim=dims[0],
            value_dim=dims[1],
            bias=None if self.bias is None else self.bias[...].astype(dtype),
            initial_state=None if initial_state is None else initial_state.astype(dtype),
            segment_ids=segment_ids,
        )


class GatedDeltaNet(nnx.Module):
    """Gated DeltaNet with the semantics of Qwen3-Next and Qwen3.5: `__call__` trains, `step` advances a state.

    Value head j uses key head j // n. Decay, write strength, norms and state are float32 whatever the dtype of
    the model.

    Attributes:
      in_proj: kernel `[M, Hk, 2 Dk + 2 n Dv]`, per key head queries, keys, values, output gates.
      ba: kernel `[M, Hk, 2 n]`, per key head the logits of the write strength, then of the decay.
      conv: kernel `[W, Hk, 2 Dk + n Dv]`.
      A_log, dt_bias: `[Hk, n]` float32; `g = -exp(A_log) * softplus(a + dt_bias)`.
      norm: scale `[Dv]`.
      out: kernel `[Hk, n, Dv, M]`.
      goes_by_positions: False: tokens come in the order of the row.
    """

    goes_by_positions = False

    def __init__(
        self,
        config: GatedDeltaNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        """Builds the layer; arguments as for `SelfAttention`."""
        self.config = config
        heads, per_key = config.num_key_heads, config.v_per_key
        key_dim, value_dim = config.key_head_dim, config.value_head_dim
        common = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = 2 * key_dim + 2 * per_key * value_dim
        self.in_proj = Projection((config.model_dim,), (heads, width), **common)
        self.ba = Projection((config.model_dim,), (heads, 2 * per_key), **common)
        self.conv = DepthwiseConv(
            config.conv_width,
            (heads, 2 * key_dim + per_key * value_dim),
            use_bias=config.conv_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        low, high = config.A_init_range
        decay = jax.random.uniform(rngs.params(), (heads, per_key), jnp.float32, low, high)
        self.A_log = nnx.Param(jnp.log(jnp.maximum(decay, low)))
        self.dt_bias = nnx.Param(_initial_dt_bias(config, rngs))
        self.norm = GatedRMSNorm(
            value_dim,
            eps=config.norm_eps,
            zero_centred=config.norm_zero_centred,
            param_dtype=param_dtype,
        )
        self.out = Projection((heads, per_key, value_dim), (config.model_dim,), **common)

    def __call__(
        self, x: Float[Array, "B T M"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """The layer over whole rows, each from an empty state.

        Args:
          x: `[B, T, M]`; what stands on padding reaches nothing, no gradient either.
          segment_ids: `[B, T]`; convolution and state start anew where the id changes; negative ids are padding,
            anywhere, and neither sees it.

        Returns:
          `[B, T, M]`.

        Raises:
          ValueError: shapes that do not fit.
        """
        _, segment_ids = check_call(x, self.config.model_dim, segment_ids=segment_ids)
        if segment_ids is None:
            return self._run(x, None, None, None)[0]
        x = masks.hide_padding(x, segment_ids)
        order = masks.order_without_gaps(segment_ids)  # a window of the convolution holds tokens
        x, segment_ids = masks.take(x, order), masks.take(segment_ids, order)
        out, _, _ = self._run(x, None, None, segment_ids)
        return masks.take(out, jnp.argsort(order, axis=1))

    def init_cache(
        self, batch_size: int, max_length: int | None = None, *, dtype=None
    ) -> GatedDeltaNetState:
        """An empty state.

        Args:
          batch_size: B.
          max_length: not needed: the state has one size for any number of tokens.
          dtype: of the convolution's inputs; None means the dtype of the computation. The state is float32,
            float64 beside float64.

        Raises:
          ValueError: `batch_size` is not positive.
        """
        del max_length
        check_size("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}")
        config = self.config
        dtype = dtype or self.in_proj.dtype or self.in_proj.kernel[...].dtype
        return GatedDeltaNetState(
            conv=jnp.zeros((batch_size, *self.conv.kernel.shape), dtype),
            state=jnp.zeros(
                (batch_size, config.num_value_heads, config.key_head_dim, config.value_head_dim),
                jnp.float64 if dtype == jnp.float64 else jnp.float32,
            ),
            length=jnp.zeros((batch_size,), jnp.int32),
        )

    def step(
        self,
        x: Float[Array, "B T M"],
        cache: GatedDeltaNetState,
        *,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], GatedDeltaNetState]:
        """Advances each row by T >= 1 tokens: prefill, in any split, and decoding.

        Args:
          x: `[B, T, M]`, right-padded.
          cache: what `init_cache` or the last step returned. Donate it, and it is updated in place.
          lengths: `[B]`, how many of the T tokens are real; None means all. Padding leaves the state untouched.

        Returns:
          `[B, T, M]` (rows beyond `lengths` hold no meaning) and the advanced state.

        Raises:
          ValueError: shapes that do not fit.
        """
        config = self.config
        state = (config.num_value_heads, config.key_head_dim, config.value_head_dim)
        rows: dict = dict(conv=self.conv.kernel.shape, state=state)
        lengths = check_step(x, cache, lengths, width=config.model_dim, rows=rows)
        batch, num_new = x.shape[:2]
        padded = lengths is not None
        if lengths is None:
            lengths = jnp.full((batch,), num_new, jnp.int32)
        lengths, length = advance(cache.length, lengths, num_new)
        if num_new <= MAX_STEP_TOKENS:
            out, conv, state = self._decode(x, cache, lengths if padded else None)
        else:
            segment_ids = right_padding_segment_ids(lengths, num_new) if padded else None
            out, conv, state = self._run(x, cache.conv, cache.state, segment_ids)
        cache = GatedDeltaNetState(conv.astype(cache.conv.dtype), state, length)
        return settle(out, lengths, cache.overflowed()), cache

    def _project(self, x: Array) -> Array:
        """`[B, T, Hk, q | k | v | z]`: what the convolution reads, and the output gates."""
        return checkpoint_name(self.in_proj(x), "qkv")

    def _finish(self, out: Array, projected: Array) -> Array:
        """From the rule's outputs `[B, T, Hv, Dv]` and the projections to the layer's, `[B, T, M]`."""
        config = self.config
        gate = projected[..., self.conv.kernel.shape[-1] :].reshape(out.shape)
        out = checkpoint_name(out, "core_attention")
        out = checkpoint_name(self.norm(out, gate), "norm_out")
        heads = (config.num_key_heads, config.v_per_key, config.value_head_dim)
        return self.out(out.reshape(*out.shape[:2], *heads))

    def _decode(
        self, x: Array, cache: GatedDeltaNetState, lengths: Array | None
    ) -> tuple[Array, Array, Array]:
        projected = self._project(x)
        dtype = projected.dtype
        result = gated_deltanet_step(
            projected,
            self.ba(x),
            cache.state,
            cache.conv.astype(dtype),
            conv_kernel=self.conv.kernel[...].astype(dtype),
            conv_bias=None if self.conv.bias is None else self.conv.bias[...].astype(dtype),
            A_log=self.A_log[...],
            dt_bias=self.dt_bias[...],
            lengths=lengths,
            allow_negative_eigenvalues=self.config.allow_negative_eigenvalues,
        )
        return self._finish(result.out, projected), result.final_conv_state, result.final_state

    def _run(
        self, x: Array, conv: Array | None, state: Array | None, segment_ids: Array | None
    ) -> tuple[Array, Any, Array]:
        projected = self._project(x)
        g, beta = self._gates(x)
        result, conv = self._mix(projected, g, beta, conv, state, segment_ids)
        return self._finish(result.out, projected), conv, result.final_state

    def _mix(
        self,
        projected: Array,
        g: Array,
        beta: Array,
        conv: Array | None,
        state: Array | None,
        segment_ids: Array | None,
    ) -> tuple[GatedDeltaRuleOutput, Array | None]:
        """Convolution and delta rule, from the states before the row; also the convolution's state behind it."""
        config = self.config
        query, key, value, conv = self.conv.qkv(
            projected,
            dims=(config.key_head_dim, config.value_head_dim),
            initial_state=conv,
            segment_ids=segment_ids,
        )
        result = gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            use_qk_l2norm=True,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=config.chunk_size,
        )
        return result, conv

    def _gates(self, x: Array) -> tuple[Array, Array]:
        """Log decay `g <= 0` and write strength `beta`, both `[B, T, Hv]` float32."""
        return gated_deltanet_gates(
            self.ba(x).astype(jnp.float32),
            self.A_log[...],
            self.dt_bias[...],
            allow_negative_eigenvalues=self.config.allow_negative_eigenvalues,
        )


def _initial_dt_bias(config: GatedDeltaNetConfig, rngs: nnx.Rngs) -> Array:
    shape = (config.num_key_heads, config.v_per_key)
    if config.decay_init == "ones":
        return jnp.ones(shape, jnp.float32)
    low, high = math.log(1e-3), math.log(1e-1)
    step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))  # softplus(dt_bias) == step
