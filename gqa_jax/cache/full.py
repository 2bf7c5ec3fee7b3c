"""The plain key/value cache: every token, in the dtype of the computation."""

import abc
import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa_jax.cache.checks import LOST
from gqa_jax.cache.lengths import advance, settle
from gqa_jax.cache.rewinding import Rewound, target_positions
from pallas_kernels import MAX_NEW_TOKENS, decode_attention, gqa_attention


class Attended(NamedTuple):
    """Attention over a cache that has just grown.

    Attributes:
      out: `[B, T, N, D]`, the query's dtype; zero on padding, NaN in rows that overflowed.
      cache: with the new tokens.
    """

    out: jax.Array
    cache: Any


@dataclasses.dataclass(frozen=True)
class EveryToken(abc.ABC):
    """A cache in which each token has a slot of its own, so that nothing is ever overwritten."""

    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S D"]
    length: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S, the number of tokens that a row can hold."""
        return self.key.shape[-2]

    @property
    def max_tokens(self) -> int | None:
        """How many tokens a row may see before it overflows; None for any number."""
        return self.capacity

    @property
    def batch_size(self) -> int:
        """B."""
        return self.length.shape[-1]

    @abc.abstractmethod
    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
    ) -> Self:
        """The cache with the first `lengths[b]` of T new tokens written behind each row's old ones.

        Tokens beyond the capacity are not written; `check_step` says so where that can be known, and
        `overflowed` finds the rows where it cannot.
        """

    @abc.abstractmethod
    def decode(self, query: Array, end: Array, **options: Any) -> Array:
        """`decode_attention` of at most `MAX_NEW_TOKENS` queries that end at `end`, over what is stored."""

    @abc.abstractmethod
    def read(self) -> tuple[Array, Array]:
        """Keys and values `[B, K, S, D]` as numbers."""

    def append_and_attend(
        self, query: Array, key: Array, value: Array, lengths: Array, **options: Any
    ) -> Attended:
        """Appends T tokens, then attends from them, causally.

        Args:
          query: `[B, T, N, D]`; token t of a row follows the row's old tokens and the t before it.
          key, value: `[B, T, K, D]`.
          lengths: `[B]`, how many of the T tokens are real. Inside `jit` a row with a number outside [0, T] is lost: it
            takes no token, returns NaN, and has overflowed until `reset`.
          **options: scale, sliding_window, sinks and logits_soft_cap of the operators.
        """
        start, num_new = self.length, query.shape[1]
        cache = self.append(key, value, lengths)
        if num_new <= MAX_NEW_TOKENS:
            # A full or lost row takes part as padding.
            end = jnp.minimum(start, self.capacity - 1) + num_new
            out = cache.decode(query, end, **options)
        else:
            out = prefill_attention(query, *cache.read(), start, **options)
        return Attended(settle(out, lengths, cache.overflowed()), cache)

    def overflowed(self) -> Array:
        """`[B]` bool: rows to which more tokens were appended than they can hold, or a number outside [0, T]."""
        return self.length > self.capacity

    def reset(self) -> Self:
        """The same memory, no tokens."""
        return dataclasses.replace(self, length=jnp.zeros_like(self.length))

    def rewind(self, position: int | Int[Array, "B"]) -> Rewound:
        """Forgets the tokens from `position` on, where 0 <= position <= length; other rows are refused."""
        position = target_positions(position, self.length)
        accepted = (position >= 0) & (position <= self.length)
        accepted &= (self.length < LOST) | (position == 0)
        length = jnp.where(accepted, position, self.length)
        return Rewound(dataclasses.replace(self, length=length), accepted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(EveryToken):
    """Keys and values of the tokens seen so far.

    Attributes:
      key: `[B, K, S, D]`, after position embedding; S is the capacity.
      value: `[B, K, S, D]`.
      length: `[B]` int32, tokens held per row.
    """

    def append(self, key: Array, value: Array, lengths: Array) -> "KVCache":
        lengths, length = advance(self.length, lengths, key.shape[1])
        slot = slots_behind(self.length, lengths, key.shape[1], self.capacity)
        new_key, new_value = (jnp.swapaxes(new, 1, 2) for new in (key, value))
        return KVCache(write(self.key, slot, new_key), write(self.value, slot, new_value), length)

    def decode(self, query: Array, end: Array, **options: Any) -> Array:
        return decode_attention(query, self.key, self.value, end, **options)

    def read(self) -> tuple[Array, Array]:
        return self.key, self.value


def slots_behind(length: Array, lengths: Array, num_new: int, capacity: int) -> Array:
    """`[B, T]` slots of T new tokens behind `length` old ones; `capacity` (out of range) for padding."""
    offset = jnp.arange(num_new, dtype=jnp.int32)[None, :]
    return jnp.where(offset < lengths[:, None], length[:, None] + offset, capacity)


def write(rows: Array, slot: Array, new: Array) -> Array:
    """`[B, K, S, ...]` rows with `[B, K, T, ...]` new entries at `[B, T]` slots; slots out of range are dropped."""
    put = jax.vmap(lambda row, at, x: row.at[:, at].set(x, mode="drop"))
    return put(rows, slot, new.astype(rows.dtype))


def prefill_attention(query: Array, key: Array, value: Array, start: Array, **options) -> Array:
    """Causal attention of `[B, T, N, D]` from position `start[b]` on, over head-major keys and values."""
    key, value = (jnp.swapaxes(cached, 1, 2).astype(query.dtype) for cached in (key, value))
    return gqa_attention(query, key, value, is_causal=True, q_offset=start, **options)
