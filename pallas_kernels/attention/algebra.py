"""What every implementation agrees on: the request, who sees whom, and which weights dropout keeps."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The static half of a request: hashable, part of the compilation key.

    Attributes:
      scale: multiplies the logits.
      is_causal: keys at later positions than the query are hidden.
      sliding_window: keys at `sliding_window` or more positions before the query are hidden, or None.
      logits_soft_cap: `cap * tanh(logits / cap)`, or None.
      dropout_rate: share of the weights that are dropped.
      q_offset: position of the first query when `Context.query_positions` is None (keys then count from 0).
    """

    scale: float
    is_causal: bool = False
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    q_offset: int = 0


class Inputs(NamedTuple):
    """The differentiable half: `[B, T, N, D]`, `[B, S, K, D]`, `[B, S, K, Dv]`, `[B|1, N|1, T|1, S|1]`, `[N]`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None


class Context(NamedTuple):
    """Arrays without gradient: `mask` as `bias` but boolean, then `[B|1, T]` and `[B|1, S]` integers.

    `q_offsets`, `[B]`, says the same as the positions where every row has its own offset: for kernels that count.
    `dropout_seeds` is uint32 `[4]`: two words drawn from the key, then the index of the first batch row and of the
    first query head of these arrays in the whole computation.
    """

    mask: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    query_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    dropout_seeds: jax.Array | None = None
    q_offsets: jax.Array | None = None


class Tokens(NamedTuple):
    """Position and segment of some tokens, `[B|1, length]` int32; `segment` is None without segments."""

    position: jax.Array
    segment: jax.Array | None

    def map(self, function) -> "Tokens":
        """`function` of both arrays."""
        segment = None if self.segment is None else function(self.segment)
        return Tokens(function(self.position), segment)


def tokens(inputs: Inputs, context: Context, options: Options) -> tuple[Tokens, Tokens]:
    """Position and segment of all queries and of all keys."""
    if context.query_positions is None or context.kv_positions is None:
        query_positions = options.q_offset + jnp.arange(inputs.query.shape[1], dtype=jnp.int32)
        kv_positions = jnp.arange(inputs.key.shape[1], dtype=jnp.int32)
        query_positions, kv_positions = query_positions[None], kv_positions[None]
    else:
        query_positions, kv_positions = context.query_positions, context.kv_positions
    return (
        Tokens(query_positions, context.query_segment_ids),
        Tokens(kv_positions, context.kv_segment_ids),
    )


def finite_tokens(*arrays: jax.Array) -> jax.Array:
    """Which tokens, `[B, length, heads]`, are finite in all of `arrays [B, length, heads, dim]`.

    One that is not makes NaN of all queries that see it, and of nothing else: 0 times NaN is NaN, so wherever a hidden
    token would meet a weight of 0, implementations put zeros in its place.
    """
    # x * 0 is NaN where x is not finite; floats are summed faster than truths.
    return functools.reduce(operator.and_, ((array * 0).sum(-1) == 0 for array in arrays))


def hides_by_position(options: Options) -> bool:
    """Whether positions decide about visibility at all."""
    return options.is_causal or options.sliding_window is not None


def visible(query: Tokens, kv: Tokens, options: Options) -> jax.Array | None:
    """Which keys each query sees by position and segment: boolean `[B|1, t, s]`, or None if all.

    Equal segments see each other; a negative segment is padding, which sees nothing and is seen by nothing.
    """
    seen = None
    if hides_by_position(options):
        distance = query.position[:, :, None] - kv.position[:, None, :]
        seen = distance >= 0
        if options.sliding_window is not None:
            seen = seen & (distance < options.sliding_window)
    if query.segment is not None and kv.segment is not None:
        same = (query.segment[:, :, None] == kv.segment[:, None, :]) & (query.segment >= 0)[
            :, :, None
        ]
        seen = same if seen is None else seen & same
    return seen


def packed_tokens(cu_seqlens: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Position in its sequence, and segment (its index, -1 behind the last one), of `length` packed tokens."""
    index = jnp.arange(length, dtype=jnp.int32)
    cu_seqlens = cu_seqlens.astype(jnp.int32)
    segment = jnp.searchsorted(cu_seqlens, index, side="right").astype(jnp.int32) - 1
    segment = jnp.where(segment < cu_seqlens.shape[0] - 1, segment, -1)
    return (index - cu_seqlens[segment])[None], segment[None]


def dropout_seeds(key: jax.Array, offset) -> jax.Array:
    """`Context.dropout_seeds` from a JAX random key and `(first batch row, first query head)`."""
    first = jnp.asarray((0, 0) if offset is None else offset).astype(jnp.uint32)
    return jnp.concatenate([jax.random.bits(key, (2,), jnp.uint32), first])


def dropout_kept(
    seeds: jax.Array, rows: jax.Array, heads: jax.Array, query: Tokens, kv: Tokens, rate: float
) -> jax.Array:
    """Which weights dropout keeps: boolean `[b, n, t, s]`.

    A hash of (key, batch row, query head, position and segment of the query, position of the key), so that the
    answer for one weight depends neither on the blocking nor on how tokens are ordered or spread over devices.

    Args:
      seeds: `Context.dropout_seeds`.
      rows, heads: `[b]` and `[n]` integers, indices into the arrays of this call.
      query, kv: tokens, `[b|1, t]` and `[b|1, s]`.
      rate: share to drop.
    """
    word = lambda array: array.astype(jnp.uint32)
    batch = _mix(seeds[0] ^ (word(rows) + seeds[2]))[:, None]  # [b, 1]
    head = _mix(batch ^ (word(heads) + seeds[3])[None])[:, :, None]  # [b, n, 1]
    segment = 0 if query.segment is None else word(query.segment)[:, None]
    per_query = _mix(_mix(head ^ word(query.position)[:, None]) + segment)  # [b, n, t]
    per_key = _mix(seeds[1] ^ word(kv.position))  # [b|1, s]
    bits = _mix(per_query[..., None] ^ per_key[:, None, None])
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit flips every output bit about half the time.

    The finaliser of MurmurHash3 (Austin Appleby, public domain).
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
