"""Self-attention with Hugging Face's parameters: projections in PyTorch, everything between them in JAX.

The projections are `torch.nn.Linear`, called as such, so that LoRA (PEFT), quantised layers and FSDP hooks take part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor

import gqa_jax
from interop.dlpack import dtype_to_jax
from interop.dropout import draw_seed, dropout_key
from interop.integers import as_int32
from interop.torch_function import wrap
from interop.torch_modules.jax_cache import (
    CacheOwner,
    JaxBacked,
    JaxCache,
    check_step,
    new_cache,
    step_in_place,
)


class Scale(torch.nn.Module):
    """Holds the weight of a norm that JAX applies.

    Attributes:
      weight: `[dim]`.
    """

    def __init__(self, dim: int, initial: float, *, device=None, dtype=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((dim,), initial, device=device, dtype=dtype))


class SelfAttention(JaxBacked):
    """Grouped-query self-attention of `gqa_jax`, with the names and `[out, in]` layouts of Hugging Face.

    `load_state_dict` takes the attention weights of Llama, Qwen2, Qwen3, Qwen3-Next and Qwen3.5 as they are (with an
    output gate `q_proj` holds per head `[query | gate]`).

    Attributes:
      q_proj, k_proj, v_proj, o_proj: Linear layers.
      q_norm, k_norm: `weight [D]`, or None.
      sinks: `[N]`, or None.
    """

    _attend: Callable
    _step: Callable
    _step_jit: Callable
    k_proj: torch.nn.Linear
    o_proj: torch.nn.Linear

    def __init__(self, config: gqa_jax.AttentionConfig, *, device=None, dtype=None):
        """Builds the layer.

        Args:
          config: sizes and switches, shared with the JAX layer.
          device, dtype: of the parameters.
        """
        super().__init__()
        self.config = config
        add_parameters(self, config, config.model_dim, device=device, dtype=dtype)
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        return {
            "_attend": _attend(self.config),
            "_step": _step(self.config),
            "_step_jit": _step_jit(self.config),
        }

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention within each row; dropout at the configured rate in training mode.

        Args:
          x: `[B, T, M]`.
          positions: `[B, T]`, for the rotary embedding; None counts from 0.
          segment_ids: `[B, T]`; tokens attend within equal ids; negative ids are padding.
          mask: boolean `[B or 1, N or 1, T, T]`, True where a query (row) may attend.

        Returns:
          `[B, T, M]`; zeros on padding, also with an output bias.

        Raises:
          ValueError: shapes that do not fit, or an id or position that does not fit int32.
          TypeError: ids or positions that are no integers.
        """
        self._check(x)
        segment_ids = as_int32("segment_ids", segment_ids)
        rate = self.config.dropout_rate if self.training else 0.0
        out = self._attend(
            project(self, x, x),
            positions=as_int32("positions", positions),
            segment_ids=segment_ids,
            mask=mask,
            dropout_seed=draw_seed(x, rate, None),
        )
        out = self.o_proj(out)
        return out if segment_ids is None else out.masked_fill((segment_ids < 0)[..., None], 0)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        owner: CacheOwner = "torch",
        dtype: Any = None,
        **policy: Any,
    ) -> Any:
        """An empty cache.

        Args:
          batch_size, max_length: B and S.
          owner: "torch" gives a tree of tensors that `step` returns anew and that has gradients; "jax" a `JaxCache`
            that `step` changes in place.
          dtype: torch dtype of keys and values; None means the parameters'.
          **policy: as for `gqa_jax.SelfAttention.init_cache`.

        Raises:
          ValueError: as there, or an unknown owner.
        """
        if dtype is None and policy.get("policy", "full") in ("full", "ring"):
            dtype = self.k_proj.weight.dtype
        kept = None if dtype is None else dtype_to_jax(dtype)
        layer = _abstract(self.config)
        make = lambda: layer.init_cache(batch_size, max_length, dtype=kept, **policy)
        return new_cache(owner, make, dtype, self.k_proj.weight.device)

    def step(
        self,
        x: Tensor,
        cache: Any,
        *,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Appends T >= 1 tokens to each row of the cache and attends from them: prefill, in any split, and decoding.

        Args:
          x: `[B, T, M]`, right-padded.
          cache: what `init_cache` or the last step returned.
          lengths: `[B]`, how many of the T tokens are real; None means all.
          positions: `[B, T]`, for the rotary embedding; None continues each row's count.

        Returns:
          `[B, T, M]` (rows beyond `lengths` hold no meaning) and the advanced cache.

        Raises:
          ValueError: shapes that do not fit, lengths outside [0, T], or a cache too short (on a GPU and under
            `torch.compile` such rows return NaN instead).
          TypeError: lengths or positions that are no integers.
          RuntimeError: a `JaxCache` while gradients are recorded.
        """
        self._check(x)
        lengths = check_step(x, cache, lengths)
        options = dict(lengths=lengths, positions=as_int32("positions", positions))
        if isinstance(cache, JaxCache):
            out = step_in_place(self._step_jit, project(self, x, x), cache, **options)
        else:
            out, cache = self._step(project(self, x, x), cache, **options)
        return self.o_proj(out), cache

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.config.model_dim:
            raise ValueError(
                f"`x` must have shape [B, T, M={self.config.model_dim}], got {tuple(x.shape)}"
            )


def add_parameters(
    module: Any,
    config: gqa_jax.AttentionConfig,
    memory_dim: int,
    *,
    device=None,
    dtype=None,
) -> None:
    """Gives the module its projections (keys and values of width `memory_dim`), norms and sinks."""
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    linear = functools.partial(torch.nn.Linear, device=device, dtype=dtype)
    queries = heads * dim * (2 if config.output_gate else 1)
    module.q_proj = linear(config.model_dim, queries, bias=config.qkv_bias)
    module.k_proj = linear(memory_dim, groups * dim, bias=config.qkv_bias)
    module.v_proj = linear(memory_dim, groups * dim, bias=config.qkv_bias)
    module.o_proj = linear(heads * dim, config.model_dim, bias=config.out_bias)
    module.q_norm = module.k_norm = module.sinks = None
    if config.qk_norm in ("rms", "rms_zero_centred"):
        initial = 1.0 if config.qk_norm == "rms" else 0.0
        module.q_norm = Scale(dim, initial, device=device, dtype=dtype)
        module.k_norm = Scale(dim, initial, device=device, dtype=dtype)
    if config.sinks == "learnable":
        module.sinks = torch.nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))


def project(module: Any, x: Tensor, memory: Tensor) -> dict[str, Tensor | None]:
    """What JAX needs: queries of x, keys and values of the memory, weights of norms and sinks."""
    return {
        "query": module.q_proj(x),
        "key": module.k_proj(memory),
        "value": module.v_proj(memory),
        "q_norm": None if module.q_norm is None else module.q_norm.weight,
        "k_norm": None if module.k_norm is None else module.k_norm.weight,
        "sinks": module.sinks,
    }


def by_group(config: gqa_jax.AttentionConfig, inputs: dict) -> tuple[jax.Array, ...]:
    """Queries `[B, T, K, R, D]` (with an output gate 2R: queries, then gates), keys and values `[B, S, K, 1, D]`."""
    groups, dim = config.num_kv_heads, config.head_dim
    heads = lambda x: x.reshape(*x.shape[:2], groups, -1, dim)
    query = heads(inputs["query"])
    if config.output_gate:  # Hugging Face has per head the query, then its gate
        pairs = query.reshape(*query.shape[:3], config.q_per_kv, 2, dim)
        query = jnp.moveaxis(pairs, 4, 3).reshape(query.shape)
    return query, heads(inputs["key"]), heads(inputs["value"])


def give_weights(layer: Any, config: gqa_jax.AttentionConfig, inputs: dict) -> None:
    """Puts the weights of norms and sinks into a JAX layer without values."""
    if inputs["q_norm"] is not None:
        for name in ("q_norm", "k_norm"):
            getattr(layer, name).scale = nnx.Param(inputs[name])
    if inputs["sinks"] is not None:
        shape = (config.num_kv_heads, config.q_per_kv)
        layer.sinks = nnx.Param(inputs["sinks"].reshape(shape))


def _abstract(config: gqa_jax.AttentionConfig) -> gqa_jax.SelfAttention:
    """The JAX layer without values."""
    return nnx.eval_shape(lambda: gqa_jax.SelfAttention(config, rngs=nnx.Rngs(0), keep_rngs=False))


def _layer(
    config: gqa_jax.AttentionConfig, inputs: dict
) -> tuple[gqa_jax.SelfAttention, jax.Array]:
    """The JAX layer between projections that are already done, and an input that only has the right shape."""
    fused = jnp.concatenate(by_group(config, inputs), axis=3)
    batch, length = fused.shape[:2]
    layer = _abstract(config)
    layer.qkv = lambda x: fused
    layer.out = lambda heads: heads.reshape(batch, length, -1)
    give_weights(layer, config, inputs)
    return layer, jnp.zeros((batch, length, config.model_dim), fused.dtype)


@functools.cache
def _attend(config: gqa_jax.AttentionConfig) -> Callable:
    def attend(inputs, *, positions=None, segment_ids=None, mask=None, dropout_seed=None):
        layer, x = _layer(config, inputs)
        return layer(
            x,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            deterministic=dropout_seed is None,
            dropout_key=dropout_key(dropout_seed),
        )

    return wrap(attend, name="SelfAttention")


def _stepping(config: gqa_jax.AttentionConfig) -> Callable:
    def step(inputs, cache, *, lengths=None, positions=None):
        layer, x = _layer(config, inputs)
        return layer.step(x, cache, lengths=lengths, positions=positions)

    return step


@functools.cache
def _step(config: gqa_jax.AttentionConfig) -> Callable:
    return wrap(_stepping(config), name="SelfAttention.step")


@functools.cache
def _step_jit(config: gqa_jax.AttentionConfig) -> Callable:
    step = _stepping(config)
    run = lambda inputs, cache, options: step(inputs, cache, **options)
    return jax.jit(run, donate_argnums=1)
