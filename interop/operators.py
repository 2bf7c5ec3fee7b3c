"""The operators of `pallas_kernels` as PyTorch functions, under autograd and `torch.compile`.

| here | there |
|---|---|
| `attention`, `attention_with_lse` | `gqa_attention`, `gqa_attention_with_lse` |
| `decode_attention`, `causal_conv1d`, `gated_delta_rule` | the same |
| `gated_delta_rule_step` | the same, without `slots` and `return_states` |

Arguments, layouts and meanings are the same, tensors stand where arrays stood, and only this differs:

- Dropout takes `dropout_seed` instead of `dropout_key`, and draws one from PyTorch's generator if it is None; there is
  no `dropout_offset`.
- Integers of any dtype (PyTorch's default has 64 bits) become int32, or raise where one does not fit.
- Values that JAX looks at outside `jit` are looked at here where that costs nothing: on the CPU, outside torch.compile
  and transforms.

`gqa_attention_qkv`, `causal_conv1d_qkv` and `gated_deltanet_step` have no function here: `interop.wrap` makes one.
"""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from torch import Tensor

import pallas_kernels
from interop.dlpack import dtype_to_jax
from interop.dropout import draw_seed, dropout_key
from interop.integers import as_int32, readable
from interop.torch_function import wrap


class AttentionOutput(NamedTuple):
    """Output `[B, T, N, Dv]` in the query's dtype, and `[B, T, N]`, float32: natural log of the softmax denominator."""

    out: Tensor
    lse: Tensor


class CausalConvOutput(NamedTuple):
    """Output `[B, T, F]`, and the last W inputs `[B, W, F]`: the `initial_state` of the call that continues."""

    out: Tensor
    final_state: Tensor


class GatedDeltaRuleOutput(NamedTuple):
    """Output `[B, T, Hv, Dv]` in the value's dtype and final state `[B, Hv, Dk, Dv]` in float32."""

    out: Tensor
    final_state: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: Literal["upper_left", "bottom_right"] = "upper_left",
    q_offset: int | Tensor | None = None,
    sliding_window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    query_cu_seqlens: Tensor | None = None,
    kv_cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Grouped-query attention, `pallas_kernels.gqa_attention` for tensors; query head h reads key/value head h // R.

    Args:
      query, key, value: `[B, T, N, D]`, `[B, S, K, D]`, `[B, S, K, Dv]`, one floating dtype.
      scale ... logits_soft_cap, implementation: as there. `q_offset` is a Python int (another one compiles again)
        or an integer tensor `[B]`.
      dropout_rate: of the attention weights.
      dropout_seed: two int32 values that fix the dropped weights; None draws them from PyTorch's generator, which
        `torch.manual_seed` and checkpointing govern.

    Returns:
      `[B, T, N, Dv]` in the query's dtype; zeros where a query may attend to nothing.

    Raises:
      ValueError, TypeError, NotImplementedError: as there, naming the argument.

    Example:
      >>> import torch, interop
      >>> q, kv = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
      >>> interop.attention(q, kv, kv, is_causal=True).shape
      torch.Size([1, 5, 4, 8])
    """
    options = dict(
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        q_offset=q_offset,
        sliding_window=sliding_window,
        mask=mask,
        bias=bias,
        query_segment_ids=query_segment_ids,
        kv_segment_ids=kv_segment_ids,
        query_positions=query_positions,
        kv_positions=kv_positions,
        query_cu_seqlens=query_cu_seqlens,
        kv_cu_seqlens=kv_cu_seqlens,
        sinks=sinks,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        implementation=implementation,
    )
    return _attention(query, key, value, **_attention_options(query, key, value, options))


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, **options) -> AttentionOutput:
    """`attention`, same arguments, with the logarithm of the softmax denominator; both are differentiable.

    Raises:
      ValueError, TypeError, NotImplementedError: as `attention`.

    Example:
      >>> import torch, interop
      >>> q, kv = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
      >>> interop.attention_with_lse(q, kv, kv, is_causal=True).lse.shape
      torch.Size([1, 5, 4])
    """
    if unknown := sorted(options.keys() - _ATTENTION_OPTIONS.keys()):
        raise TypeError(f"`attention_with_lse` must be given options of `attention`, got {unknown}")
    options = _attention_options(query, key, value, _ATTENTION_OPTIONS | options)
    out, lse = _attention_with_lse(query, key, value, **options)
    return AttentionOutput(out, lse)


_ATTENTION_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
attention_with_lse.__signature__ = inspect.signature(attention).replace(  # pyright: ignore[reportFunctionMemberAccess]
    return_annotation=AttentionOutput
)
_ATTENTION_INTEGERS = (
    "query_segment_ids",
    "kv_segment_ids",
    "query_positions",
    "kv_positions",
    "query_cu_seqlens",
    "kv_cu_seqlens",
)


def _attention_options(query: Tensor, key: Tensor, value: Tensor, options: dict) -> dict:
    """All options as the wrapped functions take them, their values checked."""
    integers = {name: as_int32(name, options[name]) for name in _ATTENTION_INTEGERS}
    offsets = {name: integers[name] for name in ("query_cu_seqlens", "kv_cu_seqlens")}
    _check_values("gqa_attention", (query, key, value), **offsets)
    q_offset = options["q_offset"]
    is_tensor = isinstance(q_offset, Tensor)
    seed = draw_seed(query, options["dropout_rate"], options["dropout_seed"])
    return {
        **options,
        **integers,
        "q_offset": None if is_tensor else q_offset,
        "q_offsets": as_int32("q_offset", q_offset) if is_tensor else None,
        "dropout_seed": seed,
    }


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention of the T newest tokens over a cache, `pallas_kernels.decode_attention` for tensors.

    Args:
      query: `[B, T, N, D]`, T from 1 to 16.
      key_cache, value_cache: `[B, K, S, D]` and `[B, K, S, Dv]`, head-major, the T new tokens already written.
      lengths: `[B]`, tokens in the cache of each row, the new ones included.
      key_scale ... implementation: as there.

    Returns:
      `[B, T, N, Dv]` in the query's dtype.

    Raises:
      ValueError, TypeError, NotImplementedError: as there, naming the argument.

    Example:
      >>> import torch, interop
      >>> q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 32, 8)
      >>> interop.decode_attention(q, cache, cache, torch.tensor([7, 32])).shape
      torch.Size([2, 1, 4, 8])
    """
    tokens = as_int32("lengths", lengths)
    scales: dict = dict(key_scale=key_scale, value_scale=value_scale)
    _check_values("decode_attention", (query, key_cache, value_cache), tokens, **scales)
    return _decode_attention(
        query,
        key_cache,
        value_cache,
        tokens,
        sinks=sinks,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
        implementation=implementation,
        **scales,
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    implementation: str | None = None,
) -> CausalConvOutput:
    """Depthwise causal convolution over tokens, `pallas_kernels.causal_conv1d` for tensors.

    Args:
      x: `[B, T, F]`.
      weight: `[W, F]`; `weight[W - 1]` multiplies the current token.
      bias ... implementation: as there.

    Raises:
      ValueError, TypeError, NotImplementedError: as there, naming the argument.

    Example:
      >>> import torch, interop
      >>> interop.causal_conv1d(torch.ones(1, 5, 2), torch.ones(4, 2)).out[0, :, 0].tolist()
      [1.0, 2.0, 3.0, 4.0, 4.0]
    """
    out, state = _causal_conv1d(
        x,
        weight,
        bias=bias,
        initial_state=initial_state,
        segment_ids=as_int32("segment_ids", segment_ids),
        activation=activation,
        implementation=implementation,
    )
    return CausalConvOutput(out, state)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Gated delta rule over whole sequences, `pallas_kernels.gated_delta_rule` for tensors.

    Args:
      query, key: `[B, T, Hk, Dk]`; value: `[B, T, Hv, Dv]`; Hv a multiple of Hk.
      g, beta: `[B, T, Hv]`, natural-log decay (<= 0; per channel `[B, T, Hk, Dk]`) and write strength.
      initial_state ... implementation: as there.

    Raises:
      ValueError, TypeError, NotImplementedError: as there, naming the argument.

    Example:
      >>> import torch, interop
      >>> q, v, g = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 4, 8), -torch.rand(1, 5, 4)
      >>> interop.gated_delta_rule(q, q, v, g, torch.rand(1, 5, 4), use_qk_l2norm=True).final_state.shape
      torch.Size([1, 4, 8, 8])
    """
    cu_seqlens = as_int32("cu_seqlens", cu_seqlens)
    _check_values("gated_delta_rule", (query, key, value, g, beta), cu_seqlens=cu_seqlens)
    out, state = _gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        segment_ids=as_int32("segment_ids", segment_ids),
        cu_seqlens=cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return GatedDeltaRuleOutput(out, state)


def gated_delta_rule_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Advances `state` by T <= 8 tokens, `pallas_kernels.gated_delta_rule_step` for tensors; shapes as above."""
    options = dict(scale=scale, use_qk_l2norm=use_qk_l2norm, implementation=implementation)
    out, state, _ = _gated_delta_rule_step(query, key, value, g, beta, state, **options)
    return GatedDeltaRuleOutput(out, state)


def _check_values(
    operator: str, tensors: tuple[Tensor, ...], *integers: Tensor | None, **options: Tensor | None
) -> None:
    """What JAX checks about the values of integers, which the compiled function cannot see."""
    named = {name: x for name, x in options.items() if x is not None}
    values = [
        x for x in (*integers, *named.values()) if x is not None and not x.is_floating_point()
    ]
    if not values or not readable(*values):
        return
    shape = lambda x: jax.ShapeDtypeStruct(tuple(x.shape), dtype_to_jax(x.dtype))
    places = (x.numpy() for x in integers if x is not None)
    named = {n: shape(x) if x.is_floating_point() else x.numpy() for n, x in named.items()}
    pallas_kernels.explain(operator, *map(shape, tensors), *places, **named)


def _wrapped(operator: Callable, *static_argnames: str) -> Callable:
    """The operator for tensors; an option that is None leaves it its own default."""

    def run(*arrays, q_offsets=None, dropout_seed=None, **options):
        options |= dict(dropout_key=dropout_key(dropout_seed))
        if q_offsets is not None:
            options["q_offset"] = q_offsets
        out = operator(*arrays, **{name: x for name, x in options.items() if x is not None})
        return tuple(out) if isinstance(out, tuple) else out

    name = operator.__name__.removeprefix("gqa_")
    return wrap(run, name=name, static_argnames=static_argnames)


_ATTENTION_STATIC = (
    "q_offset",
    "dropout_rate",
    "scale",
    "is_causal",
    "causal_alignment",
    "sliding_window",
    "logits_soft_cap",
    "implementation",
)
_attention = _wrapped(pallas_kernels.gqa_attention, *_ATTENTION_STATIC)
_attention_with_lse = _wrapped(pallas_kernels.gqa_attention_with_lse, *_ATTENTION_STATIC)
_decode_attention = _wrapped(
    pallas_kernels.decode_attention, "sliding_window", "logits_soft_cap", "scale", "implementation"
)
_causal_conv1d = _wrapped(pallas_kernels.causal_conv1d, "activation", "implementation")
_gated_delta_rule = _wrapped(
    pallas_kernels.gated_delta_rule, "scale", "use_qk_l2norm", "chunk_size", "implementation"
)
_gated_delta_rule_step = _wrapped(
    pallas_kernels.gated_delta_rule_step, "scale", "use_qk_l2norm", "implementation"
)
