"""Decoding from a key/value cache whose tokens are spread over devices: the owner writes, partial softmaxes merge."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from gqa_jax.cache import KVCache
from gqa_jax.cache.full import Attended, slots_behind, write
from gqa_jax.cache.lengths import advance, settle
from gqa_jax.parallel.sharding import cast_like
from pallas_kernels import gqa_attention_with_lse


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["axis_name"]
)
@dataclasses.dataclass(frozen=True)
class SpreadKVCache:
    """The cache interface of a layer's `step`, on the part that one device holds. Inside `shard_map`.

    Attributes:
      part: `[B, K, S / n, D]`; device r holds slots r S / n up to (r + 1) S / n.
      axis_name: the axis (or axes) that splits the slots.
    """

    part: KVCache
    axis_name: Any

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens held per row, on all devices together."""
        return self.part.length

    @property
    def key(self) -> Array:
        """This device's."""
        return self.part.key

    @property
    def value(self) -> Array:
        """This device's."""
        return self.part.value

    @property
    def batch_size(self) -> int:
        """B."""
        return self.part.batch_size

    @property
    def max_tokens(self) -> int:
        """S, over all devices."""
        return self.part.capacity * lax.axis_size(self.axis_name)

    def append_and_attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        lengths: Array,
        *,
        scale: float | None,
        sliding_window: int | None,
        sinks: Array | None,
        logits_soft_cap: float | None,
    ) -> Attended:
        """As `KVCache.append_and_attend`; two small all-reduces, nothing of the cache moves."""
        start, num_new, held = self.length, query.shape[1], self.part.capacity
        lengths, length = advance(start, lengths, num_new)
        first = lax.axis_index(self.axis_name) * held
        slot = slots_behind(start, lengths, num_new, self.max_tokens) - first
        slot = jnp.where((slot >= 0) & (slot < held), slot, held)
        new_key, new_value = (jnp.swapaxes(new, 1, 2) for new in (key, value))
        part = KVCache(
            write(self.part.key, slot, new_key), write(self.part.value, slot, new_value), length
        )
        batch = query.shape[0]
        index = jnp.arange(num_new, dtype=jnp.int32)[None, :]
        places = first + jnp.arange(held, dtype=jnp.int32)
        rows = (jnp.swapaxes(x, 1, 2).astype(query.dtype) for x in (part.key, part.value))
        out, lse = gqa_attention_with_lse(
            cast_like(query, part.key),
            *rows,
            is_causal=True,
            sliding_window=sliding_window,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            query_positions=start[:, None] + index,
            kv_positions=jnp.broadcast_to(places, (batch, held)),
        )
        top = lax.pmax(lse, self.axis_name)
        if sinks is not None:
            sinks = sinks.astype(lse.dtype)[None, None]
            top = jnp.maximum(top, sinks)
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weight = jnp.exp(lse - top)
        wide = out.astype(lse.dtype) * weight[..., None]
        total, share = lax.psum((wide, weight), self.axis_name)
        if sinks is not None:
            share = share + jnp.exp(sinks - top)
        out = total / jnp.where(share == 0.0, 1.0, share)[..., None]
        lost = length > self.max_tokens
        cache = dataclasses.replace(self, part=part)
        return Attended(settle(out.astype(query.dtype), lengths, lost), cache)
