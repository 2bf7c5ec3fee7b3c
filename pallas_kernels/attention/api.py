"""Public attention operators: contract, validation, choice of implementation."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch
from pallas_kernels.attention import reference

CausalAlignment = Literal["upper_left", "bottom_right"]


class AttentionOutput(NamedTuple):
    """Attention output and its softmax statistic.

    Attributes:
      out: `[B, T, N, Dv]`, the query's dtype. A query that may attend to nothing gives zeros.
      lse: `[B, T, N]` float32, natural logarithm of the softmax denominator (-inf where nothing is visible);
        sinks are counted.
    """

    out: jax.Array
    lse: jax.Array


def gqa_attention(query, key, value, **options: Any) -> Float[Array, "B T N Dv"]:
    """`gqa_attention_with_lse(...).out`; see there for every argument."""
    return gqa_attention_with_lse(query, key, value, **options).out


def gqa_attention_with_lse(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "upper_left",
    q_offset: int | Int[Array, "B"] | None = None,
    sliding_window: int | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    query_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> AttentionOutput:
    """Grouped-query attention; query head `h` reads key/value head `h // R`."""
    options = {
        "scale": scale, "is_causal": is_causal, "causal_alignment": causal_alignment, "q_offset": q_offset,
        "sliding_window": sliding_window, "mask": mask, "bias": bias, "query_segment_ids": query_segment_ids,
        "kv_segment_ids": kv_segment_ids, "query_positions": query_positions, "kv_positions": kv_positions,
        "sinks": sinks, "logits_soft_cap": logits_soft_cap, "dropout_rate": dropout_rate, "dropout_key": dropout_key,
    }  # fmt: skip
    _check(query, key, value, **options)
    _dispatch.resolve("gqa_attention", implementation, _reasons())
    options["scale"] = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionOutput(*reference.attention(query, key, value, **options))


def gqa_attention_qkv(qkv: Float[Array, "B T K R2 D"], **options: Any) -> Float[Array, "B T N D"]:
    """Self-attention straight from the fused, group-interleaved projection `[Q_g | K_g | V_g]`.

    Args:
      qkv: `[B, T, K, R + 2, D]`: per key/value head its R query heads, then its key, then its value.
      **options: as for `gqa_attention_with_lse`.

    Returns:
      `[B, T, K * R, D]`.
    """
    if qkv.ndim != 5 or qkv.shape[3] < 3:
        raise ValueError(f"`qkv` must have shape [B, T, K, R + 2, D] with R >= 1, got {qkv.shape}")
    batch, length, groups, width, head_dim = qkv.shape
    query = qkv[:, :, :, :-2].reshape(batch, length, groups * (width - 2), head_dim)
    return gqa_attention(query, qkv[:, :, :, -2], qkv[:, :, :, -1], **options)


def explain_gqa_attention(
    query, key, value, *, implementation=None, **options
) -> _dispatch.Explanation:
    """Implementation choice for `gqa_attention`."""
    del implementation
    _check(query, key, value, **options)
    return _dispatch.explain("gqa_attention", _reasons())


def _reasons() -> dict[str, str | None]:
    return {"reference": None}


def _check(
    query, key, value, *, scale=None, is_causal=False, causal_alignment="upper_left", q_offset=None,
    sliding_window=None, mask=None, bias=None, query_segment_ids=None, kv_segment_ids=None,
    query_positions=None, kv_positions=None, sinks=None, logits_soft_cap=None, dropout_rate=0.0,
    dropout_key=None,
) -> None:  # fmt: skip
    """Raises for every call that no implementation may accept."""
    del scale, bias
    sizes: dict[str, int] = {}
    _checks.check_array("query", query, "B T N D", sizes)
    _checks.check_array("key", key, "B S K D", sizes)
    _checks.check_array("value", value, "B S K Dv", sizes)
    for name, array in (("query", query), ("key", key), ("value", value)):
        _checks.check_float(name, array)
    _checks.check_same_dtype(("query", "key", "value"), (query, key, value))
    _checks.check_multiple("N", sizes["N"], "K", sizes["K"])
    _checks.check_one_of("causal_alignment", causal_alignment, ("upper_left", "bottom_right"))
    if sliding_window is not None and (sliding_window < 1 or not is_causal):
        raise ValueError(
            "`sliding_window` must be a positive number of keys (self included) and needs `is_causal=True`, "
            f"got sliding_window={sliding_window}, is_causal={is_causal}"
        )
    pairs = (
        ("query_segment_ids", query_segment_ids, "kv_segment_ids", kv_segment_ids),
        ("query_positions", query_positions, "kv_positions", kv_positions),
    )
    for query_name, query_array, kv_name, kv_array in pairs:
        if (query_array is None) != (kv_array is None):
            raise ValueError(f"`{query_name}` and `{kv_name}` must be given together")
        if query_array is not None:
            _checks.check_array(query_name, query_array, "B T", dict(sizes))
            _checks.check_array(kv_name, kv_array, "B S", dict(sizes))
    if query_positions is not None and q_offset is not None:
        raise ValueError("`q_offset` must be None when `query_positions` are given")
    if mask is not None and (mask.dtype != jnp.bool_ or mask.ndim != 4):
        raise ValueError(
            f"`mask` must be boolean [B or 1, N or 1, T, S], got {mask.dtype} {mask.shape}"
        )
    if sinks is not None:
        _checks.check_array("sinks", sinks, "N", sizes)
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"`logits_soft_cap` must be positive, got {logits_soft_cap}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"`dropout_rate` must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(
            f"`dropout_key` must be given when `dropout_rate={dropout_rate}` is positive"
        )
