"""Cross-attention: queries from one sequence, keys and values from another."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import torch
from torch import Tensor

import gqa_jax
from gqa_jax.norms import rms_normalize
from interop.operators import attention, draw_seed
from interop.torch_function import wrap
from interop.torch_modules.jax_cache import JaxBacked
from interop.torch_modules.self_attention import Scale


class CrossAttention(JaxBacked):
    """Grouped-query cross-attention with Hugging Face's names and `[out, in]` layouts.

    Attributes:
      q_proj, k_proj, v_proj, o_proj: Linear layers, called as such; keys and values come from the context.
      q_norm, k_norm: `weight [D]`, or None.
      sinks: `[N]`, or None.
    """

    _normalise: Callable

    def __init__(
        self,
        config: gqa_jax.AttentionConfig,
        *,
        context_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        """Builds the layer.

        Args:
          config: `rope=None` and `is_causal=False`: two sequences share no positions. No output gate.
          context_dim: width of the context; None means `config.model_dim`.
          device, dtype: of the parameters.

        Raises:
          ValueError: a config with positions, causality or an output gate.
        """
        super().__init__()
        if config.rope is not None or config.is_causal or config.output_gate:
            raise ValueError(
                "`config` must have rope=None, is_causal=False and output_gate=False for cross-attention, got "
                f"rope={config.rope}, is_causal={config.is_causal}, output_gate={config.output_gate}"
            )
        self.config = config
        width = config.model_dim if context_dim is None else context_dim
        heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
        linear = functools.partial(torch.nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(config.model_dim, heads * dim, bias=config.qkv_bias)
        self.k_proj = linear(width, groups * dim, bias=config.qkv_bias)
        self.v_proj = linear(width, groups * dim, bias=config.qkv_bias)
        self.o_proj = linear(heads * dim, config.model_dim, bias=config.out_bias)
        self.q_norm = self.k_norm = self.sinks = None
        if config.qk_norm in ("rms", "rms_zero_centred"):
            initial = 1.0 if config.qk_norm == "rms" else 0.0
            self.q_norm = Scale(dim, initial, device=device, dtype=dtype)
            self.k_norm = Scale(dim, initial, device=device, dtype=dtype)
        if config.sinks == "learnable":
            self.sinks = torch.nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        return {"_normalise": _normalise(self.config.norm_eps, self.config.qk_norm)}

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        context_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Attends from x to the context; dropout at the configured rate in training mode.

        Args:
          x: `[B, T, M]`.
          context: `[B, S, context_dim]`.
          mask: boolean `[B or 1, N or 1, T, S]`, True where a query (row) may attend.
          segment_ids, context_segment_ids: `[B, T]` and `[B, S]`, together; negative ids are padding.

        Returns:
          `[B, T, M]`; what attends to nothing gets the output bias alone.

        Raises:
          ValueError: shapes that do not fit.
        """
        config = self.config
        widths = (self.q_proj.in_features, self.k_proj.in_features)
        for name, tensor, width in zip(("x", "context"), (x, context), widths, strict=True):
            if tensor.dim() != 3 or tensor.shape[-1] != width:
                raise ValueError(
                    f"`{name}` must have width {width} and three axes, got {tuple(tensor.shape)}"
                )
        split = lambda y, heads: y.view(*y.shape[:2], heads, config.head_dim)
        query = split(self.q_proj(x), config.num_heads)
        key = split(self.k_proj(context), config.num_kv_heads)
        value = split(self.v_proj(context), config.num_kv_heads)
        if config.qk_norm != "none":
            scales = (None, None)
            if self.q_norm is not None and self.k_norm is not None:
                scales = (self.q_norm.weight, self.k_norm.weight)
            query, key = self._normalise(query, key, *scales)
        sinks = self.sinks
        if config.sinks == "zero":
            sinks = query.new_zeros(config.num_heads)
        rate = config.dropout_rate if self.training else 0.0
        out = attention(
            query, key, value, mask=mask, query_segment_ids=segment_ids, kv_segment_ids=context_segment_ids,
            sinks=sinks, scale=config.scale, logits_soft_cap=config.logits_soft_cap, dropout_rate=rate,
            dropout_seed=draw_seed(x, rate, None),
        )  # fmt: skip
        return self.o_proj(out.flatten(2))


@functools.cache
def _normalise(eps: float, kind: str) -> Callable:
    def normalise(query, key, q_scale=None, k_scale=None):
        def one(x, scale):
            normed = rms_normalize(x, eps=eps)
            if scale is not None:
                weight = scale.astype(normed.dtype)
                if kind == "rms_zero_centred":
                    weight = weight + jnp.ones((), weight.dtype)
                normed = normed * weight[None, None, None]
            return normed.astype(x.dtype)

        return one(query, q_scale), one(key, k_scale)

    return wrap(normalise, name="CrossAttention.norm")
