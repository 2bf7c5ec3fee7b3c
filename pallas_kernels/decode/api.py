"""Public decode attention: contract, validation, choice of implementation."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch
from pallas_kernels.decode import algebra, reference, vjp

MAX_NEW_TOKENS = 16
Implementation = Literal["blockwise", "reference"]


@_dispatch.operator
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
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Dv"]:
    """Causal attention of the T newest tokens of each row over its cache.

    Args:
      query: `[B, T, N, D]`, T from 1 to 16; query t of row b stands at position `lengths[b] - T + t`.
      key_cache: `[B, K, S, D]` head-major, the T new keys already written; any float, float8, int8, or uint8
        with the bits of float8_e4m3fn (XLA on a CPU converts a whole float8 array to read a part of it). What stands
        behind `lengths[b]` is not seen, whatever it is.
      value_cache: `[B, K, S, Dv]`; its dtype may differ from that of `key_cache`.
      lengths: `[B]` integer, tokens in the cache of each row, the T new ones included. A query at a position of S or
        more, whose own key is not there, gives NaN; a row of no others is refused where its length can be read.
      key_scale, value_scale: `[B, K, S]` float, one scale per kv head and token; an int8 cache needs its own.
      sliding_window: exactly this many keys are visible, self included.
      sinks: `[N]` float, one more logit per head that takes softmax mass and gives nothing.
      logits_soft_cap: `cap * tanh(logits / cap)`.
      scale: multiplies the logits; `D ** -0.5` by default.
      implementation: None takes the first of this table.

    Returns:
      `[B, T, N, Dv]` in the query's dtype; softmax and accumulators in float32 (float64 for float64 queries). A
      query at a negative position (a row of fewer than T tokens) gives zeros.

    Raises:
      TypeError, ValueError: naming the argument, before anything is computed.

    | implementation | runs on | dtypes | copies of the cache | gradients | vmap, shard_map | deterministic |
    |---|---|---|---|---|---|---|
    | "blockwise" | any (XLA) | all | CPU: one head at a time, and only to widen it | by the reference | yes | yes |
    | "reference" | any (XLA) | all | float32 copy of the whole | all floats | yes | yes |

    Source: grouped queries, arXiv 2305.13245 section 2. Head-major, so that a step reads each key once and writes none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cache = jax.random.normal(jax.random.key(0), (2, 2, 32, 16))
      >>> query = jax.random.normal(jax.random.key(1), (2, 1, 4, 16))
      >>> decode_attention(query, cache, cache, jnp.array([7, 32])).shape
      (2, 1, 4, 16)
    """
    lengths = _checks.as_int32("lengths", lengths)
    _check(query, key_cache, value_cache, lengths, key_scale, value_scale, sinks)
    window = _checks.check_window(sliding_window)
    scale = _checks.check_number("scale", query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits_soft_cap = _checks.check_number("logits_soft_cap", logits_soft_cap, is_positive=True)
    run = _dispatch.choose("decode_attention", implementation, _IMPLEMENTATIONS)
    operands = algebra.Operands(
        query, key_cache, value_cache, lengths, key_scale, value_scale, sinks
    )
    options = algebra.Options(window, logits_soft_cap, scale)
    operands = jax.tree.map(jnp.asarray, operands)
    out: Any = run(operands, options)
    before = jnp.arange(-query.shape[1], 0, dtype=jnp.int32)
    outside = operands.lengths[:, None] + before[None, :] >= key_cache.shape[2]
    return jnp.where(outside[..., None, None], jnp.asarray(jnp.nan, out.dtype), out)


_IMPLEMENTATIONS = {
    "blockwise": _dispatch.Implementation(vjp.decode_attention),
    "reference": _dispatch.Implementation(reference.decode_attention),
}


def _check(
    query: jax.Array,
    key_cache,
    value_cache,
    lengths: jax.Array | None,
    key_scale: jax.Array | None,
    value_scale: jax.Array | None,
    sinks: jax.Array | None,
) -> None:
    """Raises for every call that no implementation may accept."""
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
    if sizes["S"] < sizes["T"]:
        raise ValueError(f"`key_cache` must hold at least T={sizes['T']} slots, got S={sizes['S']}")
    if not isinstance(lengths, Tracer | jax.ShapeDtypeStruct):
        outside = np.asarray(lengths)[np.asarray(lengths) >= sizes["S"] + sizes["T"]]
        if outside.size:
            raise ValueError(
                f"`lengths` must be at most S={sizes['S']} for some query, got {outside[0]}"
            )
    for name, scale_name, cache, scales in (
        ("key_cache", "key_scale", key_cache, key_scale),
        ("value_cache", "value_scale", value_cache, value_scale),
    ):
        if cache.dtype not in (jnp.int8, jnp.uint8):
            _checks.check_float(name, cache)
        elif cache.dtype == jnp.int8 and scales is None:
            raise ValueError(f"`{scale_name}` must be given with an int8 `{name}`, got None")
        if scales is not None:
            _checks.check_array(scale_name, scales, "B K S", sizes)
            _checks.check_float(scale_name, scales)
    if sinks is not None:
        _checks.check_array("sinks", sinks, "N", sizes)
        _checks.check_float("sinks", sinks)
