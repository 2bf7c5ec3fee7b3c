"""The operators of `pallas_kernels` as PyTorch functions, under autograd and `torch.compile`.

Names, layouts and meanings are the same; tensors stand where arrays stood. Integers of any dtype (PyTorch's default for
ids, positions and offsets has 64 bits) become int32, or raise where one does not fit. Values that JAX looks at outside
`jit` are looked at here too where that costs nothing: on the CPU, outside torch.compile and transforms.
"""

from typing import Any, Literal, NamedTuple

import jax
import torch
from torch import Tensor

import pallas_kernels
from interop.dlpack import dtype_to_jax
from interop.integers import as_int32, readable
from interop.torch_function import wrap


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
    return _attention(
        query, key, value, mask=mask, bias=bias, sinks=sinks,
        query_segment_ids=as_int32("query_segment_ids", query_segment_ids),
        kv_segment_ids=as_int32("kv_segment_ids", kv_segment_ids),
        query_positions=as_int32("query_positions", query_positions),
        kv_positions=as_int32("kv_positions", kv_positions),
        q_offsets=as_int32("q_offset", q_offset) if isinstance(q_offset, Tensor) else None,
        q_offset=None if isinstance(q_offset, Tensor) else q_offset,
        dropout_seed=draw_seed(query, dropout_rate, dropout_seed), dropout_rate=dropout_rate,
        scale=scale, is_causal=is_causal, causal_alignment=causal_alignment, sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap, implementation=implementation,
    )  # fmt: skip


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
    cu_seqlens, segment_ids = (
        as_int32("cu_seqlens", cu_seqlens),
        as_int32("segment_ids", segment_ids),
    )
    if cu_seqlens is not None and readable(cu_seqlens):
        tokens = [
            jax.ShapeDtypeStruct(tuple(x.shape), dtype_to_jax(x.dtype))
            for x in (query, key, value, g, beta)
        ]
        pallas_kernels.explain(
            "gated_delta_rule", *tokens, cu_seqlens=cu_seqlens.numpy()
        )  # its checks of values
    out, state = _gated_delta_rule(
        query, key, value, g, beta, initial_state=initial_state, segment_ids=segment_ids,
        cu_seqlens=cu_seqlens, scale=scale, use_qk_l2norm=use_qk_l2norm, chunk_size=chunk_size,
        implementation=implementation,
    )  # fmt: skip
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
    out, state = _gated_delta_rule_step(
        query, key, value, g, beta, state, scale=scale, use_qk_l2norm=use_qk_l2norm,
        implementation=implementation,
    )  # fmt: skip
    return GatedDeltaRuleOutput(out, state)


def draw_seed(like: Tensor, dropout_rate: float, seed: Tensor | None) -> Tensor | None:
    """Two int32 values on the tensor's device for a positive rate, drawn from PyTorch's generator unless given."""
    if dropout_rate == 0.0 or seed is not None:
        return seed
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=like.device)


def dropout_key(seed: jax.Array | None) -> jax.Array | None:
    """The JAX key of a seed."""
    if seed is None:
        return None
    return jax.random.wrap_key_data(
        jax.lax.bitcast_convert_type(seed, jax.numpy.uint32), impl="threefry2x32"
    )


def _given(**options) -> dict[str, Any]:
    """Without the options that are None, so that the operator's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def _jax_attention(
    query, key, value, *, mask=None, bias=None, sinks=None, query_segment_ids=None, kv_segment_ids=None,
    query_positions=None, kv_positions=None, q_offsets=None, q_offset=None, dropout_seed=None, dropout_rate=0.0,
    scale=None, is_causal=False, causal_alignment: Any = "upper_left", sliding_window=None, logits_soft_cap=None,
    implementation=None,
):  # fmt: skip
    return pallas_kernels.gqa_attention(
        query, key, value, is_causal=is_causal, causal_alignment=causal_alignment, dropout_rate=dropout_rate,
        **_given(
            mask=mask, bias=bias, sinks=sinks, query_segment_ids=query_segment_ids, kv_segment_ids=kv_segment_ids,
            query_positions=query_positions, kv_positions=kv_positions, scale=scale,
            q_offset=q_offset if q_offsets is None else q_offsets, sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap, dropout_key=dropout_key(dropout_seed), implementation=implementation,
        ),
    )  # fmt: skip


def _jax_gated_delta_rule(
    query, key, value, g, beta, *, initial_state=None, segment_ids=None, cu_seqlens=None, scale=None,
    use_qk_l2norm=False, chunk_size=None, implementation=None,
):  # fmt: skip
    result = pallas_kernels.gated_delta_rule(
        query, key, value, g, beta, use_qk_l2norm=use_qk_l2norm,
        **_given(
            initial_state=initial_state, segment_ids=segment_ids, cu_seqlens=cu_seqlens, scale=scale,
            chunk_size=chunk_size, implementation=implementation,
        ),
    )  # fmt: skip
    return result.out, result.final_state


def _jax_gated_delta_rule_step(
    query, key, value, g, beta, state, *, scale=None, use_qk_l2norm=False, implementation=None
):
    result = pallas_kernels.gated_delta_rule_step(
        query, key, value, g, beta, state, use_qk_l2norm=use_qk_l2norm,
        **_given(scale=scale, implementation=implementation),
    )  # fmt: skip
    return result.out, result.final_state


_attention = wrap(
    _jax_attention,
    name="attention",
    static_argnames=(
        "q_offset", "dropout_rate", "scale", "is_causal", "causal_alignment", "sliding_window", "logits_soft_cap",
        "implementation",
    ),
)  # fmt: skip
_gated_delta_rule = wrap(
    _jax_gated_delta_rule,
    name="gated_delta_rule",
    static_argnames=("scale", "use_qk_l2norm", "chunk_size", "implementation"),
)
_gated_delta_rule_step = wrap(
    _jax_gated_delta_rule_step,
    name="gated_delta_rule_step",
    static_argnames=("scale", "use_qk_l2norm", "implementation"),
)
