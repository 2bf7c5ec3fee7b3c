"""Allocates the cache that a policy names."""

from typing import Literal, get_args

import jax.numpy as jnp

from gqa_jax.cache.checks import check_size
from gqa_jax.cache.full import KVCache
from gqa_jax.cache.quantized import QuantizedKVCache
from gqa_jax.cache.ring import RingKVCache
from pallas_kernels import MAX_NEW_TOKENS

Policy = Literal["full", "ring", "int8", "fp8"]
POLICIES: tuple[str, ...] = get_args(Policy)
AttentionCache = KVCache | RingKVCache | QuantizedKVCache
_CODES = {"int8": jnp.int8, "fp8": jnp.uint8}  # the bits of float8_e4m3fn


def allocate(
    policy: Policy,
    *,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_length: int,
    dtype,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
) -> AttentionCache:
    """An empty cache.

    Args:
      policy: "full" keeps every token; "ring" the newest `min(max_length, sliding_window + chunk_size - 1)`; "int8" and
        "fp8" (e4m3) keep every token in 8 bits with float32 scales.
      batch_size, num_kv_heads, head_dim, max_length: B, K, D and S.
      dtype: of keys and values; "int8" and "fp8" have their own.
      sliding_window: of the layer; needed by "ring".
      chunk_size: with "ring" only, the most tokens that a step writes in place (longer steps are right, but copy the
        ring), and so how far a rewind can reach; None means 16.

    Raises:
      TypeError: a size that is no integer, a dtype that is not floating point.
      ValueError: an unknown policy, sizes that are not positive, or an argument that the policy has no use for.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` must be one of {POLICIES}, got {policy!r}")
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        check_size(name, size)
    if batch_size < 1 or max_length < 1:
        raise ValueError(
            f"`batch_size` and `max_length` must be positive, got {batch_size} and {max_length}"
        )
    if policy == "ring" and sliding_window is None:
        raise ValueError("`policy` must not be 'ring' for a layer without `sliding_window`")
    if policy != "ring" and chunk_size is not None:
        raise ValueError(f"`chunk_size` must be None unless policy='ring', got {chunk_size}")
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be positive, got {chunk_size}")
    if policy in _CODES and dtype is not None:
        raise ValueError(f"`dtype` must be None with policy={policy!r}, got {jnp.dtype(dtype)}")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating point, got {jnp.dtype(dtype)}")

    lengths = lambda: jnp.zeros((batch_size,), jnp.int32)
    shape = (batch_size, num_kv_heads, max_length, head_dim)
    if policy == "full":
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), lengths())
    if policy == "ring":
        assert sliding_window is not None
        capacity = min(max_length, sliding_window + (chunk_size or MAX_NEW_TOKENS) - 1)
        shape = (batch_size, num_kv_heads, capacity, head_dim)
        rows = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        return RingKVCache(*rows, lengths(), lengths(), window=sliding_window)
    codes = _CODES[policy]
    return QuantizedKVCache(
        key=jnp.zeros(shape, codes),
        value=jnp.zeros(shape, codes),
        key_scale=jnp.zeros(shape[:-1], jnp.float32),
        value_scale=jnp.zeros(shape[:-1], jnp.float32),
        length=lengths(),
    )
