"""Cross-attention: queries from one sequence, keys and values from another."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor

import gqa_jax
from gqa_jax.layers.cross_attention import sees_something
from interop.dropout import draw_seed, dropout_key
from interop.integers import as_int32
from interop.torch_function import wrap
from interop.torch_modules.jax_cache import JaxBacked
from interop.torch_modules.self_attention import add_parameters, by_group, give_weights, project


class CrossAttention(JaxBacked):
    """Grouped-query cross-attention of `gqa_jax`, with Hugging Face's names and `[out, in]` layouts.

    Attributes:
      q_proj, k_proj, v_proj, o_proj: Linear layers, called as such; keys and values come from the memory.
      q_norm, k_norm: `weight [D]`, or None.
      sinks: `[N]`, or None.
    """

    _attend: Callable
    o_proj: torch.nn.Linear

    def __init__(
        self,
        config: gqa_jax.AttentionConfig,
        *,
        memory_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        """Builds the layer.

        Args:
          config: as for `SelfAttention`, with is_causal=False, and mostly with rope=None.
          memory_dim: width of the memory; None means `config.model_dim`.
          device, dtype: of the parameters.

        Raises:
          ValueError: a causal config.
        """
        super().__init__()
        if config.is_causal:
            raise ValueError("`config.is_causal` must be False for cross-attention, got True")
        self.config = config
        self.memory_dim = config.model_dim if memory_dim is None else memory_dim
        add_parameters(self, config, self.memory_dim, device=device, dtype=dtype)
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        return {"_attend": _attend(self.config)}

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        memory_segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
    ) -> Tensor:
        """Attends from x to the memory; dropout at the configured rate in training mode.

        Args:
          x: `[B, T, M]`.
          memory: `[B, S, memory_dim]`.
          mask: boolean `[B or 1, N or 1, T, S]`, True where a query (row) may attend.
          segment_ids, memory_segment_ids: `[B, T]` and `[B, S]`; None means 0; negative ids are padding.
          positions, memory_positions: `[B, T]` and `[B, S]`, for the rotary embedding; None counts from 0.

        Returns:
          `[B, T, M]`; zeros, also with an output bias, where a token sees nothing.

        Raises:
          ValueError: shapes that do not fit, or an id or position that does not fit int32.
          TypeError: ids or positions that are no integers.
        """
        widths = (self.config.model_dim, self.memory_dim)
        for name, tensor, width in zip(("x", "memory"), (x, memory), widths, strict=True):
            if tensor.dim() != 3 or tensor.shape[-1] != width:
                raise ValueError(
                    f"`{name}` must have width {width} and three axes, got {tuple(tensor.shape)}"
                )
        rate = self.config.dropout_rate if self.training else 0.0
        places = dict(
            segment_ids=segment_ids,
            memory_segment_ids=memory_segment_ids,
            positions=positions,
            memory_positions=memory_positions,
        )
        integers = {name: as_int32(name, tensor) for name, tensor in places.items()}
        out, sees = self._attend(
            project(self, x, memory), mask=mask, dropout_seed=draw_seed(x, rate, None), **integers
        )
        out = self.o_proj(out)
        return out if sees is None else out.masked_fill(~sees[..., None], 0)


@functools.cache
def _attend(config: gqa_jax.AttentionConfig) -> Callable:
    def attend(
        inputs,
        *,
        mask=None,
        segment_ids=None,
        memory_segment_ids=None,
        positions=None,
        memory_positions=None,
        dropout_seed=None,
    ):
        query, key, value = by_group(config, inputs)
        layer = nnx.eval_shape(
            lambda: gqa_jax.CrossAttention(config, rngs=nnx.Rngs(0), keep_rngs=False)
        )
        layer.q = lambda x: query
        layer.kv = lambda memory: jnp.concatenate((key, value), axis=3)
        layer.out = lambda heads: heads.reshape(*query.shape[:2], -1)
        give_weights(layer, config, inputs)
        unread = lambda x: jnp.zeros((*x.shape[:2], config.model_dim), x.dtype)
        memory = layer.project_memory(
            unread(key), positions=memory_positions, segment_ids=memory_segment_ids
        )
        out = layer(
            unread(query),
            memory,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            deterministic=dropout_seed is None,
            dropout_key=dropout_key(dropout_seed),
        )
        if mask is None and segment_ids is None and memory_segment_ids is None:
            return out, None
        if segment_ids is None:
            segment_ids = jnp.zeros(query.shape[:2], jnp.int32)
        return out, sees_something(segment_ids, memory.segment_ids, mask)

    return wrap(attend, name="CrossAttention")
