"""Public decode attention: contract, validation, choice of implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch
from pallas_kernels.decode import reference

MAX_NEW_TOKENS = 16


def decode_attention(
    query: Float[Array, "B T N D"],
    key_cache: Array,
    value_cache: Array,
    lengths: Int[Array, "B"],
    *,
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Dv"]:
    """Causal attention of the T newest tokens of each row over its cache.

    Args:
      query: `[B, T, N, D]`, T from 1 to 16; query t of row b stands at position `lengths[b] - T + t`.
      key_cache: `[B, K, S, D]` head-major, the T new keys already written; any float or 8-bit dtype.
      value_cache: `[B, K, S, Dv]`.
      lengths: `[B]` integer, tokens in the cache of each row, the T new ones included.
      key_scale, value_scale: `[B, K, S]` float32, one scale per kv head and token of a quantised cache.
      sliding_window: exactly this many keys are visible, self included.
      sinks: `[N]` float, one more logit per head that takes softmax mass and gives nothing.
      logits_soft_cap: `cap * tanh(logits / cap)`.
      scale: default `D ** -0.5`.
      implementation: None or "reference" (XLA, any device).

    Returns:
      `[B, T, N, Dv]` in the query's dtype; softmax in float32.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    _check(query, key_cache, value_cache, lengths, key_scale, value_scale, sliding_window, sinks)
    _dispatch.resolve("decode_attention", implementation, _REASONS)
    return reference.decode_attention(
        query, key_cache, value_cache, lengths, key_scale=key_scale, value_scale=value_scale,
        sliding_window=sliding_window, sinks=sinks, logits_soft_cap=logits_soft_cap,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip


def explain_decode_attention(
    query, key_cache, value_cache, lengths, *, key_scale=None, value_scale=None, sliding_window=None,
    sinks=None, logits_soft_cap=None, scale=None, implementation=None,
) -> _dispatch.Explanation:  # fmt: skip
    """Implementation choice for `decode_attention`."""
    del logits_soft_cap, scale, implementation
    _check(query, key_cache, value_cache, lengths, key_scale, value_scale, sliding_window, sinks)
    return _dispatch.explain("decode_attention", _REASONS)


_REASONS: dict[str, str | None] = {"reference": None}


def _check(
    query, key_cache, value_cache, lengths, key_scale, value_scale, sliding_window, sinks
) -> None:
    sizes: dict[str, int] = {}
    _checks.check_array("query", query, "B T N D", sizes)
    _checks.check_array("key_cache", key_cache, "B K S D", sizes)
    _checks.check_array("value_cache", value_cache, "B K S Dv", sizes)
    _checks.check_array("lengths", lengths, "B", sizes)
    _checks.check_float("query", query)
    _checks.check_integer("lengths", lengths)
    _checks.check_multiple("N", sizes["N"], "K", sizes["K"])
    if not 1 <= sizes["T"] <= MAX_NEW_TOKENS:
        raise ValueError(f"`query` must hold 1 to {MAX_NEW_TOKENS} tokens, got T={sizes['T']}")
    for name, scales in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scales is not None:
            _checks.check_array(name, scales, "B K S", sizes)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"`sliding_window` must be a positive number of keys, got {sliding_window}"
        )
    if sinks is not None:
        _checks.check_array("sinks", sinks, "N", sizes)
