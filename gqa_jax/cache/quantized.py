"""Keys and values in 8 bits, with one float32 scale per key/value head and token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa_jax.cache.full import (
    MAX_DECODE_TOKENS,
    Attended,
    end_of_step,
    prefill_attention,
    rewind_length,
    slots_behind,
    write,
)
from gqa_jax.cache.lengths import advance, settle
from gqa_jax.cache.rewinding import Rewound
from pallas_kernels import decode_attention


def quantize(x: Float[Array, "... D"], dtype) -> tuple[Array, Float[Array, "..."]]:
    """`(codes [..., D], scale [...] float32)` with `x ~ codes * scale` and scale = max|x| / the largest code.

    A row of zeros has scale 1. Rows with NaN or infinities stay non-finite.

    Args:
      x: any float dtype.
      dtype: int8 or float8_e4m3fn.
    """
    wide = x.astype(jnp.float32)
    whole = jnp.issubdtype(dtype, jnp.integer)
    top = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(largest == 0.0, 1.0, largest / top)
    codes = jnp.clip(wide / scale[..., None], -top, top)
    return (jnp.round(codes) if whole else codes).astype(dtype), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKVCache:
    """Every token, in int8 or float8 (e4m3). New tokens, too, are read as they are stored, so that any split of the
    steps gives the same result.

    Attributes:
      key, value: `[B, K, S, D]` codes, int8, or uint8 with the bits of float8_e4m3fn (XLA on a CPU would convert
        a whole float8 array to write one token into it); keys after position embedding; S is the capacity.
      key_scale, value_scale: `[B, K, S]` float32.
      length: `[B]` int32, tokens held per row.
    """

    key: Array
    value: Array
    key_scale: Float[Array, "B K S"]
    value_scale: Float[Array, "B K S"]
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

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
    ) -> "QuantizedKVCache":
        """As `KVCache.append`; the new tokens are quantised."""
        lengths, length = advance(self.length, lengths, key.shape[1])
        slot = slots_behind(self.length, lengths, key.shape[1], self.capacity)
        key_codes, key_scale = quantize(jnp.swapaxes(key, 1, 2), _stored(self.key).dtype)
        value_codes, value_scale = quantize(jnp.swapaxes(value, 1, 2), _stored(self.value).dtype)
        return QuantizedKVCache(
            write(self.key, slot, key_codes.view(self.key.dtype)),
            write(self.value, slot, value_codes.view(self.value.dtype)),
            write(self.key_scale, slot, key_scale),
            write(self.value_scale, slot, value_scale),
            length,
        )

    def append_and_attend(
        self, query: Array, key: Array, value: Array, lengths: Array, **options: Any
    ) -> Attended:
        """As `KVCache.append_and_attend`."""
        start, num_new = self.length, query.shape[1]
        cache = self.append(key, value, lengths)
        if num_new <= MAX_DECODE_TOKENS:
            out = decode_attention(
                query,
                cache.key,
                cache.value,
                end_of_step(start, num_new, self.capacity),
                key_scale=cache.key_scale,
                value_scale=cache.value_scale,
                **options,
            )
        else:
            keys = _stored(cache.key).astype(jnp.float32) * cache.key_scale[..., None]
            values = _stored(cache.value).astype(jnp.float32) * cache.value_scale[..., None]
            out = prefill_attention(query, keys, values, start, **options)
        return Attended(settle(out, lengths, cache.overflowed()), cache)

    def overflowed(self) -> Array:
        """As `KVCache.overflowed`."""
        return self.length > self.capacity

    def reset(self) -> "QuantizedKVCache":
        """The same memory, no tokens."""
        return dataclasses.replace(self, length=jnp.zeros_like(self.length))

    def rewind(self, position: int | Int[Array, "B"]) -> Rewound:
        """As `KVCache.rewind`."""
        return rewind_length(self, position)


def _stored(codes: Array) -> Array:
    """The codes as numbers: int8, or float8_e4m3fn from its bits."""
    return codes.view(jnp.float8_e4m3fn) if codes.dtype == jnp.uint8 else codes
