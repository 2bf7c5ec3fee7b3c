"""Gated DeltaNet with Hugging Face's parameters: projections in PyTorch, everything between them in JAX."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor

import gqa_jax
from gqa_jax import layout as layouts
from interop.dlpack import dtype_to_jax
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
from interop.torch_modules.self_attention import Scale

Layout = Literal["qwen3_5", "qwen3_next"]


class GatedDeltaNet(JaxBacked):
    """Gated DeltaNet of `gqa_jax`, with the names and `[out, in]` layouts of Hugging Face.

    `load_state_dict` takes the `linear_attn` weights of Qwen3.5 or Qwen3-Next as they are.

    Attributes:
      in_proj_qkv, in_proj_z, in_proj_b, in_proj_a (Qwen3.5) or in_proj_qkvz, in_proj_ba (Qwen3-Next), out_proj:
        Linear layers, called as such.
      conv1d: depthwise, `weight [2 Hk Dk + Hv Dv, 1, W]`.
      A_log, dt_bias: `[Hv]`.
      norm: `weight [Dv]`.
    """

    _mix: Callable
    _step: Callable
    _step_jit: Callable

    def __init__(
        self,
        config: gqa_jax.GatedDeltaNetConfig,
        *,
        layout: Layout = "qwen3_5",
        device=None,
        dtype=None,
    ):
        """Builds the layer.

        Args:
          config: sizes and switches, shared with the JAX layer.
          layout: which family's input projections.
          device, dtype: of the parameters.

        Raises:
          ValueError: an unknown layout.
        """
        super().__init__()
        if layout not in ("qwen3_5", "qwen3_next"):
            raise ValueError(f"`layout` must be 'qwen3_5' or 'qwen3_next', got {layout!r}")
        self.config, self.layout = config, layout
        keys = config.num_key_heads * config.key_head_dim
        heads, values = config.num_value_heads, config.num_value_heads * config.value_head_dim
        sizes = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}
        if layout == "qwen3_5":
            sizes = {
                "in_proj_qkv": 2 * keys + values,
                "in_proj_z": values,
                "in_proj_b": heads,
                "in_proj_a": heads,
            }
        placed: dict[str, Any] = dict(device=device, dtype=dtype)
        for name, size in sizes.items():
            setattr(self, name, torch.nn.Linear(config.model_dim, size, bias=False, **placed))
        channels = 2 * keys + values
        self.conv1d = torch.nn.Conv1d(
            channels,
            channels,
            config.conv_width,
            groups=channels,
            bias=config.conv_bias,
            padding=config.conv_width - 1,
            **placed,
        )
        for name, initial in _initial_decay(config, device).items():
            self.register_parameter(name, torch.nn.Parameter(initial.to(dtype or initial.dtype)))
        self.norm = Scale(config.value_head_dim, 0.0 if config.norm_zero_centred else 1.0, **placed)
        self.out_proj = torch.nn.Linear(values, config.model_dim, bias=False, **placed)
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        return {
            "_mix": _mix(self.config),
            "_step": _step(self.config),
            "_step_jit": _step_jit(self.config),
        }

    def forward(self, x: Tensor, *, segment_ids: Tensor | None = None) -> Tensor:
        """The layer over whole rows, each from an empty state.

        Args:
          x: `[B, T, M]`.
          segment_ids: `[B, T]`; convolution and state start anew where the id changes; negative ids are padding.

        Returns:
          `[B, T, M]`.

        Raises:
          ValueError: shapes that do not fit, or an id that does not fit int32.
          TypeError: ids that are no integers.
        """
        self._check(x)
        ids = as_int32("segment_ids", segment_ids)
        return self.out_proj(self._mix(self._project(x), segment_ids=ids))

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        owner: CacheOwner = "torch",
        dtype: Any = None,
    ) -> Any:
        """An empty state; arguments as for `SelfAttention.init_cache` (`max_length` is not needed).

        Raises:
          ValueError: `batch_size` is not positive, or an unknown owner.
        """
        config = self.config
        dtype = dtype or self.out_proj.weight.dtype
        kept = dtype_to_jax(dtype)
        layer = nnx.eval_shape(lambda: gqa_jax.GatedDeltaNet(config, rngs=nnx.Rngs(0)))
        make = lambda: layer.init_cache(batch_size, max_length, dtype=kept)
        return new_cache(owner, make, dtype, self.out_proj.weight.device)

    def step(self, x: Tensor, cache: Any, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Advances each row by T >= 1 tokens; arguments and errors as for `SelfAttention.step`."""
        self._check(x)
        options = dict(lengths=check_step(x, cache, lengths))
        if isinstance(cache, JaxCache):
            out = step_in_place(self._step_jit, self._project(x), cache, **options)
        else:
            out, cache = self._step(self._project(x), cache, **options)
        return self.out_proj(out), cache

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.config.model_dim:
            raise ValueError(
                f"`x` must have shape [B, T, M={self.config.model_dim}], got {tuple(x.shape)}"
            )

    def _project(self, x: Tensor) -> dict[str, Any]:
        names = ("in_proj_qkvz", "in_proj_ba")
        if self.layout == "qwen3_5":
            names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        return {
            "projected": tuple(getattr(self, name)(x) for name in names),
            "conv": self.conv1d.weight,
            "conv_bias": self.conv1d.bias,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "norm": self.norm.weight,
        }


def _initial_decay(config: gqa_jax.GatedDeltaNetConfig, device: Any) -> dict[str, Tensor]:
    """`A_log` and `dt_bias` `[Hv]`, distributed as in the JAX layer, from PyTorch's generator."""
    draw = lambda low, high: torch.empty(config.num_value_heads, device=device).uniform_(low, high)
    low, high = config.A_init_range
    decay = draw(low, high).clamp(min=low).log()
    if config.decay_init == "ones":
        return {"A_log": decay, "dt_bias": torch.ones_like(decay)}
    step = draw(math.log(1e-3), math.log(1e-1)).exp()
    return {"A_log": decay, "dt_bias": step + torch.log(-torch.expm1(-step))}


def _by_key_head(
    config: gqa_jax.GatedDeltaNetConfig, projected: tuple
) -> tuple[jax.Array, jax.Array]:
    """`[B, T, Hk, q | k | v | z]` and `[B, T, Hk, b | a]`."""
    heads = config.num_key_heads
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    if len(projected) == 2:  # Qwen3-Next has key heads outermost already
        return split(projected[0]), split(projected[1])
    mixed, z, b, a = projected
    keys = heads * config.key_head_dim
    parts = (mixed[..., :keys], mixed[..., keys : 2 * keys], mixed[..., 2 * keys :], z)
    join = lambda *arrays: jnp.concatenate([split(x) for x in arrays], axis=-1)
    return join(*parts), join(b, a)


def _layer(
    config: gqa_jax.GatedDeltaNetConfig, inputs: dict
) -> tuple[gqa_jax.GatedDeltaNet, jax.Array]:
    """The JAX layer between projections that are already done, and an input that only has the right shape."""
    mixed, gates = _by_key_head(config, inputs["projected"])
    batch, length = mixed.shape[:2]
    heads, per_key = config.num_key_heads, config.v_per_key
    sizes = dict(
        v_per_key=per_key, key_head_dim=config.key_head_dim, value_head_dim=config.value_head_dim
    )
    layer = nnx.eval_shape(lambda: gqa_jax.GatedDeltaNet(config, rngs=nnx.Rngs(0)))
    functions = {
        "in_proj": lambda x: mixed,
        "ba": lambda x: gates,
        "out": lambda values: values.reshape(batch, length, -1),
    }
    for name, function in functions.items():
        setattr(layer, name, function)
    layer.conv.kernel = nnx.Param(layouts.conv_to_key_heads(inputs["conv"], **sizes))
    if inputs["conv_bias"] is not None:
        layer.conv.bias = nnx.Param(layouts.conv_to_key_heads(inputs["conv_bias"], **sizes))
    layer.A_log = nnx.Param(inputs["A_log"].reshape(heads, per_key))
    layer.dt_bias = nnx.Param(inputs["dt_bias"].reshape(heads, per_key))
    layer.norm.scale = nnx.Param(inputs["norm"])
    return layer, jnp.zeros((batch, length, config.model_dim), mixed.dtype)


@functools.cache
def _mix(config: gqa_jax.GatedDeltaNetConfig) -> Callable:
    def mix(inputs, *, segment_ids=None):
        layer, x = _layer(config, inputs)
        return layer(x, segment_ids=segment_ids)

    return wrap(mix, name="GatedDeltaNet")


def _stepping(config: gqa_jax.GatedDeltaNetConfig) -> Callable:
    def step(inputs, cache, *, lengths=None):
        layer, x = _layer(config, inputs)
        return layer.step(x, cache, lengths=lengths)

    return step


@functools.cache
def _step(config: gqa_jax.GatedDeltaNetConfig) -> Callable:
    return wrap(_stepping(config), name="GatedDeltaNet.step")


@functools.cache
def _step_jit(config: gqa_jax.GatedDeltaNetConfig) -> Callable:
    step = _stepping(config)
    return jax.jit(lambda inputs, cache, options: step(inputs, cache, **options), donate_argnums=1)
