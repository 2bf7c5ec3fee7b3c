"""Keys and values in 8 bits, with one float32 scale per key/value head and token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gqa_jax.cache.full import EveryToken, slots_behind, write
from gqa_jax.cache.lengths import advance
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
class QuantizedKVCache(EveryToken):
    """Every token, in int8 or float8 (e4m3). New tokens, too, are read as they are stored, so that any split of the
    steps gives the same result.

    Attributes:
      key, value: `[B, K, S, D]` codes, int8, or uint8 with the bits of float8_e4m3fn (XLA on a CPU would convert
        a whole float8 array to write one token into it); keys after position embedding; S is the capacity.
      key_scale, value_scale: `[B, K, S]` float32.
      length: `[B]` int32, tokens held per row.
    """

    key_scale: Float[Array, "B K S"]
    value_scale: Float[Array, "B K S"]

    def append(self, key: Array, value: Array, lengths: Array) -> "QuantizedKVCache":
        lengths, length = advance(self.length, lengths, key.shape[1])
        slot = slots_behind(self.length, lengths, key.shape[1], self.capacity)
        key_codes, key_scale = quantize(jnp.swapaxes(key, 1, 2), _stored(self.key).dtype)
        value_codes, value_scale = quantize(jnp.swapaxes(value, 1, 2), _stored(self.value).dtype)
        return QuantizedKVCache(
            write(self.key, slot, key_codes.view(self.key.dtype)),
            write(self.value, slot, value_codes.view(self.value.dtype)),
            length,
            write(self.key_scale, slot, key_scale),
            write(self.value_scale, slot, value_scale),
        )

    def decode(self, query: Array, end: Array, **options: Any) -> Array:
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return decode_attention(query, self.key, self.value, end, **scales, **options)

    def read(self) -> tuple[Array, Array]:
        keys = _stored(self.key).astype(jnp.float32) * self.key_scale[..., None]
        return keys, _stored(self.value).astype(jnp.float32) * self.value_scale[..., None]


def _stored(codes: Array) -> Array:
    """The codes as numbers: int8, or float8_e4m3fn from its bits."""
    return codes.view(jnp.float8_e4m3fn) if codes.dtype == jnp.uint8 else codes
