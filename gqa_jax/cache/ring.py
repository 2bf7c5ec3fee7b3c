"""A ring of slots for sliding-window attention: memory does not grow with the number of tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa_jax.cache.checks import LOST
from gqa_jax.cache.full import Attended, write
from gqa_jax.cache.lengths import advance, settle
from gqa_jax.cache.rewinding import Rewound, target_positions
from pallas_kernels import as_int32, gqa_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingKVCache:
    """Keys and values of the newest tokens; the token at position p lives in slot p % capacity.

    With a capacity of `window + chunk - 1`, a step of up to `chunk` tokens is written in place and then read. A longer
    step reads old and new tokens side by side before it overwrites any: right for every T.

    Attributes:
      key: `[B, K, S, D]`, after position embedding; S is the capacity.
      value: `[B, K, S, D]`.
      length: `[B]` int32, tokens seen per row.
      written: `[B]` int32, the greatest length since the last reset: what a rewind cannot bring back is older than
        `written - capacity`.
      window: keys visible to a query, self included.
    """

    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S D"]
    length: Int[Array, "B"]
    written: Int[Array, "B"]
    window: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.key.shape[-2]

    @property
    def max_tokens(self) -> int | None:
        """None: a row may see any number of tokens, unless the ring is shorter than the window."""
        return None if self.capacity >= self.window else self.capacity

    @property
    def batch_size(self) -> int:
        """B."""
        return self.length.shape[-1]

    def slot_positions(self) -> Int[Array, "B S"]:
        """Position of the token in each slot; negative where the slot is empty."""
        newest = self.length[:, None] - 1
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None, :]
        return newest - (newest - slot) % self.capacity

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
    ) -> "RingKVCache":
        """The ring with the first `lengths[b]` of T new tokens behind each row's old ones, the oldest overwritten."""
        lengths, length = advance(self.length, lengths, key.shape[1])
        offset = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
        end = lengths[:, None]
        stays = (offset < end) & (
            offset >= end - self.capacity
        )  # of tokens with one slot, the newest
        slot = jnp.where(stays, (self.length[:, None] + offset) % self.capacity, self.capacity)
        new_key, new_value = (jnp.swapaxes(new, 1, 2) for new in (key, value))
        return dataclasses.replace(
            self,
            key=write(self.key, slot, new_key),
            value=write(self.value, slot, new_value),
            length=length,
            written=jnp.maximum(self.written, length),
        )

    def append_and_attend(
        self, query: Array, key: Array, value: Array, lengths: Array, **options: Any
    ) -> Attended:
        """Appends T tokens, then attends from them; as `KVCache.append_and_attend`.

        Raises:
          ValueError: `sliding_window` is not the ring's.
        """
        if options.get("sliding_window") != self.window:
            raise ValueError(
                f"`sliding_window` must be the ring's window {self.window}, got {options.get('sliding_window')}"
            )
        num_new, lengths = query.shape[1], as_int32("lengths", lengths)
        cache = self.append(key, value, lengths)
        offset = jnp.arange(num_new, dtype=jnp.int32)[None, :]
        positions = self.length[:, None] + offset
        in_place = num_new <= self.capacity - self.window + 1
        read = cache if in_place or self.max_tokens is not None else self
        kv_positions = read.slot_positions()
        keys, values = (jnp.swapaxes(x, 1, 2).astype(query.dtype) for x in (read.key, read.value))
        holds_token = kv_positions >= 0
        if read is self:
            keys, values = (
                jnp.concatenate([old, new.astype(query.dtype)], axis=1)
                for old, new in ((keys, key), (values, value))
            )
            kv_positions = jnp.concatenate([kv_positions, positions], axis=1)
            holds_token = jnp.concatenate([holds_token, offset < lengths[:, None]], axis=1)
        out = gqa_attention(
            query,
            keys,
            values,
            is_causal=True,
            query_positions=positions,
            kv_positions=kv_positions,
            query_segment_ids=jnp.zeros_like(positions),
            kv_segment_ids=jnp.where(holds_token, 0, -1),
            **options,
        )
        return Attended(settle(out, lengths, cache.overflowed()), cache)

    def overflowed(self) -> Array:
        """`[B]` bool: rows that lost keys which their window still needs, or were told a number outside [0, T]."""
        return self.length > (LOST - 1 if self.max_tokens is None else self.max_tokens)

    def reset(self) -> "RingKVCache":
        """The same memory, no tokens."""
        empty = jnp.zeros_like(self.length)
        return dataclasses.replace(self, length=empty, written=empty)

    def rewind(self, position: int | Int[Array, "B"]) -> Rewound:
        """Forgets the tokens from `position` on; refuses rows whose window there is partly overwritten.

        Accepted at 0 (an empty row), and where 0 <= position <= length and at most `capacity - window` tokens, counted
        from the newest ever written, would be forgotten. (A second rewind therefore cannot reach further back than the
        first could.)
        """
        position = target_positions(position, self.length)
        emptied = position == 0
        accepted = (position >= 0) & (position <= self.length) & (self.length < LOST)
        if self.max_tokens is None:
            accepted &= self.written - position <= self.capacity - self.window
        accepted |= emptied
        length = jnp.where(accepted, position, self.length)
        written = jnp.where(emptied, 0, self.written)
        return Rewound(dataclasses.replace(self, length=length, written=written), accepted)
